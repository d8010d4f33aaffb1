"""Fixtures that the tests of several operators share."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from litevae_kernels import arithmetic
from litevae_kernels.testing import Launch, compile_launch, record_launches, registers_and_spills


@pytest.fixture
def launches() -> Callable[..., list[Launch]]:
    """Returns a function that gives the launches of a call without doing them."""
    return record_launches


@pytest.fixture
def compile_for_sm90() -> Callable[[Launch], Any]:
    """Returns a function that compiles a launch (kernel, arguments, named arguments) for an H100, without one."""
    return compile_launch


@pytest.fixture
def accesses() -> Callable[[str, str], Counter[int]]:
    """Returns a function that counts the global accesses of a kind, "ld" or "st", in PTX by their size in bytes."""

    def count(ptx: str, kind: str) -> Counter[int]:
        widths = re.findall(rf"{kind}\.global\S*?(?:\.v(\d))?\.[bfu](\d+)", ptx)
        return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in widths)

    return count


@pytest.fixture
def lanes_agree() -> Callable[[str], bool]:
    """Returns a function that says whether all lanes of the sums in PTX add the same rounded values.

    They do unless an fma has an operand from a shuffle: its own product is then not rounded, and its neighbour's is.
    """

    def agree(ptx: str) -> bool:
        shuffled = set(re.findall(r"shfl\.sync\.\S+\s+(%\w+)", ptx))
        for target, source in re.findall(
            r"mov\.\S+\s+([^,;]*|\{[^}]*\}),\s*([^;]*);", ptx
        ):  # in order of the flow
            if shuffled.intersection(re.findall(r"%\w+", source)):
                shuffled.update(re.findall(r"%\w+", target))
        operands = re.findall(r"fma\.\S+\s+%\w+,([^;]*);", ptx)
        return not any(shuffled.intersection(re.findall(r"%\w+", x)) for x in operands)

    return agree


@pytest.fixture
def resources() -> Callable[[Any], tuple[int, int]]:
    """Returns a function that gives the number of registers of a compiled kernel, and the bytes of its spills."""

    def assemble(compiled: Any) -> tuple[int, int]:
        found = registers_and_spills(compiled)
        if found is None:
            pytest.skip("this Triton has no ptxas that assembles its PTX")
        return found

    return assemble


@pytest.fixture
def without_half_on_any_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the CPU one that does not multiply half precision."""
    monkeypatch.setattr(arithmetic, "_X86", False)
    monkeypatch.setattr(arithmetic, "_BFLOAT16", False)
    monkeypatch.setattr(arithmetic, "_FLOAT16", False)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Restores the number of PyTorch's threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def check_graph_replay() -> Callable[[Callable[[], Sequence[Tensor]], Callable[[int], object]], None]:
    """Returns a function that captures a step in a CUDA graph and compares its replays with plain steps.

    Its arguments are the step, which returns tensors, and a function that fills the step's input from a seed.
    """

    def check(step: Callable[[], Sequence[Tensor]], fill: Callable[[int], object]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        for seed in range(3):
            with torch.no_grad():
                fill(seed)
            graph.replay()
            torch.cuda.synchronize()
            for a, b in zip(captured, step(), strict=True):
                assert torch.equal(a, b)

    return check


@pytest.fixture
def make_vae() -> Callable[..., Any]:
    """Returns a function that makes a small AutoencoderKL with the configuration of a well-known model.

    Its layers are wide enough for `conv3x3`'s kernels. Biases and norms are random, not zeros and ones.
    """

    def make(model: str = "sd", **config: Any) -> Any:
        from diffusers import AutoencoderKL

        no_quant_convs = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
        models = {
            "sd": {"scaling_factor": 0.18215, "force_upcast": False},
            "sdxl": {"scaling_factor": 0.13025, "force_upcast": True},
            "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, **no_quant_convs},
            "flux": {"scaling_factor": 0.3611, "shift_factor": 0.1159, **no_quant_convs},
        }
        torch.manual_seed(0)
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
        vae = AutoencoderKL(**blocks | sizes | {"sample_size": 32} | models[model] | config)
        with torch.no_grad():
            for parameter in vae.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return vae.eval()

    return make
