"""`modelyard prepare`: texts → token stores, one per split.

Worker processes read chunks of the source and tokenise them; this process takes the results in the source's order,
deals the documents to the splits and writes. So the stores are the same bytes whatever the number of workers. All is
written in `<output>.tmp`, which gets its name when it is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from modelyard.config.prepare import PrepareConfig
from modelyard.data.progress import Progress, duration
from modelyard.data.sources import Chunk, RecordError, Source, open_source
from modelyard.data.spans import SpanError, character_mask, token_mask
from modelyard.data.splits import deal
from modelyard.data.store import (
    TOKEN_TYPES,
    StoreWriter,
    disk_full_error,
    read_manifest,
    sync_folder,
    token_type,
    write_synced,
)
from modelyard.data.tokenizer import (
    DocumentFrame,
    SpecialToken,
    Tokenizer,
    document_frame,
    load_tokenizer,
    replace_surrogates,
    separator_notice,
)
from modelyard.data.workers import available_cores, ordered_map
from modelyard.errors import UserError

WHOLE = "data"
"""Folder of the one store when no splits are asked for."""
RECORD = "prepare.json"
"""What an output folder was made from; tells "already there" from "something else is there"."""
COLUMN_ROWS = 8192
"""Documents in a row group of columns.parquet."""
COMPRESSED_GROWTH = 3.5
"""Text in a byte of a compressed file, for the disk estimate."""
CHARACTERS_PER_TOKEN = 5
"""More than tokenizers reach on most text, so that the disk estimate errs on the low side."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to turn a chunk into tokens."""

    source: Source
    tokenizer: Tokenizer
    frame: DocumentFrame
    spans: bool
    parse_special: bool
    dtype: str


@dataclass
class Tokenized:
    """One chunk's documents. Empty documents are counted, not kept."""

    records: int
    """Records in the chunk, kept or not."""
    lengths: np.ndarray
    """Tokens of each kept document, [documents]."""
    tokens: np.ndarray
    """[sum of lengths]"""
    mask: np.ndarray | None
    """Loss mask, [sum of lengths]; None without spans."""
    columns: list[tuple[str | None, ...]]
    """Per kept document."""
    empty: int = 0
    repaired: int = 0
    """Documents with lone surrogates, which became U+FFFD."""
    unreadable: int = 0
    """Source files that are not UTF-8."""
    problem: tuple[int, str] | None = None
    """Number within the chunk, and reason, of the first record that cannot be used; then nothing else is filled."""


@dataclass
class Counts:
    """What came of the documents so far."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    repaired: int = 0
    unreadable: int = 0

    def add(self, result: Tokenized) -> None:
        self.documents += len(result.lengths)
        self.tokens += len(result.tokens)
        self.empty += result.empty
        self.repaired += result.repaired
        self.unreadable += result.unreadable

    def remarks(self) -> list[str]:
        """A phrase for each kind of document that was not stored as it was found."""
        kinds = {
            "empty documents left out": self.empty,
            "files left out that are not UTF-8": self.unreadable,
            "documents with lone surrogates (now U+FFFD)": self.repaired,
        }
        return [f"{count:,} {kind}" for kind, count in kinds.items() if count]


def prepare(
    config: PrepareConfig,
    *,
    report: Callable[[str], None] = print,
    overwrite: bool = False,
    terminal: bool | None = None,
) -> dict[str, Any]:
    """Make the token stores and dataset files of `config`.

    Args:
        config: the whole preparation config.
        report: prints one line.
        overwrite: replace an output folder that holds something else.
        terminal: draw a progress bar; default: whether standard error is a terminal.

    Returns:
        `output`, `documents`, `tokens`, `empty`, `repaired`, `unreadable`, `already_there`, and `splits`: name →
        `path`, `config` (the dataset file), `documents`, `tokens`.

    Raises:
        UserError: anything the user has to change; nothing is left behind.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    notices: list[str] = []
    tokenizer = load_tokenizer(config.tokenizer.path)
    options = config.tokenizer.model_dump(exclude={"path"})
    frame = document_frame(tokenizer, **options)
    if notice := separator_notice(tokenizer, frame):
        notices.append(notice)
    source = open_source(config.dataset, notices)
    workers = _workers(config, notices)
    job = Job(
        source,
        tokenizer,
        frame,
        spans=config.dataset.spans_column is not None,
        parse_special=config.dataset.parse_special_tokens,
        dtype=config.dataset.data_type or token_type(tokenizer.vocab_size),
    )
    for notice in notices:
        report(f"note: {notice}")
    record = _record(config, job)
    if (there := _already_there(config, record, overwrite)) is not None:
        report(f"{config.output_path} is already there, made from the same data with the same config")
        return there
    if not config.dataset.disable_disk_space_check:
        _check_disk(config, job)
    started = time.monotonic()
    with _output_folder(config.output_path) as folder:
        counts, stores = _write_stores(config, job, folder, workers, report, terminal)
        for name, facts in stores.items():
            write_synced(folder / _dataset_file(config, name), yaml.safe_dump(facts, sort_keys=False))
        write_synced(
            folder / RECORD,
            json.dumps(record | {"counts": counts.__dict__, "stores": stores}, indent=1) + "\n",
        )
    seconds = time.monotonic() - started
    summary = _summary(config, counts.__dict__, stores, already_there=False)
    for line in _summary_lines(summary, counts, seconds):
        report(line)
    return summary


