"""Which process of a job this is, by what torchrun says in the environment; no torch here."""

from __future__ import annotations

import os
import time

from modelyard.errors import UserError

LAST_WORD = 10.0
"""Seconds that another process than the main one waits for the end, before it speaks for itself."""


def number_of_processes() -> int:
    """Processes of the job that this one belongs to; 1 where it was started alone."""
    return _number("WORLD_SIZE", least=1, default=1)


def rank() -> int:
    """This process's number in the job, from 0."""
    if "WORLD_SIZE" not in os.environ:
        return 0
    return _number("RANK", least=0, most=number_of_processes() - 1, default=0)


def local_rank() -> int:
    """This process's number among those of its machine, from 0."""
    return _number("LOCAL_RANK", least=0)


def main_address() -> str:
    """Where the main process can be reached, as HOST:PORT."""
    return f"{os.environ['MASTER_ADDR']}:{_number('MASTER_PORT', least=1, most=65535)}"


def _number(variable: str, *, least: int, most: int | None = None, default: int = 0) -> int:
    text = os.environ.get(variable, str(default))
    if text.isascii() and text.isdecimal() and int(text) >= least and (most is None or int(text) <= most):
        return int(text)
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    allowed = str(least) if most == least else allowed
    raise UserError(
        f"the environment has {variable}={text}, where a whole number {allowed} is expected; start the run with torchrun "
        "or --nproc, or unset WORLD_SIZE"
    )


def wait_for_the_main_process() -> None:
    """Called with a message that all processes have: the main one says it, and then torchrun ends the others.

    It would end the main one as well, were another the first to leave. Returns at once in the main process, and after
    `LAST_WORD` in another one that is still there.
    """
    if rank():
        time.sleep(LAST_WORD)
