"""`modelyard inspect STORE`: what a token store holds, and some of its documents as people read them. No torch.

What other programs prepared is opened as training opens it; it says nothing of its tokenizer and its vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from modelyard.config.disk import size
from modelyard.config.prepare import ConversationsConfig
from modelyard.data.datasets import StoredDataset
from modelyard.data.foreign import ForeignStore
from modelyard.data.lanes import KIND_LANE, MASK_LANE, not_targets
from modelyard.data.order import derive_key, keyed_hash
from modelyard.data.output import RECORD
from modelyard.data.store import TokenStore
from modelyard.data.stores import Counts
from modelyard.data.tokenizer import Tokenizer
from modelyard.errors import UserError
from modelyard.report.inspect_blocks import Cell, Facts, Heading, Inspection, Note, Tokens
from modelyard.report.inspect_data import (
    Options,
    Origin,
    judge,
    length_chart,
    length_values,
    mask_kinds,
    omitted,
    open_tokenizer,
    percentiles,
    progress,
    scan_text,
    scan_values,
    separator_warning,
    shortened,
)
from modelyard.report.inspect_kinds import (
    LANE_WORDS,
    answers_text,
    judge_lanes,
    kinds_table,
    kinds_values,
    spans_values,
)
from modelyard.report.inspect_lanes import TurnTokens, lane_of
from modelyard.report.inspect_scan import Lengths, Scan, read_lengths, scan
from modelyard.report.inspect_tokens import Vocabulary


def inspect_store(path: Path, options: Options, inspection: Inspection) -> None:
    """Add everything there is to see of the store at `path`. Raises UserError where it cannot be opened."""
    dataset = StoredDataset(path)
    store = dataset.store
    own = store if isinstance(store, TokenStore) else None
    chosen = _chosen(store, options)
    origin = Origin([own.manifest], [path]) if own else Origin([], [])
    tokenizer = open_tokenizer(dataset.tokenizer_folder, inspection)
    if own:
        _check_tokenizer(own, tokenizer, inspection)
    lengths = read_lengths(dataset)
    with progress(str(path), min(store.num_tokens, options.scan_limit)) as advance:
        found = scan(
            dataset,
            vocabularies={f"the vocabulary of the store ({own.vocab_size:,} tokens)": own.vocab_size}
            if own
            else {},
            bos=origin.token("bos"),
            eos=origin.token("eos"),
            limit=options.scan_limit,
            turns=TurnTokens.of(tokenizer),
            progress=advance,
        )
    inspection.add(Heading(f"store {path}"), Facts(_facts(dataset, lengths, found)))
    if found.kinds is not None and found.kinds.rows():
        inspection.add(Heading("tokens by kind"), kinds_table(found.kinds))
    if record := _prepared_from(path):
        inspection.add(Heading("prepared from"), Facts(record))
    inspection.add(length_chart(str(path), lengths))
    judge(inspection, dataset, lengths, found)
    judge_lanes(inspection, dataset, found)
    separator_warning(inspection, tokenizer, origin, str(path))
    if options.verify and own:
        inspection.fault(*own.verify())
    elif options.verify:
        inspection.warn(f"{path} has no checksums: --verify can find nothing more in it")
    _show_documents(dataset, chosen, Vocabulary(tokenizer), options, inspection)
    inspection.values.setdefault("stores", []).append(
        {
            "path": str(path),
            "documents": store.num_documents,
            "tokens": store.num_tokens,
            "vocab_size": store.vocab_size,
            "fingerprint": store.fingerprint,
            "tokenizer": own.manifest.get("tokenizer") if own else None,
            "trained_share": _trained_share(found),
            "chat": own.manifest.get("chat") if own else None,
            **kinds_values(found.kinds),
            **spans_values(found.spans),
            **length_values(lengths),
            **scan_values(found),
        }
    )


def stores_of(path: Path) -> list[Path]:
    """The stores that `prepare` wrote into its output folder; empty where `path` is none."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        return [path / name for name in record["stores"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _trained_share(found: Scan) -> float | None:
    return None if found.masked is None or not found.tokens else 1 - found.masked / found.tokens


