"""GroupNorm+SiLU against its rivals, at the sizes in LiteVAE-B."""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Provider, compiled, contest, copies, our_backends, with_backend
from benchmarks.session import Session
from litevae import LiteVAE
from litevae.models.layers import EPS
from litevae_kernels import group_norm_silu
from litevae_kernels.nn import GroupNormSiLU
from litevae_kernels.testing import assert_within_budget

IMAGES = (4, 3, 256, 256)
INPUTS = 7  # times 25 MB in bf16: more than the last cache of a CPU or a GPU


@dataclass(frozen=True)
class Size:
    """The size of one call; `skip` is the number of channels of the second input, or 0."""

    batch: int
    channels: int
    skip: int
    height: int
    width: int
    num_groups: int

    @property
    def elements(self) -> int:
        return self.batch * (self.channels + self.skip) * self.height * self.width

    def __str__(self) -> str:
        channels = f"({self.channels}+{self.skip})" if self.skip else self.channels
        return f"{self.batch}x{channels}x{self.height}x{self.width}"


@functools.cache
def sizes_of_the_model() -> Counter[Size]:
    """Runs the encoder of LiteVAE-B and counts the operator's calls by size."""
    sizes: Counter[Size] = Counter()

    def record(module: GroupNormSiLU, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x, *skips = [t for t in (*arguments, *named.values()) if t is not None]
        batch, channels, height, width = x.shape
        skip = sum(t.shape[1] for t in skips)
        sizes[Size(batch, channels, skip, height, width, module.num_groups)] += 1

    encoder = LiteVAE.from_preset("litevae-b").encoder.bfloat16()
    for module in encoder.modules():
        if isinstance(module, GroupNormSiLU):
            module.register_forward_pre_hook(record, with_kwargs=True)
    with torch.enable_grad():  # without gradients a CPU processes the finest level image by image
        encoder(torch.zeros(IMAGES, dtype=torch.bfloat16))
    return sizes


def largest() -> Size:
    """Returns the largest size with one input."""
    return max((size for size in sizes_of_the_model() if not size.skip), key=lambda size: size.elements)


def largest_with_skip() -> Size:
    """Returns the model's largest size with two inputs."""
    return max((size for size in sizes_of_the_model() if size.skip), key=lambda size: size.elements)


@dataclass
class Inputs:
    """The tensors of one call. `joined` is the concatenation of x and skip."""

    x: Tensor
    skip: Tensor | None
    joined: Tensor
    weight: Tensor
    bias: Tensor
    num_groups: int
    grad: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, int]:
        return self.x, self.skip, self.weight, self.bias, self.num_groups

    @property
    def arguments_joined(self) -> tuple[Tensor, None, Tensor, Tensor, int]:
        return self.joined, None, self.weight, self.bias, self.num_groups


def make_inputs(
    size: Size, device: str, dtype: torch.dtype, memory_format: torch.memory_format, *, training: bool
) -> Inputs:
    def image(channels: int) -> Tensor:
        shape = (size.batch, channels, size.height, size.width)
        x = torch.randn(shape, device=device).mul_(2).add_(0.5).to(dtype)
        return x.contiguous(memory_format=memory_format)

    channels = size.channels + size.skip
    x = image(size.channels)
    skip = image(size.skip) if size.skip else None
    joined = x if skip is None else torch.cat([x, skip], dim=1)
    weight = (1 + 0.1 * torch.randn(channels, device=device)).to(dtype)
    bias = (0.1 * torch.randn(channels, device=device)).to(dtype)
    if training:
        for tensor in (x, skip, joined, weight, bias):
            if tensor is not None:
                tensor.requires_grad_()
    return Inputs(x, skip, joined, weight, bias, size.num_groups, image(channels) if training else x)


Function = Callable[[Tensor, Tensor | None, Tensor, Tensor, int], Tensor]


