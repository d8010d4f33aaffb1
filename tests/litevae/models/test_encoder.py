"""Tests of the encoder against Appendix G, reimplemented with PyWavelets and the paper's names."""

import re

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from litevae import LiteVAE
from litevae.models import encoder as encoder_module
from litevae.models.encoder import Encoder
from litevae.models.layers import ResBlock
from litevae_kernels.nn import SelfModulatedConv2d

CONFIG = {
    "extractor_channels": 8,
    "extractor_multipliers": (1, 2, 2),
    "aggregator_channels": 4,
    "aggregator_multipliers": (1, 3),
    "num_groups": 4,
}
DWT = {"encoder_type": "dwt", "latent_channels": 12}
DWT_2 = {"encoder_type": "dwt-2", "latent_channels": 48}


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
    """Returns the coarsest sub-bands of a `level`-level transform in the order LL, H, V, D."""
    low, high = pywt.wavedec2(image, "haar", mode="symmetric", level=level)[:2]
    return np.concatenate([low, *high], axis=1)


def paper_name(name: str) -> str:
    """Returns the name that Appendix G gives to one of our parameters."""
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
    in_bfloat16 = model.bfloat16()(image)  # the same roundings and more
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
    assert sizes == [(5, 16), (5, 8), (5, 4)]  # the backward pass needs the features anyway
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


# Variants of the encoder


def moments(vae: LiteVAE, image: Tensor) -> Tensor:
    return vae.encode(image).latent_dist.parameters


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [DWT, DWT_2], ids=["dwt", "dwt-2"])
def test_wavelet_encoders_match_pywavelets(make_variant, square_image, options, dtype):
    """The mean is the coarsest sub-bands of three levels, or of two with squares of 2x2 as channels."""
    levels, side = (3, 1) if options is DWT else (2, 2)
    posterior = make_variant(**options).to(dtype).encode(square_image).latent_dist
    low, high, *_ = pywt.wavedec2(square_image.double().numpy(), "haar", level=levels)
    bands = np.concatenate([low, *high], axis=1) / 2**levels
    n, c, h, w = bands.shape
    squares = bands.reshape(n, c, h // side, side, w // side, side).transpose(0, 1, 3, 5, 2, 4)
    expected = torch.from_numpy(squares.reshape(n, c * side**2, h // side, w // side).copy())
    eps = torch.finfo(dtype).eps
    # Up to 3 levels of 3 additions each round values of at most 1 up to 9 times; the dtype rounds once more.
    torch.testing.assert_close(
        posterior.mean.double(), expected, atol=9 * min(eps, torch.finfo(torch.float32).eps), rtol=eps
    )
    assert posterior.mean.dtype == dtype
    assert (posterior.logvar == -30).all()


@pytest.mark.parametrize("options", [DWT, DWT_2], ids=["dwt", "dwt-2"])
def test_wavelet_encoders_sample_is_the_mode(make_variant, square_image, options):
    posterior = make_variant(**options).encode(square_image).latent_dist
    sample = posterior.sample(torch.Generator().manual_seed(0))
    # None of a few thousand draws is beyond 5 standard deviations of exp(-15), which are 13 roundings at 1.
    torch.testing.assert_close(sample, posterior.mode(), atol=5 * np.exp(-15), rtol=1e-6)


def test_shared_extractor_is_three_equal_ones(make_variant, square_image, tmp_path):
    shared, separate = make_variant(shared_extractor=True), make_variant()
    weights = shared.encoder.feature_extractors[0].state_dict()
    for extractor in separate.encoder.feature_extractors:
        extractor.load_state_dict(weights)
    separate.encoder.downsamplers.load_state_dict(shared.encoder.downsamplers.state_dict())
    separate.encoder.feature_aggregator.load_state_dict(shared.encoder.feature_aggregator.state_dict())
    assert torch.equal(moments(shared, square_image), moments(separate, square_image))
    shared.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == shared.state_dict().keys()  # each weight is stored once
    assert not any(name.startswith("encoder.feature_extractors.1") for name in stored)


@pytest.mark.parametrize("finest_level", [2, 3])
def test_without_the_finest_levels(make_variant, square_image, finest_level):
    encoder = make_variant(finest_level=finest_level).encoder.double()
    features = []
    for index, level in enumerate(range(finest_level, 4)):
        low, high, *_ = pywt.wavedec2(square_image.double().numpy(), "haar", level=level)
        bands = torch.from_numpy(np.concatenate([low, *high], axis=1) / 2**level)
        feature = encoder.feature_extractors[index](bands)
        if level < 3:
            convolution = encoder.downsamplers[index].conv
            feature = F.conv2d(F.avg_pool2d(feature, 2), convolution.weight, convolution.bias, padding=1)
        features.append(feature)
    assert len(encoder.feature_extractors) == len(features)
    expected = encoder.feature_aggregator(torch.cat(features, dim=1))
    torch.testing.assert_close(encoder(square_image.double()), expected, atol=1e-12, rtol=1e-12)


def test_self_modulated_encoder_is_equation_3(make_variant, square_image, unfused):
    vae = make_variant(encoder_norm="smc").double()
    blocks = [module for module in vae.encoder.modules() if isinstance(module, ResBlock)]
    assert all(isinstance(block.conv1, SelfModulatedConv2d) for block in blocks)
    assert not any(isinstance(module, nn.GroupNorm) for module in vae.encoder.modules())
    expected = moments(unfused(vae), square_image.double())
    torch.testing.assert_close(moments(vae, square_image.double()), expected, atol=1e-11, rtol=1e-11)


def test_wavelet_encoder_is_checked_against_the_images_device(make_variant):
    with pytest.raises(ValueError, match="image must be on the model's device cpu, got meta"):
        make_variant(**DWT).encode(torch.zeros(1, 3, 16, 16, device="meta"))


def test_shared_features_are_extracted_slice_by_slice(make_variant, square_image, monkeypatch):
    monkeypatch.setitem(encoder_module.SLICE_PIXELS, "cpu", 16 * 16)
    vae = make_variant(extractor="nafnet", shared_extractor=True).double()
    whole = moments(vae, square_image.double())
    with torch.no_grad():
        torch.testing.assert_close(moments(vae, square_image.double()), whole, atol=1e-12, rtol=1e-12)
