"""Self-modulated convolution against its rivals, at the sizes of the decoder."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import (
    Provider,
    autocast,
    compiled,
    contest,
    copies,
    dtype_name,
    our_backends,
    relative_error,
    served_dtypes,
    with_autocast,
    with_backend,
)
from benchmarks.session import Session
from litevae_kernels import modulate_weight, self_modulated_conv2d
from litevae_kernels.nn import Conv3x3, SelfModulatedConv2d
from litevae_kernels.testing import assert_within_budget

EPS = 1e-8
WEIGHT = (512, 512, 3, 3)
INPUTS = 11  # times 9 MB of weights or images: more than the last cache of a CPU or a GPU
# (batch, channels, height, width) of the decoder's 3x3 convolutions, starting at the latent
IMAGES = [(8, 512, 32, 32), (2, 512, 64, 64), (2, 256, 128, 128)]
COPY = "copy of the same bytes"

Parameters = tuple[Tensor, Tensor, Tensor]  # weight, scale, gain


def equation_3(weight: Tensor, scale: Tensor, gain: Tensor) -> Tensor:
    """Returns the modulated weight (Equation 3) in PyTorch's operators, in the dtype of `weight`."""
    scaled = weight * scale[:, None, None]
    norm = torch.linalg.vector_norm(scaled, dim=(1, 2, 3), keepdim=True)
    return scaled * (gain / (norm + EPS))


def equation_3_bf16(weight: Tensor, scale: Tensor, gain: Tensor) -> Tensor:
    return equation_3(weight, scale, gain).to(torch.bfloat16)


def ours(weight: Tensor, scale: Tensor, gain: Tensor) -> Tensor:
    return modulate_weight(weight, scale, gain, eps=EPS, dtype=torch.bfloat16)


