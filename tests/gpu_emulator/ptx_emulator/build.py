"""Compiles the emulator, and a core whose CUDA kernels run on it.

Each object file is cached under the hash of its command and of all files that it may include, so a change in one
operator compiles that operator again.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from litevae_kernels.core_interface import INTERFACE

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
# The operators that have CUDA kernels.
OPERATORS = sorted(path.parent.name for path in CSRC.glob("*/cuda.cu"))
NVCC_FLAGS = [
    "-std=c++17", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden", "--no-compress", "-cudart=none",
]  # fmt: skip
# The oldest architecture of each kind of file; CMakeLists.txt compiles them so, too.
ARCHITECTURES = {"cuda": 80, "clusters": 90}
# Contraction would round once where PTX rounds twice.
EMULATOR_FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]
DEFINITIONS = ["-DLITEVAE_CUDA", "-DLITEVAE_CLUSTERS"]
CORE_FLAGS = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-DLITEVAE_ISA=baseline", *DEFINITIONS]
# This is the build.h that CMake would write. The name of the compiler separates pybind11's types from those of the real
# core.
BUILD_H = f"""
#define LITEVAE_INTERFACE {INTERFACE}
#define LITEVAE_FOR_EACH_OPERATOR(X) {" ".join(f"X({name})" for name in OPERATORS)}
#define LITEVAE_COMPILER "emulator"
#define LITEVAE_OPENMP 0
#define LITEVAE_CUDA_VERSION "emulated"
#define LITEVAE_CUDA_ARCHITECTURES "80"
#define LITEVAE_CUDA_REASON ""
"""


def why_no_emulator() -> str | None:
    """Returns why the emulator cannot be built; None if it can."""
    return None if _compiler() else "needs a C++ compiler (g++)"


def why_no_core() -> str | None:
    """Returns why the core of the emulator cannot be built; None if it can."""
    return why_no_emulator() or (None if shutil.which("nvcc") else "needs nvcc")


def build_emulator(cache: Path) -> Path:
    """Returns the library of the emulator alone."""
    with _alone(cache):
        return _link("ptx_emulator", _compile(cache, _emulator_commands()), cache)


def build_core(cache: Path) -> Path:
    """Returns the extension module `litevae_core` with the emulator in it."""
    with _alone(cache):
        # The emulator comes first: its variables must exist when the constructors of nvcc's objects register kernels.
        commands = [*_emulator_commands(), _emulator_command("cuda_runtime"), *_core_commands(cache)]
        return _link("litevae_core", _compile(cache, commands), cache)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Lets one process at a time build, so that the others find the result."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


Command = tuple[list[str], Path, list[Path]]  # arguments, source, and the files that it may include


def _compiler() -> str | None:
    return shutil.which("g++")


def _emulator_command(name: str) -> Command:
    return ([str(_compiler()), *EMULATOR_FLAGS], HERE / f"{name}.cpp", sorted(HERE.glob("*.h")))


def _emulator_commands() -> list[Command]:
    names = sorted(path.stem for path in HERE.glob("*.cpp") if path.stem != "cuda_runtime")
    return [_emulator_command(name) for name in names]


def _core_commands(cache: Path) -> list[Command]:
    import pybind11

    (cache / "include").mkdir(parents=True, exist_ok=True)
    (cache / "include" / "build.h").write_text(BUILD_H)
    includes = [cache / "include", pybind11.get_include(), sysconfig.get_paths()["include"]]
    compile = [str(_compiler()), *CORE_FLAGS, *(f"-I{path}" for path in includes)]
    compile += ['-DPYBIND11_COMPILER_TYPE="emulated"', "-w"]
    common = sorted(CSRC.glob("common/*"))

    def command(start: list[str], source: Path) -> Command:
        beside = sorted(source.parent.glob("*.h")) + sorted(source.parent.glob("*.cuh"))
        return start, source, [*common, *beside, cache / "include" / "build.h"]

    def kernel(source: Path) -> Command:
        architecture = f"compute_{ARCHITECTURES[source.stem]}"
        options = [*NVCC_FLAGS, *DEFINITIONS, f"-gencode=arch={architecture},code={architecture}"]
        return command([str(shutil.which("nvcc")), *options], source)

    kernels = [kernel(path) for name in OPERATORS for path in sorted((CSRC / name).glob("*.cu"))]
    # The bindings name the CPU kernels, which are never called here.
    host = [CSRC / "bindings.cpp", *(CSRC / name / "bindings.cpp" for name in OPERATORS)]
    host += [path for name in OPERATORS for path in sorted((CSRC / name).glob("*.cpp")) if path not in host]
    return kernels + [command(compile, source) for source in host]


def _hash(arguments: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(arguments).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _identity() -> str:
    """Returns what the compilers predefine: their versions, and the instruction set of -march=native."""
    command = [str(_compiler()), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    found = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    nvcc = shutil.which("nvcc")
    return found + (
        subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    )


def _compile(cache: Path, commands: Sequence[Command]) -> list[Path]:
    identity = _identity()

    def compile(command: Command) -> Path:
        arguments, source, includes = command
        hashed = _hash([identity, *arguments, str(source)], [source, *includes])
        target = cache / f"{source.parent.name}-{source.stem}-{hashed}.o"
        if not target.exists():
            _run([*arguments, "-c", str(source)], target)
        return target

    # nvcc's files are compiled first, because they are the slowest.
    by_size = sorted(commands, key=lambda command: command[1].suffix != ".cu")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip((c[1] for c in by_size), pool.map(compile, by_size), strict=True))
    return [objects[command[1]] for command in commands]


def _link(name: str, objects: Sequence[Path], cache: Path) -> Path:
    target = cache / f"{name}-{_hash([path.name for path in objects], [])}.so"
    if not target.exists():
        # -Bsymbolic: the symbols of a CUDA runtime in this process must not replace the emulator's.
        _run([str(_compiler()), "-shared", "-Wl,-Bsymbolic", *map(str, objects)], target)
    return target


def _run(command: Sequence[str], target: Path) -> None:
    """Runs a compiler that writes `target`, which is complete if it exists: processes may share the cache."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        made.replace(target)
    for old in target.parent.glob(f"{target.name.rsplit('-', 1)[0]}-*{target.suffix}"):
        if old != target:
            old.unlink(missing_ok=True)
