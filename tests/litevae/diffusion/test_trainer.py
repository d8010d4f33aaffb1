import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import litevae.diffusion.trainer as trainer_module
from litevae import LiteVAE
from litevae.data.batches import Batches
from litevae.data.sources import open_images
from litevae.diffusion import LatentDiffusionPipeline, train
from litevae.diffusion.noise import make_noise
from litevae.errors import NonFiniteError, UserError, WorkerDied
from litevae.latents import Settings, encode_images
from litevae.latents.statistics import measure_latents, store_scale
from litevae.training.checkpoint import find_checkpoints


@pytest.mark.parametrize(("kind", "steps"), [("edm", 200), ("ddpm", 100)])
def test_one_latent_is_learned_by_heart(tiny, autoencoder, photographs, tmp_path, no_pictures, kind, steps):
    one = tmp_path / "one"
    one.mkdir()
    (one / "0.png").write_bytes((photographs / "0.png").read_bytes())
    encode_images(autoencoder, open_images(str(one)), tmp_path / "one-latent", Settings(32), workers=0)
    config = tiny(
        f"data.latents={tmp_path / 'one-latent'}",
        f"noise.kind={kind}",
        f"max_steps={steps}",
        "optimizer.learning_rate=5e-3",
        "data.batch_size=8",
        "ema_decay=0.95",
    )
    train(config, autoencoder)
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    # The loss of a zero network is the variance of its target, about 1.
    assert losses[0] == pytest.approx(1, abs=0.2)
    if kind == "ddpm":  # an error at the last noise level counts 80 times, so it needs far longer
        assert np.mean(losses[-20:]) < 0.3
        return
    # Samples equal the latent except for the noise of the posterior.
    pipeline = LatentDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(8, torch.Generator().manual_seed(1), 20, output_type="latent").images
    pixels = torch.from_numpy(np.array(Image.open(one / "0.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = autoencoder.encode(pixels).latent_dist
    scale = autoencoder.config.scaling_factor
    latent = (posterior.mean - autoencoder.config.shift_factor) * scale
    error = (samples - latent).square().mean()
    noise = (posterior.std * scale).square().mean()
    # A constant latent would have the variance as its error.
    assert error < noise + 0.5 * latent.var()
    # Samples are decoded with the same scale.
    with torch.no_grad():
        torch.testing.assert_close(
            pipeline.decode(latent), autoencoder.decode(posterior.mean).sample, rtol=1e-4, atol=1e-4
        )


def forked(jobs):
    """Runs forked.py; returns the exit status by job and rank, and the output on stderr."""
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("forked.py"), json.dumps(jobs)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,  # a hang fails the test
    )
    assert result.returncode == 0, result.stderr
    lines = [list(map(int, line.split())) for line in result.stdout.splitlines()]
    return {(job, rank): status for job, rank, status in lines}, result.stderr


def weights(folder):
    (*_, newest) = find_checkpoints(folder / "checkpoints")
    return {
        (path.relative_to(newest.path), name): tensor
        for path in newest.path.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_settings, photographs):
    """A run, the same run killed twice, and the same run in two processes."""
    folder = tmp_path_factory.mktemp("runs")
    settings = [*tiny_settings, "max_steps=5", "checkpoint.every=1", "checkpoint.keep=9", "ema_decay=0.9"]
    settings += ["optimizer.accumulation=2", "resume=auto", "sample.steps=1"]
    fid = ["fid.measure=always", f"fid.images={photographs}", "fid.count=7"]
    # A checkpoint takes about 10 writes.
    kills = [4, 16]
    jobs = [
        [1, None, [*settings, *fid, f"output_dir={folder / 'whole'}"]],
        *([1, writes, [*settings, f"output_dir={folder / 'killed'}"]] for writes in kills),
        [1, None, [*settings, f"output_dir={folder / 'killed'}"]],
        [2, None, [*settings, *fid, f"output_dir={folder / 'two'}"]],
    ]
    return folder, *forked(jobs)


def test_a_killed_run_goes_on_to_the_same_bits(runs, logged):
    folder, statuses, errors = runs
    assert [statuses[job, 0] for job in range(4)] == [0, *[-signal.SIGKILL] * 2, 0], errors
    whole, killed = folder / "whole", folder / "killed"
    assert len(logged(whole)) == 5
    assert logged(whole) == logged(killed)
    ours, theirs = weights(whole), weights(killed)
    assert len(ours) > 2
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert (whole / "samples.png").read_bytes() == (killed / "samples.png").read_bytes()
    assert [path.name for path in killed.rglob(".*")] == [".lock"]


def test_two_processes_do_what_one_does_with_the_double_batch(runs, logged):
    folder, statuses, errors = runs
    assert [statuses[4, 0], statuses[4, 1]] == [0, 0], errors
    one, two = logged(folder / "whole"), logged(folder / "two")
    # Roundings, and Adam's first steps, which enlarge the rounding of a gradient near 0 to the learning rate.
    for line, other, tolerance in zip(one, two, (1e-5, *[1e-3] * 4), strict=True):
        assert other == pytest.approx(line, rel=tolerance)
    # The features are means over all pixels, some of which are rounded differently.
    found = [json.loads((folder / name / "metrics.json").read_text())["fid"] for name in ("whole", "two")]
    assert found[0]["fid"] > 0
    assert found[1]["fid"] == pytest.approx(found[0]["fid"], rel=1e-2)


def test_a_preempted_run_ends_after_its_step_and_goes_on(tiny, autoencoder, logged, monkeypatch, no_pictures):
    settings = ("max_steps=5", "checkpoint.every=100", "noise.kind=ddpm")
    train(tiny(*settings, name="whole"), autoencoder)
    original, signals = trainer_module.DiffusionTrainer.update, [signal.SIGTERM]

    def update(self, moments, step, stop):
        if step == 2 and signals:
            signal.raise_signal(signals.pop())
        return original(self, moments, step, stop)

    monkeypatch.setattr(trainer_module.DiffusionTrainer, "update", update)
    result = train(tiny(*settings), autoencoder)
    assert (result.steps, result.stopped_by, result.no_fid) == (
        3,
        "SIGTERM",
        "the run did not complete",
    )
    for name in ("samples.png", "pipeline/unet/config.json", "metrics.json", "checkpoints/step-00000003"):
        assert (result.output_dir / name).exists()
    with pytest.raises(UserError, match="continue with resume=auto"):
        train(tiny(*settings), autoencoder)
    with pytest.raises(UserError, match="has an averaged model"):
        train(tiny(*settings, "resume=auto", "ema_decay=0"), autoencoder)
    with pytest.raises(UserError, match="another architecture: block_out_channels is"):
        train(tiny(*settings, "resume=auto", "unet.block_out_channels=[16,32]"), autoencoder)
    assert train(tiny(*settings, "resume=auto"), autoencoder).steps == 5
    assert logged(result.output_dir)[-1] == logged(result.output_dir.with_name("whole"))[-1]


def test_a_loss_that_is_not_finite_is_skipped_or_ends_the_run(tiny, autoencoder, monkeypatch, no_pictures):
    make, bad = make_noise, [2]

    def broken(config):
        noise, calls = make(config), iter(range(1, 100))
        loss = noise.loss
        monkeypatch.setattr(
            noise, "loss", lambda *given: loss(*given) * (torch.nan if next(calls) in bad else 1)
        )
        return noise

    monkeypatch.setattr(trainer_module, "make_noise", broken)
    result = train(tiny("max_steps=4"), autoencoder)
    assert json.loads((result.output_dir / "metrics.json").read_text())["skipped_steps"] == 1
    bad[:] = [3, 4]
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is nan; 2 steps in a row"):
        train(tiny("max_steps=9", "max_bad_steps=2", name="other"), autoencoder)
    unet = load_file(
        result.output_dir.with_name("other") / "pipeline/unet/diffusion_pytorch_model.safetensors"
    )
    assert all(tensor.isfinite().all() for tensor in unet.values())


def test_too_many_bad_images_end_the_run(tiny, autoencoder, photographs, tmp_path, no_pictures):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in photographs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "6.png").write_text("no image")
    with pytest.raises(UserError, match="1 of 7 images cannot be used"):
        train(tiny("data.latents=", f"data.train={folder}", "max_steps=9"), autoencoder)


def test_a_worker_that_dies_ends_the_run_with_its_results_and_they_are_not_replaced(
    tiny, autoencoder, tmp_path, monkeypatch, no_pictures
):
    original, batches = Batches.__next__, iter(range(2))

    def die(self):
        if next(batches, None) is None:
            raise WorkerDied("a worker died")
        return original(self)

    settings = ["max_steps=4", "checkpoint.every=0"]
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__next__", die)
        with pytest.raises(
            WorkerDied, match="a worker died; the results after step 2 are saved, but no checkpoint"
        ):
            train(tiny(*settings), autoencoder)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["complete"]) == (2, False)
    with pytest.raises(UserError, match="run/pipeline is the pipeline of a run without checkpoints"):
        train(tiny(*settings, "resume=auto"), autoencoder)


