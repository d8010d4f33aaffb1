"""The arguments of the Triton kernels' launches, and the kernels compiled ahead of time; neither needs a GPU."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

kernels = pytest.importorskip("litevae_kernels.haar.triton")

not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler's kernels"
)

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
Launches = Callable[..., list[Launch]]


@pytest.fixture
def run_both(launches: Launches, coeff_shapes: Any) -> Launches:
    """Returns a function that records the launches of the kernels, forwards and backwards, for a shape."""

    def run(
        shape: tuple[int, int, int, int],
        levels: int,
        *,
        image_dtype: torch.dtype = torch.float32,
        coeff_dtype: torch.dtype | None = None,
        image_layout: torch.memory_format = torch.contiguous_format,
        coeff_layout: torch.memory_format = torch.contiguous_format,
        stacked: bool = True,
    ) -> list[Launch]:
        image = torch.empty(shape, dtype=image_dtype, memory_format=image_layout)
        coeffs = [
            torch.empty(s, dtype=coeff_dtype or image_dtype, memory_format=coeff_layout)
            for s in coeff_shapes(*shape, levels, stacked)
        ]

        def call() -> None:
            kernels.analysis(image, coeffs, levels, "symmetric", 0.5, stacked)
            kernels.synthesis(image, coeffs, levels, "symmetric", 0.5, stacked)

        return launches(kernels, call, dimensions=1)

    return run


@not_interpreted
def test_sizes_share_a_kernel(run_both: Any) -> None:
    first = run_both((2, 3, 256, 256), 3)
    for shape in [(1, 3, 256, 256), (7, 3, 256, 256), (33, 3, 512, 320), (8, 1, 256, 256)]:
        for (kernel, args, kwargs), (other, other_args, other_kwargs) in zip(
            first, run_both(shape, 3), strict=True
        ):
            assert kernel is other
            assert kwargs == other_kwargs
            # Triton would specialise integers in a tuple.
            assert not any(isinstance(x, int) for arg in args if isinstance(arg, tuple) for x in arg)
            for parameter, x, y in zip(kernel.params, args, other_args, strict=False):
                assert type(x) is type(y)
                if isinstance(x, int):
                    assert parameter.do_not_specialize
                    assert parameter.annotation_type == "i64"


def test_levels_go_in_passes(run_both: Any) -> None:
    def names(shape: tuple[int, int, int, int], levels: int) -> list[str]:
        both = run_both(shape, levels)
        analysis = [(k.__name__, kw.get("LEVELS")) for k, _, kw in both if kw["ANALYSIS"]]
        synthesis = [(k.__name__, kw.get("LEVELS")) for k, _, kw in both if not kw["ANALYSIS"]]
        assert synthesis[::-1] == analysis
        return [f"{'level' if x is None else x}" for _, x in analysis]

    assert names((1, 3, 256, 256), 3) == ["3"]
    assert names((1, 3, 256, 256), 5) == ["3", "2"]
    assert names((1, 3, 36, 40), 3) == ["2", "level"]
    assert names((1, 3, 37, 40), 3) == ["level", "level", "1"]


# Compiled ahead of time, for which no GPU is needed.


@not_interpreted
@pytest.mark.parametrize(
    ("dtype", "image", "coeffs"),
    [
        (torch.float32, {16: 16}, {16: 16, 8: 8, 4: 4}),
        (torch.bfloat16, {16: 8}, {8: 16, 4: 8, 2: 4}),
    ],
    ids=["fp32", "bf16"],
)
def test_fused_kernels_use_vectors_and_registers_only(
    dtype: torch.dtype,
    image: dict[int, int],
    coeffs: dict[int, int],
    monkeypatch: pytest.MonkeyPatch,
    run_both: Any,
    tmp_path: Path,
    compile_for_sm90: Any,
    accesses: Any,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    analysis, synthesis = run_both((4, 3, 256, 256), 3, image_dtype=dtype)
    for launch, loads, stores in ((analysis, image, coeffs), (synthesis, coeffs, image)):
        compiled = compile_for_sm90(launch)
        ptx = compiled.asm["ptx"]
        assert accesses(ptx, "ld") == loads
        assert accesses(ptx, "st") == stores
        assert compiled.metadata.shared == 0
        assert not re.search(r"\.local|bar\.sync", ptx)
        # Two vectors of a row are stored by two neighbours, who have exchanged them.
        assert ("shfl" in ptx) == (launch is synthesis and dtype == torch.float32)
        assert len(compiled.asm["cubin"]) > 0


@not_interpreted
def test_the_kernels_of_rgb_images_have_few_accesses(
    monkeypatch: pytest.MonkeyPatch, run_both: Any, tmp_path: Path, compile_for_sm90: Any, resources: Any
) -> None:
    """Triton's time to compile grows with their square: 111 of them took 7 seconds, 33 take 2."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cl = torch.channels_last
    launches = run_both((2, 3, 64, 64), 3, image_layout=cl, coeff_layout=cl)
    assert len(launches) == 2
    for launch in launches:
        compiled = compile_for_sm90(launch)
        assert len(re.findall(r"tt\.(?:load|store) ", compiled.asm["ttir"])) <= 40
        registers, spilled = resources(compiled)
        assert registers <= 96
        assert spilled <= 16  # one value of the outer loop, once per four image rows


@not_interpreted
@pytest.mark.parametrize(
    "case",
    [
        {"shape": (2, 3, 64, 64), "levels": 1, "image_dtype": torch.float32, "coeff_dtype": torch.bfloat16,
         "image_layout": torch.channels_last, "coeff_layout": torch.channels_last},
        {"shape": (2, 3, 64, 64), "levels": 1, "coeff_dtype": torch.float16, "coeff_layout": torch.channels_last},
        {"shape": (2, 8, 64, 64), "levels": 2, "image_dtype": torch.bfloat16, "stacked": False,
         "image_layout": torch.channels_last, "coeff_layout": torch.channels_last},
        {"shape": (2, 3, 36, 36), "levels": 3, "image_dtype": torch.float64, "coeff_dtype": torch.bfloat16},
        {"shape": (2, 3, 37, 33), "levels": 2, "image_dtype": torch.bfloat16, "stacked": False},
        {"shape": (2, 3, 33, 64), "levels": 1, "wide": True},
        {"shape": (2, 3, 16, 16), "levels": 1, "wide": True},
    ],
    ids=["packed", "planar to packed", "channels inner", "fp64 chain", "odd", "wide odd", "wide"],
)  # fmt: skip
def test_kernels_compile(
    case: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    run_both: Any,
    tmp_path: Path,
    compile_for_sm90: Any,
) -> None:
    case = dict(case)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if case.pop("wide", False):
        monkeypatch.setattr(kernels, "beyond_int32", lambda count: True)
    for launch in run_both(**case):
        compiled = compile_for_sm90(launch)
        assert len(compiled.asm["cubin"]) > 0
        assert ".local" not in compiled.asm["ptx"]
