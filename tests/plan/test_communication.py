"""The formulas of what is sent: by hand, and as a dry run of the program counts it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from modelyard.config.adapter import Adapter
from modelyard.config.layout import Layout
from modelyard.plan.apart import apart
from modelyard.plan.communication import Key, communication_of
from modelyard.plan.trace import trace
from modelyard.plan.workload import Workload
from tests.parallel.matrix import TINY

SHAPE = replace(TINY, vocab_size=96, hidden_size=32, head_size=8, ffn_hidden_size=48, qkv_bias=False)
TIED = replace(SHAPE, tie_word_embeddings=True)
BLOCK = 2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
"""Parameters of a block: two norms, q and o, k and v, the feed-forward."""
NAMES = frozenset(SHAPE.parameter_shapes())


def workload(layout: Layout, **options: Any) -> Workload:
    options = {"architecture": SHAPE, "batch_rows": 8, "micro_rows": 1, "sequence_length": 32, **options}
    return Workload(layout=layout, **options)


def sent(work: Workload, place: int = 0, share: int = 0) -> dict[Key, tuple[int, float]]:
    found: dict[Key, list[float]] = defaultdict(lambda: [0, 0.0])
    for term in communication_of(work, place, share):
        found[term.key][0] += term.calls
        found[term.key][1] += term.bytes
    return {key: (int(calls), size) for key, (calls, size) in found.items()}


# --- by hand ----------------------------------------------------------------------------------------------------


def test_one_process_talks_to_nobody() -> None:
    assert communication_of(workload(Layout())) == []


def test_zero_1_gathers_and_reduces_once_a_step() -> None:
    found = sent(workload(Layout(shard=4)))
    parameters = SHAPE.parameter_count()
    # Groups: four blocks, the embedding, the rest. bf16 to compute with, fp32 to sum in; a ring of four sends three quarters.
    assert found["weights", "all-gather"] == (6, 2 * parameters * 0.75)
    assert found["weights", "reduce-scatter"] == (6, 4 * parameters * 0.75)
    assert found["step", "all-reduce"] == (1, 2 * 5 * 8 * 0.75)
    assert len(found) == 3


def test_zero_3_gathers_for_each_forward_and_backward() -> None:
    found = sent(workload(Layout(shard=4, zero_stage=3)))
    inner, rest = 4 * BLOCK + 96 * 32, 96 * 32 + 32
    # Two micro-batches; what is neither block nor embedding stays from the forward to the backward.
    assert found["weights", "all-gather"] == (2 * 2 * 5 + 2, 2 * 0.75 * (4 * inner + 2 * rest))
    assert found["weights", "reduce-scatter"] == (12, 4 * 0.75 * 2 * (inner + rest))


def test_tensor_parallelism_sums_the_stream_four_times_a_layer() -> None:
    found = sent(workload(Layout(tensor=4)))
    stream = 2 * 32 * 32 * 0.75
    # Eight micro-batches of one row; embedding and last norm; the loss, of three numbers a token in fp32, in one chunk.
    assert found["tensor", "all-reduce"] == (8 * (16 + 2 + 2), 8 * (18 * 2 * stream + 2 * 0.75 * 3 * 4 * 32))


def test_places_of_a_pipeline_differ() -> None:
    work = workload(Layout(pipeline=4), architecture=TIED)
    message, matrix = 2 * 32 * 32, 4 * 96 * 32
    assert [sent(work, place)["pipeline", "send"] for place in range(4)] == [
        (8 + 1, 8 * message + matrix),  # forward; the tied matrix's gradient
        (16, 16 * message),
        (16, 16 * message),
        (8 + 1, 8 * message + matrix),
    ]


def test_the_bottom_of_a_v_sends_nothing_to_itself() -> None:
    work = workload(Layout(pipeline=2, schedule="zbv", stages_per_process=2))
    # Stages 0 and 3 on the first process, 1 and 2 on the second: each has one neighbour a stage on the other.
    assert [sent(work, place)["pipeline", "send"][0] for place in (0, 1)] == [16, 16]


def test_rows_that_do_not_divide_go_to_the_first() -> None:
    lora = Adapter(2, 4, ("q_proj",))
    work = workload(Layout(shard=4, tensor=2), adapter=lora, frozen=NAMES)
    # Two rows of A are dealt to four processes; of B, cut by heads, nothing is summed.
    elements = [4 * 32, 4 * 32, 0, 0]
    for share, expected in enumerate(elements):
        terms = [t for t in communication_of(work, 0, share) if t.why == "gradients, once a step"]
        assert sum(t.bytes for t in terms) == 2 * 0.5 * 4 * expected


def test_terms_know_whom_they_are_among() -> None:
    work = workload(Layout(replicate=2, shard=2, pipeline=2, context=2, tensor=2, zero_stage=2), micro_rows=1)
    found = {(t.key[0], t.dimension, t.group) for t in communication_of(work)}
    assert found == {
        ("weights", "weights", 4),
        ("replicate", "replicate", 2),
        ("pipeline", "pipeline", 2),
        ("context", "context", 2),
        ("tensor", "tensor", 2),
        ("step", "world", 32),
    }
    gather = next(t for t in communication_of(work) if t.key == ("context", "all-gather"))
    # Keys and values of both processes' tokens, one group of heads each here.
    assert gather.message_bytes == 2 * 32 * 2 * 8 * 0.5


# --- as traced --------------------------------------------------------------------------------------------------

HALF = frozenset(name for name in NAMES if name.startswith(("embed", "layers.0.", "layers.1.")))
DORA = Adapter(2, 4, ("q_proj", "o_proj", "down_proj"), dora=True)
ODD = replace(SHAPE, norm_type="layer_norm", gated=False, activation="gelu", output_bias=True, mlp_bias=True)


@pytest.mark.parametrize(
    ("work", "ranks"),
    [
        pytest.param(workload(Layout(replicate=2, shard=3, zero_stage=3), batch_rows=6), (0, 5), id="uneven"),
        pytest.param(
            workload(Layout(shard=2, zero_stage=3), frozen=HALF, batch_rows=4), (0,), id="frozen half"
        ),
        pytest.param(
            workload(Layout(context=2, tensor=2, sequence_parallel=True), recompute="full", batch_rows=1),
            (3,),
            id="recompute",
        ),
        pytest.param(
            workload(
                Layout(tensor=2, sequence_parallel=True),
                architecture=ODD,
                recompute="selective",
                batch_rows=1,
            ),
            (0,),
            id="layer norms, biases",
        ),
        pytest.param(
            workload(Layout(shard=2, tensor=2), adapter=DORA, frozen=NAMES, recompute="full", batch_rows=2),
            (0,),
            id="DoRA",
        ),
        pytest.param(
            workload(
                Layout(shard=2, pipeline=2, zero_stage=2, schedule="zero_bubble", stages_per_process=2),
                batch_rows=4,
            ),
            (1,),
            id="zero bubble",
        ),
    ],
)
def test_traced_calls_and_bytes_are_those_of_the_formulas(work: Workload, ranks: tuple[int, ...]) -> None:
    layout = work.layout
    for rank in ranks:
        place = rank // (layout.context * layout.tensor) % layout.pipeline
        shard = rank // (layout.context * layout.tensor * layout.pipeline) % layout.shard
        share = shard * layout.context + rank // layout.tensor % layout.context
        traced, formula = apart(trace, work, rank).calls, sent(work, place, share)
        assert {key: calls for key, (calls, _) in formula.items()} == {
            k: calls for k, (calls, _) in traced.items()
        }
        assert {key: size for key, (_, size) in formula.items()} == pytest.approx(
            {key: size for key, (_, size) in traced.items()}, rel=1e-9
        )