def test_channels_are_normalised_by_the_statistics_of_litevae_scale(
    tiny, autoencoder_folder, photographs, tmp_path
):
    folder = tmp_path / "model"
    shutil.copytree(autoencoder_folder, folder)
    found = measure_latents(LiteVAE.from_pretrained(folder), open_images(str(photographs)), 32, workers=0)
    store_scale(folder / "config.json", found)
    model = LiteVAE.from_pretrained(folder)
    config = tiny(
        f"model={folder}", f"data.train={photographs}", "data.latents=", "max_steps=1", "normalise=channel"
    )
    train(config, model)
    pipeline = LatentDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert (tuple(pipeline.config.latents_mean), tuple(pipeline.config.latents_std)) == (
        found.mean,
        found.std,
    )
    trainer = trainer_module.DiffusionTrainer(replace(config, output_dir=str(tmp_path / "other")), model)
    moments = torch.randn(2, 8, 8, 8)
    latents = trainer.data.sample(moments, torch.zeros(2, 4, 8, 8))
    for channel in range(4):
        expected = (moments[:, channel] - found.mean[channel]) / found.std[channel]
        torch.testing.assert_close(latents[:, channel], expected)

    (folder / "latent_statistics.json").unlink()
    with pytest.raises(UserError, match=r"holds no latent_statistics\.json: run litevae scale"):
        train(replace(config, output_dir=str(tmp_path / "other")), model)
