"""Builds the compiled core from csrc with CMake and Ninja. All other settings are in pyproject.toml."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        wanted = os.environ.get("LITEVAE_BUILD_CORE", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"LITEVAE_BUILD_CORE is {wanted!r}; allowed: auto, 0, 1")
        cuda = os.environ.get("LITEVAE_BUILD_CUDA", "auto")
        if wanted == "0":
            self.leave_out(target, "built with LITEVAE_BUILD_CORE=0")
            return
        try:
            self.build_with_or_without_cuda(target, cuda)
        except BuildError as error:
            if wanted == "1" or cuda == "1":
                raise SystemExit(f"litevae: the compiled core cannot be built: {error}") from None
            self.leave_out(target, str(error))

    def build_with_or_without_cuda(self, target: Path, cuda: str) -> None:
        try:
            self.build_core(target, [f"-DLITEVAE_BUILD_CUDA={cuda}"])
        except BuildError:
            if cuda != "auto":
                raise
            # CMake accepts this CUDA, and yet the kernels do not compile with it, or its host compiler.
            print("litevae: the build failed (see above); trying it without CUDA", file=sys.stderr)
            reason = "the build with CUDA failed; LITEVAE_BUILD_CUDA=1 shows why"
            self.build_core(target, ["-DLITEVAE_BUILD_CUDA=0", f"-DLITEVAE_CUDA_REASON={reason}"])

    def build_core(self, target: Path, options: list[str]) -> None:
        # The folder is new for each build, because a CMakeCache that stays in the tree would name an isolated
        # environment that is gone.
        with tempfile.TemporaryDirectory(prefix="litevae-build-") as folder:
            configure = [
                "cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DLITEVAE_CUDA_ARCHITECTURES={os.environ.get('LITEVAE_CUDA_ARCHITECTURES', '')}",
                *options,
            ]  # fmt: skip
            run(configure)
            run(["cmake", "--build", folder])
            built = next(Path(folder).glob("litevae_core*.*"))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(built), str(target))

    def leave_out(self, target: Path, reason: str) -> None:
        """Writes a module in place of the core, whose import fails with the reason."""
        print(
            f"litevae: the compiled core is left out: {reason}. The operators run in plain PyTorch, many times slower; "
            "LITEVAE_BUILD_CORE=1 makes this an error.",
            file=sys.stderr,
        )
        # Without -v, pip shows nothing of a build that succeeds but the name of the wheel.
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            wheel.build_number = "0_without_compiled_core"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # Python would import the core of an earlier build instead.
        stand_in = target.parent / "litevae_core.py"
        stand_in.write_text(f"raise ImportError({f'the package was installed without it: {reason}'!r})\n")


class BuildError(Exception):
    """A command of the build failed; the message is the reason."""


def run(command: list[str]) -> None:
    """Runs a command and passes its output on; raises BuildError if it fails."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise BuildError(f"there is no {command[0]}") from None
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        lines.append(line.strip())
    if process.wait():
        # CMake writes "CMake Error at file:line (command):" and the reason on the next lines.
        errors = [
            first_sentence(lines[at + 1 : at + 9]) if line.startswith("CMake Error") else line
            for at, line in enumerate(lines)
            if line.startswith("CMake Error") or "error:" in line
        ]
        raise BuildError(errors[0][:200] if errors else f"{command[0]} failed")


def first_sentence(lines: list[str]) -> str:
    """Returns the lines up to the first that ends with a full stop, in one."""
    end = next((at + 1 for at, line in enumerate(lines) if line.endswith(".")), 2)
    return " ".join(filter(None, lines[:end]))


# The core is a top-level module beside the packages. Python in a checkout imports the packages from there, and still
# finds the installed core.
setup(ext_modules=[Extension("litevae_core", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
