"""Reading and atomic writing of files and folders, file digests, and the location of downloaded weights."""

import errno
import glob
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

from litevae.errors import UserError, one_line

LONGEST_JSON = 2**27  # bytes
MOST_JSON_VALUES = 5 * 10**6  # with all these, a list of lists takes half a gigabyte
DEEPEST_JSON = 32  # nested lists and mappings

ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes one slash of two

TEMPORARY = "." + "[0-9a-f]" * 16 + ".tmp*"  # pattern of the names that `replacing` gives
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`. Its file replaces `path` on exit, unless the context raises.

    The file is created under a random name that does not exist, so that no link planted by others can redirect what
    is written.

    Raises:
        OSError: the file cannot be created; the error names `path`.
    """
    # Writers choose the format by the suffix.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_to_append(path: Path) -> IO[bytes]:
    """Opens a file to append to, and creates it if necessary; raises OSError if `path` is a symbolic link."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW, 0o666), "ab")


def write(path: Path, content: bytes) -> None:
    """Writes a file and flushes it to the disk.

    The libraries' own writers raise various exceptions, or crash, if the disk is full.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def make_folder(folder: Path) -> None:
    """Creates a folder and those above it, unless it exists.

    Raises:
        OSError: that is not possible; `strerror` is the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # also where a link leads nowhere
        raise NotADirectoryError(errno.ENOTDIR, "exists and is not a folder", str(error.filename)) from None


def sync_folder(folder: Path) -> None:
    """Flushes the folder's entries (created and renamed files) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yields a path beside `folder` at which to create a folder. It replaces `folder` on exit, unless the context
    raises.

    The path has a random name and does not exist, so that creating it cannot follow a link planted by others.
    """
    new, old = random_sibling(folder, "new"), folder.with_name(f".{folder.name}.old")
    if old.is_symlink():  # planted by others
        old.unlink()
    if old.exists() and not folder.exists():  # an earlier process was killed between its two renames
        os.rename(old, folder)
    remove_siblings(folder, "new")  # left by a process that was killed
    try:
        yield new
        if folder.exists():  # a non-empty folder cannot be replaced in one step
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


def random_sibling(path: Path, suffix: str) -> Path:
    """Returns an unpredictable hidden path beside `path`, which `remove_siblings` with the same suffix finds."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{suffix}")


def remove_siblings(path: Path, suffix: str) -> None:
    """Deletes the folders beside `path` that are named by `random_sibling`; links are not followed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.{suffix}"):
        shutil.rmtree(left, ignore_errors=True)


def files_in(folder: Path) -> list[Path]:
    """Returns the files in `folder` and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def can_be_path(text: str) -> bool:
    """Returns whether the operating system takes a text as a path: no null character, no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def why_missing(path: "str | os.PathLike[str]", kind: str) -> str:
    """Returns why a path is not a file or folder, for a message: it does not exist, is an address, and so on.

    Args:
        path: path that is no such `kind`.
        kind: "file", "folder" or "file or folder".
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character
        if ADDRESS.match(os.fspath(path)):
            return f"an address, not a local {kind}: download it and give its path"
        return f"no such {kind}"
    except OSError as error:
        return error.strerror or f"no such {kind}"
    return f"not a {'regular file' if kind == 'file' else kind}"


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a regular file, or a link to one, for reading.

    A FIFO would block, and a device may have no end.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    # without O_NONBLOCK, which has no effect on regular files, a FIFO would block already here
    file = open(  # noqa: SIM115  (the caller closes it)
        path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_json(path: Path, longest: int = LONGEST_JSON) -> Any:
    """Reads a JSON file of limited length, number of values and nesting.

    Args:
        path: path of the file.
        longest: most bytes that the file may have.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError: the file is no JSON or exceeds a limit. The message is the reason.
    """
    with open_regular(path) as file:
        content = file.read(longest + 1)
    if len(content) > longest:
        raise ValueError(f"longer than {longest:,} bytes")
    return parse_json(content)


def parse_json(content: bytes) -> Any:
    """Parses JSON of a limited number of values and nesting; `ValueError` with the reason if it is something else."""
    if sum(map(content.count, (b",", b"[", b"{"))) > MOST_JSON_VALUES:
        raise ValueError(f"has more than {MOST_JSON_VALUES:,} values")
    try:
        with explaining_digits():
            value = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST_JSON):
        level = [
            inner
            for each in level
            if isinstance(each, list | dict)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    if level:
        raise ValueError(f"nested more than {DEEPEST_JSON} deep")
    return value


@contextmanager
def explaining_digits() -> Iterator[None]:
    """Replaces Python's message for a decimal number of too many digits, which advises on Python's own settings.

    Raises:
        ValueError: such a number was to be read. The message is the reason.
    """
    try:
        yield
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        raise ValueError(f"has a whole number of more than {sys.get_int_max_str_digits():,} digits") from None


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a regular file in hexadecimal; `OSError` if it cannot be read."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_path(url: str) -> Path:
    """Returns the path at which PyTorch caches a file downloaded from `url`."""
    import torch  # slow to import

    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


@contextmanager
def explaining_weights(url: str, description: str) -> Iterator[None]:
    """Converts errors of downloading and loading weights to a `UserError` that names the file.

    Args:
        url: address of the file.
        description: description of the weights for the message, such as "torchvision's vgg16".

    Raises:
        UserError: the download or the loading failed.
    """
    path = weights_path(url)
    if path.exists() and not path.is_file():  # a FIFO would block
        raise UserError(f"{path} is not {description}: it is not a regular file")
    try:
        yield
    # HTTPException: the connection broke; RuntimeError: the hash or a tensor's shape is wrong
    except (OSError, HTTPException, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        reason = one_line(error) or type(error).__name__
        if path.exists():
            raise UserError(f"{path} is not {description}, or damaged ({reason}): delete it") from None
        raise UserError(f"{path} is not there and cannot be downloaded ({reason}): put {url} there") from None
