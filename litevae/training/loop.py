"""What the training loops of autoencoders and of diffusion models share: going through the steps."""

import importlib.util
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.data.bad_images import BAD_IMAGES
from litevae.environment import versions
from litevae.errors import NonFiniteError, UserError
from litevae.files import replacing
from litevae.signals import StopRequest
from litevae.training.checkpoint import (
    Checkpoint,
    choose_checkpoint,
    random_state,
    remove_remains,
)
from litevae.training.config import CheckpointConfig
from litevae.training.log import Log, in_short
from litevae.training.step import GRADIENT_RATIO, Outcome

Result = TypeVar("Result")


class LoopConfig(Protocol):
    """What a loop reads of its configuration."""

    max_steps: int
    log_every: int
    max_bad_steps: int
    resume: str
    checkpoint: CheckpointConfig


class Loop(ABC, Generic[Result]):
    """One run: a subclass builds or restores everything, `run` goes through the steps.

    `step` is the last step that updated the weights, `random` the state of the random generators after it:
    what a checkpoint holds is always the run as of that step.
    """

    random: dict[str, Any]

    def __init__(self, config: LoopConfig, output_dir: Path, accelerator: Accelerator) -> None:
        self.output_dir, self.accelerator = output_dir, accelerator
        self.loop_config = config
        self.is_main: bool = accelerator.is_main_process
        self.lines: list[dict[str, Any]] = []
        self.bad: list[str] = []  # steps in a row without an update, and why
        self.unusable: UserError | None = None  # too many bad images, in this process's share
        self.step = self.skipped = 0
        self.seconds_before, self.start = 0.0, time.perf_counter()
        self.saved_step: int | None = None

    @abstractmethod
    def steps(self) -> Iterator[tuple[int, Tensor, float]]:
        """Each step to come with this process's share of its batch and the seconds that it took to get.

        What forbids to train on it goes to `unusable`: the others learn of it within the step.
        """

    @abstractmethod
    def update(self, batch: Tensor, step: int, stop: bool) -> Outcome:
        """One step on this process's share of the batch."""

    @abstractmethod
    def after(self, step: int) -> None:
        """What is due after `step`; the end of the run is `finish`'s."""

    @abstractmethod
    def finish(
        self, signal_name: str | None, stopped: bool, failure: NonFiniteError | UserError | None
    ) -> Result:
        """Writes what the run leaves."""

    @property
    def checkpoint_folder(self) -> Path:
        return self.output_dir / "checkpoints"

    @property
    def seconds(self) -> float:
        """Since the run began, without the times it was not running and the starts."""
        return self.seconds_before + time.perf_counter() - self.start

    def choose_checkpoint(self) -> Checkpoint | None:
        """What the first process chooses, which reads all of it: the others go by its word."""
        chosen: list[Checkpoint | UserError | None] = [None]
        if self.is_main:
            try:
                chosen[0] = choose_checkpoint(self.loop_config.resume, self.checkpoint_folder)
            except UserError as error:
                chosen[0] = error
        broadcast_object_list(chosen)
        if isinstance(chosen[0], UserError):
            raise chosen[0]
        return chosen[0]

    def run(self, stop: StopRequest) -> Result:
        """Goes through the steps until the last one or until `stop`, then writes everything."""
        config = self.loop_config
        if self.is_main:
            with replacing(self.output_dir / "config.yaml") as path:
                text = OmegaConf.to_yaml(OmegaConf.structured(config))
                path.write_text(f"# {versions()}\n{text}", encoding="utf-8")
            remove_remains(self.checkpoint_folder)
        self.start = time.perf_counter()
        stopped = False
        failure: NonFiniteError | UserError | None = None
        with (
            Log(self.output_dir / "metrics.jsonl", self.lines, self.accelerator) as log,
            # into a file or a pipe a line now and then is enough
            tqdm(
                total=config.max_steps,
                initial=self.step,
                unit="step",
                mininterval=0.5 if sys.stderr.isatty() else 10,
                disable=not self.is_main,
            ) as bar,
        ):
            for step, batch, waited in self.steps():
                outcome = self.update(batch, step, stop.signal is not None)
                if outcome.unusable:
                    # the list is that of all processes
                    failure = self.unusable or UserError(
                        "another process found too many images that cannot be used: "
                        f"{self.output_dir / BAD_IMAGES} lists them"
                    )
                    if self.step == 0:  # there is nothing to save
                        raise failure
                    break
                stopped = outcome.stop and step < config.max_steps
                bar.update()
                log.count(len(batch) * self.accelerator.num_processes, waited)
                if outcome.bad is None:
                    self.step, self.random, self.bad = step, random_state(), []
                    due = step == 1 or step % config.log_every == 0 or step == config.max_steps
                    if due or stopped or GRADIENT_RATIO in outcome.values:
                        line = log.write(step, outcome.values, self.skipped)
                        bar.set_postfix_str(in_short(line))
                else:
                    self.skipped += 1
                    self.bad.append(f"step {step}: {outcome.bad}")
                    log.write_skipped(step, outcome.bad, self.skipped)
                    bar.write(f"{self.bad[-1]}: the step is skipped", file=sys.stderr)
                    if len(self.bad) == config.max_bad_steps:
                        failure = NonFiniteError(
                            f"{self.bad[0]}, the first to go"
                            + f"; {len(self.bad)} steps in a row were skipped" * (len(self.bad) > 1)
                        )
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
        if failure:
            raise failure
        return result


def make_accelerator(precision: str, tracker: str, settings: dict[str, Any], folder: Path) -> Accelerator:
    """UserError for a precision or a tracker that this machine does not have."""
    has_device = torch.accelerator.is_available()
    if precision == "fp16" and not has_device:
        raise UserError("precision=fp16 needs a GPU: on a CPU there are bf16 and fp32")
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise UserError(f"tracker={tracker} is not installed: pip install {tracker}")
    AcceleratorState._reset_state()  # keeps the precision of an earlier run in this process
    accelerator = Accelerator(
        cpu=not has_device,  # several processes on CPUs are asked for in this way
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
    )
    if tracker == "tensorboard":
        accelerator.init_trackers("tensorboard")  # the name of its folder
    elif tracker == "wandb":
        accelerator.init_trackers(
            "litevae", config=settings, init_kwargs={"wandb": {"dir": str(folder), "name": folder.name}}
        )
    return accelerator


def make_output_dir(folder: Path, result: str = "model", mark: str = "config.json") -> Path:
    """Makes sure that files can be written to `folder`, and that its folder `result`, if it is there, is one that
    a run has written, with `mark` in it; UserError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder}: {error.strerror}") from None
    there = folder / result  # will be replaced as a whole
    if there.exists() and any(there.iterdir()) and not (there / mark).is_file():
        raise UserError(f"output_dir: {there} is there and is not a {result}; give another folder")
    return folder
