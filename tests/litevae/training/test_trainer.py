"""Runs of the trainer: their files, their errors and how they end."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import litevae.evaluation.validation as validation_module
import litevae.training.loop as loop_module
import litevae.training.trainer as trainer_module
from litevae import LiteVAE
from litevae.data.squares import middle_square
from litevae.errors import NonFiniteError, UserError
from litevae.evaluation.metrics import psnr, ssim
from litevae.evaluation.reconstruction import reconstruct
from litevae.evaluation.yardsticks import measure_yardsticks
from litevae.training import load_config, train

SHORT = [
    "initialise=random",
    "loss.l1=1",
    "loss.l2=0",
    "loss.wavelet=1",
    "loss.gaussian=0.5",
    "loss.kl=1e-4",
    "optimizer.learning_rate=2e-3",
    "max_steps=20",
    "precision=fp32",
    "data.size=32",
    "data.batch_size=2",
    "log_every=5",
    "validate_every=10",
]
FILES = {
    ".lock",
    "config.yaml",
    "curves.png",
    "metrics.json",
    "metrics.jsonl",
    "model",
    "reconstructions.png",
    "validation",
}


def short(folder, *overrides):
    return load_config("demo", [*SHORT, f"output_dir={folder}", *overrides])


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "deep" / "demo"
    return folder, train(short(folder, "data.size=64", "data.batch_size=4"))


class TestFinishedRun:
    def test_leaves_exactly_these_files(self, finished):
        assert {path.name for path in finished[0].iterdir()} == FILES

    def test_log_has_every_loss_and_the_total_falls(self, finished):
        lines = logged(finished[0])
        assert [line["step"] for line in lines] == [1, 5, 10, 15, 20]
        weights = load_config("demo", SHORT).loss
        for line in lines:
            weighted = {
                f"weighted/{name}": getattr(weights, name) * line[name]
                for name in ("l1", "kl", "wavelet", "gaussian")
            }
            found = {name: value for name, value in line.items() if name.startswith("weighted/")}
            assert found == pytest.approx(weighted, rel=1e-5)
            assert line["loss"] == pytest.approx(sum(weighted.values()), rel=1e-5)
            assert line["images_per_second"] > 0
        assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]

    def test_metrics_are_those_of_the_saved_model(self, finished):
        folder, result = finished
        metrics = json.loads((folder / "metrics.json").read_text())
        assert [point["step"] for point in metrics["validation"]["history"]] == [10, 20]
        model = LiteVAE.from_pretrained(folder / "model")
        reconstruction = reconstruct(model, data.chelsea())
        expected = psnr(data.chelsea(), reconstruction), ssim(data.chelsea(), reconstruction)
        assert (result.psnr, result.ssim) == pytest.approx(expected, abs=1e-3)
        assert (metrics["validation"]["psnr"], metrics["validation"]["ssim"]) == (result.psnr, result.ssim)
        assert (metrics["steps"], metrics["stopped_by"], metrics["precision"]) == (20, None, "fp32")
        expected = measure_yardsticks(model, [data.chelsea()])
        assert metrics["validation"]["yardsticks"] == result.yardsticks == expected
        assert metrics["validation"]["below_haar_yardstick"] is True

    def test_pictures_open(self, finished):
        for name in ("reconstructions.png", "curves.png"):
            assert min(np.asarray(Image.open(finished[0] / name)).shape[:2]) > 300

    def test_its_config_repeats_it_and_replaces_earlier_files(self, finished, tmp_path):
        folder, _ = finished
        # These files were left by an earlier run.
        (tmp_path / "metrics.jsonl").write_text("{}")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "old").touch()
        (tmp_path / "model" / "config.json").touch()
        train(load_config(str(folder / "config.yaml"), [f"output_dir={tmp_path}"]), replace=True)
        keys = ("step", "loss", "l1", "kl", "wavelet", "gaussian", "gradient_norm")
        assert {path.name for path in tmp_path.iterdir()} == FILES
        assert not (tmp_path / "model" / "old").exists()
        first, second = ([[line[key] for key in keys] for line in logged(f)] for f in (folder, tmp_path))
        assert first == second
        weights = [load_file(f / "model" / "diffusion_pytorch_model.safetensors") for f in (folder, tmp_path)]
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_non_finite_loss_is_named_and_the_steps_before_are_saved(tmp_path, monkeypatch, no_pictures):
    class Exploding(trainer_module.Objective):
        calls = 0

        def generator(self, *inputs, **settings):
            loss = super().generator(*inputs, **settings)
            self.calls += 1
            if self.calls < 4:
                return loss
            terms = {**loss.terms, "wavelet": torch.tensor(math.nan)}
            return replace(loss, total=loss.total * math.inf, terms=terms)

    monkeypatch.setattr(trainer_module, "Objective", Exploding)
    with pytest.raises(NonFiniteError, match="step 4: the wavelet loss is nan"):
        train(short(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 3
    weights = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_non_finite_gradient_has_its_own_error(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(NonFiniteError, match="step 1: the gradient's norm is nan"):
        train(short(tmp_path))


def test_sigterm_saves_everything_and_the_exit_status_is_0(tmp_path):
    command = "import sys; from litevae.cli import main; sys.exit(main())"
    arguments = ["train", "demo", *SHORT, "max_steps=100000", "log_every=1", f"output_dir={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "metrics.jsonl").exists() or len(logged(tmp_path)) < 3:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "the results are saved, but no checkpoint (checkpoint.every=0)" in output
    assert {path.name for path in tmp_path.iterdir()} == FILES
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["stopped_by"] == "SIGTERM"
    assert metrics["steps"] == logged(tmp_path)[-1]["step"] == metrics["validation"]["history"][-1]["step"]
    LiteVAE.from_pretrained(tmp_path / "model")


def test_bfloat16_and_image_decoder_train(tiny, tmp_path, no_pictures, adversarial_settings):
    settings = ["model.output_type=image", "channels_last=false", "ema_decay=0.9", "loss.ldl=1"]
    train(tiny("max_steps=4", "precision=bf16", *settings, *adversarial_settings))
    assert "discriminator" in logged(tmp_path / "run")[-1]
    weights = load_file(tmp_path / "run" / "model" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.preset=litevae-xl", "did you mean 'litevae-"),
        ("model.num_groups=7", "model: "),
        ("model.block_out_channels=[16]", "block_out_channels"),
        ("data.size=36", "data.size must be a multiple of 8, at least 16, got 36"),
        ("data.size=800", "do not fit"),
    ],
)
def test_settings_that_do_not_fit_give_a_one_line_error(tmp_path, override, message):
    with pytest.raises(UserError, match=message) as caught:
        train(short(tmp_path, override))
    assert "\n" not in str(caught.value)


def test_a_run_that_really_diverges_writes_its_files_and_raises_an_error(tmp_path):
    settings = [
        "data.size=16",
        "data.batch_size=1",
        "optimizer.warmup_steps=0",
        "optimizer.learning_rate=1e6",
    ]
    with pytest.raises(NonFiniteError):
        train(
            short(
                tmp_path / "run", *settings, "optimizer.schedule=constant", "max_steps=12", "max_bad_steps=3"
            )
        )
    for name in ("reconstructions.png", "curves.png", "metrics.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0


class TestTinyRun:
    def test_trains_on_a_folder_with_every_option(self, tiny, tmp_path, adversarial_settings):
        images = tmp_path / "images"
        images.mkdir()
        for i in range(3):
            Image.fromarray(data.chelsea()[50 * i :, 50 * i :][:60, :50]).save(images / f"{i}.png")
        settings = [
            f"data.train={images}",
            "data.validation=",
            "data.workers=1",
            "data.crop=random",
            "tracker=tensorboard",
            "max_steps=5",
            "checkpoint.every=2",
            "ema_decay=0.9",
            "stages=[{start: 3, size: 48, batch_size: 4}]",
        ]
        result = train(tiny(*settings, *adversarial_settings))
        assert (result.psnr, result.ssim, result.steps) == (None, None, 5)
        folder = tmp_path / "run"
        assert {path.name for path in folder.iterdir()} == FILES - {"validation"} | {
            "checkpoints",
            "tensorboard",
        }
        lines = logged(folder)
        assert ["discriminator" in line for line in lines] == [False, False, True, True, True]
        assert all(0 <= line["data_wait"] <= 1 for line in lines)
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
        for name in ("l1", "weighted/wavelet"):
            assert [event.value for event in events.Scalars(name)] == pytest.approx(
                [line[name] for line in lines]
            )

    def test_validation_grid_shows_each_image_and_its_reconstruction(self, tiny, tmp_path, no_pictures):
        config = tiny("max_steps=2", "validate_every=1")
        train(config)
        grids = sorted((tmp_path / "run" / "validation").iterdir())
        assert [path.name for path in grids] == ["step-00000001.png", "step-00000002.png"]
        grid = np.asarray(Image.open(grids[1]))
        (image,) = Path(config.data.validation).iterdir()
        pixels = middle_square(np.asarray(Image.open(image)), 32)
        np.testing.assert_array_equal(grid[:, :32], pixels)
        model = LiteVAE.from_pretrained(tmp_path / "run" / "model")
        np.testing.assert_array_equal(grid[:, 32:], reconstruct(model, pixels))

    def test_ctrl_c_ends_it_after_the_next_step(self, tiny, no_pictures, monkeypatch):
        original = trainer_module.Trainer.update

        def update(self, batch, step, stop):
            if step == 2:
                signal.raise_signal(signal.SIGINT)
            return original(self, batch, step, stop)

        monkeypatch.setattr(trainer_module.Trainer, "update", update)
        result = train(tiny("max_steps=9"))
        assert (result.steps, result.stopped_by) == (3, "SIGINT")

    def test_the_averaged_model_is_the_one_that_is_saved(self, tiny, tmp_path, no_pictures):
        settings = ["max_steps=3", "ema_decay=0.9", "checkpoint.every=3", "optimizer.warmup_steps=0"]
        train(tiny(*settings))
        name = "diffusion_pytorch_model.safetensors"
        newest = tmp_path / "run" / "checkpoints" / "step-00000003"
        saved, average, last = (
            load_file(folder / name)
            for folder in (tmp_path / "run" / "model", newest / "ema", newest / "model")
        )
        assert all(torch.equal(saved[key], average[key]) for key in saved)
        assert not torch.equal(saved["decoder.conv_in.weight"], last["decoder.conv_in.weight"])

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["data.train=nowhere"], "nowhere"),
            (["data.train={empty}"], "no images"),
            (
                ["stages=[{{start: 2, size: 33}}]"],
                "stages[0].size must be a multiple of 4, at least 16, got 33",
            ),
        ],
        ids=lambda value: str(value),
    )
    def test_data_and_stages_that_cannot_be_used(self, tiny, tmp_path, training_error, settings, message):
        (tmp_path / "empty").mkdir()
        assert message in training_error(tiny(*(each.format(empty=tmp_path / "empty") for each in settings)))

    def test_a_validation_writes_a_checkpoint_if_it_is_the_best_or_if_one_is_due(
        self, tiny, no_pictures, monkeypatch
    ):
        values = iter([10.0, 9.0, 11.0, 12.0, 8.0, 7.0])
        monkeypatch.setattr(validation_module, "psnr", lambda *_: next(values))
        original, written = loop_module.save_checkpoint, []

        def save_checkpoint(folder, step, *arguments):
            written.append(step)
            return original(folder, step, *arguments)

        monkeypatch.setattr(loop_module, "save_checkpoint", save_checkpoint)
        train(tiny("max_steps=6", "checkpoint.every=4", "validate_every=1"))
        assert written == [1, 3, 4, 6]
