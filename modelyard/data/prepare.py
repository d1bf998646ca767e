"""`modelyard prepare`: texts → token stores, one per split.

Worker processes read chunks of the source and tokenise them; this process takes the results in the source's order,
deals the documents to the splits and writes. So the stores are the same bytes whatever the number of workers. All is
written in `<output>.tmp`, which gets its name when it is complete; where a run was stopped, the next one goes on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import yaml

from modelyard.config.disk import size
from modelyard.config.prepare import PrepareConfig
from modelyard.data import sources
from modelyard.data.columns import ColumnWriter, column_writer
from modelyard.data.documents import Job, Tokenized, tokenize_chunk
from modelyard.data.output import JOURNAL, Output, existing_record, output_folder
from modelyard.data.progress import Progress, duration
from modelyard.data.sources import Source, open_source
from modelyard.data.splits import deal
from modelyard.data.store import MASK_LANE, TOKEN_TYPES, StoreWriter, token_type, write_synced
from modelyard.data.tokenizer import (
    DocumentFrame,
    SpecialToken,
    Tokenizer,
    document_frame,
    load_tokenizer,
    separator_notice,
)
from modelyard.data.workers import available_cores, ordered_map
from modelyard.errors import UserError

WHOLE = "data"
"""Folder of the one store when no splits are asked for."""
SAVE_SECONDS = 10.0
"""How often it is noted how far the work is, at most: what a kill costs. Noting takes one wait for the disk."""
COMPRESSED_GROWTH = 3.5
"""Text in a byte of a compressed file, for the disk estimate."""
CHARACTERS_PER_TOKEN = 5
"""More than tokenizers reach on most text, so that the disk estimate errs on the low side."""


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
        UserError: anything the user has to change. What an interruption leaves is gone on with by the next call.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    notices: list[str] = []
    tokenizer, frame, source = _open(config, notices)
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
    if (there := existing_record(config.output_path, record, overwrite)) is not None:
        report(f"{config.output_path} is already there, made from the same data with the same config")
        return _summary(config, there["counts"], there["stores"], already_there=True)
    if not config.dataset.disable_disk_space_check:
        _check_disk(config, job)
    started = time.monotonic()
    program = {"chunk_bytes": sources.CHUNK_BYTES, "tokenizers": tokenizers.__version__}
    with output_folder(config.output_path, record | {"program": program}, overwrite=overwrite) as work:
        before = _say_what_is_there(work, report)
        try:
            if work.record is None:
                counts, stores = _write_stores(config, job, work, workers, report, terminal)
                files = {_dataset_file(config, name): facts for name, facts in stores.items()}
                for file, facts in files.items():
                    write_synced(work.folder / file, yaml.safe_dump(facts, sort_keys=False))
                record |= {"counts": asdict(counts), "stores": stores, "files": list(files)}
            else:
                record = work.record
                counts, stores = Counts(**record["counts"]), record["stores"]
            work.finish(record)
        except KeyboardInterrupt:
            if work.resumable:
                report(
                    f"what is done so far is kept in {work.folder}: run the same again and it goes on from there"
                )
            raise
    seconds = time.monotonic() - started
    summary = _summary(config, asdict(counts), stores, already_there=False)
    for line in _summary_lines(summary, counts, counts.tokens - before, seconds):
        report(line)
    return summary


def _say_what_is_there(work: Output, report: Callable[[str], None]) -> int:
    """A line on what an earlier start left; returns the tokens that are there already."""
    if work.notice is not None:
        report(f"note: {work.notice}")
    there = (work.record or work.saved or {}).get("counts")
    if there is None:
        return 0
    how_far = f"{there['documents']:,} documents, {there['tokens']:,} tokens"
    if work.record is not None:
        report(f"an earlier start was stopped when all was written ({how_far}): only its name is missing")
    else:
        report(f"going on where an earlier start was stopped: {how_far} are there already")
    return there["tokens"]


def _open(config: PrepareConfig, notices: list[str]) -> tuple[Tokenizer, DocumentFrame, Source]:
    """The tokenizer, what stands around documents, and the source; the problems of all of them at once."""
    problems: list[str] = []
    try:
        try:
            tokenizer = load_tokenizer(config.tokenizer.path)
        except UserError as error:
            raise UserError(
                *(f"tokenizer.path: {line.removeprefix('tokenizer: ')}" for line in error.problems)
            ) from None
        frame = document_frame(tokenizer, **config.tokenizer.model_dump(exclude={"path"}))
    except UserError as error:
        problems += error.problems
    try:
        source = open_source(config.dataset, notices)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    if notice := separator_notice(tokenizer, frame):
        notices.append(notice)
    return tokenizer, frame, source


def run_prepare(config: PrepareConfig, *, overwrite: bool = False) -> int:
    """The verb `modelyard prepare`; returns the exit status."""
    prepare(config, report=lambda line: print(line, flush=True), overwrite=overwrite)
    return 0


def _write_stores(
    config: PrepareConfig,
    job: Job,
    work: Output,
    workers: int,
    report: Callable[[str], None],
    terminal: bool | None,
) -> tuple[Counts, dict[str, dict[str, Any]]]:
    """Tokenise into `<folder>/<split>` what is not there yet; returns the counts and each split's dataset config."""
    names = list(config.splits) or [WHOLE]
    saved: dict[str, Any] = work.saved or {"stores": {}, "columns": {}}
    counts = Counts(**saved.get("counts", {}))
    chunks, done = saved.get("chunks", 0), saved.get("done", 0)
    current_file, records_before = saved.get("place", (-1, 0))
    with ExitStack() as stack:
        progress = Progress(job.source.total, report, terminal, (done, counts.documents, counts.tokens))
        writers = [
            stack.enter_context(_store_writer(config, job, work.folder / name, saved["stores"].get(name)))
            for name in names
        ]
        columns = [
            stack.enter_context(
                column_writer(
                    job.source.fields.columns,
                    writer,
                    work.folder / f"{name}{JOURNAL}",
                    saved["columns"].get(name),
                )
            )
            for name, writer in zip(names, writers, strict=True)
        ]

        def save() -> None:
            work.save(
                {
                    "chunks": chunks,
                    "done": progress.done,
                    "place": [current_file, records_before],
                    "counts": asdict(counts),
                    "stores": {name: writer.save() for name, writer in zip(names, writers, strict=True)},
                    "columns": {
                        name: column.save() for name, column in zip(names, columns, strict=True) if column
                    },
                }
            )

        stack.enter_context(progress)
        if not (job.spans or job.parse_special):
            _ = job.tokenizer.pieces  # Made here, so that the workers share it.
        results = ordered_map(tokenize_chunk, job, islice(job.source.chunks(), chunks, None), workers)
        stack.callback(results.close)
        saved_at = time.monotonic()
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
            chunks += 1
            if time.monotonic() - saved_at >= SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
        if not counts.documents:
            remarks = f" ({'; '.join(counts.remarks())})" if counts.remarks() else ""
            raise UserError(f"{config.dataset.path}: no documents to prepare{remarks}")
        if missing := [name for name, writer in zip(names, writers, strict=True) if not writer.num_documents]:
            raise UserError(
                f"splits: {counts.documents} documents cannot fill {len(names)} splits; '{missing[0]}' is left empty"
                + (" (.txt files: see dataset.sample_by)" if config.dataset.path.endswith(".txt") else "")
            )
        save()
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
    writer.extend(lengths, tokens, None if mask is None else {MASK_LANE: mask})
    if columns is not None:
        columns.add([result.columns[i] for i in np.flatnonzero(chosen)])


def _store_writer(config: PrepareConfig, job: Job, path: Path, saved: dict[str, Any] | None) -> StoreWriter:
    def token(special: SpecialToken | None) -> dict[str, Any] | None:
        return None if special is None else {"token": special.text, "id": special.id}

    return StoreWriter(
        path,
        vocab_size=job.tokenizer.vocab_size,
        dtype=job.dtype,
        lanes={MASK_LANE: "uint8"} if job.spans else {},
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
        saved=saved,
        keep=True,
    )


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


def _summary_lines(summary: dict[str, Any], counts: Counts, tokens: int, seconds: float) -> list[str]:
    """`tokens` are those that this run made."""
    speed = tokens / max(seconds, 1e-9)
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
    unfinished = config.output_path.with_name(config.output_path.name + ".tmp")
    there = sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free
    if needed > free + there:
        raise UserError(
            f"{place} has {size(free)} free, and the tokens need about {size(needed)}; "
            "dataset.disable_disk_space_check: true starts nevertheless"
        )


def _text_bytes(source: Source) -> float:
    """About how much text the source holds; 0 when that cannot be known."""
    return sum(
        file.size * (COMPRESSED_GROWTH if file.compression or file.kind == "parquet" else 1)
        for file in getattr(source, "files", [])
    )
