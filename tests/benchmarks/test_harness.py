"""The timing on a GPU, with a GPU that only counts."""

import itertools
import types
from contextlib import contextmanager

import pytest
import torch

from benchmarks import harness


@pytest.fixture
def gpu(monkeypatch):
    """Simulates a GPU on which each call takes 0.4 ms, and returns a log of what happens on it."""
    log = types.SimpleNamespace(recorded=[], replays=0, slept=[], recording=False, own_graphs=False)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, other):
            return 0.4 * (len(log.recorded) if log.replays else 1)

    class Graph:
        def replay(self):
            log.replays += 1

    @contextmanager
    def graph(target, stream):
        log.recording = True
        yield
        log.recording = False

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    functions = {
        "is_available": lambda: True,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: contextmanager(lambda: iter([None]))(),
        "_sleep": log.slept.append,
    } | {
        name: lambda: 0
        for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated")
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(harness, "reserved_memory", lambda: 0)
    monkeypatch.setattr(harness, "has_own_graphs", lambda: log.own_graphs)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    return log


def watch(gpu, calls):
    def provider(i):
        calls.append(i)
        if gpu.recording:
            gpu.recorded.append(i)

    return harness.Stopwatch(provider, itertools.cycle(range(3)), 3, whole=False)


def test_a_provider_is_called_only_until_its_graph_is_recorded(gpu):
    calls = []
    stopwatch = watch(gpu, calls)
    # Five calls take two milliseconds; six use each input set as often.
    assert sorted(gpu.recorded) == [0, 0, 1, 1, 2, 2]
    made = len(calls)
    stopwatch.warm_up()
    assert stopwatch.seconds() == pytest.approx(0.4e-3)
    assert len(calls) == made
    assert gpu.replays == 1
    assert gpu.slept[-1] < 1e6  # however many kernels the graph has


def test_a_provider_with_graphs_of_its_own_is_queued(gpu):
    gpu.own_graphs = True
    calls = []
    stopwatch = watch(gpu, calls)
    assert not gpu.recorded
    made = len(calls)
    stopwatch.seconds()
    assert len(calls) == made + stopwatch.repeats == made + 5
