"""Which local files a dataset config means, and how each is to be read. Nothing is opened here but folder listings."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modelyard.config.prepare import PrepareDatasetConfig
from modelyard.data.licenses import FolderLicenses
from modelyard.errors import UserError, did_you_mean, missing_path

Kind = Literal["jsonl", "parquet", "arrow", "text", "source"]
Compression = Literal["", "gz", "zst"]

KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
"""Words in file names that say which split a file is of, as the Hub reads them."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    name: str
    """The path relative to the source's folder, with forward slashes."""
    kind: Kind
    compression: Compression
    size: int
    """Bytes on disk."""
    modified: int
    """Time of the last change in nanoseconds, to notice another content of the same size."""
    license: str | None = None


def describe(
    path: Path, name: str, kind: Kind, compression: Compression = "", license: str | None = None
) -> SourceFile:
    facts = path.stat()
    return SourceFile(path, name, kind, compression, facts.st_size, facts.st_mtime_ns, license)


def find_files(config: PrepareDatasetConfig, notices: list[str]) -> list[SourceFile]:
    """The files of a local source, in the order of their names (which is the order of the documents).

    Args:
        config: the dataset section; its path must be local.
        notices: gets a line for each choice that the user may not expect.

    Raises:
        UserError: something named is not there, or the folder holds nothing to read.
    """
    root = Path(config.path).expanduser()
    if not root.exists():
        raise UserError(f"dataset: {missing_path(root)}")
    if config.data_directory is not None:
        root = root / config.data_directory
        if not root.is_dir():
            raise UserError(
                f"dataset.data_directory: {missing_path(root) if not root.exists() else f'{root} is a file'}"
            )
    if "[" in config.split:
        raise UserError(f"dataset.split '{config.split}': slices are for Hub datasets; {root} is local")
    if config.config_name is not None:
        raise UserError(f"dataset.config_name '{config.config_name}' is for Hub datasets; {root} is local")
    if root.is_file():
        return [_single_file(root, config)]
    if config.extensions is not None:
        return _source_files(root, config)
    if config.data_files is None and (saved := _saved_dataset(root, config)):
        return saved
    return _data_files(root, config, notices)


def kind_of(path: Path) -> tuple[Kind, Compression] | None:
    """How a file is read, by its name; None for a name that says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression: Compression = ""
    if suffixes and suffixes[-1] in COMPRESSIONS:
        compression = COMPRESSIONS[suffixes.pop()]
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None or (compression and kind in ("parquet", "arrow")):
        return None
    return kind, compression


def refuse_raw_data(path: Path) -> None:
    """Raises UserError where `path` is a file of texts, by its name, in the place of prepared tokens."""
    if path.is_file() and kind_of(path) is not None:
        raise UserError(
            f"{path} holds texts, not prepared tokens: run `modelyard prepare` on it and name what that writes"
        )


def _single_file(path: Path, config: PrepareDatasetConfig) -> SourceFile:
    if config.extensions is not None:
        raise UserError(f"dataset.extensions is for a folder of source files; {path} is one file")
    if config.data_files is not None or config.exclude:
        key = "exclude" if config.exclude else "data_files"
        raise UserError(f"dataset.{key} chooses files of a folder; {path} is one file")
    if config.split != "train":
        raise UserError(
            f"dataset.split '{config.split}': {path} is one file, without splits; leave `split` out"
        )
    return _typed(path, path.name)


def _typed(path: Path, name: str) -> SourceFile:
    found = kind_of(path)
    if found is None and path.suffix.lower() in (".json", ".ndjson"):
        found = ("jsonl", "")
    if found is None:
        known = ", ".join([".jsonl[.gz|.zst]", ".parquet", ".arrow", ".txt[.gz|.zst]"])
        raise UserError(f"{path}: no reader for this file name; known are {known}")
    return describe(path, name, *found)


def _walk(root: Path, exclude: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Files under `root` and their relative paths; hidden ones, linked folders and those to exclude are left out."""

    def wanted(path: Path) -> bool:
        if path.name.startswith("."):
            return False
        names = (path.name, path.relative_to(root).as_posix())
        return not any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in exclude)

    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if wanted(Path(folder, name)))
        for path in (Path(folder, name) for name in sorted(files)):
            if wanted(path) and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _source_files(root: Path, config: PrepareDatasetConfig) -> list[SourceFile]:
    assert config.extensions is not None
    licenses = FolderLicenses(root)
    patterns = _patterns(config.data_files)
    files, outside = [], 0
    for path, name in _walk(root, config.exclude):
        if not path.name.endswith(tuple(config.extensions)) or not _matches(name, patterns):
            continue
        if config.min_file_bytes <= path.stat().st_size <= config.max_file_bytes:
            files.append(describe(path, name, "source", "", licenses(path.parent)))
        else:
            outside += 1
    if not files:
        limits = f"{config.min_file_bytes:,} to {config.max_file_bytes:,} bytes"
        more = f" ({outside} files of other sizes)" if outside else ""
        raise UserError(f"{root}: no file ends in {', '.join(config.extensions)} and has {limits}{more}")
    return sorted(files, key=lambda file: file.name)


