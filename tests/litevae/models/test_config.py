import pytest

from litevae import settings
from litevae.errors import UserError
from litevae.models.config import LITEVAE_ONLY, ModelConfig, check_model_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("latent_channels=0", "latent_channels must be 1 or more, got 0"),
        ("latent_channels=4097", "latent_channels must be 4096 or less, got 4097"),
        ("block_out_channels=[32,0]", "block_out_channels must all be 1 or more, got [32, 0]"),
        ("num_groups=0", "num_groups must be 1 or more"),
        ("layers_per_block=0", "layers_per_block must be 1 or more"),
        ("decoder_norm=none", "decoder_norm must be group or smc"),
        ("output_type=latent", "output_type must be image or wavelet"),
    ],
)
def test_value_out_of_range_is_refused(override, message):
    with pytest.raises(UserError) as caught:
        settings.load(ModelConfig, None, [override])
    assert message in str(caught.value)


def test_a_decoder_needs_blocks():
    with pytest.raises(UserError, match=r"^model\.block_out_channels is empty"):
        check_model_config(ModelConfig(block_out_channels=[]), "model.")


def test_only_a_baseline_has_widths_of_its_encoder():
    widths = [32, 32]
    check_model_config(ModelConfig(kind="vae-small", encoder_block_out_channels=widths))
    with pytest.raises(UserError, match="encoder_block_out_channels is for kind=sd-vae and kind=vae-small"):
        check_model_config(ModelConfig(encoder_block_out_channels=widths))


@pytest.mark.parametrize("name", LITEVAE_ONLY)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_only_litevae_has_variants(name, prefix):
    default = LITEVAE_ONLY[name]
    config = ModelConfig(kind="sd-vae", **{name: not default if isinstance(default, bool) else "other"})
    with pytest.raises(UserError) as caught:
        check_model_config(config, prefix)
    assert str(caught.value) == f"{prefix}{name} must be {str(default).lower()} for {prefix}kind=sd-vae"
    check_model_config(ModelConfig(kind="sd-vae"))