def _facts(dataset: StoredDataset, lengths: Lengths, found: Scan) -> list[tuple[str, str]]:
    store = dataset.store
    manifest = store.manifest if isinstance(store, TokenStore) else {}
    tokenizer = manifest.get("tokenizer") or {}
    if isinstance(store, TokenStore):
        files = [facts["bytes"] for facts in manifest["files"].values()]
        shards = len(manifest["shards"])
        kind = f"{manifest['dtype']}, {shards} shard{'s' if shards > 1 else ''}"
        vocabulary = f"{store.vocab_size:,} tokens"
        lanes = [f"{name} ({kind})" for name, kind in manifest["lanes"].items()]
    else:
        files = [file.stat().st_size for file in store.files]
        kind = f"{store.dtype.name}, prepared by another program"
        vocabulary = "unknown"
        lanes = [f"{name} (from spans)" for name in store.lanes]
    rows = [
        ("documents", f"{store.num_documents:,}"),
        ("tokens", f"{store.num_tokens:,} ({kind})"),
        ("lengths", percentiles(lengths)),
        ("vocabulary", f"{vocabulary}, the largest id met is {found.largest:,}"),
    ]
    for role, name in (("bos", "begin token"), ("eos", "end token")):
        token = tokenizer.get(role)
        said = "none" if manifest else "unknown"
        rows.append((name, f"{token['token']} ({token['id']})" if token else said))
    rows += _loss_facts(manifest, store.lanes, found)
    rows += [
        ("lanes", ", ".join(lanes) or "none"),
        ("on disk", f"{size(sum(files))} in {len(files)} file{'s' if len(files) > 1 else ''}"),
        ("checked", f"{scan_text(dataset, found)}; {found.copies:,} copies of other documents"),
        ("tokenizer", tokenizer.get("fingerprint") or "unknown"),
        ("fingerprint", store.fingerprint),
    ]
    return rows


def _loss_facts(manifest: dict[str, Any], lanes: Sequence[str], found: Scan) -> list[tuple[str, str]]:
    """What is trained on, and how conversations are written."""
    trained = _trained_share(found)
    if found.kinds is None:
        if trained is None:
            text = "not read" if MASK_LANE in lanes else "none: every token is trained on"
        else:
            text = f"{trained:.1%} of the tokens are trained on, {found.masked:,} are masked"
        return [("loss mask", text)]
    chat = dict(manifest.get("chat") or {})
    name = chat.pop("family", "unknown")
    rows = [("chat format", ", ".join([str(name), *_settings(chat)]))]
    if trained is not None:
        lane = found.kinds.loss_lane
        rows += [
            (
                "trained on",
                f"{trained:.1%} of the tokens by the loss lane {lane} (batch.loss_lane): {LANE_WORDS[lane]}",
            ),
            ("answers", answers_text(found.kinds)),
        ]
    return rows


def _settings(values: Mapping[str, Any]) -> list[str]:
    """`name value` of whatever is said, values as YAML has them."""

    def shown(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, dict):
            return ", ".join(f"{inner}: {outer}" for inner, outer in value.items())
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return [f"{name} {shown(value)}" for name, value in values.items() if value not in (None, "", [], {})]


def _check_tokenizer(store: TokenStore, tokenizer: Tokenizer | None, inspection: Inspection) -> None:
    said = (store.manifest.get("tokenizer") or {}).get("fingerprint")
    if tokenizer is None:
        return
    if said is not None and tokenizer.fingerprint != said:
        inspection.fault(
            f"{store.path / 'tokenizer'} is not the tokenizer that the store was made with (manifest.json has sha256 "
            f"{said[:12]}…, it has {tokenizer.fingerprint[:12]}…): put the right one back, or prepare the data again"
        )
    if tokenizer.vocab_size > store.vocab_size:
        inspection.fault(
            f"{store.path / 'tokenizer'} has {tokenizer.vocab_size:,} tokens, the store was made for "
            f"{store.vocab_size:,}: it is another's; prepare the data again"
        )


