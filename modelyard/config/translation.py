"""The newest dialect into today's spelling, on plain dictionaries: file by file what is one key here and there, and once
all files and overrides are merged what several keys decide together, and its own defaults."""

from __future__ import annotations

from math import gcd
from typing import Any

from modelyard.config.dialect import Conflict, Notice, move
from modelyard.config.document import Document, KeyPath, dotted
from modelyard.config.newest import (
    ALIKE,
    BASE,
    BATCH_PARTS,
    BATCH_SIZE,
    BLOCK,
    DATA_DEFAULTS,
    DECODER,
    DEFAULT_TOKENS,
    DIALECT,
    ISOLATION,
    MICRO_BATCH,
    MODEL_DEFAULTS,
    NEWEST_DATA,
    NEWEST_MODEL,
    OLDER_DATA,
    OLDER_MODEL,
    OUTPUT_STARTS,
    POSITIONS,
    ROOTS,
    RULES,
    SECTIONS,
    SEQUENCE,
    STARTS,
    TIED,
    TOKENS,
    Only,
    Part,
    To,
)
from modelyard.config.parts import (
    Parts,
    Refused,
    decide_alike,
    decide_biases,
    decide_losses,
    decide_start,
    the_one_block,
    unquoted,
)
from modelyard.config.problems import shown
from modelyard.config.token_batch import decide_batch, whole
from modelyard.errors import did_you_mean

PRESET: KeyPath = ("model", "preset")
HIDDEN: KeyPath = (*BASE, "transformer", "hidden_size")
DEFAULT_HIDDEN = 1024


def has_shape(document: Document) -> bool:
    """Whether the model's shape comes from a preset or a pretrained model."""
    if (
        document.get(("pretrained", "path")) is not None
        and document.get(("pretrained", "load_config")) != "none"
    ):
        return True
    return document.has(PRESET)


