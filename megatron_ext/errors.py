"""What tells bad input from a bug."""

from __future__ import annotations

__all__ = ["AlreadyExistsError", "DivergedError", "UserError", "of_system"]


class UserError(ValueError):
    """What the user is told, bad input above all. The message is one line, whatever it quotes: what, where and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).splitlines()))


class AlreadyExistsError(UserError):
    """Something stands where a new file or folder would go; nothing is ever overwritten."""


class DivergedError(UserError):
    """A number that training cannot go on from: not finite."""


def of_system(error: OSError) -> str:
    """What the system says, and of which file, in one line."""
    return str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
