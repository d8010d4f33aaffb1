"""PyTorch's convolution whose biases and residuals are added in one pass, with the statistics of the sum.

On a GPU, PyTorch adds a bias and a residual in passes of their own, and a GroupNorm that follows reads the sum once
more for its statistics. A kernel, in Triton or CUDA C++, does all three in the pass that adds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from litevae_kernels.backend import choose
from litevae_kernels.conv3x3 import reference
from litevae_kernels.group_norm_silu.op import backend_module
from litevae_kernels.tensors import device_type_of

torch.library.define(
    "litevae::add_residuals_",
    "(Tensor(a!) y, Tensor[] residuals, Tensor[] biases, bool measure, str backend) -> Tensor",
)


def _add_residuals(
    y: Tensor, residuals: Sequence[Tensor], biases: Sequence[Tensor], measure: bool, backend: str
) -> Tensor:
    """Adds at most two residuals (N, C, H, W) and two biases (C), of any dtype, to `y`, and rounds once.

    Returns float64 (N, C, 2), the mean and the variance of each channel of the sum, or unless `measure` no number.

    Raises:
        ValueError: there are more terms, or one has another shape.
    """
    for name, terms, shape in (("residuals", residuals, y.shape), ("biases", biases, y.shape[1:2])):
        if len(terms) > 2 or any(term.shape != shape for term in terms):
            shapes = [tuple(term.shape) for term in terms]
            raise ValueError(f"{name} have the shapes {shapes}; at most two of {tuple(shape)} are allowed")
    statistics = empty_statistics(y, y.shape[1], measure)
    if y.numel():
        backend_module(backend).add(y, residuals, biases, statistics if measure else None)
    else:
        statistics.zero_()
    return statistics


for _key in ("CPU", "CUDA"):  # A CPU stands for a GPU under Triton's interpreter.
    torch.library.impl("litevae::add_residuals_", _key, _add_residuals)


@torch.library.register_fake("litevae::add_residuals_")
def _(
    y: Tensor, residuals: Sequence[Tensor], biases: Sequence[Tensor], measure: bool, backend: str
) -> Tensor:
    return empty_statistics(y, y.shape[1], measure)


def empty_statistics(like: Tensor, channels: int, measure: bool) -> Tensor:
    """Returns memory for statistics (N, channels, 2) of a result; without `measure`, for no number."""
    shape = (like.shape[0], channels, 2) if measure else (0,)
    return torch.empty(shape, dtype=torch.float64, device=like.device)


def _backend(x: Tensor) -> str | None:
    """Returns the backend whose kernel adds on x's device; None if PyTorch adds, as on a CPU."""
    backend = choose(device_type_of(x))
    return backend if backend == "triton" or (backend == "native" and x.is_cuda) else None


def serves(x: Tensor, *, measure: bool = False) -> bool:
    """Returns whether the kernel adds to the convolution of `x`; with `measure`, whether it also measures the sum.

    `torch.compile` itself joins the additions after a convolution in one kernel, but not the statistics.
    """
    if torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        if not measure:
            return False
    elif forward_ad._current_level >= 0:  # A tangent would be lost.
        return False
    return _backend(x) is not None


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, silu_input: bool
) -> Tensor:
    """Returns PyTorch's convolution; one pass adds bias and residual where that saves a pass."""
    if bias is None or residual is None or not serves(x):
        return reference.forward(x, weight, bias, residual, silu_input)
    return convolve_and_add(x, weight, [bias], [residual], silu_input)[0]


def convolve_and_add(
    x: Tensor,
    weight: Tensor,
    biases: Sequence[Tensor],
    residuals: Sequence[Tensor],
    silu_input: bool,
    *,
    measure: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns the sum of PyTorch's convolution, biases and residuals, where `serves` is true.

    Args:
        x, weight, silu_input: arguments of `conv3x3`.
        biases: at most two of (C_out).
        residuals: at most two of (N, C_out, H, W).
        measure: whether to return the sum's statistics, as `group_norm_silu` takes them.
    """
    y = reference.forward(x, weight, None, None, silu_input)
    statistics = torch.ops.litevae.add_residuals_(y, residuals, biases, measure, _backend(x))
    return y, statistics if measure else None
