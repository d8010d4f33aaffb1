import pytest
import torch

from litevae import LiteVAE
from litevae.models.presets import PRESETS, get_preset

# The paper prints 1.03, 6.75, 32.75 and 41.425 million.
ENCODER_PARAMETERS = {
    "litevae-s": 1_038_308,
    "litevae-b": 6_753_252,
    "litevae-m": 32_752_740,
    "litevae-l": 41_424_996,
}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ENCODER_PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        vae = LiteVAE.from_preset(name)
    assert count(vae.encoder) == ENCODER_PARAMETERS[name]
    assert count(vae.decoder) == 49_490_179
    assert count(vae) == count(vae.encoder) + count(vae.decoder)


def test_every_preset_is_counted():
    assert set(PRESETS) == set(ENCODER_PARAMETERS)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("litevae-xs", "litevae-s"), ("LiteVAE-B", "litevae-b"), ("litevae-m2", "litevae-m")],
)
def test_unknown_preset_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"unknown preset '{name}': did you mean '{nearest}'"):
        LiteVAE.from_preset(name)


def test_a_preset_cannot_be_changed_through_its_copy():
    get_preset("litevae-s")["encoder_num_groups"] = 1
    assert get_preset("litevae-s")["encoder_num_groups"] == 16


def test_overrides():
    with torch.device("meta"):
        vae = LiteVAE.from_preset("litevae-s", latent_channels=12, decoder_norm="smc", scaling_factor=0.5)
    assert vae.config.latent_channels == 12
    assert vae.config.decoder_norm == "smc"
    assert vae.config.scaling_factor == 0.5
    assert vae.config.extractor_channels == 16
    assert vae.encoder.feature_aggregator.conv_out.out_channels == 24
    with pytest.raises(TypeError, match="latents"):
        LiteVAE.from_preset("litevae-s", latents=4)
