"""FLOPs and bytes of the parts of a step, counted by hand, and the sum of all parts against the architecture's own formula."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from modelyard.config.adapter import MODULES, Adapter, Quantization, matmul_flops_per_token
from modelyard.config.architecture import Architecture
from modelyard.config.layout import Layout
from modelyard.plan.parts import Part, keys_of, parts_of, step_flops
from modelyard.plan.workload import Workload

SHAPE = Architecture(
    vocab_size=96,
    hidden_size=16,
    num_layers=4,
    num_attention_heads=4,
    head_groups=2,
    head_size=4,
    ffn_hidden_size=24,
)
LLAMA_8B = Architecture(128_256, 4096, 32, 32, 8, 128, 14_336)
LLAMA_405B = Architecture(128_256, 16_384, 126, 128, 8, 128, 53_248)
GPT = replace(SHAPE, gated=False, activation="gelu", norm_type="layer_norm", tie_word_embeddings=True)
ONE = Workload(SHAPE, Layout(), batch_rows=4, micro_rows=2, sequence_length=8, dtype="float32", on_gpu=True)
"""Two micro-batches of 16 tokens."""


def sums(workload: Workload, what: str = "all_moved", place: int = 0) -> dict[tuple[str, str], float]:
    """By name and phase."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for part in parts_of(workload, place):
        found[part.name, part.phase] += getattr(part, what)
    return dict(found)


def only(workload: Workload, name: str, phase: str) -> Part:
    (part,) = (p for p in parts_of(workload) if (p.name, p.phase) == (name, phase))
    return part


LAYOUTS = [
    Layout(),
    Layout(shard=2, zero_stage=3),
    Layout(replicate=2, shard=2, zero_stage=2),
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(context=2, tensor=2),
    Layout(pipeline=2),
    Layout(pipeline=2, schedule="interleaved", stages_per_process=2),
    Layout(pipeline=2, schedule="zbv", stages_per_process=2, tensor=2, shard=2),
]


