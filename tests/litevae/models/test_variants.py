"""The encoder's variants (Tables 11, 12 and 17 to 21): each against an independent formula, and all in all uses."""

import copy
import json

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from litevae import LiteVAE
from litevae.models import encoder as encoder_module
from litevae.models import feature_unet, nafnet, vit
from litevae.models.layers import ResBlock
from litevae.models.nafnet import NAFBlock, NAFNet
from litevae.models.vit import TransformerBlock, ViT
from litevae_kernels.nn import SelfModulatedConv2d

DWT = {"encoder_type": "dwt", "latent_channels": 12}
DWT_2 = {"encoder_type": "dwt-2", "latent_channels": 48}
VARIANTS = {
    "dwt": DWT,
    "dwt-2": DWT_2,
    "nafnet": {"extractor": "nafnet"},
    "shared": {"shared_extractor": True},
    "vit": {"aggregator": "vit", "sample_size": 32},
    "last two levels": {"finest_level": 2},
    "smc": {"encoder_norm": "smc"},
    "together": {
        "extractor": "nafnet",
        "shared_extractor": True,
        "aggregator": "vit",
        "sample_size": 32,
        "finest_level": 2,
        "use_1x1_conv": True,
        "output_type": "wavelet",
        "decoder_norm": "smc",
        "latent_channels": 12,
    },
    "nafnet and smc": {
        "extractor": "nafnet",
        "encoder_norm": "smc",
        "decoder_norm": "smc",
        "use_1x1_conv": True,
    },
    "dwt to wavelet": {**DWT, "output_type": "wavelet", "decoder_norm": "smc"},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def randomised(module: nn.Module) -> nn.Module:
    """With nothing at its start: what is zero there would hide what stands before it."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=max(1, parameter[0].numel()) ** -0.5 if parameter.ndim > 1 else 0.3)
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
            nn.init.normal_(layer.weight, mean=1, std=0.2)
        elif isinstance(layer, SelfModulatedConv2d):
            nn.init.uniform_(layer.scale, 0.5, 2)
            nn.init.uniform_(layer.gain, 0.5, 1)
        elif isinstance(layer, NAFBlock):
            nn.init.uniform_(layer.beta, 0.2, 0.5)
            nn.init.uniform_(layer.gamma, 0.2, 0.5)
            nn.init.ones_(layer.attention.bias)
    return module


@pytest.fixture
def make(tiny_config, monkeypatch):
    """A LiteVAE with few layers, always of the same weights."""
    monkeypatch.setattr(feature_unet, "RES_BLOCKS", 1)
    monkeypatch.setattr(nafnet, "BLOCKS", 2)
    monkeypatch.setattr(vit, "BLOCKS", 2)

    def make(**options) -> LiteVAE:
        torch.manual_seed(0)
        few = {"extractor_multipliers": (1,), "aggregator_multipliers": (1,)}
        return randomised(LiteVAE(**{**tiny_config, **few, **options}))

    return make


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def moments(vae: LiteVAE, image: Tensor) -> Tensor:
    return vae.encode(image).latent_dist.parameters


def distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Parameters


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 6_753_252),  # Table 2 prints 6.75 M
        ({"use_1x1_conv": True}, 6_753_252),
        ({"encoder_type": "dwt", "latent_channels": 12}, 0),
        ({"encoder_type": "dwt-2", "latent_channels": 48}, 0),
        ({"extractor": "nafnet"}, 6_630_084),
        ({"shared_extractor": True}, 6_753_252 - 2 * 1_686_220),
        ({"finest_level": 2}, 6_753_252 - 1_686_220 - 1_308 - 12 * 9 * 32),
        ({"encoder_norm": "smc"}, 6_744_148),
        ({"aggregator": "vit"}, 6_753_252 - 1_691_976 + 966_792),
    ],
    ids=str,
)
def test_parameter_counts_of_litevae_b(options, parameters):
    with torch.device("meta"):
        assert count(LiteVAE.from_preset("litevae-b", **options).encoder) == parameters


@pytest.mark.parametrize(("latent_channels", "parameters"), [(4, 835_720), (12, 837_784)])
def test_vit_has_the_papers_size(latent_channels, parameters):
    """Table 20: 1.69 M parameters of the U-Net, 0.84 M of the ViT, of which our position embedding is no part."""
    with torch.device("meta"):
        unet = LiteVAE.from_preset("litevae-b").encoder.feature_aggregator
        vae = LiteVAE.from_preset("litevae-b", latent_channels, aggregator="vit")
    transformer = vae.encoder.feature_aggregator
    assert transformer.pos_embed.shape == (128, 32, 32)
    assert count(transformer) - transformer.pos_embed.numel() == parameters
    assert f"{parameters / 1e6:.2f}" == "0.84"
    assert f"{count(unet) / 1e6:.2f}" == "1.69"


# Each against an independent formula


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [DWT, DWT_2], ids=["dwt", "dwt-2"])
def test_wavelet_encoders_are_pywavelets(make, image, options, dtype):
    """The lowest sub-bands of three levels; or of two, in squares of four pixels one after the other."""
    levels, side = (3, 1) if options is DWT else (2, 2)
    posterior = make(**options).to(dtype).encode(image).latent_dist
    low, high, *_ = pywt.wavedec2(image.double().numpy(), "haar", level=levels)
    bands = np.concatenate([low, *high], axis=1) / 2**levels
    n, c, h, w = bands.shape
    squares = bands.reshape(n, c, h // side, side, w // side, side).transpose(0, 1, 3, 5, 2, 4)
    expected = torch.from_numpy(squares.reshape(n, c * side**2, h // side, w // side).copy())
    eps = torch.finfo(dtype).eps
    # 2 levels of 3 additions each are at most 9 roundings of what is at most 1; then one to the dtype
    torch.testing.assert_close(
        posterior.mean.double(), expected, atol=9 * min(eps, torch.finfo(torch.float32).eps), rtol=eps
    )
    assert posterior.mean.dtype == dtype
    assert (posterior.logvar == -30).all()


@pytest.mark.parametrize("options", [DWT, DWT_2], ids=["dwt", "dwt-2"])
def test_wavelet_encoders_sample_is_the_mode(make, image, options):
    posterior = make(**options).encode(image).latent_dist
    sample = posterior.sample(torch.Generator().manual_seed(0))
    # no draw of a few thousand is farther than 5 standard deviations, exp(-15) each: 13 roundings at 1
    torch.testing.assert_close(sample, posterior.mode(), atol=5 * np.exp(-15), rtol=1e-6)


def test_wavelet_encoder_by_tiles_is_the_same(make, image):
    vae = make(**DWT)
    whole = moments(vae, image)
    vae.enable_tiling()
    vae.tile_sample_min_size = 16
    assert torch.equal(moments(vae, image), whole)


def plain_naf_block(block: NAFBlock, x: Tensor) -> Tensor:
    """Chen et al., Figure 3c and Equations 4 to 6, with sums written out."""

    def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=1, keepdim=True)
        y = centred / (centred.square().mean(dim=1, keepdim=True) + layer.eps).sqrt()
        return torch.einsum("nchw,c->nchw", y, layer.weight) + layer.bias[:, None, None]

    def pointwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
        return torch.einsum("nchw,oc->nohw", x, layer.weight[:, :, 0, 0]) + layer.bias[:, None, None]

    def simple_gate(x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return x[:, :half] * x[:, half:]

    h = pointwise(block.expand1, norm(block.norm1, x))
    padded, (height, width) = F.pad(h, (1, 1, 1, 1)), h.shape[2:]
    h = block.depthwise.bias[:, None, None] + sum(
        block.depthwise.weight[:, :, i, j].view(1, -1, 1, 1) * padded[:, :, i : i + height, j : j + width]
        for i in range(3)
        for j in range(3)
    )
    h = simple_gate(h)
    h = h * pointwise(block.attention, h.sum(dim=(2, 3), keepdim=True) / (height * width))
    x = x + block.beta * pointwise(block.project1, h)
    h = simple_gate(pointwise(block.expand2, norm(block.norm2, x)))
    return x + block.gamma * pointwise(block.project2, h)


def test_nafnet_is_the_papers_formula():
    torch.manual_seed(0)
    network = randomised(NAFNet(3, 5, channels=4, multipliers=(1, 2)).double())
    assert len(network.blocks) == 16
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = network.conv_in(x)
    for block in network.blocks:
        expected = plain_naf_block(block, expected)
    torch.testing.assert_close(network(x), network.conv_out(expected), atol=1e-11, rtol=1e-11)


def test_new_nafnet_is_two_convolutions():
    """Beta and gamma are zero at first."""
    network, x = NAFNet(3, 5, channels=4, multipliers=(1,)), torch.randn(2, 3, 6, 5)
    assert torch.equal(network(x), network.conv_out(network.conv_in(x)))


def test_layer_norms_statistics_are_float32():
    """Of values whose squares bfloat16 and float16 do not hold: 300 and its neighbours."""
    torch.manual_seed(0)
    block = NAFBlock(64)
    x = 300 + 8 * torch.randn(1, 64, 4, 4)
    for dtype in (torch.float16, torch.bfloat16):
        stored = x.to(dtype)
        actual = copy.deepcopy(block.norm1).to(dtype)(stored)
        expected = (stored.double() - stored.double().mean(1)) / stored.double().std(1, unbiased=False)
        assert actual.dtype == dtype
        # a rounding at the end, and one of the mean's in float32, 300 times as large as what is left of it
        torch.testing.assert_close(actual.double(), expected, atol=1e-4, rtol=torch.finfo(dtype).eps)


def test_vit_is_pytorchs_transformer():
    torch.manual_seed(0)
    transformer = randomised(ViT(6, 5, channels=8, size=4).double())
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    embedded = transformer.conv_in(x) + transformer.pos_embed
    expected = embedded.flatten(2).transpose(1, 2)
    for block in transformer.blocks:
        layer = nn.TransformerEncoderLayer(
            32, 4, 128, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).double()
        names = {
            "to_qkv.weight": "self_attn.in_proj_weight",
            "to_qkv.bias": "self_attn.in_proj_bias",
            "to_out.weight": "self_attn.out_proj.weight",
            "to_out.bias": "self_attn.out_proj.bias",
        }
        layer.load_state_dict({names.get(name, name): value for name, value in block.state_dict().items()})
        expected = layer(expected)
    expected = transformer.conv_out(expected.transpose(1, 2).reshape(2, 32, 4, 4))
    torch.testing.assert_close(transformer(x), expected, atol=1e-11, rtol=1e-11)


def test_shared_extractor_is_three_equal_ones(make, image, tmp_path):
    shared, separate = make(shared_extractor=True), make()
    weights = shared.encoder.feature_extractors[0].state_dict()
    for extractor in separate.encoder.feature_extractors:
        extractor.load_state_dict(weights)
    separate.encoder.downsamplers.load_state_dict(shared.encoder.downsamplers.state_dict())
    separate.encoder.feature_aggregator.load_state_dict(shared.encoder.feature_aggregator.state_dict())
    assert torch.equal(moments(shared, image), moments(separate, image))
    shared.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == shared.state_dict().keys()  # each weight once, under one name
    assert not any(name.startswith("encoder.feature_extractors.1") for name in stored)


@pytest.mark.parametrize("finest_level", [2, 3])
def test_coarse_levels_alone(make, image, finest_level):
    encoder = make(finest_level=finest_level).encoder.double()
    features = []
    for index, level in enumerate(range(finest_level, 4)):
        low, high, *_ = pywt.wavedec2(image.double().numpy(), "haar", level=level)
        bands = torch.from_numpy(np.concatenate([low, *high], axis=1) / 2**level)
        feature = encoder.feature_extractors[index](bands)
        if level < 3:
            convolution = encoder.downsamplers[index].conv
            feature = F.conv2d(F.avg_pool2d(feature, 2), convolution.weight, convolution.bias, padding=1)
        features.append(feature)
    assert len(encoder.feature_extractors) == len(features)
    expected = encoder.feature_aggregator(torch.cat(features, dim=1))
    torch.testing.assert_close(encoder(image.double()), expected, atol=1e-12, rtol=1e-12)


def test_self_modulated_encoder_is_equation_3(make, image, unfused):
    vae = make(encoder_norm="smc").double()
    blocks = [module for module in vae.encoder.modules() if isinstance(module, ResBlock)]
    assert all(isinstance(block.conv1, SelfModulatedConv2d) for block in blocks)
    assert not any(isinstance(module, nn.GroupNorm) for module in vae.encoder.modules())
    expected = moments(unfused(vae), image.double())
    torch.testing.assert_close(moments(vae, image.double()), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("decoder_norm", ["group", "smc"])
def test_fold_of_a_self_modulated_encoder(make, image, tmp_path, decoder_norm):
    vae = make(encoder_norm="smc", decoder_norm=decoder_norm)
    folded = vae.fold()
    assert folded.config.encoder_norm == "none"
    assert folded.config.decoder_norm == {"group": "group", "smc": "none"}[decoder_norm]
    assert vae.config.encoder_norm == "smc"
    assert not any(isinstance(module, SelfModulatedConv2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(image).sample, vae(image).sample)
        folded.save_pretrained(tmp_path)
        assert torch.equal(LiteVAE.from_pretrained(tmp_path)(image).sample, folded(image).sample)


# All of them in all uses


@each_variant
def test_round_trip_through_a_folder(make, image, tmp_path, options):
    vae = make(**options)
    vae.save_pretrained(tmp_path)
    loaded = LiteVAE.from_pretrained(tmp_path)
    half = LiteVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert options.items() <= loaded.config.items()
    state = loaded.state_dict()
    assert state.keys() == vae.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in vae.state_dict().items())
    with torch.no_grad():
        # the file's weights lie at other addresses, for which the CPU's library adds up in another order
        torch.testing.assert_close(loaded(image).sample, vae(image).sample)
        assert half(image).sample.dtype == moments(half, image).dtype == torch.bfloat16
        folded = vae.fold()
        torch.testing.assert_close(moments(folded, image), moments(vae, image))


def test_models_from_before_the_variants_load(make, image, tmp_path):
    vae = make()
    vae.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for name in (
        "encoder_type",
        "extractor",
        "shared_extractor",
        "aggregator",
        "finest_level",
        "encoder_norm",
    ):
        del config[name]
    file.write_text(json.dumps(config))
    with torch.no_grad():
        assert torch.equal(LiteVAE.from_pretrained(tmp_path)(image).sample, vae(image).sample)


@each_variant
def test_training_step(make, image, options):
    """Every parameter learns, its gradient is as near to float64's as rounding allows, checkpointed too."""

    def gradients(vae: LiteVAE, image: Tensor) -> list[Tensor]:
        vae.zero_grad()
        posterior = vae.encode(image).latent_dist
        noise = torch.ones_like(posterior.mean)
        loss = (vae.decode(posterior.mean + posterior.std * noise).sample - image).square().mean()
        (loss + 1e-3 * posterior.kl().mean()).backward()
        return [parameter.grad.clone() for parameter in vae.parameters()]

    vae = make(**options)
    actual = gradients(vae, image)
    assert all(gradient.any() for gradient in actual)
    exact = gradients(copy.deepcopy(vae).double(), image.double())
    flat, flat_exact = (torch.cat([g.flatten() for g in each]) for each in (actual, exact))
    # each operator rounds once, forwards and backwards: under 400, and the errors add up in squares
    assert distance(flat, flat_exact) < 400**0.5 * torch.finfo(torch.float32).eps
    vae.enable_gradient_checkpointing()
    for a, b in zip(gradients(vae, image), actual, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("block", [NAFBlock, TransformerBlock])
def test_checkpointing_reaches_the_new_blocks(make, image, block):
    vae = make(extractor="nafnet", aggregator="vit", sample_size=32)
    vae.enable_gradient_checkpointing()
    runs = []
    blocks = [module for module in vae.modules() if isinstance(module, block)]
    for module in blocks:
        module.register_forward_pre_hook(lambda *_: runs.append(1))
    vae(image).sample.sum().backward()
    assert len(runs) == 2 * len(blocks)


@each_variant
def test_channels_last_is_kept(make, image, options):
    vae = make(**options)
    seen = []
    for module in vae.encoder.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            seen.clear()
            out = moments(vae, image.contiguous(memory_format=memory_format))
            for x in [*seen, out]:
                assert x.is_contiguous(memory_format=memory_format), x.stride()


@each_variant
def test_autocast(make, image, options):
    vae = make(**options)
    with torch.no_grad():
        exact = moments(copy.deepcopy(vae).double(), image.double())
        with torch.autocast("cpu", torch.bfloat16):
            actual = moments(vae, image)
            assert vae(image).sample.dtype == torch.bfloat16
        in_bfloat16 = moments(copy.deepcopy(vae).bfloat16(), image)
    assert actual.dtype == in_bfloat16.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    # each of the chain's operators rounds once: under 200, whose errors of eps / 4 add up in squares
    assert distance(actual, exact) < 200**0.5 * eps / 4
    # weights in bfloat16 too: the same roundings and more
    assert distance(actual, exact) < 2 * distance(in_bfloat16, exact)


@pytest.mark.parametrize("name", ["dwt", "dwt-2", "nafnet", "shared", "vit", "smc"])
def test_encode_compiles_whole(make, image, name):
    torch._dynamo.reset()
    fewer = {} if "dwt" in name else {"finest_level": 2 if name == "shared" else 3}
    vae, graphs = make(**VARIANTS[name], **fewer), CompileCounter()
    compiled = torch.compile(lambda x: moments(vae, x), fullgraph=True, backend=graphs)
    with torch.no_grad():
        assert torch.equal(compiled(image), moments(vae, image))
    assert graphs.frame_count == 1


@each_variant
def test_weights_that_are_offloaded_between_layers(make, image, options):
    from accelerate import cpu_offload

    vae = make(**options)
    with torch.no_grad():
        expected = vae(image).sample
        cpu_offload(vae, execution_device="cpu")
        assert torch.equal(vae(image).sample, expected)


@each_variant
def test_layerwise_casting(make, image, options):
    vae = make(**options)
    rounded = copy.deepcopy(vae)
    for name, module in rounded.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "norm" not in name:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(vae(image).sample, rounded(image).sample)


def test_wavelet_encoder_is_checked_against_the_images_device(make):
    with pytest.raises(ValueError, match="image must be on the model's device cpu, got meta"):
        make(**DWT).encode(torch.zeros(1, 3, 16, 16, device="meta"))


def test_fine_levels_are_extracted_slice_by_slice(make, image, monkeypatch):
    monkeypatch.setitem(encoder_module.SLICE_PIXELS, "cpu", 16 * 16)
    vae = make(extractor="nafnet", shared_extractor=True).double()
    whole = moments(vae, image.double())
    with torch.no_grad():
        torch.testing.assert_close(moments(vae, image.double()), whole, atol=1e-12, rtol=1e-12)


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_type": "fft"}, "encoder_type must be one of 'learned', 'dwt', 'dwt-2', got 'fft'"),
        ({"extractor": "resnet"}, "extractor must be one of 'unet', 'nafnet', got 'resnet'"),
        ({"aggregator": "mlp"}, "aggregator must be one of 'unet', 'vit', got 'mlp'"),
        ({"encoder_norm": "batch"}, "encoder_norm must be one of 'group', 'smc', 'none', got 'batch'"),
        ({"finest_level": 0}, "finest_level must be from 1 to 3, got 0"),
        ({"finest_level": 4}, "finest_level must be from 1 to 3, got 4"),
        ({"encoder_type": "dwt"}, "latent_channels must be 12 for encoder_type='dwt', got 4"),
        ({**DWT, "in_channels": 1}, "latent_channels must be 4 for encoder_type='dwt', got 12"),
        ({"encoder_type": "dwt-2"}, "latent_channels must be 48 for encoder_type='dwt-2', got 4"),
        ({**DWT, "use_1x1_conv": True}, "use_1x1_conv must be False for encoder_type='dwt', got True"),
        ({**DWT, "aggregator": "vit"}, "aggregator must be 'unet' for encoder_type='dwt', got 'vit'"),
        ({**DWT_2, "block_out_channels": (8, 8)}, "block_out_channels must have at least three entries"),
        (
            {"extractor": "nafnet", "aggregator": "vit", "encoder_norm": "smc"},
            "encoder_norm='smc' needs a U-Net: extractor='nafnet' and aggregator='vit' leave none",
        ),
        (
            {"aggregator": "vit", "sample_size": 100},
            "sample_size must be a multiple of 8 for aggregator='vit', got 100",
        ),
    ],
    ids=str,
)
def test_wrong_configuration(make, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        make(**options)
    assert "\n" not in str(raised.value)


def test_vit_takes_one_size_and_says_which(make, image):
    vae = make(aggregator="vit", sample_size=32)
    message = "image must be 32x32, the sample_size that aggregator='vit' was made for, got 48x32"
    tall = torch.zeros(1, 3, 48, 32)
    for call in (vae.encode, vae.forward):
        with pytest.raises(ValueError, match=message):
            call(tall)
    # by tiles of its size it takes more
    vae.enable_tiling()
    latent = vae.encode(tall).latent_dist.mode()
    assert latent.shape == (1, 4, 6, 4)
    assert vae.decode(latent).sample.shape == tall.shape
    with pytest.raises(ValueError, match=r"image must be 32x32, .* got 32x24"):
        vae.encode(torch.zeros(1, 3, 48, 24))
