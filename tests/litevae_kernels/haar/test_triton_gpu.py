"""The Triton kernels on a GPU: huge tensors, CUDA graphs, compilations and devices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from litevae_kernels.haar import reference

kernels = pytest.importorskip("litevae_kernels.haar.triton")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _last_rows_agree(image: Tensor, coeffs: list[Tensor], levels: int) -> None:
    rows = 1 << levels
    tail = (
        image[-1:, -1:, -rows:] if image.shape[2] % rows == 0 else image[-1:, -1:, -(image.shape[2] % rows) :]
    )
    exact = reference.analysis(tail.double(), levels, "symmetric", 0.5, True, torch.float64, False)
    for got, want in zip(coeffs, exact, strict=True):
        last = got[-1:].unflatten(1, (4, -1))[:, :, -1, -want.shape[2] :]
        torch.testing.assert_close(last, want.to(last.dtype), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "levels"),
    [
        ((1, 1, 65536, 32776), 3),  # one plane
        ((3, 1, 32769, 21847), 1),  # odd
        ((2, 700, 1240, 1240), 3),  # across batch and channels
        ((2, 1, 65537, 65601), 1),  # more than 2^31 threads as well
    ],
)
def test_more_than_2_31_elements(coeff_shapes: Any, shape: tuple[int, int, int, int], levels: int) -> None:
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    assert elements > 2**31
    if torch.cuda.mem_get_info()[0] < 2 * elements * 4:
        pytest.skip("needs more GPU memory")
    image = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    image.uniform_(-1, 1)
    coeffs = [torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in coeff_shapes(*shape, levels, True)]
    kernels.analysis(image, coeffs, levels, "symmetric", 0.5, True)
    _last_rows_agree(image, coeffs, levels)
    first = reference.analysis(
        image[:1, :1, :8].double(), levels, "symmetric", 0.5, True, torch.float64, False
    )
    for got, want in zip(coeffs, first, strict=True):
        top = got[:1].unflatten(1, (4, -1))[:, :, 0, : want.shape[2]]
        torch.testing.assert_close(top, want.to(top.dtype), rtol=2**-7, atol=1e-6)
    del image, first
    # The last rows of the adjoint depend only on the last rows of the coefficients.
    back = torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")
    kernels.synthesis(back, coeffs, levels, "symmetric", 0.5, True)
    rows = shape[2] % (1 << levels) or 1 << levels
    tails = [
        x[-1:].unflatten(1, (4, -1))[:, :, -1, -((rows + (2 << i) - 1) >> (i + 1)) :]
        for i, x in enumerate(coeffs)
    ]
    want = reference.synthesis(
        [x.double() for x in tails], rows, shape[3], "symmetric", 0.5, True, torch.float64, False
    )
    torch.testing.assert_close(back[-1:, -1:, -rows:], want.to(back.dtype), rtol=2**-7, atol=1e-6)
    assert not any(bool(plane.isnan().any()) for plane in back.flatten(0, 1))


@pytest.mark.parametrize("size", [64, 37])
def test_cuda_graph_capture(coeff_shapes: Any, size: int) -> None:
    levels = 4
    shape = (2, 3, size, size)
    image = torch.randn(shape, device="cuda")
    coeffs = [torch.empty(s, device="cuda") for s in coeff_shapes(*shape, levels, True)]
    back = torch.empty_like(image)

    def call() -> None:
        kernels.analysis(image, coeffs, levels, "symmetric", 0.5, True)
        kernels.synthesis(back, coeffs, levels, "symmetric", 0.5, True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    image.normal_()
    for x in (*coeffs, back):
        x.fill_(float("nan"))
    graph.replay()
    captured = [x.clone() for x in (*coeffs, back)]
    call()
    for got, want in zip(captured, (*coeffs, back), strict=True):
        assert torch.equal(got, want)


def test_no_compilation_for_a_new_size(coeff_shapes: Any) -> None:
    def call(n: int, size: int) -> None:
        image = torch.randn(n, 3, size, size, device="cuda")
        coeffs = [torch.empty(s, device="cuda") for s in coeff_shapes(n, 3, size, size, 3, True)]
        kernels.analysis(image, coeffs, 3, "symmetric", 0.5, True)
        kernels.synthesis(image, coeffs, 3, "symmetric", 0.5, True)

    def compiled() -> int:
        names = [name for name in dir(kernels) if name.endswith("_kernel")]
        return sum(
            len(getattr(kernels, name).device_caches[torch.cuda.current_device()][0]) for name in names
        )

    call(16, 256)
    call(17, 255)
    before = compiled()
    # 239 is odd and has the same passes as 255; a size whose fused passes begin at another level has other kernels
    for n, size in [(15, 256), (18, 256), (20, 512), (16, 239), (19, 255)]:
        call(n, size)
    assert compiled() == before


def test_same_bits_every_time(coeff_shapes: Any) -> None:
    coeffs = [torch.randn(s, device="cuda") for s in coeff_shapes(4, 3, 67, 65, 3, True)]
    images = [torch.empty(4, 3, 67, 65, device="cuda") for _ in range(2)]
    for image in images:
        kernels.synthesis(image, coeffs, 3, "periodic", 0.5, True)
    assert torch.equal(*images)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_tensor_s_device(coeff_shapes: Any) -> None:
    image = torch.randn(2, 3, 16, 16, device="cuda:1")
    out = [torch.empty(s, device="cuda:1") for s in coeff_shapes(2, 3, 16, 16, 2, True)]
    with torch.cuda.device(0):
        kernels.analysis(image, out, 2, "symmetric", 0.5, True)
    want = reference.analysis(image, 2, "symmetric", 0.5, True, torch.float32, False)
    for x, y in zip(out, want, strict=True):
        torch.testing.assert_close(x, y)
