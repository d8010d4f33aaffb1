"""Blocks of diffusers' `AutoencoderKL` on the fused operators; `litevae_kernels.accelerate` puts them into a model.

Each class takes the place of the diffusers class that it derives from, by assignment to ``module.__class__``. It adds
no attribute and no parameter, so that a module can change class at any time, in both directions. The alternative, an
attribute ``module.forward``, would be overwritten by the hooks of accelerate and diffusers, which use that attribute
themselves, and could not be pickled. A derived class passes `isinstance`, and it has the name of its base because
diffusers and accelerate also find blocks by the name (``_no_split_modules``).

Whether a layer is fused is decided at each call, from the layer as it is then: one with hooks, an adapter or another
class is called as a module, as diffusers calls it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import vae
from diffusers.models.downsampling import Downsample2D as DiffusersDownsample2D
from diffusers.models.resnet import ResnetBlock2D as DiffusersResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UpDecoderBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D as DiffusersUNetMidBlock2D
from diffusers.models.upsampling import Upsample2D as DiffusersUpsample2D
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from litevae_kernels.backend import keep_backend
from litevae_kernels.conv3x3 import conv3x3
from litevae_kernels.conv3x3.normed import norm_adds_bias
from litevae_kernels.group_norm_silu import group_norm_silu
from litevae_kernels.nn import Conv2d, Linear
from litevae_kernels.tensors import is_channels_last, memory_format_of

KERNEL_DEVICES = ("cpu", "cuda")


def why_called(module: nn.Module, *classes: type[nn.Module]) -> str | None:
    """Returns why `module` must be called as a module; None if its parameters are all that matters."""
    if type(module) not in classes:
        return f"is a {type(module).__name__}"
    if "forward" in module.__dict__:
        return "has a forward of its own (offloading or layerwise casting)"
    if module._compiled_call_impl is not None:
        return "is compiled on its own"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    ):
        return "has hooks"
    return None


def why_not_conv(conv: nn.Module) -> str | None:
    """Returns why `conv3x3` cannot stand for a convolution; None if it can."""
    reason = why_called(conv, nn.Conv2d, Conv2d)
    if reason is not None:
        return reason
    assert isinstance(conv, nn.Conv2d)
    if conv.kernel_size != (3, 3):
        return f"has a kernel of {conv.kernel_size[0]}x{conv.kernel_size[1]}"
    if conv.stride != (1, 1):
        return f"has a stride of {conv.stride[0]}"
    if conv.padding != (1, 1) or conv.padding_mode != "zeros":
        return "is not padded with one zero"
    if conv.dilation != (1, 1) or conv.groups != 1:
        return "is dilated or grouped"
    return None


def why_not_norm(norm: nn.Module, activation: nn.Module) -> str | None:
    """Returns why `group_norm_silu` cannot stand for a norm and the activation after it; None if it can."""
    reason = why_called(norm, nn.GroupNorm)
    if reason is not None:
        return reason
    assert isinstance(norm, nn.GroupNorm)
    if not norm.eps > 0:
        return "has no epsilon"
    reason = why_called(activation, nn.SiLU)
    return None if reason is None else f"precedes an activation that {reason}"


class Box:
    """A tensor on its way through the layers, and whether nothing else refers to it.

    A caller's local variable keeps a tensor alive during a call. This box is emptied by the callee instead, so that
    the memory is free as soon as the values are no longer needed.
    """

    def __init__(self, value: Tensor, *, ours: bool) -> None:
        self._values = [value]
        self.ours = ours  # False if a hook may have kept it.

    def take(self) -> Tensor:
        return self._values.pop()

    def put(self, value: Tensor, *, ours: bool) -> None:
        self._values.append(value)
        self.ours = ours


def apply_conv(conv: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Returns ``conv(x) + residual``."""
    if why_not_conv(conv) is None:
        return conv3x3(x, conv.weight, conv.bias, residual=residual)
    y: Tensor = conv(x)
    return y if residual is None else residual + y


