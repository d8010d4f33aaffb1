"""The compared models, the ways to run them, and the minimum cost of a pass.

Both kinds of models are called as users call them, through `encode` and `decode`, so the SD-VAE's encoder includes its
quant_conv. Weights are random; no speed depends on them.
"""

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from diffusers.utils.logging import set_verbosity_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.harness import FLOAT32_ERROR, check, compiled, dtype_name, served_dtypes, with_backend
from benchmarks.session import Work
from benchmarks.test_encoder import unfused
from litevae import LiteVAE
from litevae.evaluation.complexity import ATTENTION
from litevae.models.interface import Autoencoder

SD_VAE = "SD-VAE"
PRESETS = {
    "LiteVAE-S": "litevae-s",
    "LiteVAE-B": "litevae-b",
    "LiteVAE-M": "litevae-m",
    "LiteVAE-L": "litevae-l",
}
NAMES = (SD_VAE, *PRESETS)

set_verbosity_error()  # otherwise each cast of a model warns about parts to keep in float32, and there are none

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Configuration:
    """A way to run a model."""

    dtype: torch.dtype
    memory_format: torch.memory_format
    mode: str  # one of MODES

    def __str__(self) -> str:
        layout = "channels_last" if self.memory_format == torch.channels_last else "contiguous"
        return f"{dtype_name(self.dtype)} {layout}, {self.mode}"


# Arguments of torch.compile. On a CPU, freezing packs the weights and fuses additions and activations into
# convolutions.
MODES: dict[str, dict[str, dict[str, Any] | None]] = {
    "cpu": {"eager": None, "torch.compile, freezing": {"options": {"freezing": True}}},
    "cuda": {
        "eager": None,
        "torch.compile": {},
        "CUDA graphs": {"mode": "reduce-overhead"},
        "max-autotune, CUDA graphs": {"mode": "max-autotune"},
    },
}


LAYOUTS = (torch.channels_last, torch.contiguous_format)


def configurations(device: str) -> list[Configuration]:
    """Returns all configurations: dtypes that the hardware multiplies, layouts, and modes."""
    choices = itertools.product(served_dtypes(device), LAYOUTS, MODES[device])
    return [Configuration(*choice) for choice in choices]


def usual_configuration(device: str) -> Configuration:
    """Returns the configuration in which models are entered where not all are compared."""
    mode = "eager" if device == "cpu" else "CUDA graphs"
    return Configuration(served_dtypes(device)[-1], torch.channels_last, mode)


def make_model(name: str, side: Side, device: str, **overrides: Any) -> Autoencoder:
    """Makes one side of a model in float32, with biases and norms as after some training, not zeros and ones."""
    model: Autoencoder
    if name == SD_VAE:
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
    else:
        model = LiteVAE.from_preset(PRESETS[name], **overrides)
    setattr(model, "decoder" if side == "encoder" else "encoder", nn.Identity())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.numel() > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False).to(device)


def call_of(model: Autoencoder, side: Side) -> Callable[[Tensor], Tensor]:
    """Returns the function from image to moments, or from latent to image."""
    if side == "encoder":
        return lambda image: model.encode(image).latent_dist.parameters
    return lambda latent: model.decode(latent).sample


def deploy(model: Autoencoder, side: Side, configuration: Configuration) -> Callable[[Tensor], Tensor]:
    """Returns the call of a copy of `model` in `configuration`."""
    device = model.device.type
    model = copy.deepcopy(model).to(dtype=configuration.dtype, memory_format=configuration.memory_format)
    if isinstance(model, AutoencoderKL):
        model.fuse_qkv_projections()
    options = MODES[device][configuration.mode]
    call = call_of(model, side)
    return call if options is None else compiled(call, **options)


@dataclass(frozen=True)
class Trial:
    """A configuration that was tried, its call, and the seconds that the call takes."""

    configuration: Configuration
    call: Callable[[Tensor], Tensor]
    seconds: float


