import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D

from litevae import LiteVAE
from litevae.data.pixels import PixelFormat
from litevae.errors import UserError
from litevae.models.baseline import SmallEncoderVAE
from litevae.models.build import build, with_fresh_weights
from litevae.models.config import ModelConfig
from litevae.models.interface import pixel_format
from litevae.models.loading import load_model
from litevae.training import load_config

SMALL = {"block_out_channels": [32, 32, 64], "layers_per_block": 1, "num_groups": 16}


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_baselines_have_the_sizes_of_the_paper():
    with torch.device("meta"):
        sd, small, lite = (
            with_fresh_weights(load_config(name).model, 256)
            for name in ("imagenet-sd-vae", "imagenet-vae-small", "imagenet-b")
        )
    assert parameters(sd.encoder) == 34_163_592
    assert parameters(small.encoder) == pytest.approx(6.75e6, rel=0.03)
    assert parameters(lite.encoder) == 6_753_252
    assert {parameters(model.decoder) for model in (sd, small, lite)} == {49_490_179}
    assert (sd.quant_conv is None, lite.quant_conv is None) == (False, True)


def test_preset_sizes_remain_by_override():
    config = load_config("imagenet-b", ["model.preset=litevae-l", "model.latent_channels=12"])
    with torch.device("meta"):
        model = with_fresh_weights(config.model, 256)
    assert isinstance(model, LiteVAE)
    assert model.config.latent_channels == 12
    assert parameters(model.encoder) > 41e6


def test_settings_reach_litevae():
    config = ModelConfig(
        preset="litevae-s",
        latent_channels=6,
        decoder_norm="smc",
        output_type="wavelet",
        aggregator="vit",
        finest_level=2,
        **SMALL,
    )
    with torch.device("meta"):
        model = with_fresh_weights(config, 64)
    assert isinstance(model, LiteVAE)
    settings = {"latent_channels": 6, "decoder_norm": "smc", "output_type": "wavelet", "finest_level": 2}
    assert settings.items() <= model.config.items()
    assert (model.config.extractor_channels, model.config.sample_size) == (16, 64)
    assert model.encoder.image_size == 64


@pytest.mark.parametrize("use_1x1_conv", [False, True])
def test_sd_vae_is_diffusers_autoencoder(use_1x1_conv):
    config = ModelConfig(kind="sd-vae", latent_channels=5, use_1x1_conv=use_1x1_conv, **SMALL)
    with torch.device("meta"):
        model = with_fresh_weights(config, 64)
        oracle = AutoencoderKL(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=16,
            latent_channels=5,
            use_quant_conv=use_1x1_conv,
            use_post_quant_conv=use_1x1_conv,
        )
    assert type(model) is AutoencoderKL
    shapes, expected = ({k: v.shape for k, v in each.state_dict().items()} for each in (model, oracle))
    assert shapes == expected
    assert (model.config.sample_size, model.config.scaling_factor) == (64, 1.0)


@pytest.mark.parametrize(
    ("settings", "widths"),
    [
        ({"kind": "vae-small", "block_out_channels": [32, 32, 64, 64]}, [64, 128, 224, 224]),
        ({"kind": "vae-small", "encoder_block_out_channels": [32, 64, 96]}, [32, 64, 96]),
        ({"kind": "sd-vae", "encoder_block_out_channels": [32, 64, 96]}, [32, 64, 96]),
    ],
    ids=str,
)
def test_baselines_with_an_encoder_of_other_widths(settings, widths):
    with torch.device("meta"):
        model = with_fresh_weights(ModelConfig(**{**SMALL, **settings}), 64)
    assert isinstance(model, SmallEncoderVAE)
    assert [block.resnets[0].conv1.out_channels for block in model.encoder.down_blocks] == widths


@pytest.mark.parametrize("kind", ["litevae", "sd-vae"])
def test_weights_are_initialised_for_training(kind):
    model = with_fresh_weights(ModelConfig(kind=kind, preset="litevae-s", **SMALL), 64)
    blocks = [module for module in model.modules() if type(module).__name__ in ("ResBlock", "ResnetBlock2D")]
    assert blocks
    assert all(isinstance(block, ResnetBlock2D) == (kind == "sd-vae") for block in blocks)
    assert not any(block.conv2.weight.any() for block in blocks)


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="latent_channels must be 12 for encoder_type='dwt', got 4"):
        with_fresh_weights(ModelConfig(preset="litevae-s", encoder_type="dwt", **SMALL), 64)
    with pytest.raises(ValueError, match="unknown preset 'litevae-xl'"):
        with_fresh_weights(ModelConfig(preset="litevae-xl"), 64)


@pytest.mark.parametrize("kind", ["litevae", "sd-vae", "vae-small"])
def test_weights_beyond_the_memory_are_not_built(kind):
    config = ModelConfig(kind=kind, block_out_channels=[65536] * 4)
    with pytest.raises(UserError, match=r"^weights: at least \d.* of memory needed, .* there$"):
        with_fresh_weights(config, 256)


def test_counting_the_weights_draws_no_random_numbers():
    config = ModelConfig(**SMALL)
    torch.manual_seed(0)
    expected = build(config, 32).encoder.state_dict()
    torch.manual_seed(0)
    with torch.device("meta"):
        build(config, 32)
    found = build(config, 32).encoder.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "litevae", "preset": "litevae-s", "output_type": "wavelet", "extractor": "nafnet"},
        {"kind": "litevae", "preset": "litevae-s", "encoder_type": "dwt"},
        {"kind": "sd-vae"},
        {"kind": "vae-small"},
    ],
    ids=str,
)
def test_models_for_other_channels(settings, channels, tmp_path):
    wavelet = {"latent_channels": 4 * channels} if "encoder_type" in settings else {}
    config = ModelConfig(**{**SMALL, "block_out_channels": [32, 32, 64, 64], **settings, **wavelet})
    model = with_fresh_weights(config, 64, pixel_format=PixelFormat(channels))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert pixel_format(loaded) == PixelFormat(channels)
    image = torch.rand(1, channels, 32, 32)
    with torch.no_grad():
        assert loaded(image).sample.shape == image.shape


@pytest.mark.parametrize("kind", ["sd-vae", "vae-small"])
def test_baselines_have_no_range_of_values(kind):
    with pytest.raises(
        ValueError, match=f"value_range is for kind=litevae, and must be null for kind={kind}"
    ):
        build(ModelConfig(kind=kind, **SMALL), 64, PixelFormat(1, (0, 1)))