def run_prepare(config: PrepareConfig, *, overwrite: bool = False) -> int:
    """The verb `modelyard prepare`; returns the exit status."""
    prepare(config, report=lambda line: print(line, flush=True), overwrite=overwrite)
    return 0


def tokenize_chunk(job: Job, chunk: Chunk) -> Tokenized:
    """Read one chunk and tokenise its documents; runs in a worker process."""
    try:
        records = job.source.read(chunk)
    except RecordError as error:
        return _failed(error.index, error.reason)
    kept = [(index, record) for index, record in enumerate(records) if record is not None]
    result = Tokenized(len(records), *_nothing(job), columns=[], unreadable=len(records) - len(kept))
    texts = []
    for _, record in kept:
        text = record.text
        if not text.isascii() and (clean := replace_surrogates(text)) != text:
            text = clean
            result.repaired += 1
        texts.append(text)
    encodings = job.tokenizer.encode_batch(texts, parse_special=job.parse_special, offsets=job.spans)
    pieces: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    lengths = []
    for (index, record), encoding in zip(kept, encodings, strict=True):
        ids = encoding.ids
        if not ids:
            result.empty += 1
            continue
        before, after = missing_ends(ids, job.frame)
        if job.spans:
            try:
                characters = character_mask(record.spans, len(record.text))
            except SpanError as error:
                return _failed(index, str(error))
            # The begin token shares the fate of the first character, the end token that of the last.
            masks += [characters[:1]] * len(before)
            masks += [token_mask(characters, encoding.offsets)]
            masks += [characters[-1:]] * len(after)
        pieces.append(np.array([*before, *ids, *after], TOKEN_TYPES[job.dtype]))
        lengths.append(len(pieces[-1]))
        result.columns.append(record.columns)
    if pieces:
        result.lengths = np.array(lengths, np.int64)
        result.tokens = np.concatenate(pieces)
        result.mask = np.concatenate(masks).astype(np.uint8) if job.spans else None
    return result


def missing_ends(ids: list[int], frame: DocumentFrame) -> tuple[list[int], list[int]]:
    """The begin and end token that a document still needs, each as a list of at most one.

    One that the text brought itself is not doubled; a document of a single token is not both its begin and its end.
    """
    has_bos = frame.bos is not None and ids[0] == frame.bos.id
    begin = 1 if has_bos else 0
    has_eos = frame.eos is not None and len(ids) > begin and ids[-1] == frame.eos.id
    before = [frame.bos.id] if frame.bos and not has_bos else []
    after = [frame.eos.id] if frame.eos and not has_eos else []
    return before, after


def _nothing(job: Job) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    tokens = np.zeros(0, TOKEN_TYPES[job.dtype])
    return np.zeros(0, np.int64), tokens, np.zeros(0, np.uint8) if job.spans else None


def _failed(index: int, reason: str) -> Tokenized:
    empty = np.zeros(0, np.int64)
    return Tokenized(0, empty, empty, None, [], problem=(index, reason))


