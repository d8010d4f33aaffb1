"""Paths of image files and shards: search in folders, expansion of patterns, and compact storage."""

import glob
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import numpy as np

from litevae.data.pixels import EXTENSIONS
from litevae.data.remote import expand_address, is_remote, redact_pattern, redact_text
from litevae.errors import LONGEST_VALUE, UserError, one_line
from litevae.files import explaining_digits, why_missing

MOST_NAMES = 10**6  # that a pattern may stand for
DEEPEST_BRACES = 50
LETTERS = ascii_uppercase + ascii_lowercase  # in the order of `braceexpand`


def find_images(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> Iterator[str]:
    """Yields the paths of the files below `folder` that have one of the extensions, in sorted order.

    Hidden files and folders are left out. Links to folders are followed, but no folder is visited twice, because
    links may form cycles.

    Raises:
        UserError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(extensions) and not name.startswith("."):
                yield os.path.join(parent, name)


def expand_pattern(pattern: str) -> list[str]:
    """Lists the files, at paths or addresses, that a pattern with braces, wildcards and "::" matches.

    Returns:
        The files in the order of the pattern's parts, without duplicates. The list is empty if the pattern has one
        part, which matches no file.

    Raises:
        UserError: the braces are unbalanced or stand for too many names, or one of several parts matches no file.
    """
    from webdataset.shardlists import expand_urls  # slow to import

    shown = redact_pattern(pattern)
    count = count_names(pattern)
    if count > MOST_NAMES:
        raise UserError(
            f"{shown}: the braces stand for {count:.3g} names; at most {MOST_NAMES:,} are allowed"
        )
    try:
        with explaining_digits():
            parts = expand_urls(pattern)
    except ValueError as error:
        raise UserError(f"{one_line(shown, 2 * LONGEST_VALUE)}: {redact_text(str(error))}") from None
    files: list[str] = []
    for part in parts:
        if is_remote(part):
            files += expand_address(part)
            continue
        found = sorted(glob.glob(part, recursive=True))
        if not found and len(parts) > 1:
            raise UserError(f"{part}: {why_missing(part, 'file')} (of {shown})")
        files += found
    return list(dict.fromkeys(files))


def count_names(pattern: str) -> float:
    """Returns the number of names that a pattern with braces stands for, without listing them.

    Raises:
        UserError: the braces are nested more than `DEEPEST_BRACES` deep.
    """
    text = re.sub(r"\\.|\0", "", pattern)  # without escaped characters
    counts: list[
        float
    ] = []  # names per group so far; a null character and the group's number replace it in the text

    def count_sequence(part: str) -> float:
        return math.prod(counts[int(number)] for number in re.findall("\0(\\d+);", part))

    def count_group(group: "re.Match[str]") -> str:
        ends = re.fullmatch(r"(-?\d{1,300}|[A-Za-z])\.\.(-?\d{1,300}|[A-Za-z])(?:\.\.-?(\d+))?", group[1])
        if ends is None:
            counts.append(sum(map(count_sequence, group[1].split(","))))
        else:
            first, last = (float(LETTERS.find(end) if end in LETTERS else end) for end in ends.group(1, 2))
            counts.append(abs(last - first) // max(float(ends[3] or 1), 1) + 1)
        return f"\0{len(counts) - 1};"

    for _ in range(DEEPEST_BRACES):
        text, found = re.subn(r"\{([^{}]*)\}", count_group, text)
        if not found:
            return sum(map(count_sequence, text.split("::")))
    raise UserError(f"{redact_pattern(pattern)}: the braces are nested more than {DEEPEST_BRACES} deep")


def name_files(files: Sequence[str]) -> str:
    """Returns the name that messages give to several files: the first one and the number of the others."""
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


class PackedStrings:
    """A sequence of strings in one array of bytes.

    A list of a million paths would take 100 MB, and as much again in each worker process: reading a Python object
    changes its reference count, and thereby copies its memory page.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        data, ends = bytearray(), [0]
        for string in strings:
            data += os.fsencode(string)  # also encodes file names that are not valid UTF-8
            ends.append(len(data))
        self.data = np.frombuffer(bytes(data), np.uint8)
        self.ends = np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.data[self.ends[index] : self.ends[index + 1]].tobytes())
