"""The predicted traffic of benchmarks/gpu/traffic.py against the sectors that the emulated kernels touch."""

import struct
from typing import Any

import pytest
import torch

from benchmarks.gpu import traffic
from litevae_kernels.group_norm_silu import native
from litevae_kernels.haar.shapes import MODES

# PyTorch's kernels are not on the emulator. This one adds in place as `aten::add_` must, a number per thread.
ADD = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry add(.param .u64 out, .param .u64 other)
{
  .reg .b32 %r<6>;
  .reg .f32 %f<4>;
  .reg .b64 %rd<7>;
  ld.param.u64 %rd1, [out];
  ld.param.u64 %rd2, [other];
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mov.u32 %r3, %tid.x;
  mad.lo.s32 %r4, %r1, %r2, %r3;
  mul.wide.u32 %rd3, %r4, 4;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  ld.global.f32 %f1, [%rd4];
  ld.global.f32 %f2, [%rd5];
  add.f32 %f3, %f1, %f2;
  st.global.f32 [%rd4], %f3;
  ret;
}
"""


def touched(kernels: dict[str, Any]) -> int:
    """Returns the bytes of all sectors, each counted once per launch and direction."""
    return sum(32 * (kernel.loads.distinct + kernel.stores.distinct) for kernel in kernels.values())


@pytest.mark.parametrize("given", [False, True], ids=["own statistics", "given statistics"])
@pytest.mark.parametrize("skip_channels", [0, 32])
def test_group_norm_silu(cuda_kernels: Any, skip_channels: int, given: bool) -> None:
    def tensor(channels: int) -> torch.Tensor:
        return torch.randn(1, channels, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last)

    inputs = [tensor(channels) for channels in (64, skip_channels) if channels]
    y, stats = tensor(64 + skip_channels), torch.empty(1, 32, 2, dtype=torch.float64)
    statistics = [torch.zeros(*x.shape[:2], 2, dtype=torch.float64) for x in inputs] if given else []
    skip = inputs[1] if skip_channels else None
    arguments = (inputs[0], skip, None, None, y, stats, 32, 1e-6, None, statistics)
    kernels = cuda_kernels.emulator.count_traffic(
        lambda: cuda_kernels.run("group_norm_silu", "forward", *arguments, written=[y, stats])
    )
    predicted = traffic.group_norm_silu(inputs, y, given=given)
    by_kind = {
        traffic.STATISTICS: {name: k for name, k in kernels.items() if "Apply" not in name},
        traffic.APPLY: {name: k for name, k in kernels.items() if "Apply" in name},
    }
    # The partial sums and three float32 coefficients per channel, which the prediction leaves out, are written and read
    # once, and the statistics are written.
    written = sum(kernel.stores.bytes for kernel in by_kind[traffic.STATISTICS].values())
    coefficients = 12 * y.shape[1]
    partials = written - stats.nbytes - coefficients
    if given:
        assert partials == 0
        partials = sum(x.nbytes for x in statistics) / 2  # They are read only.
    else:
        assert 0 < partials <= y.nbytes / 25
    more = {traffic.STATISTICS: 2 * partials + stats.nbytes + coefficients, traffic.APPLY: coefficients}
    assert all(by_kind.values())
    assert {kind: touched(found) - predicted[kind] for kind, found in by_kind.items()} == more


# PTX instructions per element of 1x96x32x32 in bfloat16, as benchmarks/results/LEDGER.md has them.
STATISTICS_INSTRUCTIONS = {torch.channels_last: 14.3, torch.contiguous_format: 12.0}


@pytest.mark.parametrize("layout", STATISTICS_INSTRUCTIONS, ids=str)
def test_instructions_of_the_statistics(cuda_kernels: Any, layout: torch.memory_format) -> None:
    """The statistics take no more instructions than were counted for the ledger."""
    x = torch.randn(1, 96, 32, 32).bfloat16().contiguous(memory_format=layout)
    y, stats = torch.empty_like(x), torch.empty(1, 32, 2, dtype=torch.float64)
    arguments = (x, None, None, None, y, stats, 32, 1e-6)
    kernels = cuda_kernels.emulator.count_traffic(
        lambda: cuda_kernels.run("group_norm_silu", "forward", *arguments, written=[y, stats])
    )
    (kernel,) = (found for name, found in kernels.items() if "10Statistics" in name)
    assert kernel.loads.bytes == x.nbytes
    assert 0 < round(kernel.instructions / x.numel(), 1) <= STATISTICS_INSTRUCTIONS[layout]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("skip_channels", [0, 32])
def test_group_norm_silu_in_clusters(
    cuda_kernels: Any, skip_channels: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel reads x and skip once, in whole sectors, and writes the result once."""
    monkeypatch.setattr(native, "mode", "clusters")

    def tensor(channels: int) -> torch.Tensor:
        return torch.randn(2, channels, 32, 32).bfloat16().contiguous(memory_format=layout)

    inputs = [tensor(channels) for channels in (64, skip_channels) if channels]
    y, stats = tensor(64 + skip_channels), torch.empty(2, 32, 2, dtype=torch.float64)
    arguments = (inputs[0], inputs[1] if skip_channels else None, None, None, y, stats, 32, 1e-6)
    kernels = cuda_kernels.emulator.count_traffic(
        lambda: cuda_kernels.run("group_norm_silu", "forward", *arguments, written=[y, stats])
    )
    (kernel,) = kernels.values()
    assert touched(kernels) == sum(traffic.group_norm_silu_in_clusters(inputs, y).values()) + stats.nbytes
    assert kernel.loads.widths == {16: sum(x.nbytes for x in inputs)}
    assert kernel.stores.widths == {16: y.nbytes, 8: stats.nbytes}
    assert kernel.loads.excess == 1