def stylegan3(x: Tensor, weight: Tensor, scale: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Modulated convolution as in StyleGAN3, which the paper's Appendix G calls.

    Weights and styles are normalised first, and each sample has its own filter bank, in one grouped convolution over
    the samples. Here all samples have the same style.
    """
    batch, channels, height, width = x.shape
    weight = weight * weight.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()
    styles = (scale * scale.square().mean().rsqrt()).expand(batch, -1)
    banks = weight[None] * styles[:, None, :, None, None]
    banks = banks * (banks.square().sum(dim=(2, 3, 4), keepdim=True) + EPS).rsqrt() * gain
    y = F.conv2d(
        x.reshape(1, batch * channels, height, width),
        banks.flatten(0, 1).to(x.dtype),
        padding=1,
        groups=batch,
    )
    return y.reshape(batch, -1, height, width) + bias.to(x.dtype)[:, None, None]


def make_parameters(shape: tuple[int, ...], device: str) -> Parameters:
    """Makes parameters in float32 and channels_last, as in a channels_last model."""
    weight = torch.randn(shape, device=device).mul_(math.prod(shape[1:]) ** -0.5)
    scale = 1 + 0.3 * torch.randn(shape[1], device=device)
    return (
        weight.contiguous(memory_format=torch.channels_last).requires_grad_(),
        scale.requires_grad_(),
        torch.full((1,), 1.3, device=device, requires_grad=True),
    )


def tree(terms: int) -> int:
    """Returns the roundings in a sum: the levels of a tree, and 16 in a block."""
    return math.ceil(math.log2(terms)) + 16


def doubles(parameters: Parameters) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in parameters]


def check_weight(actual: Tensor, parameters: Parameters) -> None:
    """Checks the weight within a few roundings and those of each filter's norm."""
    exact = equation_3(*doubles(parameters)).detach()
    assert actual.dtype == torch.bfloat16
    assert actual.is_contiguous(memory_format=torch.channels_last)
    operations = tree(exact[0].numel()) + 6
    assert_within_budget(actual.detach(), exact, magnitude=exact.abs().max().item(), operations=operations)


def check_gradients(grads: tuple[Tensor, ...], parameters: Parameters, grad: Tensor) -> None:
    """Checks the gradients: with v = scale * weight and u = v / |v|, dv = gain / |v| (grad - u <grad, u>)."""
    weight, scale, gain = exact = doubles(parameters)
    exact_grads = torch.autograd.grad(equation_3(*exact), exact, grad.double())
    with torch.no_grad():
        scaled = weight * scale[:, None, None]
        norm = torch.linalg.vector_norm(scaled, dim=(1, 2, 3), keepdim=True)
        unit = scaled / norm
        products = (grad.double() * unit).abs()
        slope = gain.abs() / norm * (grad.double().abs() + unit.abs() * products.sum((1, 2, 3), keepdim=True))
        magnitudes = (
            (slope * scale.abs()[:, None, None]).max().item(),
            (slope * weight.abs()).sum(dim=(0, 2, 3)).max().item(),
            products.sum().item(),
        )
    filter_sums = 2 * tree(weight[0].numel()) + 12
    lengths = (0, tree(weight.shape[0] * weight.shape[2] * weight.shape[3]), tree(weight.numel()))
    for got, want, magnitude, length in zip(grads, exact_grads, magnitudes, lengths, strict=True):
        assert_within_budget(got, want, magnitude=magnitude, operations=filter_sums + length)


def compete_forward(
    benchmark: Any,
    session: Session,
    device: str,
    shape: tuple[int, ...],
    chart: str | None = None,
    x: float | None = None,
) -> None:
    sets = [make_parameters(shape, device) for _ in range(INPUTS)]
    byte_count = sets[0][0].nbytes + sets[0][0].numel() * 2
    backends = our_backends(device)
    providers: dict[str, Provider] = {COPY: copies(device, byte_count, INPUTS)}
    with torch.no_grad():
        for backend in backends:
            call = with_backend(backend, ours)
            check_weight(call(*sets[0]), sets[0])
            providers[f"litevae_kernels {backend}"] = lambda i, call=call: call(*sets[i])
        fused = compiled(equation_3_bf16)
        check_weight(fused(*sets[0]), sets[0])
        check_weight(equation_3_bf16(*sets[0]), sets[0])
        providers["Equation 3, torch.compile"] = lambda i: fused(*sets[i])
        providers["Equation 3, eager"] = lambda i: equation_3_bf16(*sets[i])
        contest(
            benchmark,
            session,
            f"modulate_weight forward, fp32 to bf16 channels_last, {'x'.join(map(str, shape))}",
            f"litevae_kernels {backends[0]}",
            providers,
            inputs=INPUTS,
            bytes_moved=byte_count,
            copy=COPY,
            chart=chart,
            x=x,
        )


def test_weight_forward(benchmark: Any, session: Session, device: str) -> None:
    compete_forward(benchmark, session, device, WEIGHT)


@pytest.mark.full("cpu")
@pytest.mark.parametrize("channels", [64, 128, 256, 512, 1024, 2048])
def test_weight_over_size(benchmark: Any, session: Session, device: str, channels: int) -> None:
    chart = "modulate_weight forward, fp32 to bf16 channels_last, 3x3"
    compete_forward(benchmark, session, device, (channels, channels, 3, 3), chart, channels)


def test_weight_backward(benchmark: Any, session: Session, device: str) -> None:
    sets = [make_parameters(WEIGHT, device) for _ in range(INPUTS)]
    grads = [torch.randn_like(weight, dtype=torch.bfloat16) for weight, _, _ in sets]
    byte_count = 2 * sets[0][0].nbytes + grads[0].nbytes

    def backward_of(function: Callable[..., Tensor]) -> Provider:
        outputs = [function(*parameters) for parameters in sets]
        return lambda i: torch.autograd.grad(outputs[i], sets[i], grads[i], retain_graph=True)

    backends = our_backends(device)
    providers: dict[str, Provider] = {COPY: copies(device, byte_count, INPUTS)}
    for backend in backends:
        provider = backward_of(with_backend(backend, ours))
        check_gradients(provider(0), sets[0], grads[0])
        providers[f"litevae_kernels {backend}"] = provider
    providers["Equation 3, torch.compile"] = backward_of(compiled(equation_3_bf16))
    providers["Equation 3, eager"] = backward_of(equation_3_bf16)
    contest(
        benchmark,
        session,
        f"modulate_weight backward, fp32 to bf16 channels_last, {'x'.join(map(str, WEIGHT))}",
        f"litevae_kernels {backends[0]}",
        providers,
        inputs=INPUTS,
        bytes_moved=byte_count,
        copy=COPY,
    )


def make_images(shape: tuple[int, ...], device: str, count: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(count)
    ]


def check_convolution(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Checks the result for the first image, with `weight` and `bias` as the convolution gets them.

    PyTorch's convolution rounds its result. Winograd's algorithm also rounds both transformed factors, which makes
    its error 2.5 times as large (csrc/conv3x3/conv3x3.h). In float32 its larger tiles lose about a decimal digit.
    """
    direct = F.conv2d(x[:1], weight, bias, padding=1)
    exact = F.conv2d(x[:1].double(), weight.double(), bias.double(), padding=1)
    least = 1e-5 if x.dtype == torch.float32 else 0.0
    assert relative_error(y[:1], exact) < max(3.5 * relative_error(direct, exact), least)


@pytest.mark.full("cpu")
@pytest.mark.parametrize("shape", IMAGES, ids=lambda shape: "x".join(map(str, shape)))
def test_inference(benchmark: Any, session: Session, device: str, shape: tuple[int, ...]) -> None:
    """Times a folded layer, which is an ordinary convolution and must be as fast as one."""
    dtype = served_dtypes(device)[-1]
    images = make_images(shape, device, INPUTS, dtype)
    options = {"kernel_size": 3, "padding": 1, "device": device, "dtype": dtype}
    layer = SelfModulatedConv2d(shape[1], shape[1], **options).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(shape[1], shape[1], **options).to(memory_format=torch.channels_last)
    backends = our_backends(device)
    with torch.no_grad():
        of_fold = with_backend(backends[0], layer.folded)()
        folded = Conv3x3(shape[1], shape[1], device=device)  # the layer that LiteVAE.fold creates
        folded.weight, folded.bias = of_fold.weight, of_fold.bias
        check_convolution(folded(images[0]), images[0], folded.weight, folded.bias)
        providers: dict[str, Provider] = {"folded": lambda i: folded(images[i])}
        for backend in backends:
            call = with_backend(backend, layer)
            check_convolution(call(images[0]), images[0], folded.weight, folded.bias)
            providers[f"litevae_kernels {backend}, not folded"] = lambda i, call=call: call(images[i])
        providers["nn.Conv2d"] = lambda i: plain(images[i])
        contest(
            benchmark,
            session,
            f"self_modulated_conv2d inference, {dtype_name(dtype)}, 3x3 on {'x'.join(map(str, shape))}",
            "folded",
            providers,
            inputs=INPUTS,
            bars={"nn.Conv2d": 1 / 1.02},
            rounds=60,
        )


Step = Callable[[int], tuple[Tensor, ...]]


def check_step(step: Step, x: Tensor, parameters: Sequence[Tensor], grad: Tensor) -> None:
    """Checks the output and the gradients of x, weight, scale, gain and bias for input set 0, tensor by tensor.

    At most four roundings to the dtype of `grad` lose half a unit in the last place each: of the weight, of a
    convolution's result, and of sums of it. The exact values are computed in float64.
    """
    inputs = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    image, weight, scale, gain, bias = inputs
    modulated = equation_3(weight, scale, gain)
    y = F.conv2d(image, modulated, bias, padding=1)
    *exact, grad_modulated = torch.autograd.grad(y, [*inputs, modulated], grad.double())
    norms = [t.norm() for t in (y.detach(), *exact)]
    norms[4] = (
        grad_modulated.norm() * modulated.detach().norm() / gain.item()
    )  # the gradient of the gain is one scalar product
    losing = max(4 * torch.finfo(grad.dtype).eps / 2, 1e-5)  # a float32 convolution also rounds its sums
    for name, got, want, norm in zip(
        ("y", "x", "weight", "scale", "gain", "bias"), step(0), (y.detach(), *exact), norms, strict=True
    ):
        error = (got.double() - want).norm() / norm
        assert error <= losing, f"{name}: error {error:.3g} of the norm, {losing:.3g} allowed"


@pytest.mark.full("cpu")
@pytest.mark.parametrize("shape", IMAGES, ids=lambda shape: "x".join(map(str, shape)))
def test_training_step(benchmark: Any, session: Session, device: str, shape: tuple[int, ...]) -> None:
    """Forward and backward with float32 parameters under autocast, as in training."""
    channels = shape[1]
    dtype = served_dtypes(device)[-1]
    images = [x.requires_grad_() for x in make_images(shape, device, INPUTS, dtype)]
    grads = make_images(shape, device, INPUTS, dtype)
    # Only in this layout does the grouped rival see all samples' channels as one image without a copy.
    contiguous = [
        ([x.detach().contiguous().requires_grad_() for x in images]),
        ([grad.contiguous() for grad in grads]),
    ]
    weight, scale, gain = make_parameters((channels, channels, 3, 3), device)
    bias = (0.1 * torch.randn(channels, device=device)).requires_grad_()
    parameters = (weight, scale, gain, bias)

    def smc(x: Tensor, weight: Tensor, scale: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return self_modulated_conv2d(x, weight, scale, gain, bias, padding=1, eps=EPS)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    def step(
        function: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        images: list[Tensor],
        grads: list[Tensor],
    ) -> Step:
        def run(i: int) -> tuple[Tensor, ...]:
            with autocast(device, dtype):
                y = function(images[i], *parameters)
            return (y.detach(), *torch.autograd.grad(y, (images[i], *parameters), grads[i]))

        return run

    backends = our_backends(device)
    providers: dict[str, Provider] = {}
    for backend in backends:
        providers[f"litevae_kernels {backend}"] = step(with_backend(backend, smc), parameters, images, grads)
    providers["F.conv2d"] = step(plain, (weight, bias), images, grads)
    providers["StyleGAN3's, grouped, eager"] = step(stylegan3, parameters, *contiguous)
    providers["StyleGAN3's, grouped, torch.compile"] = step(compiled(stylegan3), parameters, *contiguous)
    for name, provider in providers.items():
        if name != "F.conv2d":
            check_step(provider, images[0], parameters, grads[0])
    contest(
        benchmark,
        session,
        f"self_modulated_conv2d forward and backward, {with_autocast(dtype)}, 3x3 on {'x'.join(map(str, shape))}",
        f"litevae_kernels {backends[0]}",
        providers,
        inputs=INPUTS,
        bars={
            "F.conv2d": 1 / 1.10,
            "StyleGAN3's, grouped, eager": 2.0,
            "StyleGAN3's, grouped, torch.compile": 2.0,
        },
    )