def _write_stores(
    config: PrepareConfig,
    job: Job,
    folder: Path,
    workers: int,
    report: Callable[[str], None],
    terminal: bool | None,
) -> tuple[Counts, dict[str, dict[str, Any]]]:
    """Tokenise everything into `folder/<split>`; returns the counts and each split's dataset config."""
    names = list(config.splits) or [WHOLE]
    counts = Counts()
    current_file, records_before = -1, 0
    with ExitStack() as stack:
        progress = Progress(job.source.total, report, terminal)
        writers = [stack.enter_context(_store_writer(config, job, folder / name)) for name in names]
        columns = [stack.enter_context(_column_writer(config, job, writer)) for writer in writers]
        stack.enter_context(progress)
        results = ordered_map(tokenize_chunk, job, job.source.chunks(), workers)
        stack.callback(results.close)
        for chunk, result in results:
            if chunk.file != current_file:
                current_file, records_before = chunk.file, 0
            if result.problem is not None:
                index, reason = result.problem
                raise UserError(f"{job.source.place(chunk)}: record {records_before + index + 1}: {reason}")
            records_before += result.records
            choice = deal(counts.documents, len(result.lengths), config.splits or {WHOLE: 1.0}, config.seed)
            for split, (writer, column) in enumerate(zip(writers, columns, strict=True)):
                _store(writer, column, result, choice == split)
            counts.add(result)
            progress.update(chunk.weight, len(result.lengths), len(result.tokens))
        if not counts.documents:
            remarks = f" ({'; '.join(counts.remarks())})" if counts.remarks() else ""
            raise UserError(f"{config.dataset.path}: no documents to prepare{remarks}")
        if missing := [name for name, writer in zip(names, writers, strict=True) if not writer.num_documents]:
            raise UserError(
                f"splits: {counts.documents} documents cannot fill {len(names)} splits; '{missing[0]}' is left empty"
                + (" (.txt files: see dataset.sample_by)" if config.dataset.path.endswith(".txt") else "")
            )
    facts = {
        name: {
            "type": "memmap",
            "path": name,
            "num_documents": writer.num_documents,
            "num_tokens": writer.num_tokens,
        }
        for name, writer in zip(names, writers, strict=True)
    }
    return counts, facts


def _store(writer: StoreWriter, columns: ColumnWriter | None, result: Tokenized, chosen: np.ndarray) -> None:
    """Add the chosen documents of one chunk to one split's store."""
    if chosen.all():
        lengths, tokens, mask = result.lengths, result.tokens, result.mask
    else:
        of_token = np.repeat(chosen, result.lengths)
        lengths, tokens = result.lengths[chosen], result.tokens[of_token]
        mask = None if result.mask is None else result.mask[of_token]
    writer.extend(lengths, tokens, None if mask is None else {"loss_mask": mask})
    if columns is not None:
        columns.add([result.columns[i] for i in np.flatnonzero(chosen)])


def _store_writer(config: PrepareConfig, job: Job, path: Path) -> StoreWriter:
    def token(special: SpecialToken | None) -> dict[str, Any] | None:
        return None if special is None else {"token": special.text, "id": special.id}

    return StoreWriter(
        path,
        vocab_size=job.tokenizer.vocab_size,
        dtype=job.dtype,
        lanes={"loss_mask": "uint8"} if job.spans else {},
        tokens_per_shard=config.tokens_per_shard,
        tokenizer_files=job.tokenizer.files(),
        description={
            "tokenizer": {
                "fingerprint": job.tokenizer.fingerprint,
                "bos": token(job.frame.bos),
                "eos": token(job.frame.eos),
            }
        },
        saving_workers=min(config.saving_workers or available_cores(), available_cores()),
    )


@dataclass
class ColumnWriter:
    """A store's columns.parquet: text columns, one row per document, in row groups of fixed size."""

    parquet: pq.ParquetWriter
    schema: pa.Schema
    rows: list[tuple[str | None, ...]] = field(default_factory=list)

    def add(self, rows: list[tuple[str | None, ...]]) -> None:
        self.rows += rows
        while len(self.rows) >= COLUMN_ROWS:
            self._write(self.rows[:COLUMN_ROWS])
            del self.rows[:COLUMN_ROWS]

    def finish(self) -> None:
        if self.rows:
            self._write(self.rows)
        self.parquet.close()

    def _write(self, rows: list[tuple[str | None, ...]]) -> None:
        columns = [pa.array(values, pa.string()) for values in zip(*rows, strict=True)]
        self.parquet.write_table(
            pa.Table.from_arrays(columns, schema=self.schema), row_group_size=COLUMN_ROWS
        )


@contextmanager
def _column_writer(config: PrepareConfig, job: Job, writer: StoreWriter) -> Iterator[ColumnWriter | None]:
    names = job.source.fields.columns
    if not names:
        yield None
        return
    schema = pa.schema([(name, pa.string()) for name in names])
    with (writer.temporary / "columns.parquet").open("wb") as file:
        columns = ColumnWriter(pq.ParquetWriter(file, schema, compression="zstd"), schema)
        yield columns
        columns.finish()
    writer.include("columns.parquet")


