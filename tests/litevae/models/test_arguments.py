import pytest
from diffusers import AutoencoderKL

from litevae import LiteVAE
from litevae.models.arguments import check_arguments, check_config
from litevae.models.baseline import SmallEncoderVAE

WHOLE = (None, True, 0, -1, 1.5, "2", 10**400, [], {})
WIDTHS = (None, True, 3, "32", [], [0], [-1], [True], [1.5], [10**400], [None], [[1]], [1] * 5000, {})
NUMBERS = (True, "1", [1], 1e31, 10**400, float("nan"), float("inf"), {})

BROKEN = [
    *((name, value) for name in ("num_groups", "encoder_num_groups", "layers_per_block") for value in WHOLE),
    *((name, value) for name in ("extractor_multipliers", "block_out_channels") for value in WIDTHS),
    *(("scaling_factor", value) for value in (*NUMBERS, None, 0)),
    *(("latents_std", value) for value in (1.0, [], ["1"], [True], [float("nan")], {})),
    *(("force_upcast", value) for value in (None, 0, 1, "true", [])),
]


@pytest.mark.parametrize(("name", "value"), BROKEN, ids=lambda value: str(value)[:20])
def test_an_argument_of_a_wrong_type_or_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be ") as caught:
        LiteVAE(**{name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["down_block_types", "up_block_types"])
def test_blocks_of_diffusers_have_names(name):
    for value in ([1], "DownEncoderBlock2D", None, []):
        with pytest.raises(ValueError, match=f"^{name} must "):
            check_arguments({name: value, "block_out_channels": [32]})


def test_an_activation_has_a_name():
    for value in (None, 1, ["silu"], {}):
        with pytest.raises(
            ValueError, match=r"^act_fn must be the name of an activation, such as silu, got "
        ):
            check_config({"act_fn": value}, AutoencoderKL)
    check_config({"act_fn": "silu"}, AutoencoderKL)


@pytest.mark.parametrize("model", [LiteVAE, AutoencoderKL, SmallEncoderVAE])
def test_an_entry_that_would_hide_a_part_of_the_model_is_refused(model):
    check_config({"_class_name": model.__name__, "_name_or_path": "", "from_another_version": 1}, model)
    for name in ("encoder", "decoder", "quant_conv", "quantization_config", "dtype", "forward"):
        with pytest.raises(ValueError, match=f"'{name}' is not a setting of {model.__name__}"):
            check_config({name: {}}, model)
    for content in (None, [], 1, "x"):
        with pytest.raises(ValueError, match="not a model's configuration"):
            check_config(content, model)


def test_a_baseline_is_checked_before_it_is_built():
    with pytest.raises(ValueError, match=r"^block_out_channels must be 1 to 16 whole numbers"):
        SmallEncoderVAE(block_out_channels=[128] * 5000)


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
@pytest.mark.parametrize("model", [LiteVAE, AutoencoderKL, SmallEncoderVAE])
def test_there_is_one_statistic_per_latent_channel(model, name):
    for value in ([1.0] * 3, [1.0] * 5):
        with pytest.raises(
            ValueError, match=f"^{name} must be 4 numbers, one per latent channel, got {len(value)}: "
        ):
            check_config({name: value}, model)
        if model is not AutoencoderKL:
            with pytest.raises(ValueError, match=f"^{name} must be 4 numbers"):
                model(**{name: value})
    check_config({"latent_channels": 3, name: [1.0] * 3}, model)
    for zero in ([1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match=r"^latents_std must be positive numbers"):
            check_arguments({"latents_std": zero})


def test_a_preset_of_another_type_is_named():
    for value in (3, None, ["litevae-b"], "x" * 500):
        with pytest.raises(ValueError, match=r"^unknown preset .*presets: litevae-s") as caught:
            LiteVAE.from_preset(value)
        assert len(str(caught.value)) < 300
