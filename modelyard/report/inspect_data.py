"""What stores and configs have in common: options, documents as cells, and what a scan says that somebody has to change."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelyard.data.datasets import IndexedDataset
from modelyard.data.lanes import KIND_LANE, MASK_LANE
from modelyard.data.tokenizer import Tokenizer, load_tokenizer, separator_notice
from modelyard.errors import UserError
from modelyard.report.inspect_blocks import Cell, CellKind, Histogram, Inspection
from modelyard.report.inspect_lanes import Seen
from modelyard.report.inspect_scan import Lengths, Scan

UNTRAINED_SHARE = 0.5
"""Documents with nothing to train on are a fault from this share on, a warning below: a few come of long prompts."""
COPIED_SHARE = 0.05
"""Copies of other documents are a warning from this share on."""


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    documents: int = 3
    document: int | None = None
    tokens: int = 300
    """Shown of each document, at most."""
    ids: bool = False
    seed: int = 0
    rows: int = 4
    iteration: int = 0
    scan_limit: int = 1_000_000_000
    """Tokens of each dataset that are read."""
    all_tensors: bool = False
    verify: bool = False


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while something long is read; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.text import Text

    columns = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(20), TimeRemainingColumn())
    with Progress(TextColumn("reading"), *columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(Text(what).plain, total=max(total, 1))
        yield lambda amount: bar.advance(task, amount)


@dataclass(frozen=True)
class Origin:
    """What the manifests behind a dataset say of its tokens."""

    stores: Sequence[dict[str, Any]]
    folders: Sequence[Path]

    def token(self, role: str) -> int | None:
        """The id of `bos` or `eos`; None where there is none, or where stores differ."""
        found = {((store.get("tokenizer") or {}).get(role) or {}).get("id") for store in self.stores}
        return found.pop() if len(found) == 1 else None


def open_tokenizer(folder: Path | None, inspection: Inspection) -> Tokenizer | None:
    """The tokenizer in a folder; None, with a warning, where there is none to be had."""
    if folder is None:
        inspection.warn("there is no tokenizer with the data, so tokens are shown as numbers")
        return None
    try:
        return load_tokenizer(folder)
    except UserError as error:
        inspection.warn(*(f"{problem}; tokens are shown as numbers" for problem in error.problems))
        return None


def shortened(count: int, limit: int) -> list[tuple[int, int]]:
    """Which of `count` tokens are shown: all, or the beginning and, half as much, the end."""
    if count <= limit:
        return [(0, count)]
    head = limit - limit // 3
    return [(0, head), (count - limit // 3, count)]


def omitted(count: int) -> Cell:
    """Stands where tokens were left out."""
    return Cell(f" … {count:,} tokens … ", (), "remark")


def mask_kinds(mask: np.ndarray | None, count: int) -> list[CellKind]:
    """The kind of each of `count` tokens by which of them are no targets, bool [count]."""
    return ["trained"] * count if mask is None else ["masked" if left_out else "trained" for left_out in mask]


def length_chart(name: str, lengths: Lengths, capacity: int | None = None) -> Histogram:
    """Documents by length, in powers of two and cut at `capacity` tokens; buckets beyond it are marked."""
    bars = [
        (
            f"{first:,}" if first == last else f"{first:,}–{last:,}",
            count,
            capacity is not None and first > capacity,
        )
        for first, last, count in lengths.buckets(capacity)
    ]
    remark = f"longer than a row of {capacity:,} tokens" if capacity is not None else ""
    return Histogram(f"documents of {name} by length (tokens)", bars, remark)


def percentiles(lengths: Lengths) -> str:
    """`median 96, 90% up to 204, …`."""
    tokens = lengths.longer_than(0)[1]
    parts = [f"mean {tokens / lengths.documents:,.1f}", f"shortest {lengths.quantile(0):,}"]
    parts += [f"{name} {lengths.quantile(q):,}" for name, q in _QUANTILES.items()]
    return ", ".join(parts)


_QUANTILES = {"10%": 0.1, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1.0}


def length_values(lengths: Lengths) -> dict[str, Any]:
    """The same for `--json`."""
    return {
        "empty_documents": lengths.empty,
        "length_quantiles": {
            "shortest": lengths.quantile(0),
            **{k: lengths.quantile(q) for k, q in _QUANTILES.items()},
        },
        "length_histogram": [[first, last, count] for first, last, count in lengths.buckets()],
    }


def judge(
    inspection: Inspection,
    dataset: IndexedDataset,
    lengths: Lengths,
    scan: Scan,
    *,
    mask_used: bool = True,
) -> None:
    """Faults and warnings of what the scan met."""
    name = dataset.name

    def seen(found: Seen, what: str, advice: str) -> str:
        return seen_text(dataset, scan, found, what, advice)

    if lengths.empty:
        inspection.fault(
            f"{name}: {lengths.empty:,} of {dataset.num_documents:,} documents are empty: prepare the data again"
        )
    for vocabulary, found in scan.outside.items():
        if found.count:
            inspection.fault(
                seen(found, f"have token ids beyond {vocabulary}: up to {scan.largest:,}",
                     "they would read past the embedding: prepare the data with the model's tokenizer")
            )  # fmt: skip
    if scan.double_bos.count:
        advice = "the text brings one already; prepare it without (tokenizer.add_bos: no, or clean the text)"
        inspection.fault(seen(scan.double_bos, "begin with begin-of-sequence twice", advice))
    if scan.inner_bos.count:
        advice = "are several documents stored as one?"
        inspection.warn(seen(scan.inner_bos, "have begin-of-sequence in their middle", advice))
    if scan.double_eos.count:
        advice = "the text brings one already; prepare it with tokenizer.add_eos: no"
        inspection.warn(seen(scan.double_eos, "end with end-of-sequence twice", advice))
    for missing, what in (
        (scan.missing_bos, "lack begin-of-sequence"),
        (scan.missing_eos, "lack end-of-sequence"),
    ):
        if missing.count:
            inspection.warn(
                seen(missing, what, "the manifest says that they have it: prepare the data again")
            )
    if scan.masked is not None and scan.kinds is None and mask_used and scan.documents:
        if scan.masked == scan.tokens:
            inspection.fault(f"{name}: every one of {scan.tokens:,} tokens is masked: nothing would be trained; look at "
                             "the spans of the data (dataset.loss_masking_spans holds what is left out)")  # fmt: skip
        elif scan.untrained.count:
            untrained = scan.untrained.count / scan.documents
            line = seen(
                scan.untrained, f"({untrained:.1%}) have nothing to train on", "all their tokens are masked"
            )
            (inspection.fault if untrained >= UNTRAINED_SHARE else inspection.warn)(line)
    if scan.compared and scan.copies / scan.compared >= COPIED_SHARE:
        inspection.warn(
            f"{name}: {scan.copies:,} of {scan.compared:,} documents ({scan.copies / scan.compared:.1%}) are copies of "
            f"another (the most frequent is there {scan.most_copied:,} times): deduplicate the source"
        )


def seen_text(dataset: IndexedDataset, scan: Scan, found: Seen, what: str, advice: str) -> str:
    """`s: 3 of 90 documents lack a begin (the first are document 1 of s, …); do this`."""
    share = scan.documents / max(dataset.num_documents, 1)
    of = f"{scan.documents:,} documents" + ("" if scan.whole else f" read ({share:.1%} of all)")
    verb = "is" if found.count == 1 else "are"
    named = ", ".join(map(dataset.where, found.named))
    return f"{dataset.name}: {found.count:,} of {of} {what} (the first {verb} {named}); {advice}"


def separator_warning(inspection: Inspection, tokenizer: Tokenizer | None, origin: Origin, name: str) -> None:
    """Say where plain text ends with an end-of-turn token, as `prepare` does."""
    from modelyard.data.tokenizer import DocumentFrame, SpecialToken

    eos = origin.token("eos")
    lanes = {lane for store in origin.stores for lane in store["lanes"]}
    if tokenizer is None or eos is None or lanes & {MASK_LANE, KIND_LANE}:
        return
    text = tokenizer.backend.id_to_token(eos)
    if text is not None and (
        line := separator_notice(tokenizer, DocumentFrame(None, SpecialToken(eos, text)))
    ):
        inspection.warn(f"{name}: {line}")


def scan_text(dataset: IndexedDataset, scan: Scan) -> str:
    """What was read."""
    if scan.whole:
        return f"all {scan.tokens:,} tokens were read"
    if not scan.tokens:
        return "no tokens were read (--scan-limit 0)"
    return f"{scan.tokens:,} of {dataset.num_tokens:,} tokens were read, in stretches from all over (--scan-limit)"


def scan_values(scan: Scan) -> dict[str, Any]:
    """The same for `--json`."""
    return {
        "scanned_documents": scan.documents,
        "scanned_tokens": scan.tokens,
        "largest_token": scan.largest,
        "masked_tokens": scan.masked,
        "documents_outside_vocabulary": {name: found.count for name, found in scan.outside.items()},
        "documents_with_two_bos": scan.double_bos.count,
        "documents_without_bos": scan.missing_bos.count,
        "documents_with_inner_bos": scan.inner_bos.count,
        "documents_with_two_eos": scan.double_eos.count,
        "documents_without_eos": scan.missing_eos.count,
        "documents_untrained": scan.untrained.count,
        "copies": scan.copies,
    }
