"""Training of a diffusion model, on Hugging Face Accelerate."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from torch import Tensor

from litevae.data.remote import redact_pattern
from litevae.diffusion.config import DiffusionConfig
from litevae.diffusion.data_loader import LatentData
from litevae.diffusion.fid import FID, measure_fid, prepare_fid
from litevae.diffusion.noise import make_noise
from litevae.diffusion.pictures import draw_loss, draw_samples
from litevae.diffusion.pipeline import LatentDiffusionPipeline, generate, save_pipeline
from litevae.diffusion.unet import build_unet
from litevae.environment import versions
from litevae.errors import UserError, WorkerDied
from litevae.evaluation.fid import INCEPTION_NAME
from litevae.files import replacing
from litevae.memory import check_batch
from litevae.models.interface import Autoencoder, pixel_format
from litevae.signals import StopRequest
from litevae.training.checkpoint import Checkpoint, random_state
from litevae.training.config import check_batch_size
from litevae.training.loop import Failure, Loop, SavedState
from litevae.training.optimization import EMA, NetworkOptimizer, learning_rate_factor
from litevae.training.start import begin, output_folder
from litevae.training.step import Outcome, first_non_finite


@dataclass(frozen=True)
class DiffusionResult:
    """The result of a run.

    `loss` is the last one that was logged. `fid` is None if it was not measured, and `no_fid` is then the reason.
    `seconds` is wall-clock time without the start. `stopped_by` is the signal that ended the run early, such as
    "SIGINT", otherwise None.
    """

    output_dir: Path
    steps: int
    seconds: float
    parameters: int
    loss: float | None
    fid: FID | None
    no_fid: str | None
    stopped_by: str | None


def train(config: DiffusionConfig, autoencoder: Autoencoder, replace: bool = False) -> DiffusionResult:
    """Trains a diffusion model on an autoencoder's latents and writes its files to `config.output_dir`.

    The files are `pipeline/` (for `LatentDiffusionPipeline.from_pretrained`; with the averaged U-Net if there is
    one), `samples.png`, `loss.png`, `metrics.jsonl` (one line per logged step), `metrics.json` (FID),
    `config.yaml`, `checkpoints/` and the files of the tracker. A progress bar is shown on stderr.

    SIGINT or SIGTERM ends the run after the current step, with a checkpoint and all of these files but without
    FID. With `config.resume` a run continues from a checkpoint, no matter where it was killed; on the CPU of one
    machine its losses are then the same to the bit. Under `torchrun` or `accelerate launch` the processes share
    each batch; the latents and their noise do not depend on the number of processes.

    Args:
        config: settings of the run.
        autoencoder: model that `config.model` names. It is not trained; it is moved to the run's device.
        replace: whether to replace the pipeline of an earlier run in `config.output_dir` that has no checkpoints.

    Raises:
        UserError: settings contradict each other or do not fit the model; the latents are another model's or not
            scaled; a checkpoint does not fit; the output folder cannot be written or is in use by another run; it
            holds the pipeline of a run without checkpoints, and `replace` is False; FID is required and cannot be
            measured; or more than `config.data.max_bad_fraction` of the images cannot be used, in which case all
            files are written as of the step before.
        NonFiniteError: `config.max_bad_steps` steps in a row had a loss or a gradient that is not finite. All
            files are written as of the step before the first of these steps.
        WorkerDied: a process that reads data was killed, or crashed. All files are written as of the last step.
        OSError: a file could not be written, for example because the disk is full. Earlier checkpoints are intact.
    """
    folder = Path(config.output_dir)
    in_use = output_folder(folder, "litevae train-diffusion", replace, "pipeline", "model_index.json")
    with StopRequest() as stop, in_use:
        trainer = DiffusionTrainer(config, autoencoder)
        try:
            return trainer.run(stop)
        finally:
            trainer.accelerator.end_training()


class DiffusionTrainer(Loop[DiffusionResult]):
    """One training run: `__init__` builds or restores everything, and `run` performs the steps."""

    network_name = "unet"
    decisive_settings = ("seed", "precision", "model", "normalise", "data", "noise")

    def __init__(self, config: DiffusionConfig, autoencoder: Autoencoder) -> None:
        config, accelerator, checkpoint, note = begin(config, folder := Path(config.output_dir))
        self.config = config
        super().__init__(config, folder, accelerator, note)
        check_batch_size(
            config.data.batch_size, config.optimizer.accumulation, self.accelerator.num_processes
        )
        self.fid_images = prepare_fid(config, pixel_format(autoencoder))
        set_seed(config.seed)
        device = self.accelerator.device
        self.autoencoder = autoencoder.to(device).eval().requires_grad_(False)
        self.data = LatentData(
            config, self.autoencoder, self.accelerator, self.output_dir, checkpoint is not None
        )
        self.noise = make_noise(config.noise)
        self.data.check_spread(self.noise.data_std)
        channels, side, _ = self.data.shape
        widest = config.unet.block_out_channels[0]
        part = config.data.batch_size // (config.optimizer.accumulation * self.accelerator.num_processes)
        check_batch(part, side, widest, device.type)
        drawn = min(config.sample.batch_size, max(config.sample.count, config.fid.count))
        check_batch(drawn, side, widest, device.type, "sample.batch_size")
        self.network = self.unet = build_unet(config.unet, channels, side).to(device)
        self.ema = EMA(self.unet, config.ema_decay) if config.ema_decay else None
        settings = config.optimizer
        self.optimizer = NetworkOptimizer(
            self.accelerator.prepare_model(self.unet),
            settings,
            lambda done: learning_rate_factor(settings, done, config.max_steps),
        )
        if checkpoint is not None:
            self.restore(checkpoint)
        self.random = random_state()

    @property
    def best_unet(self) -> UNet2DModel:
        """The U-Net that samples are drawn with: the averaged one if there is one."""
        return self.unet if self.ema is None else self.ema.model

    def steps(self) -> Iterator[tuple[int, Tensor, float]]:
        self.unet.train()
        batches = self.data.batches(self.step)
        try:
            for step in range(self.step + 1, self.config.max_steps + 1):
                start = time.perf_counter()
                try:
                    batch = next(batches)
                    self.data.note_bad(batch)
                except UserError as error:
                    self.unusable = error
                except WorkerDied as error:
                    self.unusable, batch = error, self.data.empty_batch()
                wait_seconds = time.perf_counter() - start
                yield step, self.data.moments(batch), wait_seconds
        finally:
            del batches  # ends its workers, which the traceback of an error would keep alive

    def update(self, moments: Tensor, step: int, stop: bool) -> Outcome:
        """Performs one step on this process's share of the batch, moments (N, 2 n_z, h, w)."""
        accelerator, parts = self.accelerator, self.config.optimizer.accumulation
        count, index = accelerator.num_processes, accelerator.process_index
        # Every process draws the noise of the whole batch, so that a run does not depend on their number.
        whole = (count * len(moments), *self.data.shape)
        posterior_noise, noise = (
            torch.randn(whole, device=moments.device).chunk(count)[index] for _ in range(2)
        )
        level = self.noise.draw(whole[0], moments.device).chunk(count)[index]
        latents = self.data.sample(moments, posterior_noise)

        losses = []
        for part, inputs in enumerate(zip(*(x.chunk(parts) for x in (latents, noise, level)), strict=True)):
            with accelerator.no_sync(self.optimizer.network) if part < parts - 1 else nullcontext():
                with accelerator.autocast():
                    loss = self.noise.loss(self.optimizer.network, *inputs)
                accelerator.backward(loss / parts)
            losses.append(loss.detach())

        flags = torch.tensor([float(stop), float(self.unusable is not None)], device=moments.device)
        # A loss that is not finite on one process makes the mean not finite, so all processes decide alike.
        means = accelerator.reduce(torch.cat([torch.stack(losses).mean()[None], flags]), "mean")
        norm = self.optimizer.clip_gradients(
            self.config.optimizer.max_gradient_norm or math.inf, accelerator.scaler
        )
        # This is the only wait for a GPU in the step.
        norm_value, loss_value, stop_mean, unusable_mean = torch.cat([norm[None], means]).tolist()
        non_finite = first_non_finite({"loss": loss_value}, [norm_value])
        values = {"loss": loss_value, "gradient_norm": norm_value}
        if non_finite is None and not unusable_mean:
            values["learning_rate"] = self.optimizer.update(step, accelerator.scaler)
            if self.ema is not None:
                self.ema.update(self.unet)
        if accelerator.scaler is not None:
            accelerator.scaler.update()
        self.optimizer.zero_grad()
        return Outcome(values, non_finite, stop_mean > 0, unusable_mean > 0)

    def after(self, step: int) -> None:
        """Saves if that is due after `step`."""
        if self.config.checkpoint.every and step % self.config.checkpoint.every == 0:
            self.save()

    def state_to_save(self) -> SavedState:
        return SavedState({"optimizer": self.optimizer.moments()})

    def restore_state(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        if not self.optimizer.load_moments(state["optimizer"]):
            raise UserError(f"resume: {checkpoint.path} was trained with another optimizer.kind")

    def finish(self, signal_name: str | None, stopped: bool, failure: Failure | None) -> DiffusionResult:
        """Writes the checkpoint, the pipeline, samples and pictures, and measures FID."""
        self.save()
        training_seconds = self.seconds
        scheduler = self.noise.scheduler()
        channels = self.data.channels
        pipeline = LatentDiffusionPipeline(
            self.autoencoder,
            self.best_unet.eval(),
            scheduler,
            None if channels is None else channels.mean,
            None if channels is None else channels.std,
        )
        pipeline.set_progress_bar_config(disable=True)
        if self.is_main:
            self.write_results(pipeline)
        fid: FID | None = None
        no_fid = self.fid_images if isinstance(self.fid_images, str) else None
        if stopped or failure:
            no_fid = "the run did not complete"
        elif not isinstance(self.fid_images, str):
            fid = measure_fid(pipeline, self.fid_images, self.data.pixels, self.config)
        losses = [line["loss"] for line in self.lines if "loss" in line]
        result = DiffusionResult(
            self.output_dir,
            self.step,
            training_seconds,
            sum(p.numel() for p in self.unet.parameters()),
            losses[-1] if losses else None,
            fid,
            no_fid,
            (signal_name or "another process") if stopped else None,
        )
        if self.is_main:
            self.write_metrics(result, complete=not (stopped or failure))
        self.accelerator.wait_for_everyone()
        return result

    def write_results(self, pipeline: LatentDiffusionPipeline) -> None:
        save_pipeline(pipeline, self.output_dir / "pipeline")
        settings = self.config.sample
        parts = generate(
            pipeline, range(settings.count), self.config.seed, settings.steps, settings.batch_size
        )
        with replacing(self.output_dir / "samples.png") as path:
            draw_samples(torch.cat(list(parts)), path)
        with replacing(self.output_dir / "loss.png") as path:
            draw_loss(self.lines, path)

    def write_metrics(self, result: DiffusionResult, complete: bool) -> None:
        fid = result.fid
        measured: dict[str, Any] = {"fid": fid and fid.value, "not_measured": result.no_fid}
        if fid is not None:
            measured |= {
                "images": fid.images,
                "unreadable": fid.unreadable,
                "samples": self.config.fid.count,
                "sampler_steps": self.config.sample.steps,
                "compared_with": redact_pattern(self.config.fid.images or self.config.data.train),
                "crop": f"middle square, resized to {self.data.pixels} x {self.data.pixels}, 8 bits",
                "network": INCEPTION_NAME,
            }
        metrics = {
            "fid": measured,
            "loss": result.loss,
            "steps": result.steps,
            "skipped_steps": self.skipped,
            "complete": complete,  # whether all steps were performed
            "parameters": result.parameters,
            "latent": list(self.data.shape),
            "seconds": round(result.seconds, 1),
            "stopped_by": result.stopped_by,
            "versions": versions(),
        }
        with replacing(self.output_dir / "metrics.json") as path:
            path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
