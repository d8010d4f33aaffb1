import contextlib
import types

import pytest
import torch

from litevae_kernels.testing import record_launches

triton = pytest.importorskip("triton")
support = pytest.importorskip("litevae_kernels.triton_support")
tl = triton.language

LIMIT = support.GRID.value


@pytest.mark.parametrize(
    ("programs", "grid"),
    [(1, (1, 1)), (LIMIT, (LIMIT, 1)), (LIMIT + 1, (LIMIT, 2)), (5 * LIMIT - 1, (LIMIT, 5))],
)
def test_a_grid_holds_any_number_of_programs(programs, grid):
    assert support.grid_of(programs) == grid
    assert grid[0] * grid[1] >= programs
    assert grid[0] < 2**31  # CUDA's limits
    assert grid[1] < 2**16


def test_sizes_and_the_alignment_of_scalars_do_not_specialise_a_kernel():
    def function(x, weight, size: tl.int64, eps: tl.float64, BLOCK: tl.constexpr):
        pass

    parameters = {p.name: p for p in support.kernel("weight")(function).params}
    assert [name for name, p in parameters.items() if p.do_not_specialize] == ["size"]
    assert [name for name, p in parameters.items() if p.do_not_specialize_on_alignment] == ["weight"]
    # Triton never specialises a float whose type is given.
    assert {name: parameters[name].annotation_type for name in ("size", "eps")} == {
        "size": "i64",
        "eps": "fp64",
    }


def test_a_contraction_across_lanes_is_seen_in_ptx(lanes_agree):
    shuffle = "shfl.sync.bfly.b32 %r2|%p1, %r1, 16, 31, -1; mov.b32 %f3, %r2;"
    assert lanes_agree(f"mul.rn.f32 %f1, %f4, %f4; {shuffle} add.rn.f32 %f5, %f1, %f3;")
    assert not lanes_agree(f"mul.rn.f32 %f1, %f4, %f4; {shuffle} fma.rn.f32 %f5, %f4, %f4, %f3;")
    wide = "shfl.sync.bfly.b32 %r2|%p1, %r1, 16, 31, -1; mov.b64 %rd2, {%r2, %r3};"
    assert not lanes_agree(f"{wide} fma.rn.f64 %rd5, %rd4, %rd4, %rd2;")


@triton.jit
def helper(x):
    return tl.sum(x, 0)


@triton.jit
def add(a, b):
    return a + b


def total_kernel(x, out):
    tl.store(out, helper(tl.load(x + tl.arange(0, 32))))


others = types.ModuleType("others")
others.total = helper


def total_of_module_kernel(x, out):
    tl.store(out, others.total(tl.load(x + tl.arange(0, 32))))


def reduced_kernel(x, out):
    tl.store(out, tl.reduce(tl.load(x + tl.arange(0, 32)), 0, add))


@pytest.mark.parametrize("kernel", [total_kernel, total_of_module_kernel, reduced_kernel])
def test_a_launch_that_contracts_sums_over_lanes_is_refused(kernel):
    kernels = types.SimpleNamespace(total_kernel=support.kernel()(kernel))

    def launch(fused):
        x = torch.zeros(32)
        return record_launches(kernels, lambda: kernels.total_kernel[(1,)](x, x, enable_fp_fusion=fused))

    assert len(launch(False)) == 1
    with pytest.raises(AssertionError):
        launch(True)


def test_a_tensor_on_the_cpu_changes_no_device():
    assert isinstance(support.on_device(torch.zeros(1)), contextlib.nullcontext)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_tensor_on_a_gpu_makes_that_the_current_one():
    with support.on_device(torch.zeros(1, device="cuda:1")):
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0