class Translation:
    """One configuration's way from the newest dialect to today's: `observe` and `take` every document, then `finish`.

    Documents are told in the order in which they are merged, so that of two spellings of one key the later wins.
    """

    def __init__(self) -> None:
        self._parts = Parts()
        self.notices, self.problems = self._parts.notices, self._parts.problems
        self.refused = self._parts.refused
        self.undecided = self._parts.undecided
        self.newest_model = False
        """Whether the model is described in the newest dialect, so that its defaults hold."""
        self.newest_data = False
        """The same for `data`, `schedule` and `batch`."""
        self.batch_size_is_said = False
        """Whether a batch size that is missing is among the problems already."""
        self._overridden: set[KeyPath] = set()
        self._block: str | None = None  # where decoder.block is written, if it is
        self._seen: dict[str, dict[KeyPath, str]] = {}
        self._tying_unknown: tuple[KeyPath, str] | None = None

    # One document at a time

    def observe(self, document: Document) -> None:
        """Note, before anything is rewritten, which dialect the keys of a file belong to; overrides follow the files."""
        override = document.name.startswith("override ")
        tables = {
            "newest model": NEWEST_MODEL,
            "older model": OLDER_MODEL,
            "newest data": NEWEST_DATA,
            "older data": OLDER_DATA,
        }
        for name in ("embeddings_layer", "output_layer"):
            if document.has((*BASE, name)) and not override:
                self._tying_unknown = ((*BASE, name), document.origin((*BASE, name)))
                self._note("newest model", (*BASE, name), document)
        for kind, keys in tables.items():
            for key in keys:
                if document.has(key):
                    self._note(f"{kind} override" if override else kind, key, document)
        batch = document.get(("batch",))
        if isinstance(batch, dict) and not override and set(batch) - {"batch_size"}:
            self._note("batch", ("batch",), document)

    def _note(self, kind: str, key: KeyPath, document: Document) -> None:
        self._seen.setdefault(kind, {}).setdefault(key, document.origin(key))

    def take(self, document: Document) -> None:
        """Rename what is one key in both dialects, and put aside what several keys decide."""
        for key, rule in RULES.items():
            if isinstance(rule, Part) and any(document.has(target) for target in rule.targets):
                self._written_today(document, key, rule)
        if document.has(BLOCK) and document.name != self._parts.document.name:
            self._block = document.origin(BLOCK)
        for root in ROOTS:
            if document.has(root):
                self._walk(document, root)

    def _written_today(self, document: Document, key: KeyPath, rule: Part) -> None:
        """A later file or override says in today's spelling what `key` decided."""
        if document.has(key):
            target = next(target for target in rule.targets if document.has(target))
            self._refuse(
                document,
                key,
                f"{dotted(key)} is the newest dialect's spelling of {dotted(target)}, which is also given "
                f"({document.origin(target)}); keep one",
            )
        elif key == TOKENS:
            self._overridden.add(key)  # It still says how long a row is.
        else:
            self._parts.document.discard(key)

    def _walk(self, document: Document, key: KeyPath) -> None:
        rule, value = RULES.get(key), document.get(key)
        if rule is None and key not in SECTIONS:
            self._refuse(document, key, _unknown(key))
        elif rule is None and isinstance(value, dict):
            for name in list(value):
                self._walk(document, (*key, name))
            if document.get(key) == {}:
                document.take(key)
                document.prune(key[:-1])
        elif rule is None and value is None:
            document.take(key)
            document.prune(key[:-1])
        elif rule is None:
            self._refuse(
                document, key, f"{dotted(key)} = {shown(value)}: expected a section with {_names(key)}"
            )
        elif isinstance(rule, To):
            try:
                self.notices.append(move(document, key, rule.target))
            except Conflict as conflict:
                self._refuse(document, key, str(conflict), placed=True)
        elif isinstance(rule, Only):
            self._left_out(document, key, rule)
        else:
            self._overridden.discard(key)
            self._parts.put_aside(document, key)

    def _left_out(self, document: Document, key: KeyPath, rule: Only) -> None:
        value = document.get(key)
        if not any(value == harmless and type(value) is type(harmless) for harmless in rule.harmless):
            self._refuse(document, key, f"{dotted(key)} = {shown(value)}: {rule.why}")
            return
        was = f"{dotted(key)}: {shown(value)}"
        self.notices.append(
            Notice(f"{document.origin(key)}: {was} is left out: it is so in any case", (), was)
        )
        document.take(key)
        document.prune(key[:-1])

    def _refuse(self, document: Document, key: KeyPath, problem: str, *, placed: bool = False) -> None:
        line = problem if placed else f"{document.origin(key)}: {problem}"
        self.problems.append(line)
        self.refused.append(Refused(key, document.get(key), line))
        document.take(key)
        document.prune(key[:-1])

    # All documents together

    def give_back(self, merged: Document) -> None:
        """Undo what was put aside, where `merged` is no training configuration and its validation names every key."""
        merged.merge(self._parts.document)

    def finish(self, merged: Document, start: Document | None) -> None:
        """Write what several keys decide together into the merged document, and settle which dialect's defaults hold.

        `start` is what `merged` will be written over, a preset's or pretrained model's shape, which says what holds for
        the rest of those keys; None: it is named, but cannot be read.
        """
        self._settle(merged)
        before = len(self.problems)
        if block := the_one_block(self._parts):
            self.take(block)
            # What is written in today's spelling is an override: it comes later.
            block.merge(merged)
            merged.values, merged.origins = block.values, block.origins
            if self._block is not None:
                self.problems.append(
                    f"{self._block}: {dotted(BLOCK)} does nothing beside {dotted((*DECODER, 'type'))}: pattern; "
                    f"write {dotted((*DECODER, 'blocks'))}.NAME"
                )
        if block or len(self.problems) == before:
            for alike in ALIKE:
                decide_alike(self._parts, merged, start, alike)
            self._settle_positions(merged)
        for keys, target in STARTS:
            decide_start(self._parts, merged, start, keys, target, tied=not self.newest_model)
        decide_biases(self._parts, merged, start)
        decide_losses(self._parts, merged)
        if self.newest_data or any(self._parts.has(key) for key in BATCH_PARTS):
            decide_batch(
                self._parts,
                merged,
                rows_are_given=TOKENS in self._overridden,
                row_is_given=not self.newest_data,
            )
            self.batch_size_is_said = True

    def _settle(self, merged: Document) -> None:
        self.newest_model = self._newest("model")
        self.newest_data = self._newest("data")
        if self.newest_model and not self.newest_data and not self._seen.keys() & {"older data", "batch"}:
            # Nothing but the batch size, which has no other spelling: the model's dialect holds for all.
            self.newest_data = True
        older = self._seen.get("batch") or self._seen.get("older data")
        if self.newest_model and not self.newest_data and older and not merged.has(ISOLATION):
            key, origin = next(iter(older.items()))
            line = f"{origin}: {dotted(key)} is today's spelling: unlike in version 0.4 of the model's dialect, documents of a row"
            self.notices.append(Notice(f"{line} see each other; write {dotted(ISOLATION)}: yes or no"))
        if self._tying_unknown and not merged.has(TIED) and not has_shape(merged):
            key, origin = self._tying_unknown
            self.problems.append(
                f"{origin}: {dotted(key)} is a spelling of a few weeks in which the default of tied_weight changed; write "
                f"{dotted((*BASE, 'tied_embedding_weight'))}: yes or no"
            )

    def _settle_positions(self, merged: Document) -> None:
        """Without rotary positions this dialect may have none, today's has learned ones: neither is guessed."""
        rotary = merged.get((*BASE, "transformer", "rotary", "type"), "none")
        if self.newest_model and rotary == "none" and not has_shape(merged) and not merged.has(POSITIONS):
            key, origin = next(iter(self._seen_newest("model").items()))
            self.problems.append(
                f"{origin}: {dotted(key)} is {DIALECT}, and the model has no rotary positions; write decoder.block.mixer.rotary: "
                "{type: default}, or embeddings.position_embeddings.enabled: yes or no"
            )

    def _seen_newest(self, what: str) -> dict[KeyPath, str]:
        return self._seen.get(f"newest {what}") or self._seen.get(f"newest {what} override") or {}

    def _newest(self, what: str) -> bool:
        newest, older = self._seen.get(f"newest {what}", {}), self._seen.get(f"older {what}", {})
        if newest and older:
            (ours, here), (theirs, there) = next(iter(newest.items())), next(iter(older.items()))
            self.problems.append(
                f"{here}: {dotted(ours)} is {DIALECT}, {dotted(theirs)} ({there}) is not, and their defaults differ; "
                "write both in one spelling"
            )
        return bool(newest) or (not older and bool(self._seen.get(f"newest {what} override")))

    # Defaults

    def defaults(self, written: Document, known: Document, *, shape_known: bool) -> dict[KeyPath, Any]:
        """The dialect's defaults that are not today's, where neither the user nor `known` (a preset's or pretrained model's
        shape) says anything. `shape_known` is false while the pretrained model that has the shape is not there."""
        found: dict[KeyPath, Any] = {}
        if self.newest_model and shape_known:
            found |= MODEL_DEFAULTS
            hidden = written.get(HIDDEN, known.get(HIDDEN, DEFAULT_HIDDEN))
            pretrained = (
                written.get(("pretrained", "path")) is not None
                and written.get(("pretrained", "model_weights")) is not False
            )
            today = (
                pretrained or written.has(PRESET) or written.has((*BASE, "transformer", "init_method_std"))
            )
            width = whole(hidden)
            if width and not today:
                # Its output projections begin like all others, ours are divided by sqrt(2 x layers).
                found |= dict.fromkeys(OUTPUT_STARTS, width**-0.5)
        if self.newest_data:
            found |= DATA_DEFAULTS
            if not self._parts.has(TOKENS) and not written.has(("batch", "sequential_micro_batches")):
                found[MICRO_BATCH] = self._default_rows(written)
        return {
            key: value
            for key, value in found.items()
            if value is not None and not written.has(key) and not known.has(key)
        }

    def _default_rows(self, written: Document) -> int | None:
        row, size = whole(written.get(SEQUENCE, DEFAULT_TOKENS)), whole(written.get(BATCH_SIZE))
        if row is None or size is None:
            return None
        return gcd(max(1, DEFAULT_TOKENS // row), size)

    def defaults_notice(self, defaults: dict[KeyPath, Any]) -> list[Notice]:
        """What `validate` says about them."""
        lines = []
        for what, belongs in (("model", self.newest_model), ("data", self.newest_data)):
            chosen = {
                key: value for key, value in defaults.items() if (key[0] == "model") == (what == "model")
            }
            if not belongs or not chosen:
                continue
            seen = self._seen_newest(what) or self._seen_newest("model")
            key, origin = next(iter(seen.items()))
            listed = ", ".join(f"{dotted(key)}: {unquoted(value)}" for key, value in chosen.items())
            lines.append(
                Notice(
                    f"{origin}: {dotted(key)} is {DIALECT}; where nothing is written its defaults hold, not today's: {listed}"
                )
            )
        return lines


_TODAY: dict[str, KeyPath] = {}
for _key, _rule in RULES.items():
    if isinstance(_rule, To):
        _TODAY.setdefault(str(_rule.target[-1]), _key)


def _names(section: KeyPath) -> str:
    return ", ".join(SECTIONS[section])


def _unknown(key: KeyPath) -> str:
    section, name = key[:-1], str(key[-1])
    begin = f"unknown key '{name}' in {dotted(section)}"
    if hint := did_you_mean(name, SECTIONS[section]):
        return begin + hint
    if name in _TODAY:
        return f"{begin}; beside these keys it is called {dotted(_TODAY[name])}"
    elsewhere = [known for known in RULES if known[-1] == name]
    if elsewhere:
        return f"{begin}; it belongs to {' or '.join(map(dotted, elsewhere[:2]))}"
    return f"{begin}; known keys: {_names(section)}"
