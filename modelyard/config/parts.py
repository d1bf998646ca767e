"""Keys of the newest dialect that decide something only together: put aside file by file, decided once all are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelyard.config.dialect import Notice
from modelyard.config.document import Document, KeyPath, dotted
from modelyard.config.model import BIASES
from modelyard.config.newest import (
    BASE,
    BIAS_PARTS,
    BIAS_TARGET,
    BIAS_WORDS,
    BLOCK,
    BOUNDS,
    DECODER,
    EMBEDDING_START,
    LOSSES,
    TIED,
    Alike,
    path,
)
from modelyard.config.problems import shown
from modelyard.errors import did_you_mean


@dataclass(frozen=True)
class Refused:
    """What could not be translated."""

    key: KeyPath
    value: Any
    line: str
    """The problem."""


def unquoted(value: Any) -> str:
    """A value as it would be written, in a sentence."""
    return value if isinstance(value, str) else shown(value)


class Parts:
    """What was put aside, with its places; and what is said about it."""

    def __init__(self) -> None:
        self.document = Document({}, {}, "the configuration")
        self.notices: list[Notice] = []
        self.problems: list[str] = []
        self.refused: list[Refused] = []
        self.undecided: list[str] = []
        """What cannot be decided while the preset or pretrained model that says the rest cannot be read."""

    def has(self, key: KeyPath) -> bool:
        """Whether `key` was put aside."""
        return self.document.has(key)

    def get(self, key: KeyPath, default: Any = None) -> Any:
        """Its value."""
        return self.document.get(key, default)

    def origin(self, key: KeyPath) -> str:
        """Where it was written."""
        return self.document.origin(key)

    def put_aside(self, document: Document, key: KeyPath) -> None:
        """Take `key`, and everything in it, out of a document."""
        value, origins = document.take(key)
        document.prune(key[:-1])
        aside = Document({}, {}, document.name)
        aside.put(key, value, origins.get((), document.name))
        aside.origins |= {(*key, *below): origin for below, origin in origins.items()}
        self.document.merge(aside)

    def problem(self, key: KeyPath, problem: str) -> None:
        """Refuse `key`."""
        line = f"{self.origin(key)}: {problem}"
        self.problems.append(line)
        if self.has(key):
            self.refused.append(Refused(key, self.get(key), line))

    def undecidable(self, keys: list[KeyPath]) -> None:
        """Say of `keys` that what holds beside them is not known."""
        for key in keys:
            line = (
                f"{self.origin(key)}: {dotted(key)} = {shown(self.get(key))} is not translated: what holds beside it is "
                "said by the preset or pretrained model, which cannot be read"
            )
            self.undecided.append(line)
            self.notices.append(Notice(line))
            self.refused.append(Refused(key, self.get(key), line))

    def left_out(self, key: KeyPath, was: str, why: str = "it is so in any case") -> None:
        """Say that nothing is left of `key`."""
        self.notices.append(Notice(f"{self.origin(key)}: {was} is left out: {why}", (), was))

    def write(self, merged: Document, keys: list[KeyPath], target: KeyPath, value: Any) -> None:
        """Write what `keys` decided, with the place of the first of them, and say so once for each."""
        merged.put(target, value, self.origin(keys[0]))
        was = " and ".join(dotted(key) for key in keys)
        for key in keys:
            line = f"{self.origin(key)}: {dotted(key)} is now {dotted(target)}: {unquoted(value)}"
            self.notices.append(Notice(line, target, was))


def _otherwise(merged: Document, start: Document | None, key: KeyPath, default: Any) -> Any:
    """What `key`, in today's spelling, is where the newest dialect says nothing of it; None where nobody knows."""
    if merged.get(key) is not None:
        return merged.get(key)
    return None if start is None else start.get(key, default)


def decide_alike(parts: Parts, merged: Document, start: Document | None, alike: Alike) -> None:
    """One value for all parts of `alike`."""
    given = [part for part in alike.parts if parts.has(part)]
    if not given:
        return
    otherwise = _otherwise(merged, start, alike.target, alike.default)
    if otherwise is None and len(given) < len(alike.parts):
        parts.undecidable(given)
        return
    values = [parts.get(part) if parts.has(part) else otherwise for part in alike.parts]
    if any(value != values[0] for value in values):
        first = given[0]
        other = next(part for part in alike.parts if part != first)
        theirs = values[alike.parts.index(other)]
        said = [place for place in (merged, start) if place is not None and place.has(alike.target)]
        fallback = f"not given, that of {said[0].origin(alike.target)}" if said else "not given, the default"
        where = parts.origin(other) if other in given else fallback
        parts.problem(
            first,
            f"{dotted(first)} = {shown(parts.get(first))}, but {dotted(other)} = {shown(theirs)} ({where}); "
            f"{alike.why}: write the same in both",
        )
        return
    parts.write(merged, given, alike.target, values[0])


