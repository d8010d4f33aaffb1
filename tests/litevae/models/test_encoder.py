"""The encoder against Appendix G, written out again with PyWavelets and the paper's own names."""

import re

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from torch import nn

from litevae.models import encoder as encoder_module
from litevae.models.encoder import Encoder

CONFIG = {
    "extractor_channels": 8,
    "extractor_multipliers": (1, 2, 2),
    "aggregator_channels": 4,
    "aggregator_multipliers": (1, 3),
    "num_groups": 4,
}


class PaperResBlock(nn.Module):
    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_out = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels == out_channels:
            self.skip_connection = nn.Identity()
        else:
            self.skip_connection = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = self.conv_out(F.silu(self.norm_out(h)))
        return self.skip_connection(x) + h


class PaperUNet(nn.Module):
    def __init__(self, in_channels, out_channels, model_channels, ch_multiplies, groups):
        super().__init__()
        self.in_layer = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        self.out_layer = nn.Conv2d(model_channels * ch_multiplies[0], out_channels, 3, padding=1)
        channel = model_channels
        in_channel_list = [model_channels]
        self.encoder_blocks = nn.ModuleList()
        for ch_mult in ch_multiplies:
            for _ in range(2):
                self.encoder_blocks.append(PaperResBlock(channel, model_channels * ch_mult, groups))
                channel = model_channels * ch_mult
                in_channel_list.append(channel)
        self.res0 = PaperResBlock(channel, channel, groups)
        self.res1 = PaperResBlock(channel, channel, groups)
        self.decoder_blocks = nn.ModuleList()
        for ch_mult in reversed(ch_multiplies):
            for _ in range(2):
                width = model_channels * ch_mult
                self.decoder_blocks.append(PaperResBlock(channel + in_channel_list.pop(), width, groups))
                channel = width

    def forward(self, x):
        x = self.in_layer(x)
        skip_features = [x]
        for enc_block in self.encoder_blocks:
            x = enc_block(x)
            skip_features.append(x)
        x = self.res1(self.res0(x))
        for dec_block in self.decoder_blocks:
            x = dec_block(torch.cat([x, skip_features.pop()], dim=1))
        return self.out_layer(x)


class PaperEncoder(nn.Module):
    def __init__(self, in_channels, out_channels, extractor, aggregator, groups):
        super().__init__()
        self.feature_extractor_L1 = PaperUNet(in_channels, in_channels, *extractor, groups)
        self.feature_extractor_L2 = PaperUNet(in_channels, in_channels, *extractor, groups)
        self.feature_extractor_L3 = PaperUNet(in_channels, in_channels, *extractor, groups)
        self.feature_aggregator = PaperUNet(3 * in_channels, 2 * out_channels, *aggregator, groups)
        self.downsample_block_L1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.downsample_block_L2 = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, image):
        dwt = [torch.from_numpy(pywt_level(image.numpy(), level)) / 2**level for level in (1, 2, 3)]
        features_L1 = self.feature_extractor_L1(dwt[0])
        features_L1 = self.downsample_block_L1(F.interpolate(features_L1, scale_factor=1 / 4, mode="area"))
        features_L2 = self.feature_extractor_L2(dwt[1])
        features_L2 = self.downsample_block_L2(F.interpolate(features_L2, scale_factor=1 / 2, mode="area"))
        features_L3 = self.feature_extractor_L3(dwt[2])
        return self.feature_aggregator(torch.cat([features_L1, features_L2, features_L3], dim=1))


def pywt_level(image: np.ndarray, level: int) -> np.ndarray:
    """The coarsest sub-bands of a `level`-level transform, LL, H, V, D one after the other."""
    low, high = pywt.wavedec2(image, "haar", mode="symmetric", level=level)[:2]
    return np.concatenate([low, *high], axis=1)


def paper_name(name: str) -> str:
    """The name in Appendix G of one of our parameters."""
    for ours, theirs in [
        (r"feature_extractors\.(\d)", lambda m: f"feature_extractor_L{int(m[1]) + 1}"),
        (r"downsamplers\.(\d)\.conv", lambda m: f"downsample_block_L{int(m[1]) + 1}"),
        (r"mid_block\.resnets\.", "res"),
        (r"norm1", "norm_in"),
        (r"norm2", "norm_out"),
        (r"conv1", "@in"),
        (r"conv2", "@out"),
        (r"conv_shortcut", "skip_connection"),
        (r"conv_in", "in_layer"),
        (r"conv_out", "out_layer"),
        (r"@", "conv_"),
    ]:
        name = re.sub(ours, theirs, name)
    return name


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(in_channels=3, out_channels=8, levels=3, **CONFIG)


def test_is_appendix_g():
    ours = encoder().double()
    theirs = PaperEncoder(12, 4, (8, (1, 2, 2)), (4, (1, 3)), groups=4).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.load_state_dict({paper_name(name): p for name, p in ours.state_dict().items()}, strict=True)
    image = torch.rand(2, 3, 32, 48, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), atol=1e-10, rtol=1e-10)


def test_levels_have_their_own_extractors():
    extractors = encoder().feature_extractors
    assert len({id(p) for extractor in extractors for p in extractor.parameters()}) == sum(
        len(list(extractor.parameters())) for extractor in extractors
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_get_the_parameters_dtype_and_the_images_format(dtype, memory_format):
    model = encoder().to(dtype)
    seen = []
    for extractor in model.feature_extractors:
        extractor.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.randn(2, 3, 32, 32).contiguous(memory_format=memory_format)
    out = model(image)
    assert [x.shape for x in seen] == [(2, 12, size, size) for size in (16, 8, 4)]
    assert all(x.dtype == dtype and x.is_contiguous(memory_format=memory_format) for x in [*seen, out])


def test_pyramid_is_written_in_autocasts_dtype():
    model, seen = encoder(), []
    model.feature_extractors[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    image = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(image)
    assert seen == [torch.bfloat16]
    expected = model(image)
    in_bfloat16 = model.bfloat16()(image)  # weights in bfloat16 too: the same roundings and more
    assert (out - expected).norm() < 2 * (in_bfloat16 - expected).norm()
    assert (in_bfloat16 - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fine_levels_are_extracted_slice_by_slice(monkeypatch, memory_format):
    model, sizes = encoder().double(), []
    image = torch.randn(5, 3, 32, 48, dtype=torch.float64).contiguous(memory_format=memory_format)
    whole = model(image)
    for extractor in model.feature_extractors:
        extractor.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[::2]))
    monkeypatch.setitem(encoder_module.SLICE_PIXELS, "cpu", 2 * 16 * 24)
    model(image)
    assert sizes == [(5, 16), (5, 8), (5, 4)]  # the gradient keeps the features in any case
    sizes.clear()
    with torch.no_grad():
        sliced = model(image)
    assert sizes == [(2, 16), (2, 16), (1, 16), (5, 8), (5, 4)]
    assert sliced.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(sliced, whole, atol=1e-12, rtol=1e-12)


def test_gradients_reach_every_parameter_and_the_image():
    model = encoder()
    image = torch.randn(2, 3, 32, 32, requires_grad=True)
    model(image).square().sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_compiles_whole():
    model, image = encoder(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image))
