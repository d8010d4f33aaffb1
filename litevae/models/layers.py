"""Blocks that the encoder's U-Nets and the decoder share. Parameters have diffusers' names."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from litevae_kernels import conv3x3
from litevae_kernels.arithmetic import widened
from litevae_kernels.backend import keep_backend
from litevae_kernels.conv3x3 import addition, is_fused
from litevae_kernels.conv3x3.normed import (
    measured_norm_silu_conv3x3,
    measures,
    norm_adds_bias,
    norm_silu_conv3x3,
    normalises,
)
from litevae_kernels.diffusers_vae import why_called
from litevae_kernels.nn import Conv2d, Conv3x3, GroupNormSiLU, Linear, SelfModulatedConv2d

Norm = Literal["group", "smc", "none"]

EPS = 1e-6  # epsilon of every GroupNorm, as in the Stable Diffusion VAE

# Names of an attention's layers, and their names in state dicts from before diffusers 0.15.
OLD_ATTENTION_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def autocast_enabled(device: torch.device) -> bool:
    """Returns whether autocast is enabled for `device`; PyTorch has no autocast for the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def first_tensor(module: nn.Module, *, floating: bool = False) -> Tensor | None:
    """Returns the first parameter of a module, or buffer if it has none; None without either.

    Args:
        module: any module, also a replica of `nn.DataParallel`, whose parameters are plain attributes.
        floating: whether to pass over tensors of other dtypes than floating ones.
    """
    replicated: list[Tensor] = []
    if getattr(module, "_is_replica", False):
        replicated = [tensor for part in module.modules() for tensor in part._former_parameters.values()]  # type: ignore[operator]
    for tensors in (replicated, module.parameters(), module.buffers()):
        for tensor in tensors:
            if not floating or tensor.is_floating_point():
                return tensor
    return None


def compute_dtype(module: nn.Module, device: torch.device, owner: nn.Module | None = None) -> torch.dtype:
    """Returns the dtype in which `module` computes on `device`: autocast's if enabled, else its parameters'.

    Under diffusers' layerwise casting this is the compute dtype, not the storage dtype.

    Args:
        module: layer, or what another library has put in its place.
        device: device of the layer's input.
        owner: module around the layer, whose parameters count if the layer lists none of a floating dtype.
    """
    dtype = torch.get_default_dtype()
    for each in (module, owner):
        first = None if each is None else first_tensor(each, floating=True)
        if first is not None:
            # diffusers knows the compute dtype, but finds no parameters of a replica.
            dtype = first.dtype if getattr(each, "_is_replica", False) else get_parameter_dtype(each)
            break
    if autocast_enabled(device) and dtype != torch.float64:  # autocast leaves float64 alone
        return torch.get_autocast_dtype(device.type)
    return dtype


def norm_silu(channels: int, num_groups: int, norm: Norm) -> nn.Module:
    """Returns the layer before a plain convolution: GroupNorm and SiLU, or SiLU alone without a norm."""
    return GroupNormSiLU(num_groups, channels, eps=EPS) if norm == "group" else nn.SiLU()


class Measured(NamedTuple):
    """A tensor (N, C, H, W) and, if a kernel has computed them with it, the statistics that the next norm needs."""

    values: Tensor
    statistics: Tensor | None = None  # of each channel, as `group_norm_silu` takes them


class CheckpointedModule(nn.Module):
    """A module whose blocks can be recomputed in backward; see `ModelMixin.enable_gradient_checkpointing`."""

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor]  # set by ModelMixin

    def run(self, block: nn.Module, *args: Tensor) -> Tensor:
        """Returns `block(*args)`, checkpointed if that and gradients are enabled.

        A block that is a `CheckpointedModule` checkpoints its own blocks instead.
        """
        inner = isinstance(block, CheckpointedModule)
        if inner or not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(*args)
        # The recomputation runs in the thread of the backward pass, which on a GPU is another one.
        return self._gradient_checkpointing_func(keep_backend(block), *args)

    def hand_over(self, block: nn.Module, *inputs: Measured, measure: bool) -> Measured:
        """Returns the result of `run`, with its statistics if `measure` and a kernel can compute them on the way."""
        serves = addition.serves(inputs[0].values, measure=True)
        if serves and why_called(block, ResBlock, MidBlock) is None:
            assert isinstance(block, ResBlock | MidBlock)
            return block.measured(*inputs, measure=measure)
        return Measured(self.run(block, *(x.values for x in inputs)))


class NoConv2d(nn.Identity):
    """Identity in the place of a 1x1 convolution that the model does not have.

    Pipelines of diffusers take the dtype for the decoder from ``next(vae.post_quant_conv.parameters())``, so this
    module lists an empty tensor of the model's dtype. It is not a parameter of the model.
    """

    empty: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("empty", torch.empty(0), persistent=False)  # it moves with the model

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield nn.Parameter(self.empty, requires_grad=False)


