"""The stores of a preparation while they are written: chunk after chunk in the source's order, dealt to the splits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from modelyard.chat.format import settings_of
from modelyard.config.prepare import PrepareConfig
from modelyard.data.columns import ColumnWriter, column_writer
from modelyard.data.documents import COUNTED, Job, Tally, Tokenized
from modelyard.data.output import JOURNAL, Output
from modelyard.data.progress import Amount
from modelyard.data.splits import deal
from modelyard.data.store import StoreWriter
from modelyard.data.tokenizer import SpecialToken
from modelyard.data.workers import available_cores
from modelyard.errors import UserError

WHOLE = "data"
"""Folder of the one store when no splits are asked for."""
SAVE_SECONDS = 10.0
"""How often it is noted how far the work is, at most: what a kill costs. Noting takes one wait for the disk."""


@dataclass
class Counts(Tally):
    """What came of all of them so far."""

    documents: int = 0
    tokens: int = 0

    def add(self, result: Tokenized) -> None:
        self.documents += len(result.lengths)
        self.tokens += len(result.tokens)
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(result, name))

    def remarks(self) -> list[str]:
        """A phrase for each kind of document that was not stored as it was found, or that may not be what was meant."""
        kinds = {
            "empty documents left out": self.empty,
            "files left out that are not UTF-8": self.unreadable,
            "documents with lone surrogates (now U+FFFD)": self.repaired,
            "conversations left out that cannot be used": self.unusable,
            "answers that say nothing (their end alone is trained on)": self.silent,
            f"of {self.calls:,} calls do not fit the definitions of their tools": self.unfit,
            "texts begin with the begin token twice": self.doubled,
            "texts whose end is masked (a conversation that ends on a user's turn?)": self.ends_masked,
            "texts with tool calls that are masked, though other turns are trained on": self.calls_masked,
        }
        return [f"{count:,} {kind}" for kind, count in kinds.items() if count]


class Stores:
    """A context manager; it goes on where `work.saved` says, and completes the stores when the block ends without an error.

    What comes next is chunk `chunk` of part `part`.
    """

    def __init__(self, config: PrepareConfig, job: Job, work: Output):
        saved: Mapping[str, Any] = work.saved or {"stores": {}, "columns": {}}
        self._config = config
        self._job = job
        self._work = work
        self._saved = saved
        self._shares = config.splits or {WHOLE: 1.0}
        self.counts = Counts(**saved.get("counts", {}))
        self.part: int = saved.get("part", 0)
        self.chunk: int = saved.get("chunk", 0)
        self.saved_part = self.part
        """Parts before this one are on the disk for good."""
        self._done: int = saved.get("done", 0)
        self._file, self._records = saved.get("place", (-1, 0))
        self._stack = ExitStack()
        self._writers: dict[str, tuple[StoreWriter, ColumnWriter | None]] = {}
        self._saved_at = time.monotonic()

    def __enter__(self) -> Stores:
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    _store_writer(
                        self._config, self._job, self._work.folder / name, self._saved["stores"].get(name)
                    )
                )
                for name in self._shares
            ]
            # Their columns after all of them, so that these are complete before them.
            columns = [
                stack.enter_context(
                    column_writer(
                        self._job.source.fields.columns,
                        writer,
                        self._work.folder / f"{name}{JOURNAL}",
                        self._saved["columns"].get(name),
                    )
                )
                for name, writer in zip(self._shares, writers, strict=True)
            ]
            self._writers = dict(zip(self._shares, zip(writers, columns, strict=True), strict=True))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)  # nothing in it keeps an error to itself

    @property
    def amount(self) -> Amount:
        """Weight, documents and tokens so far."""
        return self._done, self.counts.documents, self.counts.tokens

    def records_before(self, file: int) -> int:
        """Records of the source's file number `file` so far, which the next chunk is of."""
        return self._records if file == self._file else 0

    def add(self, file: int, weight: int, result: Tokenized) -> None:
        """Store the documents of the next chunk, which is of the source's file number `file`."""
        self._records = self.records_before(file) + result.records
        self._file = file
        choice = deal(self.counts.documents, len(result.lengths), self._shares, self._config.seed)
        for split, (writer, columns) in enumerate(self._writers.values()):
            _store(writer, columns, result, choice == split, self._job.lane)
        self.counts.add(result)
        self._done += weight
        self.chunk += 1
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save()

    def next_part(self) -> None:
        """That was the last chunk of the part."""
        self.part, self.chunk = self.part + 1, 0

    def save(self) -> None:
        """Note how far the work is; a start after a kill goes on from here."""
        state = {
            "part": self.part,
            "chunk": self.chunk,
            "done": self._done,
            "place": [self._file, self._records],
            "counts": asdict(self.counts),
            "stores": {name: writer.save() for name, (writer, _) in self._writers.items()},
            "columns": {
                name: columns.save() for name, (_, columns) in self._writers.items() if columns is not None
            },
        }
        self._work.save(state)
        self.saved_part = self.part
        self._saved_at = time.monotonic()

    def check(self) -> None:
        """Raise UserError where a split has no document."""
        if not self.counts.documents:
            remarks = f" ({'; '.join(self.counts.remarks())})" if self.counts.remarks() else ""
            raise UserError(f"{self._config.dataset.path}: no documents to prepare{remarks}")
        if missing := [name for name, (writer, _) in self._writers.items() if not writer.num_documents]:
            raise UserError(
                f"splits: {self.counts.documents} documents cannot fill {len(self._writers)} splits; '{missing[0]}' is "
                "left empty"
                + (
                    " (.txt files: see dataset.sample_by)"
                    if self._config.dataset.path.endswith(".txt")
                    else ""
                )
            )

    def facts(self) -> dict[str, dict[str, Any]]:
        """Each split's dataset config."""
        return {
            name: {
                "type": "memmap",
                "path": name,
                "num_documents": writer.num_documents,
                "num_tokens": writer.num_tokens,
            }
            for name, (writer, _) in self._writers.items()
        }


def _store(
    writer: StoreWriter, columns: ColumnWriter | None, result: Tokenized, chosen: np.ndarray, name: str | None
) -> None:
    """Add the chosen documents of one chunk to one split's store."""
    if chosen.all():
        lengths, tokens, lane = result.lengths, result.tokens, result.lane
    else:
        of_token = np.repeat(chosen, result.lengths)
        lengths, tokens = result.lengths[chosen], result.tokens[of_token]
        lane = None if result.lane is None else result.lane[of_token]
    writer.extend(lengths, tokens, None if lane is None or name is None else {name: lane})
    if columns is not None:
        columns.add([result.columns[i] for i in np.flatnonzero(chosen)])


def _store_writer(config: PrepareConfig, job: Job, path: Path, saved: dict[str, Any] | None) -> StoreWriter:
    def token(special: SpecialToken | None) -> dict[str, Any] | None:
        return None if special is None else {"token": special.text, "id": special.id}

    return StoreWriter(
        path,
        vocab_size=job.tokenizer.vocab_size,
        dtype=job.dtype,
        lanes={job.lane: "uint8"} if job.lane else {},
        tokens_per_shard=config.tokens_per_shard,
        tokenizer_files=job.tokenizer_files(),
        description={
            **({"chat": settings_of(job.conversations.family)} if job.conversations else {}),
            "tokenizer": {
                "fingerprint": job.tokenizer.fingerprint,
                "bos": token(job.frame.bos),
                "eos": token(job.frame.eos),
            },
        },
        saving_workers=min(config.saving_workers or available_cores(), available_cores()),
        saved=saved,
        keep=True,
    )