def ours(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    return group_norm_silu(x, num_groups, weight, bias, eps=EPS, skip=skip)


def plain(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    """The replaced computation in PyTorch's operators."""
    joined = x if skip is None else torch.cat([x, skip], dim=1)
    return F.silu(F.group_norm(joined, num_groups, weight, bias, EPS))


def forward_of(calls: list[Any], functions: list[Function]) -> None:
    """Makes one call after the other; each output is dropped, as a model drops it after the next layer."""
    for arguments, function in zip(calls, functions, strict=True):
        function(*arguments)


def training_step(calls: list[Any], grads: list[Tensor], functions: list[Function]) -> tuple[Tensor, ...]:
    """Runs all forward passes, then all backward passes; gradients of x, skip, weight and bias."""
    outputs = [function(*arguments) for arguments, function in zip(calls, functions, strict=True)]
    wanted = [t for arguments in calls for t in arguments if isinstance(t, Tensor)]
    return torch.autograd.grad(outputs, wanted, grads)


def check(function: Function, inputs: Inputs, *, training: bool) -> None:
    """Checks that the results are within the rounding budget: a speed is reported only for correct results.

    A group's sums run over n values, in an order at least as accurate as a tree over blocks of a few values, which
    rounds once per each of log2(n) levels and 16 times in a block. SiLU and its derivative take a dozen more
    operations.
    """
    exact_x, exact_skip, exact_weight, exact_bias = [
        None if t is None else t.detach().double().requires_grad_(training) for t in inputs.arguments[:4]
    ]
    tensors = [t for t in (exact_x, exact_skip, exact_weight, exact_bias) if t is not None]
    exact = plain(exact_x, exact_skip, exact_weight, exact_bias, inputs.num_groups)
    actual = function(*inputs.arguments)
    assert actual.dtype == inputs.x.dtype

    with torch.no_grad():
        joined = exact_x if exact_skip is None else torch.cat([exact_x, exact_skip], dim=1)
        batch = joined.shape[0]
        groups = joined.reshape(batch, inputs.num_groups, -1)
        deviation, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
        inverse = (deviation + EPS).rsqrt()
        normalised = ((groups - mean) * inverse).view(joined.shape)
        largest_weight, largest_bias = exact_weight.abs().max().item(), exact_bias.abs().max().item()
        largest_normalised = (groups.abs().max() * inverse.max()).item()  # before the mean is subtracted
        operations = math.ceil(math.log2(groups.shape[2])) + 16 + 12
        magnitude = largest_weight * largest_normalised + largest_bias
    assert_within_budget(actual.detach(), exact.detach(), magnitude=magnitude, operations=2 * operations)
    if not training:
        return

    grad = inputs.grad.double()
    exact_grads = torch.autograd.grad(exact, tensors, grad)
    wanted = [t for t in inputs.arguments[:4] if t is not None]
    grads = torch.autograd.grad(actual, wanted, inputs.grad)
    # the slope of SiLU is at most 1.1; dx = inverse (w g - mean(w g) - normalised mean(w g normalised))
    slope = 1.1 * grad.abs()
    image_magnitude = (inverse.max() * largest_weight * slope.max()).item() * (2 + largest_normalised)
    bias_magnitude = slope.sum(dim=(0, 2, 3)).max().item()
    weight_magnitude = (slope * normalised.abs()).sum(dim=(0, 2, 3)).max().item()
    per_channel = math.ceil(math.log2(batch * joined.shape[2] * joined.shape[3])) + 16
    for i, (got, want) in enumerate(zip(grads, exact_grads, strict=True)):
        of_image = i < len(wanted) - 2
        assert_within_budget(
            got,
            want,
            magnitude=image_magnitude
            if of_image
            else weight_magnitude
            + bias_magnitude * magnitude,  # z, at which the slope is taken, was rounded too
            operations=4 * operations + (0 if of_image else per_channel),
        )


def check_rival(function: Function, inputs: Inputs) -> None:
    """Checks that a rival computes the same function, with a loose bound on its accuracy."""
    expected = plain(*inputs.arguments)
    torch.testing.assert_close(function(*inputs.arguments), expected, rtol=0.02, atol=0.02)


def compete(
    benchmark: Any,
    session: Session,
    device: str,
    subject: str,
    sets: list[list[Inputs]],
    *,
    training: bool,
    bars: dict[str, float],
    chart: str | None = None,
    x: float | None = None,
) -> None:
    """Times the providers; `sets` holds, per input set, the calls to make one after the other."""
    calls = range(len(sets[0]))
    kinds = {
        (inputs.x.shape, None if inputs.skip is None else inputs.skip.shape): i
        for i, inputs in enumerate(sets[0])
    }
    passes = 8 if training else 3  # forward: x twice, y; backward: x and its gradient twice, y's gradient
    byte_count = passes * sum(inputs.joined.nbytes for inputs in sets[0])

    def provider(functions: list[Function], *, joined: bool = False) -> Provider:
        arguments = [
            [inputs.arguments_joined if joined else inputs.arguments for inputs in one] for one in sets
        ]
        if not training:
            return lambda i: forward_of(arguments[i], functions)
        grads = [[inputs.grad for inputs in one] for one in sets]
        return lambda i: training_step(arguments[i], grads[i], functions)

    copy = "copy of the same bytes"
    providers: dict[str, Provider] = {copy: copies(device, byte_count, len(sets))}
    backends = our_backends(device)
    with torch.set_grad_enabled(training):
        for backend in backends:
            function = with_backend(backend, ours)
            for i in kinds.values():
                check(function, sets[0][i], training=training)
            providers[f"litevae_kernels {backend}"] = provider([function for _ in calls])
        by_kind = {kind: compiled(plain) for kind in kinds}
        fused = [
            by_kind[x.shape, None if skip is None else skip.shape]
            for x, skip, *_ in (inputs.arguments for inputs in sets[0])
        ]
        for i in kinds.values():
            check_rival(fused[i], sets[0][i])
        providers["F.group_norm + F.silu, torch.compile"] = provider(fused)
        providers["F.group_norm + F.silu, eager"] = provider([plain for _ in calls])
        if any(inputs.skip is not None for inputs in sets[0]):
            providers["the same, inputs concatenated beforehand"] = provider(
                [plain for _ in calls], joined=True
            )
        contest(
            benchmark,
            session,
            subject,
            f"litevae_kernels {backends[0]}",
            providers,
            inputs=len(sets),
            bytes_moved=byte_count,
            copy=copy,
            bars=bars,
            chart=chart,
            x=x,
            least=5,
        )


def bars_for(training: bool) -> dict[str, float]:
    eager, compile_ = (2.0, 1.5) if training else (2.5, 4.0)
    return {
        "F.group_norm + F.silu, eager": eager,
        "the same, inputs concatenated beforehand": eager,
        "F.group_norm + F.silu, torch.compile": compile_,
    }


DIRECTIONS = {"forward": False, "forward and backward": True}


@pytest.mark.full("cpu")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_calls_of_the_model(benchmark: Any, session: Session, device: str, direction: str) -> None:
    """All calls of one pass through the encoder, each with its own tensors."""
    training = DIRECTIONS[direction]
    calls = [
        make_inputs(size, device, torch.bfloat16, torch.channels_last, training=training)
        for size, count in sizes_of_the_model().items()
        for _ in range(count)
    ]
    images = "x".join(map(str, IMAGES))
    compete(
        benchmark,
        session,
        device,
        f"group_norm_silu {direction}, bf16 channels_last, all {len(calls)} calls of LiteVAE-B for {images}",
        [calls],
        training=training,
        bars=bars_for(training),
    )


CASES = {
    "bf16 channels_last": (largest, torch.bfloat16, torch.channels_last),
    "fp32 channels_last": (largest, torch.float32, torch.channels_last),
    "bf16 contiguous": (largest, torch.bfloat16, torch.contiguous_format),
    "two inputs, bf16 channels_last": (largest_with_skip, torch.bfloat16, torch.channels_last),
}


ALWAYS = ("bf16 channels_last", "fp32 channels_last")  # also without --full on a CPU


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "case",
    [case if case in ALWAYS else pytest.param(case, marks=pytest.mark.full("cpu")) for case in CASES],
)
def test_largest_call(benchmark: Any, session: Session, device: str, case: str, direction: str) -> None:
    pick, dtype, memory_format = CASES[case]
    training = DIRECTIONS[direction]
    size = pick()
    sets = [[make_inputs(size, device, dtype, memory_format, training=training)] for _ in range(INPUTS)]
    compete(
        benchmark,
        session,
        device,
        f"group_norm_silu {direction}, {case}, {size}",
        sets,
        training=training,
        bars=bars_for(training) if case == "bf16 channels_last" else {},
    )


@pytest.mark.full("cpu")
@pytest.mark.parametrize("side", [8, 16, 32, 64, 128, 256, 512])
def test_over_size(benchmark: Any, session: Session, device: str, side: int) -> None:
    size = Size(4, 96, 0, side, side, 32)
    sets = [
        [make_inputs(size, device, torch.bfloat16, torch.channels_last, training=False)]
        for _ in range(INPUTS)
    ]
    chart = "group_norm_silu forward, bf16 channels_last, 4 images of 96 channels"
    compete(
        benchmark,
        session,
        device,
        f"{chart}, {side}x{side}",
        sets,
        training=False,
        bars={},
        chart=chart,
        x=side,
    )
