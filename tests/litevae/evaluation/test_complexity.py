import time
from types import SimpleNamespace

import pytest
import torch

from litevae import LiteVAE
from litevae.evaluation.complexity import measure_complexity, measure_speed


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


class Sleeper:
    """A model whose encoder takes a known time."""

    config = SimpleNamespace(in_channels=3)
    device, dtype = torch.device("cpu"), torch.bfloat16

    def __init__(self, seconds, calls):
        self.seconds, self.calls = seconds, calls

    def to(self, memory_format):
        assert memory_format == torch.channels_last

    def encode(self, x):
        assert (x.shape, x.dtype) == ((2, 3, 16, 16), torch.bfloat16)
        assert x.is_contiguous(memory_format=torch.channels_last)
        self.calls.append(self.seconds)
        time.sleep(self.seconds)
        return SimpleNamespace(latent_dist=SimpleNamespace(parameters=x))


def test_models_take_turns():
    calls = []
    fast, slow = measure_speed([Sleeper(0.01, calls), Sleeper(0.05, calls)], "encoder", 16, 2, rounds=3)
    assert calls[-6:] == [0.01, 0.05] * 3
    # A busy machine may wake the process late, but never early.
    assert 2 < fast.images_per_second <= 2 / 0.01
    assert 2 < slow.images_per_second <= 2 / 0.05


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_memory_of_a_side_counts_its_largest_tensors(side):
    model = LiteVAE.from_preset(
        "litevae-s", block_out_channels=(16, 16, 16), layers_per_block=1, num_groups=4
    )
    (small,), (large,) = (measure_speed([model], side, 128, n, rounds=1) for n in (1, 8))
    if large.peak_memory is None:  # only Linux with glibc reports it
        assert small.peak_memory is None
        return
    # Per image, the decoder's last features are 16 x 128 x 128 float32, the encoder's first 16 x 64 x 64.
    floats = 8 * 16 * (128 if side == "decoder" else 64) ** 2
    assert 4 * floats < large.peak_memory < 40 * 4 * floats
    assert large.peak_memory - small.peak_memory > 4 * floats * 7 / 8
