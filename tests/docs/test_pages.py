"""Runs every Python block and every command of README.md, CONTRIBUTING.md and docs/.

The steps of a page run in order, in a folder that holds small stand-ins for FOLDER, SD_VAE, runs/demo and the other
names that the pages use (`prepared`). The Python blocks of a page share their variables. Commands and blocks run as
written, except for `SHORT`, `REPLACED` and `SMALLER_IMAGES`, which make them brief. A command that cannot run here is
listed in `NOT_RUN` with the reason; its arguments and settings are still checked. A YAML block that begins with
"# NAME.yaml" is written to that file. The comment `<!-- slow -->` above a block leaves it to `pytest -m slow`.
"""

import contextlib
import functools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from diffusers import AutoencoderKL
from PIL import Image
from skimage import data
from sybil import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.example import Example
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from litevae import LiteVAE
from litevae.cli import app, main
from litevae.diffusion import load_config as load_diffusion_config
from litevae.experiments.spec import load_experiment
from litevae.training import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Allowed languages of blocks: a shell block that is called "bash" would not be executed.
LANGUAGES = {"python", "sh", "yaml", "text", "cpp", "cmake", "bibtex", "toml"}

# Commands that are not run, by patterns of their beginnings, and the reasons.
NOT_RUN = {
    r"torchrun ": "starts several processes, as the tests of training, latents and evaluation do",
    r"litevae experiment \w+ --scale (small|paper)": "takes hours or days",
    r"sudo apt-get |python -m litevae\.experiments\.photographs ": "needs packages of Debian, from the network",
    r"pip install ": "needs the network; .ci/run installs the package",
    r"litevae push |hf ": "needs the network; tests/litevae/cli/test_push.py has a Hub of its own",
    r"python3 -m venv |\. \.venv/": "makes an environment, which needs the network; .ci/run makes one",
    r"pre-commit ": "needs the network, from which it fetches its environments",
    r"(LITEVAE_CPU_ISA=\w+ )?pytest\b": "the tests would start themselves; .ci/run runs them",
    r"bash \.ci/run": "the tests would start themselves",
    r"python -m benchmarks\.report": "rewrites the results in the repository",
    r"python -m benchmarks\.gpu\.validate ": "needs a GPU",
    r"python -m (benchmarks\.gpu\.wheels|pip install) ": "needs the network",
    r"mkdocs ": "writes into the repository; .ci/run builds the site",
    r"python docs/draw_architecture\.py": "writes into the repository",
}

# Replacements in Python blocks.
SMALLER_IMAGES = {
    "torch.rand(4, 3, 256, 256)": "torch.rand(1, 3, 64, 64)",
    "torch.randn(4, 96, 64, 64)": "torch.randn(1, 96, 16, 16)",
}

SMALL_MODEL = (
    "model.preset=litevae-s model.block_out_channels=[16,16,16,16] model.layers_per_block=1 "
    "model.num_groups=8"
)
# Arguments that are put before those of the command, which win.
SHORT = {
    "litevae train": f"{SMALL_MODEL} data.size=32 data.batch_size=2 data.workers=0 data.validation_count=2 "
    "loss.lpips=0 loss.pretrained=false loss.adversarial=0 precision=fp32 tracker=none max_steps=1 checkpoint.every=0",
    "litevae distill": "model.preset=litevae-s data.size=32 data.batch_size=2 data.workers=0 precision=fp32 "
    "tracker=none max_steps=1 checkpoint.every=0",
    "litevae train-diffusion": "max_steps=1 data.batch_size=2 data.workers=0 unet.block_out_channels=[32,32] "
    "unet.layers_per_block=1 sample.count=1 sample.steps=2 fid.measure=never tracker=none",
    "litevae scale": "--size 32 --workers 0",
    "litevae encode": "--size 32 --workers 0",
    "litevae eval": "--size 32 --workers 0 --metrics psnr,ssim",
    "litevae latents": "--size 32 --workers 0 --groups 2",
    "litevae resolution": "--sizes 32,64 --workers 0",
    "litevae features": "--size 32 --count 2",
    "litevae experiment": "max_steps=1",
    "litevae complexity": "--size 32 --batch-size 1 --rounds 1",
}
# Replacements in the arguments of the command, by pattern.
REPLACED = {
    r"\bmax_steps=\S+": "max_steps=1",
    r"\bdata\.workers=\S+": "data.workers=0",
    r"--workers \S+": "--workers 0",
    r"--size \S+": "--size 32",
    r"--sizes \S+": "--sizes 32,64",
    r"--bucket-step \S+": "--bucket-step 16",
    r"--batch-size \S+": "--batch-size 2",
    r"\bgradient_ratio_every=\S+": "gradient_ratio_every=1 loss.adversarial=0.1 loss.adversarial_start=1 "
    "discriminator.width=S",
    r"\bstages=\S+": "",
}
# Names of files that do not exist, in the recipes of extending.md.
INVENTED = re.compile("blur|charbonnier|mixer|pixel|page|<")

