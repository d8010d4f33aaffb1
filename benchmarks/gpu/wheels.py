"""Downloads the Python packages that a GPU machine without a network lacks.

``python -m benchmarks.gpu.wheels FOLDER`` fetches wheels for Linux on x86-64 and the Python of ``--python``. Packages
in the file ``--installed`` (one name per line, or what ``pip list`` or ``pip freeze`` prints there) are left out with
all that they need, and so are PyTorch and what it brings along.
"""

import argparse
import email.parser
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# Without PyTorch on the machine, nothing here can run; its wheels are larger than what may be carried.
PRESENT = ("torch", "torchvision", "triton", "numpy", "setuptools")
# What the steps need of the extra "test", and pytest-xdist for several processes.
TESTS = (
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "PyWavelets",
    "ptwt",
    "hypothesis",
    "cmake",
    "ninja",
    "pybind11",
)
GLIBC = (
    "_2_39",
    "_2_35",
    "_2_34",
    "_2_31",
    "_2_28",
    "_2_27",
    "_2_24",
    "_2_17",
    "_2_12",
    "_2_5",
    "2014",
    "2010",
    "1",
)
LIMIT = 64  # MiB


def wanted() -> list[Requirement]:
    """Returns the requirements of the package and of the steps."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in (*project["dependencies"], *TESTS)]


def installed(text: str) -> set[str]:
    """Returns the names in a list of packages."""
    names = (re.match(r"[A-Za-z0-9][\w.-]*", line.strip()) for line in text.splitlines())
    return {canonicalize_name(name[0]) for name in names if name is not None}


def collect(
    requirements: Iterable[Requirement],
    present: set[str],
    fetch: Callable[[Requirement], Path],
    environment: dict[str, str],
) -> list[Path]:
    """Returns a wheel of each requirement, and of each that these have in turn, without those in `present`.

    Args:
        requirements: the first requirements.
        present: canonical names of the packages that the machine has.
        fetch: function that downloads a requirement's wheel.
        environment: values of the markers on the machine, such as its Python's version.
    """
    queue, seen, wheels = list(requirements), set(present), []
    while queue:
        requirement = queue.pop(0)
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name in seen or (marker is not None and not marker.evaluate({"extra": "", **environment})):
            continue
        seen.add(name)
        wheels.append(fetch(requirement))
        queue += needs(wheels[-1])
    return wheels


def needs(wheel: Path) -> list[Requirement]:
    """Returns the requirements of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        metadata = email.parser.BytesParser().parsebytes(archive.read(name))
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def download(requirement: Requirement, folder: Path, python: str) -> Path:
    """Downloads a wheel, or builds one where the index has only sources, which must be of Python alone."""
    requirement.marker = None
    before = set(folder.glob("*.whl"))
    platforms = [option for version in GLIBC for option in ("--platform", f"manylinux{version}_x86_64")]
    pip = (sys.executable, "-m", "pip")
    fetch = (
        "download",
        "--only-binary=:all:",
        "--python-version",
        python,
        "--implementation",
        "cp",
        *platforms,
    )
    build = ("wheel",)
    for command in (fetch, build):
        arguments = (*pip, *command, "--quiet", "--no-deps", "--dest" if command is fetch else "--wheel-dir")
        done = subprocess.run((*arguments, str(folder), str(requirement)), capture_output=True, text=True)
        made = set(folder.glob("*.whl")) - before
        if done.returncode == 0 and made:
            wheel = made.pop()
            if command is build and not wheel.name.endswith("-none-any.whl"):
                raise SystemExit(f"{requirement}: the index has no wheel for Python {python} on Linux")
            return wheel
    raise SystemExit(f"{requirement}: {done.stderr.strip().splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__)
    parser.add_argument("folder", type=Path, help="new folder for the wheels")
    parser.add_argument(
        "--installed", type=Path, metavar="FILE", help="list of packages that the machine has"
    )
    parser.add_argument("--python", default="3.12", help="the machine's Python; default: 3.12")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"most MiB in all; default: {LIMIT}")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists; two versions of a package would not install together")
    options.folder.mkdir(parents=True)
    present = installed("\n".join(PRESENT))
    if options.installed is not None:
        present |= installed(options.installed.read_text())
    environment = {
        "python_version": options.python,
        "python_full_version": f"{options.python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }

    def fetch(requirement: Requirement) -> Path:
        wheel = download(requirement, options.folder, options.python)
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}", flush=True)
        return wheel

    wheels = collect(wanted(), present, fetch, environment)
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{size:7.2f} MiB in {len(wheels)} wheels")
    if size > options.limit:
        raise SystemExit(
            f"that is more than {options.limit:g} MiB: name what the machine has with --installed"
        )


if __name__ == "__main__":
    main()