def _saved_dataset(root: Path, config: PrepareDatasetConfig) -> list[SourceFile] | None:
    """The files of a `save_to_disk` folder; None when it is not one."""
    splits_file, state_file = root / "dataset_dict.json", root / "state.json"
    if splits_file.is_file():
        splits = json.loads(splits_file.read_text(encoding="utf-8"))["splits"]
        if config.split not in splits:
            hint = did_you_mean(config.split, splits)
            raise UserError(f"dataset.split '{config.split}': {root} has {', '.join(sorted(splits))}{hint}")
        root = root / config.split
        state_file = root / "state.json"
    elif not state_file.is_file():
        return None
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{state_file} is not what save_to_disk writes ({type(error).__name__}: {error})"
        ) from None
    if not splits_file.is_file() and config.split not in ("train", state.get("_split")):
        raise UserError(f"dataset.split '{config.split}': {root} is one split ('{state.get('_split')}')")
    if state.get("_indices_data_files"):
        raise UserError(f"{root} is a selection over other rows: save it again after `flatten_indices()`")
    for name in names:
        if not (root / name).is_file():
            raise UserError(f"{root / name} is missing, but {state_file} names it")
    return [describe(root / name, name, "arrow") for name in names]


def _data_files(root: Path, config: PrepareDatasetConfig, notices: list[str]) -> list[SourceFile]:
    patterns = _patterns(config.data_files)
    named = list(_walk(root, config.exclude))
    if patterns is not None:
        if config.split != "train":
            raise UserError(
                f"dataset.split '{config.split}': the files are named by data_files; leave `split` out"
            )
        for pattern in patterns:
            if not any(_matches(name, [pattern]) for _, name in named):
                hint = did_you_mean(pattern, [name for _, name in named])
                raise UserError(f"dataset.data_files '{pattern}' matches no file in {root}{hint}")
        files = [_typed(path, name) for path, name in named if _matches(name, patterns)]
        return sorted(files, key=lambda file: file.name)
    files = [describe(path, name, *found) for path, name in named if (found := kind_of(path))]
    if not files:
        endings = sorted({path.suffix for path, _ in named if path.suffix})
        hint = f"; for a folder of source files set dataset.extensions: [{endings[0]}]" if endings else ""
        raise UserError(f"{root} holds no data files (.jsonl, .parquet, .arrow, .txt){hint}")
    return sorted(_of_split(root, files, config.split, notices), key=lambda file: file.name)


def _of_split(root: Path, files: list[SourceFile], split: str, notices: list[str]) -> list[SourceFile]:
    """Those files whose names are of `split`; a file that is not named for any split is of the train split."""
    splits = {file.name: _split_of(file.name) or "train" for file in files}
    chosen = [file for file in files if splits[file.name] == SPLIT_WORDS.get(split, split)]
    if not chosen:
        present = ", ".join(sorted(set(splits.values())))
        raise UserError(f"dataset.split '{split}': by their names, the files in {root} are of: {present}")
    if len(chosen) < len(files):
        left_out = next(name for name, found in splits.items() if found != SPLIT_WORDS.get(split, split))
        notices.append(
            f"{root}: {len(files) - len(chosen)} of {len(files)} files are of other splits than '{split}' by their "
            f"names ({left_out}) and left out; name files in dataset.data_files to choose"
        )
    return chosen


def _split_of(name: str) -> str | None:
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        if word in SPLIT_WORDS:
            return SPLIT_WORDS[word]
    return None


def _patterns(data_files: str | list[str] | None) -> list[str] | None:
    return [data_files] if isinstance(data_files, str) else data_files


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(
        fnmatch.fnmatchcase(name, pattern.removeprefix("./")) for pattern in patterns
    )