# Training runs that the pages name, besides runs/demo. All hold the same small model.
RUNS = (
    "imagenet-b",
    "imagenet-sd-vae",
    "imagenet-vae-small",
    "ffhq-b",
    "group",
    "smc",
    "constant",
    "adaptive",
)

# Commands that take more than a few seconds all the same, as a pattern of their beginnings.
SLOW = (
    r"litevae (complexity|resolution|features|info|export|experiment (?!list)|train (demo|imagenet-(sd-vae|vae)))\b"
    r"|python examples/"
)


@dataclass
class Step:
    """A Python block, one command of a shell block, or a file to write."""

    page: "Page"
    line: int
    kind: str  # python, sh or yaml
    text: str
    slow: bool
    example: Example
    done: bool = False

    @property
    def not_run(self) -> bool:
        return self.kind == "sh" and any(re.match(pattern, self.text) for pattern in NOT_RUN)

    def run(self) -> None:
        self.done = True
        if self.kind == "python":
            PythonEvaluator()(self.example)
        elif self.kind == "yaml":
            Path(self.text.split()[1]).write_text(self.text, encoding="utf-8")
        else:
            run_command(self.text)


@dataclass
class Page:
    name: str
    steps: list[Step] = field(default_factory=list)


def parse(path: Path) -> Page:
    page = Page(str(path.relative_to(ROOT)))
    text = path.read_text(encoding="utf-8")
    for written, smaller in SMALLER_IMAGES.items():
        text = text.replace(written, smaller)
    document = Document(text, str(path))
    for region in FencedCodeBlockLexer(r".*")(document):
        region.parsed = region.lexemes["source"]
        document.add(region)
    for example in document:
        kind, source = example.region.lexemes["language"], str(example.parsed)
        assert kind in LANGUAGES, f"{page.name}:{example.line}: a block of language {kind!r}"
        slow = document.text[: example.start].rstrip().endswith("<!-- slow -->")
        if kind == "python" or (kind == "yaml" and re.match(r"# [\w-]+\.yaml\n", source)):
            page.steps.append(Step(page, example.line, kind, source, slow, example))
        elif kind == "sh":
            for line, command in commands(source, example.line + 1):
                takes_long = slow or re.match(SLOW, command) is not None
                page.steps.append(Step(page, line, kind, command, takes_long, example))
    return page


def commands(source: str, first_line: int) -> Iterator[tuple[int, str]]:
    """Yields each command of a shell block with its line, without comments. `&&` separates commands, too."""
    continued = re.sub(r"\\\n\s*", "", source)
    for line, text in enumerate(continued.split("\n"), first_line):
        for command in re.sub(r"(^|\s)#.*", "", text).split(" && "):
            if command.strip():
                yield line, command.strip()


def run_command(command: str) -> None:
    """Runs a command in the current folder.

    The packages' own commands run in this process, which saves the seconds of their start, and others in bash.
    """
    module = re.fullmatch(r"python -m (litevae[\w.]*)", command)
    if module:
        runpy.run_module(module[1], run_name="__main__")
        return
    if not command.startswith("litevae "):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-euc", command], check=True, env={**os.environ, "PATH": path}, timeout=300)
        return
    for pattern, brief in REPLACED.items():
        command = re.sub(pattern, brief, command)
    words = shlex.split(command)
    # After the name of the configuration, or the teacher.
    place = 3 if words[1].startswith(("train", "experiment", "distill")) else 2
    short = [] if "--merge" in words else shlex.split(SHORT.get(" ".join(words[:2]), ""))
    if words[1] in ("train", "train-diffusion") and words[2] != "--help":
        # The prepared runs have no checkpoints, and a finished result without any is not replaced.
        load, result = {
            "train": (load_config, "model"),
            "train-diffusion": (load_diffusion_config, "pipeline"),
        }[words[1]]
        shutil.rmtree(Path(load(words[2], [*short, *words[3:]]).output_dir) / result, ignore_errors=True)
    assert main([*words[1:place], *short, *words[place:]]) == 0


def check(command: str) -> None:
    """Checks the arguments and settings of a command as written, without running it."""
    if command.startswith("pip install "):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extras in re.findall(r"\[(.*?)\]", command):
            assert set(extras.split(",")) <= set(known), f"{command}: no such extra"
    command = re.sub(r"^torchrun .*?--no-python ", "", command)
    if not command.startswith("litevae "):
        return
    name, *arguments = shlex.split(command)[1:]
    if "--help" in (name, *arguments):
        return
    known_commands = typer.main.get_command(app).commands
    assert name in known_commands, f"{command}: no such command"
    cli = known_commands[name]
    acts = not {"--verify", "--merge"}.isdisjoint(arguments)  # instead of the command
    given = cli.make_context(f"litevae {name}", arguments, resilient_parsing=acts).params
    if name == "train":
        load_config(given["config"], given["overrides"] or ())
    elif name == "distill":
        load_config("distill", [f"teacher={given['teacher']}", *(given["overrides"] or ())])
    elif name == "train-diffusion":
        load_diffusion_config(given["config"], given["overrides"] or ())
    elif name == "experiment" and given["name"] != "list":
        load_experiment(given["name"])


