"""The readings on a GPU that decide what to work on next, besides those of the operators' own benchmarks.

Times come from CUDA graphs of several calls (see `benchmarks.harness`), whose calls do not wait for Python; the
encoders that Python launches are timed by the clock.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import GPU_ENCODERS
from benchmarks.harness import (
    Provider,
    contest,
    median_ratio,
    relative_error,
    served_dtypes,
    with_backend,
)
from benchmarks.host_time import PYTORCH, host_seconds, make_calls
from benchmarks.models import (
    SD_VAE,
    Configuration,
    as_input,
    call_of,
    deploy,
    make_inputs,
    make_model,
)
from benchmarks.session import Goal, Result, Session, milliseconds
from benchmarks.test_against_sd_vae import Field
from litevae.models.layers import ResBlock
from litevae_kernels import conv3x3, group_norm_silu
from litevae_kernels.conv3x3 import gpu as gpu_conv
from litevae_kernels.conv3x3.normed import norm_silu_conv3x3
from litevae_kernels.group_norm_silu import native as native_norm

INPUTS = 3
COMPARED = (SD_VAE, "LiteVAE-B", "LiteVAE-S")
BATCHES = (1, 8, 32, 64)
LAUNCHED = (8, 32)
FASTER = "the faster convolution per layer"


@pytest.fixture
def dry_run(request: pytest.FixtureRequest, device: str) -> bool:
    """Whether to rehearse on a CPU."""
    rehearse = bool(request.config.getoption("--dry-run"))
    if device == "cpu" and not rehearse:
        pytest.skip("needs a GPU, or --dry-run")
    return rehearse


@pytest.fixture
def image(dry_run: bool) -> Callable[[int], tuple[int, ...]]:
    """Returns the function from the number of images to the shape of a batch."""
    return lambda batch: (1, 3, 32, 32) if dry_run else (batch, 3, 256, 256)


def rounds(dry_run: bool, count: int = 15, least: int = 5) -> dict[str, int]:
    """Returns how often `contest` measures."""
    return {"rounds": 2, "least": 2} if dry_run else {"rounds": count, "least": least}


def with_mode(operator: ModuleType, mode: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with a setting of the variable that `operator` reads, such as ``LITEVAE_GPU_CONV``."""

    def call(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operator, "mode", mode)
            return function(*arguments)

    return call


def race(
    benchmark: Any,
    session: Session,
    subject: str,
    calls: dict[str, Callable[[Tensor], Any]],
    device: str,
    shape: tuple[int, ...],
    **options: Any,
) -> None:
    """Lets calls of eager encoders compete on batches of `shape`; the first is ours."""
    inputs = [as_input(x, eager(device)) for x in make_inputs("encoder", shape, device, INPUTS)]

    def provider(call: Callable[[Tensor], Any]) -> Provider:
        return lambda i: call(inputs[i])

    contest(
        benchmark,
        session,
        f"{subject}, {'x'.join(map(str, shape))}",
        "LiteVAE-B",
        {name: provider(call) for name, call in calls.items()},
        inputs=INPUTS,
        images=shape[0],
        **options,
    )


def eager(device: str) -> Configuration:
    return Configuration(served_dtypes(device)[-1], torch.channels_last, "eager")


def compiled(device: str) -> Configuration:
    return replace(eager(device), mode="torch.compile")


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_encoders(
    benchmark: Any,
    session: Session,
    device: str,
    dry_run: bool,
    image: Callable[[int], tuple[int, ...]],
    batch: int,
) -> None:
    """The encoders, eager and compiled."""
    field = Field("encoder", image(batch), device)
    for name in COMPARED:
        model = make_model(name, "encoder", device)
        gate = field.gate(model)
        field.enter(model, eager(device), f"{name}, eager", gate)
        # A rehearsal compiles nothing, because that takes minutes on a CPU.
        call = deploy(model, "encoder", eager(device) if dry_run else compiled(device))
        field.enter(model, compiled(device), f"{name}, torch.compile", gate, call)
    contest(
        benchmark,
        session,
        f"{GPU_ENCODERS}, {'x'.join(map(str, field.inputs[0].shape))}",
        "LiteVAE-B, eager",
        field.providers,
        inputs=INPUTS,
        images=field.inputs[0].shape[0],
        works=None if dry_run else field.works,
        rivals=[f"{SD_VAE}, eager", f"{SD_VAE}, torch.compile"],
        **rounds(dry_run),
    )


