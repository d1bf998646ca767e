"""The exceptions whose message is for the user: one line, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Bad input: a config, a file or an argument that the user has to change.

    The program prints each problem as one line, without a traceback, and leaves with exit status 2.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)

    def __reduce__(self) -> tuple[type[UserError], tuple[str, ...]]:
        return UserError, tuple(self.problems)  # for one that goes to another process


class RunFailed(Exception):
    """A run that cannot go on although nothing is wrong with its input, such as one that diverged.

    The program prints the message as one line and leaves with exit status 1.
    """


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` was most likely meant to be, or None when nothing is near."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or an empty string when nothing is near."""
    match = nearest(name, candidates)
    return f"; did you mean '{match}'?" if match else ""


def missing_path(path: Path | str) -> str:
    """Say that `path` does not exist and name the nearest thing that does; nothing is guessed."""
    path = Path(path)
    parent = path
    while not parent.exists() and parent != parent.parent:
        missing_part, parent = parent.name, parent.parent
    if not parent.is_dir():
        return f"{path} does not exist ({parent} is not a folder)"
    names = sorted(entry.name for entry in parent.iterdir())
    matches = difflib.get_close_matches(missing_part, names, n=1, cutoff=0.7)
    hint = f"; nearest there: {parent / matches[0]}" if matches else ""
    where = "the working directory" if parent == Path() else str(parent)
    return f"{path} does not exist (there is no '{missing_part}' in {where}{hint})"
