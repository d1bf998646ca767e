"""Which columns of a record are wanted, for texts and for conversations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, get_args

from modelyard.config.prepare import ConversationColumn

KNOWN = frozenset(get_args(ConversationColumn))


_OPTIONAL = ("tools", "system", "input")


class Fields(NamedTuple):
    """The columns of a dataset section."""

    text: str
    spans: str | None
    columns: tuple[str, ...]
    """Others, which are kept as text beside the tokens."""
    renamed: Mapping[str, str] | None = None
    """Of conversations: known name → name in the data; None: the records are texts."""

    @property
    def is_conversation(self) -> bool:
        return self.renamed is not None

    def required(self) -> list[str]:
        """Columns that every record must have."""
        if self.renamed is not None:
            return [*self.renamed.values(), *self.columns]
        return [self.text, *([self.spans] if self.spans else []), *self.columns]

    def named(self) -> list[str]:
        """Of conversations: columns that the config names and that each record must have; tools and system messages may be
        missing."""
        theirs = [own for name, own in (self.renamed or {}).items() if name not in _OPTIONAL]
        return [*theirs, *self.columns]

    def among(self, available: Collection[str]) -> list[str]:
        """Those to read of a table that has `available`."""
        if self.renamed is None:
            return self.required()
        known = [name for name in available if name in KNOWN]
        return list(dict.fromkeys([*self.required(), *known]))

    def as_known(self, values: dict[str, Any]) -> dict[str, Any]:
        """A conversation's values under the known names; one that the data calls otherwise hides its namesake."""
        renamed = self.renamed or {}
        theirs = {name: values[own] for name, own in renamed.items() if own in values}
        return {name: value for name, value in values.items() if name not in renamed.values()} | theirs


def without_filled_in(value: Any) -> Any:
    """Messages as a table gives them, without the keys that it has filled in with nulls. What tools and calls are made of
    cannot be mended so, because there a null may mean something: tables of that kind are refused before."""
    if isinstance(value, list):
        return [without_filled_in(entry) for entry in value]
    if isinstance(value, dict):
        return {name: without_filled_in(entry) for name, entry in value.items() if entry is not None}
    return value
