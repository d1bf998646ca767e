"""Low-rank adapters (LoRA, DoRA) on the matrices of the blocks, over a base that may be kept in 4 bits (QLoRA).

`adapt` turns the linear layers of a decoder on the meta device into `AdaptedLinear`; layouts split what that registers as
they split any parameter. `AdaptedWeights` is what such a decoder is filled from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modelyard.config.adapter import MODULES, Adapter, Quantization, is_adapter_parameter
from modelyard.dtypes import wide
from modelyard.errors import UserError
from modelyard.model.decoder import Block, Decoder, local
from modelyard.model.dropout import dropped_product
from modelyard.model.init import key
from modelyard.model.nf4 import Quantized, dequantize, frozen_product, quantize

if TYPE_CHECKING:
    from modelyard.model.formats.source import WeightSource

QUANTIZED = ("weight_codes", "weight_scales", "weight_range")
"""What stands in the place of `weight` where a matrix is quantized, by the names of `Quantized`'s fields."""


SHORTEST = 1e-30
"""A row of W + scale * B A that is shorter counts as so long."""


class AdaptedLinear(nn.Linear):
    """A matrix W of a block with W x + scale * B (A x) for its product, or without A and B where it has no adapter.

    With DoRA each row of W + scale * B A is brought to the length that `lora_magnitude` says; the length that it has by
    itself counts as a constant in the backward, as in the paper (section 4.3). Where the base is quantized, `weight` is
    None and `weight_codes` and its like are there.
    """

    adapter: Adapter
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude: nn.Parameter | None
    is_on: bool
    """Whether the adapter takes part; without it this is the base."""
    kind: str
    """Which matrix of a block this is: `q_proj`."""
    fixed_lengths: Tensor | None = None
    """What `_lengths` gives, where it was found once because nothing is trained (`fix_lengths`)."""
    words: Tensor | None = None
    """In a forward that leaves some of the adapter's inputs out: what `modelyard.model.dropout.token_words` gives."""

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]."""
        return self.product(x, None if self.bias is None else local(self.bias))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in] -> [tokens, out], the bias added where one is given."""
        if self.lora_A is None or self.lora_B is None or not self.is_on:
            return self._base(x, bias)
        a, b, scale = local(self.lora_A), local(self.lora_B), self.adapter.scale
        if self.lora_magnitude is not None:
            # A row of zeros has no direction, and its magnitude is 0: it stays one.
            lengths = self._lengths() if self.fixed_lengths is None else self.fixed_lengths
            factor = (local(self.lora_magnitude) / lengths).to(x.dtype)
            y = self._low_rank(x, None, a, b, scale) * factor
            return y if bias is None else y + bias
        return self._low_rank(x, bias, a, b, scale)

    def summed_squares(self, squares: Tensor) -> Tensor:
        """Squared lengths of what is here of each row -> of the whole rows; a layout that cuts rows has its own."""
        return squares

    def first_feature(self, features: int) -> int:
        """Which of the matrix's inputs is the first of the `features` that are here; likewise."""
        return 0

    def _base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.weight is not None:
            return F.linear(x, local(self.weight), bias)
        y = frozen_product(x, self.quantized())
        return y if bias is None else y + bias

    def _low_rank(self, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        if self.words is not None:
            first = self.first_feature(x.shape[1])
            low = dropped_product(x, a, self.words, self.kind, first, self.adapter.dropout)
            return torch.addmm(self._base(x, bias), low, b.t(), alpha=scale)
        if torch.compiler.is_compiling():
            return torch.addmm(self._base(x, bias), F.linear(x, a), b.t(), alpha=scale)
        base = self.quantized() if self.weight is None else (local(self.weight),)
        y: Tensor = _LowRank.apply(x, bias, a, b, scale, *base)
        return y

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """The length of each row of W + scale * B A, [out], in fp32 or wider; at least `SHORTEST`."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        a, b = local(self.lora_A), local(self.lora_B)
        dtype = wide(a.dtype)
        matrix = self.matrix(dtype)
        squares = torch.addmm(matrix, b.to(dtype), a.to(dtype), alpha=self.adapter.scale).square_().sum(1)
        return self.summed_squares(squares).sqrt_().clamp_min_(SHORTEST)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """What is here of W, as it is computed with, [out, in]."""
        return (
            local(self.weight).to(dtype) if self.weight is not None else dequantize(self.quantized(), dtype)
        )

    def quantized(self) -> Quantized:
        """What is here of the quantized W."""
        parts = [getattr(self, name) for name in QUANTIZED]
        return _unpacked([None if part is None else local(part) for part in parts])


class _LowRank(torch.autograd.Function):
    """x W^T + bias + scale * (x A^T) B^T. Of the backward's two summands for x the small one is added in place.

    `base` is W, or the parts of a quantized one, which is made a matrix again for each of the two directions.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, *base: Tensor | None
    ) -> Tensor:
        low = F.linear(x, a)
        ctx.save_for_backward(x, a, b, low, *base)
        ctx.scale = scale
        return F.linear(x, _matrix(base, x.dtype), bias).addmm_(low, b.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low, *base = ctx.saved_tensors
        gradient = gradients[0]
        need_x, need_bias, need_a, need_b, _, need_weight, *others = ctx.needs_input_grad
        low_gradient = torch.mm(gradient, b).mul_(ctx.scale)
        x_gradient = None
        if need_x:
            x_gradient = torch.mm(gradient, _matrix(base, x.dtype)).addmm_(low_gradient, a)
        return (
            x_gradient,
            gradient.sum(0) if need_bias else None,
            torch.mm(low_gradient.t(), x) if need_a else None,
            # Transposed: a few long rows are faster than many short ones.
            torch.mm(low.t(), gradient).mul_(ctx.scale).t() if need_b else None,
            None,
            torch.mm(gradient.t(), x) if need_weight else None,
            *(None for _ in others),
        )


def _matrix(base: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    weight = base[0] if len(base) == 1 else dequantize(Quantized(*base), dtype)  # type: ignore[arg-type]
    assert weight is not None
    return weight


# --- building ---------------------------------------------------------------------------------------------------


def adapt(model: Decoder, adapter: Adapter, dtype: torch.dtype) -> None:
    """Turn the linear layers of a decoder on the meta device, still whole, into `AdaptedLinear`.

    `dtype` is what is computed in: quantized matrices are bytes, held as numbers of this type, so that whatever moves
    parameters moves them as they are and nothing casts them.
    """
    for name, module in model.layers.named_modules():
        kind = name.rpartition(".")[2]
        if kind not in MODULES:
            continue
        assert isinstance(module, nn.Linear)
        module.__class__ = AdaptedLinear
        assert isinstance(module, AdaptedLinear)
        module.adapter, module.is_on, module.kind = adapter, True, kind
        if adapter.quantization is not None:
            module.weight = None  # type: ignore[assignment]
            shape = (module.out_features, module.in_features)
            for part, packed in zip(
                QUANTIZED, _packed_shapes(shape, adapter.quantization, dtype), strict=True
            ):
                value = None if packed is None else _frozen(torch.empty(packed, dtype=dtype, device="meta"))
                module.register_parameter(part, value)
        adapted = kind in adapter.modules
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (adapter.rank, module.in_features),
            "lora_B": (module.out_features, adapter.rank),
        }
        if adapter.dora:
            shapes["lora_magnitude"] = (module.out_features,)
        for part in ("lora_A", "lora_B", "lora_magnitude"):
            value = (
                nn.Parameter(torch.empty(shapes[part], device="meta")) if adapted and part in shapes else None
            )
            module.register_parameter(part, value)
    if adapter.dropout:
        for block in model.layers.values():
            assert isinstance(block, Block)
            layers = [module for module in block.modules() if isinstance(module, AdaptedLinear)]
            block.with_dropout = [layer for layer in layers if layer.lora_A is not None]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within, `model` computes what its base computes: the reference of preference tuning, without a second model."""
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear) and module.is_on]
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def fix_lengths(model: nn.Module) -> None:
    """Find the lengths of DoRA's rows once, for a model that is not trained: they take as long as many tokens' products."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and module.lora_magnitude is not None:
            module.fixed_lengths = module._lengths()


def is_quantized_part(name: str) -> bool:
    """Whether a parameter's name is that of a quantized matrix's bytes."""
    return name.rpartition(".")[2] in QUANTIZED


# --- quantized matrices as parameters ---------------------------------------------------------------------------


def _packed(quantized: Quantized, dtype: torch.dtype) -> list[Tensor | None]:
    """The parts, their bytes as numbers of `dtype`."""
    return [part if part is None or part.dtype == dtype else part.view(dtype) for part in quantized]


def _unpacked(parts: Sequence[Tensor | None]) -> Quantized:
    """The inverse of `_packed`."""
    codes, scales, span = parts
    assert codes is not None
    assert scales is not None
    codes = codes.view(torch.uint8)
    if span is None:
        return Quantized(codes, _real(scales))
    return Quantized(codes, scales.view(torch.uint8), _real(span))


def _real(held: Tensor) -> Tensor:
    return held if held.dtype == torch.float64 else held.view(torch.float32)


def _packed_shapes(
    shape: tuple[int, int], how: Quantization, dtype: torch.dtype
) -> list[tuple[int, int] | None]:
    """What `_packed` gives for a matrix [out, in]."""
    rows, columns = shape
    width, scales = dtype.itemsize, columns // how.block
    if how.double:
        return [(rows, columns // 2 // width), (rows, scales // width), (rows, max(8 // width, 2))]
    return [(rows, columns // 2 // width), (rows, scales * max(4 // width, 1)), None]


# --- values -----------------------------------------------------------------------------------------------------


class AdaptedWeights:
    """What fills an adapted decoder: the base's weights, quantized where the adapter says so, and the adapter's.

    A new adapter begins as PEFT's: A uniform within in^-0.5 of 0, drawn by (seed, name) on the CPU, B zero, magnitudes the
    lengths of the base's rows. `first` has one that was trained before.
    """

    def __init__(
        self,
        base: WeightSource,
        adapter: Adapter,
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        first: WeightSource | None = None,
    ):
        self._base, self._adapter, self._first = base, adapter, first
        self._seed, self._dtype, self._device = seed, dtype, device
        self._last: tuple[str, Quantized] | None = None

    def load(self, name: str, shape: Sequence[int]) -> Tensor:
        """The full tensor of the parameter `name`, of this shape."""
        matrix, _, part = name.rpartition(".")
        if is_adapter_parameter(name):
            return self._first.load(name) if self._first is not None else self._new(matrix, part, shape)
        if part not in QUANTIZED:
            return self._base.load(name)
        packed = _packed(self._quantized(matrix), self._dtype)[QUANTIZED.index(part)]
        assert packed is not None
        return packed

    def fill(self, model: Decoder, write: Any) -> None:
        """Give every parameter its value; `write` as `load_weights` takes it."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                write(parameter, self.load(name, tuple(parameter.shape)))

    def _new(self, matrix: str, part: str, shape: Sequence[int]) -> Tensor:
        if part == "lora_B":
            return torch.zeros(*shape)
        if part == "lora_A":
            generator = torch.Generator().manual_seed(key(self._seed, "init", f"{matrix}.{part}"))
            bound = shape[1] ** -0.5
            return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
        if self._adapter.quantization is not None:
            weight = dequantize(self._quantized(matrix), wide(self._dtype))
        else:
            # As it is computed with.
            weight = self._base.load(f"{matrix}.weight").to(self._dtype).to(wide(self._dtype))
        return torch.linalg.vector_norm(weight, dim=1)

    def _quantized(self, matrix: str) -> Quantized:
        how = self._adapter.quantization
        assert how is not None
        if self._last is None or self._last[0] != matrix:
            self._last = None
            weight = self._base.load(f"{matrix}.weight").to(self._device, wide(self._dtype))
            try:
                self._last = matrix, quantize(weight, how.block, how.double)
            except ValueError as error:
                raise UserError(f"the base's '{matrix}.weight' cannot be quantized: {error}") from None
        return self._last[1]
