"""Tests of what happens before the first step of a run."""

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch

from litevae.errors import UserError
from litevae.experiments.run import run_experiment
from litevae.experiments.spec import Setup
from litevae.training import train


def test_a_resumed_run_keeps_its_precision_on_another_kind_of_machine(
    tiny, tmp_path, no_pictures, cpu_multiplies, capsys, logged, assert_same_run
):
    def on(precisions, *settings, name="run"):
        cpu_multiplies(*precisions)
        train(tiny("max_steps=4", "checkpoint.every=2", *settings, name=name))
        (line,) = [each for each in capsys.readouterr().err.splitlines() if "precision=auto" in each] or [""]
        return line.rpartition("\r")[2]

    with_bf16, without = ["bf16"], []
    assert (
        on(with_bf16, "precision=auto", name="whole") == "precision=auto: bf16, which this machine multiplies"
    )
    assert "precision: bf16" in (tmp_path / "whole" / "config.yaml").read_text().splitlines()
    on(with_bf16, "precision=bf16", name="explicit")
    assert logged(tmp_path / "whole") == logged(tmp_path / "explicit")
    on(without, "precision=auto", name="fp32")
    assert logged(tmp_path / "whole") != logged(tmp_path / "fp32")

    on(with_bf16, "precision=auto")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    line = on(without, "precision=auto", "resume=auto")
    assert line == f"precision=auto: bf16, as in {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}"
    assert_same_run(tmp_path / "whole", tmp_path / "run")

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    train(tiny("max_steps=4", "checkpoint.every=2", "precision=fp32", "resume=auto"))
    assert "was trained with other settings of precision" in capsys.readouterr().err


def test_the_precision_is_told_only_when_the_run_begins(tiny, capsys, training_error):
    for setting in (
        "data.size=1000000",
        "init=nowhere",
        "resume=nowhere",
        "data.train=nowhere",
        "data.size=34",
    ):
        training_error(tiny("precision=auto", setting))
        assert "precision" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("precision=fp16", "precision=fp16 needs a GPU"),
        ("tracker=wandb", "tracker=wandb is not installed: pip install wandb"),
    ],
)
def test_precision_and_tracker_that_this_machine_lacks(tiny, monkeypatch, training_error, setting, message):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert message in training_error(tiny(setting))


def test_output_folder_that_cannot_be_made(tiny, tmp_path, training_error):
    (tmp_path / "file").touch()
    assert "cannot write to" in training_error(tiny(name="file/run"))
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (
        ("loop", "exists and is not a folder"),
        ("loop/x", "Too many levels"),
        ("n" * 5000, "too long"),
    ):
        message = training_error(tiny(name=name))
        assert message.startswith("cannot write to ")
        assert reason in message
        assert name[:100] in message
        assert len(message) <= 400


def test_a_folder_called_model_that_no_run_has_written_is_not_deleted(tiny, tmp_path, training_error):
    precious = tmp_path / "run" / "model" / "source.py"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    assert "exists and is not a model" in training_error(tiny())
    assert precious.read_text() == "mine"


def test_a_finished_model_without_checkpoints_is_not_replaced(
    tiny, tmp_path, no_pictures, training_error, capsys
):
    train(tiny("max_steps=1", "checkpoint.every=0"))
    before = (tmp_path / "run" / "model" / "config.json").stat().st_mtime_ns
    for settings in ((), ("resume=auto",), ("checkpoint.every=1",)):
        message = training_error(tiny("max_steps=1", *settings))
        assert "run/model is the model of a run without checkpoints, which cannot be continued" in message
        assert "give another output_dir, or delete it to train anew" in message
    assert (tmp_path / "run" / "model" / "config.json").stat().st_mtime_ns == before
    train(tiny("max_steps=1", "checkpoint.every=0"), replace=True)
    assert (tmp_path / "run" / "model" / "config.json").stat().st_mtime_ns > before


HOLDER = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.write("litevae train (process 12)")
    file.flush()
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(tiny, tmp_path, training_error):
    (tmp_path / "run").mkdir()
    child = [sys.executable, "-c", HOLDER, tmp_path / "run" / ".lock"]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        message = training_error(tiny())
        with pytest.raises(UserError, match=r"process 12"):
            run_experiment("table09", Setup("tiny", tmp_path / "run", overrides=["max_steps=9"]))
        other.kill()
    assert message.startswith(f"{tmp_path / 'run'}: litevae train (process 12) is writing there: wait until")
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name != "images"] == [".lock"]
