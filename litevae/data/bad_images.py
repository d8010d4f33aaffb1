"""The list of images that cannot be used, and the limit on their number."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from litevae.errors import UserError

BAD_IMAGES = "bad_images.txt"  # the list's name in a run's folder


Bad = tuple[str, str]  # an image's name, and why it cannot be used


def allowed_bad(total: int, max_fraction: float) -> int:
    return math.floor(round(total * max_fraction, 6))  # 0.29 x 100 is 28.999999999999996


class BadImages:
    """The list of images that a run could not use, in a file with a line for each: name, tab, reason.

    A file that is there is continued: delete it for a new run. The processes of a run may each have one of
    these on the same file.

    Args:
        path: of the file; it is made when the first image fails.
        total: number of images in the data set.
        max_fraction: of them that may fail.
        setting: what the user calls `max_fraction`.
    """

    def __init__(
        self, path: Path, total: int, max_fraction: float, setting: str = "data.max_bad_fraction"
    ) -> None:
        self.path = path
        self.setting = setting
        self.total = total
        self.max_fraction = max_fraction
        self.names: set[str] = set()
        self.drop_unfinished_line()
        self.read()

    def __len__(self) -> int:
        return len(self.names)

    def add(self, bad: Iterable[Bad]) -> None:
        """Lists those not yet listed.

        Raises:
            UserError: more are listed now than may fail, or the list cannot be written.
        """
        lines = {one_field(name): one_field(reason) for name, reason in bad}
        if lines.keys() - self.names:
            self.read()  # what other processes have found
            new = {name: reason for name, reason in lines.items() if name not in self.names}
            text = "".join(f"{name}\t{reason}\n" for name, reason in new.items())
            try:
                with open(self.path, "ab") as file:
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
        if self.path.exists():
            lines = self.path.read_bytes().splitlines()
            self.names |= {os.fsdecode(line).partition("\t")[0] for line in lines}

    def drop_unfinished_line(self) -> None:
        """What a full disk may have left."""
        if self.path.exists():
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(self.path, content.rfind(b"\n") + 1)


def one_field(text: str) -> str:
    """Without the signs that end a field of the list."""
    return text.translate({ord("\t"): r"\t", ord("\r"): r"\r", ord("\n"): r"\n"})