def _prepared_from(path: Path) -> list[tuple[str, str]]:
    """What `prepare` wrote down beside the store."""
    if path not in stores_of(path.parent):
        return []
    record: dict[str, Any] = json.loads((path.parent / RECORD).read_text(encoding="utf-8"))
    source, config = record.get("source") or {}, record.get("config") or {}
    dataset = {
        key: value for key, value in (config.get("dataset") or {}).items() if value not in (None, [], "auto")
    }
    conversations = dataset.pop("conversations", None)
    if conversations is not None:
        del dataset["field"]  # that of a text
    rows = [
        (
            "source",
            ", ".join(
                f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
                for key, value in source.items()
            ),
        )
    ]
    rows.append(("dataset", ", ".join(_settings(dataset))))
    if conversations is not None:
        rows.append(("conversations", _conversations_text(conversations)))
    if splits := config.get("splits"):
        rows.append(("splits", ", ".join(f"{name} {share:g}" for name, share in splits.items())))
        rows.append(("seed", str(config.get("seed"))))
    known = {field.name for field in fields(Counts)}
    counts = Counts(**{name: count for name, count in (record.get("counts") or {}).items() if name in known})
    rows.append(("made", f"{counts.documents:,} documents, {counts.tokens:,} tokens, in all splits together"))
    if counts.answers:
        share = counts.trained / counts.tokens
        rows.append(
            ("answers", f"{counts.answers:,}, of {counts.trained:,} tokens ({share:.1%}) that are trained on")
        )
    if remarks := counts.remarks():
        rows.append(("not as found", ", ".join(remarks)))
    return rows


def _conversations_text(section: dict[str, Any]) -> str:
    """`dataset.conversations`, its defaults left out but for those that say most."""
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in ConversationsConfig.model_fields.items()
    }
    told = {
        name: value
        for name, value in section.items()
        if name in ("format", "family") or value != defaults.get(name)
    }
    return ", ".join(_settings(told))


def _chosen(store: TokenStore | ForeignStore, options: Options) -> list[int]:
    """The documents to show: the one asked for, or the first and some drawn by seed."""
    if options.document is not None:
        number = options.document
        if not -store.num_documents <= number < store.num_documents:
            raise UserError(
                f"--document {number}: {store.path} has {store.num_documents:,} documents, numbered from 0"
            )
        return [number % store.num_documents]
    wanted = min(options.documents, store.num_documents)
    chosen = [0] if wanted else []
    draws = keyed_hash(
        derive_key("inspect", "documents", options.seed), np.arange(64 * wanted, dtype=np.uint64)
    )
    for draw in draws.tolist():
        number = draw % store.num_documents
        if len(chosen) < wanted and number not in chosen:
            chosen.append(number)
    return chosen


def _show_documents(
    dataset: StoredDataset,
    chosen: Sequence[int],
    vocabulary: Vocabulary,
    options: Options,
    inspection: Inspection,
) -> None:
    if chosen:
        how = (
            "" if options.document is not None else f" (the first, and others drawn with seed {options.seed})"
        )
        inspection.add(Heading(f"documents{how if len(chosen) > 1 else ''}"))
        if lane_of(dataset.lanes) is None:
            inspection.add(Note("The store has no loss mask: every token is trained on."))
    for number in chosen:
        length = int(dataset.lengths(number, number + 1)[0])
        masked = not_targets(dataset, number, 0, length, spans=True, lane="sft")
        cells: list[Cell] = []
        for begin, end in shortened(length, options.tokens):
            if begin:
                cells.append(omitted(length - options.tokens))
            kinds = mask_kinds(None if masked is None else masked[begin:end], end - begin)
            said = dataset.lane(KIND_LANE, number, begin, end)
            cells += vocabulary.cells(dataset.document(number, begin, end), kinds, said)
        trained = "" if masked is None else f" · {np.count_nonzero(~masked):,} trained"
        inspection.add(Tokens(f"document {number:,} · {length:,} tokens{trained}", cells))
