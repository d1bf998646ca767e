"""A token store's manifest: what its files are called, and whether they are all there in full length."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from modelyard.errors import UserError, missing_path

FORMAT = "modelyard-tokens"
VERSION = 1
OFFSET_INTERVAL = 256
"""Documents per entry of `offsets.bin`: a look-up adds up at most this many lengths."""

LANE_TYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("<u1"), "float32": np.dtype("<f4")}
TOKEN_TYPES: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype("<u1"),
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
}
LENGTH_TYPE = np.dtype("<u4")
OFFSET_TYPE = np.dtype("<i8")


def shard_file(name: str, shard: int) -> str:
    """File of the tokens (`name` "tokens") or of a lane, for one shard."""
    return f"{name}_{shard:05d}.bin"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`, after checking every file's size against it.

    Raises:
        UserError: not a store, an unfinished one, or a file is missing or torn; one line per file.
    """
    file = path / "manifest.json"
    if not path.exists():
        candidates = [folder.with_name(folder.name + ".tmp") for folder in (path, path.parent) if folder.name]
        unfinished = [str(candidate) for candidate in candidates if candidate.exists()]
        hint = f" ({unfinished[0]} is an unfinished one; run prepare again)" if unfinished else ""
        raise UserError(missing_path(path) + hint)
    if not file.is_file():
        raise UserError(f"{path} is not a token store: it has no manifest.json")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); prepare the data again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{file} is not the manifest of a token store")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{path} has store version {manifest.get('version')}; this program reads version {VERSION}"
        )
    try:
        problems = _problems(path, manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is incomplete or damaged ({type(error).__name__}: {error})") from None
    if problems:
        raise UserError(*problems)
    # Stores of the first versions have no such key.
    if manifest.get("checksum", digest := manifest_checksum(manifest)) != digest:
        raise UserError(f"{file} differs from its own checksum: damaged or edited; prepare the data again")
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """sha256 of everything in a manifest but `checksum` itself, as JSON with sorted keys."""
    facts = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _problems(path: Path, manifest: dict[str, Any]) -> list[str]:
    if not manifest["documents"] or not manifest["tokens"]:
        return [f"{path} holds no tokens"]
    widths = {"tokens": TOKEN_TYPES[manifest["dtype"]].itemsize}
    widths |= {name: LANE_TYPES[kind].itemsize for name, kind in manifest["lanes"].items()}
    blocks = -(-manifest["documents"] // manifest["offset_interval"])
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    expected = {"lengths.bin": 4 * manifest["documents"], "offsets.bin": 8 * blocks}
    for number, shard in enumerate(manifest["shards"]):
        expected |= {shard_file(name, number): width * shard["tokens"] for name, width in widths.items()}
    problems = [
        f"{path / 'manifest.json'}: {name} should have {size} bytes, but the manifest says {sizes.get(name)}"
        for name, size in expected.items()
        if sizes.get(name) != size
    ]
    if sum(shard["tokens"] for shard in manifest["shards"]) != manifest["tokens"]:
        problems.append(f"{path / 'manifest.json'}: the shards do not add up to {manifest['tokens']} tokens")
    for name, size in sizes.items():
        try:
            actual = (path / name).stat().st_size
        except OSError:
            problems.append(f"{path / name} is missing; prepare the data again")
            continue
        if actual != size:
            problems.append(
                f"{path / name} has {actual} bytes, not the {size} of manifest.json: torn or changed"
            )
    return problems


def token_range(starts: np.ndarray, index: int, begin: int, end: int | None) -> tuple[int, int]:
    """The half-open range in the store of tokens `begin:end` of document `index` (end None: to its end).

    starts: first tokens of the documents of its block of `OFFSET_INTERVAL`, and one past the last. Raises IndexError.
    """
    place = index % OFFSET_INTERVAL
    first, after = starts[place : place + 2].tolist()
    end = after - first if end is None else end
    if not 0 <= begin <= end <= after - first:
        raise IndexError(f"tokens {begin}:{end} of document {index}, which has {after - first}")
    return first + begin, first + end
