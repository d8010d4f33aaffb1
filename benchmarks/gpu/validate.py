"""Runs a stage of the validation on a GPU: ``python -m benchmarks.gpu.validate 1|2|3|4|5``; see benchmarks/gpu."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.counters import readings
from benchmarks.gpu.steps import BUILD_SECONDS, Step, stages
from benchmarks.session import RESULTS, read, results_path, write
from litevae.environment import device_name, versions
from litevae.training.metrics_log import read_log

ROOT = Path(__file__).parents[2]
SECONDS = 570  # per call
GRACE = 45  # seconds that an interrupted command gets to save its files
TAIL = 1500  # characters of a step's output in the results; the log has all of it
PASSED = "passed"
NO_CUDA = "passed without the CUDA kernels, whose build failed"
SKIPPED = "failed: skipped, because the build of the CUDA kernels failed"
CORE = ("CMakeLists.txt", "csrc", "setup.py")
CODE = (*CORE, "benchmarks", "litevae", "litevae_kernels", "tests")
# Prints what a fresh process finds: the facts of litevae_kernels.info, and why CUDA kernels do not serve, if so.
INSPECTION = """
import json
from litevae_kernels import info
from litevae_kernels.backend import why_not
print(json.dumps([info.report(), why_not("native", "cuda")]))
"""


class Validation:
    """The results of all stages on one machine, kept in one JSON file and one log.

    Args:
        output: folder of both files.
        dry_run: whether this is a rehearsal, which the files then say.

    Attributes:
        built: whether the CUDA kernels serve; a dry run, which needs none, leaves it true.
        code: digest of the code, recorded with each step.
    """

    def __init__(self, output: Path, *, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.device = device_name() + (", dry run" if dry_run else "")
        self.path = results_path(output, self.device)
        self.log = self.path.with_suffix(".log")
        self.built = True
        self.code = digest(ROOT, CODE)

    def steps(self) -> dict[str, Any]:
        """Returns what is recorded about each step that was run."""
        return read(self.path).get("validation", {})

    def record(self, name: str, facts: dict[str, Any]) -> None:
        # The step itself may have written to the file.
        data = {"device": self.device, "results": []} | read(self.path) | {"dry_run": self.dry_run}
        stamp = {"date": date.today().isoformat(), "versions": versions(), "code": self.code}
        data["validation"] = {**data.get("validation", {}), name: facts | stamp}
        write(self.path, data)

    def run(self, step: Step, limit: float) -> str:
        """Runs a step, records its outcome and returns it."""
        if step.needs is not None and shutil.which(step.needs) is None:
            outcome = f"left out: there is no {step.needs}"
            self.record(step.name, {"outcome": outcome})
            return outcome
        if step.cuda and not self.built:
            self.record(step.name, {"outcome": SKIPPED})
            return SKIPPED
        start = time.monotonic()
        status, output = execute(step, limit)
        seconds = time.monotonic() - start
        with self.log.open("a") as log:
            log.write(f"== {step.name}: {' '.join(step.command)}\n{output}\n")
            log.write(f"== exit status {status}, {seconds:.0f} s\n\n")
        outcome = PASSED if self.built else NO_CUDA
        if status != 0:
            outcome = "exceeded its time" if status is None else f"failed: exit status {status}"
        elif all_skipped(output) and not self.dry_run:
            reasons = sorted(set(re.findall(r"^SKIPPED \[\d+\] [^ ]+ (.*)", output, re.MULTILINE)))
            allowed = step.may_skip and reasons and all(re.search(step.may_skip, each) for each in reasons)
            outcome = f"{'left out' if allowed else 'failed'}: all of its tests were skipped"
            outcome += f": {', '.join(reasons)}" if reasons else ""
        facts: dict[str, Any] = {"outcome": outcome, "seconds": round(seconds, 1), "expected": step.expected}
        facts["tail"] = output[-TAIL:]
        if found := readings(output):
            facts["readings"] = found
        if step.metrics is not None:
            facts["training"] = training(step.metrics)
        self.record(step.name, facts)
        return outcome


def digest(root: Path, names: Sequence[str]) -> str:
    """Hashes the files of code among some files and folders of `root`, without what was compiled."""
    found = hashlib.sha256()
    places = [root / name for name in names]
    for path in sorted(path for place in places for path in (place, *place.rglob("*"))):
        if path.is_file() and path.suffix in (".py", ".yaml", ".h", ".cpp", ".cu", ".cuh", ".txt"):
            found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def all_skipped(output: str) -> bool:
    """Returns whether pytest's summary, after which others may print, has skipped tests and none that passed."""
    summaries = re.findall(r"^(?:=+ )?(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s", output, re.MULTILINE)
    return bool(summaries) and " skipped" in summaries[-1] and " passed" not in summaries[-1]


def training(metrics: Path) -> dict[str, Any]:
    """Returns the number of steps, the speed, the losses, and what was not finite, from a run's metrics.jsonl."""
    lines = read_log(metrics, sys.maxsize)
    logged = [line for line in lines if "loss" in line]
    speeds = [line["images_per_second"] for line in logged]
    return {
        "steps": max((line["step"] for line in lines), default=0),
        # The first step has the start-up in it.
        "images per second": statistics.median(speeds[1:] or speeds) if speeds else None,
        "first loss": logged[0]["loss"] if logged else None,
        "last loss": logged[-1]["loss"] if logged else None,
        "not finite": [f"step {line['step']}: {line['skipped']}" for line in lines if "skipped" in line],
    }


