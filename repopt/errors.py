"""Mistakes of users: one line that says what was wrong, what is allowed, and the nearest valid name."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what a user gave (an argument, a file, a folder); the command line prints it and exits with 2."""


class EquivalenceWarning(UserWarning):
    """Something from outside makes a training differ from that of the multi-branch network."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """Return the error for a name that does not exist, with the nearest one that does.

    Args:
        kind: what the name stands for, "architecture" or "config key".
        name: what the user wrote.
        allowed: every valid name; all are listed where they are few.
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name.lower(), [a.lower() for a in allowed], n=1, cutoff=0.5)
    nearest = next((a for a in allowed if near and a.lower() == near[0]), None)
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    if len(allowed) <= 12:
        hint += f" (allowed: {', '.join(allowed)})"
    return UserError(f"unknown {kind} {shown(name)}{hint}")


def shown(value: object) -> str:
    """Return the repr of what a file or a command line says, as a message quotes it: on one line and cut."""
    return _cut(_SHORT.repr(value))


def one_line(error: BaseException) -> str:
    """Return what a library's error says, on one line and cut; its type where it says nothing."""
    return _cut(str(error)) or type(error).__name__


def _cut(text: str, length: int = 160) -> str:
    text = " ".join(text[: 4 * length].split())
    # Escape control characters, and what a terminal cannot show.
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= length else f"{text[: length - 3]}..."


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out long ones.
        return str(x) if x.bit_length() <= 256 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()
