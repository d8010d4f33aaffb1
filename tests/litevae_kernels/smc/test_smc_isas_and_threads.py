"""modulate_weight on every instruction set, and the same bits from any number of threads and in every run."""

import pytest
import torch

from litevae_kernels import use_backend
from litevae_kernels.tensors import memory_format_of
from litevae_kernels.testing import arrange, poisoned_memory

THREADS = (2, 1, 5, 2, 2)  # only the first two on lower instruction sets

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.usefixtures("isa")
def test_every_instruction_set(check, some_calls):
    for call, grad in some_calls(40):
        check(call, grad, "native")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("taps", [(3, 3), (3, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_every_order_and_dtype_to_every_other(make_call, values, check, layout, taps):
    """The channels fill whole vectors and a part of one, on every instruction set."""
    weight, grad = (values((3, 70, *taps), seed=i) for i in range(2))
    scale, gain = values(70, torch.float32, seed=2), values(1, torch.float32, seed=3)
    for dtype in DTYPES:
        for out_dtype in DTYPES:
            for order in ("contiguous", "channels_last"):
                memory_format = memory_format_of(order == "channels_last")
                call = make_call(
                    arrange(weight.to(dtype), layout), scale, gain, 1e-8, out_dtype, memory_format
                )
                check(call, arrange(grad.to(out_dtype), order), "native")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_thread_count_and_run_do_not_change_the_bits(make_call, values, run, restore_threads, fewer, layout):
    for shape, groups in [((128, 96, 3, 3), 1), ((90, 31, 5, 5), 2), ((3, 2, 3, 3), 3)]:
        scale, gain = values(groups * shape[1], torch.float32, seed=1), values(1, torch.float32, seed=2)
        call = make_call(arrange(values(shape, torch.float32), layout), scale, gain)
        results = []
        for threads in THREADS[: fewer(8)]:
            torch.set_num_threads(threads)
            with use_backend("native"), poisoned_memory():
                results.append(run(call, values(shape, torch.float32, seed=3)))
        for other in results[1:]:
            assert all(torch.equal(other[name], results[0][name]) for name in other)
