"""A function in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` gives, in a process that is forked for it.

    For traces: torch keeps what it found for one rank (which part of a tensor is here) for all that the process does after it,
    and with torch 2.11 a backward without memory starts threads, after which a forked process can do none.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()
