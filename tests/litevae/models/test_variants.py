"""The encoder's variants (Tables 11, 12 and 17 to 21) in everything that a model is used for."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from litevae import LiteVAE
from litevae.models.nafnet import NAFBlock
from litevae.models.vit import TransformerBlock

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


def moments(vae: LiteVAE, image: Tensor) -> Tensor:
    return vae.encode(image).latent_dist.parameters


def distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def image(square_image) -> Tensor:
    return square_image


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


@each_variant
def test_round_trip_through_a_folder(make_variant, image, tmp_path, options):
    vae = make_variant(**options)
    vae.save_pretrained(tmp_path)
    loaded = LiteVAE.from_pretrained(tmp_path)
    half = LiteVAE.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert options.items() <= loaded.config.items()
    state = loaded.state_dict()
    assert state.keys() == vae.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in vae.state_dict().items())
    with torch.no_grad():
        # The loaded weights have other addresses, for which the CPU's library sums in another order.
        torch.testing.assert_close(loaded(image).sample, vae(image).sample)
        assert half(image).sample.dtype == moments(half, image).dtype == torch.bfloat16
        folded = vae.fold()
        torch.testing.assert_close(moments(folded, image), moments(vae, image))


def test_models_from_before_the_variants_load(make_variant, variant_settings, image, tmp_path):
    vae = make_variant()
    vae.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for name in variant_settings:
        del config[name]
    file.write_text(json.dumps(config))
    with torch.no_grad():
        assert torch.equal(LiteVAE.from_pretrained(tmp_path)(image).sample, vae(image).sample)


@each_variant
def test_training_step(make_variant, image, options):
    """Every parameter gets a gradient that equals float64's up to rounding, also with checkpointing."""

    def gradients(vae: LiteVAE, image: Tensor) -> list[Tensor]:
        vae.zero_grad()
        posterior = vae.encode(image).latent_dist
        noise = torch.ones_like(posterior.mean)
        loss = (vae.decode(posterior.mean + posterior.std * noise).sample - image).square().mean()
        (loss + 1e-3 * posterior.kl().mean()).backward()
        return [parameter.grad.clone() for parameter in vae.parameters()]

    vae = make_variant(**options)
    actual = gradients(vae, image)
    assert all(gradient.any() for gradient in actual)
    exact = gradients(copy.deepcopy(vae).double(), image.double())
    flat, flat_exact = (torch.cat([g.flatten() for g in each]) for each in (actual, exact))
    # Fewer than 400 operators, forwards and backwards, round once each, and the errors add up in squares.
    assert distance(flat, flat_exact) < 400**0.5 * torch.finfo(torch.float32).eps
    vae.enable_gradient_checkpointing()
    for a, b in zip(gradients(vae, image), actual, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("block", [NAFBlock, TransformerBlock])
def test_checkpointing_reaches_the_new_blocks(make_variant, image, block):
    vae = make_variant(extractor="nafnet", aggregator="vit", sample_size=32)
    vae.enable_gradient_checkpointing()
    runs = []
    blocks = [module for module in vae.modules() if isinstance(module, block)]
    for module in blocks:
        module.register_forward_pre_hook(lambda *_: runs.append(1))
    vae(image).sample.sum().backward()
    assert len(runs) == 2 * len(blocks)


@each_variant
def test_channels_last_is_kept(make_variant, image, options):
    vae = make_variant(**options)
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
def test_autocast(make_variant, image, options):
    vae = make_variant(**options)
    with torch.no_grad():
        exact = moments(copy.deepcopy(vae).double(), image.double())
        with torch.autocast("cpu", torch.bfloat16):
            actual = moments(vae, image)
            assert vae(image).sample.dtype == torch.bfloat16
        in_bfloat16 = moments(copy.deepcopy(vae).bfloat16(), image)
    assert actual.dtype == in_bfloat16.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    # Fewer than 200 operators round once each, and the errors of eps / 4 add up in squares.
    assert distance(actual, exact) < 200**0.5 * eps / 4
    # With bfloat16 weights too, there are the same roundings and more.
    assert distance(actual, exact) < 2 * distance(in_bfloat16, exact)


@pytest.mark.parametrize("name", ["dwt", "dwt-2", "nafnet", "shared", "vit", "smc"])
def test_encode_compiles_whole(make_variant, image, name):
    torch._dynamo.reset()
    fewer = {} if "dwt" in name else {"finest_level": 2 if name == "shared" else 3}
    vae, graphs = make_variant(**VARIANTS[name], **fewer), CompileCounter()
    compiled = torch.compile(lambda x: moments(vae, x), fullgraph=True, backend=graphs)
    with torch.no_grad():
        assert torch.equal(compiled(image), moments(vae, image))
    assert graphs.frame_count == 1


@each_variant
def test_weights_that_are_offloaded_between_layers(make_variant, image, options):
    from accelerate import cpu_offload

    vae = make_variant(**options)
    with torch.no_grad():
        expected = vae(image).sample
        cpu_offload(vae, execution_device="cpu")
        assert torch.equal(vae(image).sample, expected)


@each_variant
def test_layerwise_casting(make_variant, image, options):
    vae = make_variant(**options)
    rounded = copy.deepcopy(vae)
    for name, module in rounded.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and "norm" not in name:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(vae(image).sample, rounded(image).sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_type": "fft"}, "encoder_type must be one of 'learned', 'dwt', 'dwt-2', got 'fft'"),
        ({"extractor": "resnet"}, "extractor must be one of 'unet', 'nafnet', got 'resnet'"),
        ({"aggregator": "mlp"}, "aggregator must be one of 'unet', 'vit', got 'mlp'"),
        ({"encoder_norm": "batch"}, "encoder_norm must be one of 'group', 'smc', 'none', got 'batch'"),
        ({"finest_level": 0}, "finest_level must be a whole number from 1 to 16, got 0"),
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
def test_wrong_configuration(make_variant, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        make_variant(**options)
    assert "\n" not in str(raised.value)
