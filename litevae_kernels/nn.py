"""Modules that wrap the operators. Their state-dict keys are those of the plain PyTorch layers."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae_kernels import conv3x3, group_norm_silu, modulate_weight, self_modulated_conv2d
from litevae_kernels.arithmetic import widened
from litevae_kernels.smc import named_padding, pair
from litevae_kernels.tensors import (
    add_residual,
    check_dtype,
    check_eps,
    check_flag,
    check_operand,
    check_residual,
    check_tensor,
    is_integer,
    shape_of,
    shown,
)

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def check_count(value: object, name: str) -> None:
    """Checks a number of channels, features or groups.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is less than 1, or 2^31 or more.
    """
    needed = f"{name} is {shown(value)}; an integer from 1 to 2^31 - 1 is needed"
    if not is_integer(value):
        raise TypeError(needed)
    if not 1 <= value < 2**31:
        raise ValueError(needed)


def check_operands(x: object, weight: Tensor, bias: Tensor | None) -> None:
    """Checks the input, the weight and the bias of a layer, as `litevae_kernels.conv3x3` does.

    Raises:
        TypeError: `x` is no dense tensor, or the dtypes differ and autocast does not convert them.
        ValueError: the devices differ.
    """
    check_tensor(x, "x")
    assert isinstance(x, Tensor)
    check_operand(weight, "weight", x)
    if bias is not None:
        check_operand(bias, "bias", x)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that computes in float32 on a CPU without the arithmetic of its half precision, and rounds once.

    Raises:
        TypeError: an argument of the constructor, or the input, has another type, or the input has another dtype than
            the weight and autocast does not convert it.
        ValueError: an argument of the constructor is out of range, `groups` does not divide the channels, or the input
            is on another device than the weight, has other dimensions or channels, or is too small for the kernel or
            the padding.
    """

    # This type is narrower than the one that nn.Conv2d declares.
    padding: str | tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count(groups, "groups")
        for channels, name in ((in_channels, "in_channels"), (out_channels, "out_channels")):
            check_count(channels, name)
            if channels % groups:
                raise ValueError(f"{name} is {channels}; a multiple of groups, {groups}, is needed")
        kernel_size, dilation = pair(kernel_size, "kernel_size", 1), pair(dilation, "dilation", 1)
        stride = pair(stride, "stride", 1)
        if isinstance(padding, str):
            named_padding(padding, stride)
        else:
            padding = pair(padding, "padding", 0)
        check_flag(bias, "bias")
        if not isinstance(padding_mode, str) or padding_mode not in get_args(PaddingMode):
            allowed = ", ".join(map(repr, get_args(PaddingMode)))
            raise ValueError(f"padding_mode is {shown(padding_mode)}; allowed: {allowed}")
        if dtype is not None:
            check_dtype(dtype, "dtype is")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )

    def check_size(self, x: Tensor, weight: Tensor) -> None:
        """Checks the shape of the input.

        Raises:
            ValueError: `x` is not ([N,] C_in, H, W), or is too small for the kernel or the padding.
        """
        if x.ndim not in (3, 4):
            raise ValueError(f"x has {x.ndim} dimensions; 4 are needed: (batch, channels, height, width)")
        channels = weight.shape[1] * self.groups
        if x.shape[-3] != channels:
            raise ValueError(f"x has shape {shape_of(x)}; {channels} channels are needed, as in the weight")
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            top, left = bottom, right = self.padding
        # A mode reflects all pixels but the edge's, or wraps around once.
        spare = {"reflect": 1, "circular": 0}.get(self.padding_mode)
        for size, pads, kernel, step in zip(
            x.shape[-2:], ((top, bottom), (left, right)), weight.shape[2:], self.dilation, strict=True
        ):
            if spare is not None and (size == 0 or max(pads) > size - spare):
                raise ValueError(
                    f"padding is {self.padding}; padding_mode {self.padding_mode!r} allows at most "
                    f"{max(size - spare, 0)} for x of shape {shape_of(x)}"
                )
            if size == 0 or size + sum(pads) <= step * (kernel - 1):
                raise ValueError(
                    f"x has shape {shape_of(x)}; with a padding of {self.padding} and a dilation of {self.dilation}, "
                    f"it is smaller than the kernel of {weight.shape[2]}x{weight.shape[3]}"
                )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        check_operands(input, weight, bias)
        try:
            return widened(super()._conv_forward, input, weight, bias)
        except RuntimeError:
            self.check_size(input, weight)  # only here, because it takes a fifth of a small call's time
            raise


