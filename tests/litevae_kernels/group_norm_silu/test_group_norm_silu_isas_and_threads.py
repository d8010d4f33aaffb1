"""group_norm_silu on every instruction set, and the same bits from any number of threads and in every run."""

import pytest
import torch

from litevae_kernels import group_norm_silu, use_backend
from litevae_kernels.testing import arrange, poisoned_memory

THREADS = (2, 1, 5, 2)  # only the first two on lower instruction sets


def same_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("isa")
def test_every_instruction_set(make_call, values, check, some_calls):
    for call, grad in some_calls(60):
        check(call, grad, "native")
    for n, mean in [(31, 0.0), (64, 1e4), (1024, -1e6)]:  # tails of every vector length, and none
        x = values((2, 4, 3, n), torch.float32) + mean
        for layout in ("contiguous", "channels_last"):
            check(make_call(arrange(x, layout), 2), values(x.shape, torch.float32, seed=1), "native")
    huge = group_norm_silu(values((1, 4, 8, 8), torch.float32), 2, torch.full((4,), 1e38))
    assert -0.3 < huge.min() <= 0  # silu is nowhere below -0.28
    weight, bias = torch.tensor([1e3, -1e3, 90.0, 2e-3]), torch.tensor([-1e3, 1e3, -88.0, 0.0])
    x = values((1, 4, 16, 17), torch.float32)
    check(make_call(x, 2, weight, bias), values(x.shape, torch.float32, seed=1), "native")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_does_not_change_the_bits(make_call, values, run, restore_threads, fewer, layout, dtype):
    for shape, groups, border in [
        ((1, 32, 190, 190), 8, 20),
        ((5, 12, 17, 19), 3, 12),
        ((3, 1, 301, 299), 1, 1),
        ((2, 64, 3, 3), 32, 40),
    ]:
        joined, c = values(shape, dtype), shape[1]
        skip = arrange(joined[:, border:], layout) if border < c else None
        parameters = (values(c, torch.float32, seed=1), values(c, torch.float32, seed=2))
        call = make_call(arrange(joined[:, :border], layout), groups, *parameters, skip)
        grad = values(shape, dtype, seed=3)
        results = []
        for threads in THREADS[: fewer(8)]:
            torch.set_num_threads(threads)
            with use_backend("native"), poisoned_memory():
                results.append(run(call, grad))
        for other in results[1:]:
            assert same_bits(results[0], other)


@pytest.mark.usefixtures("isa")
def test_runs_give_the_same_bits(run, some_calls):
    for call, grad in some_calls(20):
        with use_backend("native"):
            first = run(call, grad)
            torch.empty(1 << 18).fill_(float("nan"))  # other memory to allocate from
            assert same_bits(first, run(call, grad))
