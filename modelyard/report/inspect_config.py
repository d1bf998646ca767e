"""`modelyard inspect CONFIG`: the data of a training run, and a batch row by row as the model gets it. No torch.

Rows and arrays come from the same `DataStream` that training reads, so what is shown is what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from modelyard.config.loader import Loaded
from modelyard.config.pretrained import model_tokenizer
from modelyard.config.train import TrainConfig
from modelyard.config.training import LossEvaluatorConfig
from modelyard.data.datasets import IndexedDataset, RandomTokens, stores
from modelyard.data.lanes import MASK_LANE, has_kinds
from modelyard.data.layout import IGNORED, Layout
from modelyard.data.rows import Piece
from modelyard.data.stream import DataStream
from modelyard.data.tokenizer import Tokenizer
from modelyard.data.tokenizer_difference import tokenizer_difference
from modelyard.errors import UserError
from modelyard.plan.summary import ANY_VOCABULARY, NO_MASKS
from modelyard.report.inspect_blocks import Facts, Heading, Inspection, Note, Table
from modelyard.report.inspect_data import (
    Options,
    Origin,
    judge,
    length_chart,
    length_values,
    open_tokenizer,
    progress,
    scan_text,
    scan_values,
    separator_warning,
)
from modelyard.report.inspect_kinds import (
    LANE_WORDS,
    answers_text,
    judge_lanes,
    kinds_table,
    kinds_values,
    spans_values,
)
from modelyard.report.inspect_lanes import TurnTokens
from modelyard.report.inspect_rows import show_rows
from modelyard.report.inspect_scan import Lengths, Scan, read_lengths, scan
from modelyard.report.inspect_tokens import Vocabulary

MEASURED_TOKENS = 4_000_000
"""Batches are measured until they hold this many tokens: at least one, at most `MEASURED_BATCHES`."""
MEASURED_BATCHES = 32


def inspect_config(loaded: Loaded, options: Options, inspection: Inspection) -> None:
    """Add every dataset that the run reads, and the batch of `options.iteration`."""
    config = loaded.train
    vocab_size = loaded.architecture.vocab_size if loaded.architecture else ANY_VOCABULARY
    last = config.training.train_iters
    if last and not 0 <= options.iteration < last:
        raise UserError(
            f"--iteration {options.iteration}: the run has {last:,}, and the first batch is number 0"
        )
    inspection.fault(*loaded.problems)
    inspection.warn(*loaded.warnings)
    batch = config.batch
    opened = {name: _open(config, name, vocab_size, inspection) for name in _names_read(config)}
    streams = {name: stream for name, stream in opened.items() if stream is not None}
    datasets = [dataset for stream in streams.values() for dataset in stream.datasets]
    inspection.add(Heading("batch"), Facts(_batch_facts(config, loaded, datasets)))
    tokenizers = _Tokenizers(config, inspection)
    found = {}
    for name, stream in streams.items():
        found[name] = _parts(config, name, stream, vocab_size, tokenizers, options, inspection)
        _show_dataset(config, name, stream, found[name], options, inspection)
    masked = [MASK_LANE in dataset.lanes or has_kinds(dataset) for dataset in datasets]
    if batch.use_loss_masking_spans == "auto" and masked and not any(masked):
        inspection.add(Note(f"{NO_MASKS[0].upper()}{NO_MASKS[1:]}."))
    if "training" not in streams:
        return
    stream, parts = streams["training"], found["training"]
    _check_tokenizers(config, parts, inspection)
    tokenizer = tokenizers.of(stream.tokenizer_folder)
    for part in parts:
        separator_warning(inspection, tokenizer, part.origin, part.dataset.name)
    begin = options.iteration * batch.batch_size
    rows = _read(stream, begin, begin + min(options.rows, batch.batch_size), inspection)
    if rows is not None:
        show_rows(config, *rows, Vocabulary(tokenizer), options, inspection)


@dataclass(frozen=True)
class _Part:
    """One dataset of a stream, with what a scan found in it."""

    dataset: IndexedDataset
    origin: Origin
    lengths: Lengths
    found: Scan


class _Tokenizers:
    """Tokenizers by folder, each opened once; the config's own takes the place of all of them."""

    def __init__(self, config: TrainConfig, inspection: Inspection):
        self._own = config.data.tokenizer.path
        self._inspection = inspection
        self._opened: dict[Path | None, Tokenizer | None] = {}

    def of(self, folder: Path | None) -> Tokenizer | None:
        """The one of data that came with `folder`; None, with a warning, where there is none to be had."""
        folder = self._own or folder
        if folder not in self._opened:
            self._opened[folder] = open_tokenizer(folder, self._inspection)
        return self._opened[folder]


