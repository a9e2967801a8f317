"""Mistakes of users: one line that says what was wrong, what is allowed, and the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what a user gave (an argument, a file, a folder); the command line prints it and exits with 2."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest one that does.

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
    return UserError(f"unknown {kind} {name!r}{hint}")
