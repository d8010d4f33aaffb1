from pathlib import Path

import pytest
from diffusers import AutoencoderKL

from litevae import LiteVAE
from litevae.errors import UserError
from litevae.models.baseline import SmallEncoderVAE
from litevae.models.loading import find_model
from litevae.models.weight_files import read_weights

SMALL = "block_out_channels=[16,16],layers_per_block=1,num_groups=4"


def test_a_preset_takes_settings_after_its_name():
    model = find_model(f"litevae-s,latent_channels=12,{SMALL},aggregator=vit", 64)
    assert isinstance(model, LiteVAE)
    config = model.config
    assert (config.latent_channels, list(config.block_out_channels), config.num_groups) == (12, [16, 16], 4)
    assert (config.aggregator, config.sample_size) == ("vit", 64)


def test_a_model_without_a_distribution_needs_no_loss():
    assert find_model(f"litevae-s,{SMALL},encoder_type=dwt,latent_channels=12").config.encoder_type == "dwt"


def test_sd_vae_has_its_1x1_convolutions():
    model = find_model(f"sd-vae,{SMALL}")
    assert type(model) is AutoencoderKL
    assert model.quant_conv is not None
    assert model.post_quant_conv is not None


def test_sd_vae_takes_widths_of_its_encoder():
    model = find_model(f"sd-vae,{SMALL},encoder_block_out_channels=[32,32]")
    assert type(model) is SmallEncoderVAE


def test_a_folder_is_loaded(tmp_path):
    find_model(f"litevae-s,{SMALL}").save_pretrained(tmp_path / "model")
    assert isinstance(find_model(str(tmp_path)), LiteVAE)


@pytest.mark.parametrize("name", ["loop", "diffusers:loop", "loop/x"])
def test_links_that_form_a_cycle_are_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"^[a-z:]*loop(/x)?: Too many levels of symbolic links"):
        find_model(name)
    with pytest.raises(UserError, match=r"^init_decoder: .*Too many levels of symbolic links"):
        read_weights(Path("loop"), "init_decoder")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("litevae-x", "no such folder, and unknown preset 'litevae-x': did you mean 'litevae-"),
        ("litevae-s,preset=litevae-m", "litevae-s determines this already, got preset=litevae-m"),
        ("sd-vae,kind=litevae", "sd-vae determines this already, got kind=litevae"),
        ("litevae-s,latent_channel=3", "unknown setting 'latent_channel': did you mean 'latent_channels'?"),
        ("litevae-s,latent_channels=0", "latent_channels must be 1 or more, got 0"),
        ("litevae-s,latent_channels=many", "latent_channels must be a whole number"),
        ("litevae-s,block_out_channels=[]", "block_out_channels is empty"),
        ("litevae-s,encoder_block_out_channels=[32]", "encoder_block_out_channels is for kind=sd-vae"),
        ("sd-vae,decoder_norm=smc", "decoder_norm must be group for kind=sd-vae"),
        ("litevae-s,encoder_type=dwt", "latent_channels must be 12 for encoder_type='dwt', got 4"),
    ],
)
def test_mistake_names_the_setting(name, message):
    with pytest.raises(UserError) as caught:
        find_model(name)
    assert str(caught.value).startswith(f"{name}: ")
    assert message in str(caught.value)
