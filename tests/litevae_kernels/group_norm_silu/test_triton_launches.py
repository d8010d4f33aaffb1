"""The arguments of the Triton kernels' launches, and the kernels compiled ahead of time; neither needs a GPU."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

kernels = pytest.importorskip("litevae_kernels.group_norm_silu.triton")

not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler's kernels"
)

# Words in the names of kernels whose inputs are small, and whose arithmetic is float64.
SMALL = ("join", "parameters", "channel_statistics", "combine")

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
Launches = Callable[..., list[Launch]]


@pytest.fixture
def run_both(launches: Launches) -> Launches:
    """Returns a function that records the launches of the kernels, forwards and backwards, for a shape."""

    def run(
        shape: tuple[int, int, int, int],
        skip: int = 0,
        *,
        groups: int = 32,
        dtype: torch.dtype = torch.bfloat16,
        format: torch.memory_format = torch.channels_last,
        grad_format: torch.memory_format | None = None,
        crop: bool = False,
        affine: bool = True,
    ) -> list[Launch]:
        n, c, h, w = shape

        def empty(channels: int, memory_format: torch.memory_format) -> Tensor:
            # on the meta device, where no size takes memory and address 0 counts as aligned
            out = torch.empty(
                n, channels, h, w + crop, dtype=dtype, device="meta", memory_format=memory_format
            )
            return out[..., :w]

        x, grad = empty(c, format), empty(c + skip, grad_format or format)
        second = empty(skip, format) if skip else None
        parameters = [torch.empty(c + skip, device="meta") if affine else None for _ in range(2)]
        stats = torch.empty(n, groups, 2, dtype=torch.float64, device="meta")
        y = empty(c + skip, format)

        statistics = torch.empty(n, c + skip, 2, dtype=torch.float64, device="meta")
        biases = [] if parameters[0] is None else parameters

        def call() -> None:
            kernels.add(y, [y, grad][: 1 + affine], biases, statistics)
            kernels.forward(x, second, *parameters, y, stats, groups, 1e-6)
            given = [statistics] if second is None else [statistics, statistics]
            kernels.coefficients_of(x, second, *parameters, stats, groups, 1e-6, None, given)
            kernels.backward(grad, x, second, *parameters, stats, x, second, *parameters, groups)

        return launches(kernels, call)

    return run


@not_interpreted
def test_sizes_share_a_kernel(run_both: Any) -> None:
    first = run_both((4, 128, 128, 128))
    for shape in [(1, 128, 128, 128), (7, 128, 256, 256), (3, 128, 64, 96), (2, 256, 64, 64)]:
        for (kernel, args, kwargs), (other, other_args, other_kwargs) in zip(
            first, run_both(shape), strict=True
        ):
            assert kernel is other
            assert {k: v for k, v in kwargs.items() if k not in ("ROWS", "BLOCK")} == {
                k: v for k, v in other_kwargs.items() if k not in ("ROWS", "BLOCK")
            }
            for parameter, a, b in zip(kernel.params, args, other_args, strict=False):
                assert type(a) is type(b)
                if isinstance(a, int):
                    assert parameter.do_not_specialize
                    assert parameter.annotation_type == "i64"


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2**22, 512, 1, 1), 32),
        ((3 * 2**29, 32, 1, 1), 32),
        ((1, 1, 65536, 65537), 1),
        ((70000, 96, 3, 3), 96),
    ],
)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_grids_of_huge_sizes(
    shape: tuple[int, int, int, int],
    groups: int,
    format: torch.memory_format,
    run_both: Any,
) -> None:
    assert run_both(shape, groups=groups, format=format)


def test_one_image_fills_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 128, 512, 512, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    (part,) = kernels._parts(x, None)
    summing, writing = (part.tiling(part.chunk(sums=sums))[0][0] for sums in (True, False))
    assert summing >= 132 * 3  # with four tiles in flight each
    assert writing >= 132 * 16


# Kernels compiled ahead of time, without a GPU.


@not_interpreted
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_vectors_and_no_spills(
    dtype: torch.dtype,
    format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
    run_both: Any,
    tmp_path: Path,
    compile_for_sm90: Any,
    accesses: Any,
    resources: Any,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = run_both((8, 128, 128, 128), dtype=dtype, format=format)
    assert len(found) == 10
    for launch in found:
        name = launch[0].__name__
        compiled = compile_for_sm90(launch)
        registers, spilled = resources(compiled)
        assert spilled == 0, name
        print(name, registers)
        assert registers <= 168, (name, registers)
        if any(word in name for word in SMALL):
            continue
        ptx = compiled.asm["ptx"]
        loads, stores = accesses(ptx, "ld"), accesses(ptx, "st")
        tensors = 1 if "stats" in name or "apply" in name else 2
        assert loads[16] >= 2 * tensors, (name, loads)
        if dtype == torch.bfloat16:
            assert loads[2] == 0, (name, loads)
            assert stores[2] == 0, (name, stores)
        if "apply" in name or "grad" in name or "add" in name:
            assert set(stores) - {4} == {16}, (name, stores)
            assert stores[4] <= (9 if "add" in name else 0), (name, stores)  # the partials


@not_interpreted
@pytest.mark.parametrize(
    "case",
    [
        {"shape": (2, 96, 16, 16), "skip": 64},
        {"shape": (2, 64, 15, 17), "format": torch.contiguous_format, "grad_format": torch.channels_last},
        {"shape": (2, 64, 15, 17), "crop": True, "dtype": torch.float64},
        {"shape": (1, 3, 1, 1), "groups": 1, "dtype": torch.float16, "affine": False},
        {"shape": (1, 64, 32, 65536), "crop": True, "format": torch.contiguous_format},
    ],
    ids=["skip", "mixed", "fp64 rows", "one pixel", "wide rows"],
)
def test_kernels_compile(
    case: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    run_both: Any,
    tmp_path: Path,
    compile_for_sm90: Any,
    lanes_agree: Any,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    done = set()
    for launch in run_both(**case):
        key = (launch[0].__name__, str(launch[2]))
        if key not in done:
            done.add(key)
            compiled = compile_for_sm90(launch)
            assert len(compiled.asm["cubin"]) > 0
            assert lanes_agree(compiled.asm["ptx"]), key
            if case.get("dtype") != torch.float64 and not any(word in key[0] for word in SMALL):
                # only the split of the mean is float64, and no Python float makes arithmetic wider
                assert not re.search(r"\b(mul|fma|div)\.(\w+\.)*f64", compiled.asm["ptx"]), key
