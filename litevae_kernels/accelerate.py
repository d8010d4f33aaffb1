"""The fused operators under the VAE of Stable Diffusion, SDXL, SD3 or Flux: any `AutoencoderKL` of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

NORM, CONV, ADDITION = "GroupNorm with SiLU", "3x3 convolution", "residual addition"
NAMED = 2  # number of layers that a report's text names for each reason


@dataclass(frozen=True)
class Report:
    """The layers of a model that `accelerate_vae` fused and those that it left; its text is a summary.

    Attributes:
        model: name of the model's class.
        fused: names of the layers by kind: "GroupNorm with SiLU", "3x3 convolution" and "residual addition". A
            residual addition has the name of its block. `python -m litevae_kernels.info` says which backend serves
            each operator on this machine.
        left: why PyTorch computes the other norms and convolutions, by the layer's name.
    """

    model: str
    fused: dict[str, list[str]]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.model}: litevae_kernels computes"]
        lines += [f"  {kind}: {len(names)}" for kind, names in self.fused.items()]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        lines += ["and PyTorch computes"] if by_reason else []
        for reason, names in by_reason.items():
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"  {reason}: {', '.join(names[:NAMED])}{more}")
        return "\n".join(lines)


def accelerate_vae(vae: AutoencoderKL) -> Report:
    """Makes an `AutoencoderKL` use the fused operators, in place; `restore_vae` undoes it.

    The residual blocks, the upsampling layers, the encoder and the decoder change class, to subclasses of their own
    that have the same name. So do all convolutions and linear layers, which then compute half precision in float32
    on a CPU without its arithmetic. The parameters, the state dict, the configuration and thus `save_pretrained`
    stay as they are, and so do hooks, slicing, tiling, gradient checkpointing and ``vae.to(...)``. `torch.compile`,
    copies and pickles of the model work; to unpickle one, litevae_kernels must be installed. Later changes are
    respected: a layer that gets a hook or an adapter is called as PyTorch calls it, without fusion.

    The activations inside the encoder and the decoder are channels_last on CPUs and CUDA, whatever the layout of the
    parameters, which is not changed; results have the layout of the inputs. Forward-mode derivatives and the
    transforms of `torch.func` need ``use_backend("reference")``.

    A second call changes nothing and returns the same report.

    Args:
        vae: model of diffusers, or of a class derived from its `AutoencoderKL`; for a pipeline, its ``pipe.vae``.

    Returns:
        What was fused, and why other layers were left.

    Raises:
        TypeError: `vae` is not an `AutoencoderKL`.
    """
    from litevae_kernels import diffusers_vae as blocks

    _check(vae)
    fused: dict[str, list[str]] = {NORM: [], CONV: [], ADDITION: []}
    left: dict[str, str] = {}
    seen: list[str] = []  # layers already entered, whose submodules belong to them

    def enter(kind: str, name: str, reason: str | None) -> None:
        seen.append(name)
        if reason is None:
            fused[kind].append(name)
        else:
            left[name] = reason

    def inside(name: str) -> bool:
        return any(name == outer or name.startswith(f"{outer}.") for outer in seen)

    for name, module in vae.named_modules():
        if type(module) in blocks.REPLACEMENTS.values() or blocks.why_not_replaced(module) is None:
            module.__class__ = blocks.REPLACEMENTS.get(type(module), type(module))
            norms, convs, adds = blocks.layers_of(module)
            for layer, activation in norms.items():
                enter(NORM, f"{name}.{layer}", blocks.why_not_norm(getattr(module, layer), activation))
            for layer in convs:
                enter(CONV, f"{name}.{layer}", blocks.why_not_conv(getattr(module, layer)))
            if adds is not None and f"{name}.{adds}" not in left:
                fused[ADDITION].append(name)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm) and not inside(name):
            left[name] = blocks.why_left(vae, name)
    return Report(type(vae).__name__, fused, left)


def restore_vae(vae: AutoencoderKL) -> None:
    """Undoes `accelerate_vae`: every module gets back the class of diffusers that it had.

    Raises:
        TypeError: `vae` is not an `AutoencoderKL`.
        RuntimeError: a hook of accelerate or diffusers was installed since and holds on to an accelerated forward.
    """
    from litevae_kernels import diffusers_vae as blocks

    _check(vae)
    originals = {ours: theirs for theirs, ours in blocks.REPLACEMENTS.items()}
    changed = {name: module for name, module in vae.named_modules() if type(module) in originals}
    for name, module in changed.items():
        # A hook around one convolution or linear layer may stay, because that layer computes the same in both classes.
        if "forward" in module.__dict__ and not isinstance(module, nn.Conv2d | nn.Linear):
            raise RuntimeError(
                f"{name} has a forward of its own; remove its offloading or casting hook first"
            )
    for module in changed.values():
        module.__class__ = originals[type(module)]


def _check(vae: Any) -> None:
    from diffusers import AutoencoderKL

    if not isinstance(vae, AutoencoderKL):
        raise TypeError(
            f"vae is a {type(vae).__name__}; diffusers' AutoencoderKL is needed, such as pipe.vae"
        )
