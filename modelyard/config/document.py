"""A configuration before it is understood: plain values, each with the place where it was written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """`("data", "datasets", 0)` as people write it: `data.datasets.0`."""
    return ".".join(str(part) for part in path)


class Document:
    """Nested dictionaries and lists, and for every path below the top its origin (`FILE:LINE` or `override N`)."""

    def __init__(self, values: dict[str, Any], origins: dict[KeyPath, str], name: str):
        self.values = values
        self.origins = origins
        self.name = name

    def has(self, path: KeyPath) -> bool:
        """Whether something, null included, is written at `path`."""
        return self._find(path) is not _NOTHING

    def get(self, path: KeyPath, default: Any = None) -> Any:
        """The value at `path`."""
        value = self._find(path)
        return default if value is _NOTHING else value

    def origin(self, path: KeyPath) -> str:
        """Where `path`, or else the nearest section around it, was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.name

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        """Write `value` at `path`, making the sections above it; everything in it gets `origin`."""
        target: Any = self.values
        for length, part in enumerate(path[:-1], start=1):
            if not isinstance(target.get(part), dict):
                target[part] = {}
                self.origins.setdefault(path[:length], origin)
            target = target[part]
        self._forget(path)
        target[path[-1]] = value
        for below in _paths(value):
            self.origins[path + below] = origin

    def take(self, path: KeyPath) -> tuple[Any, dict[KeyPath, str]]:
        """Remove what is at `path`; return it with the origins of everything in it, relative to `path`."""
        value = self._find(path)
        del self._find(path[:-1])[path[-1]]
        origins = {
            key[len(path) :]: origin for key, origin in self.origins.items() if key[: len(path)] == path
        }
        self._forget(path)
        return value, origins

    def discard(self, path: KeyPath) -> None:
        """Remove what is at `path`, if anything."""
        if self.has(path):
            self.take(path)

    def move(self, old: KeyPath, new: KeyPath) -> None:
        """Move what is at `old` to `new`, origins and all; sections left empty on the way disappear."""
        value, origins = self.take(old)
        self.put(new, value, origins.get((), self.name))
        self.origins.update({new + below: origin for below, origin in origins.items()})
        self.prune(old[:-1])

    def prune(self, path: KeyPath) -> None:
        """Remove the section at `path` and those around it as long as they are empty."""
        while path and self._find(path) == {}:
            self.take(path)
            path = path[:-1]

    def merge(self, later: Document) -> None:
        """Write `later` over this one, key by key.

        Lists are replaced whole (an override may name an item by its number), and so is a dataset whose type changes.
        """
        self._merge(self.values, later.values, (), (), later)

    def _merge(
        self, target: Any, source: dict[str, Any], here: KeyPath, there: KeyPath, later: Document
    ) -> None:
        for name, value in source.items():
            key: Any = int(name) if isinstance(target, list) else name
            ours, theirs = (*here, key), (*there, name)
            old = target[key] if isinstance(target, list) else target.get(key)
            if isinstance(value, dict) and _mergeable(ours, old, value):
                if theirs in later.origins:
                    self.origins[ours] = later.origins[theirs]
                self._merge(old, value, ours, theirs, later)
                continue
            self._forget(ours)
            target[key] = deepcopy(value)
            for below in _paths(value):
                if theirs + below in later.origins:
                    self.origins[ours + below] = later.origins[theirs + below]

    def _find(self, path: KeyPath) -> Any:
        value: Any = self.values
        for part in path:
            inside_list = isinstance(value, list) and isinstance(part, int) and part < len(value)
            if not inside_list and not (isinstance(value, dict) and part in value):
                return _NOTHING
            value = value[part]
        return value

    def _forget(self, path: KeyPath) -> None:
        for key in [key for key in self.origins if key[: len(path)] == path]:
            del self.origins[key]


_NOTHING = object()


def _mergeable(path: KeyPath, old: Any, new: dict[str, Any]) -> bool:
    """Whether `new` is written into what is there, not in its place."""
    if isinstance(old, list):
        return bool(new) and all(name.isdecimal() and int(name) < len(old) for name in new)
    # Else keys of one dataset type would stay behind in another's section.
    in_datasets = path[:2] == ("data", "datasets")
    if path == ("training", "evaluators") and not new:
        return False  # `{}` is what switches them off
    return isinstance(old, dict) and not (
        in_datasets and "type" in new and old.get("type", new["type"]) != new["type"]
    )


def _paths(value: Any) -> Iterator[KeyPath]:
    yield ()
    if isinstance(value, dict | list):
        entries: Iterable[tuple[str | int, Any]] = (
            value.items() if isinstance(value, dict) else enumerate(value)
        )
        for key, below in entries:
            for path in _paths(below):
                yield (key, *path)
