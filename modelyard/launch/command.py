"""`--nproc` on the command line: how many processes there are or are to be started, and whether they can be laid out."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from modelyard.config.layout import Problem, world_problems
from modelyard.errors import UserError
from modelyard.launch.process import end_with_parent
from modelyard.parallel.rank import number_of_processes, wait_for_the_main_process

if TYPE_CHECKING:
    from modelyard.config.loader import Loaded

Asked = int | Literal["auto"] | None
"""What `--nproc` says."""


def processes_asked(nproc: Asked) -> int | None:
    """How many processes are to be started; None: none, this one does it alone."""
    if nproc != "auto":
        return nproc
    from modelyard.launch.torchrun import automatic

    found = automatic()
    return found if found > 1 else None


def laid_out(load: Callable[[], Loaded], nproc: Asked) -> tuple[Loaded, int | None]:
    """What `load` gives, checked for the number of processes there are or are to be started; and the latter.

    Raises UserError, in one process of a job before the others.
    """
    started = "WORLD_SIZE" in os.environ
    if started and nproc is not None:
        raise UserError(
            "--nproc starts processes, and torchrun has started this one; leave one of the two out"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    try:
        loaded, processes = load(), processes_asked(nproc)
        problems = world_problems(loaded.train, processes or number_of_processes())
        if loaded.train.model.multi_stage.cpu_offload and not (processes or started):
            problems.append(_ALONE)
        if problems:
            raise UserError(*loaded.placed(problems))
    except UserError:
        wait_for_the_main_process()  # all have read the same
        raise
    return loaded, processes


_ALONE: Problem = (
    "model.multi_stage.cpu_offload",
    "yes needs processes that torchrun starts, be it one: --nproc 1",
)