class ShortcutConv2d(Conv2d):
    """A 1x1 convolution of one input, or of two inputs as if they were concatenated."""

    def forward(self, input: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is None:
            return super().forward(input)
        return widened(_convolve_both, input, skip, self.weight, self.bias)

    def parts(self, inputs: list[Tensor]) -> list[Tensor]:
        """Returns a tensor per input; they and the bias add up to the result."""
        weights = self.weight.split([x.shape[1] for x in inputs], dim=1)
        return [widened(F.conv2d, x, weight) for x, weight in zip(inputs, weights, strict=True)]


def _convolve_both(input: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    channels = input.shape[1]
    # These are slices because torch.onnx.export(dynamo=False) writes a tensor_split that ONNX Runtime refuses.
    # The sum can be in place, because the backward pass of a convolution does not need its result.
    return F.conv2d(input, weight[:, :channels], bias).add_(F.conv2d(skip, weight[:, channels:]))


def has_forward_of(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Returns whether `layer` runs the forward of `cls`, and not one that a library has put in its place.

    The hooks of diffusers and accelerate pass on all arguments; they refer to what they wrap by `__wrapped__`.
    """
    forward = vars(layer).get("forward", type(layer).forward)
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return getattr(forward, "__func__", forward) is cls.forward


def fuses(norm: nn.Module, conv: nn.Module, x: Tensor) -> bool:
    """Returns whether one operator applies `norm` and `conv` to `x`.

    A layer with hooks, or one that another library has changed or replaced, must be called as a module.
    """
    if why_called(norm, GroupNormSiLU) is not None or why_called(conv, Conv3x3) is not None:
        return False
    assert isinstance(conv, Conv3x3)
    return normalises(x, conv.weight)


def convolve_normalised(
    norm: nn.Module,
    conv: nn.Module,
    inputs: list[Tensor],
    statistics: list[Tensor],
    residual: Tensor | None = None,
    *,
    measure: bool,
) -> Measured:
    """Returns ``conv(norm(*inputs)) + residual`` for layers that `fuses` accepts, measured if a kernel can."""
    assert isinstance(norm, GroupNormSiLU)
    assert isinstance(conv, Conv3x3)
    parameters = (norm.num_groups, norm.weight, norm.bias, conv.weight, conv.bias)
    skip = inputs[1] if len(inputs) > 1 else None
    options: Any = {"eps": norm.eps, "skip": skip, "residual": residual}
    if measures(inputs[0], conv.weight):
        options |= {"statistics": statistics, "measure": measure}
        return Measured(*measured_norm_silu_conv3x3(inputs[0], *parameters, **options))
    return Measured(norm_silu_conv3x3(inputs[0], *parameters, **options))


def defers_bias(conv: nn.Module, norm: nn.Module, x: Tensor) -> bool:
    """Returns whether `norm`, which follows `conv` of `x`, adds the bias of the convolution."""
    return norm_adds_bias(x) and why_called(conv, Conv3x3) is None and why_called(norm, GroupNormSiLU) is None


class ResBlock(nn.Module):
    """A residual block with two 3x3 convolutions: x + conv2(silu(norm2(conv1(silu(norm1(x)))))).

    A 1x1 convolution is applied to x if the widths differ. `norm="smc"` replaces both pairs of GroupNorm and
    convolution by self-modulated convolutions (Section 4.2), `norm="none"` by plain ones. Takes
    (N, in_channels, H, W), or a U-Net's input and skip that have in_channels together; returns
    (N, out_channels, H, W).
    """

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, norm: Norm = "group") -> None:
        super().__init__()
        conv: Callable[[int, int], nn.Module] = Conv3x3
        if norm == "smc":
            conv = partial(SelfModulatedConv2d, kernel_size=3, padding=1)
        grouped = norm == "group"
        self.silu_input = not grouped  # otherwise the norms apply SiLU
        self.norm1 = norm_silu(in_channels, num_groups, norm) if grouped else nn.Identity()
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = norm_silu(out_channels, num_groups, norm) if grouped else nn.Identity()
        self.conv2 = conv(out_channels, out_channels)
        self.conv_shortcut = (
            ShortcutConv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        )

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.measured(Measured(x), None if skip is None else Measured(skip), measure=False).values

    def measured(self, x: Measured, skip: Measured | None = None, *, measure: bool) -> Measured:
        """Returns the result, with its statistics if `measure` and the kernel that adds the residual serves."""
        measure = measure and not self.silu_input  # Only norms need statistics.
        given = [x] if skip is None else [x, skip]
        inputs = [each.values for each in given]
        statistics = [each.statistics for each in given if each.statistics is not None]
        if skip is not None and not (
            isinstance(self.norm1, GroupNormSiLU) and self.conv_shortcut is not None
        ):
            inputs, statistics = [torch.cat(inputs, dim=1)], []  # some layer takes only one input
        if len(statistics) < len(inputs):
            statistics = []
        offset = found = None
        if fuses(self.norm1, self.conv1, inputs[0]):
            h, found = convolve_normalised(self.norm1, self.conv1, inputs, statistics, measure=True)
        else:
            if statistics and why_called(self.norm1, GroupNormSiLU) is None:
                h = self.norm1(*inputs, statistics=statistics)
            else:
                h = self.norm1(*inputs)
            if defers_bias(self.conv1, self.norm2, inputs[0]):
                assert isinstance(self.conv1, Conv3x3)
                h, offset = conv3x3(h, self.conv1.weight), self.conv1.bias
            else:
                h = self.convolve(self.conv1, h)
        fused = offset is None and fuses(self.norm2, self.conv2, h)
        if not fused:
            h = self.norm2(h) if offset is None else self.norm2(h, offset=offset)
            if self.adds(h, measure):
                return self.add(h, inputs, measure)
        # The shortcut is computed only now, so that it does not add to the peak memory of conv1.
        residual = inputs[0]
        if self.conv_shortcut is not None:
            own = has_forward_of(self.conv_shortcut, ShortcutConv2d)
            residual = self.conv_shortcut(*inputs) if own else self.conv_shortcut(torch.cat(inputs, dim=1))
        if fused:
            statistics = [] if found is None else [found]
            options: Any = {"residual": residual, "measure": measure}
            return convolve_normalised(self.norm2, self.conv2, [h], statistics, **options)
        return Measured(self.convolve(self.conv2, h, residual))

    def adds(self, h: Tensor, measure: bool) -> bool:
        """Returns whether one kernel adds to the convolution of `h` what the block adds, and measures the sum."""
        layers = ((self.conv2, Conv3x3), (self.conv_shortcut, ShortcutConv2d))
        if any(layer is not None and why_called(layer, cls) is not None for layer, cls in layers):
            return False
        assert isinstance(self.conv2, Conv3x3)
        return addition.serves(h, measure=measure) and not is_fused(h, self.conv2.weight)

    def add(self, h: Tensor, inputs: list[Tensor], measure: bool) -> Measured:
        """Returns the end of a block that `adds`."""
        conv: Any = self.conv2
        shortcut: Any = self.conv_shortcut
        biases = [layer.bias for layer in (conv, shortcut) if layer is not None and layer.bias is not None]
        residuals = inputs if shortcut is None else shortcut.parts(inputs)
        options: Any = {"silu_input": self.silu_input, "measure": measure}
        return Measured(*addition.convolve_and_add(h, conv.weight, biases, residuals, **options))

    def convolve(self, conv: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Returns the convolution of x, with the block's SiLU before it, plus `residual`.

        A layer that another library has changed or replaced takes one input, as an `nn.Conv2d` does.
        """
        if has_forward_of(conv, Conv3x3) or has_forward_of(conv, SelfModulatedConv2d):
            return conv(x, residual, silu_input=self.silu_input)
        y: Tensor = conv(F.silu(x) if self.silu_input else x)
        return y if residual is None else y + residual

    def fold(self) -> None:
        """Replaces self-modulated convolutions by plain ones that have the modulated weights."""
        for name in ("conv1", "conv2"):
            layer = getattr(self, name)
            if isinstance(layer, SelfModulatedConv2d):
                folded = layer.folded()
                plain = Conv3x3(layer.in_channels, layer.out_channels, device="meta")
                plain.weight, plain.bias = folded.weight, folded.bias
                setattr(self, name, plain.train(layer.training))


class Attention(DiffusersAttention):
    """Single-head self-attention over the pixels of (N, C, H, W), with its GroupNorm and a residual.

    It is diffusers' layer in the VAE of Stable Diffusion, so that diffusers' attention processors apply. State dicts
    with the names from before diffusers 0.15 load as well.
    """

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__(
            channels,
            heads=1,
            dim_head=channels,
            eps=EPS,
            norm_num_groups=num_groups,
            bias=True,
            _from_deprecated_attn_block=True,  # `from_pretrained` converts old names before it compares them
        )
        for layer in (self.to_q, self.to_k, self.to_v, self.to_out[0]):
            layer.__class__ = Linear

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:  # The processors cannot reshape an empty batch.
            return x
        # The sum is outside of the processor because that returns channels_last, and the result has x's layout.
        return x + super().forward(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, old in OLD_ATTENTION_NAMES.items():
            for kind in ("weight", "bias"):
                key = f"{prefix}{old}.{kind}"
                if key in state_dict:
                    state_dict[f"{prefix}{name}.{kind}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class MidBlock(CheckpointedModule):
    """Two ResBlocks with optional attention in between, (N, channels, H, W) -> (N, channels, H, W)."""

    def __init__(self, channels: int, num_groups: int, norm: Norm = "group", *, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(channels, channels, num_groups, norm) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, num_groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        return self.measured(Measured(x), measure=False).values

    def measured(self, x: Measured, *, measure: bool) -> Measured:
        """Returns the result with its statistics, as `ResBlock.measured` does."""
        x = self.hand_over(self.resnets[0], x, measure=not self.attentions)
        for attention in self.attentions:
            x = Measured(self.run(attention, x.values))
        return self.hand_over(self.resnets[1], x, measure=measure)