@pytest.mark.parametrize("architecture", [SHAPE, GPT], ids=["llama", "gpt"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_all_products_of_all_processes_are_the_models(architecture: Architecture, layout: Layout) -> None:
    workload = replace(ONE, architecture=architecture, layout=layout, batch_rows=8, micro_rows=1)
    expected = architecture.matmul_flops_per_token() * workload.step_tokens
    assert step_flops(workload, kinds=["matmul"]) == expected


def test_so_of_a_model_of_405_billion_on_16384_processes() -> None:
    layout = Layout(shard=128, pipeline=16, tensor=8, schedule="interleaved", stages_per_process=7)
    workload = Workload(LLAMA_405B, layout, 2048, 1, 8192, on_gpu=True)
    assert step_flops(workload, kinds=["matmul"]) == LLAMA_405B.matmul_flops_per_token() * 2048 * 8192


def test_products_of_one_process_by_hand() -> None:
    found = sums(ONE, "all_flops")
    # q 16 x 16, k and v 8 x 16, o 16 x 16: 768 weights in each of 4 layers, two FLOPs each for 16 tokens.
    assert found["projections", "forward"] == 4 * 768 * 2 * 16
    assert found["projections", "backward"] == 2 * found["projections", "forward"]
    assert found["feed-forward", "forward"] == 4 * 3 * 16 * 24 * 2 * 16
    # The fused loss makes its gradients in the forward.
    assert found["head", "forward"] == 3 * 96 * 16 * 2 * 16
    assert ("head", "backward") not in found
    as_written = sums(replace(ONE, cross_entropy="torch"), "all_flops")
    assert as_written["head", "forward"] == 96 * 16 * 2 * 16
    assert as_written["head", "backward"] == 2 * as_written["head", "forward"]


def test_attention_by_hand() -> None:
    # 16 tokens see 4 keys each on average, in 4 heads of 4: two products forward, five backward, of two FLOPs a number.
    found = sums(ONE, "all_flops")
    assert found["attention", "forward"] == 4 * 2 * 2 * 16 * 4 * 16
    assert found["attention", "backward"] == 4 * 5 * 2 * 16 * 4 * 16
    # What is executed is 14/12 of what the model needs.
    model = SHAPE.attention_flops_per_token(8, causal=True) * 16
    assert found["attention", "forward"] + found["attention", "backward"] == model * 14 / 12


def test_keys_that_a_query_sees() -> None:
    assert keys_of(8, None) == 4
    assert keys_of(8, 8) == 4
    # Of 8 queries with a window of 4: 4 - 16 / 16.
    assert keys_of(8, 4) == 3


def test_attention_of_documents_windows_and_contexts() -> None:
    whole = sums(ONE, "all_flops")["attention", "forward"]
    assert sums(replace(ONE, document_length=2), "all_flops")["attention", "forward"] == whole / 4
    assert sums(replace(ONE, document_length=100), "all_flops")["attention", "forward"] == whole
    windowed = replace(ONE, architecture=replace(SHAPE, window_size=4, full_attention_layers=1))
    # One layer of four sees everything, three see 3 keys instead of 4.
    assert sums(windowed, "all_flops")["attention", "forward"] == whole * (1 + 3 * 3 / 4) / 4
    # Two processes have half of the queries each, and as many keys a query.
    context = replace(ONE, layout=Layout(context=2))
    assert sums(context, "all_flops")["attention", "forward"] == whole / 2
    # torch on a CPU computes what a mask hides: of the 2 x 2 chunks of a row 5 of 8 and not 4.
    on_cpu = replace(context, on_gpu=False)
    assert sums(on_cpu, "all_flops")["attention", "forward"] == whole / 2 * 5 / 4


def test_full_recomputation_does_all_of_a_block_again_but_its_last_product() -> None:
    plain, full = (sums(replace(ONE, recompute=mode), "all_flops") for mode in ("none", "full"))
    assert full["projections", "recompute"] == plain["projections", "forward"]
    assert full["feed-forward", "recompute"] == plain["feed-forward", "forward"] * 2 / 3
    assert full["attention", "recompute"] == plain["attention", "forward"]
    assert ("head", "recompute") not in full
    extra = step_flops(replace(ONE, recompute="full")) - step_flops(ONE)
    forward = (
        plain["projections", "forward"]
        + plain["feed-forward", "forward"] * 2 / 3
        + plain["attention", "forward"]
    )
    assert extra == 2 * forward  # two micro-batches


def test_selective_recomputation_does_norms_and_activations_again() -> None:
    assert step_flops(replace(ONE, recompute="selective")) == step_flops(ONE)
    found = sums(replace(ONE, recompute="selective"))
    again = {name for name, phase in found if phase == "recompute"}
    assert again == {"norms", "activation"}
    # The last norm, outside of the blocks, is not.
    assert found["norms", "recompute"] == found["norms", "forward"] * 8 / 9


def test_bytes_between_the_products_by_hand() -> None:
    found, fewest = sums(ONE), sums(ONE, "all_bytes")
    stream, features = 16 * 16 * 4, 16 * 24 * 4  # bytes of [tokens, hidden] and [tokens, inner] in fp32
    # RMSNorm: read for the squares and written, read for the mean, read and written twice; two a block and the last.
    assert found["norms", "forward"] == 9 * 7 * stream
    assert fewest["norms", "forward"] == 9 * 2 * stream
    assert found["norms", "backward"] == 9 * 12 * stream
    assert found["activation", "forward"] == 4 * 5 * features
    assert fewest["activation", "forward"] == 4 * 3 * features
    assert found["residual", "forward"] == 4 * 2 * 3 * stream
    # Rotation: of queries and keys, 24 numbers a token; each half seven reads and writes of half the numbers, twice.
    assert found["rotary", "forward"] == 4 * 7 * 16 * 24 * 4
    assert fewest["rotary", "backward"] == 4 * 2 * 16 * 24 * 4


def test_compiled_blocks_move_the_fewest() -> None:
    eager, compiled = (
        parts_of(replace(ONE, dtype="bfloat16")),
        parts_of(replace(ONE, dtype="bfloat16", compiled=True)),
    )
    for one, other in zip(eager, compiled, strict=True):
        assert (one.name, one.flops, one.bytes) == (other.name, other.flops, other.bytes)
        if one.name in ("norms", "rotary", "activation", "residual"):
            assert other.moved == one.bytes < one.moved
            assert other.calls == 1
        else:
            assert other.moved == one.moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_nothing_moves_less_than_the_fewest(layout: Layout, dtype: str) -> None:
    workload = replace(ONE, layout=layout, batch_rows=8, dtype=dtype, recompute="full")
    for place in range(layout.pipeline):
        for part in parts_of(workload, place):
            assert 0 <= part.bytes <= part.moved
            assert part.times > 0
            assert part.calls > 0


def test_sequence_parallel_processes_share_the_norms_tokens() -> None:
    whole = sums(replace(ONE, layout=Layout(tensor=2)))
    shared = sums(replace(ONE, layout=Layout(tensor=2, sequence_parallel=True)))
    for name in ("norms", "residual"):
        assert shared[name, "forward"] == whole[name, "forward"] / 2
    assert shared["activation", "forward"] == whole["activation", "forward"]


def test_once_a_step_by_hand() -> None:
    count = SHAPE.parameter_count()
    found = sums(ONE)
    # AdamW: weight, gradient and two moments read, all but the gradient written.
    assert found["optimizer", "optimizer"] == 28 * count
    assert found["gradient norm and scale", "optimizer"] == 12 * count
    assert ("publish", "optimizer") not in found
    # fp32: the first micro-batch's gradients are taken as they are, the second's added.
    assert found["gradient accumulation", "backward"] == 12 * count
    narrow = sums(replace(ONE, dtype="bfloat16"))
    assert narrow["optimizer", "optimizer"] == 28 * count
    assert narrow["publish", "optimizer"] == 6 * count
    assert narrow["gradient accumulation", "backward"] == (6 + 10) * count


def test_shards_are_what_the_optimizer_updates() -> None:
    found = sums(replace(ONE, layout=Layout(shard=2), micro_rows=1))
    assert found["optimizer", "optimizer"] == 14 * SHAPE.parameter_count()
    assert found["gathered weights", "forward"] > 0


def test_an_adapters_products() -> None:
    adapter = Adapter(2, 4.0, MODULES)
    workload = replace(ONE, adapter=adapter, frozen=frozenset(SHAPE.parameter_shapes()))
    assert step_flops(workload, kinds=["matmul"]) == matmul_flops_per_token(SHAPE, adapter) * 32
    found = sums(workload, "all_flops")
    own = adapter.parameter_count(SHAPE)
    assert found["adapter", "forward"] == 2 * own * 16
    assert found["adapter", "backward"] == 4 * own * 16
    assert sums(workload)["optimizer", "optimizer"] == 28 * own


def test_a_quantized_base_is_made_a_matrix_again_for_each_direction() -> None:
    adapter = Adapter(2, 4.0, MODULES, quantization=Quantization(block=8))
    workload = replace(ONE, adapter=adapter, frozen=frozenset(SHAPE.parameter_shapes()))
    weights = 4 * (768 + 3 * 16 * 24)
    fewest = sums(workload, "all_bytes")
    assert fewest["NF4", "forward"] == fewest["NF4", "backward"] == weights * 4.5
    again = sums(replace(workload, recompute="full"), "all_bytes")
    assert again["NF4", "recompute"] == (weights - 4 * 16 * 24) * 4.5


def test_frozen_matrices_have_no_gradient() -> None:
    frozen = frozenset(f"layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    plain, found = sums(ONE, "all_flops"), sums(replace(ONE, frozen=frozen), "all_flops")
    one = 2 * 16 * 24 * 16
    assert found["feed-forward", "backward"] == plain["feed-forward", "backward"] - 2 * one


def test_the_loss_of_a_chunk_of_tokens_after_the_other() -> None:
    workload = Workload(LLAMA_8B, Layout(), 1, 1, 8192, on_gpu=True)
    heads = [part for part in parts_of(workload) if part.name == "head" and part.kind == "matmul"]
    # 2^27 logits are alive at once: 1,046 tokens' of 128,256 words; seven such chunks and one of 870.
    outputs = [(part.times, part.shape) for part in heads if part.direction == "output"]
    assert outputs == [(7, (1046, 128_256, 4096)), (1, (870, 128_256, 4096))]


def test_each_stage_has_its_own() -> None:
    workload = replace(ONE, layout=Layout(pipeline=2), micro_rows=1)
    names: list[Any] = [{part.name for part in parts_of(workload, place)} for place in (0, 1)]
    assert names[0] - names[1] == {"embedding"}
    assert names[1] - names[0] == {"head", "loss"}
