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
        # The folder is new for each build, because a CMakeCache that stays in the tree would name an isolated
        # environment that is gone.
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


# The core is a top-level module beside the packages. Python in a checkout imports the packages from there, and still
# finds the installed core.
setup(ext_modules=[Extension("litevae_core", sources=[])], cmdclass={"build_ext": CMakeBuild})
