"""Compiles the CPU kernels for 64-bit Arm, and runs the float32 convolution there under an emulator."""

import importlib.util
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from litevae_kernels.testing import arrange

ROOT = Path(__file__).parents[2]
KERNELS = sorted(path for path in ROOT.glob("csrc/*/*.cpp") if path.name != "bindings.cpp")
# The flags of CMakeLists.txt for the instruction set that every CPU has.
FLAGS = ["-std=c++17", "-g0", "-fno-math-errno", "-fno-trapping-math", "-DLITEVAE_ISA=baseline"]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of the core's codes


def cross_compiler() -> list[str]:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is not None:
        return [compiler]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl"]
    pytest.skip("needs a cross compiler: aarch64-linux-gnu-g++, or `pip install ziglang`")


def compile_for_arm(*arguments: object) -> None:
    command = [*cross_compiler(), *FLAGS, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_kernel_compiles(kernel, tmp_path):
    compile_for_arm("-O0", "-S", kernel, "-o", tmp_path / "kernel.s")


def test_products_are_vectors(tmp_path):
    """The loop over channels multiplies and adds four numbers per instruction, without memory for the sums."""
    assembly = tmp_path / "float32.s"
    compile_for_arm("-O3", "-S", ROOT / "csrc/conv3x3/float32.cpp", "-o", assembly)
    blocks = re.split(r"^\.L\w+:", assembly.read_text(), flags=re.MULTILINE)
    busiest = max(blocks, key=lambda block: len(re.findall(r"\bfmla\s+v\d+\.4s", block)))
    assert len(re.findall(r"\bfmla\s+v\d+\.4s", busiest)) >= 20
    assert not re.findall(r"\bst[rp]\s+q", busiest)


def numbers(t: Tensor | None, memory: bytearray) -> list[int]:
    """Appends a tensor's storage to `memory` and returns the ten numbers that describe it."""
    if t is None:
        return [-1] + [0] * 9
    t = t[None, :, None, None] if t.ndim == 1 else t
    memory += bytes(-len(memory) % 64)
    first = len(memory) + t.storage_offset() * t.element_size()
    memory += bytes(t.untyped_storage())
    return [first, DTYPES.index(t.dtype), *t.shape, *t.stride()]


def random_case(rng: random.Random) -> tuple[bool, bool, list[Tensor | None]]:
    """Returns the arguments of a call: silu, transposed, and x, weight, bias, residual and y."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    batch, height, width = rng.randint(1, 2), rng.randint(1, 21), rng.randint(1, 21)
    inputs, outputs = rng.choice([3, rng.randint(1, 40)]), rng.choice([3, rng.randint(1, 40)])
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    transposed = rng.random() < 0.3

    def values(*shape: int) -> Tensor:
        t = torch.randn(shape, generator=generator).to(dtype)
        return arrange(t, rng.choice(["contiguous", "channels_last", "sliced"])) if len(shape) == 4 else t

    weight = values(inputs, outputs, 3, 3) if transposed else values(outputs, inputs, 3, 3)
    bias, residual = values(outputs), values(batch, outputs, height, width)
    added = rng.random() < 0.5
    y = values(batch, outputs, height, width)
    x = values(batch, inputs, height, width)
    return rng.random() < 0.5, transposed, [x, weight, *([bias, residual] if added else [None, None]), y]


def test_the_convolution_on_an_emulated_cpu(tmp_path):
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("needs qemu-aarch64 (Debian's package qemu-user)")
    program = tmp_path / "program"
    compile_for_arm("-O1", "-static", Path(__file__).with_name("conv3x3_program.cpp"), "-o", program)
    rng, stdin, cases = random.Random(0), bytearray(), []
    for _ in range(40):
        silu, transposed, tensors = random_case(rng)
        memory = bytearray()
        described = [number for t in tensors for number in numbers(t, memory)]
        head = torch.tensor([silu, transposed, *described, len(memory)], dtype=torch.int64)
        stdin += bytes(head.untyped_storage()) + memory
        cases.append((silu, transposed, tensors, described, len(memory)))
    result = subprocess.run([emulator, str(program)], input=bytes(stdin), capture_output=True, check=True)
    stdout = result.stdout
    for silu, transposed, (x, weight, bias, residual, y), described, size in cases:
        memory, stdout = bytearray(stdout[:size]), stdout[size:]
        flat = torch.frombuffer(memory, dtype=y.dtype, offset=described[40])
        actual = flat.as_strided(y.shape, y.stride()).double()
        taps = weight.double().transpose(0, 1).flip(2, 3) if transposed else weight.double()
        exact = F.conv2d(F.silu(x.double()) if silu else x.double(), taps, padding=1)
        if bias is not None:
            exact = exact + bias.double()[:, None, None] + residual.double()
        error = (actual - exact).norm() / exact.norm()
        assert error < torch.finfo(y.dtype).eps * (20 if y.dtype == torch.float32 else 1), (
            f"{error:.2g} for {tuple(x.shape)}, {tuple(weight.shape)}, {y.dtype}"
        )
    assert not stdout
