"""The rows of a whole `data.datasets` entry, and the batches made of them: pure functions of an index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Lock, Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol

from modelyard.chat.segments import LossLane
from modelyard.config.data import BlendedDataset, DatasetConfig, SampledDataset, SamplingConfig
from modelyard.data.blend import Blend
from modelyard.data.datasets import IndexedDataset, foreign_documents, open_dataset, stores, two_chat_formats
from modelyard.data.lanes import MASK_LANE, has_kinds
from modelyard.data.layout import Layout, lay_out
from modelyard.data.order import DocumentOrder, derive_key
from modelyard.data.resolve import resolve
from modelyard.data.rows import CutRows, Piece, Rows, WholeRows, refuse_overlong
from modelyard.errors import UserError
from modelyard.files import CHECKSUM_LIMIT

if TYPE_CHECKING:
    from modelyard.data.batch import Batch


Share = tuple[int, int]
"""(which one from 0, of how many): the stretch of every batch's rows that one process reads."""
WHOLE: Share = (0, 1)


class BatchShape(Protocol):
    """What a stream needs to know of the `batch` section."""

    @property
    def sequence_length(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def truncate_documents(self) -> bool: ...
    @property
    def cross_document_attention(self) -> bool: ...
    @property
    def use_loss_masking_spans(self) -> bool | Literal["auto"]: ...
    @property
    def loss_lane(self) -> LossLane: ...
    @property
    def overlong(self) -> Literal["auto", "error", "drop", "split"]: ...


class DataStream:
    """Batches without an end. Batch `i` depends on the config, the data and `i` alone; any index may be asked at any time.

    Opening costs a few manifests; nothing grows with the number of documents but a table of one number for each block of
    10,000 documents passed. Safe to use from several threads.

    Args:
        config: one entry of `data.datasets`.
        name: its name there, for messages.
        sampling: `data.sampling`; a `sampled` dataset overrides it for what is inside.
        batch: the `batch` section.
        vocab_size: of the model, tokens.
        base: folder that relative paths start from; None is the working directory.
        total_rows: rows that the run will take. Only `shuffle: full` looks at it, to know how many epochs to mix: there,
            and only there, a longer run reads other rows from the first step on.

    Raises:
        UserError: data is missing, torn, empty, or lacks the loss mask that the config asks for. Every such problem of a
            tree of datasets is reported at once.
    """

    def __init__(
        self,
        config: DatasetConfig,
        *,
        name: str,
        sampling: SamplingConfig,
        batch: BatchShape,
        vocab_size: int,
        base: Path | None = None,
        total_rows: int | None = None,
    ):
        self.name = name
        self._batch = batch
        self.vocab_size = vocab_size
        """Of the model, tokens."""
        self._lock = Lock()
        self._leaves: list[_Leaf] = []
        problems: list[str] = []
        tree = self._build(resolve(config, base), sampling, (), total_rows, problems)
        if problems or tree is None:
            raise UserError(*problems)
        self._refuse_two_chat_formats()
        self._tree = tree
        identity: list[Any] = [
            tree.identity(),
            batch.cross_document_attention,
            batch.use_loss_masking_spans,
            [leaf.rows.fingerprint for leaf in self._leaves],
        ]
        if any(map(has_kinds, self.datasets)):
            identity.append(batch.loss_lane)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        """Changes with anything that changes a row: content, sampling, blend, row length, packing, masks."""

    def batch(self, index: int, share: Share = WHOLE) -> Batch:
        """The global batch of optimizer step `index`, from 0, or one process's share of its rows."""
        size = self._batch.batch_size
        part, parts = share
        return self.rows(index * size + size * part // parts, index * size + size * (part + 1) // parts)

    def rows(self, begin: int, end: int) -> Batch:
        """Rows `begin:end` of the stream, for instance one process's share of a batch."""
        return self._assemble(self.pieces(begin, end))

    def pieces(self, begin: int, end: int) -> list[tuple[IndexedDataset, list[Piece]]]:
        """Which documents rows `begin:end` are made of: for each its dataset (one of `datasets`), and the pieces in order."""
        with self._lock:
            located = [self._tree.locate(index) for index in range(begin, end)]
            return [(leaf.rows.dataset, leaf.rows.row(index)) for leaf, index in located]

    @property
    def datasets(self) -> list[IndexedDataset]:
        """What is read, in the order of `statistics()["datasets"]`."""
        return [leaf.rows.dataset for leaf in self._leaves]

    def _assemble(self, pieces: Sequence[tuple[IndexedDataset, Sequence[Piece]]]) -> Batch:
        from modelyard.data.batch import (
            assemble,  # torch: a stream is opened without it to see what the data is
        )

        return assemble(pieces, **self._layout_options())

    def layout(self, pieces: Sequence[tuple[IndexedDataset, Sequence[Piece]]]) -> Layout:
        """The arrays of the batch that these rows make: what `rows` gives, without torch."""
        return lay_out(pieces, **self._layout_options())

    def _layout_options(self) -> dict[str, Any]:
        return {
            "sequence_length": self._batch.sequence_length,
            "vocab_size": self.vocab_size,
            "isolate": not self._batch.cross_document_attention,
            "mask": bool(self._batch.use_loss_masking_spans),
            "loss_lane": self._batch.loss_lane,
        }

    @property
    def tokenizer_folder(self) -> Path | None:
        """The tokenizer that came with the data: the first there is, in the order in which datasets were written, but of
        conversations before that of texts: it says how they are written."""
        folders = [leaf.rows.dataset.tokenizer_folder for leaf in self._leaves]
        talks = [folder for folder, dataset in zip(folders, self.datasets) if has_kinds(dataset)]
        return next(filter(None, (*talks, *folders)), None)

    def one_pass(self, share: Share = WHOLE) -> Iterator[Batch]:
        """Batches that hold every document once, whatever the batch size; the last one may be short.

        Shares are of equal size in every batch: rows without any target fill up the last one.

        Raises:
            UserError: a blend has no end of its own: its parts run out at different rows.
        """
        if not isinstance(self._tree, _Leaf):
            raise UserError(
                f"data.datasets.{self.name} is blended: say how much of it is read (evaluator.iterations)"
            )
        leaf = self._tree
        with self._lock:
            rows = [(leaf.rows.dataset, pieces) for pieces in leaf.rows.one_pass()]
        size, (part, parts) = self._batch.batch_size, share
        if parts > 1:
            rows += [(leaf.rows.dataset, [])] * (-len(rows) % size)
        for begin in range(0, len(rows), size):
            yield self._assemble(rows[begin + size * part // parts : begin + size * (part + 1) // parts])

    def statistics(self, rows: int = 0) -> dict[str, Any]:
        """Facts about the data, and how often `rows` rows go through it. Plain values, for messages and logs.

        `datasets` has an entry for each one that is read: its name, share of the rows, documents, tokens, `fill` of the
        rows (tokens ÷ room), over-long documents, `rows_per_epoch`, and `epochs` after `rows` rows. What depends on packing
        is counted over the blocks packed so far (`documents_seen`).
        """
        with self._lock:
            taken = self._tree.rows_of(rows)
            shares = self._tree.shares()
            return {
                "documents": sum(leaf.rows.dataset.num_documents for leaf in self._leaves),
                "tokens": sum(leaf.rows.dataset.num_tokens for leaf in self._leaves),
                "datasets": [leaf.statistics(shares[leaf], taken[leaf]) for leaf in self._leaves],
            }

    def describe(self) -> list[str]:
        """The statistics as a line for each dataset."""
        lines = []
        for facts in self.statistics()["datasets"]:
            share = f", {facts['share']:.2%} of the rows" if facts["share"] < 1 else ""
            line = (
                f"{self.name}: {facts['name']}{share}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, "
                f"{facts['rows_per_epoch']:,.1f} rows an epoch"
            )
            if "documents_seen" in facts:
                line += f", rows {facts['fill']:.1%} full"
            if facts["over_long_documents"]:
                line += (
                    f"; {facts['over_long_documents']:,} of {facts['documents_seen']:,} documents are longer than a row "
                    f"and left out (the longest: {facts['longest_document']:,} tokens)"
                )
            lines.append(line)
        if self._batch.cross_document_attention and any(map(has_kinds, self.datasets)):
            lines.append(
                f"warning: {self.name}: the conversations of a row see one another; batch.cross_document_attention: no keeps "
                "them apart"
            )
        return lines

    def state_dict(self) -> dict[str, list[int]]:
        """What has been worked out about the blocks so far. A cache: loading it saves time and changes nothing."""
        with self._lock:
            return {leaf.rows.fingerprint: leaf.rows.table.sizes() for leaf in self._leaves}

    def load_state_dict(self, state: Mapping[str, list[int]]) -> None:
        """Take over what `state_dict` gave; parts that are about other data or another layout are left alone."""
        with self._lock:
            for leaf in self._leaves:
                leaf.rows.table.restore(state.get(leaf.rows.fingerprint, []))

    def _refuse_two_chat_formats(self) -> None:
        """A model that is exported has one, and stops where answers end in that one."""
        if problem := two_chat_formats([store for dataset in self.datasets for store in stores(dataset)]):
            raise UserError(f"{self.name}: {problem}")

    def _build(
        self,
        config: DatasetConfig,
        sampling: SamplingConfig,
        path: tuple[int, ...],
        total_rows: int | None,
        problems: list[str],
    ) -> _Node | None:
        """Open everything below `config`; `path` tells the same data in two places apart."""
        if isinstance(config, SampledDataset):
            own = {name: getattr(config.sampling, name) for name in config.sampling.model_fields_set}
            return self._build(config.dataset, sampling.model_copy(update=own), path, total_rows, problems)
        try:
            if not isinstance(config, BlendedDataset):
                return self._open(config, sampling, path, total_rows)
            blend = Blend(config.weights)
        except UserError as error:
            problems += error.problems
            return None
        total = blend.rows_of(total_rows) if total_rows is not None else [None] * len(config.datasets)
        parts = [
            self._build(part, sampling, (*path, number), rows, problems)
            for number, (part, rows) in enumerate(zip(config.datasets, total))
        ]
        return _Blended(blend, [part for part in parts if part is not None])

    def _open(
        self, config: DatasetConfig, sampling: SamplingConfig, path: tuple[int, ...], total_rows: int | None
    ) -> _Leaf:
        length = self._batch.sequence_length
        dataset = open_dataset(config, vocab_size=self.vocab_size, sequence_length=length, seed=sampling.seed)
        conversations = has_kinds(dataset)
        if (
            self._batch.use_loss_masking_spans is True
            and MASK_LANE not in dataset.lanes
            and not conversations
        ):
            raise UserError(
                f"{dataset.name} has no loss mask, but batch.use_loss_masking_spans is set: "
                "prepare it with dataset.loss_masking_spans"
            )
        if (dataset.vocab_size or 0) > self.vocab_size:
            raise UserError(
                f"{dataset.name} was prepared with a tokenizer of {dataset.vocab_size:,} tokens, the model has "
                f"vocab_size {self.vocab_size:,}; prepare it with the model's tokenizer, or raise model.base_model.vocab_size"
            )
        passes = 1
        if sampling.shuffle == "full" and total_rows:
            passes = ceil(total_rows * length / dataset.num_tokens)
        key = derive_key("order", sampling.seed, *path)
        order = DocumentOrder(dataset.num_documents, key=key, shuffle=sampling.shuffle, passes=passes)
        rows: CutRows | WholeRows
        if self._batch.truncate_documents and not conversations:
            rows = CutRows(dataset, order, length)
        else:
            overlong = self._batch.overlong
            if overlong == "error" or (overlong == "auto" and conversations):
                refuse_overlong(dataset, length + 1)
            rows = WholeRows(dataset, order, length, split=overlong == "split")
        leaf = _Leaf(rows)
        self._leaves.append(leaf)
        return leaf


class _Leaf:
    """One dataset, with rows of its own."""

    def __init__(self, rows: Rows[Any]):
        self.rows = rows

    def locate(self, index: int) -> tuple[_Leaf, int]:
        return self, index

    def rows_of(self, rows: int) -> dict[_Leaf, int]:
        return {self: rows}

    def shares(self) -> dict[_Leaf, float]:
        return {self: 1.0}

    def identity(self) -> Any:
        return None

    def statistics(self, share: float, rows: int) -> dict[str, Any]:
        dataset = self.rows.dataset
        rows_per_epoch = self.rows.rows_per_epoch()
        return {
            "name": dataset.name,
            "share": share,
            "documents": dataset.num_documents,
            "tokens": dataset.num_tokens,
            "vocab_size": dataset.vocab_size,
            "rows_per_epoch": rows_per_epoch,
            "epochs": rows / rows_per_epoch,
            **self.rows.facts(),
        }


class _Blended:
    """Rows of several parts, by a schedule."""

    def __init__(self, blend: Blend, parts: list[_Node]):
        self._blend = blend
        self._parts = parts

    def locate(self, index: int) -> tuple[_Leaf, int]:
        part, inside = self._blend.locate(index)
        return self._parts[part].locate(inside)

    def rows_of(self, rows: int) -> dict[_Leaf, int]:
        taken = self._blend.rows_of(rows)
        return {leaf: n for part, count in zip(self._parts, taken) for leaf, n in part.rows_of(count).items()}

    def shares(self) -> dict[_Leaf, float]:
        period = self._blend.period
        return {
            leaf: share * count / period
            for part, count in zip(self._parts, self._blend.counts)
            for leaf, share in part.shares().items()
        }

    def identity(self) -> Any:
        return self._blend.counts, [part.identity() for part in self._parts]


_Node = _Leaf | _Blended


def ids_outside_vocabulary(streams: Sequence[DataStream]) -> list[str]:
    """One line for each store of another program with an id that is no token of the model: its document, and the id.

    Our own stores say how large their vocabulary is; these have to be read. Only the documents that the streams are made
    of are looked at, and none where they have more than `CHECKSUM_LIMIT` bytes of ids in all: those are found as they are
    read for a batch.
    """
    parts = {
        (store.path, begin, end, stream.vocab_size): store
        for stream in streams
        for dataset in stream.datasets
        for store, begin, end in foreign_documents(dataset)
    }
    size = sum(
        (store.offset(end) - store.offset(begin)) * store.dtype.itemsize
        for (_, begin, end, _), store in parts.items()
    )
    if size > CHECKSUM_LIMIT:
        return []
    found: dict[Path, str] = {}
    for (path, begin, end, vocab_size), store in parts.items():
        if path not in found and (problem := store.outside_vocabulary(vocab_size, begin, end)):
            found[path] = problem
    return list(found.values())


def prefetched(
    stream: DataStream,
    indices: Sequence[int],
    share: Share = WHOLE,
    depth: int = 2,
    *,
    give_up: Callable[[], bool] = lambda: False,
) -> Generator[tuple[Batch | None, float], None, None]:
    """Batches of these numbers in order, made in a background thread while the caller works, and the seconds waited for each.

    Of each only the `share` of this process is read. At most `depth` batches wait ready. While one is waited for, `give_up`
    is asked every now and then; where it says so, None comes instead, and nothing more. Close the generator
    (`contextlib.closing`) to stop early; the thread has ended when `close` returns, unless it hangs in reading. An error while
    reading is raised here, in its place in the order.
    """
    ready: Queue[Batch | BaseException] = Queue(maxsize=depth)
    stop = Event()

    def work() -> None:
        try:
            for index in indices:
                if stop.is_set():
                    return
                ready.put(stream.batch(index, share))
        except BaseException as error:
            ready.put(error)

    thread = Thread(target=work, name=f"prefetch {stream.name}", daemon=True)
    thread.start()
    try:
        for _ in indices:
            waited_from = perf_counter()
            while True:
                try:
                    item = ready.get(timeout=_ASKED_AGAIN)
                    break
                except Empty:
                    if give_up():
                        yield None, perf_counter() - waited_from
                        return
            if isinstance(item, BaseException):
                raise item
            yield item, perf_counter() - waited_from
    finally:
        stop.set()
        deadline = perf_counter() + _PATIENCE
        while thread.is_alive() and perf_counter() < deadline:  # it may be waiting for room to put one more
            while not ready.empty():
                ready.get()
            thread.join(timeout=0.05)


_ASKED_AGAIN = 0.5
"""Seconds after which somebody who waits for data looks whether he still should."""
_PATIENCE = 2.0
"""Seconds that one who needs no more data waits for the thread that reads it: a disk may have stopped answering."""
