"""The folder that `prepare` makes: complete or absent, and never written over by mistake."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelyard.data.store import read_manifest
from modelyard.errors import UserError
from modelyard.files import disk_full_error, only_one, sync

LOCK = ".lock"
RECORD = "prepare.json"
"""What an output folder was made from; tells "already there" from "something else is there"."""


def existing_record(output: Path, record: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The record of a complete output that was made from the same; None when there is none, or it may be replaced.

    Args:
        output: the folder; it is whole when every entry is one that its record names.
        record: what is about to be made; the record there may have more keys.
        overwrite: whether an output made from something else may be replaced.

    Raises:
        UserError: the folder holds something else, or a store in it is damaged.
    """
    if not output.exists():
        return None
    if not output.is_dir():
        raise UserError(f"output_path {output} is a file, not a folder")
    entries = {entry.name for entry in output.iterdir()}
    if not entries:
        return None
    try:
        there = json.loads((output / RECORD).read_text(encoding="utf-8"))
        ours = {RECORD, *there["stores"], *there["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if foreign := sorted(entries - ours):
        # Not even to be replaced: the folder may be anything.
        raise UserError(f"output_path {output} holds other files ({foreign[0]}): choose another, or empty it")
    if overwrite:
        return None
    if differences := list(_differences(there, record)):
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"output_path {output} was made from something else ({'; '.join(differences[:3])}{more}): choose another "
            "folder, or replace it (--overwrite)"
        )
    for name in there["stores"]:
        read_manifest(output / name)
    return there


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """`name: old → new` for every value of `new` that `old` has otherwise, and every one that it lacks or has besides."""
    for key in {**new, **({} if not prefix else old)}:
        name = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{name}.")
        elif before != after:
            yield f"{name}: {_short(before)} → {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f"{text[:9]}…"


@contextmanager
def output_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into; it becomes `output`, whole, when the block ends without an error."""
    temporary = output.with_name(output.name + ".tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_path {output} cannot be made: {error.strerror}") from None
    with only_one(temporary / LOCK, f"another prepare is writing {output} at this moment"):
        try:
            for entry in temporary.iterdir():  # left over by one that was killed
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != LOCK:
                    entry.unlink()
            yield temporary
            (temporary / LOCK).unlink()
            sync(temporary)
            _replace(temporary, output)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise disk_full_error(error, output) or UserError(
                f"{error.filename or output}: {error.strerror}"
            ) from None
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace(temporary: Path, output: Path) -> None:
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)
