"""Copies of the same weights in several processes: which there are, and whether they still have the same bits.

Along `replicate` processes have copies of everything; along `tensor` of what each of them has whole (norms); the first and
the last stage of a pipeline of tied embeddings. Along `shard` and `context` each has its own part, and nothing can be compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from modelyard.config.layout import DIMENSIONS, Layout
from modelyard.parallel.apply import Parallel
from modelyard.parallel.data import ShardedWeights

Along = tuple[str, ...]
"""Dimensions of the mesh, in the order of `DIMENSIONS`."""

_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 20}
"""Words that are multiplied at a time: a CPU's cache holds them, a GPU has enough to do."""


def copied(parallel: Parallel, *, without: Along = ()) -> dict[Along, list[str]]:
    """The parameters that other processes have the same part of, by the dimensions along which those are, some left out."""
    found: dict[Along, list[str]] = {}
    if isinstance(parallel.weights, ShardedWeights):
        for name in parallel.weights.sharded:
            along = tuple(d for d in parallel.weights.copied_along(name) if d not in without)
            if along:
                found.setdefault(along, []).append(name)
    return found


@torch.no_grad()
def hashes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A number for the bits of each tensor, made where the tensor is; one message to the host. Bytes that do not make a whole
    word count as if zeros followed.

    It is the sum modulo 2^64 of the tensor's 32-bit words, each times an odd random multiplier of 64 bits of its own
    place; of a tensor of several chunks the sums are summed likewise. An odd multiplier has an inverse, so that a change of
    one word always shows. Any other (elements that change places, signs that flip in pairs) stays unseen with a chance of
    about 2^-32 (multilinear hashing, arXiv 1202.4961). Sums of integers have no order: they are the same on any number of
    threads.
    """
    if not tensors:
        return {}
    return dict(
        zip(tensors, torch.stack([_hash(tensor) for tensor in tensors.values()]).tolist(), strict=True)
    )


def _hash(tensor: Tensor) -> Tensor:
    words, level = _words(tensor), 0
    while True:
        # Those of another level are others: the i-th word of chunk j must not count as the j-th of chunk i.
        multipliers = _multipliers(level, words.device)
        sums = [(part * multipliers[: part.numel()]).sum() for part in words.split(multipliers.numel())]
        if len(sums) == 1:
            return sums[0]
        words, level = torch.stack(sums), level + 1


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as int32 [words]."""
    flat = tensor.reshape(-1)
    left = flat.nbytes % 4
    if left or flat.storage_offset() * flat.element_size() % 4:
        # What is frozen may be narrow (bf16), and a shard of it an odd number of values, or begin in the middle of a word.
        flat = torch.cat([flat.view(torch.uint8), flat.new_zeros((4 - left) % 4, dtype=torch.uint8)])
    return flat.view(torch.int32)


@lru_cache
def _multipliers(level: int, device: torch.device) -> Tensor:
    """int64 [chunk], the same in all processes."""
    generator = torch.Generator().manual_seed(level)
    drawn = torch.randint(-(2**63), 2**63 - 1, (_CHUNK[device.type],), generator=generator)
    return (drawn | 1).to(device)


def digest(value: object) -> str:
    """Sixteen letters for a value of numbers, strings and containers, by its `repr`."""
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


@lru_cache
def holders(layout: Layout, along: Along) -> list[list[int]]:
    """All ranks, those together that differ along these dimensions alone."""
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world):
        place, rest = [], rank
        for dimension, size in zip(reversed(DIMENSIONS), reversed(layout.sizes), strict=True):
            rest, number = divmod(rest, size)
            place.append(0 if dimension in along else number)
        found.setdefault(tuple(place), []).append(rank)
    return list(found.values())


def differing(layout: Layout, found: Sequence[Mapping[Along, str]]) -> dict[Along, list[dict[int, str]]]:
    """The groups of processes whose copies differ, each as {rank: digest of all it has a copy of}.

    `found` has by rank the digest of what the process has copies of, by the dimensions along which the others are.
    """
    groups: dict[Along, list[dict[int, str]]] = {}
    for along in sorted({along for digests in found for along in digests}):
        for ranks in holders(layout, along):
            values = {rank: found[rank][along] for rank in ranks if along in found[rank]}
            if len(set(values.values())) > 1:
                groups.setdefault(along, []).append(values)
    return groups


def odd_ones(groups: Iterable[Mapping[int, object]]) -> tuple[list[int], bool]:
    """The ranks at fault, from groups that should have had one value each, and whether that is sure.

    In a group of which more than half agree the others are at fault. Where none does (two copies) all of it may be,
    unless one that is at fault elsewhere is in it.
    """
    sure: set[int] = set()
    undecided: list[set[int]] = []
    for values in groups:
        value, votes = Counter(values.values()).most_common(1)[0]
        if 2 * votes > len(values):
            sure |= {rank for rank, other in values.items() if other != value}
        else:
            undecided.append(set(values))
    open_ones = [ranks for ranks in undecided if not ranks & sure]
    return sorted(sure.union(*open_ones)), not open_ones
