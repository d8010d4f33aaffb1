"""The validation of GPUs: how its steps run, and rehearsals of them."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks.gpu import counters, validate
from benchmarks.gpu.steps import Step, stages


@pytest.fixture
def validation(tmp_path):
    return validate.Validation(tmp_path, dry_run=True)


def python(name, code, limit=20, **options):
    return Step(name, (sys.executable, "-S", "-c", code), limit, **options)


def run(validation, *steps, seconds=100):
    said = []
    return validate.run_stage(validation, steps, seconds, said.append), said


def test_a_step_that_passed_is_not_run_again(validation, tmp_path):
    once = python("once", f"open({str(tmp_path / 'count')!r}, 'a').write('x'); print('done')")
    for _ in range(2):
        complete, said = run(validation, once)
        assert complete
    assert "passed on" in said[0]
    assert (tmp_path / "count").read_text() == "x"
    assert "done" in validation.log.read_text()
    data = json.loads(validation.path.read_text())
    assert data["dry_run"]
    assert data["validation"]["once"]["tail"] == "done\n"


def test_what_failed_is_run_again_and_the_rest_goes_on(validation, tmp_path):
    code = f"import os, sys; sys.exit(0 if os.path.exists({str(tmp_path / 'mended')!r}) else 3)"
    steps = python("fragile", code), python("other", "")
    complete, said = run(validation, *steps)
    assert not complete
    assert said == ["fragile: failed: exit status 3", "other: passed"]
    (tmp_path / "mended").touch()
    complete, said = run(validation, *steps)
    assert complete
    assert said[0] == "fragile: passed"


def test_a_step_that_does_not_fit_is_left(validation):
    complete, said = run(validation, python("long", "", 60), python("short", "", 10), seconds=30)
    assert not complete
    assert "left for the next call" in said[0]
    assert said[1] == "short: passed"
    assert "long" not in validation.steps()


def test_a_step_ends_at_its_limit_with_all_that_it_started(validation, tmp_path):
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    code = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(30)"
    )
    assert run(validation, python("slow", code, 1)) == (False, ["slow: exceeded its time"])
    quits = "import time\ntry:\n    time.sleep(30)\nexcept KeyboardInterrupt:\n    print('saved')"
    assert validate.execute(python("training", quits, interrupted=True), 1) == (0, "saved\n")
    assert not (tmp_path / "alive").exists()


def test_a_missing_program_leaves_its_step_out(validation):
    complete, said = run(validation, python("checker", "", needs="no-such-program"))
    assert complete
    assert said == ["checker: left out: there is no no-such-program"]


def test_a_call_with_its_limits_takes_ten_minutes(tmp_path):
    for number, steps in stages(tmp_path, dry_run=False).items():
        assert all(step.limit < validate.SECONDS - validate.GRACE for step in steps), number
        assert len({step.name for step in steps}) == len(steps)


def test_every_test_for_a_gpu_belongs_to_a_step(tmp_path):
    """What the steps that take a file leave of its tests marked `gpu` is nothing."""
    commands = [step.command for steps in stages(tmp_path, dry_run=False).values() for step in steps]
    ends = [command[command.index("-k") + 1 :] for command in commands if "--maxfail=30" in command]
    by_steps = {}
    for path in sorted((validate.ROOT / "tests").rglob("test_*.py")):
        if re.search(r"mark\.gpu\b", path.read_text()):
            name = path.relative_to(validate.ROOT).as_posix()
            chosen = tuple(
                select for select, *places in ends if any(f"{name}/".startswith(f"{p}/") for p in places)
            )
            by_steps.setdefault(chosen, []).append(name)
    assert () not in by_steps, by_steps[()]
    for chosen, files in by_steps.items():
        if "" not in chosen:  # which chooses all
            rest = f"not ({' or '.join(f'({select})' for select in chosen)})"
            command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-mgpu", "-k", rest, *files]
            found = subprocess.run(command, cwd=validate.ROOT, capture_output=True, text=True, check=False)
            assert found.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, found.stdout + found.stderr


def test_without_a_gpu_only_a_dry_run_is_possible(capsys):
    with pytest.raises(SystemExit):
        validate.main(["1"])
    assert "no GPU is visible to PyTorch" in capsys.readouterr().err


STATISTICS = (
    "void litevae::<unnamed>::block_kernel<litevae::group_norm_silu::<unnamed>::Statistics<float>>(T2)"
)
NCU = f"""==PROF== Connected
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","{STATISTICS}","a","Duration","us","7.1"
"0","{STATISTICS}","b","Issue Slots Busy","%","81.5"
"0","{STATISTICS}","b","Other","%","3"
"1","void litevae::haar::(anonymous namespace)::kernel<A>(P)","a","Duration","us","2"
"""


def test_counters_are_read_from_the_table():
    assert counters.readings(NCU) == [
        {"kernel": "void block_kernel<Statistics<float>>", "time": "7.1 us", "issue slots busy": "81.5 %"},
        {"kernel": "void kernel<A>", "time": "2 us"},
    ]
    assert counters.readings("==ERROR== no permission") == []


def test_a_step_of_a_dry_run(validation, tmp_path):
    """`test_dry_run` runs all of them."""
    (step,) = (step for step in stages(tmp_path, dry_run=True)[3] if step.name == "counters")
    assert validation.run(step, 120) == validate.PASSED, validation.log.read_text()
    assert json.loads(validation.path.read_text())["dry_run"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_dry_run(tmp_path, capsys, stage):
    assert validate.main([str(stage), "--dry-run", "--output", str(tmp_path)]) == 0, capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert data["dry_run"]
    assert len(data["validation"]) == len(stages(tmp_path, dry_run=True)[stage]) + 1
    assert "dry run" in data["device"]
