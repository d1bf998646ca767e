"""The folder that `prepare` makes: complete or absent, never written over by mistake, and gone on with after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelyard.data.manifest import read_manifest
from modelyard.data.store import saved_sizes, write_synced
from modelyard.data.workers import Stopped
from modelyard.errors import UserError
from modelyard.files import DISK_FULL, disk_full_error, only_one, replace_text, sync, what_is_full

LOCK = ".lock"
STATE = "unfinished.json"
"""How far an unfinished folder has come: everything up to there is on the disk."""
JOURNAL = ".columns"
"""Ending of the file that collects a split's columns until they are all there."""
RECORD = "prepare.json"
"""What an output folder was made from; tells "already there" from "something else is there"."""


def existing_record(
    output: Path, record: dict[str, Any], overwrite: bool, *, again: bool = True
) -> dict[str, Any] | None:
    """The record of a complete output that was made from the same; None when there is none, or it may be replaced.

    Args:
        output: the folder; it is whole when every entry is one that its record names.
        record: what is about to be made; the record there may have more keys.
        overwrite: whether an output made from something else may be replaced.
        again: whether then one made from the same may be, too.

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
    other = list(_differences(there, record))
    if overwrite and (again or other):
        return None
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(
            f"output_path {output} was made from something else ({'; '.join(other[:3])}{more}): choose another "
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


@dataclass
class Output:
    """The folder beside the output that is written into."""

    folder: Path
    identity: dict[str, Any]
    saved: dict[str, Any] | None = None
    """What `save` was given last by a run that was stopped, when that can be gone on with."""
    record: dict[str, Any] | None = None
    """The record of a run that was stopped when all was written."""
    notice: str | None = None
    """Why something that was left over is of no use."""

    def save(self, state: dict[str, Any]) -> None:
        """Note how far the work is; what it counts must be on the disk."""
        replace_text(self.folder / STATE, json.dumps(state | {"identity": self.identity}))

    def finish(self, record: dict[str, Any]) -> None:
        """Write the record, which makes the content complete, and clear away what was of use until then."""
        if self.record is None:
            write_synced(self.folder / RECORD, json.dumps(record, indent=1) + "\n")
        _clear(self.folder, {RECORD, *record["stores"], *record["files"]})

    @property
    def resumable(self) -> bool:
        """Whether another start can go on from here."""
        return (self.folder / STATE).exists()


@contextmanager
def output_folder(output: Path, identity: dict[str, Any], *, overwrite: bool = False) -> Iterator[Output]:
    """A folder beside `output` to write into; it becomes `output`, whole, when the block ends without an error.

    What an earlier start left there is kept when it was made from the same, `identity`. It also stays when this block is
    stopped, unless by an error in the input; what the disk or the system refuses is none, whoever puts it into words.

    Raises:
        UserError: it holds work on something else, and `overwrite` is not given.
    """
    temporary = unfinished(output)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_path {output} cannot be made: {error.strerror}") from None
    with only_one(temporary / LOCK, f"another prepare is writing {output} at this moment"):
        work = _left_over(temporary, identity, overwrite)
        try:
            if work.saved is None and work.record is None:
                _clear(temporary, set())
            yield work
            (temporary / LOCK).unlink()
            sync(temporary)
            _replace(temporary, output)
        except BaseException as error:
            refused = _refused(error)
            kept = work.resumable and not in_the_input(error)
            if not kept:
                shutil.rmtree(temporary, ignore_errors=True)
            if refused is not None:
                raise explained(refused, output, kept) from None
            raise


def in_the_input(error: BaseException) -> bool:
    """Whether the input has to change, so that what was made of it is of no use."""
    return isinstance(error, UserError) and not isinstance(error, Stopped) and _refused(error) is None


def stored_parts(output: Path, identity: dict[str, Any]) -> int | None:
    """Parts of the source that the unfinished folder beside `output` has already, by its last save; None: all."""
    folder = unfinished(output)
    if (record := _read_object(folder / RECORD)) is not None and not differences(record, identity):
        return None
    saved = _read_object(folder / STATE)
    if saved is None or "identity" not in saved or differences(saved["identity"], identity):
        return 0
    return saved["part"]


def unfinished(output: Path) -> Path:
    """The folder that `output` is written into until it is complete."""
    return output.with_name(output.name + ".tmp")


def _refused(error: BaseException) -> OSError | None:
    """What the system refused, also where a `UserError` says so (`replace_text` words its own)."""
    for candidate in (error, error.__cause__):
        if isinstance(candidate, OSError):
            return candidate
    return None


def explained(error: OSError, output: Path, kept: bool) -> UserError:
    """What the system refused while `output` was written, in words; `kept`: there is something to go on with."""
    if kept and error.errno in DISK_FULL:
        return UserError(
            f"{what_is_full(error)} while writing {output}; make room and run the same again: it goes on where it was"
        )
    return disk_full_error(error, output) or UserError(f"{error.filename or output}: {error.strerror}")


def _left_over(folder: Path, identity: dict[str, Any], overwrite: bool) -> Output:
    """What can be used of a folder that an earlier start was writing."""
    record, saved = _read_object(folder / RECORD), _read_object(folder / STATE)
    made_from = saved["identity"] if saved is not None and "identity" in saved else record
    if made_from is None or (overwrite and differences(made_from, identity)):
        return Output(folder, identity)
    if found := differences(made_from, identity):
        raise UserError(
            f"{folder} holds unfinished work on something else ({found}): set that back to go on with it, or start "
            "over (--overwrite)"
        )
    if record is not None and _is_complete(folder, record):
        return Output(folder, identity, record=record)
    if saved is None:
        return Output(folder, identity)
    if damage := _torn(folder, saved):
        return Output(folder, identity, notice=f"{damage}; starting over")
    return Output(folder, identity, saved=saved)


def differences(made_from: dict[str, Any], identity: dict[str, Any]) -> str:
    """What differs, in words; empty when nothing does. A record has no note of the program."""
    wanted = {key: value for key, value in identity.items() if key in made_from or key != "program"}
    found = list(_differences(made_from, wanted))
    return "; ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _is_complete(folder: Path, record: dict[str, Any]) -> bool:
    try:
        for name in record["stores"]:
            read_manifest(folder / name)
        return all((folder / name).is_file() for name in record["files"])
    except (UserError, KeyError, TypeError):
        return False


def _torn(folder: Path, saved: dict[str, Any]) -> str | None:
    """Which file is shorter than it was when the state was saved (a crash of the machine, or somebody else)."""
    sizes: dict[Path, int] = {}
    for name, store in saved["stores"].items():
        part = folder / f"{name}.tmp"
        if (folder / name).is_dir():
            part = folder / name
        sizes |= {part / file: size for file, size in saved_sizes(store).items()}
    sizes |= {folder / f"{name}{JOURNAL}": size for name, size in saved["columns"].items()}
    for file, size in sizes.items():
        found = file.stat().st_size if file.is_file() else 0
        if found < size:
            return f"{file} has {found:,} bytes, and {size:,} were saved"
    return None


def _read_object(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _clear(folder: Path, keep: set[str]) -> None:
    """Remove all that is not to be kept, the lock aside."""
    for entry in folder.iterdir():
        if entry.name in keep or entry.name == LOCK:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _replace(temporary: Path, output: Path) -> None:
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)