class Linear(nn.Linear):
    """`nn.Linear` that computes in float32 on a CPU without the arithmetic of its half precision, and rounds once.

    Raises:
        TypeError: an argument of the constructor, or the input, has another type, or the input has another dtype than
            the weight and autocast does not convert it.
        ValueError: a number of features is less than 1, or the input is on another device than the weight or has
            another number of features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count(in_features, "in_features")
        check_count(out_features, "out_features")
        check_flag(bias, "bias")
        if dtype is not None:
            check_dtype(dtype, "dtype is")
        super().__init__(in_features, out_features, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        check_operands(input, self.weight, self.bias)
        features = self.weight.shape[1]
        if input.ndim == 0 or input.shape[-1] != features:
            raise ValueError(f"x has shape {shape_of(input)}; (..., {features}) is needed, as in the weight")
        return widened(F.linear, input, self.weight, self.bias)


class GroupNormSiLU(nn.GroupNorm):
    """SiLU of a group normalisation, a drop-in replacement for `nn.GroupNorm` followed by `nn.SiLU`.

    Takes (N, C, *) and returns the same shape, dtype (also under autocast) and memory format. The constructor
    arguments and the state-dict keys are those of `nn.GroupNorm`. Raises the errors of
    `litevae_kernels.group_norm_silu`, the constructor also for a number of channels that the groups do not divide.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_count(num_groups, "num_groups")
        check_count(num_channels, "num_channels")
        if num_channels % num_groups:
            raise ValueError(
                f"num_channels is {num_channels}; it must be divisible by num_groups, {num_groups}"
            )
        check_eps(eps)
        check_flag(affine, "affine")
        if dtype is not None:
            check_dtype(dtype, "dtype is")
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **kwargs)

    def forward(
        self,
        input: Tensor,
        skip: Tensor | None = None,
        offset: Tensor | None = None,
        statistics: Sequence[Tensor] = (),
    ) -> Tensor:
        """Normalises `input` or, with a second input (N, C_skip, *), ``torch.cat([input, skip], 1)``.

        `offset` is a number per channel that is added to the input before the norm, and `statistics` are those of the
        inputs, as `litevae_kernels.group_norm_silu` takes them.
        """
        parameters = (self.num_groups, self.weight, self.bias)
        options: Any = {"eps": self.eps, "skip": skip, "offset": offset, "statistics": statistics}
        return group_norm_silu(input, *parameters, **options)


