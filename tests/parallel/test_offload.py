"""Offloaded inputs of blocks in each kind of layout: the run without, to the bit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest

from modelyard.model.offload import Offload
from modelyard.parallel.apply import parallelize
from tests.model.copies import Late
from tests.parallel.cases import L
from tests.parallel.matrix import Case, distributed
from tests.parallel.processes import run_distributed

SLOW = pytest.mark.slow


def bits(case: Case) -> tuple[list[float], dict[str, list[float]]]:
    trace = distributed(case)
    assert trace.parameters[-1]
    last = {name: tensor.flatten().tolist() for name, tensor in trace.parameters[-1].items()}
    return trace.losses + trace.norms, last


def both(case: Case) -> tuple[int, int]:
    """Runs the case without and with; the inputs that left and that came back, and the buffers that were needed."""
    expected, late = bits(case), Late()
    with (
        mock.patch("modelyard.parallel.apply.offload_on", return_value=Offload(late)),
        mock.patch("tests.parallel.matrix.parallelize", partial(parallelize, offload_activations=True)),
    ):
        assert bits(case) == expected
    assert not late.waiting
    out = [line for line in late.log if line.startswith("out") and not line.endswith("done")]
    return len(out), len(late.hosts)


@pytest.mark.parametrize(
    ("case", "left", "buffers"),
    [
        # Of each process: 3 steps x micro-batches x blocks, but for the last of the 4; and how many were away at one time.
        pytest.param(Case(L(shard=2, zero=3), compile=True), (18, 18), (3, 3), id="shards, compiled"),
        pytest.param(Case(L(context=2, zero=2)), (36, 36), (3, 3), id="context", marks=SLOW),
        pytest.param(Case(L(tensor=2, sequence=True)), (36, 36), (3, 3), id="tensor"),
        # The first process has two micro-batches on their way: the second one's forward comes before the first's backward.
        pytest.param(Case(L(pipeline=2)), (24, 12), (4, 1), id="1f1b"),
        pytest.param(Case(L(pipeline=2, schedule="gpipe")), (24, 12), (8, 4), id="gpipe", marks=SLOW),
        pytest.param(
            Case(L(pipeline=2, schedule="interleaved")), (24, 12), None, id="interleaved", marks=SLOW
        ),
        pytest.param(Case(L(pipeline=2, schedule="zero_bubble")), (24, 12), None, id="zero_bubble"),
        pytest.param(Case(L(pipeline=2, schedule="zbv")), (12, 24), None, id="zbv", marks=SLOW),
    ],
)
def test_a_layout_with_offloaded_inputs(
    case: Case, left: tuple[int, int], buffers: tuple[int, int] | None
) -> None:
    answers = run_distributed(both, case.layout.world, replace(case, recompute="full", steps=3))
    assert tuple(count for count, _ in answers) == left
    if buffers is not None:
        assert tuple(most for _, most in answers) == buffers
