"""The build never fails because of CUDA if `LITEVAE_BUILD_CUDA=auto`, and without a compiler leaves the core out."""

import os
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[1]


def on_path(folder, name, script):
    """Writes an executable shell script, and returns an environment that finds it first and has no settings."""
    folder.mkdir()
    (folder / name).write_text("#!/bin/sh\n" + script)
    (folder / name).chmod(0o755)
    path = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LITEVAE_BUILD_")}
    return {**inherited, "PATH": os.pathsep.join(path)}


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


NO_COMPILER = """
cat >&2 <<'end'
-- The CXX compiler identification is unknown
CMake Error at CMakeLists.txt:2 (project):
  No CMAKE_CXX_COMPILER could be found.

end
exit 1
"""


BROKEN_COMPILER = """
cat >&2 <<'end'
CMake Error at /usr/share/cmake/Modules/CMakeTestCXXCompiler.cmake:60 (message):
  The C++ compiler

    "/bin/false"

  is not able to compile a simple test program.

  It fails with the following output:

end
exit 1
"""


def test_pip_names_a_wheel_without_the_core_and_the_reason_is_a_whole_sentence(tmp_path):
    environment = on_path(tmp_path / "bin", "cmake", BROKEN_COMPILER)
    command = [
        sys.executable,
        ROOT / "setup.py",
        "-q",
        "egg_info",
        "-e",
        tmp_path,
        "build",
        "-b",
        tmp_path / "build",
    ]
    command += ["bdist_wheel", "-b", tmp_path / "wheel", "-d", tmp_path]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'The C++ compiler "/bin/false" is not able to compile a simple test program.' in result.stderr
    (wheel,) = tmp_path.glob("*.whl")  # its name is all that pip shows
    assert "-0_without_compiled_core-" in wheel.name


@pytest.mark.parametrize(
    ("variables", "status"),
    [
        ({}, 0),
        ({"LITEVAE_BUILD_CORE": "0"}, 0),
        ({"LITEVAE_BUILD_CORE": "1"}, 1),
        ({"LITEVAE_BUILD_CUDA": "1"}, 1),
    ],
)
def test_core_is_left_out_where_it_cannot_be_built(tmp_path, variables, status):
    environment = on_path(tmp_path / "bin", "cmake", NO_COMPILER) | variables
    if not status:
        (tmp_path / "lib").mkdir()
        (
            tmp_path / "lib" / f"litevae_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        ).touch()  # an earlier build
    command = [sys.executable, ROOT / "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == status, result.stderr
    reason = "No CMAKE_CXX_COMPILER could be found."
    if variables.get("LITEVAE_BUILD_CORE") == "0":
        reason = "built with LITEVAE_BUILD_CORE=0"
    last = result.stderr.splitlines()[-1]
    if status:
        assert last == f"litevae: the compiled core cannot be built: {reason}"
        return
    assert f"litevae: the compiled core is left out: {reason}" in last
    (stand_in,) = (tmp_path / "lib").iterdir()
    with pytest.raises(ImportError, match=re.escape(f"the package was installed without it: {reason}")):
        runpy.run_path(str(stand_in))


def test_unknown_value_is_refused(tmp_path):
    environment = {**os.environ, "LITEVAE_BUILD_CORE": "yes"}
    command = [sys.executable, ROOT / "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "LITEVAE_BUILD_CORE is 'yes'; allowed: auto, 0, 1"
