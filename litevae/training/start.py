"""The start of a run: its output folder, its checkpoint to resume from, its precision, and its Accelerator."""

import importlib.util
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from litevae.data.remote import redact_pattern
from litevae.environment import DTYPES, choose_precision
from litevae.errors import UserError
from litevae.files import TEMPORARY
from litevae.lock import locked_by_run
from litevae.training.checkpoint import Checkpoint, choose_checkpoint, read_manifest
from litevae.training.config import RunConfig

ConfigType = TypeVar("ConfigType", bound=RunConfig)
CHECKPOINTS = "checkpoints"  # name of the folder of a run's checkpoints


def begin(
    config: ConfigType, folder: Path, has_range: bool = False
) -> tuple[ConfigType, Accelerator, Checkpoint | None, str]:
    """Chooses the checkpoint and the precision of a run, and creates its Accelerator.

    The main process chooses for all processes. If `config.precision` is "auto", a run that resumes keeps the precision
    of its checkpoint, whatever this machine multiplies fast, so that it continues to the same bits.

    Args:
        config: settings of the run.
        folder: output folder.
        has_range: whether the images have a range of values, as in `choose_precision`.

    Returns:
        The settings with the precision that was chosen, the Accelerator, the checkpoint to resume from, if any, and
        a line that says which precision "auto" is, or "" for another `config.precision`.

    Raises:
        UserError: `choose_checkpoint` or `make_accelerator` raised it.
    """
    state = PartialState(cpu=not torch.accelerator.is_available())  # as in make_accelerator
    chosen: list[Any] = [None, config.precision, ""]
    if state.is_main_process:
        try:
            checkpoint = choose_checkpoint(config.resume, folder / CHECKPOINTS)
            chosen = [
                checkpoint,
                *choose_run_precision(config.precision, checkpoint, state.device, has_range),
            ]
        except UserError as error:
            chosen[0] = error
    broadcast_object_list(chosen)
    checkpoint, precision, note = chosen
    if isinstance(checkpoint, UserError):
        raise checkpoint
    config = replace(config, precision=precision)
    accelerator = make_accelerator(precision, config.tracker, without_secrets(asdict(config)), folder)
    return config, accelerator, checkpoint, note


def without_secrets(settings: Any) -> Any:
    """Returns settings whose addresses lack users, passwords and signatures: trackers send them to a service."""
    if isinstance(settings, dict):
        return {name: without_secrets(value) for name, value in settings.items()}
    return redact_pattern(settings) if isinstance(settings, str) else settings


def choose_run_precision(
    precision: str, checkpoint: Checkpoint | None, device: torch.device, has_range: bool = False
) -> tuple[str, str]:
    """Returns the precision of a run and the line about it; see `begin`."""
    if precision != "auto":
        return choose_precision(precision, device), ""
    if checkpoint is not None:
        precision = read_manifest(checkpoint.path)["config"].get("precision")
        if not isinstance(precision, str) or precision not in DTYPES:
            raise UserError(f"resume: {checkpoint.path}: its precision must be one of {', '.join(DTYPES)}")
        precision = choose_precision(precision, device)
        why = f"as in {checkpoint.path}"
    else:
        precision = choose_precision("auto", device, has_range)
        why = "as this machine multiplies no bfloat16"
        if precision == "bf16":
            why = "which this machine multiplies"
        elif has_range:
            why = "as bf16 would round values of data.value_range to 8 bits"
    return precision, f"precision=auto: {precision}, {why}"


def make_accelerator(precision: str, tracker: str, tracked: dict[str, Any], folder: Path) -> Accelerator:
    """Creates the Accelerator of a run.

    Args:
        precision: "fp32", "bf16" or "fp16".
        tracker: "tensorboard", "wandb" or "none".
        tracked: settings of the run, for the tracker.
        folder: output folder, for the tracker's files.

    Raises:
        UserError: this machine does not support the precision, or the tracker is not installed.
    """
    has_device = torch.accelerator.is_available()
    if precision == "fp16" and not has_device:
        raise UserError("precision=fp16 needs a GPU: a CPU takes bf16 and fp32")
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise UserError(f"tracker={tracker} is not installed: pip install {tracker}")
    AcceleratorState._reset_state()  # it keeps the precision of an earlier run in this process
    accelerator = Accelerator(
        cpu=not has_device,  # lets several processes run on CPUs
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
    )
    if tracker == "tensorboard":
        accelerator.init_trackers("tensorboard")  # also the name of its folder
    elif tracker == "wandb":
        accelerator.init_trackers(
            "litevae", config=tracked, init_kwargs={"wandb": {"dir": str(folder), "name": folder.name}}
        )
    return accelerator


def output_folder(
    folder: Path, command: str, replace: bool = False, result: str = "model", marker: str = "config.json"
) -> AbstractContextManager[None]:
    """Creates the output folder of a run and locks it, as `locked_by_run` does.

    Args:
        folder: output folder.
        command: name of the command, for the message that a second run in the folder gets.
        replace: whether the result of an earlier run without checkpoints may be replaced.
        result: name of the folder in it that the run will replace.
        marker: name of a file that `result` holds if a run has written it.

    Raises:
        UserError: files cannot be written there, another run writes there, or `result` exists and must not be
            replaced.
    """

    def prepare() -> None:
        for path in folder.glob(TEMPORARY):  # left by a run that was killed
            path.unlink(missing_ok=True)
        check_result(folder, replace, result, marker)

    return locked_by_run(folder, command, prepare)


def check_result(folder: Path, replace: bool, result: str, marker: str) -> None:
    """Raises UserError if a run must not replace the result that is in its output folder; see `output_folder`."""
    existing = folder / result  # it will be replaced as a whole
    if not existing.exists() or not any(existing.iterdir()):
        return
    if not (existing / marker).is_file():
        raise UserError(f"output_dir: {existing} exists and is not a {result}; give another folder")
    if not replace and not any((folder / CHECKPOINTS).glob("step-*")):
        raise UserError(
            f"output_dir: {existing} is the {result} of a run without checkpoints, which cannot be continued: "
            "give another output_dir, or delete it to train anew"
        )
