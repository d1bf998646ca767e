"""Adapters on disk as models to compute with: base and adapter side by side, as in training.

Merged, W + scale * B A would be rounded to the type that is computed in, and a small update lost in it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from modelyard.config.adapter import Adapter, Quantization, block_matrices
from modelyard.config.architecture import Architecture
from modelyard.errors import UserError
from modelyard.model.adapter import AdaptedWeights
from modelyard.model.formats import fit_problems
from modelyard.model.formats.source import FiniteWeights
from modelyard.parallel.cuts import BY_COLUMNS
from modelyard.train.models_on_disk import OpenModel

_WIDEST = 8
"""Bytes of the widest number that parts of a quantized matrix may be held in."""


def adapted_weights(
    model: OpenModel, *, dtype: torch.dtype, device: torch.device, tensor_parallel: int = 1
) -> tuple[Adapter, AdaptedWeights]:
    """The adapter of a model that has one, nothing of it left out or trained, and what fills an adapted decoder of `dtype`.

    The base is quantized as it was in training. Where its parts cannot be shared by so many processes it is quantized
    and made numbers again: the same values in more memory. Raises UserError where the base is of another shape.
    """
    adapted, architecture = model.adapted, model.architecture
    assert adapted is not None
    if problems := fit_problems(adapted.base, architecture, adapted.base_path or model.folder):
        raise UserError(*problems)
    adapter, base = replace(adapted.adapter, dropout=0.0, freeze_others=True), adapted.base
    if adapter.quantization is not None and not _is_shared(
        adapter.quantization, architecture, tensor_parallel
    ):
        adapter, base = replace(adapter, quantization=None), adapted.trained_on
    first = FiniteWeights(adapted.weights, "the adapter's ")
    # Nothing is drawn: all of the adapter is there.
    return adapter, AdaptedWeights(base, adapter, seed=0, dtype=dtype, device=device, first=first)


def _is_shared(how: Quantization, architecture: Architecture, tensor_parallel: int) -> bool:
    """Whether each process's part of every matrix has whole blocks, and bytes that make whole numbers of any type."""
    for name, (_, width) in block_matrices(architecture).items():
        own = width // tensor_parallel if name.endswith(BY_COLUMNS) else width
        if own % how.block or own // 2 % _WIDEST or (how.double and own // how.block % _WIDEST):
            return False
    return True
