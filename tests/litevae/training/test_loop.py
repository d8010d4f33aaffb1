"""The training loop: how a run resumes, stops and fails, and what is checked before it begins."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import litevae.training.trainer as trainer_module
from litevae.data.bad_images import BadImages
from litevae.data.batches import Batches
from litevae.errors import NonFiniteError, UserError, WorkerDied
from litevae.training import train

STAGES = ["stages=[{start: 6, size: 48, batch_size: 4}]"]


def test_a_run_killed_at_ten_random_instants_ends_with_the_same_bits(
    tmp_path, tiny_settings, adversarial_settings, logged, checkpoint_names, assert_same_run
):
    settings = [
        *tiny_settings,
        *adversarial_settings,
        *STAGES,
        "max_steps=14",
        "checkpoint.every=1",
        "validate_every=7",
        "ema_decay=0.999",
    ]
    script = Path(__file__).with_name("killed.py")
    for name, kills in (("whole", 0), ("killed", 10)):
        result = subprocess.run(
            [sys.executable, script, tmp_path / name, str(kills), "0", *settings],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        print(result.stdout)
    names = checkpoint_names(tmp_path / "killed")
    assert "step-00000014" in names
    assert not any(name.startswith(".") for name in names)
    assert len(logged(tmp_path / "whole")) == 14
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


SAVING = ["max_steps=6", "checkpoint.every=2", "ema_decay=0.9", "optimizer.accumulation=2"]


def test_a_preempted_run_continues_as_if_it_had_not_been_stopped(
    tiny, tmp_path, no_pictures, monkeypatch, checkpoint_names, assert_same_run
):
    train(tiny(*SAVING, name="whole"))
    original, signals = trainer_module.Trainer.update, [signal.SIGTERM]

    def update(self, batch, step, stop):
        if step == 3 and signals:
            signal.raise_signal(signals.pop())
        return original(self, batch, step, stop)

    monkeypatch.setattr(trainer_module.Trainer, "update", update)
    result = train(tiny(*SAVING))
    # The signal arrives within the step, and the run ends after the next one.
    assert (result.steps, result.stopped_by) == (4, "SIGTERM")
    assert checkpoint_names(tmp_path / "run") == ["step-00000002", "step-00000004"]
    for _ in range(2):  # the second time, no steps are left
        assert train(tiny(*SAVING, "resume=auto")).steps == 6
        assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_that_does_not_fit_the_settings_is_refused(
    two_checkpoints, tiny, adversarial_settings, checkpoint_names, training_error
):
    def error(*settings):
        return training_error(tiny("resume=auto", *settings))

    assert "latent_channels is 4 there and 5 here" in error("model.latent_channels=5")
    assert "AutoencoderKL" in error(
        "model.kind=sd-vae", "model.decoder_norm=group", "model.output_type=image"
    )
    assert "no averaged model" in error("ema_decay=0.9")
    assert "no discriminator" in error(*adversarial_settings)
    assert "trained other weights of the autoencoder" in error("freeze_encoder=true")
    assert checkpoint_names(two_checkpoints) == ["step-00000001", "step-00000002"]


def test_a_resumed_run_names_the_settings_that_have_changed(tiny, no_pictures, capsys):
    train(tiny("max_steps=1", "checkpoint.every=1"))

    def warnings(*settings):
        train(tiny("checkpoint.every=1", "resume=auto", *settings))
        return [line for line in capsys.readouterr().err.splitlines() if "was trained with" in line]

    assert warnings("max_steps=2", "log_every=2", "optimizer.learning_rate=1e-3") == []
    (line,) = warnings("max_steps=3", "seed=1", "loss.l2=1", "data.batch_size=4")
    assert line.endswith("step-00000002 was trained with other settings of seed, data, loss")
    assert len(warnings("max_steps=4", *STAGES)) == 1
    assert warnings("max_steps=4", *STAGES) == []


def test_a_full_disk_is_reported_beside_the_error_that_ended_the_run(tiny, no_pictures, monkeypatch, capsys):
    def fail(self):
        raise OSError(errno.ENOSPC, "cannot be written: No space left on device")

    monkeypatch.setattr(trainer_module.Trainer, "save", fail)
    diverging = "optimizer.learning_rate=1e6", "optimizer.warmup_steps=0", "max_bad_steps=1"
    with pytest.raises(NonFiniteError):
        train(tiny("max_steps=9", *diverging))
    assert "cannot be written: No space left on device" in capsys.readouterr().err


def test_too_many_bad_images_end_the_run_before_they_are_trained_on(
    tiny, tmp_path, no_pictures, monkeypatch, logged, checkpoint_names
):
    settings = ["max_steps=6", "checkpoint.every=100"]
    train(tiny(*settings, name="whole"))
    original = BadImages.add
    with monkeypatch.context() as patch:
        reports = iter([[], [], [], [("cut.png", "cut")]])
        patch.setattr(BadImages, "add", lambda self, bad: original(self, next(reports)))
        with pytest.raises(UserError, match="1 of 8 images cannot be used"):
            train(tiny(*settings))
    assert checkpoint_names(tmp_path / "run") == ["step-00000003"]
    (tmp_path / "run" / "bad_images.txt").unlink()
    train(tiny(*settings, "resume=auto"))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_the_checkpoint_is_from_before_the_non_finite_steps(
    tiny, tmp_path, no_pictures, monkeypatch, logged, checkpoint_names
):
    settings = ["max_steps=6", "checkpoint.every=100", "max_bad_steps=2"]
    train(tiny(*settings, name="whole"))
    original = trainer_module.Trainer.update

    def update(self, batch, step, stop):
        return original(self, batch.float().fill_(torch.inf) if step > 3 else batch, step, stop)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "update", update)
        with pytest.raises(NonFiniteError, match="step 4: the l1 loss is"):
            train(tiny(*settings))
    assert checkpoint_names(tmp_path / "run") == ["step-00000003"]
    train(tiny(*settings, "resume=auto"))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_a_worker_that_dies_ends_the_run_with_a_checkpoint(
    tiny, tmp_path, no_pictures, monkeypatch, logged, checkpoint_names
):
    settings = ["max_steps=5", "checkpoint.every=100", "data.workers=0"]
    train(tiny(*settings, name="whole"))
    original, batches = Batches.__next__, iter(range(3))

    def die(self):
        if next(batches, None) is None:
            raise WorkerDied("a worker died")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__next__", die)
        with pytest.raises(WorkerDied) as caught:
            train(tiny(*settings))
    newest = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert str(caught.value) == f"a worker died; {newest} is saved: continue with resume=auto"
    assert checkpoint_names(tmp_path / "run") == ["step-00000003"]
    train(tiny(*settings, "resume=auto"))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
