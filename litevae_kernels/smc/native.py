"""Weight modulation in the compiled core: C++ on the CPU, CUDA C++ on a GPU.

Both functions fill tensors that the caller allocated, and take any strides.
"""

import torch
from torch import Tensor

from litevae_kernels.backend import core
from litevae_kernels.tensors import current_stream, device_guard, native_view, scratch_memory


def forward(
    weight: Tensor, scale: Tensor, gain: Tensor | None, modulated: Tensor, norm: Tensor, eps: float
) -> None:
    """Fills `modulated` (C_out, C_in / groups, K_h, K_w) and `norm` (C_out)."""
    assert core is not None
    views = [native_view(t) for t in (weight, scale, gain, modulated, norm)]
    if weight.device.type == "cpu":
        core.modulate_weight_cpu(*views, eps, torch.get_num_threads())
        return
    with device_guard(weight.device):
        stream = current_stream(weight.device)
        core.modulate_weight_cuda(*views, eps, weight.device.index, stream)


def backward(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    gain: Tensor | None,
    norm: Tensor,
    grad_weight: Tensor,
    grad_scale: Tensor,
    grad_gain: Tensor | None,
    eps: float,
) -> None:
    """Fills the gradients; `grad_gain` is None if `gain` is."""
    assert core is not None
    tensors = (grad, weight, scale, gain, norm, grad_weight, grad_scale, grad_gain)
    views = [native_view(t) for t in tensors]
    if weight.device.type == "cpu":
        core.modulate_weight_backward_cpu(*views, eps, torch.get_num_threads())
        return
    with device_guard(weight.device):
        _, weight_view, _, _, norm_view, *_ = views
        size = core.modulate_weight_scratch_bytes(weight_view, norm_view)
        scratch = scratch_memory(size, weight.device)
        stream = current_stream(weight.device)
        core.modulate_weight_backward_cuda(*views, eps, scratch.data_ptr(), weight.device.index, stream)
