"""Checkpoints: which are kept, which can be read, and what a full disk or a damaged file does."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data

import litevae.evaluation.metrics as metrics_module
import litevae.evaluation.validation as validation_module
from litevae.errors import UserError
from litevae.evaluation.validation import Validation
from litevae.models.loading import load_model
from litevae.training import train
from litevae.training.checkpoint import Checkpoint, choose_checkpoint, find_checkpoints, open_checkpoint


def flip(path):
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_choice_of_checkpoint_that_cannot_be_resumed_is_refused(
    two_checkpoints, tiny, tmp_path, checkpoint_names, training_error
):
    older = two_checkpoints / "checkpoints" / "step-00000001"
    elsewhere = f"output_dir={tmp_path / 'other'}"
    assert "no such folder" in training_error(tiny("resume=nowhere", elsewhere))
    assert "no complete checkpoint" in training_error(tiny(f"resume={tmp_path}", elsewhere))
    assert "continue with resume=auto" in training_error(tiny())
    assert "continue with resume=auto" in training_error(tiny(f"resume={older}"))
    assert checkpoint_names(two_checkpoints) == ["step-00000001", "step-00000002"]


def test_code_in_state_pt_is_not_run(two_checkpoints, tiny, training_error):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(two_checkpoints / "made"),)

    path = two_checkpoints / "checkpoints" / "step-00000002" / "state.pt"
    size = path.stat().st_size
    torch.save({"random": Code()}, path)
    assert path.stat().st_size < size
    with open(path, "ab") as file:  # pads it to the length in the manifest
        file.write(b"\0" * (size - path.stat().st_size))
    manifest = path.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    content["files"]["state.pt"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    assert "state.pt: cannot be read" in training_error(tiny("resume=auto"))
    assert not (two_checkpoints / "made").exists()


def test_an_incomplete_checkpoint_is_passed_over(two_checkpoints, tiny):
    folder = two_checkpoints / "checkpoints"
    (folder / "step-00000002" / "state.pt").write_bytes(b"cut")
    assert [each.step for each in find_checkpoints(folder)] == [1]
    train(tiny("max_steps=2", "checkpoint.every=1", "resume=auto"))
    assert [each.step for each in find_checkpoints(folder)] == [1, 2]


class TestDamage:
    SETTINGS = ("max_steps=2", "checkpoint.every=1", "ema_decay=0.9")

    @pytest.fixture
    def run(self, tiny, no_pictures, adversarial_settings):
        config = tiny(*self.SETTINGS, *adversarial_settings)
        train(config)
        return Path(config.output_dir) / "checkpoints"

    def test_one_flipped_bit_in_any_file_is_noticed(self, run, tmp_path):
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

    def test_resume_auto_continues_from_the_checkpoint_before(
        self, run, tiny, adversarial_settings, capsys, logged, tmp_path, checkpoint_names
    ):
        before = logged(tmp_path / "run")
        flip(run / "step-00000002" / "state.pt")
        # The damaged checkpoint must not count as one to keep.
        train(tiny(*self.SETTINGS, *adversarial_settings, "resume=auto", "checkpoint.keep=1"))
        assert checkpoint_names(tmp_path / "run") == ["damaged-step-00000002", "step-00000002"]
        assert logged(tmp_path / "run") == before
        warnings = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert len(warnings) == 1
        assert f"continuing from {run / 'step-00000001'}" in warnings[0]

    def test_a_new_run_does_not_replace_damaged_checkpoints(self, run):
        for path in run.iterdir():
            flip(path / "model" / "diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match="no older one that is intact"):
            choose_checkpoint("auto", run)
        assert sorted(path.name for path in run.iterdir()) == ["step-00000001", "step-00000002"]

    @pytest.mark.parametrize("resume", ["auto", ""])
    def test_a_new_run_does_not_replace_incomplete_checkpoints(self, run, resume):
        for path in run.iterdir():
            (path / "state.pt").write_bytes(b"cut")
        with pytest.raises(
            UserError,
            match=r"step-00000002/state.pt: has 3 bytes, not \d+, and .* has no checkpoint that is intact: delete them",
        ):
            choose_checkpoint(resume, run)

    def test_a_refused_checkpoint_is_named_with_the_reason(self, run, capsys, tmp_path, checkpoint_names):
        manifest = run / "step-00000002" / "manifest.json"
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(content | {"files": {}}))
        with pytest.raises(UserError) as caught:
            choose_checkpoint(str(run / "step-00000002"), tmp_path / "none")
        reason = f"resume: {manifest}: files must name state.pt, got []"
        assert str(caught.value) == reason
        (run / "step-notes").mkdir()  # not a checkpoint
        assert choose_checkpoint(str(run.parent), tmp_path / "none").step == 1
        assert capsys.readouterr().err == f"{reason}; continuing from {run / 'step-00000001'}\n"
        assert choose_checkpoint("auto", run).step == 1
        renamed = "renamed to damaged-step-00000002, continuing from"
        assert capsys.readouterr().err == f"{reason}; {renamed} {run / 'step-00000001'}\n"
        assert checkpoint_names(tmp_path / "run") == ["damaged-step-00000002", "step-00000001", "step-notes"]

    def test_an_older_refused_checkpoint_stays(self, run, capsys, tmp_path, checkpoint_names):
        (run / "step-00000001" / "manifest.json").unlink()
        assert (
            choose_checkpoint("auto", run).step
            == choose_checkpoint(str(run.parent), tmp_path / "a").step
            == 2
        )
        assert capsys.readouterr().err == ""
        assert checkpoint_names(tmp_path / "run") == ["step-00000001", "step-00000002"]


def test_a_full_disk_gives_a_one_line_error_and_loses_no_checkpoint(
    tiny, tmp_path, no_pictures, monkeypatch, checkpoint_names
):
    train(tiny("max_steps=2", "checkpoint.every=1"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("step-*/**/*") if path.is_file()}
    original, writes = os.fsync, iter(range(2))

    def fsync(descriptor):
        original(descriptor)
        if next(writes, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="step-00000003: cannot be written: No space left on device") as caught:
        train(tiny("max_steps=4", "checkpoint.every=1", "resume=auto"))
    assert "\n" not in str(caught.value)
    assert checkpoint_names(tmp_path / "run") == ["step-00000001", "step-00000002"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_last_checkpoints_and_the_best_one_are_kept(
    tiny, tmp_path, no_pictures, monkeypatch, checkpoint_names
):
    values = iter([10.0, 12.0, 11.0, 9.0, 8.0, 7.0])
    monkeypatch.setattr(validation_module, "psnr", lambda *_: next(values))
    train(tiny("max_steps=6", "checkpoint.every=1", "checkpoint.keep=2", "validate_every=1"))
    assert checkpoint_names(tmp_path / "run") == ["step-00000002", "step-00000005", "step-00000006"]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert (manifest["step"], manifest["psnr"], manifest["config"]["max_steps"]) == (2, 12.0, 6)


def test_resume_auto_says_that_a_run_without_checkpoints_starts_anew(tmp_path, capsys):
    assert choose_checkpoint("auto", tmp_path / "checkpoints") is None
    assert capsys.readouterr().err == ""
    (tmp_path / "metrics.jsonl").touch()
    assert choose_checkpoint("auto", tmp_path / "checkpoints") is None
    assert "holds no checkpoint; starting from step 1" in capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of two files, and a function that rewrites its manifest."""
    folder = tmp_path / "checkpoints" / "step-00000003"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "state.pt").write_text("state")
    (tmp_path / "outside").write_text("state")
    digest = hashlib.sha256(b"state").hexdigest()

    def rewrite(**changes):
        files = {"state.pt": {"bytes": 5, "sha256": digest}}
        content = {"step": 3, "psnr": None, "config": {}, "files": files} | changes
        (folder / "manifest.json").write_text(json.dumps(content))
        try:
            return open_checkpoint(folder)
        except UserError as error:
            return str(error)

    assert rewrite() == Checkpoint(folder, 3, {})
    return folder, rewrite, digest


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "../../outside", "link", "linked/config.json", "fifo", "model", "", ".", "a\0", "\ud800"],
)
def test_a_manifest_names_only_regular_files_of_its_folder(checkpoint, name):
    folder, rewrite, digest = checkpoint
    (folder / "link").symlink_to("../../outside")
    (folder / "linked").symlink_to("model")
    os.mkfifo(folder / "fifo")
    for size in (5, 2, 0, 4096):
        files = {name: {"bytes": size, "sha256": digest}, "state.pt": {"bytes": 5, "sha256": digest}}
        reason = rewrite(files=files)
        assert (
            "is not within the checkpoint" in reason
            or "not a regular file" in reason
            or "cannot be" in reason
        )
        assert reason.startswith(str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": value} for value in (None, True, "3", 3.0, -1, 10**30, [])),
        *({"psnr": value} for value in (True, "1", [], {})),
        *({"files": value} for value in (None, [], {"state.pt": None}, {"state.pt": {"bytes": 5}})),
        *({"files": value} for value in ({}, {"model/config.json": {"bytes": 2, "sha256": "0"}})),
        *({"files": {"state.pt": {"bytes": size, "sha256": "0"}}} for size in (True, 5.0, "5", [])),
        *({"config": value} for value in (None, [], 1)),
    ],
    ids=str,
)
def test_a_manifest_of_wrong_types_is_refused(checkpoint, changes):
    folder, rewrite, _ = checkpoint
    assert rewrite(**changes).startswith(f"{folder / 'manifest.json'}: {next(iter(changes))} must ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("[]", "not the manifest of a checkpoint"),
        ("[" * 5000, "nested too deeply"),
        ("null", "not the manifest of a checkpoint"),
        ('{"step": 1}', "config must be a mapping"),
        ("9" * 5000, "has a whole number of more than"),
    ],
)
def test_a_manifest_that_is_something_else_is_refused(checkpoint, content, reason):
    folder, *_ = checkpoint
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=f"manifest.json: {reason}"):
        open_checkpoint(folder)


