"""Builds csrc with CMake and Ninja. Everything else is in pyproject.toml."""

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
        # A fresh folder each time: a CMakeCache left in the tree names an isolated environment that is gone.
        with tempfile.TemporaryDirectory(prefix="litevae-build-") as folder:
            configure = [
                "cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DLITEVAE_BUILD_CUDA={os.environ.get('LITEVAE_BUILD_CUDA', 'auto')}",
                f"-DLITEVAE_CUDA_ARCHITECTURES={os.environ.get('LITEVAE_CUDA_ARCHITECTURES', '')}",
            ]  # fmt: skip
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", folder], check=True)
            built = next(Path(folder).glob("litevae_core*.*"))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(built), str(target))


# A module of its own beside the packages: Python run in a checkout imports the packages from there, and still
# finds the core that was installed.
setup(ext_modules=[Extension("litevae_core", sources=[])], cmdclass={"build_ext": CMakeBuild})
