"""The predicted traffic; tests/gpu_emulator/test_traffic.py compares it with kernels."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import traffic

DOCS = Path(__file__).parents[2] / "docs" / "performance.md"


def test_the_documentation_has_the_tables():
    assert traffic.tables() in DOCS.read_text(encoding="utf-8")


def test_shapes_decide():
    """GroupNorm reads a tensor twice and writes it once, or once each if its statistics are given, at any size."""
    small, large = (traffic.predict("LiteVAE-S", size) for size in (64, 128))
    norm = (traffic.STATISTICS, traffic.APPLY)
    assert [large.bytes[kind] / small.bytes[kind] for kind in norm] == [4, 4]
    assert 0 < small.bytes[traffic.STATISTICS] < small.bytes[traffic.APPLY] / 2
    assert sum(macs for _, macs in large.products) == 4 * sum(macs for _, macs in small.products)


def test_designs_include_those_above_them():
    shares = traffic.predict("LiteVAE-S", 64)
    found = [traffic.costs(shares, traffic.remaining(design), 1e12, 1e15) for design in traffic.DESIGNS]
    for values in ([x.total_bytes for x in found], [x.total_seconds for x in found]):
        assert values == sorted(values, reverse=True)
    assert found[0].total_bytes == sum(shares.bytes.values())


def test_each_product_takes_the_longer_of_two_times():
    shares = traffic.Shares({traffic.CONVOLUTION: 4.0, traffic.APPLY: 8.0}, [(3.0, 1.0), (1.0, 5.0)])
    found = traffic.costs(shares, {traffic.APPLY: 0.5}, bandwidth=1.0, operations=2.0)
    assert found.seconds[traffic.CONVOLUTION] == 3 + 5
    assert found.total_seconds == 3 + 5 + 4
    assert found.total_bytes == 4 + 4


def test_the_sd_vae():
    """In diffusers' operators, each SiLU is a pass; under `accelerate_vae`, the norm before it applies it."""
    plain, fused = (traffic.record(model, 64, 1) for model in (traffic.SD_VAE, traffic.ACCELERATED))
    assert sorted(plain.products) == sorted(fused.products)  # the shortcuts' at other times
    assert plain.bytes[traffic.APPLY] == fused.bytes[traffic.APPLY]
    assert plain.calls["litevae"] == 0
    assert plain.bytes[traffic.ELEMENTWISE] > 0.9 * plain.bytes[traffic.APPLY] > 0
    assert fused.bytes[traffic.ELEMENTWISE] < 0.01 * fused.bytes[traffic.APPLY]


def test_multiply_accumulates():
    """As many as PyTorch's FlopCounterMode finds in the encoders at 256x256, attention included."""
    expected = {"LiteVAE-B": 37.84, "LiteVAE-S": 5.76, traffic.SD_VAE: 136.36, traffic.ACCELERATED: 136.36}
    found = {model: traffic.predict(model).products for model in traffic.ENCODERS}
    assert {m: round(sum(macs for _, macs in x) / 1e9, 2) for m, x in found.items()} == expected


def test_unknown_operators_are_refused():
    x = torch.zeros(1)
    with traffic.Recorder(), pytest.raises(NotImplementedError, match="traffic of aten::tanh is unknown"):
        x.tanh()
