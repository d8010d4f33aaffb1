"""Group normalisation followed by SiLU, in one operator.

y = z * sigmoid(z) with z = (x - mean) / sqrt(var + eps) * weight + bias, mean and (biased) variance over each
group's channels and pixels: `torch.nn.functional.group_norm` and `torch.nn.functional.silu`, the sequence in front of
every convolution of the Stable Diffusion VAE and of LiteVAE's U-Nets (paper Appendix G, ResBlock).

Takes float64, float32, bfloat16 and float16, computes in float32 (float64 for float64) with statistics that hold for
any mean, keeps the input's dtype (under autocast too) and memory format, and is differentiable any number of times.
`torch.func`'s transforms and forward-mode derivatives need the reference backend.
"""

from torch import Tensor

from litevae_kernels.backend import choose
from litevae_kernels.group_norm_silu import op, reference
from litevae_kernels.tensors import check_tensor


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    skip: Tensor | None = None,
) -> Tensor:
    """SiLU of the group normalisation of `x`, or of `x` and `skip` side by side.

    Args:
        x: (N, C, *), any strides; channels_last is the fastest.
        num_groups: into which the channels are divided; must divide their number.
        weight: (C), of any supported dtype; default: ones.
        bias: (C), of any supported dtype; default: zeros.
        eps: added to the variance.
        skip: a second input (N, C_skip, *) of the same dtype, whose channels follow x's: the result is that of
            ``torch.cat([x, skip], 1)``, without the copy. `weight` and `bias` are (C + C_skip) then.

    Returns:
        (N, C, *), or (N, C + C_skip, *); dtype and memory format of `x`.

    Raises:
        TypeError: a tensor is not float32, float64, float16 or bfloat16, or `skip` differs in dtype from `x`.
        ValueError: fewer than 2 dimensions, a `num_groups` that does not divide the channels, `weight` or `bias`
            of another length, a `skip` of another size, an `eps` that is not positive, or tensors on several
            devices.
    """
    check_tensor(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x has {x.ndim} dimensions; at least 2 are needed: (batch, channels, ...)")
    channels = x.shape[1]
    if skip is not None:
        check_tensor(skip, "skip")
        if skip.dtype != x.dtype:
            raise TypeError(f"skip has dtype {skip.dtype}; allowed: x's, {x.dtype}")
        if skip.ndim != x.ndim or skip.shape[0] != x.shape[0] or skip.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"skip has shape {tuple(skip.shape)}; all but the channels must be as in x, {tuple(x.shape)}"
            )
        channels += skip.shape[1]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups is {num_groups!r}; an integer is needed")
    if num_groups < 1 or channels == 0 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; it must divide the {channels} channels")
    if not eps > 0:
        raise ValueError(f"eps is {eps}; a positive number is needed")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_tensor(parameter, name)
            if parameter.shape != (channels,):
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}; ({channels},) is needed")
    for name, other in (("skip", skip), ("weight", weight), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device}; allowed: x's device, {x.device}")
    backend = choose(x.device.type)
    arguments = (_as_4d(x), None if skip is None else _as_4d(skip), weight, bias, num_groups, eps)
    y = reference.forward(*arguments) if backend == "reference" else op.group_norm_silu(*arguments, backend)
    return y if x.ndim == 4 else y.reshape(x.shape[0], channels, *x.shape[2:])


def _as_4d(x: Tensor) -> Tensor:
    if x.ndim == 4:
        return x
    if x.ndim > 4:  # pixels are pixels; (D, H) merge without a copy in channels_last_3d, too
        return x.flatten(2, -2)
    return x[:, :, None, None] if x.ndim == 2 else x[:, :, None]
