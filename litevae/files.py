"""Files and folders that are complete as soon as they bear their final name, and downloaded weights."""

import hashlib
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import torch

from litevae.errors import UserError


def temporary_of(path: Path) -> Path:
    """Where `replacing` has a file written."""
    return path.with_name(f".{path.stem}.tmp{path.suffix}")  # writers go by the suffix


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file to; it takes `path`'s place if nothing is raised."""
    temporary = temporary_of(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Writes a file through to the disk. The libraries' own writers raise what not, or crash, if it is full."""
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None  # names the file


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A path beside `folder` to make a folder at; it takes `folder`'s place if nothing is raised."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # the last save was killed between its two renames
        os.rename(old, folder)
    shutil.rmtree(new, ignore_errors=True)
    try:
        yield new
        if folder.exists():  # a folder that is not empty cannot be replaced in one step
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_path(url: str) -> Path:
    """Where PyTorch keeps what it downloaded from `url`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


@contextmanager
def explaining_weights(url: str, what: str) -> Iterator[None]:
    """Around the download and loading of weights: UserError, naming the file, where either fails.

    Args:
        url: of the file.
        what: it is, for the message.
    """
    path = weights_path(url)
    try:
        yield
    # HTTPException: the connection broke; RuntimeError: a wrong hash, or tensors of another shape
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if path.exists():
            raise UserError(f"{path} is not {what}, or damaged ({reason}): delete it") from None
        raise UserError(f"{path} is not there and cannot be downloaded ({reason}): put {url} there") from None
