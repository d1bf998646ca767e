"""The base of every YAML section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One YAML section: unknown keys refused, types strict (an int is accepted where a float is meant), frozen.

    Every field carries a description that ends in its unit where it has one, and a default unless required.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, use_attribute_docstrings=True)