def decide_start(
    parts: Parts,
    merged: Document,
    start: Document | None,
    keys: tuple[KeyPath, ...],
    target: KeyPath,
    *,
    tied: bool,
) -> None:
    """Initial weights: one distribution for all `keys`. `tied`: what holds where nothing is said about tying."""
    given = [key for key in keys if parts.has(key)]
    found: dict[KeyPath, dict[str, float]] = {}
    for key in given:
        try:
            found[key] = _distribution(parts.get(key))
        except ValueError as problem:
            parts.problem(key, f"{dotted(key)} = {shown(parts.get(key))}: {problem}")
            return
    written = [key for key in given if found[key]]
    for key in given:
        if key not in written:
            parts.left_out(key, f"{dotted(key)}: default")
    if not written:
        return
    # Tied weights have no output layer of their own to begin with.
    one = _otherwise(merged, start, TIED, tied) if target == EMBEDDING_START else False
    if one is True:
        keys = keys[:1]
    first = found[written[0]]
    if any(found.get(key, {}) != first for key in keys):
        if one is None:
            parts.undecidable(written)
            return
        listed = ", ".join(f"{dotted(key)}: {_said(found.get(key))}" for key in keys)
        parts.problem(written[0], f"these begin alike here ({listed}); write the same in all")
        return
    for bound, value in first.items():
        name = str(target[-1]).replace("*", bound)
        parts.write(merged, written, (*target[:-1], name), value)


def decide_biases(parts: Parts, merged: Document, start: Document | None) -> None:
    """Which linear layers have a bias, as one word."""
    # An earlier file may say it in today's spelling, or a preset; the default of all dialects is everywhere.
    before = _otherwise(merged, start, BIAS_TARGET, True)
    word = {True: "everywhere", False: "nowhere"}.get(before) if isinstance(before, bool) else before
    otherwise: tuple[bool | None, ...] = (None,) * 3 if word is None else (True,) * 3
    otherwise = next((where for name, where in BIASES.items() if name == word), otherwise)
    given: list[KeyPath] = []
    found = []
    for (layers, general), fallback in zip(BIAS_PARTS, otherwise, strict=True):
        keys = [(*BASE, *path(f"{layer}.bias.enabled")) for layer in layers]
        everywhere = (*BASE, *path(general))
        given += [key for key in (everywhere, *keys) if parts.has(key) and key not in given]
        for key in (everywhere, *keys):
            if not isinstance(parts.get(key), bool | None):
                parts.problem(key, f"{dotted(key)} = {shown(parts.get(key))}: expected yes or no")
                return
        otherwise_here = fallback if parts.get(everywhere) is None else parts.get(everywhere)
        values = [otherwise_here if parts.get(key) is None else parts.get(key) for key in keys]
        if len({*values} - {None}) > 1:
            differing = next(key for key in keys if parts.has(key))
            names = ", ".join(layer.rpartition(".")[2] for layer in layers)
            parts.problem(
                differing, f"{names} have a bias all or none here; write bias.enabled for each of them"
            )
            return
        found.append(None if None in values else values[0])
    if not given:
        return
    if None in found:
        parts.undecidable(given)
        return
    qkv, output, mlp = map(bool, found)
    parts.write(merged, given, BIAS_TARGET, BIAS_WORDS[qkv, output, mlp])


def decide_losses(parts: Parts, merged: Document) -> None:
    """`head.losses`: the loss on labels, which always is, and what may be added to it."""
    losses = parts.get(LOSSES)
    if losses is None:
        return
    if not isinstance(losses, dict):
        parts.problem(LOSSES, f"{dotted(LOSSES)} = {shown(losses)}: expected NAME: {{type: label}}")
        return
    seen = []
    for name, loss in losses.items():
        key = (*LOSSES, name)
        loss = {} if loss is None else loss
        if not isinstance(loss, dict):
            parts.problem(key, f"{dotted(key)} = {shown(loss)}: expected a section with type, weight")
            continue
        kind, weight = loss.get("type", "label"), loss.get("weight", 1.0)
        known = ("type", "weight", "implementation", "loss_implementation")
        for unknown in [word for word in loss if word not in known]:
            parts.problem(
                (*key, unknown),
                f"unknown key '{unknown}' in {dotted(key)}{did_you_mean(unknown, known) or '; known keys: ' + ', '.join(known)}",
            )
        if kind not in ("label", "z_loss"):
            parts.problem(
                (*key, "type"),
                f"{dotted((*key, 'type'))} = {shown(kind)}: only label and z_loss are supported"
                f"{did_you_mean(str(kind), ('label', 'z_loss'))}",
            )
            continue
        if kind in seen:
            parts.problem(key, f"{dotted(key)}: a second loss of type {kind}; there is one of each here")
        seen.append(kind)
        if kind == "z_loss":
            parts.write(merged, [(*key, "weight")], (*BASE, "logit_z_loss"), weight)
        elif isinstance(weight, bool) or weight not in (1, 1.0):
            parts.problem(
                (*key, "weight"),
                f"{dotted((*key, 'weight'))} = {shown(weight)}: the label loss has weight 1; scale the others by it",
            )
        else:
            parts.left_out(key, f"{dotted(key)}: {{type: label}}")
        for word in ("implementation", "loss_implementation"):
            if kind == "label" and loss.get(word) is not None:
                parts.write(merged, [(*key, word)], (*BASE, "cross_entropy_impl"), loss[word])
    if losses and "label" not in seen:
        parts.problem(
            LOSSES, f"{dotted(LOSSES)}: there is no loss of type label, which always trains here; add it"
        )


