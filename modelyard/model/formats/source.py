"""Where weights come from, whatever holds them: a Hugging Face folder, a checkpoint, a running model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from modelyard.config.adapter import Adapter
from modelyard.config.architecture import Architecture
from modelyard.errors import UserError
from modelyard.model.adapter import AdaptedWeights, adapt, fix_lengths
from modelyard.model.decoder import Decoder

_NAMES_SHOWN = 8


class WeightSource(Protocol):
    """Tensors by logical name (`Architecture.parameter_shapes`), each loaded when asked for."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def load(self, name: str) -> Tensor: ...


class FiniteWeights:
    """Weights that are refused where they have NaN or infinite values; `whose` begins what is said of it."""

    def __init__(self, source: WeightSource, whose: str = ""):
        self._source, self._whose = source, whose

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def load(self, name: str) -> Tensor:
        tensor = self._source.load(name)
        if wrong := int((~tensor.isfinite()).sum()):
            raise UserError(
                f"{self._whose}'{name}' has {wrong:,} of {tensor.numel():,} values that are NaN or infinite"
            )
        return tensor


def fit_problems(source: WeightSource, architecture: Architecture, where: Path | str) -> list[str]:
    """How the weights differ from what the architecture wants: names missing, without a place, of another shape."""
    return shape_problems(source, architecture.parameter_shapes(), where)


def shape_problems(
    source: WeightSource, wanted: Mapping[str, tuple[int, ...]], where: Path | str
) -> list[str]:
    """The same for any names and shapes that are wanted."""
    available = set(source.names())
    missing = [name for name in wanted if name not in available]
    extra = sorted(available - wanted.keys())
    wrong = [
        f"{where}: '{name}' has shape {list(source.shape(name))}, the architecture wants {list(shape)}"
        for name, shape in wanted.items()
        if name in available and tuple(source.shape(name)) != shape
    ]
    problems = []
    if missing:
        problems.append(f"{where} lacks {_list(missing)}")
    if extra:
        problems.append(f"{where} has weights that the architecture has no place for: {_list(extra)}")
    if len(wrong) > _NAMES_SHOWN:
        wrong = [*wrong[:_NAMES_SHOWN], f"{where}: {len(wrong) - _NAMES_SHOWN} more of another shape"]
    return problems + wrong


def _list(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(f"'{name}'" for name in names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def load_weights(
    model: Decoder,
    source: WeightSource,
    where: Path | str,
    *,
    write: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Copy every parameter into the model, cast to its dtype. Raises UserError where the weights do not fit.

    `write` puts a full tensor into a parameter, of which a process may hold a part.
    """
    if problems := fit_problems(source, model.architecture, where):
        raise UserError(*problems)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            write(parameter, source.load(name))


def load_decoder(
    source: WeightSource,
    architecture: Architecture,
    *,
    where: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder with these weights, in `dtype` or that of the weights. Raises UserError where they do not fit."""
    if problems := fit_problems(source, architecture, where):
        raise UserError(*problems)
    with torch.device("meta"):
        model = Decoder(architecture)
    model.to(dtype or source.dtype("embed_tokens.weight")).to_empty(device=device)
    load_weights(model, source, where)
    return model


def load_adapted(
    weights: AdaptedWeights,
    adapter: Adapter,
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder in `dtype`, that of `weights`, with the adapter beside its matrices: nothing is merged, and a quantized base
    stays so. Not for training: the lengths of DoRA's rows are fixed."""
    with torch.device("meta"):
        model = Decoder(architecture)
        adapt(model, adapter, dtype)
    model.to(dtype).to_empty(device=device)
    weights.fill(model, Tensor.copy_)
    fix_lengths(model)
    return model
