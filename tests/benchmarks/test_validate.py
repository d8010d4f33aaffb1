"""The validation of GPUs: how its steps run, and rehearsals of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import counters, validate
from benchmarks.gpu.steps import BUILD_SECONDS, Step, stages
from litevae_kernels.backend import why_not


@pytest.fixture
def validation(tmp_path):
    return validate.Validation(tmp_path, dry_run=True)


def python(name, code, limit=20, **options):
    return Step(name, (sys.executable, "-S", "-c", code), limit, limit, **options)


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
    assert said[1] == "fragile: passed"


def test_what_failed_does_not_keep_other_steps_from_running(validation):
    fragile, other = python("fragile", "raise SystemExit(3)", 20), python("other", "", 10)
    assert run(validation, fragile)[1] == ["fragile: failed: exit status 3"]
    _, said = run(validation, fragile, other, seconds=15)
    assert said[0] == "other: passed"
    assert said[1].startswith("fragile: left for the next call")


def test_a_step_that_passed_with_other_code_is_run_again(validation):
    step = python("once", "")
    run(validation, step)
    validation.code = "another digest"
    assert run(validation, step)[1] == ["once: passed"]


def test_the_digest_of_the_code_depends_on_its_files(tmp_path):
    source = tmp_path / "csrc" / "common" / "a.cuh"
    source.parent.mkdir(parents=True)
    source.write_text("1")
    first = validate.digest(tmp_path, validate.CODE)
    (tmp_path / "csrc" / "compiled.so").write_text("2")
    assert validate.digest(tmp_path, validate.CODE) == first
    source.write_text("2")
    assert validate.digest(tmp_path, validate.CODE) != first


@pytest.mark.parametrize(
    ("output", "outcome"),
    [
        ("3 skipped, 7 deselected in 2.01s", "failed: all of its tests were skipped"),
        (
            "SKIPPED [2] a.py:3: no a\n2 skipped in 0.1s\n==== no errors",
            "failed: all of its tests were skipped: no a",
        ),
        ("1 passed, 3 skipped in 2.01s", "passed"),
        ("4 passed in 2.01s", "passed"),
    ],
)
def test_a_step_fails_if_all_of_its_tests_are_skipped(validation, output, outcome):
    validation.dry_run = False
    _, said = run(validation, python("tests", f"print('..ss'); print({output!r})"))
    assert said == [f"tests: {outcome}"]


def test_a_step_whose_tests_the_gpu_cannot_run_is_left_out(validation):
    validation.dry_run = False
    for reason, outcome in (("sm_80 has no clusters", "left out"), ("the core was not built", "failed")):
        output = f"SKIPPED [1] a.py:3: {reason}\n1 skipped in 0.1s"
        step = python(reason, f"print({output!r})", may_skip="has no clusters")
        complete, said = run(validation, step)
        assert complete == (outcome == "left out")
        assert said == [f"{reason}: {outcome}: all of its tests were skipped: {reason}"]


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


def test_a_step_is_cut_at_the_end_of_the_call(validation):
    slow = Step("slow", (sys.executable, "-S", "-c", "import time; time.sleep(30)"), 1, 60)
    complete, said = run(validation, slow, python("next", "", 1), seconds=1.5)
    assert not complete
    assert said[0] == "slow: exceeded its time"
    assert "left for the next call" in said[1]


def test_each_stage_is_expected_to_take_ten_minutes(tmp_path):
    every = stages(tmp_path, dry_run=False)
    for number, steps in every.items():
        seconds = BUILD_SECONDS + sum(step.expected for step in steps)
        saving = validate.GRACE if steps[-1].interrupted else 0
        assert seconds + saving <= validate.SECONDS, number
        assert all(step.expected <= step.limit < validate.SECONDS - validate.GRACE for step in steps), number
    names = [step.name for steps in every.values() for step in steps]
    assert len(set(names)) == len(names)


def test_without_the_cuda_kernels_the_other_steps_run(validation):
    validation.built = False
    steps = python("CUDA", "", cuda=True), python("Triton", "")
    for _ in range(2):
        complete, said = run(validation, *steps)
        assert not complete
        triton, cuda = sorted(said, reverse=True)
        assert cuda == f"CUDA: {validate.SKIPPED}"
        assert triton.startswith(f"Triton: {validate.NO_CUDA}")
    assert "on 20" in triton  # the second call did not run it again
    validation.built = True  # the build was mended
    complete, said = run(validation, *steps)
    assert complete
    assert sorted(said) == ["CUDA: passed", "Triton: passed"]


def test_a_build_is_recorded_until_one_succeeds(validation, monkeypatch, capsys):
    monkeypatch.setattr(validate.torch.cuda, "get_device_capability", lambda: (9, 0))
    reasons = ["the driver is too old", None, None]
    monkeypatch.setattr(validate, "inspect", lambda: ({}, reasons.pop(0)))
    monkeypatch.setattr(validate, "execute", lambda step, limit: (1, "no nvcc"))
    assert not validate.build_core(validation)
    assert "build: failed: exit status 1; the steps that need" in capsys.readouterr().err
    assert validation.steps()["build"]["tail"] == "no nvcc"
    monkeypatch.setattr(validate, "execute", lambda step, limit: (0, "built"))
    assert not validate.build_core(validation)
    assert "build: failed: the driver is too old; the steps that need" in capsys.readouterr().err
    assert validation.steps()["build"]["outcome"] == "failed: the driver is too old"
    assert validate.build_core(validation)
    assert validation.steps()["build"]["outcome"] == validate.PASSED
    assert validation.steps()["build"]["tail"] == "built"
    monkeypatch.setattr(validate, "execute", lambda step, limit: (1, "built again"))
    assert validate.build_core(validation)  # that is done
    assert not reasons
    monkeypatch.setattr(validate, "digest", lambda *_: "another digest")
    assert not validate.build_core(validation)  # A core that serves may be of earlier sources.


def test_a_fresh_process_is_asked_about_the_machine():
    facts, reason = validate.inspect()
    assert facts["torch"].startswith(torch.__version__)
    assert reason == why_not("native", "cuda")


def test_a_signal_ends_the_running_step(tmp_path):
    """The step, and all that it started, end with the call; nothing is recorded, so that the step runs again."""
    pid, code = tmp_path / "pid", "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program = (
        "import sys; from benchmarks.gpu import validate; from benchmarks.gpu.steps import Step; "
        f"step = Step('slow', (sys.executable, '-S', '-c', {code.format(str(pid))!r}), 1, 60); "
        "validate.stages = lambda *_, **__: {1: [step]}; "
        f"validate.main(['1', '--dry-run', '--output', {str(tmp_path / 'results')!r}])"
    )
    call = subprocess.Popen([sys.executable, "-c", program], cwd=validate.ROOT)
    while not (pid.is_file() and pid.read_text()):
        assert call.poll() is None
        time.sleep(0.1)
    call.terminate()
    assert call.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    (results,) = (tmp_path / "results").glob("*.json")
    assert "slow" not in json.loads(results.read_text())["validation"]


def test_only_tests_of_the_cuda_kernels_need_them(tmp_path):
    first, second, *_ = stages(tmp_path, dry_run=False).values()
    assert all(step.cuda for step in first)
    assert not any(step.cuda for step in second)


def test_what_a_training_logged_is_recorded(validation, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 2.0, "images_per_second": 1.0},
        {"step": 100, "loss": 0.75, "images_per_second": 300.0},
        {"step": 150, "skipped": "the loss is nan"},
        {"step": 200, "loss": 0.5, "images_per_second": 500.0},
    ]
    code = f"open({str(metrics)!r}, 'w').write({''.join(json.dumps(line) + chr(10) for line in lines)!r})"
    run(validation, python("train", code, metrics=metrics))
    assert validation.steps()["train"]["training"] == {
        "steps": 200,
        "images per second": 400,
        "first loss": 2,
        "last loss": 0.5,
        "not finite": ["step 150: the loss is nan"],
    }
    assert validate.training(tmp_path / "absent")["images per second"] is None


def test_results_of_another_machine_of_the_kind_count(validation, tmp_path):
    """A fresh machine goes on from the results file that was carried to it."""
    run(validation, python("once", ""))
    other = tmp_path / "fresh"
    other.mkdir()
    (other / validation.path.name).write_bytes(validation.path.read_bytes())
    complete, said = run(validate.Validation(other, dry_run=True), python("once", "raise SystemExit(1)"))
    assert complete
    assert "passed on" in said[0]


def test_every_test_for_a_gpu_belongs_to_a_step(tmp_path):
    """What the steps that take a file leave of its tests marked `gpu` is nothing."""
    steps = [step for steps in stages(tmp_path, dry_run=False).values() for step in steps]
    commands = [step.command for step in steps if step.command[0] == sys.executable and "-k" in step.command]
    ends = [command[command.index("-k") + 1 :] for command in commands]
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
@pytest.mark.parametrize("stage", [1, 2, 3, 4, 5])
def test_dry_run(tmp_path, capsys, stage):
    assert validate.main([str(stage), "--dry-run", "--output", str(tmp_path)]) == 0, capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())
    assert data["dry_run"]
    assert len(data["validation"]) == len(stages(tmp_path, dry_run=True)[stage]) + 1
    assert "dry run" in data["device"]
    trained = [step["training"] for step in data["validation"].values() if "training" in step]
    assert len(trained) == (2 if stage == 5 else 0)
    assert all(facts["steps"] == 2 and facts["not finite"] == [] for facts in trained)
