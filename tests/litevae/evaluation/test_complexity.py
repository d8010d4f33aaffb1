import pytest

from litevae import LiteVAE
from litevae.evaluation.complexity import measure_complexity


@pytest.mark.parametrize(
    ("preset", "parameters", "gmacs"),
    [
        ("litevae-s", 1_038_308, 5.76),
        ("litevae-b", 6_753_252, 37.84),
        ("litevae-m", 32_752_740, 223.99),
        ("litevae-l", 41_424_996, 232.86),
    ],
)
def test_encoders_have_the_published_size_and_cost(preset, parameters, gmacs):
    cost = measure_complexity(LiteVAE.from_preset(preset), 256)
    assert cost.encoder_parameters == parameters
    assert cost.encoder_macs / 1e9 == pytest.approx(gmacs, abs=0.005)
    assert cost.decoder_parameters == 49_490_179
    assert cost.latent_shape == (4, 32, 32)


def test_1x1_convolutions_belong_to_their_side():
    settings = {"latent_channels": 12, "block_out_channels": (32, 32, 32, 32)}
    plain, with_1x1 = (
        measure_complexity(LiteVAE.from_preset("litevae-s", use_1x1_conv=wanted, **settings), 64)
        for wanted in (False, True)
    )
    assert with_1x1.encoder_parameters - plain.encoder_parameters == 24 * 24 + 24
    assert with_1x1.decoder_parameters - plain.decoder_parameters == 12 * 12 + 12
    assert with_1x1.encoder_macs - plain.encoder_macs == 24 * 24 * 8 * 8
    assert with_1x1.latent_shape == (12, 8, 8)


def test_size_that_the_model_does_not_take():
    with pytest.raises(ValueError, match="multiples of 8"):
        measure_complexity(LiteVAE.from_preset("litevae-s"), 250)