def apply_norm(
    norm: Any, activation: nn.Module, x: Tensor, *, ours: bool = False, offset: Tensor | None = None
) -> Tensor:
    """Returns ``activation(norm(x))``, which may overwrite `x` if that is ours and no gradients are recorded.

    An `offset` per channel is added to x; it needs layers that `group_norm_silu` can stand for.
    """
    if why_not_norm(norm, activation) is None:
        overwrite = ours and not torch.is_grad_enabled()
        parameters = (norm.num_groups, norm.weight, norm.bias)
        return group_norm_silu(x, *parameters, eps=norm.eps, overwrite=overwrite, offset=offset)
    assert offset is None
    return activation(norm(x))


def defers_bias(conv: nn.Module, norm: nn.Module, activation: nn.Module, x: Tensor) -> bool:
    """Returns whether `norm`, which follows `conv` of `x`, adds the bias of the convolution."""
    return norm_adds_bias(x) and why_not_conv(conv) is None and why_not_norm(norm, activation) is None


class ResnetBlock2D(DiffusersResnetBlock2D):
    """The residual block without time embedding: two norms with SiLU and two convolutions, the second adds x."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if temb is not None or args or kwargs:
            return super().forward(input_tensor, temb, *args, **kwargs)
        box = Box(input_tensor, ours=False)
        self.run(box)
        return box.take()

    def run(self, box: Box) -> None:
        x = box.take()
        residual = x if self.conv_shortcut is None else None
        if (
            box.ours
            and not torch.is_grad_enabled()
            and residual is None
            and why_called(self.conv_shortcut, nn.Conv2d, Conv2d) is None
        ):
            # The shortcut is computed first, so that the norm can overwrite x.
            residual = apply_conv(self.conv_shortcut, x)
            h = apply_norm(self.norm1, self.nonlinearity, x, ours=True)
            del x
        else:
            h = apply_norm(self.norm1, self.nonlinearity, x)
        offset = None
        if defers_bias(self.conv1, self.norm2, self.nonlinearity, h):
            h, offset = conv3x3(h, self.conv1.weight), self.conv1.bias
        else:
            h = apply_conv(self.conv1, h)
        h = apply_norm(self.norm2, self.nonlinearity, h, ours=why_not_conv(self.conv1) is None, offset=offset)
        h = self.dropout(h)
        if residual is None:
            # Like diffusers: DDP warns of gradients with other strides than the weight's.
            residual = apply_conv(self.conv_shortcut, x.contiguous() if self.training else x)
        y = apply_conv(self.conv2, h, residual)
        box.put(y if self.output_scale_factor == 1 else y / self.output_scale_factor, ours=True)


class Upsample2D(DiffusersUpsample2D):
    """Nearest-neighbour upsampling by 2 and a convolution."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_size is not None or args or kwargs:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        box = Box(hidden_states, ours=False)
        self.run(box)
        return box.take()

    def run(self, box: Box) -> None:
        # No variable refers to the tensor that is enlarged, so that it is free during the convolution.
        x = F.interpolate(_for_interpolation(box.take()), scale_factor=2.0, mode="nearest")
        box.put(apply_conv(self.conv, x), ours=why_not_conv(self.conv) is None)


class Downsample2D(DiffusersDownsample2D):
    """A convolution of stride 2, which PyTorch computes."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        x = F.pad(hidden_states, (0, 1, 0, 1)) if self.padding == 0 else hidden_states
        return apply_conv(self.conv, x)


def _for_interpolation(x: Tensor) -> Tensor:
    """Returns `x`, contiguous where PyTorch's channels_last kernel for CUDA fails (pytorch/pytorch#141831)."""
    return x.contiguous() if x.shape[0] >= 64 or 4 * x.numel() > 2**31 else x


