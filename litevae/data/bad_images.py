"""The list of unusable images, and the limit on their number."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from litevae.errors import UserError
from litevae.files import open_regular, open_to_append

BAD_IMAGES = "bad_images.txt"  # name of the list in a run's folder

BadEntry = tuple[str, str]  # name of an unusable image, and the reason


def allowed_bad(total: int, max_fraction: float) -> int:
    """Returns how many of `total` images may be unusable."""
    return math.floor(round(total * max_fraction, 6))  # 0.29 x 100 is 28.999999999999996


class BadImages:
    """The list of unusable images of a run, in a text file with one line per image: name, tab, reason.

    An existing file is continued; delete it before a new run. Each process of a run may open the same file.

    Args:
        path: path of the file, which is created when the first image fails.
        total: number of images in the data set.
        max_fraction: fraction of the images that may be unusable.
        setting: the user's name for `max_fraction`, for the message.
    """

    def __init__(
        self, path: Path, total: int, max_fraction: float, setting: str = "data.max_bad_fraction"
    ) -> None:
        self.path = path
        self.setting = setting
        self.total = total
        self.max_fraction = max_fraction
        self.names: set[str] = set()
        if path.is_symlink():  # planted by others: appending would change its target
            path.unlink(missing_ok=True)
        self.drop_unfinished_line()
        self.read()

    def __len__(self) -> int:
        return len(self.names)

    def add(self, bad: Iterable[BadEntry]) -> None:
        """Appends the images that are not listed yet.

        Raises:
            UserError: the list is longer than allowed, or cannot be written.
        """
        lines = {one_field(name): one_field(reason) for name, reason in bad}
        if lines.keys() - self.names:
            self.read()  # other processes may have appended to it
            new = {name: reason for name, reason in lines.items() if name not in self.names}
            text = "".join(f"{name}\t{reason}\n" for name, reason in new.items())
            try:
                with open_to_append(self.path) as file:
                    file.write(os.fsencode(text))
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
            self.names |= new.keys()
        if len(self.names) > allowed_bad(self.total, self.max_fraction):
            raise UserError(
                f"{len(self.names)} of {self.total} images cannot be used, more than "
                f"{self.setting}={self.max_fraction:g} allows: {self.path} lists them"
            )

    def read(self) -> None:
        """Adds the names that the file lists."""
        lines = self.content().splitlines()
        self.names |= {os.fsdecode(line).partition("\t")[0] for line in lines}

    def drop_unfinished_line(self) -> None:
        """Removes an incomplete last line, which a full disk may have left."""
        content = self.content()
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def content(self) -> bytes:
        """Returns the content of the file, which is empty before the first image fails; `UserError` if it is none."""
        try:
            with open_regular(self.path) as file:
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None


def one_field(text: str) -> str:
    """Escapes the characters that separate the fields and lines of the list."""
    return text.translate({ord("\t"): r"\t", ord("\r"): r"\r", ord("\n"): r"\n"})