def test_a_manifest_that_is_a_fifo_is_none(checkpoint):
    folder, *_ = checkpoint
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert find_checkpoints(folder.parent) == []


@pytest.mark.parametrize("change", [{"random": 1}, {"optimizers": {}}, {"seconds": None}, None])
def test_a_state_of_other_entries_is_refused(two_checkpoints, tiny, training_error, change):
    path = two_checkpoints / "checkpoints" / "step-00000002" / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save([] if change is None else {**state, **change}, path)
    manifest = path.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    content["files"]["state.pt"] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(content))
    message = training_error(tiny("resume=auto"))
    assert "state.pt: " in message
    assert "does not hold the state" in message or "not a state that litevae has written" in message


def test_the_best_checkpoint_is_chosen_by_any_metric(
    tiny, tmp_path, no_pictures, monkeypatch, checkpoint_names
):
    class Constant(torch.nn.Module):
        values = iter([0.5, 0.3, 0.4, 0.4])

        def forward(self, *_):
            return torch.tensor(next(self.values))

    monkeypatch.setattr(metrics_module, "LPIPS", Constant)
    settings = ["max_steps=4", "checkpoint.every=1", "checkpoint.keep=1", "validate_every=1"]
    train(tiny(*settings, "validate_metrics=[lpips]", "checkpoint.best_by=lpips"))
    assert checkpoint_names(tmp_path / "run") == ["step-00000002", "step-00000004"]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert manifest["lpips"] == pytest.approx(0.3)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"]
    assert metrics["lpips"] == pytest.approx(0.4)
    assert [point["lpips"] for point in metrics["history"]] == pytest.approx([0.5, 0.3, 0.4, 0.4])


@pytest.mark.usefixtures("stand_in_networks")
def test_every_metric_is_in_the_manifest_and_in_the_history(tiny, tmp_path, no_pictures):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(data.chelsea()[50 * i : 50 * i + 32, :32]).save(folder / f"{i}.png")
    names = ["rfid", "lpips", "st_lpips"]
    config = tiny(
        "max_steps=1",
        f"validate_metrics=[{','.join(names)}]",
        "checkpoint.best_by=st_lpips",
        "checkpoint.every=1",
        f"data.validation={folder}",
    )
    result = train(config)
    found, _ = Validation([data.chelsea()[50 * i : 50 * i + 32, :32].copy() for i in range(2)], names)(
        load_model(result.output_dir)
    )
    assert list(found) == [*names, "psnr", "ssim"]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json").read_text())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"]
    for measured in (manifest, metrics, metrics["history"][-1], result.metrics):
        assert {name: measured[name] for name in found} == pytest.approx(found, rel=1e-4)


def test_a_metric_that_is_not_measured_cannot_choose_the_best(tiny):
    with pytest.raises(UserError, match=r"checkpoint\.best_by=rfid is not measured: add rfid"):
        tiny("checkpoint.best_by=rfid", "validate_metrics=[lpips]")
