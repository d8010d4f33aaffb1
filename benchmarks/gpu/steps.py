"""The steps of each stage, the decisive ones first.

The first three stages are half an hour with a GPU: correctness, and the readings that decide what to work on. The
fourth has the remaining readings, and the fifth trains for seven minutes; neither fits into that half hour.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KERNEL_TESTS = tuple(
    f"tests/litevae_kernels/{name}/test_cuda.py" for name in ("haar", "group_norm_silu", "smc")
)
LARGE = "2_to_31 or many"  # tests that need tens of gigabytes, and so run alone
CHECKED = (
    "not triton and (huge or identical or depthwise or zeros)"  # few launches, because checkers are slow
)
LARGE_TRITON = "2_to_31 or 2_31"
TRITON = "(triton or not test_cuda.py)"  # the files of the CUDA kernels test the Triton kernels, too
MODEL_TESTS = (
    "tests/litevae/models",
    "tests/litevae/losses",
    "tests/litevae/training/test_devices.py",
    "tests/litevae/training/test_optimization.py",
)
READINGS = "benchmarks/gpu/test_readings.py"
TRAINING = (
    "data.train=demo",
    "loss.pretrained=false",
    "tracker=none",
    "loss.adversarial_start=200",
    "resume=auto",  # for a step that is run again
)
BUILD_SECONDS = 90  # expected; on each machine once, before its first stage


@dataclass(frozen=True)
class Step:
    """A command, and how long it takes.

    Attributes:
        expected: estimate of its seconds on an H100 or H200, which no GPU has confirmed.
        limit: the most seconds that it may take.
        needs: program without which the step is left out.
        cuda: whether it needs the CUDA kernels, and not only the Triton kernels.
        may_skip: expression that matches why all of its tests may be skipped: the GPU lacks what they need.
        interrupted: whether the command ends by an interrupt at its limit, which is no failure.
        metrics: metrics.jsonl that the command writes.
    """

    name: str
    command: tuple[str, ...]
    expected: int
    limit: int
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None
    cuda: bool = False
    may_skip: str = ""
    interrupted: bool = False
    metrics: Path | None = None


def stages(output: Path, *, dry_run: bool) -> dict[int, list[Step]]:
    """Returns the steps by stage.

    Args:
        output: folder of the results.
        dry_run: whether to return the steps for a CPU.
    """

    def tests(
        name: str, select: str, *files: str, processes: int, expected: int, limit: int, **kind: Any
    ) -> Step:
        how = ("--collect-only",) if dry_run else ("-n", str(processes), "--maxfail=30")
        command = (*pytest(), *how, "-m", "gpu", "-k", select, *files)
        return Step(name, command, expected, limit, **kind)

    def measure(name: str, *tests: str, expected: int, options: tuple[str, ...] = (), **kind: Any) -> Step:
        common = ("--benchmark-only", "--benchmark-disable-gc", "--results", str(output))
        return Step(name, (*pytest(), *common, *options, *tests), expected, 2 * expected + 30, **kind)

    def readings(name: str, *names: str, expected: int, **kind: Any) -> Step:
        options = ("--dry-run",) if dry_run else ()
        tests = [f"{READINGS}::test_{test}" for test in names]
        return measure(name, *tests, expected=expected, options=options, **kind)

    def operator(name: str, *tests: str, expected: int) -> Step:
        # These benchmarks have no tiny shapes.
        return measure(name, *tests, expected=expected, options=("--collect-only",) if dry_run else ())

    def checker(tool: str) -> Step:
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        run = (*pytest(), "-m", "gpu", "-x", "-k", CHECKED, *KERNEL_TESTS)
        if dry_run:
            return Step(tool, (*run, "--collect-only"), 50, 100)
        return Step(tool, (*command, *run), 50, 100, needs="compute-sanitizer", cuda=True)

    def training(size: int) -> Step:
        folder = output / f"training-{size}"
        settings = [*TRAINING, f"data.size={size}", f"output_dir={folder}"]
        if dry_run:
            tiny = ["model.preset=litevae-s", "model.block_out_channels=[32,32,32,32]", "data.size=32"]
            tiny += ["data.batch_size=1", "data.workers=0", "max_steps=2", "precision=fp32", "loss.lpips=0"]
            settings += [*tiny, "loss.adversarial=0", "validate_every=0", "checkpoint.every=0"]
        program = "from litevae.cli import main; main()"
        command = (sys.executable, "-c", program, "train", "imagenet-b", *settings)
        name = f"litevae train, {size}x{size}"
        return Step(name, command, 210, 210, interrupted=True, metrics=folder / "metrics.jsonl")

    norm, haar, smc = (
        f"benchmarks/test_{name}.py::test" for name in ("group_norm_silu", "haar", "self_modulated_conv2d")
    )
    small = f"not triton and not {LARGE.replace(' or ', ' and not ')}"
    return {
        1: [
            tests("CUDA kernels", small, *KERNEL_TESTS, processes=8, expected=100, limit=200, cuda=True),
            checker("memcheck"),
            checker("racecheck"),
            tests(
                "CUDA kernels, large tensors",
                f"({LARGE}) and not triton",
                *KERNEL_TESTS,
                processes=1,
                expected=80,
                limit=160,
                cuda=True,
                may_skip="GPU memory",
            ),
            checker("initcheck"),
            checker("synccheck"),
        ],
        2: [
            tests(
                "Triton kernels",
                f"{TRITON} and not ({LARGE_TRITON})",
                "tests/litevae_kernels",
                processes=14,
                expected=280,
                limit=400,
            ),
            tests("models", "", *MODEL_TESTS, processes=4, expected=90, limit=180),
            tests(
                "Triton kernels, large tensors",
                f"{TRITON} and ({LARGE_TRITON})",
                "tests/litevae_kernels",
                processes=1,
                expected=90,
                limit=180,
                may_skip="GPU memory",
            ),
        ],
        3: [
            readings("encoders, batch 32", "encoders[32]", expected=120),
            readings("fused convolution in encoders, batch 32", "fused_encoders[32]", expected=70),
            counters(dry_run),
            readings("host time", "host_time", expected=15),
            readings("encoders launched by Python", "launched_by_python", expected=35),
            readings("biases and additions", "biases_and_additions", expected=25),
            readings("fused convolution", "fused_convolution", expected=25),
            readings("encoders, batch 8", "encoders[8]", expected=110),
            readings(
                "norms in clusters",
                "norms_in_clusters",
                "largest_norm_in_clusters",
                expected=35,
                cuda=True,
                may_skip="^sm_[0-9]+ has no clusters",
            ),
        ],
        4: [
            operator(
                "group_norm_silu", f"{norm}_largest_call", f"{norm}_all_calls_of_the_model", expected=75
            ),
            operator("haar_pyramid", f"{haar}_pyramid_forward", f"{haar}_pyramid_backward", expected=45),
            operator("modulate_weight", f"{smc}_weight_forward", f"{smc}_weight_backward", expected=25),
            operator("training step", "benchmarks/test_training_step.py", expected=60),
            readings("fused convolution in encoders, batch 8", "fused_encoders[8]", expected=50),
            readings("encoders, batch 1", "encoders[1]", expected=105),
            readings("encoders, batch 64", "encoders[64]", expected=115),
        ],
        5: [training(128), training(256)],
    }


def pytest() -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--color=no")


def counters(dry_run: bool) -> Step:
    """Returns the step that reads the hardware counters of one launch of each kernel."""
    program = (sys.executable, "-m", "benchmarks.gpu.counters")
    if dry_run:
        return Step("counters", (*program, "cpu"), 40, 80)
    sections = ("SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "Occupancy")
    # The clocks of a machine that others use as well must not be changed.
    command = ("ncu", "--clock-control", "none", "--csv", "--page", "details", "--launch-count", "32")
    named = ("--kernel-name-base", "demangled", "--kernel-name", "regex:litevae")
    chosen = [option for section in sections for option in ("--section", section)]
    return Step("counters", (*command, *named, *chosen, *program, "cuda"), 40, 150, needs="ncu", cuda=True)
