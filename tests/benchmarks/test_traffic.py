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
    small, large = (traffic.predict("litevae-s", size) for size in (64, 128))
    norm = (traffic.STATISTICS, traffic.APPLY)
    assert [large.bytes[kind] / small.bytes[kind] for kind in norm] == [4, 4]
    assert 0 < small.bytes[traffic.STATISTICS] < small.bytes[traffic.APPLY] / 2
    assert large.macs == 4 * small.macs


def test_designs_include_those_above_them():
    shares = traffic.predict("litevae-s", 64)
    found = [traffic.seconds(shares, design, 1e12, 1e15) for design in traffic.DESIGNS]
    assert found == sorted(found, reverse=True)
    assert found[0][0] == sum(shares.bytes.values())
    # Without enough arithmetic, the convolutions wait for it.
    slow = traffic.seconds(shares, "as built", 1e12, 1e9)
    assert slow[0] == found[0][0]
    assert slow[1] > 2 * shares.macs / 1e9


def test_unknown_operators_are_refused():
    x = torch.zeros(1)
    with traffic.Recorder(), pytest.raises(NotImplementedError, match="traffic of aten::tanh is unknown"):
        x.tanh()
