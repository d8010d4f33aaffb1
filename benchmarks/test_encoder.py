"""LiteVAE's encoder against the same model without fused operators."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import (
    FLOAT32_ERROR,
    Provider,
    autocast,
    check,
    contest,
    dtype_name,
    our_backends,
    served_dtypes,
    with_autocast,
    with_backend,
)
from benchmarks.session import Session
from litevae import LiteVAE
from litevae.models.layers import ResBlock
from litevae_kernels.nn import Conv3x3, GroupNormSiLU

INPUTS = 3  # one pass reads and writes far more than the caches hold
BATCH = {"cpu": 4, "cuda": 32}  # with 4 images a GPU waits for Python
TRAINING_BATCH = {"cpu": 1, "cuda": 16}
PRESETS = {"litevae-b": "LiteVAE-B", "litevae-s": "LiteVAE-S"}
BAR = 1.35  # over the better of the unfused rivals, so over each of them

# A compilation takes a minute on two cores, and several minutes with the backward pass, so on a CPU only the larger
# model is compiled, and only for inference.
COMPILED = {"cpu": ("litevae-b",), "cuda": tuple(PRESETS)}
COMPILED_TRAINING = {"cpu": False, "cuda": True}


class PlainGroupNormSiLU(GroupNormSiLU):
    def forward(self, input: Tensor) -> Tensor:
        return F.silu(F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps))


class PlainResBlock(ResBlock):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


def unfused(model: nn.Module) -> nn.Module:
    """Returns a copy in PyTorch's operators: concatenation, group norm, SiLU, convolution, addition."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, GroupNormSiLU):
            module.__class__ = PlainGroupNormSiLU
        elif isinstance(module, ResBlock):
            module.__class__ = PlainResBlock
        elif isinstance(module, Conv3x3):
            module.__class__ = nn.Conv2d
    return model


def make_encoder(preset: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Makes a model with biases and norms as after some training, not zeros and ones."""
    encoder = LiteVAE.from_preset(preset).encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.to(device, dtype, memory_format=torch.channels_last)


def make_images(batch: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.rand(batch, 3, 256, 256, device=device)
        .mul_(2)
        .sub_(1)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(INPUTS)
    ]


@pytest.mark.full("cpu")
@pytest.mark.parametrize("preset", PRESETS)
def test_inference(benchmark: Any, session: Session, device: str, preset: str) -> None:
    dtype = served_dtypes(device)[-1]
    images = make_images(BATCH[device], device, dtype)
    encoder = make_encoder(preset, device, dtype).eval()
    plain = unfused(encoder)

    def provider(model: Callable[[Tensor], Tensor]) -> Provider:
        return lambda i: model(images[i])

    backends = our_backends(device)
    ours = f"ours, {backends[0]}, eager"
    providers: dict[str, Provider] = {}
    for backend in backends:
        providers[f"ours, {backend}, eager"] = provider(with_backend(backend, encoder))
    rivals: dict[str, Provider] = {"unfused, eager": provider(plain)}
    if preset in COMPILED[device]:
        suffix = ", freezing" if device == "cpu" else ""
        rivals[f"unfused, torch.compile{suffix}"] = provider(compile_for_inference(plain, device))
        for backend in backends[:1]:
            call = with_backend(backend, compile_for_inference(encoder, device))
            providers[f"ours, {backend}, torch.compile{suffix}"] = provider(call)
    with torch.no_grad():
        exact = with_backend("reference", copy.deepcopy(plain).double())(images[0][:1].double())
        expected = plain(images[0])[:1]
        for name, call in (providers | rivals).items():
            check(call(0)[:1], expected, exact, name, FLOAT32_ERROR)
        contest(
            benchmark,
            session,
            f"{PRESETS[preset]}'s encoder, inference, {dtype_name(dtype)} channels_last, {BATCH[device]}x3x256x256",
            ours,
            providers | rivals,
            inputs=INPUTS,
            bars=dict.fromkeys(rivals, BAR),
        )


def compile_for_inference(model: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    """Compiles in the best mode: on a CPU, freezing packs the weights and fuses into the convolutions."""
    options = {"freezing": True} if device == "cpu" else None
    return torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False, options=options)


@pytest.mark.full("cpu")
def test_training_step(benchmark: Any, session: Session, device: str) -> None:
    """Forward and backward with float32 parameters, under autocast to bf16 where the hardware multiplies it."""
    dtype = served_dtypes(device)[-1]
    images = make_images(TRAINING_BATCH[device], device, dtype)
    encoder = make_encoder("litevae-b", device, torch.float32)
    plain = unfused(encoder)
    grad = torch.randn_like(plain(images[0].float()), dtype=dtype)

    def step(model: nn.Module, call: Callable[[Tensor], Tensor]) -> Provider:
        parameters = list(model.parameters())

        def run(i: int) -> tuple[Tensor, ...]:
            with autocast(device, dtype):
                moments = call(images[i])
            return torch.autograd.grad(moments, parameters, grad)

        return run

    backends = our_backends(device)
    providers: dict[str, Provider] = {}
    for backend in backends:
        providers[f"ours, {backend}, eager"] = step(encoder, with_backend(backend, encoder))
    rivals = {"unfused, eager": step(plain, plain)}
    if COMPILED_TRAINING[device]:
        model = copy.deepcopy(plain)
        call = torch.compile(model, fullgraph=True, dynamic=False)
        rivals["unfused, torch.compile"] = step(model, call)

    def together(grads: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([g.flatten().double() for g in grads])

    double = copy.deepcopy(plain).double()
    with torch.enable_grad():
        moments = with_backend("reference", double)(images[0].double())
        exact = together(torch.autograd.grad(moments, list(double.parameters()), grad.double()))
    expected = together(rivals["unfused, eager"](0))
    for name, call in (providers | rivals).items():
        check(together(call(0)), expected, exact, name, FLOAT32_ERROR)
    contest(
        benchmark,
        session,
        f"LiteVAE-B's encoder, forward and backward, {with_autocast(dtype)}, channels_last, "
        f"{TRAINING_BATCH[device]}x3x256x256",
        f"ours, {backends[0]}, eager",
        providers | rivals,
        inputs=INPUTS,
    )