def the_one_block(parts: Parts) -> Document | None:
    """`decoder: {type: pattern, blocks, pattern}` with equal blocks as `decoder.block`; None without a pattern."""
    kind = parts.get((*DECODER, "type"), "fixed")
    blocks_key, pattern_key = (*DECODER, "blocks"), (*DECODER, "pattern")
    blocks, pattern = parts.get(blocks_key), parts.get(pattern_key)
    if kind not in ("fixed", "pattern"):
        hint = did_you_mean(str(kind), ("fixed", "pattern"))
        key = (*DECODER, "type")
        parts.problem(
            key, f"{dotted(key)} = {shown(kind)}: expected fixed, or pattern with equal blocks{hint}"
        )
        return None
    stray = [key for key in (blocks_key, pattern_key) if parts.has(key)]
    if kind == "fixed":
        for key in stray:
            parts.problem(
                key, f"{dotted(key)} belongs to {dotted((*DECODER, 'type'))}: pattern; write decoder.block"
            )
        if parts.has((*DECODER, "type")):
            parts.left_out((*DECODER, "type"), f"{dotted(DECODER)}.type: fixed")
        return None
    if not isinstance(blocks, dict) or not isinstance(pattern, list) or not pattern:
        key = (*DECODER, "type")
        parts.problem(
            key, f"{dotted(key)}: pattern needs blocks (NAME: block) and pattern (a list of their names)"
        )
        return None
    for name in pattern:
        if not isinstance(name, str) or name not in blocks:
            hint = did_you_mean(str(name), blocks) or f" (there are: {', '.join(blocks)})"
            parts.problem(pattern_key, f"{dotted(pattern_key)}: there is no block '{name}'{hint}")
            return None
    first = pattern[0]
    for name in dict.fromkeys(pattern):
        if different := _difference(blocks[first], blocks[name]):
            key, ours, theirs = different
            parts.problem(
                (*blocks_key, name),
                f"{dotted((*blocks_key, name))} differs from {first} in {dotted(key)} ({shown(ours)}, {shown(theirs)}): "
                f"all blocks are alike here",
            )
            break
    if not isinstance(blocks[first], dict):
        parts.problem((*blocks_key, first), f"{dotted((*blocks_key, first))}: expected a section")
        return None
    block = Document({}, {}, "the configuration")
    block.put(BLOCK, blocks[first], parts.origin((*blocks_key, first)))
    depth = len(blocks_key) + 1
    block.origins |= {
        (*BLOCK, *key[depth:]): origin
        for key, origin in parts.document.origins.items()
        if key[:depth] == (*blocks_key, first)
    }
    names = ", ".join(dict.fromkeys(map(str, pattern)))
    was = f"{dotted(blocks_key)}: {names}, all equal"
    parts.notices.append(Notice(f"{parts.origin(blocks_key)}: {was}: read as {dotted(BLOCK)}", (), was))
    return block


def _distribution(value: Any) -> dict[str, float]:
    """std, and min and max where they are given; nothing for the default. Raises ValueError."""
    if not isinstance(value, dict | None):
        raise ValueError("expected {type: normal, std: NUMBER}")
    kind = value.get("type", "normal") if value else "default"
    known = {"default": ("type",), "normal": ("type", "mean", *BOUNDS)}
    if kind not in tuple(known):
        raise ValueError("initial weights are normal here; write {type: normal, std: NUMBER}")
    if kind == "default":
        value = {key: below for key, below in (value or {}).items() if key != "type"}
        if value:
            raise ValueError(f"'{next(iter(value))}' belongs to type: normal")
        return {}
    assert value is not None
    for key in value:
        if key not in known[kind]:
            raise ValueError(f"unknown key '{key}'{did_you_mean(str(key), known[kind])}")
    if value.get("mean") not in (None, 0, 0.0):
        raise ValueError("initial weights have mean 0 here")
    numbers = {bound: value[bound] for bound in BOUNDS if value.get(bound) is not None}
    if not all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in numbers.values()
    ):
        raise ValueError("std, min and max are numbers")
    if "std" not in numbers:
        raise ValueError("write its std, a number above 0")
    return {bound: float(number) for bound, number in numbers.items()}


def _said(distribution: dict[str, float] | None) -> str:
    return ", ".join(f"{bound} {shown(value)}" for bound, value in (distribution or {}).items()) or "default"


def _difference(ours: Any, theirs: Any, here: KeyPath = ()) -> tuple[KeyPath, Any, Any] | None:
    """The first key in which two blocks differ, and both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if found := _difference(ours.get(key), theirs.get(key), (*here, key)):
                return found
        return None
    return None if ours == theirs and type(ours) is type(theirs) else (here, ours, theirs)