def test_haar(cuda_kernels: Any) -> None:
    image = torch.randn(1, 3, 64, 256)
    coefficients = [torch.empty(1, 12, 64 >> level, 256 >> level) for level in (1, 2, 3)]
    arguments = (image, coefficients, 3, "symmetric", 0.5, True)
    kernels = cuda_kernels.emulator.count_traffic(
        lambda: cuda_kernels.run("haar", "analysis", *arguments, written=coefficients)
    )
    assert traffic.haar(image, coefficients) == {traffic.HAAR: touched(kernels)}


# Sectors of each request, in multiples of the bytes that it moves. Rows of the third level are 24 bytes per thread in
# bfloat16. Triton's pairs of vectors fit only those rows whose number of vectors is even.
COEFFICIENTS = {
    ("cuda", torch.float32): 1.0,
    ("cuda", torch.bfloat16): 1.05,
    ("triton", torch.float32): 1.0,
    ("triton", torch.bfloat16): 1.24,
}


@pytest.mark.parametrize("function", ["analysis", "synthesis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("image_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_haar_of_rgb_in_channels_last(
    backend: str,
    image_format: torch.memory_format,
    dtype: torch.dtype,
    function: str,
    request: pytest.FixtureRequest,
) -> None:
    """A warp's accesses to adjacent coefficients use whole sectors, and its stores to a float32 image do."""
    kernels = request.getfixturevalue(f"{backend}_kernels")
    image = torch.randn(1, 3, 64, 128).contiguous(memory_format=image_format)
    coefficients = [
        torch.randn(1, 12, 64 >> i, 128 >> i).to(dtype).contiguous(memory_format=torch.channels_last)
        for i in (1, 2, 3)
    ]
    written = coefficients if function == "analysis" else [image]
    arguments = (image, coefficients, 3, "symmetric", 0.5, True)
    counted = kernels.emulator.count_traffic(
        lambda: kernels.run("haar", function, *arguments, written=written)
    )
    assert len(counted) == 1
    (kernel,) = counted.values()
    of_coefficients, of_image = kernel.stores, kernel.loads
    if function == "synthesis":
        of_coefficients, of_image = of_image, of_coefficients
    assert of_coefficients.bytes == sum(x.nbytes for x in coefficients)
    assert of_image.bytes == image.nbytes
    assert round(of_coefficients.excess, 2) <= COEFFICIENTS[backend, dtype]
    # The first cache serves the second half of a sector that two loads read.
    assert of_image.excess <= (1 if function == "synthesis" else 2)
    assert kernel.loads.distinct * 32 == kernel.loads.bytes
    assert kernel.stores.distinct * 32 == kernel.stores.bytes


# The same for rows that begin anywhere in a sector, so that a request touches one sector more. It has most of its bytes
# in float32: Triton's for a bfloat16 image are 96 bytes.
UNALIGNED = {
    ("cuda", torch.float32): 1.11,
    ("cuda", torch.bfloat16): 1.26,
    ("triton", torch.float32): 1.13,
    ("triton", torch.bfloat16): 1.31,
}


@pytest.mark.parametrize("function", ["analysis", "synthesis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("image_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("backend", "kernel"), [("cuda", "Inside"), ("triton", "fused")])
def test_haar_of_rgb_in_rows_that_vectors_do_not_fit(
    backend: str,
    kernel: str,
    image_format: torch.memory_format,
    dtype: torch.dtype,
    function: str,
    request: pytest.FixtureRequest,
) -> None:
    """Neighbouring threads share sectors. What lies at a border or has an odd size is done by other kernels."""
    kernels = request.getfixturevalue(f"{backend}_kernels")
    image = torch.randn(1, 3, 64, 250).to(dtype).contiguous(memory_format=image_format)
    coefficients = [
        torch.randn(1, 12, 64 >> i, -(-250 >> i)).to(dtype).contiguous(memory_format=torch.channels_last)
        for i in (1, 2, 3)
    ]
    written = coefficients if function == "analysis" else [image]
    arguments = (image, coefficients, 3, "symmetric", 0.5, True)
    counted = kernels.emulator.count_traffic(
        lambda: kernels.run("haar", function, *arguments, written=written)
    )
    (found,) = (traffic for name, traffic in counted.items() if kernel in name)
    assert round(max(found.loads.excess, found.stores.excess), 2) <= UNALIGNED[backend, dtype]


# Sectors of loads and of stores of contiguous rows that vectors do not fit. Inside the image, in multiples of the bytes
# that the threads ask for: a thread moves its own part of a row in vectors with single elements around them, so several
# requests touch a sector. With the border, in multiples of the image and of its coefficients: there, a thread makes one
# coefficient and loads the pixels under it, which the three levels share. LEDGER.md has the alternative, and why not.
ROWS = {
    ("analysis", torch.float32): ((2.32, 2.44), (4.84, 2.43)),
    ("analysis", torch.bfloat16): ((1.64, 2.87), (5.43, 2.98)),
    ("synthesis", torch.float32): ((1.36, 2.51), (2.68, 2.45)),
    ("synthesis", torch.bfloat16): ((1.90, 2.40), (3.94, 2.48)),
}


@pytest.mark.parametrize("function", ["analysis", "synthesis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_haar_of_contiguous_rows_that_vectors_do_not_fit(
    cuda_kernels: Any, dtype: torch.dtype, function: str
) -> None:
    image = torch.randn(1, 3, 62, 250).to(dtype)
    coefficients = [torch.randn(1, 12, -(-62 >> i), -(-250 >> i)).to(dtype) for i in (1, 2, 3)]
    loaded, stored = [image], coefficients
    if function == "synthesis":
        loaded, stored = stored, loaded
    arguments = (image, coefficients, 3, "symmetric", 0.5, True)
    kernels = cuda_kernels.emulator.count_traffic(
        lambda: cuda_kernels.run("haar", function, *arguments, written=stored)
    )
    (inside,) = (kernel for name, kernel in kernels.items() if "Inside" in name)
    whole = [
        32 * sum(traffic.sectors for traffic in of_kernels) / sum(x.nbytes for x in tensors)
        for of_kernels, tensors in (
            ([kernel.loads for kernel in kernels.values()], loaded),
            ([kernel.stores for kernel in kernels.values()], stored),
        )
    ]
    measured = (inside.loads.excess, inside.stores.excess, *whole)
    for found, bound in zip(measured, sum(ROWS[function, dtype], ()), strict=True):
        assert found <= bound


# Loads of a thread at the border. A coefficient of the third level is made of 8x8 pixels. A pixel is made of four
# sub-bands of each level; where it also stands for missing samples, which odd sizes have at every level, each level
# adds theirs: one more at an edge, three more in the corner.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("size", "of_pixel"),
    [((64, 250), 28), ((33, 64), 56), ((64, 65), 56), ((33, 65), 336)],
    ids=["width", "odd height", "odd width", "corner"],
)
@pytest.mark.parametrize("function", ["analysis", "synthesis"])
def test_haar_spreads_the_border_over_threads(
    cuda_kernels: Any, function: str, size: tuple[int, int], of_pixel: int, mode: str
) -> None:
    image = torch.randn(1, 1, *size)
    coefficients = [torch.randn(1, 4, *(-(-x >> i) for x in size)) for i in (1, 2, 3)]
    written = coefficients if function == "analysis" else [image]
    arguments = (image, coefficients, 3, mode, 0.5, True)
    kernels = cuda_kernels.emulator.count_traffic(
        lambda: cuda_kernels.run("haar", function, *arguments, written=written)
    )
    (border,) = (kernel for name, kernel in kernels.items() if "Edge" in name)
    assert 0 < border.most_loads <= (64 if function == "analysis" else of_pixel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_haar_of_contiguous_images(backend: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Synthesis stores whole sectors of rows that take two vectors per thread."""
    kernels = request.getfixturevalue(f"{backend}_kernels")
    image = torch.empty(1, 3, 64, 128, dtype=dtype)
    coefficients = [torch.randn(1, 12, 64 >> i, 128 >> i).to(dtype) for i in (1, 2, 3)]
    arguments = (image, coefficients, 3, "symmetric", 0.5, True)
    counted = kernels.emulator.count_traffic(
        lambda: kernels.run("haar", "synthesis", *arguments, written=[image])
    )
    (found,) = counted.values()
    assert found.stores.bytes == image.nbytes
    assert found.stores.excess == 1


@pytest.mark.parametrize("measure", [False, True], ids=["sum", "sum and statistics"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_addition_of_biases_and_residuals(
    backend: str, count: int, measure: bool, request: pytest.FixtureRequest
) -> None:
    kernels = request.getfixturevalue(f"{backend}_kernels")
    y, *residuals = (
        torch.randn(1, 64, 32, 32).bfloat16().contiguous(memory_format=torch.channels_last)
        for _ in range(1 + count)
    )
    biases = [torch.randn(64) for _ in range(count)]
    statistics = torch.empty(1, 64, 2, dtype=torch.float64) if measure else None
    arguments = (y, residuals, biases, statistics)
    counted = kernels.emulator.count_traffic(
        lambda: kernels.run("group_norm_silu", "add", *arguments, written=[y, statistics])
    )
    (sums,) = (kernel for name, kernel in counted.items() if "add" in name.lower())
    moved = sum(traffic.addition(y, residuals).values()) + sum(x.nbytes for x in biases)
    partials = 0
    if statistics is not None:
        (join,) = (kernel for kernel in counted.values() if kernel is not sums)
        partials = 32 * join.loads.distinct
        # In CUDA two float64 per channel and chunk, in Triton three float32.
        assert 0 < partials <= y.nbytes / (16 if backend == "cuda" else 20)
        assert touched({"": join}) == partials + statistics.nbytes
    assert touched({"": sums}) == moved + partials
    assert sums.loads.widths[16] == y.nbytes + sum(x.nbytes for x in residuals)
    assert sums.stores.widths[16] == y.nbytes + (partials if backend == "cuda" else 0)


@pytest.mark.parametrize("skip_channels", [0, 32])
def test_convolution(triton_kernels: Any, skip_channels: int) -> None:
    """Inputs, weight and result as predicted, and what a convolution of PyTorch's does not have."""

    def tensor(channels: int) -> torch.Tensor:
        return torch.randn(1, channels, 16, 16).bfloat16().contiguous(memory_format=torch.channels_last)

    x, skip, residual, y = (
        tensor(64),
        tensor(skip_channels) if skip_channels else None,
        tensor(32),
        tensor(32),
    )
    inputs = 64 + skip_channels
    weight, bias, affine = (
        torch.randn(32, 3, 3, inputs).bfloat16(),
        torch.randn(32),
        torch.randn(3, 1, inputs),
    )
    arguments = (x, skip, affine, weight, bias, residual, True, y)
    kernels = triton_kernels.emulator.count_traffic(
        lambda: triton_kernels.run("conv3x3", "forward", *arguments, written=[y])
    )
    whole = x if skip is None else torch.cat([x, skip], 1)
    more = residual.nbytes + bias.nbytes + affine.nbytes
    assert touched(kernels) == traffic.convolution(whole, weight, None, y)[traffic.CONVOLUTION] + more


@pytest.mark.parametrize("space", [".global", ""], ids=["global", "generic"])
def test_elementwise(emulator: Any, space: str) -> None:
    """PyTorch adds a residual in a pass that reads two tensors and writes one.

    Addresses whose space the compiler does not know are counted as well.
    """
    out, other = torch.randn(8, 128), torch.randn(8, 128)
    expected = out + other
    module = emulator.load(ADD.replace(".global", space).encode())
    for x, writable in ((out, True), (other, False)):
        emulator.allow(x, writable)
    addresses = [struct.pack("<Q", x.data_ptr()) for x in (out, other)]
    try:
        kernels = emulator.count_traffic(
            lambda: emulator.launch(module, "add", (8, 1, 1), (128, 1, 1), 0, addresses)
        )
    finally:
        emulator.forget()
    assert torch.equal(out, expected)
    assert touched(kernels) == sum(traffic.addition(out, [other]).values())
    assert kernels["add"].loads.widths == {4: out.nbytes + other.nbytes}
    assert kernels["add"].stores.widths == {4: out.nbytes}
    assert kernels["add"].most_loads == 2
