"""The Triton convolution compiled ahead of time, and the arguments of its launches; neither needs a GPU."""

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litevae_kernels.testing import Launch, compile_launch, record_launches

pytest.importorskip("triton")
kernels = importlib.import_module("litevae_kernels.conv3x3.triton")

not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler's kernels"
)


def launch(
    shape: tuple[int, int, int, int],
    outputs: int,
    *,
    skip_channels: int = 0,
    normalised: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Launch:
    """Returns the launch of a convolution with all operands and results, or without norm, residual and statistics."""
    n, c, h, w = shape

    def empty(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        # on the meta device, where no size takes memory and address 0 counts as aligned
        channels_last = torch.channels_last if len(sizes) == 4 else torch.contiguous_format
        return torch.empty(*sizes, dtype=dtype, device="meta", memory_format=channels_last)

    weight = empty(outputs, c + skip_channels, 3, 3).permute(0, 2, 3, 1)
    affine = empty(3, n, c + skip_channels, dtype=torch.float32) if normalised else None
    y, skip = empty(n, outputs, h, w), empty(n, skip_channels, h, w) if skip_channels else None
    residual = y if normalised else None
    arguments = (empty(n, c, h, w), skip, affine, weight, empty(outputs), residual, normalised, y)
    if normalised:
        arguments = (*arguments, kernels.empty_partials(y))
    (found,) = record_launches(kernels, lambda: kernels.forward(*arguments))
    return found


@not_interpreted
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 120])
@pytest.mark.parametrize(
    ("channels", "skip_channels", "outputs"), [(32, 0, 32), (96, 0, 192), (256, 0, 128), (192, 96, 96)]
)
def test_tensor_cores_and_no_spills(
    capability: int,
    channels: int,
    skip_channels: int,
    outputs: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    resources: Callable[[Any], tuple[int, int]],
    lanes_agree: Callable[[str], bool],
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for normalised in (True, False):
        found = launch((2, channels, 64, 64), outputs, skip_channels=skip_channels, normalised=normalised)
        compiled = compile_launch(found, capability)
        ptx = compiled.asm["ptx"]
        instruction = r"wgmma\.mma_async\.sync" if capability == 90 else r"\bmma\.sync"
        assert re.search(instruction + r"\S*\.bf16\.bf16", ptx)
        assert not re.search(r"fma\.rn\.bf16", ptx)
        assert lanes_agree(ptx)
        assert compiled.metadata.shared <= 99 * 1024, "more than a block has on sm_86, sm_89 and sm_120"
        assert resources(compiled)[1] == 0


@not_interpreted
@pytest.mark.parametrize(("channels", "outputs"), [(3, 32), (12, 4), (130, 5)])
def test_odd_channels_compile(
    channels: int, outputs: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resources: Any
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_launch(launch((1, channels, 5, 7), outputs, dtype=torch.float16))
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert resources(compiled)[1] == 0


@not_interpreted
def test_loads_are_vectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accesses: Any) -> None:
    """The loop copies both factors to shared memory in vectors of 16 bytes, and the result is stored in those."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compile_launch(launch((2, 96, 17, 19), 128, normalised=False)).asm["ptx"]
    copies = re.findall(r"cp\.async\S*shared\S*global\S* \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)
    assert copies
    assert {int(size, 0) for size in copies} == {16}
    assert set(accesses(ptx, "st")) == {16}


@not_interpreted
def test_sizes_share_a_kernel() -> None:
    kernel, args, kwargs = launch((4, 128, 128, 128), 128)
    for shape in [(1, 128, 128, 128), (7, 128, 1, 77), (3, 256, 64, 96)]:
        other, other_args, other_kwargs = launch(shape, 128)
        assert kernel is other
        assert kwargs == other_kwargs
        for parameter, a, b in zip(kernel.params, args, other_args, strict=False):
            assert type(a) is type(b)
            if isinstance(a, int):
                assert parameter.do_not_specialize
                assert parameter.annotation_type == "i64"


@pytest.mark.parametrize("shape", [(2**20, 512, 8, 8), (1, 16, 2**15, 2**15), (3, 512, 2**14, 2**14)])
def test_grids_of_huge_sizes(shape: tuple[int, int, int, int]) -> None:
    assert launch(shape, 512)