def execute(step: Step, limit: float) -> tuple[int | None, str]:
    """Returns the exit status of a step, None if it exceeded `limit` seconds, and its output."""
    variables = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, **variables, **step.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            if step.interrupted:
                process.send_signal(signal.SIGINT)
                try:
                    status = process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    status = None
        finally:
            end(process)
        output.seek(0)
        return status, output.read()


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stage(
    validation: Validation, steps: Sequence[Step], seconds: float, say: Callable[[str], None] = print
) -> bool:
    """Runs the steps that have not passed with this code, while there is time for them; returns whether all have.

    Steps that failed earlier come last, so that they do not keep others from running. A step starts if the time that
    it is expected to take is left. It ends at its limit or at that of the call.

    Args:
        validation: results so far.
        steps: steps of the stage, in order.
        seconds: time limit of all steps together.
        say: function that prints a line.
    """
    end_time = time.monotonic() + seconds
    complete = True
    records = {
        name: facts for name, facts in validation.steps().items() if facts.get("code") == validation.code
    }

    def has_failed(step: Step) -> bool:
        return str(records.get(step.name, {}).get("outcome", "")).startswith(("failed", "exceeded"))

    for step in sorted(steps, key=has_failed):
        before = records.get(step.name, {})
        outcome = before.get("outcome")
        if outcome == PASSED or (outcome == NO_CUDA and not validation.built):
            say(f"{step.name}: {outcome} on {before['date']}")
            complete &= outcome == PASSED
            continue
        left = end_time - time.monotonic() - (GRACE if step.interrupted else 0)
        if left < step.expected:
            outcome = f"left for the next call: {left:.0f} s are left, about {step.expected} s are needed"
        else:
            outcome = validation.run(step, min(step.limit, left))
        complete &= outcome == PASSED or outcome.startswith("left out")
        say(f"{step.name}: {outcome}")
    return complete


def inspect() -> tuple[dict[str, str], str | None]:
    """Returns the facts about the machine, and why the CUDA kernels cannot serve, if so, as a fresh process sees it."""
    command = (sys.executable, "-c", INSPECTION)
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    facts, reason = json.loads(found.stdout.splitlines()[-1])
    return {name: value for name, value in facts if value != "not set"}, reason


def build_core(validation: Validation) -> bool:
    """Builds the core for this machine's GPU, unless that was done; returns whether its CUDA kernels serve.

    The build is no step of a stage, because it has to be repeated on each fresh machine, and after each change of its
    sources: a core of earlier ones may serve as well.
    """
    sources = digest(ROOT, CORE)
    before = validation.steps().get("build", {})
    if (before.get("outcome"), before.get("sources")) == (PASSED, sources) and inspect()[1] is None:
        return True
    major, minor = torch.cuda.get_device_capability()
    settings = {
        "LITEVAE_BUILD_CORE": "1",
        "LITEVAE_BUILD_CUDA": "1",
        "LITEVAE_CUDA_ARCHITECTURES": f"{major}{minor}",
    }
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    outcome = validation.run(Step("build", command, BUILD_SECONDS, 240, settings), 240)
    if outcome == PASSED and (reason := inspect()[1]) is not None:
        outcome = f"failed: {reason}"
    validation.record("build", validation.steps()["build"] | {"outcome": outcome, "sources": sources})
    if outcome != PASSED:
        steps = "the steps that need the CUDA kernels are skipped"
        print(f"build: {outcome}; {steps}; see {validation.log}", file=sys.stderr)
    return outcome == PASSED


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.validate", description=__doc__)
    meaning = (
        "1: CUDA kernels, 2: Triton kernels and models, 3: decisive speeds, 4: other speeds, 5: training"
    )
    parser.add_argument("stage", type=int, choices=(1, 2, 3, 4, 5), help=meaning)
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU; nothing of it is reported")
    place = "folder of the results and the log; default: benchmarks/results, for a dry run a temporary one"
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=place)
    limit = f"time limit of this call; default: {SECONDS}"
    parser.add_argument("--seconds", type=float, default=SECONDS, help=limit)
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU is visible to PyTorch; --dry-run rehearses the stage on a CPU")
    output = options.output or (Path(tempfile.mkdtemp(prefix="gpu-dry-run-")) if options.dry_run else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    # As an exception, the signal ends the running step and all that it started. The next call runs it again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    start = time.monotonic()
    validation = Validation(output.resolve(), dry_run=options.dry_run)
    if not options.dry_run:
        validation.built = build_core(validation)
    validation.record("machine", {"outcome": PASSED, "facts": inspect()[0]})
    steps = stages(validation.path.parent, dry_run=options.dry_run)[options.stage]
    complete = run_stage(validation, steps, options.seconds - (time.monotonic() - start))
    print(f"Results: {validation.path}\nLog: {validation.log}")
    if not complete:
        print("Not all steps have passed; the same command runs the others again.")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
