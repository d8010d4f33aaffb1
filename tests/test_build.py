"""The build with `LITEVAE_BUILD_CUDA=auto`, which never fails because of CUDA."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]


def on_path(folder, name, script):
    """Writes an executable shell script, and returns an environment that finds it first."""
    folder.mkdir()
    (folder / name).write_text("#!/bin/sh\n" + script)
    (folder / name).chmod(0o755)
    path = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(path)}


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ("exit 1", "does not know --list-gpu-arch: use a newer CUDA, or set LITEVAE_CUDA_ARCHITECTURES"),
        ("echo compute_35; echo compute_75", "knows no GPU architecture from 80 on: use a newer CUDA"),
    ],
)
def test_an_nvcc_that_is_too_old_is_left_out_and_the_reason_kept(tmp_path, nvcc, reason):
    environment = on_path(tmp_path / "bin", "nvcc", nvcc)

    def configure(cuda):
        options = {
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LITEVAE_BUILD_CUDA": cuda,
            "CMAKE_CUDA_COMPILER": tmp_path / "bin" / "nvcc",  # as if CMake had found that it compiles
        }
        command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"]
        command += [f"-D{name}={value}" for name, value in options.items()]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    result = configure("auto")
    assert result.returncode == 0, result.stderr
    line = f'#define LITEVAE_CUDA_REASON "{tmp_path}/bin/nvcc {reason}"'
    assert line in (tmp_path / "build" / "build.h").read_text().splitlines()
    result = configure("1")
    assert result.returncode == 1
    assert f"LITEVAE_BUILD_CUDA=1, but {tmp_path}/bin/nvcc {reason}" in " ".join(result.stderr.split())


CMAKE = """
echo "$@" >> "$LOG"
case "$*" in
  *"-DLITEVAE_BUILD_CUDA=0"*) touch "$4/without" ;;
  --build*) [ -f "$2/without" ] && touch "$2/litevae_core.so" ;;
esac
"""


@pytest.mark.parametrize(("cuda", "builds"), [("auto", 2), ("1", 1)])
def test_kernels_that_do_not_compile_are_left_out_unless_they_are_demanded(tmp_path, cuda, builds):
    log = tmp_path / "log"
    environment = on_path(tmp_path / "bin", "cmake", CMAKE) | {"LITEVAE_BUILD_CUDA": cuda, "LOG": str(log)}
    command = [sys.executable, ROOT / "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    lines = log.read_text().splitlines()
    assert sum(line.startswith("--build") for line in lines) == builds
    assert (result.returncode == 0) == (cuda == "auto"), result.stderr
    if cuda == "auto":
        assert "-DLITEVAE_CUDA_REASON=the build with CUDA failed" in lines[-2]
        assert "trying it without CUDA" in result.stderr
        assert len(list((tmp_path / "lib").iterdir())) == 1
