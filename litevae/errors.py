"""Errors that the command line shows as one line instead of a traceback."""


class UserError(ValueError):
    """An error that the user can correct, such as a missing file or an unknown setting. The message is one line."""


class WorkerDied(RuntimeError):
    """A worker process that reads data was killed, or crashed. The message is one line."""


class NonFiniteError(RuntimeError):
    """A loss or gradient became infinite or NaN. The message names the step and the first such term."""
