"""Training of an autoencoder, on Hugging Face Accelerate."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn

from litevae.data.config import check_has_images
from litevae.data.pixels import to_model_range
from litevae.data.remote import redact_pattern
from litevae.data.sources import open_images
from litevae.discriminators import build_discriminator
from litevae.environment import versions
from litevae.errors import UserError, WorkerDied
from litevae.evaluation.metrics import find_best
from litevae.evaluation.pictures import draw_grid, draw_reconstructions
from litevae.evaluation.validation import Validation
from litevae.evaluation.yardsticks import HAAR, below_haar, for_json, measure_yardsticks
from litevae.files import replacing
from litevae.losses import Objective, least_side
from litevae.memory import check_batch
from litevae.models.interface import Autoencoder, spatial_compression
from litevae.models.weight_files import read_weights
from litevae.models.weights import copy_weights, save_model
from litevae.signals import StopRequest
from litevae.training.build import build_model, check_sizes, load_teacher
from litevae.training.card import make_run_card
from litevae.training.checkpoint import DISCRIMINATOR, Checkpoint, random_state, read_manifest
from litevae.training.config import Config, check_batch_size, list_stages, with_steps
from litevae.training.curves import draw_curves
from litevae.training.data_loader import TrainingData
from litevae.training.latents import draw_change, sides_to_draw
from litevae.training.loop import Failure, Loop, SavedState
from litevae.training.optimization import EMA, learning_rate_factor
from litevae.training.start import begin, output_folder
from litevae.training.step import Outcome, TrainingStep


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    `psnr` (dB) and `ssim` are means over the validation images at the end, or None without such images. `seconds`
    is wall-clock time without the start. `stopped_by` is the signal that ended the run early, such as "SIGINT",
    otherwise None. `yardsticks` holds the PSNR and SSIM of each of `litevae.evaluation.yardsticks` on the same
    images, and `metrics` everything in `validate_metrics`; both are empty without such images.
    """

    output_dir: Path
    steps: int
    seconds: float
    psnr: float | None
    ssim: float | None
    stopped_by: str | None
    yardsticks: dict[str, dict[str, float]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


def train(config: Config, replace: bool = False) -> TrainingResult:
    """Trains a model and writes its files to `config.output_dir`.

    The files are `model/` (for `LiteVAE.from_pretrained`; the averaged model if there is one), `metrics.jsonl`
    (one line per logged step: "l1" is that term, "weighted/l1" its part of "loss", and "gradient_ratio" the result
    of `TrainingStep.gradient_ratio`), `metrics.json` (PSNR and SSIM of the validation images), `validation/`
    (those images beside their reconstructions), `reconstructions.png`, `curves.png`, `checkpoints/`, the files of
    the tracker, and `config.yaml`, which repeats the run. A progress bar is shown on stderr.

    SIGINT or SIGTERM ends the run after the current step, with a checkpoint and all of these files. With
    `config.resume` a run continues from a checkpoint, no matter where it was killed; on the CPU of one machine its
    losses are then the same to the bit. Under `torchrun` or `accelerate launch` the processes share each batch;
    the crops and the noise of the latents do not depend on the number of processes.

    Args:
        config: settings of the run.
        replace: whether to replace the model of an earlier run in `config.output_dir` that has no checkpoints.

    Raises:
        UserError: settings do not fit together, weights are missing or belong to another architecture, the output
            folder cannot be written or is in use by another run, it holds the model of a run without checkpoints
            and `replace` is False, or more than `config.data.max_bad_fraction` of the images cannot be used; in
            the last case all files are written as of the step before.
        NonFiniteError: `config.max_bad_steps` steps in a row had a loss or a gradient that is not finite. All
            files are written as of the step before the first of these steps.
        WorkerDied: a process that reads data was killed, or crashed. All files are written as of the last step.
        OSError: a file could not be written, for example because the disk is full. Earlier checkpoints are intact.
    """
    with StopRequest() as stop, output_folder(Path(config.output_dir), "litevae train", replace):
        trainer = Trainer(config)
        try:
            return trainer.run(stop)
        finally:
            trainer.accelerator.end_training()


class Trainer(Loop[TrainingResult]):
    """One training run: `__init__` builds or restores everything, and `run` performs the steps."""

    network_name = "model"
    decisive_settings = ("seed", "precision", "data", "stages", "loss", "latent")

    def __init__(self, config: Config) -> None:
        images = None
        if config.max_epochs is not None:
            check_has_images(config.data)
            images = open_images(config.data.train, config.data.pixel_format)
            config = with_steps(config, len(images))
        config, accelerator, checkpoint, note = begin(
            config, folder := Path(config.output_dir), config.data.value_range is not None
        )
        self.config, self.best_by = config, config.checkpoint.best_by
        super().__init__(config, folder, accelerator, note)
        self.stages = list_stages(config)
        set_seed(config.seed)
        self.teacher = load_teacher(config)
        self.network = self.model = build_model(config, self.teacher)
        self.check_stages()
        self.data = TrainingData(
            config,
            self.stages,
            self.accelerator,
            self.output_dir,
            checkpoint is not None,
            images,
            self.teacher and self.teacher.model,
        )
        if self.teacher is not None and self.data.latents is not None:
            self.teacher.model.encoder = nn.Identity()  # frees its memory
        self.moments: Tensor | None = None  # of the batch in hand, from the teacher's latents
        self.validation = self.make_validation()
        objective = Objective(config.loss)
        if config.channels_last:
            for module in filter(None, (self.model, objective, self.teacher)):
                module.to(memory_format=torch.channels_last)
        for network in filter(None, (self.model, self.teacher)):
            network.to(self.accelerator.device)
        self.ema = EMA(self.model, config.ema_decay) if config.ema_decay else None
        self.discriminator = self.make_discriminator()
        self.train_step = TrainingStep(
            config,
            self.accelerator,
            self.model,
            self.discriminator,
            objective.to(self.accelerator.device),
            self.ema,
            lambda done: learning_rate_factor(config.optimizer, done, config.max_steps),
            self.teacher,
        )
        self.history: list[dict[str, float]] = []
        if checkpoint is not None:
            self.restore(checkpoint)
        self.random = random_state()

    @property
    def best_model(self) -> Autoencoder:
        """The model that is validated and saved: the averaged one if there is one."""
        return self.model if self.ema is None else self.ema.model

    def check_stages(self) -> None:
        """Raises UserError if the model does not take a stage's size, or if a batch cannot be shared evenly."""
        check_sizes(self.model, self.config)
        for stage in self.stages:
            check_batch_size(
                stage.batch_size, self.config.optimizer.accumulation, self.accelerator.num_processes
            )
            parts = self.config.optimizer.accumulation * self.accelerator.num_processes
            halved = self.config.model.output_type == "wavelet"  # the decoder ends at half the size
            widest = self.config.model.block_out_channels[0]
            check_batch(
                stage.batch_size // parts, stage.size // (1 + halved), widest, self.accelerator.device.type
            )

    def make_discriminator(self) -> nn.Module | None:
        config = self.config
        if not config.loss.adversarial:
            return None
        stages = [stage for stage in self.stages if stage.last >= config.loss.adversarial_start]
        sizes = [stage.size for stage in stages or self.stages[:1]]
        try:
            discriminator = build_discriminator(
                config.discriminator, *sizes, in_channels=config.data.channels
            )
        except ValueError as error:
            raise UserError(f"discriminator: {error}") from None
        if config.channels_last:
            discriminator.to(memory_format=torch.channels_last)
        return discriminator.to(self.accelerator.device)

    def make_validation(self) -> Validation:
        """Prepares the metrics of the validation images; raises UserError if one cannot be measured."""
        images = [image for _, image in self.data.validation]
        try:
            return Validation(images, self.config.validate_metrics if images else ())
        except UserError as error:
            raise UserError(f"validate_metrics: {error}") from None

    def steps(self) -> Iterator[tuple[int, Tensor, float]]:
        done = self.step
        for stage in self.stages:
            if stage.last <= done:
                continue
            batches = self.data.batches(stage, done)
            try:
                for step in range(max(stage.first, done + 1), stage.last + 1):
                    start = time.perf_counter()
                    try:
                        batch = next(batches)
                        self.data.bad_images.add(batch.bad)
                    except UserError as error:
                        self.unusable = error
                    except WorkerDied as error:
                        self.unusable, batch = error, self.data.black_batch(stage)
                    images = batch.images.to(self.accelerator.device, non_blocking=True)
                    if batch.moments is not None:
                        self.moments = batch.moments.to(self.accelerator.device, non_blocking=True)
                    yield step, images, time.perf_counter() - start
            finally:
                del batches  # ends its workers, which the traceback of an error would keep alive

    def update(self, batch: Tensor, step: int, stop: bool) -> Outcome:
        """Performs one step on this process's share of the batch, (N, C, H, W) levels."""
        image = to_model_range(batch)
        if self.config.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        # Every process draws the noise of the whole batch, so that a run does not depend on their number.
        count, factor = self.accelerator.num_processes, spatial_compression(self.model)
        side = image.shape[-1] // factor
        channels = self.config.model.latent_channels
        noise = torch.randn((count * len(batch), channels, side, side), device=image.device)
        share = noise.chunk(count)[index := self.accelerator.process_index]
        change = None
        settings = self.config.latent
        if settings.noise or settings.equivariance:
            smallest, least = settings.equivariance_scale, least_side(self.config.loss)
            sides = (
                sides_to_draw(side, factor, smallest, self.discriminator, least)
                if settings.equivariance
                else []
            )
            change = draw_change(settings, share, count, index, sides)
        return self.train_step(image, share, step, stop, self.unusable is not None, change, self.moments)

    def after(self, step: int) -> None:
        """Validates and saves if that is due after `step`."""
        config = self.config
        if step == config.max_steps:
            return
        improved = False
        if step % config.validate_every == 0 and self.data.validation:
            self.validate(self.step)  # the last step that was not skipped
            latest = len(self.history) - 1
            improved = find_best(self.best_by, [point.get(self.best_by) for point in self.history]) == latest
        if improved or (config.checkpoint.every and step % config.checkpoint.every == 0):
            self.save()

    def validate(self, step: int) -> None:
        """Appends the metrics of the validation images to the history."""
        point: list[dict[str, float]] = [{}]
        if self.is_main:
            values, pairs = self.validation(self.best_model)
            point = [{"step": step, **values, "seconds": round(self.seconds, 1)}]
            draw_grid(pairs, self.output_dir / "validation" / f"step-{step:08d}.png")
            self.accelerator.log({f"validation/{name}": value for name, value in values.items()}, step=step)
        broadcast_object_list(point)
        self.history.append(point[0])

    def measured(self, point: dict[str, float]) -> dict[str, float]:
        """Returns the metrics in a point of the history."""
        return {name: point[name] for name in self.validation.metrics if name in point}

    def state_to_save(self) -> SavedState:
        measured = bool(self.history) and self.history[-1]["step"] == self.step
        return SavedState(
            {
                "optimizers": {name: each.moments() for name, each in self.train_step.optimizers.items()},
                "lecam": self.train_step.adversary.state(),
                "history": self.history,
            },
            self.discriminator.state_dict() if self.discriminator else None,
            {
                **(self.measured(self.history[-1]) if measured else {"psnr": None}),
                "teacher": self.teacher and self.teacher.digests,
            },
        )

    def restore_state(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        path = checkpoint.path / DISCRIMINATOR
        if path.is_file() != (self.discriminator is not None):
            raise UserError(
                f"resume: {checkpoint.path} has {'no' if self.discriminator else 'a'} discriminator: see "
                "loss.adversarial, or start a new run with init"
            )
        if read_manifest(checkpoint.path).get("teacher") != (self.teacher and self.teacher.digests):
            raise UserError(f"resume: {checkpoint.path} was trained with another teacher, or with none")
        if self.discriminator is not None:
            copy_weights(self.discriminator, read_weights(path, "resume"), path, "resume")
        for name, optimizer in self.train_step.optimizers.items():
            if not optimizer.load_moments(state["optimizers"][name]):
                raise UserError(
                    f"resume: {checkpoint.path} trained other weights of the {name}, or used another optimizer.kind: "
                    "see freeze_encoder and freeze_decoder"
                )
        self.train_step.adversary.restore(state.get("lecam"), self.accelerator.device)
        self.history = [dict(point) for point in state["history"]]

    def finish(self, signal_name: str | None, stopped: bool, failure: Failure | None) -> TrainingResult:
        """Validates once more and writes the checkpoint, the model, the metrics and the pictures."""
        if stopped or failure:  # at once, because the sender of a signal may soon kill the run
            self.save()
        if self.data.validation and (not self.history or self.history[-1]["step"] != self.step):
            self.validate(self.step)
        self.save()
        final = self.measured(self.history[-1]) if self.data.validation else {}
        stopped_by = (signal_name or "another process") if stopped else None
        images = [image for _, image in self.data.validation]
        yardsticks = measure_yardsticks(self.best_model, images) if images else {}
        result = TrainingResult(
            self.output_dir,
            self.step,
            self.seconds,
            final.get("psnr"),
            final.get("ssim"),
            stopped_by,
            yardsticks,
            final,
        )
        if self.is_main:
            self.write_results(result, complete=not (stopped or failure))
        return result

    def write_results(self, result: TrainingResult, complete: bool) -> None:
        height, width = self.data.validation[0][1].shape[:2] if self.data.validation else (0, 0)
        metrics = {
            "validation": {
                "images": redact_pattern(self.config.data.validation or self.config.data.train)
                if self.data.validation
                else None,
                "count": len(self.data.validation),
                "measured_on": f"{height}x{width} pixels, {self.config.data.pixel_format}, mode of the posterior, "
                "mean over the images",
                "psnr": None,
                "ssim": None,
                **result.metrics,
                "yardsticks": for_json(result.yardsticks),
                "below_haar_yardstick": below_haar({"psnr": result.psnr}, result.yardsticks)
                if result.psnr is not None
                else None,
                "history": self.history,
            },
            "steps": result.steps,
            "skipped_steps": self.skipped,
            "complete": complete,  # whether all steps were performed
            "seconds": round(result.seconds, 1),
            "precision": self.config.precision,  # the precision that "auto" stands for on this machine
            "stopped_by": result.stopped_by,
            "versions": versions(),
        }
        # A model that was not trained further stays, because `litevae scale` may have changed its configuration.
        if self.step != self.restored_step or not (self.output_dir / "model").is_dir():
            card = make_run_card(self.best_model, self.config, metrics, self.teacher)
            save_model(self.best_model, self.output_dir / "model", str(card))
        with replacing(self.output_dir / "metrics.json") as path:
            path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        with replacing(self.output_dir / "reconstructions.png") as path:
            draw_reconstructions(self.best_model, self.data.shown, path)
        terms = [*self.train_step.objective.weights, *["discriminator"] * bool(self.discriminator)]
        with replacing(self.output_dir / "curves.png") as path:
            draw_curves(self.lines, terms, self.history, result.yardsticks.get(HAAR, {}), path)