def _workers(config: PrepareConfig, notices: list[str]) -> int:
    cores = available_cores()
    asked = {
        name: value
        for name in ("loading_workers", "tokenize_workers", "saving_workers")
        if (value := getattr(config, name)) is not None
    }
    if above := {name: value for name, value in asked.items() if value > cores}:
        words = ", ".join(f"{name} {value}" for name, value in above.items())
        notices.append(
            f"{words}: this machine has {cores} cores, so {cores} are used (the result is the same)"
        )
    processes = [value for name, value in asked.items() if name != "saving_workers"]
    return min(max(processes, default=cores), cores)


def _record(config: PrepareConfig, job: Job) -> dict[str, Any]:
    """What decides the stores' content: the config but for places and workers, the source, the tokenizer."""
    settings = config.model_dump(
        mode="json",
        exclude={
            "output_path": True,
            "loading_workers": True,
            "tokenize_workers": True,
            "saving_workers": True,
            "distributed": True,
            "dataset": {"path", "trust_remote_code", "disable_disk_space_check"},
            "tokenizer": {"path"},
        },
    )
    files = {
        name: hashlib.sha256(content).hexdigest() for name, content in sorted(job.tokenizer.files().items())
    }
    return {"version": 1, "config": settings, "source": job.source.identity(), "tokenizer": files}


def _already_there(config: PrepareConfig, record: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The summary of a complete output made from the same; None when there is nothing (or it may be replaced).

    Raises:
        UserError: the folder holds something else.
    """
    output = config.output_path
    if not output.exists() or (output.is_dir() and not any(output.iterdir())) or overwrite:
        return None
    if not output.is_dir():
        raise UserError(f"output_path {output} is a file, not a folder")
    if not (output / RECORD).is_file():
        raise UserError(f"output_path {output} holds other files: choose another, or empty it")
    there = json.loads((output / RECORD).read_text(encoding="utf-8"))
    if differences := list(_differences(there, record)):
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"output_path {output} was made from something else ({'; '.join(differences[:3])}{more}): choose another "
            "folder, or replace it (--overwrite)"
        )
    for name in there["stores"]:
        read_manifest(output / name)
    return _summary(config, there["counts"], there["stores"], already_there=True)


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


def _summary(
    config: PrepareConfig, counts: dict[str, int], stores: dict[str, dict[str, Any]], *, already_there: bool
) -> dict[str, Any]:
    splits = {
        name: {
            "path": str(config.output_path / name),
            "config": str(config.output_path / _dataset_file(config, name)),
            "documents": facts["num_documents"],
            "tokens": facts["num_tokens"],
        }
        for name, facts in stores.items()
    }
    return {"output": str(config.output_path), **counts, "splits": splits, "already_there": already_there}


def _summary_lines(summary: dict[str, Any], counts: Counts, seconds: float) -> list[str]:
    speed = counts.tokens / max(seconds, 1e-9)
    lines = [
        f"prepared {counts.documents:,} documents, {counts.tokens:,} tokens in {duration(seconds)} ({speed:,.0f} tokens/s)"
    ]
    if counts.remarks():
        lines.append("; ".join(counts.remarks()))
    for facts in summary["splits"].values():
        lines.append(f"{facts['config']}: {facts['documents']:,} documents, {facts['tokens']:,} tokens")
    return lines


def _dataset_file(config: PrepareConfig, name: str) -> str:
    return f"fast_llm_config_{name}.yaml" if config.splits else "fast_llm_config.yaml"


def _check_disk(config: PrepareConfig, job: Job) -> None:
    width = TOKEN_TYPES[job.dtype].itemsize + job.spans
    needed = _text_bytes(job.source) / CHARACTERS_PER_TOKEN * width
    place = config.output_path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{place} has {free / 1e9:.1f} GB free, and the tokens need about {needed / 1e9:.1f} GB; "
            "dataset.disable_disk_space_check: true starts nevertheless"
        )


def _text_bytes(source: Source) -> float:
    """About how much text the source holds; 0 when that cannot be known."""
    return sum(
        file.size * (COMPRESSED_GROWTH if file.compression or file.kind == "parquet" else 1)
        for file in getattr(source, "files", [])
    )


@contextmanager
def _output_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into; it becomes `output`, whole, when the block ends without an error."""
    temporary = output.with_name(output.name + ".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    lock = (temporary / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"another prepare is writing {output} at this moment") from None
    try:
        for entry in temporary.iterdir():  # left over by one that was killed
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()
        yield temporary
        (temporary / ".lock").unlink()
        sync_folder(temporary)
        _replace(temporary, output)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_full_error(error, output) or error from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        lock.close()


def _replace(temporary: Path, output: Path) -> None:
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    temporary.rename(output)
    sync_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)