class Conv3x3(Conv2d):
    """A 3x3 convolution of stride 1 with one pixel of zero padding, through `litevae_kernels.conv3x3`.

    Takes (N, in_channels, H, W) and returns (N, out_channels, H, W) in the input's dtype, or under autocast in that
    of autocast. The state-dict keys are those of `nn.Conv2d`. With `silu_input`, the layer convolves the SiLU of its
    input. Raises the errors of `litevae_kernels.conv3x3`.

    Libraries that wrap convolutions, such as PEFT, create further ones of the same class. With `kernel_size`, the
    constructor therefore has the arguments and the defaults of `nn.Conv2d`, and PyTorch computes every convolution
    that is not the one above.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *args: Any, silu_input: bool = False, **kwargs: Any
    ) -> None:
        if not args and "kernel_size" not in kwargs:
            if others := kwargs.keys() - {"bias", "device", "dtype"}:
                raise TypeError(f"Conv3x3 takes {', '.join(sorted(others))} only with kernel_size")
            kwargs |= {"kernel_size": 3, "padding": 1}
        check_flag(silu_input, "silu_input")
        super().__init__(in_channels, out_channels, *args, **kwargs)
        self.silu_input = silu_input

    def extra_repr(self) -> str:
        return super().extra_repr() + (", silu_input=True" if self.silu_input else "")

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, silu_input: bool | None = None
    ) -> Tensor:
        """Convolves `input`, or its SiLU, and adds `residual` (N, out_channels, H, W).

        Args:
            silu_input: whether to convolve the SiLU of the input; by default as the constructor said.
        """
        silu_input = self.silu_input if silu_input is None else silu_input
        options = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        if options == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
            return conv3x3(input, self.weight, self.bias, residual=residual, silu_input=silu_input)
        check_flag(silu_input, "silu_input")
        check_tensor(input, "x")
        y = super().forward(F.silu(input) if silu_input else input)
        if residual is None:
            return y
        check_residual(residual, y.shape, input)
        return add_residual(y, residual)


class SelfModulatedConv2d(Conv2d):
    """Self-modulated convolution (LiteVAE, Equation 3): a convolution that normalises its own weights.

    w'[o,i,k] = gain * scale[i] * w[o,i,k] / (sqrt(sum_{i,k} (scale[i] * w[o,i,k])^2) + eps)

    The scales and the gain belong to the layer, not to the sample, so this is one ordinary convolution.
    Takes (N, C_in, H, W) and returns (N, C_out, H', W') in the input's dtype, or under autocast in that of autocast.
    The constructor takes the arguments of `nn.Conv2d`, `eps`, and `silu_input`, with which the layer convolves the
    SiLU of its input. The state dict has the keys of `nn.Conv2d` plus `scale` (C_in) and `gain` (1), both initially
    ones. The weights are normalised in float32 (float64 for float64), whatever their storage type. An all-zero
    filter gives zeros; its gradient is finite in float32, where the slope is 1 / eps.
    Raises the errors of `litevae_kernels.self_modulated_conv2d`.
    """

    # These types are narrower than those that nn.Conv2d declares.
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *args: Any,
        eps: float = 1e-8,
        silu_input: bool = False,
        **kwargs: Any,
    ):
        check_eps(eps)
        check_flag(silu_input, "silu_input")
        super().__init__(in_channels, out_channels, *args, **kwargs)
        self.eps = eps
        self.silu_input = silu_input
        self.scale = nn.Parameter(torch.ones(in_channels, device=self.weight.device, dtype=self.weight.dtype))
        self.gain = nn.Parameter(torch.ones(1, device=self.weight.device, dtype=self.weight.dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "scale"):  # The constructor of nn.Conv2d calls this method before there is a scale.
            nn.init.ones_(self.scale)
            nn.init.ones_(self.gain)

    def extra_repr(self) -> str:
        silu = ", silu_input=True" if self.silu_input else ""
        return f"{super().extra_repr()}, eps={self.eps}{silu}"

    def modulated_weight(self) -> Tensor:
        """Returns w' of Equation 3, in the shape, dtype and memory format of `weight`."""
        return modulate_weight(self.weight, self.scale, self.gain, eps=self.eps)

    def _pad(self, input: Tensor) -> Tensor:
        """Returns `input`, padded as a padding mode other than zeros requires."""
        check_tensor(input, "x")
        self.check_size(input, self.weight)
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def folded(self) -> nn.Conv2d:
        """Returns a plain convolution with the modulated weights, which shares no memory with this layer.

        The plain convolution has no activation: if `silu_input` is set, apply SiLU to its input for the same output.
        """
        plain = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
        )
        plain.weight = nn.Parameter(self.modulated_weight().detach(), self.weight.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return plain.train(self.training)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, silu_input: bool | None = None
    ) -> Tensor:
        """Convolves `input`, or its SiLU, and adds `residual` (N, C_out, H', W').

        Args:
            silu_input: whether to convolve the SiLU of the input; by default as the constructor said.
        """
        padding = self.padding
        if self.padding_mode != "zeros":  # Padding with values of the image commutes with SiLU.
            input = self._pad(input)
            padding = (0, 0)
        return self_modulated_conv2d(
            input,
            self.weight,
            self.scale,
            self.gain,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            eps=self.eps,
            silu_input=self.silu_input if silu_input is None else silu_input,
            residual=residual,
        )
