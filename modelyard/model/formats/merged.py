"""The weights of a model whose adapter was merged into it, computed a tensor at a time from the base's and the adapter's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelyard.config.adapter import Adapter, Quantization, block_matrices, is_adapter_parameter
from modelyard.config.architecture import Architecture
from modelyard.errors import UserError
from modelyard.model.adapter import SHORTEST
from modelyard.model.formats.source import FiniteWeights, WeightSource
from modelyard.model.nf4 import dequantize, quantize


class MergedWeights:
    """W + scale * B A for every adapted matrix W, and everything else as the base has it.

    Of DoRA each row is then given the length `lora_magnitude` (arXiv 2402.09353, equation 5). Computed in fp32, or fp64 where
    the base is, whatever the types of the adapter; in memory are one matrix and its update.
    """

    def __init__(self, base: WeightSource, adapter_weights: WeightSource, adapter: Adapter):
        self.base, self.update, self.adapter = base, adapter_weights, adapter
        self._matrices = {
            f"{name.removesuffix('.lora_A')}.weight": name.removesuffix(".lora_A")
            for name in adapter_weights.names()
            if name.endswith(".lora_A")
        }
        """Name of an adapted matrix's weight → of the matrix."""

    def names(self) -> Sequence[str]:
        # One source may have both, where a base is trained with its adapter.
        return [name for name in self.base.names() if not is_adapter_parameter(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        own = self.base.dtype(name)
        return torch.promote_types(own, torch.float32) if name in self._matrices else own

    def load(self, name: str) -> Tensor:
        """One parameter, full, on the CPU. Raises UserError where the adapter's has NaN or infinite values."""
        weight = self.base.load(name)
        if name not in self._matrices:
            return weight
        matrix, dtype = self._matrices[name], self.dtype(name)
        a, b = self._loaded(f"{matrix}.lora_A", dtype), self._loaded(f"{matrix}.lora_B", dtype)
        merged = torch.addmm(weight.to(dtype), b, a, alpha=self.adapter.scale)
        if self.adapter.dora:
            lengths = torch.linalg.vector_norm(merged, dim=1).clamp_min_(SHORTEST)
            merged.mul_((self._loaded(f"{matrix}.lora_magnitude", dtype) / lengths).unsqueeze(1))
        return merged

    def _loaded(self, name: str, dtype: torch.dtype) -> Tensor:
        return FiniteWeights(self.update, "the adapter's ").load(name).to(dtype)


class DequantizedWeights:
    """A base as it was while a quantised adapter was trained: the matrices of the blocks quantised, and made numbers again."""

    def __init__(self, base: WeightSource, how: Quantization, architecture: Architecture):
        self.base, self.how = base, how
        self._quantized = {f"{matrix}.weight" for matrix in block_matrices(architecture)}

    def names(self) -> Sequence[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        own = self.base.dtype(name)
        return torch.promote_types(own, torch.float32) if name in self._quantized else own

    def load(self, name: str) -> Tensor:
        """One parameter, full, on the CPU. Raises UserError where it cannot be quantised."""
        weight = self.base.load(name)
        if name not in self._quantized:
            return weight
        try:
            packed = quantize(weight.to(self.dtype(name)), self.how.block, self.how.double)
        except ValueError as error:
            raise UserError(f"'{name}' cannot be quantised: {error}") from None
        return dequantize(packed, self.dtype(name))


class TypedWeights:
    """Weights that say to be of the types that another source has for the same names; what writes them rounds them so."""

    def __init__(self, source: WeightSource, like: WeightSource):
        self._source, self._like = source, like

    def names(self) -> Sequence[str]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._like.dtype(name)

    def load(self, name: str) -> Tensor:
        return self._source.load(name).to(self.dtype(name))