_OVER_LONG = {
    "cut": "are cut into rows, nothing is lost",
    "drop": "are left out",
    "split": "are spread over several rows, nothing is lost",
    "error": "stop the run (batch.overlong)",
}


def _over_long(config: TrainConfig, dataset: IndexedDataset) -> str:
    """What becomes of documents of a dataset that are longer than a row: a key of `_OVER_LONG`."""
    batch, conversations = config.batch, has_kinds(dataset)
    if batch.truncate_documents and not conversations:
        return "cut"
    return ("error" if conversations else "drop") if batch.overlong == "auto" else batch.overlong


def _batch_facts(
    config: TrainConfig, loaded: Loaded, datasets: Sequence[IndexedDataset]
) -> list[tuple[str, str]]:
    batch = config.batch
    isolate = not batch.cross_document_attention
    conversations = [has_kinds(dataset) for dataset in datasets]
    cut = batch.truncate_documents and not (conversations and all(conversations))
    loss = {
        True: "on what the loss mask leaves",
        False: "on every token, without a loss mask",
        "auto": "on what the loss mask leaves, where the data has one",
    }[batch.use_loss_masking_spans]
    if any(conversations):
        of_them = f"of conversations on {LANE_WORDS[batch.loss_lane]} (batch.loss_lane: {batch.loss_lane})"
        loss = of_them if all(conversations) else f"{of_them}; of other documents {loss}"
    return [
        ("rows", f"{batch.batch_size:,} of {batch.sequence_length:,} tokens: {batch.tokens:,} an iteration"),
        (
            "documents",
            ("cut where a row ends" + ("; conversations whole" if any(conversations) else ""))
            if cut
            else "whole, packed best-fit, the rest of a row is padding",
        ),
        (
            "attention",
            "within each document; positions begin anew, its first token is no target"
            if isolate
            else "over the whole row, across documents",
        ),
        ("loss", loss),
        (
            "vocabulary",
            f"{loaded.architecture.vocab_size:,} tokens"
            if loaded.architecture
            else "unknown until the model is there",
        ),
    ]


def _names_read(config: TrainConfig) -> list[str]:
    """Training first, then what evaluators read, in the order of `data.datasets`."""
    wanted = {"training"} | ({"test"} if config.training.test_iters else set())
    for name, entry in config.training.evaluators.items():
        if isinstance(entry.evaluator, LossEvaluatorConfig):
            wanted.add(entry.evaluator.dataset_name or name)
    names = [name for name in config.data.datasets if name in wanted]
    return sorted(names, key=lambda name: name != "training")


def _open(config: TrainConfig, name: str, vocab_size: int, inspection: Inspection) -> DataStream | None:
    """The stream that training would read; where it would refuse, its reason is a fault and the data is shown anyway."""
    rows = config.training.train_iters * config.batch.batch_size if name == "training" else None
    reported: list[str] = []
    leaving_out = config.batch.model_copy(update={"overlong": "drop"})
    for batch, size in product((config.batch, leaving_out), (vocab_size, ANY_VOCABULARY)):
        try:
            return DataStream(
                config.data.datasets[name],
                name=name,
                sampling=config.data.sampling,
                batch=batch,
                vocab_size=size,
                total_rows=rows,
            )
        except UserError as error:
            for problem in [problem for problem in error.problems if problem not in reported]:
                reported.append(problem)
                # What loading has said already, with the line of the config, is said once.
                said = next((line for line in inspection.warnings if line.endswith(problem)), None)
                if said is not None:
                    inspection.warnings.remove(said)
                inspection.fault(said or f"data.datasets.{name}: {problem}")
    return None


def _parts(
    config: TrainConfig,
    name: str,
    stream: DataStream,
    vocab_size: int,
    tokenizers: _Tokenizers,
    options: Options,
    inspection: Inspection,
) -> list[_Part]:
    spans = bool(config.batch.use_loss_masking_spans)
    total = sum(min(dataset.num_tokens, options.scan_limit) for dataset in stream.datasets)
    parts = []
    with progress(name, total) as advance:
        for dataset in stream.datasets:
            below = stores(dataset)
            origin = Origin([store.manifest for store in below], [store.path for store in below])
            vocabularies = {}
            if vocab_size < ANY_VOCABULARY:
                vocabularies[f"the vocabulary of the model ({vocab_size:,} tokens)"] = vocab_size
            if origin.stores:
                own = max(store["vocab_size"] for store in origin.stores)
                vocabularies[f"the vocabulary of the store ({own:,} tokens)"] = own
            found = scan(
                dataset,
                vocabularies=vocabularies,
                bos=origin.token("bos"),
                eos=origin.token("eos"),
                # Random tokens are what they are.
                limit=0 if isinstance(dataset, RandomTokens) else options.scan_limit,
                loss_lane=config.batch.loss_lane,
                turns=TurnTokens.of(tokenizers.of(dataset.tokenizer_folder))
                if spans and MASK_LANE in dataset.lanes
                else None,
                progress=advance,
            )
            lengths = read_lengths(dataset)
            judge(inspection, dataset, lengths, found, mask_used=spans)
            judge_lanes(inspection, dataset, found, mask_used=spans)
            if has_kinds(dataset) and config.batch.cross_document_attention:
                inspection.warn(
                    f"{dataset.name}: the conversations of a row see one another; batch.cross_document_attention: no keeps "
                    "them apart"
                )
            if MASK_LANE in dataset.lanes and not has_kinds(dataset) and not spans:
                inspection.warn(
                    f"{dataset.name} has a loss mask that is not used: write batch.use_loss_masking_spans: yes, or "
                    "everything in it is trained on"
                )
            parts.append(_Part(dataset, origin, lengths, found))
    return parts


