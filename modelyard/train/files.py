"""Directories that exist only when they are complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def fsync_path(path: Path) -> None:
    """Make `path`, a file or a folder's list of entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def complete_or_absent(destination: Path) -> Iterator[Path]:
    """Give a folder to write into; it becomes `destination` when the block ends well, and vanishes otherwise.

    It is written beside as `<name>.tmp`, gets a manifest with each file's size and sha256, every file is synced,
    then it is renamed and the parent is synced. A kill at any moment leaves `destination` whole or absent.
    """
    temporary = destination.with_name(destination.name + ".tmp")
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {
            p.relative_to(temporary).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)}
            for p in files
        }
        write_json(temporary / MANIFEST, manifest)
        for path in temporary.rglob("*"):
            fsync_path(path)
        fsync_path(temporary)
        os.rename(temporary, destination)
        fsync_path(destination.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def numbered_folders(directory: Path) -> list[Path]:
    """The complete folders of `directory` that are named by an iteration, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(
        (p for p in directory.iterdir() if p.name.isdigit() and p.is_dir()), key=lambda p: int(p.name)
    )


def prune(directory: Path, *, keep: int | None, forever: Callable[[int], bool]) -> list[Path]:
    """Remove all but the newest `keep` numbered folders and return what went; those `forever` names stay uncounted.

    Called once the newest is durable. `keep` None keeps all; the newest always stays.
    """
    if keep is None:
        return []
    folders = numbered_folders(directory)
    doomed = [p for p in folders if not forever(int(p.name))][: -max(keep, 1)]
    for path in doomed:
        # Renamed first, so that no moment shows a part of it under its name.
        remains = path.with_name(path.name + ".tmp")
        shutil.rmtree(remains, ignore_errors=True)
        os.rename(path, remains)
        shutil.rmtree(remains, ignore_errors=True)
    return doomed


def set_aside(path: Path) -> Path:
    """Rename a damaged folder so that its name is free, and return where it is now; nothing is deleted."""
    aside = path.with_name(path.name + ".damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    os.rename(path, aside)
    return aside


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, *, checksums: bool) -> list[str]:
    """What is wrong with a folder made by `complete_or_absent`: one line a file, empty when it is whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST} cannot be read ({error})"]
    problems = []
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                problems.append(f"{path} has {path.stat().st_size:,} bytes where its manifest says {size:,}")
            elif checksums and sha256(path) != digest:
                problems.append(f"{path} differs from its checksum")
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror})")
    return problems
