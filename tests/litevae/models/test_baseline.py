import json
import logging
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from litevae import LiteVAE
from litevae.models.baseline import SmallEncoderVAE

WIDTHS = (32, 32, 64)
SMALL = {"block_out_channels": (16, 16), "layers_per_block": 1, "num_groups": 4}


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def settings(model: SmallEncoderVAE) -> dict[str, Any]:
    return {name: value for name, value in json.loads(model.to_json_string()).items() if name[0] != "_"}


def test_default_encoder_has_the_size_of_vae_small():
    """Table 2b prints 6.75 M parameters."""
    with torch.device("meta"):
        encoder = SmallEncoderVAE().encoder
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 6_793_032


def test_with_the_decoders_widths_it_is_diffusers_autoencoder(image):
    torch.manual_seed(0)
    ours = SmallEncoderVAE(WIDTHS, block_out_channels=WIDTHS, latent_channels=3)
    oracle = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=3,
    )
    oracle.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(image).sample, oracle(image).sample, atol=0, rtol=0)


def test_the_encoder_does_not_follow_the_decoder(image):
    model = SmallEncoderVAE(WIDTHS, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4)
    assert [block.resnets[0].conv1.out_channels for block in model.encoder.down_blocks] == list(WIDTHS)
    assert all(len(block.resnets) == 2 for block in model.encoder.down_blocks)
    assert model.encoder.conv_norm_out.num_groups == 32
    assert [block.resnets[0].conv1.out_channels for block in model.decoder.up_blocks] == [16, 8, 8]
    assert model.decoder.conv_norm_out.num_groups == 4
    assert model.encode(image).latent_dist.mean.shape == (1, 4, 4, 4)
    assert model(image).sample.shape == image.shape


@pytest.mark.parametrize("use_1x1_conv", [False, True])
def test_round_trip_through_a_folder(image, tmp_path, use_1x1_conv, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    model = SmallEncoderVAE(
        WIDTHS,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        use_quant_conv=use_1x1_conv,
        use_post_quant_conv=use_1x1_conv,
        scaling_factor=0.7,
    )
    model.save_pretrained(tmp_path)
    loaded = SmallEncoderVAE.from_pretrained(tmp_path)
    assert not caplog.records  # diffusers does not warn about settings of the base class
    assert settings(loaded) == settings(model)
    assert loaded.config.scaling_factor == 0.7
    assert (loaded.quant_conv is not None) == use_1x1_conv
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).sample, model(image).sample)


def test_a_file_is_loaded(image, tmp_path):
    model = SmallEncoderVAE(WIDTHS, block_out_channels=(8, 8, 16), norm_num_groups=4).eval()
    model.save_pretrained(tmp_path)
    loaded = SmallEncoderVAE.from_single_file(tmp_path / "diffusion_pytorch_model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).sample, model(image).sample, atol=0, rtol=0)


@pytest.mark.parametrize("build", [AutoencoderKL, lambda: LiteVAE.from_preset("litevae-s", **SMALL)])
def test_a_model_of_another_class_is_refused(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    message = f"the configuration is that of {type(model).__name__}.* not of SmallEncoderVAE: "
    for load in (SmallEncoderVAE.from_pretrained, SmallEncoderVAE.from_config):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    with pytest.raises(ValueError, match="not of SmallEncoderVAE"):
        SmallEncoderVAE.from_config(dict(model.config))


def test_number_of_blocks_must_agree():
    message = r"block_out_channels must have as many entries as the encoder's, 3, got \[8, 8\]"
    with pytest.raises(ValueError, match=message):
        SmallEncoderVAE(WIDTHS, block_out_channels=(8, 8))