class UNetMidBlock2D(DiffusersUNetMidBlock2D):
    """The middle block. Its checkpointed layers run on the backend of the forward pass when they are recomputed."""

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.resnets[0](hidden_states, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                h = attention(h, temb=temb)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                h = self._gradient_checkpointing_func(keep_backend(resnet), h, temb)
            else:
                h = resnet(h, temb)
        return h


def run_layer(layer: nn.Module, box: Box) -> None:
    if isinstance(layer, ResnetBlock2D | Upsample2D) and why_called(layer, ResnetBlock2D, Upsample2D) is None:
        layer.run(box)
    else:
        box.put(layer(box.take()), ours=False)


def run_block(block: Any, box: Box) -> None:
    """Applies a block, whose layers are called one by one if the block has no other effect."""
    if why_called(block, DownEncoderBlock2D, UpDecoderBlock2D) is not None:
        box.put(block(box.take()), ours=False)
        return
    down = isinstance(block, DownEncoderBlock2D)
    for resnet in block.resnets:
        if type(resnet) is ResnetBlock2D:
            run_layer(resnet, box)
        else:
            box.put(resnet(box.take(), temb=None), ours=False)
    for sampler in (block.downsamplers if down else block.upsamplers) or ():
        run_layer(sampler, box)


class Encoder(vae.Encoder):
    """The encoder, whose layers run in channels_last; the result has the memory format of the input."""

    def forward(self, sample: Tensor) -> Tensor:
        return run_coder(self, sample, [*self.down_blocks, self.mid_block])


class Decoder(vae.Decoder):
    """The decoder, whose layers run in channels_last; the result has the memory format of the input."""

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        if latent_embeds is not None:
            return super().forward(sample, latent_embeds)
        return run_coder(self, sample, [self.mid_block, *self.up_blocks])


def run_coder(coder: Any, sample: Tensor, blocks: list[nn.Module]) -> Tensor:
    memory_format = memory_format_of(is_channels_last(sample))
    if sample.device.type in KERNEL_DEVICES:
        sample = sample.contiguous(memory_format=torch.channels_last)
    box = Box(apply_conv(coder.conv_in, sample), ours=why_not_conv(coder.conv_in) is None)
    for block in blocks:
        if torch.is_grad_enabled() and coder.gradient_checkpointing:
            recomputed = keep_backend(block)
            box.put(coder._gradient_checkpointing_func(recomputed, box.take()), ours=False)
        else:
            run_block(block, box)
    h = apply_norm(coder.conv_norm_out, coder.conv_act, box.take(), ours=box.ours)
    return apply_conv(coder.conv_out, h).contiguous(memory_format=memory_format)


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    DiffusersResnetBlock2D: ResnetBlock2D,
    DiffusersUpsample2D: Upsample2D,
    DiffusersDownsample2D: Downsample2D,
    DiffusersUNetMidBlock2D: UNetMidBlock2D,
    vae.Encoder: Encoder,
    vae.Decoder: Decoder,
    # These two only widen half precision on CPUs without its arithmetic: quant convs, shortcuts and attention.
    nn.Conv2d: Conv2d,
    nn.Linear: Linear,
}


def why_not_replaced(module: nn.Module) -> str | None:
    """Returns why a module keeps its class; None if its class has a replacement."""
    if type(module) not in REPLACEMENTS:
        return f"is a {type(module).__name__}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if isinstance(module, DiffusersResnetBlock2D):
        # The decoder's blocks have the name "group" here, for which diffusers has no case: they ignore an embedding.
        if module.time_emb_proj is not None or module.time_embedding_norm == "scale_shift":
            return "has a time embedding"
        if module.upsample is not None or module.downsample is not None:
            return "changes the resolution"
    if isinstance(module, DiffusersUpsample2D) and (
        not module.use_conv
        or module.use_conv_transpose
        or module.name != "conv"
        or module.norm is not None
        or not module.interpolate
    ):
        return "is not an interpolation and a convolution"
    if isinstance(module, DiffusersDownsample2D) and (not module.use_conv or module.norm is not None):
        return "is not a convolution"
    return None


def layers_of(block: nn.Module) -> tuple[dict[str, nn.Module], list[str], str | None]:
    """Returns a block's norms and the activation after each, its convolutions, and the one that adds a residual."""
    if isinstance(block, ResnetBlock2D):
        return {"norm1": block.nonlinearity, "norm2": block.nonlinearity}, ["conv1", "conv2"], "conv2"
    if isinstance(block, Upsample2D | Downsample2D):
        return {}, ["conv"], None
    if isinstance(block, Encoder | Decoder):
        return {"conv_norm_out": block.conv_act}, ["conv_in", "conv_out"], None
    return {}, [], None


def why_left(model: nn.Module, name: str) -> str:
    """Returns why a norm or convolution outside the replaced layers is left."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if type(owner) in REPLACEMENTS and (reason := why_not_replaced(owner)) is not None:
        return f"its {type(owner).__name__} {reason}"
    layer = model.get_submodule(name)
    if isinstance(layer, nn.GroupNorm):
        return "no activation follows"
    return why_not_conv(layer) or f"its {type(owner).__name__} is not replaced"