@pytest.mark.parametrize("batch", LAUNCHED)
@torch.no_grad()
def test_fused_encoders(
    benchmark: Any,
    session: Session,
    device: str,
    dry_run: bool,
    image: Callable[[int], tuple[int, ...]],
    batch: int,
) -> None:
    """The eager encoders with PyTorch's convolution, all in Triton, and with the faster convolution for each layer.

    The last is what ``LITEVAE_GPU_CONV=measure`` does. The rival is the compiled SD-VAE.
    """
    field = Field("encoder", image(batch), device)
    for name in COMPARED[1:]:
        model = make_model(name, "encoder", device)
        gate = field.gate(model)
        call = deploy(model, "encoder", eager(device))
        forms: dict[str, Callable[..., Any]] = {
            "PyTorch's convolution": call,
            "all in Triton": with_backend("triton", call) if device == "cuda" else call,
            FASTER: with_mode(gpu_conv, "measure", call),
        }
        for form, function in forms.items():
            field.enter(model, eager(device), f"{name}, {form}", gate, function)
    sd_vae = make_model(SD_VAE, "encoder", device)
    configuration = eager(device) if dry_run else compiled(device)
    field.enter(sd_vae, configuration, SD_VAE, field.gate(sd_vae))
    contest(
        benchmark,
        session,
        f"encoders with the fused convolution, {'x'.join(map(str, field.inputs[0].shape))}",
        f"LiteVAE-B, {FASTER}",
        field.providers,
        inputs=INPUTS,
        images=field.inputs[0].shape[0],
        rivals=[SD_VAE],
        goals={f"LiteVAE-B, {FASTER}": Goal(4)},
        **rounds(dry_run),
    )


@pytest.mark.parametrize("batch", LAUNCHED)
def test_launched_by_python(
    benchmark: Any,
    session: Session,
    device: str,
    dry_run: bool,
    image: Callable[[int], tuple[int, ...]],
    batch: int,
) -> None:
    """The eager encoders, whose calls wait for Python where it is slower than the GPU; as in `litevae encode`."""
    encode = torch.inference_mode()  # skips PyTorch's dispatcher where it can
    models = {name: make_model(name, "encoder", device) for name in COMPARED}
    calls = {name: encode(deploy(model, "encoder", eager(device))) for name, model in models.items()}
    race(
        benchmark,
        session,
        "encoders launched by Python",
        calls,
        device,
        image(batch),
        whole=True,
        **rounds(dry_run),
    )


class NoAddition(ResBlock):
    """A ResBlock that computes its residual and adds neither that nor the bias that a GPU adds with it.

    Without the addition, the next norm has a pass for its statistics.
    """

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        inputs = [x] if skip is None else [x, skip]
        h = self.norm2(conv3x3(self.norm1(*inputs), self.conv1.weight), offset=self.conv1.bias)
        if self.conv_shortcut is not None:
            self.conv_shortcut.parts(inputs)
        return conv3x3(h, self.conv2.weight)


