"""The training loop, on Hugging Face Accelerate."""

import json
import math
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.errors import NonFiniteError, UserError
from litevae.evaluation.metrics import psnr, ssim
from litevae.evaluation.reconstruction import reconstruct
from litevae.images import Pixels, to_model_range
from litevae.losses import Objective
from litevae.models import LiteVAE
from litevae.training.checkpoint import replacing, save_model
from litevae.training.config import Config, ModelConfig
from litevae.training.data import BadImages, TrainingCrops, collate
from litevae.training.initialise import initialise
from litevae.training.report import draw_curves, draw_reconstructions
from litevae.training.sources import (
    HELD_OUT_PHOTOGRAPH,
    TRAINING_PHOTOGRAPHS,
    load_photograph,
    open_images,
)

SHOWN_PHOTOGRAPHS = ("astronaut", "coffee", "rocket")  # of the training photographs, in the picture


@dataclass(frozen=True)
class Result:
    """What a run came to.

    `psnr` (dB) and `ssim` are the held-out photograph's at the end; `seconds` is wall-clock time without
    the start; `stopped_by` is the signal that ended the run early, such as "SIGINT", else None.
    """

    output_dir: Path
    steps: int
    seconds: float
    psnr: float
    ssim: float
    stopped_by: str | None


class Autoencode(nn.Module):
    """A model's training step as one forward, which is what DDP and autocast wrap."""

    def __init__(self, model: LiteVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) in [-1, 1] to its reconstruction from a sample of the latent, and to the posterior's
        mean and log-variance (N, n_z, h, w)."""
        posterior = self.model.encode(image).latent_dist
        reconstruction = self.model.decode(posterior.sample()).sample
        return reconstruction, posterior.mean, posterior.logvar


class StopRequest:
    """Notes SIGINT and SIGTERM, so that the loop can end after its step. A second one ends the process."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number).name
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)


def train(config: Config) -> Result:
    """Trains a model on the demo's photographs and leaves these files in `config.output_dir`.

    `model/` (for `LiteVAE.from_pretrained`), `metrics.jsonl` (a line for each logged step), `metrics.json`
    (the held-out photograph's PSNR and SSIM), `reconstructions.png`, `curves.png`, and `config.yaml`, with
    which the run can be repeated. Shows a progress bar on stderr. SIGINT or SIGTERM ends the run after the
    current step, with all of them written. On one machine's CPU the same config gives the same losses.

    Raises:
        UserError: settings that do not fit together, or an output folder that cannot be written.
        NonFiniteError: a loss or a gradient is not finite. All files are written as of the step before.
    """
    with StopRequest() as stop:
        return Trainer(config).run(stop)