# Measuring real batches


@dataclass
class _Measured:
    """Sums over the rows that one dataset has in the batches measured."""

    rows: int = 0
    tokens: int = 0
    """Of documents: without padding."""
    targets: int = 0
    pieces: int = 0
    empty_rows: int = 0
    """Rows without a target."""


Rows = tuple[list[tuple[IndexedDataset, list[Piece]]], Layout]


def _read(stream: DataStream, begin: int, end: int, inspection: Inspection) -> Rows | None:
    """Rows `begin:end` with their arrays; what training would stop at is a fault."""
    try:
        pieces = stream.pieces(begin, end)
        return pieces, stream.layout(pieces)
    except UserError as error:
        inspection.fault(*(f"data.datasets.{stream.name}: {problem}" for problem in error.problems))
        return None


def _measure(
    config: TrainConfig, stream: DataStream, epoch: float, inspection: Inspection
) -> tuple[dict[int, _Measured], int]:
    """For each dataset (by `id`) its sums over the first batches, no more than an `epoch` of rows; how many batches."""
    batch = config.batch
    count = max(
        1, min(MEASURED_BATCHES, MEASURED_TOKENS // batch.tokens, math.ceil(epoch / batch.batch_size))
    )
    if stream.name == "training" and config.training.train_iters:
        count = min(count, config.training.train_iters)
    sums = {id(dataset): _Measured() for dataset in stream.datasets}
    for index in range(count):
        targets = 0
        # A few rows at a time: one batch may be millions of tokens.
        step = max(1, MEASURED_TOKENS // batch.sequence_length)
        for begin in range(index * batch.batch_size, (index + 1) * batch.batch_size, step):
            rows = _read(stream, begin, min(begin + step, (index + 1) * batch.batch_size), inspection)
            if rows is None:
                return sums, index
            in_loss = (rows[1].labels != IGNORED).sum(axis=1)
            targets += int(in_loss.sum())
            for (dataset, pieces), trained in zip(rows[0], in_loss.tolist()):
                own = sums[id(dataset)]
                own.rows += 1
                own.tokens += sum(end - first for _, first, end in pieces)
                own.targets += trained
                own.pieces += len(pieces)
                own.empty_rows += not trained
        if not targets:
            inspection.fault(
                f"data.datasets.{stream.name}: batch {index} has no token to train on: look at the loss mask of its data "
                f"(modelyard inspect … --iteration {index})"
            )
    return sums, count


def _show_dataset(
    config: TrainConfig,
    name: str,
    stream: DataStream,
    parts: Sequence[_Part],
    options: Options,
    inspection: Inspection,
) -> None:
    batch = config.batch
    room = batch.sequence_length + 1
    total_rows = config.training.train_iters * batch.batch_size if name == "training" else 0
    try:
        facts = stream.statistics(total_rows)["datasets"]
    except UserError as error:
        inspection.fault(*(f"data.datasets.{name}: {problem}" for problem in error.problems))
        return
    epoch = max(fact["rows_per_epoch"] / fact["share"] for fact in facts if fact["share"])
    measured, batches = _measure(config, stream, epoch, inspection)
    all_rows = sum(own.rows for own in measured.values())
    rows, values = [], []
    for part, fact in zip(parts, facts, strict=True):
        own = measured[id(part.dataset)]
        over, over_tokens = part.lengths.longer_than(room)
        positions = own.rows * batch.sequence_length
        trained = own.targets / positions if positions else None
        fill = own.tokens / (own.rows * room) if own.rows else None
        got = own.rows / all_rows if all_rows else None
        rows.append([
            part.dataset.name,
            f"{part.dataset.num_documents:,}",
            f"{part.dataset.num_tokens:,}",
            f"{part.lengths.quantile(0.5):,}",
            f"{part.lengths.quantile(1.0):,}",
            f"{over:,}",
            _percent(fill),
            _percent(trained),
            _percent(fact["share"]),
            _percent(got),
            f"{fact['epochs']:.2f}" if total_rows else "",
        ])  # fmt: skip
        values.append(
            {
                "name": part.dataset.name,
                "documents": part.dataset.num_documents,
                "tokens": part.dataset.num_tokens,
                "over_long_documents": over,
                "over_long_tokens": over_tokens,
                "fill": fill,
                "trained_share": trained,
                "share_wanted": fact["share"],
                "share_got": got,
                "rows_measured": own.rows,
                "epochs": fact["epochs"] if total_rows else None,
                **length_values(part.lengths),
                **scan_values(part.found),
                **kinds_values(part.found.kinds),
                **spans_values(part.found.spans),
                "over_long": _over_long(config, part.dataset),
            }
        )
        _judge_rows(config, part, over, over_tokens, own, inspection)
    columns = [
        "dataset",
        "documents",
        "tokens",
        "median",
        "longest",
        "over-long",
        "fill",
        "trained",
        "wanted",
        "got",
    ]
    if total_rows:
        columns.append("epochs")
    else:
        rows = [row[:-1] for row in rows]
    inspection.add(Heading(f"dataset {name}"), Table(columns, rows))
    inspection.add(
        Note(
            f"Measured over {all_rows:,} rows, the first {batches:,} batch{'es' if batches != 1 else ''}: fill (tokens of "
            f"documents ÷ the room of {room:,} in a row), trained (positions with a target), and the share of rows that it got. "
            f"Over-long documents have more than {room:,} tokens: {_over_long_text(config, parts)}."
        )
    )
    for part in parts:
        if (kinds := part.found.kinds) is not None and kinds.rows():
            inspection.add(
                Heading(f"tokens of {part.dataset.name} by kind", part=True),
                kinds_table(kinds),
                Note(
                    f"Answers: {answers_text(kinds)}; {kinds.trained.sum() / kinds.tokens.sum():.1%} of the tokens are trained on."
                ),
            )
        if not part.found.whole:
            inspection.add(Note(f"{part.dataset.name}: {scan_text(part.dataset, part.found)}."))
        inspection.add(length_chart(part.dataset.name, part.lengths, room))
    inspection.values.setdefault("datasets", {})[name] = values


def _over_long_text(config: TrainConfig, parts: Sequence[_Part]) -> str:
    """What becomes of them, told apart where that differs."""
    fates = {has_kinds(part.dataset): _OVER_LONG[_over_long(config, part.dataset)] for part in parts}
    if len(set(fates.values())) == 1:
        return f"they {next(iter(fates.values()))}"
    return f"conversations {fates[True]}; other documents {fates[False]}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _judge_rows(
    config: TrainConfig, part: _Part, over: int, over_tokens: int, own: _Measured, inspection: Inspection
) -> None:
    name = part.dataset.name
    if own.rows and not own.targets:
        inspection.fault(f"{name}: none of the {own.rows:,} rows measured has a token to train on")
    elif own.empty_rows:
        inspection.warn(f"{name}: {own.empty_rows:,} of {own.rows:,} rows measured have nothing to train on")
    if over and _over_long(config, part.dataset) == "drop":
        other = "batch.overlong: split" if has_kinds(part.dataset) else "batch.truncate_documents: yes"
        inspection.warn(
            f"{name}: {over:,} documents with {over_tokens:,} tokens ({over_tokens / part.dataset.num_tokens:.1%}) are longer "
            f"than a row and left out: raise batch.sequence_length, or write {other}"
        )


def _check_tokenizers(config: TrainConfig, parts: Sequence[_Part], inspection: Inspection) -> None:
    """One tokenizer for all of the data, and the one of the model that training starts from."""
    folders = [folder for part in parts for folder in part.origin.folders if (folder / "tokenizer").is_dir()]
    if not folders:
        return
    first, *others = dict.fromkeys(folders)
    for other in others:
        if reason := tokenizer_difference(first / "tokenizer", other / "tokenizer"):
            inspection.fault(
                f"{other} was made with another tokenizer than {first} ({reason}): prepare one of them again"
            )
    if config.pretrained is None:
        return
    model = Path(config.pretrained.path).expanduser()
    theirs = model_tokenizer(model)
    if reason := tokenizer_difference(first / "tokenizer", theirs):
        line = (
            f"{first} was made with another tokenizer than {model} has ({reason}): prepare the data with "
            f"tokenizer.path: {theirs}"
        )
        # A shape alone has learned no tokens.
        (inspection.fault if config.pretrained.model_weights else inspection.warn)(line)