def without_biases(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = None
    return model


def without_additions(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ResBlock):
            module.__class__ = NoAddition
    return model


@torch.no_grad()
def test_biases_and_additions(
    benchmark: Any, session: Session, device: str, dry_run: bool, image: Callable[[int], tuple[int, ...]]
) -> None:
    """What the convolutions' biases and the residuals' additions cost: the encoder with and without them.

    The models without them compute something else, so only their times mean anything.
    """
    whole: Any = make_model("LiteVAE-B", "encoder", device).to(
        dtype=eager(device).dtype, memory_format=torch.channels_last
    )
    models = {
        "LiteVAE-B": whole,
        "without biases": without_biases(whole),
        "without additions": without_additions(whole),
        "without both": without_additions(without_biases(whole)),
    }

    calls = {name: call_of(model, "encoder") for name, model in models.items()}
    race(benchmark, session, "biases and additions", calls, device, image(32), **rounds(dry_run, 30, 7))


@pytest.mark.parametrize("size", [(96, 128), (64, 128), (512, 32)], ids=str)
@torch.no_grad()
def test_fused_convolution(
    benchmark: Any, session: Session, device: str, dry_run: bool, size: tuple[int, int]
) -> None:
    """The second half of a block: the Triton convolution that normalises its input, and PyTorch's after our norm."""
    images, channels, side = (1, 32, 8) if dry_run else (32, *size)
    options: Any = {"device": device, "dtype": served_dtypes(device)[-1]}

    def image() -> Tensor:
        x = torch.randn(images, channels, side, side, **options)
        return x.contiguous(memory_format=torch.channels_last)

    sets = [(image(), image()) for _ in range(INPUTS)]
    weight = torch.randn(channels, channels, 3, 3, **options) * (9 * channels) ** -0.5
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias, scale, offset = (torch.randn(channels, **options) for _ in range(3))

    def fused(i: int) -> Tensor:
        x, residual = sets[i]
        return norm_silu_conv3x3(x, 32, scale, offset, weight, bias, residual=residual)

    def apart(i: int) -> Tensor:
        x, residual = sets[i]
        return F.conv2d(group_norm_silu(x, 32, scale, offset), weight, bias, padding=1).add_(residual)

    ours = with_backend("triton", fused) if device == "cuda" else fused
    x, residual = (t[:1].double() for t in sets[0])
    exact = F.silu(F.group_norm(x, 32, scale.double(), offset.double(), 1e-6))
    exact = F.conv2d(exact, weight.double(), bias.double(), padding=1) + residual
    assert relative_error(ours(0)[:1], exact) < max(2 * relative_error(apart(0)[:1], exact), 1e-5)
    contest(
        benchmark,
        session,
        f"norm, convolution and addition, {images}x{channels}x{side}x{side}",
        "fused, litevae_kernels triton",
        {"fused, litevae_kernels triton": ours, "group_norm_silu, then conv2d": apart},
        inputs=INPUTS,
        images=images,
        **rounds(dry_run),
    )


def need_clusters(device: str) -> None:
    """Skips the test on a GPU without thread-block clusters, or with a core that was built without them."""
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if major < 9:
            pytest.skip(f"sm_{major}{minor} has no clusters")
        if (reason := native_norm.why_no_clusters(torch.cuda.current_device())) is not None:
            pytest.skip(reason)


@pytest.mark.parametrize("batch", [1, 8, 32])
@torch.no_grad()
def test_norms_in_clusters(
    benchmark: Any,
    session: Session,
    device: str,
    dry_run: bool,
    image: Callable[[int], tuple[int, ...]],
    batch: int,
) -> None:
    """The encoder with norms in one pass per cluster and in two passes: whether clusters may stay."""
    need_clusters(device)
    call = call_of(make_model("LiteVAE-B", "encoder", device).to(**_half(device)), "encoder")
    encoders = {"LiteVAE-B": call, "LiteVAE-B, norms in clusters": with_mode(native_norm, "clusters", call)}
    race(benchmark, session, "norms in clusters", encoders, device, image(batch), **rounds(dry_run))


@pytest.mark.parametrize("batch", [1, 8, 32])
@torch.no_grad()
def test_largest_norm_in_clusters(
    benchmark: Any, session: Session, device: str, dry_run: bool, batch: int
) -> None:
    """The encoder's largest norm in one pass per cluster and in two passes."""
    need_clusters(device)
    images, channels, side = (1, 32, 8) if dry_run else (batch, 96, 128)
    sets = [torch.randn(images, channels, side, side, device=device).to(**_half(device)) for _ in range(7)]
    scale, offset = (torch.randn(channels, device=device, dtype=sets[0].dtype) for _ in range(2))

    def two_passes(i: int) -> Tensor:
        return group_norm_silu(sets[i], 32, scale, offset)

    clusters = with_mode(native_norm, "clusters", two_passes)
    x = sets[0][:1].double()
    exact = F.silu(F.group_norm(x, 32, scale.double(), offset.double(), 1e-6))
    assert relative_error(clusters(0)[:1], exact) < max(2 * relative_error(two_passes(0)[:1], exact), 1e-5)
    contest(
        benchmark,
        session,
        f"GroupNorm and SiLU, {images}x{channels}x{side}x{side}",
        "clusters",
        {"clusters": clusters, "two passes": two_passes},
        inputs=len(sets),
        images=images,
        bytes_moved=2 * sets[0].nbytes,
        **rounds(dry_run),
    )


def _half(device: str) -> dict[str, Any]:
    return {"dtype": eager(device).dtype, "memory_format": torch.channels_last}


def test_host_time(benchmark: Any, session: Session, device: str, dry_run: bool) -> None:
    """The host's time per call of each operator; the ratios are to PyTorch's GroupNorm and SiLU."""
    calls = make_calls(device)
    times = host_seconds(calls, rounds=2 if dry_run else 60)
    pair = next(values for name, values in times.items() if name.startswith(PYTORCH))
    benchmark.pedantic(calls["group_norm_silu"].run, rounds=1)
    session.results += [
        Result(
            subject="host time of a call in inference mode",
            provider=name,
            **milliseconds(values),
            times_ours=median_ratio(values, pair),
            times_copy=None,
            bar=None,
            bytes_moved=None,
            gigabytes_per_second=None,
            peak_memory=None,
            rounds=len(values),
        )
        for name, values in times.items()
    ]
    session.save()
