"""Checkpoints of a training run: writing, checking, choosing and reading them."""

import io
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from litevae.errors import UserError, one_line, shorten
from litevae.evaluation.metrics import METRICS, Metric, find_best
from litevae.files import (
    can_be_path,
    files_in,
    open_regular,
    random_sibling,
    read_json,
    sha256,
    sync_folder,
    why_missing,
    write,
)
from litevae.models.weights import write_model, write_tensors

MANIFEST, STATE, DISCRIMINATOR = "manifest.json", "state.pt", "discriminator.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, such as step-00001000.

    Its folder holds model/; ema/ if there is an average; discriminator.safetensors if there is a discriminator;
    state.pt (optimizers, random states and so on); and manifest.json. `metrics` holds the metrics of the validation
    images if they were measured at this step.
    """

    path: Path
    step: int
    metrics: dict[str, float]


def save_checkpoint(
    folder: Path,
    step: int,
    models: Mapping[str, ModelMixin],
    discriminator: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> Checkpoint:
    """Writes a checkpoint through to the disk, under a temporary name until it is complete.

    Args:
        folder: folder of the run's checkpoints.
        step: last step that updated the weights.
        models: models by the name of their folder.
        discriminator: state dict of the discriminator, or None.
        state: tensors, numbers and text in lists and dicts, which load without unpickling code.
        manifest: further entries of manifest.json, such as the metrics of the validation images by their names.

    Raises:
        OSError: the checkpoint cannot be written, for example because the disk is full. No part of it is left,
            and the other checkpoints stay.
    """
    target = folder / f"step-{step:08d}"
    temporary = random_sibling(target, "new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        for name, model in models.items():
            write_model(model, temporary / name)
        if discriminator is not None:
            write_tensors(temporary / DISCRIMINATOR, discriminator)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(temporary / STATE, buffer.getvalue())
        files = {
            path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in files_in(temporary)
        }
        content = {"step": step, **manifest, "files": files}
        write(temporary / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())
        for path in (*(temporary / name for name in models), temporary):
            sync_folder(path)
        shutil.rmtree(target, ignore_errors=True)  # it exists only if it is incomplete
        os.rename(temporary, target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        others = "; earlier checkpoints are intact" if find_checkpoints(folder) else ""
        raise OSError(f"checkpoint {target}: cannot be written: {error.strerror or error}{others}") from None
    return Checkpoint(target, step, measured(manifest))


def find_damaged_file(checkpoint: Checkpoint) -> str | None:
    """Reads all files of a complete checkpoint; returns a description of the first damaged one, or None."""
    path = checkpoint.path / MANIFEST
    try:
        for name, file in read_manifest(checkpoint.path)["files"].items():
            path = checkpoint.path / name
            if sha256(path) != file["sha256"]:
                return f"{path}: damaged: its SHA-256 is not the one in {MANIFEST}"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    except ValueError as error:  # the manifest has changed meanwhile
        return f"{path}: {error}"
    return None


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Returns the complete checkpoints in `folder`, oldest first."""
    return scan(folder)[0]


def scan(folder: Path) -> tuple[list[Checkpoint], dict[Path, str]]:
    """Opens the checkpoints in a folder, oldest first.

    Returns:
        The complete checkpoints, and for each of the other folders why it is refused.
    """
    complete: list[Checkpoint] = []
    refused: dict[Path, str] = {}
    named = [path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]{8,}", path.name)]
    for path in sorted(named, key=number):
        try:
            complete.append(open_checkpoint(path))
        except UserError as error:
            refused[path] = str(error)
    return sorted(complete, key=lambda checkpoint: checkpoint.step), refused


def number(path: Path) -> int:
    """Returns the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint, whose entries have the right types.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not the manifest of a checkpoint.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError("not the manifest of a checkpoint")
    step, files = manifest.get("step"), manifest.get("files")
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"step must be a whole number, got {shorten(step)}")
    for name in METRICS:
        if manifest.get(name) is not None and type(manifest[name]) not in (int, float):
            raise ValueError(f"{name} must be a number or null, got {shorten(manifest[name])}")
    if not isinstance(manifest.get("config"), dict):
        raise ValueError("config must be a mapping of settings")
    if not isinstance(files, dict) or not all(isinstance(each, dict) for each in files.values()):
        raise ValueError("files must map the name of each file to its bytes and sha256")
    for name, file in files.items():
        if type(file.get("bytes")) is not int or not isinstance(file.get("sha256"), str):
            raise ValueError(f"files must give the bytes and sha256 of {shorten(name)}")
    if STATE not in files:
        raise ValueError(f"files must name {STATE}, got {shorten(list(files))}")
    return manifest


def measured(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics in a manifest."""
    return {name: manifest[name] for name in METRICS if manifest.get(name) is not None}


