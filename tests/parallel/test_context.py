"""Context parallelism: who has which tokens, whom their queries see, and the same run as one process."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch
from torch import Tensor

from modelyard.config.layout import Layout
from modelyard.data.batch import Batch
from modelyard.model.attention import attend, flatten_boundaries
from modelyard.model.decoder import Decoder
from modelyard.model.init import InitStd, initialize
from modelyard.parallel.context import apply_context, find_parts, split, whole_rows
from modelyard.parallel.mesh import Mesh
from tests.parallel.matrix import TINY, Case, global_batch, hold
from tests.parallel.processes import run_distributed

CPU = torch.device("cpu")


def boundaries(*rows: list[int]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (width - len(row)) for row in rows], dtype=torch.int32)


# --- who has which tokens ---------------------------------------------------------------------------------------


def _split_by_hand() -> None:
    mesh = Mesh(Layout(context=2), CPU)
    tokens = torch.arange(8).repeat(2, 1) + torch.tensor([[10], [20]])
    cu_seqlens = boundaries([0, 3, 8], [0, 8])
    cut = split(Batch(tokens, tokens + 100, tokens + 200, cu_seqlens, tokens + 1, tokens + 300), mesh)
    expected = {
        0: [[10, 11, 16, 17], [20, 21, 26, 27]],  # chunks 0 and 3
        1: [[12, 13, 14, 15], [22, 23, 24, 25]],  # chunks 1 and 2
    }[mesh.place("context")]
    assert cut.input_ids.tolist() == expected
    assert (cut.labels - 100).tolist() == expected
    assert (cut.positions - 200).tolist() == expected
    assert cut.kinds is not None
    assert cut.numbers is not None
    assert (cut.kinds - 1).tolist() == (cut.numbers - 300).tolist() == expected
    assert cut.cu_seqlens is cu_seqlens
    with pytest.raises(ValueError, match="a row of 6 tokens cannot be cut into 2 x 2 equal chunks"):
        split(Batch(tokens[:, :6], tokens[:, :6], tokens[:, :6], cu_seqlens), mesh)


def test_rows_are_cut_by_hand() -> None:
    run_distributed(_split_by_hand, 2)


@pytest.mark.parametrize(("size", "place", "chunks"), [(4, 0, [0, 7]), (4, 1, [1, 6]), (4, 3, [3, 4])])
def test_a_process_of_four_has_an_early_and_a_late_chunk(size: int, place: int, chunks: list[int]) -> None:
    parts = find_parts(boundaries([0, 8]), 8, place, size)  # chunks of one token
    assert parts.queries.cu_seqlens.tolist() == [0, 1, 2]
    # Each query sees itself and all before it.
    assert parts.keys.cu_seqlens.tolist() == [0, chunks[0] + 1, chunks[0] + 1 + chunks[1] + 1]


def test_segments_by_hand() -> None:
    # Two rows of 8 in chunks of 2 tokens. The second process has tokens 2-3 and 4-5 of each row.
    parts = find_parts(boundaries([0, 3, 8], [0, 4, 5, 8]), 8, 1, 2)
    # Row 0: token 2 (of document 0-3), token 3 (of 3-8), tokens 4-5 (of 3-8).
    # Row 1: tokens 2-3 (of 0-4), token 4 (a document of its own), token 5 (the first of 5-8).
    assert parts.queries.cu_seqlens.tolist() == [0, 1, 2, 4, 6, 7, 8]
    assert parts.queries.longest == 2
    assert parts.keys.cu_seqlens.tolist() == [0, 3, 4, 7, 11, 12, 13]
    assert parts.keys.longest == 4
    # Where each process's tokens lie once gathered: row 0 of the first, row 1 of the first, row 0 of the second, ...
    where = {(0, t): n for n, t in enumerate([0, 1, 6, 7])} | {
        (1, t): 4 + n for n, t in enumerate([0, 1, 6, 7])
    }
    where |= {(0, t): 8 + n for n, t in enumerate([2, 3, 4, 5])}
    where |= {(1, t): 12 + n for n, t in enumerate([2, 3, 4, 5])}
    keys = [(0, t) for t in (0, 1, 2, 3, 3, 4, 5)] + [(1, t) for t in (0, 1, 2, 3, 4, 5)]
    assert parts.index.tolist() == [where[key] for key in keys]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="must run from 0 to 8"):
        find_parts(boundaries([0, 3, 7]), 8, 0, 2)
    with pytest.raises(ValueError, match="cannot be cut"):
        find_parts(boundaries([0, 10]), 10, 0, 2)


# --- attention --------------------------------------------------------------------------------------------------


def _random_documents(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Each row in documents of 1 token to the whole row."""
    found = []
    for _ in range(rows):
        documents = int(torch.randint(0, 6, (1,), generator=generator))
        inside = torch.randperm(length - 1, generator=generator)[:documents] + 1
        found.append([0, *sorted(inside.tolist()), length])
    return boundaries(*found)


BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def _attention_against_dense(size: int) -> None:
    mesh = Mesh(Layout(context=size), CPU)
    with torch.device("meta"):
        model = Decoder(TINY)
    apply_context(model, mesh)

    def own(t: Tensor) -> Tensor:
        return split(Batch(t, t, t, t), mesh).input_ids.flatten(0, 1)

    for seed, (dtype, bound) in product(range(8), BOUNDS.items()):
        generator = torch.Generator().manual_seed(seed)
        rows, length, heads, groups = seed % 3 + 1, 16, 4, (4, 2, 1)[seed % 3]
        window = (None, 1, 5, None)[seed % 4]
        cu_seqlens = (
            boundaries(*[[0, length]] * rows) if seed == 7 else _random_documents(rows, length, generator)
        )
        whole = [
            torch.randn(rows, length, n, 8, generator=generator, dtype=torch.float64).to(dtype)
            for n in (heads, groups, groups, heads)
        ]

        q, k, v = (t.double().flatten(0, 1).requires_grad_() for t in whole[:3])
        cu, longest = flatten_boundaries(cu_seqlens, length, CPU)
        expected = attend(q, k, v, cu, cu, longest, longest, window=window, backend="dense")
        wanted = torch.autograd.grad(expected, (q, k, v), whole[3].double().flatten(0, 1))

        inputs = [own(t).requires_grad_() for t in whole[:3]]
        out = model.boundaries(cu_seqlens, length // size, CPU)(*inputs, window=window)
        gradients = torch.autograd.grad(out, inputs, own(whole[3]))
        assert out.dtype == dtype
        for name, ours, reference in zip("oqkv", (out, *gradients), (expected, *wanted), strict=True):
            torch.testing.assert_close(
                ours.double(),
                own(reference.unflatten(0, (rows, length))),
                atol=bound,
                rtol=bound,
                msg=lambda text: f"seed {seed}, {dtype}, {name}: {text}",  # noqa: B023
            )


@pytest.mark.parametrize("size", [2, 4])
def test_attention_equals_the_dense_one_of_one_process(size: int) -> None:
    run_distributed(_attention_against_dense, size, size)


def _whole_rows_and_split_ones() -> None:
    mesh = Mesh(Layout(context=2), CPU)
    model = Decoder(TINY)
    initialize(model, 1, InitStd.for_architecture(TINY))
    model.double()
    batch = global_batch(Case(mesh.layout), 0)
    own = split(batch, mesh)
    with torch.no_grad():
        expected = model(batch.input_ids, batch.positions, batch.cu_seqlens)
        apply_context(model, mesh)
        with whole_rows(model):
            inside = model(batch.input_ids, batch.positions, batch.cu_seqlens)
        after = model(own.input_ids, own.positions, own.cu_seqlens)
    assert torch.equal(inside, expected)
    wanted = split(Batch(expected, expected, expected, expected), mesh).input_ids
    torch.testing.assert_close(after, wanted, atol=1e-12, rtol=1e-12)
    with pytest.raises(ZeroDivisionError), whole_rows(model):
        raise ZeroDivisionError
    again = model(own.input_ids, own.positions, own.cu_seqlens)
    assert torch.equal(again, after)


def test_a_model_takes_whole_rows_for_a_while() -> None:
    run_distributed(_whole_rows_and_split_ones, 2)


# --- the same run as one process --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case(Layout(context=2)),
        Case(Layout(context=2), recompute="full"),
        Case(Layout(context=2), data="whole"),
        pytest.param(Case(Layout(context=2), data="masked", micro_batch_size=1), marks=pytest.mark.slow),
        Case(Layout(context=2), architecture=dataclasses.replace(TINY, window_size=5)),
        Case(Layout(context=4), micro_batch_size=3, rows=6),
        pytest.param(Case(Layout(shard=2, context=2, zero_stage=1)), marks=pytest.mark.slow),
        pytest.param(Case(Layout(shard=2, context=2, zero_stage=2), data="masked"), marks=pytest.mark.slow),
        Case(Layout(shard=2, context=2, zero_stage=3)),
    ],
    ids=[
        "2",
        "2 recomputed",
        "2 whole rows",
        "2 masked",
        "2 window",
        "4",
        "2 ZeRO 1",
        "2 ZeRO 2 masked",
        "2 ZeRO 3",
    ],
)
def test_split_rows_train_as_whole_ones(case: Case) -> None:
    hold(case)
