"""The training loop that autoencoders and diffusion models share, with its checkpoints."""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ModelMixin
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae import settings
from litevae.data.bad_images import BAD_IMAGES
from litevae.environment import versions
from litevae.errors import NonFiniteError, UserError, WorkerDied
from litevae.evaluation.metrics import Metric
from litevae.files import replacing
from litevae.models.weights import load_weights
from litevae.signals import StopRequest
from litevae.training.checkpoint import (
    STATE,
    Checkpoint,
    find_checkpoints,
    load_state,
    random_state,
    read_manifest,
    remove_old,
    remove_temporary,
    restore_random_state,
    save_checkpoint,
)
from litevae.training.metrics_log import MetricsLog, estimate_end, format_progress, read_log
from litevae.training.optimization import EMA
from litevae.training.sections import CheckpointConfig
from litevae.training.start import CHECKPOINTS
from litevae.training.step import GRADIENT_RATIO, Outcome

Result = TypeVar("Result")
Failure = NonFiniteError | UserError | WorkerDied  # errors that end a run and let it save its state


@dataclass(frozen=True)
class SavedState:
    """The part of a checkpoint that depends on the trainer.

    `state` has entries of state.pt, `manifest` has entries of manifest.json, and `discriminator` is the state dict of
    the discriminator, if there is one.
    """

    state: dict[str, Any]
    discriminator: dict[str, Tensor] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)


