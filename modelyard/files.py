"""Files that are durable and folders that exist only when they are complete."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from modelyard.errors import UserError

MANIFEST = "manifest.json"
CHAT_FILE = "modelyard_chat.json"
"""Beside a tokenizer: the chat format that conversations were written in (`modelyard.chat.format`)."""
CHECKSUM_LIMIT = 4 * 2**30
"""Bytes up to which data or a checkpoint is read whole before it is used; of more, only the sizes are checked."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def what_is_full(error: OSError) -> str:
    """What there is no room in, the disk itself or what is allowed of it, in words for an error of `DISK_FULL`."""
    if error.errno == errno.ENOSPC:
        return "no space left"
    word = os.strerror(error.errno or 0)
    return f"{word} (a limit on file size: ulimit -f)" if error.errno == errno.EFBIG else word


def sync(path: Path) -> None:
    """Wait until `path`, a file's content or a folder's list of entries, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leave_stdout() -> None:
    """Let what is still said to standard output, its buffer too, go nowhere: it cannot be written any more."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


@contextmanager
def only_one(path: Path, refusal: str, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`; raises UserError(refusal) while another process does, `patience` [seconds] from now.

    A dead process holds nothing; but what a machine held that went with it, a shared disk may hold on to for a while.
    """
    deadline = time.monotonic() + patience
    with path.open("w") as file:
        try:
            while True:
                try:
                    # lockf, not flock: a child that outlives a killed process for a moment must not hold the lock.
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            # The one that held it may have removed it since it was opened here: then this is the lock of nothing.
            still_there = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except OSError:
            raise UserError(refusal) from None
        if not still_there:
            raise UserError(refusal)
        yield


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Write `path` anew; a kill leaves the old content or the new. Raises UserError where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = UserError(f"{path} cannot be written: {error.strerror or error}")
        raise (disk_full_error(error, path) or reason) from error


def disk_full_error(error: OSError, path: Path) -> UserError | None:
    """The message for a disk that filled up while `path` was written; None for any other error."""
    if error.errno not in DISK_FULL:
        return None
    if error.errno != errno.ENOSPC:
        return UserError(f"{what_is_full(error)} while writing {path}; nothing of it was kept")
    from modelyard.config.disk import size  # whose imports need this module

    try:
        free = f", {size(shutil.disk_usage(path.parent).free)} free now"
    except OSError:
        free = ""
    return UserError(f"no space left while writing {path} ({error.strerror}{free}); nothing of it was kept")


Facts = dict[str, dict[str, Any]]
"""Name of a file in its folder → `bytes` and `sha256`: what a manifest holds."""


def unfinished(destination: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return destination.with_name(destination.name + ".tmp")


def synced_facts(files: Iterable[Path], folder: Path) -> Facts:
    """What the manifest says of these files of `folder`; they are on the disk when this returns."""
    files = list(files)
    with ThreadPoolExecutor(1) as pool:
        syncing = pool.map(sync, files)  # the disk and the checksums take their time side by side
        facts = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in files
        }
        list(syncing)
    return facts


@contextmanager
def complete_or_absent(
    destination: Path, *, manifest: bool = False, known: Facts | None = None
) -> Iterator[Path]:
    """Give a folder to write into; it becomes `destination` when the block ends well, and vanishes otherwise.

    It is written beside as `<name>.tmp`; at the end every file is synced, the folder is renamed and its parent synced.
    What was at `destination` stays until then. A kill at any moment leaves `destination` whole or absent. With `manifest`
    it also gets a list of its files with size and sha256, for `damage`; `known`, which the block may fill, has the facts of
    files that whoever wrote them has synced. Raises UserError when the disk is full.
    """
    temporary = unfinished(destination)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        written = sorted(temporary.rglob("*"))
        if manifest:
            facts = dict(known or {})
            rest = [p for p in written if p.is_file() and p.relative_to(temporary).as_posix() not in facts]
            facts |= synced_facts(rest, temporary)
            write_json(temporary / MANIFEST, dict(sorted(facts.items())))
            written = [temporary / MANIFEST, *(p for p in written if p.is_dir())]
        for path in (*written, temporary):
            sync(path)
        before = destination.with_name(destination.name + ".before.tmp")
        if destination.exists():
            os.rename(destination, before)
        os.rename(temporary, destination)
        sync(destination.parent)
        shutil.rmtree(before, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            reason = UserError(f"{destination} cannot be written: {error.strerror or error}")
            raise (disk_full_error(error, destination) or reason) from error
        raise


def numbered_folders(directory: Path) -> list[Path]:
    """The complete folders of `directory` that are named by an iteration, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(
        (p for p in directory.iterdir() if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name)
    )


def remove_folder(path: Path) -> None:
    """Remove a complete folder; renamed first, so that no moment shows a part of it under its name."""
    remains = path.with_name(path.name + ".tmp")
    shutil.rmtree(remains, ignore_errors=True)
    with suppress(FileNotFoundError):  # somebody was faster
        os.rename(path, remains)
    shutil.rmtree(remains, ignore_errors=True)


Retention = Literal["permanent", "regular", "ephemeral"]
"""How long a numbered folder stays: for ever; while it is among the newest; until there is a newer one."""


def prune(
    directory: Path, *, keep: int | None, retention: Callable[[Path], Retention], newest: str | None = None
) -> list[Path]:
    """Remove superfluous numbered folders, and return what went. Called once the newest is durable; that one stays.

    Of the regular ones the newest `keep` stay (None: all). `newest`: the name of the one that stays in any case.
    """
    kinds = {path: retention(path) for path in numbered_folders(directory)}
    regular = [path for path, kind in kinds.items() if kind == "regular"]
    old = [] if keep is None else regular[:-keep]
    newest = newest or next(reversed(kinds), Path()).name
    doomed = [
        path for path, kind in kinds.items() if path.name != newest and (kind == "ephemeral" or path in old)
    ]
    for path in doomed:
        remove_folder(path)
    return doomed


def set_aside(path: Path, why: str = "damaged") -> Path:
    """Rename a folder so that its name is free, and return where it is now; nothing is deleted."""
    aside = path.with_name(f"{path.name}.{why}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{why}-{number}")
    os.rename(path, aside)
    return aside


def damage(
    folder: Path, *, checksums: bool, share: tuple[int, int] = (0, 1), always: tuple[str, ...] = ()
) -> list[str]:
    """What is wrong with a folder that `complete_or_absent` gave a manifest: one line a file, empty when it is whole.

    With `share` (i, n) only every n-th file is looked at, from the i-th on. Files named in `always` must be among them, and
    have their checksums compared in any case.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST} cannot be read ({error})"]
    problems = [f"{folder / MANIFEST} does not list {name}" for name in always if name not in expected]
    for name in sorted(expected)[share[0] :: share[1]]:
        (size, digest), path = expected[name], folder / name
        try:
            if path.stat().st_size != size:
                problems.append(f"{path} has {path.stat().st_size:,} bytes where its manifest says {size:,}")
            elif (checksums or name in always) and sha256(path) != digest:
                problems.append(f"{path} differs from its checksum")
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror})")
    return problems