PARSED = [parse(path) for path in PAGES]
STEPS = [step for page in PARSED for step in page.steps]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with images, models, training runs and an encoded data set, under the names that the pages use."""
    folder = tmp_path_factory.mktemp("prepared")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    photograph = Image.fromarray(data.chelsea())
    photograph.crop((100, 50, 196, 114)).save(folder / "photo.jpg")
    for name in ("FOLDER", "TRAIN", "VAL"):
        for i in range(8):
            path = folder / name / ("cats", "dogs")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph.crop((40 * i, 10 * i, 40 * i + 72, 10 * i + 64)).save(path)
    (folder / "ARRAYS").mkdir()
    for i in range(2):
        grey = np.asarray(photograph.convert("L").crop((40 * i, 0, 40 * i + 72, 64)))
        np.save(folder / "ARRAYS" / f"{i}.npy", grey.astype(np.uint16) * 16)
    decoder = {"block_out_channels": (16, 16, 16, 16), "layers_per_block": 1}
    scale = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    model = LiteVAE.from_preset("litevae-s", num_groups=8, sample_size=32, **decoder, **scale)
    for name in RUNS:
        model.save_pretrained(folder / "runs" / name / "model")
        ratios = [json.dumps({"step": step, "gradient_ratio": 0.1 * step}) for step in (1, 2, 3)]
        (folder / "runs" / name / "metrics.jsonl").write_text("\n".join(ratios) + "\n")
    AutoencoderKL(
        norm_num_groups=8,
        sample_size=32,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        **decoder,
    ).save_pretrained(folder / "SD_VAE")
    for name in ("examples", "benchmarks", "tests"):
        if (ROOT / name).is_dir():
            (folder / name).symlink_to(ROOT / name)
    with contextlib.chdir(folder):
        run_command("litevae train demo")
        run_command("litevae scale runs/demo demo")
        run_command("litevae encode runs/imagenet-b FOLDER latents --mirror")
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder_of(prepared, tmp_path_factory):
    """The folder in which the steps of a page run."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("page") / "work"
        shutil.copytree(prepared, folder, symlinks=True)
        if any(step.text.startswith("litevae encode ") for step in STEPS if step.page.name == name):
            shutil.rmtree(folder / "latents")  # the page encodes its own
        return folder

    return make


def each(steps: list[Step]) -> list[Any]:
    """The steps as parameters of a test."""
    return [
        pytest.param(
            step,
            id=f"{step.page.name}:{step.line} {step.text.splitlines()[0][:60]}",
            marks=[pytest.mark.slow] if step.slow else [],
        )
        for step in steps
    ]


@pytest.mark.parametrize("step", each([step for step in STEPS if not step.not_run]))
def test_runs(step, folder_of):
    with contextlib.chdir(folder_of(step.page.name)):
        for earlier in step.page.steps:  # they have not run yet if this test is selected alone
            if earlier is step:
                break
            if not (earlier.done or earlier.slow or earlier.not_run):
                earlier.run()
        step.run()


@pytest.mark.parametrize("page", PARSED, ids=[page.name for page in PARSED])
def test_commands_are_valid_as_written(page, folder_of):
    with contextlib.chdir(folder_of(page.name)):
        for step in page.steps:
            if step.kind == "yaml":
                step.run()
            elif step.kind == "sh":
                check(step.text)


@pytest.mark.parametrize("path", PAGES, ids=[page.name for page in PARSED])
def test_files_of_the_repository_exist(path):
    text = " ".join(path.read_text(encoding="utf-8").split())
    named = re.findall(r"`((?:litevae|litevae_kernels|csrc|tests|benchmarks|docs|examples)/[^` ]+)`", text)
    missing = [name for name in named if not (INVENTED.search(name) or (ROOT / name).exists())]
    assert not missing
    undefined = [
        f"{file}: {name}"
        for file, name in names_in_files(text)
        if (ROOT / file).exists() and not defines(file, name)
    ]
    assert not undefined


def names_in_files(text: str) -> Iterator[tuple[str, str]]:
    """Yields (file, name) for "`file.py` (`name`, `name`)", "`file.py`: `name`" and "`name` of `file.py`"."""
    for file, names in re.findall(r"`([\w/]+/\w+\.py)`(?: \(|: )((?:`[\w.]+`(?:, )?)+)", text):
        yield from ((file, name) for name in re.findall(r"[\w.]+", names))
    yield from ((file, name) for name, file in re.findall(r"`([\w.]+)` of (?:\*\*)?`([\w/]+/\w+\.py)`", text))


def defines(file: str, name: str) -> bool:
    """Returns whether each part of a dotted name is a function, a class or a variable that the file defines."""
    source = (ROOT / file).read_text(encoding="utf-8")
    patterns = (rf"^\s*((def|class|type) {part}\b|{part}\s*[:=])" for part in name.split("."))
    return all(re.search(pattern, source, re.MULTILINE) for pattern in patterns)


def test_every_exception_is_needed():
    written = [step.text for step in STEPS if step.kind == "sh"]
    unused = [pattern for pattern in NOT_RUN if not any(re.match(pattern, text) for text in written)]
    assert not unused, f"no page has these commands: {unused}"