class Trainer:
    """One run: `__init__` builds everything, `run` goes through the steps."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.output_dir = make_output_dir(Path(config.output_dir))
        self.accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision
        )
        set_seed(config.seed)
        self.photographs = {name: load_photograph(name) for name in TRAINING_PHOTOGRAPHS}
        self.held_out = load_photograph(HELD_OUT_PHOTOGRAPH)
        self.model = build_model(config.model, config.data.size)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        self.scheduler = get_scheduler(  # not prepared: Accelerate would advance it once for each process
            "cosine" if config.optimizer.schedule == "cosine" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=config.optimizer.warmup_steps,
            num_training_steps=config.max_steps,
        )
        images = open_images(config.data.train)
        crops = TrainingCrops(
            images,
            config.data,
            seed=config.seed,
            length=config.max_steps * config.data.batch_size * self.accelerator.num_processes,
        )
        loader = DataLoader(
            crops, config.data.batch_size, num_workers=config.data.workers, collate_fn=collate
        )
        bad_images = self.output_dir / "bad_images.txt"
        bad_images.unlink(missing_ok=True)  # an earlier run's
        self.bad_images = BadImages(bad_images, len(images), config.data.max_bad_fraction)
        self.autoencode, self.optimizer, self.loader = self.accelerator.prepare(
            Autoencode(self.model), optimizer, loader
        )
        self.objective = Objective(config.loss).to(self.accelerator.device)
        self.lines: list[dict[str, float]] = []
        self.history: list[dict[str, float]] = []

    def run(self, stop: StopRequest) -> Result:
        """Goes through the steps until the last one or until `stop`, then writes everything."""
        config = self.config
        with replacing(self.output_dir / "config.yaml") as path:
            OmegaConf.save(OmegaConf.structured(config), path)
        done, training_seconds, start = 0, 0.0, time.perf_counter()
        failure = None
        with (
            open(self.output_dir / "metrics.jsonl", "w", encoding="utf-8") as log,
            # into a file or a pipe a line now and then is enough
            tqdm(total=config.max_steps, unit="step", mininterval=0.5 if sys.stderr.isatty() else 10) as bar,
        ):
            step_start = start
            for batch in self.loader:
                self.bad_images.add(batch.bad)
                try:
                    measured = self.train_step(batch.images, done + 1)
                except NonFiniteError as error:  # the weights are still those of the step before
                    failure = error
                    break
                stopped = stop.signal  # read once: it may come at any time
                done += 1
                training_seconds += time.perf_counter() - step_start
                bar.update()
                if done == 1 or done % config.log_every == 0 or done == config.max_steps or stopped:
                    rate = done * len(batch.images) / training_seconds
                    line = {"step": done, **measured, "images_per_second": rate}
                    self.lines.append(line)
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    bar.set_postfix_str(f"loss {line['loss']:.3f}, {rate:.0f} images/s")
                if stopped:
                    break
                if done % config.validate_every == 0 and done < config.max_steps:
                    self.validate(done)
                step_start = time.perf_counter()
        try:
            return self.finish(done, time.perf_counter() - start, stop.signal)
        finally:
            if failure:
                raise failure

    def train_step(self, batch: Tensor, step: int) -> dict[str, float]:
        """One update from (N, 3, H, W) uint8. Returns what belongs into the log.

        Raises NonFiniteError before it touches the weights.
        """
        image = to_model_range(batch)
        if self.config.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        reconstruction, mean, logvar = self.autoencode(image)
        loss = self.objective.generator(image, reconstruction, mean, logvar, step=step)
        values = {"loss": loss.total.item(), **{name: term.item() for name, term in loss.terms.items()}}
        if name := loss.first_non_finite():
            raise NonFiniteError(f"step {step}: the {name} loss is {values[name]}, the first to go")

        self.accelerator.backward(loss.total)
        norm = self.accelerator.clip_grad_norm_(
            self.autoencode.parameters(), self.config.optimizer.max_gradient_norm or math.inf
        ).item()
        if not math.isfinite(norm):
            raise NonFiniteError(f"step {step}: the gradient's norm is {norm}, though every loss is finite")
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return {**values, "gradient_norm": norm, "learning_rate": learning_rate}

    def validate(self, step: int) -> None:
        """Appends the held-out photograph's PSNR and SSIM to the history."""
        reconstruction = reconstruct(self.model, self.held_out)
        self.history.append(
            {
                "step": step,
                "psnr": psnr(self.held_out, reconstruction),
                "ssim": ssim(self.held_out, reconstruction),
            }
        )

    def finish(self, steps: int, seconds: float, stopped_by: str | None) -> Result:
        """Measures once more and writes the model, the metrics and the pictures."""
        self.validate(steps)
        result = Result(
            self.output_dir, steps, seconds, self.history[-1]["psnr"], self.history[-1]["ssim"], stopped_by
        )
        save_model(self.model, self.output_dir / "model")
        height, width = self.held_out.shape[:2]
        metrics = {
            "held_out": {
                "photograph": HELD_OUT_PHOTOGRAPH,
                "measured_on": f"the whole photograph, {height}x{width}, 8 bits, mode of the posterior",
                "psnr": result.psnr,
                "ssim": result.ssim,
                "history": self.history,
            },
            "steps": steps,
            "seconds": round(seconds, 1),
            "stopped_by": stopped_by,
        }
        with replacing(self.output_dir / "metrics.json") as path:
            path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        shown = {name: centre_crop(self.photographs[name], height, width) for name in SHOWN_PHOTOGRAPHS}
        rows = {f"{name} (training)": image for name, image in shown.items()}
        with replacing(self.output_dir / "reconstructions.png") as path:
            draw_reconstructions(
                self.model, {**rows, f"{HELD_OUT_PHOTOGRAPH} (held out)": self.held_out}, path
            )
        with replacing(self.output_dir / "curves.png") as path:
            draw_curves(self.lines, list(self.objective.weights), self.history, HELD_OUT_PHOTOGRAPH, path)
        return result


def build_model(config: ModelConfig, size: int) -> LiteVAE:
    """A model to train from nothing on images of `size` pixels; UserError for settings it does not take."""
    settings = asdict(config)
    try:
        model = LiteVAE.from_preset(settings.pop("preset"), **settings)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    factor = model.spatial_compression_ratio
    if size % factor:
        raise UserError(f"data.size must be a multiple of {factor}, got {size}")
    initialise(model)
    return model


def make_output_dir(folder: Path) -> Path:
    """Makes sure that files can be written to `folder`; UserError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from None
    model = folder / "model"  # will be replaced as a whole
    if model.exists() and any(model.iterdir()) and not (model / "config.json").is_file():
        raise UserError(f"output_dir: {model} is there and is not a model; give another folder")
    return folder


def centre_crop(image: Pixels, height: int, width: int) -> Pixels:
    """The middle of an (H, W, 3) image, at most `height` x `width`."""
    top, left = max(image.shape[0] - height, 0) // 2, max(image.shape[1] - width, 0) // 2
    return image[top : top + height, left : left + width]