def open_checkpoint(path: Path) -> Checkpoint:
    """Returns the checkpoint at `path`, whose files exist and have the lengths that its manifest lists.

    Raises:
        UserError: it is refused. The message names the file and the reason.
    """
    file = path / MANIFEST
    try:
        manifest = read_manifest(path)
        for name, listed in manifest["files"].items():
            length = length_within(path, name)
            if length != listed["bytes"]:
                file = path / name
                raise ValueError(f"has {length} bytes, not {shorten(listed['bytes'])}")
    except OSError as error:
        raise UserError(f"{error.filename or file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    return Checkpoint(path, manifest["step"], measured(manifest))


def length_within(folder: Path, name: str) -> int:
    """Returns the length of a file within a folder, by its relative name.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
        ValueError: the name leads out of the folder, if need be by a link.
    """
    parts = PurePosixPath(name).parts if can_be_path(name) else ()
    above = [folder.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or any(map(Path.is_symlink, above)):
        raise ValueError(f"{shorten(name)} is not within the checkpoint")
    with open_regular(above[-1]) as file:
        return os.fstat(file.fileno()).st_size


def remove_old(folder: Path, keep: int, best_by: Metric = "psnr") -> None:
    """Deletes all checkpoints except the last `keep` and the one that is best by a metric, the first of equal ones."""
    checkpoints = find_checkpoints(folder)
    best = find_best(best_by, [checkpoint.metrics.get(best_by) for checkpoint in checkpoints])
    for index, checkpoint in enumerate(checkpoints[:-keep]):
        if index != best:
            # A half-deleted checkpoint must not look like a checkpoint.
            trash = random_sibling(checkpoint.path, "old")
            os.rename(checkpoint.path, trash)
            shutil.rmtree(trash, ignore_errors=True)


def remove_temporary(folder: Path) -> None:
    """Deletes the temporary folders of a run that was killed while it saved or deleted a checkpoint."""
    for pattern in (".step-*.new", ".step-*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def choose_checkpoint(resume: str, folder: Path) -> Checkpoint | None:
    """Returns the checkpoint to resume from, whose files are intact.

    Args:
        resume: "" for none; "auto" for the newest intact checkpoint in `folder`, if there is one (newer, damaged
            ones are renamed, and a line on stderr says so); or the path of a checkpoint, or of a run for its
            newest one.
        folder: folder of the run's own checkpoints.

    Raises:
        UserError: there is no complete checkpoint at that path, it is damaged, or the run would overwrite newer
            ones; for "auto", all checkpoints in `folder` are damaged.
    """
    own, refused = scan(folder)
    chosen: Checkpoint | None = None
    if refused and not own and resume in ("", "auto"):  # only a complete checkpoint is given such a name
        raise UserError(
            f"{list(refused.values())[-1]}, and {folder} has no checkpoint that is intact: delete them, or give "
            "another output_dir"
        )
    if resume == "auto":
        if not own and folder.parent.joinpath("metrics.jsonl").is_file():
            tqdm.write(f"resume: {folder} holds no checkpoint; starting from step 1", file=sys.stderr)
        return newest_intact(own, refused)
    if resume:
        chosen = open_named(Path(resume))
        if problem := find_damaged_file(chosen):
            raise UserError(f"resume: {problem}")
    if own and (chosen is None or own[-1].step > chosen.step):
        raise UserError(
            f"{folder} has a checkpoint of step {own[-1].step}: continue with resume=auto, or give another "
            "output_dir"
        )
    return chosen


def open_named(path: Path) -> Checkpoint:
    """Returns the checkpoint at `path`, or the newest complete one of the run at `path`.

    A line on stderr names a newer one that is refused.

    Raises:
        UserError: there is no complete checkpoint.
    """
    if os.path.exists(path / MANIFEST):
        try:
            return open_checkpoint(path)
        except UserError as error:
            raise UserError(f"resume: {error}") from None
    complete, refused = scan(path / "checkpoints")
    if not complete and refused:
        raise UserError(f"resume: {list(refused.values())[-1]}, and {path} has no complete checkpoint")
    if not complete:
        lacking = f"no complete checkpoint: has neither {MANIFEST} nor checkpoints/step-*"
        raise UserError(f"resume: {path}: {lacking if os.path.exists(path) else why_missing(path, 'folder')}")
    for refused_path, problem in refused.items():
        if number(refused_path) > number(complete[-1].path):
            tqdm.write(f"resume: {problem}; continuing from {complete[-1].path}", file=sys.stderr)
    return complete[-1]


def newest_intact(complete: Sequence[Checkpoint], refused: Mapping[Path, str]) -> Checkpoint | None:
    """Returns the newest intact checkpoint of a run.

    Newer ones, which are damaged or refused, are renamed, so that they do not count as ones to keep. A line on stderr
    says so for each.

    Args:
        complete: complete checkpoints, oldest first.
        refused: further folders, with the reasons why they are refused.

    Raises:
        UserError: all checkpoints are damaged.
    """
    problems = dict(refused)
    newest = ""  # problem of the newest complete checkpoint
    for checkpoint in reversed(complete):
        if problem := find_damaged_file(checkpoint):
            problems[checkpoint.path] = problem
            newest = newest or problem
            continue
        for path, problem in problems.items():
            if number(path) < number(checkpoint.path):
                continue
            renamed = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            os.rename(path, renamed)
            tqdm.write(
                f"resume: {problem}; renamed to {renamed.name}, continuing from {checkpoint.path}",
                file=sys.stderr,
            )
        return checkpoint
    if newest:
        raise UserError(f"resume: {newest}, and there is no older one that is intact")
    return None


def load_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the `state` that `save_checkpoint` wrote, on the CPU; raises UserError if it cannot be read."""
    path = checkpoint.path / STATE
    try:
        with open_regular(path) as file:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from None
    except Exception:  # the unpickler can raise almost anything, with advice that does not apply
        raise UserError(f"{path}: cannot be read: not a state that litevae has written") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: cannot be read: not a state that litevae has written")
    return state


def random_state() -> dict[str, Any]:
    """Returns the state of every global random generator that a training process draws from."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002  (the global generator)
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restores the generators to the result of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
