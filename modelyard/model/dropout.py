"""Dropout that is the same in every layout: whether an input is left out depends on which one it is, not on a generator.

An input is known by its token's number in the run (`token_numbers`), the block, the matrix of the block and the feature.
These are hashed to 31 bits, and the input is left out where the bits, as a fraction, are less than p. So processes that share rows,
tokens, layers or features leave out what one process would; nothing is kept for the backward, which hashes again, as does a
block that is recomputed; and a run that goes on needs no state of a generator.

The hash is of multiplications and shifts, on 32-bit integers that wrap around: the same on a CPU, a GPU and compiled. Of a
token and block there are two words a and b, and of a feature of a matrix one word c (all from `_mixed`, the finalizer of a
hash, with Chris Wellons' constants); of an input the hash is the finalizer of (a ^ c) * b, cut short.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modelyard.config.adapter import MODULES
from modelyard.device import on_gpu
from modelyard.model.init import key

_BITS = 31
_PIECE, _PIECE_ON_GPU = 1 << 16, 1 << 24
"""Inputs that are hashed at a time: on a CPU as many as stay in its cache, on a GPU what it has memory for."""


def token_numbers(seed: int, first_row: int, rows: int, sequence_length: int) -> Tensor:
    """The number of each token of `rows` rows, int64 [rows, sequence].

    `first_row` counts the rows of the run's batches, one batch after the other. From row to row and token to token the
    numbers rise by one, from a beginning that the seed gives: another seed, other numbers.
    """
    begin = key(seed, "dropout") >> 1  # room for 2^62 tokens
    first = begin + first_row * sequence_length
    return (torch.arange(rows * sequence_length) + first).view(rows, sequence_length)


def token_words(numbers: Tensor, block: int) -> Tensor:
    """What decides for a block's tokens: int64 numbers [tokens] -> int32 [2, tokens], a and b of the hash."""
    low, high = numbers.to(torch.int32), (numbers >> 32).to(torch.int32)
    one, other = _constants("block", block)
    a = _mixed(_mixed(low ^ one) ^ high)
    b = _mixed(_mixed(high ^ other) ^ low)
    return torch.stack([a, b | 1])


def keep_mask(words: Tensor, matrix: str, first_feature: int, features: int, p: float) -> Tensor:
    """Which inputs of a matrix are kept, bool [tokens, features]: those from `first_feature` on, of `token_words`.

    `matrix` is its name in the block (`q_proj`), `p` the share that is left out.
    """
    return _hash(words, _feature_words(matrix, first_feature, features, words.device)) >= _threshold(p)


def dropped_product(x: Tensor, a: Tensor, words: Tensor, matrix: str, first_feature: int, p: float) -> Tensor:
    """x [tokens, features] with a share p of it left out, as `keep_mask` has it, and the rest divided by 1 - p; times the
    matrix a [out, features], transposed: [tokens, out].

    For the backward x itself is kept, which other matrices keep too, and not what is left of it for this one.
    """
    y: Tensor = _DroppedProduct.apply(x, a, words, matrix, first_feature, p)
    return y


class _DroppedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, words: Tensor, matrix: str, first_feature: int, p: float
    ) -> Tensor:
        ctx.save_for_backward(x, a, words)
        ctx.how = matrix, first_feature, p
        return F.linear(_drop(x, words, matrix, first_feature, p), a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, words = ctx.saved_tensors
        gradient = gradients[0]
        need_x, need_a = ctx.needs_input_grad[:2]
        return (
            _drop(torch.mm(gradient, a), words, *ctx.how) if need_x else None,
            torch.mm(gradient.t(), _drop(x, words, *ctx.how)) if need_a else None,
            *(None,) * 4,
        )


def _drop(x: Tensor, words: Tensor, matrix: str, first_feature: int, p: float) -> Tensor:
    scale, threshold = 1 / (1 - p), _threshold(p)
    if torch.compiler.is_compiling():  # which fuses all of it
        columns = _made_feature_words(matrix, first_feature, x.shape[1], x.device)
        return torch.where(_hash(words, columns) >= threshold, x * scale, 0.0)
    columns = _feature_words(matrix, first_feature, x.shape[1], x.device)
    out = torch.empty_like(x)
    tokens = max((_PIECE_ON_GPU if on_gpu(x) else _PIECE) // x.shape[1], 1)
    for begin in range(0, x.shape[0], tokens):
        piece = slice(begin, begin + tokens)
        torch.mul(x[piece], scale, out=out[piece])
        out[piece].masked_fill_(_hash_in_place(words[:, piece], columns) < threshold, 0.0)
    return out


def _threshold(p: float) -> int:
    return min(round(p * 2**_BITS), 2**_BITS - 1)


# --- the hash ---------------------------------------------------------------------------------------------------

_FIRST, _SECOND = 0x21F0AAAD, 0xD35A2D97 - 2**32
"""Odd numbers to multiply with, as int32 (Wellons' hash prospector)."""


def _hash(words: Tensor, columns: Tensor) -> Tensor:
    """int32 [2, tokens] and [features] -> int32 [tokens, features], from 0 to 2^31 - 1."""
    h = (words[0, :, None] ^ columns) * words[1, :, None]
    # Shifts bring the sign along: with them these steps lose one bit, and save a mask.
    h = (h ^ (h >> 16)) * _SECOND
    return h ^ (h >> 15)


def _hash_in_place(words: Tensor, columns: Tensor) -> Tensor:
    """`_hash` in the memory of two tensors."""
    h = torch.bitwise_xor(words[0, :, None], columns).mul_(words[1, :, None])
    shifted = h >> 16
    h.bitwise_xor_(shifted).mul_(_SECOND)
    return h.bitwise_xor_(torch.bitwise_right_shift(h, 15, out=shifted))


def _mixed(x: Tensor) -> Tensor:
    """Int32 to int32, one to one, each bit of the result from all of x."""
    x = (x ^ _shifted(x, 16)) * _FIRST
    x = (x ^ _shifted(x, 15)) * _SECOND
    return x ^ _shifted(x, 15)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, zeros from the left."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def _made_feature_words(matrix: str, first: int, features: int, device: torch.device) -> Tensor:
    """c of the hash of each feature, int32 [features]."""
    one, other = _MATRICES[matrix]
    index = torch.arange(first, first + features, dtype=torch.int32, device=device)
    return _mixed(_mixed(index ^ one) ^ other)


_feature_words = lru_cache(maxsize=256)(_made_feature_words)


@lru_cache(maxsize=4096)
def _constants(*what: str | int) -> tuple[int, int]:
    """Two int32 that belong to a block or a matrix."""
    number = key(0, "dropout", *what)
    return (number & 0xFFFFFFFF) - 2**31, ((number >> 31) & 0xFFFFFFFF) - 2**31


_MATRICES = {matrix: _constants("matrix", matrix) for matrix in MODULES}