def fastest(
    model: Autoencoder, side: Side, x: Tensor, dtype: torch.dtype, *, compiled_too: bool = True
) -> Trial:
    """Returns the fastest configuration of a model in one dtype for inputs like `x`.

    The eager layouts are compared first; the better one is then compiled, if `compiled_too`, in every mode but
    max-autotune, which takes minutes. `test_grid` compares all combinations.
    """
    modes = [mode for mode in MODES[model.device.type] if "max-autotune" not in mode]
    modes = modes if compiled_too else modes[:1]

    def measure(configuration: Configuration) -> Trial:
        call, image = deploy(model, side, configuration), as_input(x, configuration)
        call(image)  # compiles
        return Trial(configuration, call, min(seconds(call, image) for _ in range(2)))

    best = min(
        (measure(Configuration(dtype, layout, modes[0])) for layout in LAYOUTS),
        key=lambda trial: trial.seconds,
    )
    others = [measure(replace(best.configuration, mode=mode)) for mode in modes[1:]]
    return min([best, *others], key=lambda trial: trial.seconds)


def seconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Returns the time of one call, a GPU's work included."""
    start = time.perf_counter()
    call(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_inputs(side: Side, shape: tuple[int, ...], device: str, count: int) -> list[Tensor]:
    """Makes images in [-1, 1], or latents, in contiguous float32."""
    make = torch.randn if side == "decoder" else lambda *a, **k: torch.rand(*a, **k) * 2 - 1
    return [make(shape, device=device) for _ in range(count)]


def as_input(x: Tensor, configuration: Configuration) -> Tensor:
    return x.to(configuration.dtype).contiguous(memory_format=configuration.memory_format)


class Gate:
    """Checks the output for the last image before a speed is reported.

    A 16-bit configuration is compared with PyTorch's own operators in float32, and a float32 configuration with
    them in float64. The same operators in the configuration's own dtype and layout show the cost of rounding.
    """

    def __init__(self, model: Autoencoder, side: Side, x: Tensor) -> None:
        self.model = unfused(model)
        self.side: Side = side
        self.x = x[-1:]
        self.known: dict[tuple[Any, ...], Tensor] = {}

    def output(self, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        key = (dtype, memory_format)
        if key not in self.known:
            model = copy.deepcopy(self.model).to(dtype=dtype, memory_format=memory_format)
            call = with_backend("reference", call_of(model, self.side))
            self.known[key] = call(self.x.to(dtype).contiguous(memory_format=memory_format))
        return self.known[key]

    def check(
        self,
        call: Callable[[Tensor], Tensor],
        x: Tensor,
        configuration: Configuration,
        least: float = FLOAT32_ERROR,
    ) -> None:
        """Raises AssertionError unless the result of `call` is correct.

        Args:
            call: function to check.
            x: batch whose last image is the last image of the gate.
            configuration: configuration of `call`.
            least: error that is always allowed, as a fraction of the norm.
        """
        single = configuration.dtype == torch.float32
        exact = self.output(torch.float64 if single else torch.float32, torch.contiguous_format).double()
        plain = self.output(configuration.dtype, configuration.memory_format)
        check(call(x)[-1:], plain, exact, str(configuration), least)


class Traffic(TorchDispatchMode):
    """Sums the bytes that convolutions and matrix products read and write, each counted alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            if func._overloadpacket is torch.ops.litevae.conv3x3:
                args = args[:3]  # without the residual
            tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        return out


def work(model: Autoencoder, side: Side, x: Tensor, dtype: torch.dtype) -> Work:
    """Returns the work of one call with `x`, on fake tensors: nothing is computed.

    The bytes are those of a model whose norms, activations and additions cause no traffic of their own: each
    convolution and matrix product reads its inputs and weights and writes its result.
    """
    model = copy.deepcopy(model).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake = torch.empty(x.shape, dtype=dtype, device=x.device)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops, Traffic() as traffic:
            call_of(model, side)(fake)
    return Work(flops.get_total_flops() // 2, traffic.bytes, dtype)
