"""Fixtures that the tests of several operators share."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import litevae_kernels

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a kernel, its arguments and its named arguments


@pytest.fixture
def under_the_interpreter(pytestconfig: pytest.Config) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Returns a function that runs a file of tests in a process that has TRITON_INTERPRET set."""

    def run(file: str) -> subprocess.CompletedProcess[str]:
        root = Path(litevae_kernels.__file__).parents[1]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", "--color=no"],
            cwd=pytestconfig.rootpath,
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Launch]]:
    """Returns a function that gives the launches (kernel, arguments, named arguments) of a call without doing them.

    Its arguments are the module of the kernels, the call, and the largest number of dimensions of a grid.
    """

    def record(kernels: Any, call: Callable[[], None], dimensions: int = 3) -> list[Launch]:
        seen: list[Launch] = []

        class Recorder:
            def __init__(self, kernel: Any) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                assert len(grid) <= dimensions
                assert 0 < grid[0] < 2**31
                assert all(size < 2**16 for size in grid[1:])

                def launch(*args: Any, **kwargs: Any) -> None:
                    assert not kwargs["enable_fp_fusion"] or "sum" not in self.kernel.fn.__code__.co_names
                    seen.append((self.kernel, args, kwargs))

                return launch

        with monkeypatch.context() as patch:
            for name in dir(kernels):
                if name.endswith("_kernel"):
                    patch.setattr(kernels, name, Recorder(getattr(kernels, name)))
            call()
        return seen

    return record


@pytest.fixture
def compile_for_sm90() -> Callable[[Launch], Any]:
    """Returns a function that compiles a launch (kernel, arguments, named arguments) for an H100, without one."""

    def compile(launch: Launch) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kernel, args, kwargs = launch
        names = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def type_of(x: Any, path: tuple[int, ...]) -> Any:
            if isinstance(x, tuple):
                return tuple(type_of(y, (*path, i)) for i, y in enumerate(x))
            if isinstance(x, Tensor):
                if x.data_ptr() % 16 == 0 and not kernel.params[path[0]].do_not_specialize_on_alignment:
                    attributes[path] = [["tt.divisibility", 16]]
                return f"*{names[x.dtype]}"
            if isinstance(x, int):
                return "i64"
            if isinstance(x, float):
                return "fp64"
            constants[path] = None
            return "constexpr"

        signature = {}
        for i, name in enumerate(kernel.arg_names):
            signature[name] = type_of(args[i], (i,)) if i < len(args) else "constexpr"
            if i >= len(args):
                constants[(i,)] = kwargs[name]
        options = {name: value for name, value in kwargs.items() if name not in signature}
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    return compile


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
def resources(tmp_path: Path) -> Callable[[Any], tuple[int, int]]:
    """Returns a function that gives the number of registers of a compiled kernel, and the bytes of its spills."""

    def assemble(compiled: Any) -> tuple[int, int]:
        import triton

        source = tmp_path / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        for name in ("ptxas", "ptxas-blackwell"):  # Triton has two versions.
            ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / name
            command = [
                str(ptxas),
                "-v",
                "--gpu-name=sm_90a",
                str(source),
                "-o",
                str(tmp_path / "kernel.cubin"),
            ]
            done = (
                subprocess.run(command, capture_output=True, text=True, check=False)
                if ptxas.exists()
                else None
            )
            if done is not None and done.returncode == 0:
                spilled = sum(int(x) for x in re.findall(r"(\d+) bytes spill", done.stderr))
                return int(re.findall(r"Used (\d+) registers", done.stderr)[0]), spilled
        pytest.skip("this Triton has no ptxas that assembles its PTX")

    return assemble


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
