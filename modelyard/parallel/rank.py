"""Which process of a job this is, by what torchrun says in the environment; no torch here."""

from __future__ import annotations

import os
import time

from modelyard.errors import UserError

LAST_WORD = 10.0
"""Seconds that another process than the main one waits for the end, before it speaks for itself."""


def number_of_processes() -> int:
    """Processes of the job that this one belongs to; 1 where it was started alone."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This process's number in the job, from 0."""
    return _number("RANK", 0) if "WORLD_SIZE" in os.environ else 0


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < default:
        raise UserError(
            f"the environment has {variable}={text}, which is no number of processes; unset it, or use --nproc"
        )
    return int(text)


def wait_for_the_main_process() -> None:
    """Called with a message that all processes have: the main one says it, and then torchrun ends the others.

    It would end the main one as well, were another the first to leave. Returns at once in the main process, and after
    `LAST_WORD` in another one that is still there.
    """
    if rank():
        time.sleep(LAST_WORD)
