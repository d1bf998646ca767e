"""The base of every YAML section, and the few value types that several sections share."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """One YAML section: unknown keys refused, types strict, frozen.

    Every field carries a description that ends in its unit where it has one, and a default unless required.
    Two kinds of value are taken as people write them: a whole number in any notation where an integer is meant
    (`1e5`), and text where a path is meant.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: _as_meant(value, cls.model_fields.get(name)) for name, value in values.items()}


def _as_meant(value: Any, field: FieldInfo | None) -> Any:
    if field is None or not isinstance(value, float | str):
        return value
    allowed = _alternatives(field.annotation)
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**63
    if whole and int in allowed and float not in allowed:
        return int(value)
    if isinstance(value, str) and value and Path in allowed and str not in allowed:
        return Path(value).expanduser()
    return value


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The plain types that a field's annotation allows: `int | None` gives `(int, NoneType)`."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(plain for part in get_args(annotation) for plain in _alternatives(part))
    return (annotation,)


DataTypeName = Literal[
    "float32", "fp32", "float64", "fp64", "bfloat16", "bf16", "float16", "fp16", "float", "half"
]
_DATA_TYPES = {
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
}

DataType = Annotated[DataTypeName, AfterValidator(lambda name: _DATA_TYPES.get(name, name))]
"""A floating-point type by any of its names; read back as torch's (`float32`, `float64`, `bfloat16`, `float16`)."""
