"""Helpers of the operators' tests: error budgets, poisoned memory, inputs of every stride, kernels without a GPU."""

import contextlib
import copy
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from litevae_kernels.backend import use_backend

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")

# Functions of Triton that add numbers of several lanes, or may.
ADDITIONS = frozenset(("sum", "reduce", "associative_scan", "cumsum"))

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a Triton kernel, its arguments and its named arguments


def assert_within_budget(
    actual: Tensor, exact: Tensor, *, magnitude: float | Tensor, operations: int
) -> None:
    """Compares a result with its float64 value and allows only the error that its arithmetic explains.

    Args:
        actual: result of any floating-point dtype. Its arithmetic ran in float32 (float64 for float64).
        exact: the same result in float64, from the same (already rounded) inputs.
        magnitude: bound on the absolute values that are added up, as one number or as one per element.
        operations: length of the longest chain of roundings; each loses half a unit in the last place of at
            most `magnitude`. Storing the result loses one more, relative to the result itself.

    Raises:
        AssertionError: an error exceeds its budget; the message names the worst one.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    exact = exact.to(torch.float64)
    computed = torch.finfo(torch.float64 if actual.dtype == torch.float64 else torch.float32)
    stored = torch.finfo(actual.dtype)
    # A float64 result is compared with an oracle that rounds just as often.
    chains = 2 if actual.dtype == torch.float64 else 1
    budget = chains * operations * computed.eps / 2 * magnitude
    budget_each = budget + exact.abs() * stored.eps / 2 + stored.smallest_normal * stored.eps
    error = (actual.to(torch.float64) - exact).abs()
    worst = (error / budget_each).nan_to_num(nan=float("inf"))
    if worst.numel() and worst.max() > 1:
        at = int(worst.argmax())
        raise AssertionError(
            f"error {error.flatten()[at].item():.3g} over the budget {budget_each.flatten()[at].item():.3g} at flat "
            f"index {at} of {tuple(actual.shape)} {actual.dtype}: {actual.flatten()[at].item()!r}, exact "
            f"{exact.flatten()[at].item()!r}"
        )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every `torch.empty` inside the block with NaN, which exposes elements that are never written."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def arrange(x: Tensor, layout: str) -> Tensor:
    """Returns the values of `x` in another memory layout.

    Args:
        x: (N, C, H, W).
        layout: one of `LAYOUTS`; "expanded" repeats the values of the first image.
    """
    n, c, h, w = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        big = torch.full((n, c + 2, h + 3, w + 5), float("nan"), dtype=x.dtype, device=x.device)
        view = big[:, 1 : 1 + c, 2 : 2 + h, 3 : 3 + w]
        view.copy_(x)
        return view
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    assert layout == "expanded", layout
    return x[:1].expand(n, c, h, w)


def shapes(count: int, *, largest: int = 67, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """Returns random shapes (N, C, H, W).

    Args:
        count: number of shapes.
        largest: maximum of heights and widths, whose minimum is 1; small and odd ones are more frequent.
        seed: seed of the random numbers.
    """
    rng = random.Random(seed)

    def side() -> int:
        return rng.choice([rng.randint(1, 9), rng.randint(1, largest), 2 ** rng.randint(0, 6)])

    return [(rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 4, 5]), side(), side()) for _ in range(count)]


class Winograd:
    """The 3x3 convolution by F(tile x tile, 3x3) in float64, whose intermediate values bound the kernels' errors.

    Args:
        tile: height and width of a tile of results.
        points: the tile + 1 points at which polynomials are interpolated; infinity is the last point.
    """

    def __init__(self, tile: int, points: Sequence[float]) -> None:
        finite = torch.tensor(points, dtype=torch.float64)
        self.tile = tile
        powers = finite[:, None] ** torch.arange(max(tile, 3))
        others = [torch.cat([finite[:k], finite[k + 1 :]]) for k in range(len(points))]
        scale = torch.stack([(p - rest).prod() for p, rest in zip(finite, others, strict=True)])
        last = torch.zeros(1, max(tile, 3), dtype=torch.float64)
        self.outputs = torch.cat([powers[:, :tile], last[:, :tile]]).T
        self.outputs[-1, -1] = 1
        self.taps = torch.cat([powers[:, :3] / scale[:, None], last[:, :3]])
        self.taps[-1, -1] = 1
        self.inputs = torch.zeros(tile + 2, tile + 2, dtype=torch.float64)
        for row, roots in zip(self.inputs, [*others, finite], strict=True):
            row[0] = 1  # coefficients of the product of (x - root), the lowest power first
            for root in roots:
                row.copy_(row.roll(1) - root * row)

    def convolve(self, x: Tensor, weight: Tensor, *, absolute: bool = False) -> Tensor:
        """Returns the convolution (N, C_out, H, W); with `absolute`, sums of absolute values throughout."""
        b, g, a, x, weight = _absolute(absolute, self.inputs, self.taps, self.outputs, x, weight)
        y = a @ torch.einsum("ncyxij,ocij->noyxij", b @ self._tiles(x, 1) @ b.T, g @ weight @ g.T) @ a.T
        return y.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)[:, :, : x.shape[2], : x.shape[3]]

    def weight_gradient(self, x: Tensor, grad: Tensor, *, absolute: bool = False) -> Tensor:
        """Returns the gradient of the weight (C_out, C_in, 3, 3), by the adjoint of `convolve`."""
        b, g, a, x, grad = _absolute(absolute, self.inputs, self.taps, self.outputs, x, grad)
        inputs, gradients = b @ self._tiles(x, 1) @ b.T, a.T @ self._tiles(grad, 0) @ a
        return g.T @ torch.einsum("ncyxij,noyxij->ocij", inputs, gradients) @ g

    def _tiles(self, x: Tensor, border: int) -> Tensor:
        """Returns the tiles (N, C, rows, columns, tile + 2 border, tile + 2 border) of (N, C, H, W)."""
        rest = [-size % self.tile for size in x.shape[2:]]
        x = torch.nn.functional.pad(x, (border, border + rest[1], border, border + rest[0]))
        side = self.tile + 2 * border
        return x.unfold(2, side, self.tile).unfold(3, side, self.tile)


def _absolute(absolute: bool, *tensors: Tensor) -> list[Tensor]:
    return [t.abs() if absolute else t for t in tensors]


def _adds_over_lanes(function: Any) -> bool:
    """Returns whether a Triton function, or one that it calls, has a reduction of `tl` that may add."""
    names = function.fn.__code__.co_names
    found = [function.fn.__globals__.get(name) for name in names]
    modules = [x for x in found if isinstance(x, ModuleType) and not x.__name__.startswith("triton")]
    found += [getattr(module, name, None) for module in modules for name in names]
    called = [x for x in found if hasattr(x, "fn")]
    return not ADDITIONS.isdisjoint(names) or any(map(_adds_over_lanes, called))


def record_launches(kernels: Any, call: Callable[[], object], dimensions: int = 3) -> list[Launch]:
    """Returns the launches of Triton kernels in a call, without doing them.

    Args:
        kernels: the module whose kernels are called; their names end with "_kernel".
        call: function without arguments.
        dimensions: the largest number of dimensions of a grid.
    """
    seen: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert len(grid) <= dimensions
            assert 0 < grid[0] < 2**31
            assert all(size < 2**16 for size in grid[1:])

            def launch(*args: Any, **kwargs: Any) -> None:
                assert not kwargs["enable_fp_fusion"] or not _adds_over_lanes(self.kernel)
                seen.append((self.kernel, args, kwargs))

            return launch

    with contextlib.ExitStack() as stack:
        for name in dir(kernels):
            if name.endswith("_kernel"):
                stack.enter_context(mock.patch.object(kernels, name, Recorder(getattr(kernels, name))))
        call()
    return seen


def gpu_calls(module: nn.Module, x: Tensor, *, gradients: bool = False) -> list[tuple[str, tuple[Any, ...]]]:
    """Returns names and arguments of the operators in ``module(x)`` on a GPU, which this machine need not have.

    Args:
        module: any module, which does not change.
        x: only its shape, dtype and layout matter.
        gradients: whether they are recorded.
    """
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append((func._schema.name, args))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(gradients):
        copied, input = on_gpu(module), torch.empty_like(x, device="cuda")
        with use_backend("triton"), Recorder():
            copied(input)
    return calls


def on_gpu(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Returns a copy with parameters of `dtype`, or of their own, on a GPU; under FakeTensorMode there need be none."""
    copied = copy.deepcopy(module)
    for layer in copied.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device="cuda")
            setattr(layer, name, nn.Parameter(fake))
    return copied


def compile_launch(launch: Launch, capability: int = 90) -> Any:
    """Returns what Triton compiles for a launch on GPUs of a capability, such as 90 for sm_90; needs no GPU."""
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
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def registers_and_spills(compiled: Any) -> tuple[int, int] | None:
    """Returns a compiled kernel's registers per thread and bytes spilled, or None if Triton has no ptxas for it."""
    import triton

    target = re.findall(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)[0]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        for name in ("ptxas", "ptxas-blackwell"):  # Triton has two versions.
            ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / name
            if not ptxas.exists():
                continue
            command: list[str | Path] = [
                ptxas,
                "-v",
                f"--gpu-name={target}",
                source,
                "-o",
                Path(folder) / "kernel.cubin",
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                spilled = sum(int(x) for x in re.findall(r"(\d+) bytes spill", done.stderr))
                return int(re.findall(r"Used (\d+) registers", done.stderr)[0]), spilled
    return None
