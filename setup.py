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
        wanted = os.environ.get("LITEVAE_BUILD_CUDA", "auto")
        try:
            self.build_core(target, [f"-DLITEVAE_BUILD_CUDA={wanted}"])
        except subprocess.CalledProcessError:
            if wanted != "auto":
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
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", folder], check=True)
            built = next(Path(folder).glob("litevae_core*.*"))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(built), str(target))


# The core is a top-level module beside the packages. Python in a checkout imports the packages from there, and still
# finds the installed core.
setup(ext_modules=[Extension("litevae_core", sources=[])], cmdclass={"build_ext": CMakeBuild})
