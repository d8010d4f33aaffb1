"""Errors that the command line shows as one line instead of a traceback."""

import os

LONGEST_MESSAGE = 400  # characters
LONGEST_VALUE = 80  # characters of a value within a message


class UserError(ValueError):
    """An error that the user can correct, such as a missing file or an unknown setting.

    The message is made one line of limited length by `one_line`, whatever is put into it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class WorkerDied(RuntimeError):
    """A worker process that reads data was killed, or crashed. The message is one line."""


class NonFiniteError(RuntimeError):
    """A loss or gradient became infinite or NaN. The message names the step and the first such term."""


def one_line(text: object, longest: int = LONGEST_MESSAGE) -> str:
    """Returns a text as one printable line.

    White space becomes single spaces, and unprintable characters are escaped as in `repr`. A text longer than
    `longest` loses its middle: a message begins with what it is about and ends with what is allowed.
    """
    whole = str(text)
    if len(whole) > 8 * longest:  # the rest cannot show
        whole = whole[: 4 * longest] + whole[-4 * longest :]
    line = "".join(
        letter if letter.isprintable() else repr(letter)[1:-1] for letter in " ".join(whole.split())
    )
    if len(line) <= longest:
        return line
    head = (longest - 3) * 2 // 3
    return f"{line[:head]}...{line[head + 3 - longest :]}"


def shorten(value: object) -> str:
    """Returns the `repr` of a value for a message, without its middle if it is long."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to print more than 4300 digits
        return f"a number of about {value.bit_length() * 3 // 10} digits"
    return one_line(repr(value), LONGEST_VALUE)


def describe_os_error(error: OSError) -> str:
    """Returns an operating system's error as the path, without its middle if it is long, and the reason."""
    if error.filename is None or not error.strerror:
        return str(error)
    return f"{one_line(os.fsdecode(error.filename), 2 * LONGEST_VALUE)}: {error.strerror}"