class LoopConfig(Protocol):
    """The settings that a loop reads; a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    max_steps: int
    log_every: int
    max_bad_steps: int
    resume: str

    @property
    def checkpoint(self) -> CheckpointConfig: ...


class Loop(ABC, Generic[Result]):
    """One run: a subclass builds or restores everything, and `run` performs the steps.

    `step` is the last step that updated the weights, and `random` the state of the random generators after it. A
    checkpoint always holds the run as of that step.
    """

    network_name: ClassVar[str]  # name of the network's folder in a checkpoint
    decisive_settings: ClassVar[tuple[str, ...]]  # a resumed run that changes these sections is another run
    best_by: Metric = "psnr"  # metric of the best checkpoint, if any is measured

    random: dict[str, Any]
    network: ModelMixin
    ema: EMA[Any] | None

    def __init__(self, config: LoopConfig, output_dir: Path, accelerator: Accelerator, note: str) -> None:
        self.output_dir, self.accelerator = output_dir, accelerator
        self.note = note  # a line that `run` prints to stderr, if it is not empty
        self.loop_config = config
        self.is_main: bool = accelerator.is_main_process
        self.lines: list[dict[str, Any]] = []
        self.skipped_since_update: list[str] = []  # the reasons, one per step
        # Set if this process's share of a batch has too many unusable images, or could not be read.
        self.unusable: UserError | WorkerDied | None = None
        self.step = self.skipped = 0
        self.seconds_before, self.start = 0.0, time.perf_counter()
        self.saved_step: int | None = None
        self.restored_step: int | None = None

    @abstractmethod
    def steps(self) -> Iterator[tuple[int, Tensor, float]]:
        """Yields each remaining step, this process's share of its batch, and the seconds spent waiting for it.

        If the share must not be trained on, `unusable` is set; the other processes learn of it within the step.
        """

    @abstractmethod
    def update(self, batch: Tensor, step: int, stop: bool) -> Outcome:
        """Performs one step on this process's share of the batch.

        Args:
            batch: result of `steps`.
            step: number of the step, from 1.
            stop: whether this process was asked to stop.
        """

    @abstractmethod
    def after(self, step: int) -> None:
        """Validates or saves if that is due after `step`; after the last step, `finish` is called instead."""

    @abstractmethod
    def finish(self, signal_name: str | None, stopped: bool, failure: Failure | None) -> Result:
        """Writes the files of the run.

        Args:
            signal_name: signal that this process received, if any.
            stopped: whether the run was stopped before its last step.
            failure: error that ended the run, if any.
        """

    @abstractmethod
    def state_to_save(self) -> SavedState:
        """Returns what the trainer adds to a checkpoint of the network, its average and the loop's own state."""

    @abstractmethod
    def restore_state(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Restores the result of `state_to_save`.

        Args:
            checkpoint: checkpoint to restore from.
            state: content of its state.pt.

        Raises:
            UserError: the checkpoint belongs to another architecture.
        """

    def save(self) -> None:
        """Writes a checkpoint of the last step that updated the weights; all processes take part."""
        config = self.loop_config
        if not config.checkpoint.every or self.saved_step == self.step:
            return
        random = gather_object([self.random])
        if self.is_main:
            scaler, added = self.accelerator.scaler, self.state_to_save()
            state = {
                "random": random,
                "scaler": scaler.state_dict() if scaler else None,
                "ema_updates": self.ema.updates if self.ema else 0,
                "skipped": self.skipped - len(self.skipped_since_update),
                "seconds": self.seconds,
                **added.state,
            }
            save_checkpoint(
                self.checkpoint_folder,
                self.step,
                {self.network_name: self.network} | ({"ema": self.ema.model} if self.ema else {}),
                added.discriminator,
                state,
                {**added.manifest, "versions": versions(), "config": asdict(config)},
            )
            remove_old(self.checkpoint_folder, config.checkpoint.keep, self.best_by)
        self.saved_step = self.step
        self.accelerator.wait_for_everyone()

    def describe_saved(self) -> str:
        """Says how a run that an error has ended can be continued."""
        if not self.loop_config.checkpoint.every:
            return f"the results after step {self.step} are saved, but no checkpoint (checkpoint.every=0)"
        (*_, newest) = find_checkpoints(self.checkpoint_folder)
        return f"{newest.path} is saved: continue with resume=auto"

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores the run from a checkpoint; raises UserError if it belongs to another architecture."""
        path = checkpoint.path
        load_weights(self.network, path / self.network_name, "resume")
        if (path / "ema").is_dir() != (self.ema is not None):
            raise UserError(f"resume: {path} has {'no' if self.ema else 'an'} averaged model: see ema_decay")
        state = load_state(checkpoint)
        if self.ema is not None:
            load_weights(self.ema.model, path / "ema", "resume")
        try:
            self.restore_all(checkpoint, state)
        except (UserError, OSError):
            raise
        except Exception as error:  # the entries may be missing, or of any type
            raise UserError(
                f"resume: {path / STATE}: does not hold the state of such a run: {type(error).__name__} {error}"
            ) from None

    def restore_all(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Restores all but the weights of the network and its average from the content of state.pt."""
        if self.ema is not None:
            self.ema.updates = state["ema_updates"]
        self.restore_state(checkpoint, state)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_step = self.restored_step = checkpoint.step
        self.warn_of_changes(checkpoint)
        self.skipped, self.seconds_before = int(state["skipped"]), float(state["seconds"])
        self.lines = read_log(self.output_dir / "metrics.jsonl", self.step)
        restore_random_state(state["random"][self.accelerator.process_index % len(state["random"])])

    def warn_of_changes(self, checkpoint: Checkpoint) -> None:
        """Prints to stderr which of the decisive settings differ from those of the checkpoint."""
        before, now = read_manifest(checkpoint.path)["config"], asdict(self.loop_config)
        changed = [key for key in self.decisive_settings if key in before and differs(before[key], now[key])]
        if changed and self.is_main:
            tqdm.write(
                f"resume: {checkpoint.path} was trained with other settings of {', '.join(changed)}",
                file=sys.stderr,
            )

    @property
    def checkpoint_folder(self) -> Path:
        return self.output_dir / CHECKPOINTS

    @property
    def seconds(self) -> float:
        """Seconds of training, without the time before each start and between runs."""
        return self.seconds_before + time.perf_counter() - self.start

    def run(self, stop: StopRequest) -> Result:
        """Performs the steps until the last one or until `stop`, then writes everything."""
        config = self.loop_config
        if self.is_main:
            with replacing(self.output_dir / "config.yaml") as path:
                path.write_text(f"# {versions()}\n{settings.dump(config)}", encoding="utf-8")
            remove_temporary(self.checkpoint_folder)
            if self.note:
                tqdm.write(self.note, file=sys.stderr)
        self.start = time.perf_counter()
        stopped, first = False, self.step  # the last step before those of this process
        failure: Failure | None = None
        with (
            MetricsLog(self.output_dir / "metrics.jsonl", self.lines, self.accelerator) as log,
            # A file or a pipe gets fewer lines than a terminal.
            tqdm(
                total=config.max_steps,
                initial=self.step,
                unit="step",
                mininterval=0.5 if sys.stderr.isatty() else 10,
                disable=not self.is_main,
            ) as bar,
        ):
            for step, batch, wait_seconds in self.steps():
                outcome = self.update(batch, step, stop.signal is not None)
                if outcome.unusable:
                    # All processes write the same list.
                    failure = self.unusable or UserError(
                        "another process found too many images that cannot be used, listed in "
                        f"{self.output_dir / BAD_IMAGES}, or could not read its data"
                    )
                    if self.step == 0:  # there is nothing to save
                        raise failure
                    break
                stopped = outcome.stop and step < config.max_steps
                bar.update()
                log.count(len(batch) * self.accelerator.num_processes, wait_seconds)
                if outcome.non_finite is None:
                    self.step, self.random, self.skipped_since_update = step, random_state(), []
                    due = step == 1 or step % config.log_every == 0 or step == config.max_steps
                    if due or stopped or GRADIENT_RATIO in outcome.values:
                        line = log.write(step, outcome.values, self.skipped)
                        past = time.perf_counter() - self.start
                        end = estimate_end(step - first, config.max_steps - first, past)
                        bar.set_postfix_str(f"{format_progress(line)}, {end}")
                else:
                    self.skipped += 1
                    reasons = self.skipped_since_update
                    reasons.append(f"step {step}: {outcome.non_finite}")
                    log.write_skipped(step, outcome.non_finite, self.skipped)
                    bar.write(f"{reasons[-1]}: the step is skipped", file=sys.stderr)
                    if len(reasons) == config.max_bad_steps:
                        count = f"; {len(reasons)} steps in a row were skipped" if len(reasons) > 1 else ""
                        failure = NonFiniteError(reasons[0] + count)
                if stopped or failure:
                    break
                self.after(step)
                log.restart()
        try:
            result = self.finish(stop.signal, stopped, failure)
        except OSError as error:
            if failure:
                tqdm.write(str(error), file=sys.stderr)
                raise failure from error
            raise
        if isinstance(failure, WorkerDied):
            raise WorkerDied(f"{failure}; {self.describe_saved()}")
        if failure:
            raise failure
        return result


def differs(before: object, now: object) -> bool:
    """Returns whether two settings, or sections of them, differ in what the first holds; an older one may hold less."""
    if isinstance(before, dict) and isinstance(now, dict):
        return any(differs(value, now[name]) for name, value in before.items() if name in now)
    return before != now
