"""Checkpoints: a run that ended for any reason continues as if it had not ended."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import litevae.training.loop as loop_module
import litevae.training.trainer as trainer_module
from litevae.data.bad_images import BadImages
from litevae.errors import NonFiniteError, UserError
from litevae.training import train
from litevae.training.checkpoint import choose_checkpoint, find_checkpoints

STAGES = ["stages=[{start: 6, size: 48, batch_size: 4}]"]


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def weights(folder):
    (*_, newest) = find_checkpoints(folder / "checkpoints")
    return {
        (path.relative_to(newest.path), name): tensor
        for path in newest.path.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.fixture
def assert_same_run(logged):
    def compare(first, second):
        assert logged(first) == logged(second)
        ours, theirs = weights(first), weights(second)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    return compare


def test_killed_at_ten_random_instants_the_run_is_the_same_to_the_bit(
    tmp_path, tiny_settings, adversarial_settings, logged, assert_same_run
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
    assert "step-00000014" in names(tmp_path / "killed")
    assert not any(name.startswith(".") for name in names(tmp_path / "killed"))
    assert len(logged(tmp_path / "whole")) == 14
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


SAVING = ["max_steps=6", "checkpoint.every=2", "ema_decay=0.9", "optimizer.accumulation=2"]


def test_a_preempted_run_goes_on_as_if_it_had_not_been(
    tiny, tmp_path, no_pictures, monkeypatch, assert_same_run
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
    assert names(tmp_path / "run") == ["step-00000002", "step-00000004"]
    for _ in range(2):  # the second time nothing is left to do
        assert train(tiny(*SAVING, "resume=auto")).steps == 6
        assert_same_run(tmp_path / "whole", tmp_path / "run")


class TestRefusal:
    @pytest.fixture
    def run(self, tiny, no_pictures):
        config = tiny("max_steps=2", "checkpoint.every=1")
        train(config)
        return Path(config.output_dir)

    def refused(self, config):
        with pytest.raises(UserError) as caught:
            train(config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_what_cannot_be_resumed_is_named(self, run, tiny, tmp_path, adversarial_settings):
        newest = run / "checkpoints" / "step-00000002"
        elsewhere = f"output_dir={tmp_path / 'other'}"
        assert "latent_channels is 4 there and 5 here" in self.refused(
            tiny("resume=auto", "model.latent_channels=5")
        )
        assert "AutoencoderKL" in self.refused(
            tiny("resume=auto", "model.kind=sd-vae", "model.decoder_norm=group", "model.output_type=image")
        )
        assert "no averaged model" in self.refused(tiny("resume=auto", "ema_decay=0.9"))
        assert "no discriminator" in self.refused(tiny("resume=auto", *adversarial_settings))
        assert "trained other weights of the autoencoder" in self.refused(
            tiny("resume=auto", "freeze_encoder=true")
        )
        assert "no such folder" in self.refused(tiny("resume=nowhere", elsewhere))
        assert "no complete checkpoint" in self.refused(tiny(f"resume={tmp_path}", elsewhere))
        assert "continue with resume=auto" in self.refused(tiny())
        assert "continue with resume=auto" in self.refused(
            tiny(f"resume={newest.with_name('step-00000001')}")
        )
        assert names(run) == ["step-00000001", "step-00000002"]

    def test_state_with_code_in_it_is_not_run(self, run, tiny):
        class Code:
            def __reduce__(self):
                return os.mkdir, (str(run / "made"),)

        path = run / "checkpoints" / "step-00000002" / "state.pt"
        size = path.stat().st_size
        torch.save({"random": Code()}, path)
        assert path.stat().st_size < size
        with open(path, "ab") as file:  # of the length in the manifest
            file.write(b"\0" * (size - path.stat().st_size))
        manifest = path.with_name("manifest.json")
        note = json.loads(manifest.read_text())
        note["files"]["state.pt"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(note))
        assert "state.pt: cannot be read" in self.refused(tiny("resume=auto"))
        assert not (run / "made").exists()

    def test_an_incomplete_checkpoint_is_passed_over(self, run, tiny):
        newest = run / "checkpoints" / "step-00000002"
        (newest / "state.pt").write_bytes(b"cut")
        assert [each.step for each in find_checkpoints(run / "checkpoints")] == [1]
        train(tiny("max_steps=2", "checkpoint.every=1", "resume=auto"))
        assert [each.step for each in find_checkpoints(run / "checkpoints")] == [1, 2]


def test_changed_settings_are_named_when_a_run_is_resumed(tiny, no_pictures, capsys):
    train(tiny("max_steps=1", "checkpoint.every=1"))

    def said(*settings):
        train(tiny("checkpoint.every=1", "resume=auto", *settings))
        return [line for line in capsys.readouterr().err.splitlines() if "was trained with" in line]

    assert said("max_steps=2", "log_every=2", "optimizer.learning_rate=1e-3") == []
    (line,) = said("max_steps=3", "seed=1", "loss.l2=1", "data.batch_size=4")
    assert line.endswith("step-00000002 was trained with other settings of seed, data, loss")
    assert len(said("max_steps=4", *STAGES)) == 1
    assert said("max_steps=4", *STAGES) == []


def flip(path):
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class TestDamage:
    SETTINGS = ("max_steps=2", "checkpoint.every=1", "ema_decay=0.9")

    @pytest.fixture
    def run(self, tiny, no_pictures, adversarial_settings):
        config = tiny(*self.SETTINGS, *adversarial_settings)
        train(config)
        return Path(config.output_dir) / "checkpoints"

    def test_one_bit_of_any_file_is_noticed(self, run, tmp_path):
        newest = run / "step-00000002"
        files = sorted(path.relative_to(newest) for path in newest.rglob("*.*") if path.is_file())
        assert {path.as_posix() for path in files} == {
            "discriminator.safetensors",
            "ema/config.json",
            "ema/diffusion_pytorch_model.safetensors",
            "manifest.json",
            "model/config.json",
            "model/diffusion_pytorch_model.safetensors",
            "state.pt",
        }
        assert choose_checkpoint(str(newest), tmp_path / "none").step == 2
        for file in files:
            if file.name == "manifest.json":  # it holds the hashes of the others
                continue
            flip(newest / file)
            with pytest.raises(UserError, match="damaged") as caught:
                choose_checkpoint(str(newest), tmp_path / "none")
            assert str(caught.value).startswith(f"resume: {newest / file}: ")
            assert "\n" not in str(caught.value)
            flip(newest / file)

    def test_resume_auto_goes_back_to_the_one_before(
        self, run, tiny, adversarial_settings, capsys, logged, tmp_path
    ):
        before = logged(tmp_path / "run")
        flip(run / "step-00000002" / "state.pt")
        # The damaged checkpoint must not count as the one to keep.
        train(tiny(*self.SETTINGS, *adversarial_settings, "resume=auto", "checkpoint.keep=1"))
        assert names(tmp_path / "run") == ["damaged-step-00000002", "step-00000002"]
        assert logged(tmp_path / "run") == before
        said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert len(said) == 1
        assert f"continuing from {run / 'step-00000001'}" in said[0]

    def test_a_run_does_not_begin_anew_over_damaged_ones(self, run):
        for path in run.iterdir():
            flip(path / "model" / "diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match="no older one that is intact"):
            choose_checkpoint("auto", run)
        assert sorted(path.name for path in run.iterdir()) == ["step-00000001", "step-00000002"]

    @pytest.mark.parametrize("resume", ["auto", ""])
    def test_a_run_does_not_begin_anew_over_incomplete_ones(self, run, resume):
        for path in run.iterdir():
            (path / "state.pt").write_bytes(b"cut")
        with pytest.raises(
            UserError, match=r"step-00000002: damaged, and .* has none that is intact: delete them"
        ):
            choose_checkpoint(resume, run)


def test_a_full_disk_is_said_beside_what_else_ended_the_run(tiny, no_pictures, monkeypatch, capsys):
    def fail(self):
        raise OSError(errno.ENOSPC, "cannot be written: No space left on device")

    monkeypatch.setattr(trainer_module.Trainer, "save", fail)
    losses = "optimizer.learning_rate=1e6", "optimizer.warmup_steps=0", "max_bad_steps=1"
    with pytest.raises(NonFiniteError):
        train(tiny("max_steps=9", *losses))
    assert "cannot be written: No space left on device" in capsys.readouterr().err


def test_full_disk_is_one_line_and_loses_no_checkpoint(tiny, tmp_path, no_pictures, monkeypatch):
    train(tiny("max_steps=2", "checkpoint.every=1"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("step-*/**/*") if path.is_file()}
    original, left = os.fsync, iter(range(2))

    def fsync(descriptor):
        original(descriptor)
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="step-00000003: cannot be written: No space left on device") as caught:
        train(tiny("max_steps=4", "checkpoint.every=1", "resume=auto"))
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "run") == ["step-00000001", "step-00000002"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_last_ones_and_the_best_are_kept(tiny, tmp_path, no_pictures, monkeypatch):
    values = iter([10.0, 12.0, 11.0, 9.0, 8.0, 7.0])
    monkeypatch.setattr(trainer_module, "psnr", lambda *_: next(values))
    train(tiny("max_steps=6", "checkpoint.every=1", "checkpoint.keep=2", "validate_every=1"))
    assert names(tmp_path / "run") == ["step-00000002", "step-00000005", "step-00000006"]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert (manifest["step"], manifest["psnr"], manifest["config"]["max_steps"]) == (2, 12.0, 6)


def test_a_validation_writes_one_checkpoint_if_it_is_the_best_or_if_one_is_due(
    tiny, no_pictures, monkeypatch
):
    values = iter([10.0, 9.0, 11.0, 12.0, 8.0, 7.0])
    monkeypatch.setattr(trainer_module, "psnr", lambda *_: next(values))
    original, written = loop_module.save_checkpoint, []

    def save_checkpoint(folder, step, *arguments):
        written.append(step)
        return original(folder, step, *arguments)

    monkeypatch.setattr(loop_module, "save_checkpoint", save_checkpoint)
    train(tiny("max_steps=6", "checkpoint.every=4", "validate_every=1"))
    assert written == [1, 3, 4, 6]


def test_too_many_bad_images_are_not_trained_on(tiny, tmp_path, no_pictures, monkeypatch, logged):
    settings = ["max_steps=6", "checkpoint.every=100"]
    train(tiny(*settings, name="whole"))
    original = BadImages.add
    with monkeypatch.context() as patch:
        reports = iter([[], [], [], [("cut.png", "cut")]])
        patch.setattr(BadImages, "add", lambda self, bad: original(self, next(reports)))
        with pytest.raises(UserError, match="1 of 8 images cannot be used"):
            train(tiny(*settings))
    assert names(tmp_path / "run") == ["step-00000003"]
    (tmp_path / "run" / "bad_images.txt").unlink()
    train(tiny(*settings, "resume=auto"))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_non_finite_steps_are_not_in_the_checkpoint(tiny, tmp_path, no_pictures, monkeypatch, logged):
    """The stopped run continues from the step before the first of them."""
    settings = ["max_steps=6", "checkpoint.every=100", "max_bad_steps=2"]
    train(tiny(*settings, name="whole"))
    original = trainer_module.Trainer.update

    def update(self, batch, step, stop):
        return original(self, batch.float().fill_(torch.inf) if step > 3 else batch, step, stop)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "update", update)
        with pytest.raises(NonFiniteError, match="step 4: the l1 loss is"):
            train(tiny(*settings))
    assert names(tmp_path / "run") == ["step-00000003"]
    train(tiny(*settings, "resume=auto"))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
