"""The errors that the command line shows as one line instead of a traceback."""


class UserError(ValueError):
    """Something the user can put right: a missing file, an unknown setting. The message is one line."""


class NonFiniteError(RuntimeError):
    """Training went to infinity or NaN. The message says at which step and which term went first."""
