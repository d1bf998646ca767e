"""The table of layouts, and which of its rows are tested every time.

To add a layout, add a row to `CASES`. A row is known by its features (`features`); those of the quick tests are chosen so
that every two features that any row has together are together in one of them (`pairwise_cover`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

import torch

from modelyard.config.adapter import MODULES, Adapter, Quantization
from modelyard.config.layout import Layout, Recompute, Schedule
from modelyard.train.step import LossOptions
from tests.parallel.matrix import TINY, Case

TIED = replace(TINY, tie_word_embeddings=True)
LLAMA = replace(TINY, qkv_bias=False)
"""Llama has no biases."""
WINDOW = replace(TINY, window_size=5)
"""Mistral's window, shorter than most documents."""
STARCODER = replace(
    TINY,
    output_bias=True,
    mlp_bias=True,
    norm_type="layer_norm",
    gated=False,
    activation="gelu",
    position_embeddings=32,
    logits_scale=0.5,
)
"""Every bias there is (one that each process adds counts several times), and norms that have two parameters."""
UNEVEN = replace(TINY, hidden_size=20, ffn_hidden_size=28)
"""Rows that two processes can share evenly and eight cannot: some have none of a norm."""
WIDE = replace(TINY, full_precision_residual=True)
"""What goes from block to block is in fp32, also where it is computed in bf16."""
EIGHT_LAYERS = replace(TINY, num_layers=8)
"""For four processes of two stages each."""
BLOCKS = replace(TINY, hidden_size=256, head_size=64, ffn_hidden_size=256, num_layers=2)
"""Rows that are whole blocks of 16 weights, in halves too, with eight scales or more."""


def layout_of(
    replicate: int = 1,
    shard: int = 1,
    pipeline: int = 1,
    context: int = 1,
    tensor: int = 1,
    *,
    zero: int = 1,
    schedule: Schedule = "1f1b",
    sequence: bool = False,
    offload: bool = False,
) -> Layout:
    """`Layout` in fewer words."""
    return Layout(
        replicate,
        shard,
        pipeline,
        context,
        tensor,
        sequence_parallel=sequence,
        zero_stage=zero,  # type: ignore[arg-type]
        offload=offload,
        schedule=schedule,
        stages_per_process=2 if schedule in ("interleaved", "zero_bubble", "zbv") else 1,
    )


Z_LOSS = LossOptions(z_loss=1e-3)
TORCH_LOSS = LossOptions(implementation="torch", z_loss=1e-3)
"""The loss by its formula, the fused one's slow twin."""
L = layout_of
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv")
AGAIN: tuple[Recompute, ...] = ("selective", "full")

DATA = [
    # one process, within torch.distributed: FSDP over itself
    Case(L()),
    # each stage, without and with accumulation
    *(Case(L(shard=2, zero=zero), micro_batch_size=rows) for zero in (1, 2, 3) for rows in (4, 1)),
    *(Case(L(shard=4, zero=zero), micro_batch_size=1) for zero in (1, 2, 3)),
    Case(L(shard=8, zero=3), micro_batch_size=1, architecture=UNEVEN),
    Case(L(replicate=2)),
    Case(L(replicate=4, zero=2), micro_batch_size=1),
    *(Case(L(replicate=2, shard=2, zero=zero), micro_batch_size=1) for zero in (1, 2, 3)),
    Case(L(replicate=2, shard=4, zero=3), micro_batch_size=1, architecture=TIED),
    *(Case(L(shard=2, zero=zero), data="masked", micro_batch_size=1) for zero in (1, 2, 3)),
    Case(L(shard=2, zero=2, offload=True), micro_batch_size=1),
    Case(L(replicate=2, shard=2, zero=3, offload=True), micro_batch_size=1, data="masked"),
    Case(L(shard=2, zero=3), architecture=TIED, recompute="full"),
    Case(L(shard=2, zero=3), architecture=STARCODER, options=Z_LOSS),
    Case(L(shard=2, zero=1), architecture=WINDOW, recompute="selective"),
    Case(L(shard=2, zero=3), compile=True),
    Case(L(shard=2, zero=1), compile=True, recompute="selective"),
    *(Case(L(shard=2, zero=3), recompute=how) for how in AGAIN),
]
CONTEXT = [
    Case(L(context=2)),
    Case(L(context=4, zero=3)),
    Case(L(context=2), data="long", micro_batch_size=8),
    Case(L(context=4), data="long", architecture=WINDOW),
    Case(L(shard=2, context=2, zero=3), data="long", architecture=TIED),
    Case(L(shard=2, context=2, zero=2), data="masked", micro_batch_size=1),
    Case(L(replicate=2, context=2, zero=2), data="long", architecture=STARCODER),
    Case(L(replicate=2, shard=2, context=2, zero=3), micro_batch_size=1),
    Case(L(context=2, zero=2, offload=True), recompute="full"),
    Case(L(context=2, zero=3), compile=True),
    Case(L(context=2), recompute="selective", options=Z_LOSS),
    Case(L(context=2), data="whole"),
    Case(L(context=4), data="whole", architecture=WINDOW),
    Case(L(context=2, tensor=2, sequence=True), data="whole", architecture=STARCODER),
]
TENSOR = [
    Case(L(tensor=2), options=TORCH_LOSS),
    *(Case(L(tensor=2, sequence=sequence)) for sequence in (False, True)),
    *(
        Case(L(tensor=4, sequence=sequence), architecture=replace(TINY, head_groups=4))
        for sequence in (False, True)
    ),
    *(
        Case(L(shard=2, tensor=2, sequence=sequence, zero=zero), micro_batch_size=1)
        for sequence in (False, True)
        for zero in (1, 2, 3)
    ),
    Case(L(tensor=2), architecture=TIED, options=Z_LOSS),
    Case(L(tensor=2, sequence=True), architecture=TIED, data="masked"),
    *(Case(L(tensor=2, sequence=sequence), architecture=STARCODER) for sequence in (False, True)),
    Case(L(shard=2, tensor=2, sequence=True, zero=3), architecture=STARCODER),
    Case(L(tensor=2), recompute="full"),
    *(Case(L(tensor=2, sequence=True), recompute=how) for how in AGAIN),
    *(Case(L(tensor=2, sequence=sequence), compile=True) for sequence in (False, True)),
    Case(L(replicate=2, tensor=2, sequence=True), architecture=LLAMA),
    Case(L(replicate=2, shard=2, tensor=2, zero=3), micro_batch_size=1, architecture=UNEVEN),
    Case(L(shard=2, tensor=2, sequence=True, offload=True), architecture=TIED),
    Case(L(context=2, tensor=2), data="long"),
    Case(L(shard=2, context=2, tensor=2, sequence=True, zero=3), micro_batch_size=1, architecture=TIED),
]
PIPELINE = [
    *(Case(L(pipeline=2, schedule=schedule)) for schedule in SCHEDULES),
    *(Case(L(pipeline=2, schedule=schedule), architecture=TIED) for schedule in SCHEDULES),
    Case(L(pipeline=4, schedule="gpipe"), micro_batch_size=1),
    Case(L(pipeline=4), micro_batch_size=1),
    Case(L(pipeline=4, schedule="zero_bubble"), micro_batch_size=1, architecture=EIGHT_LAYERS),
    *(
        Case(L(shard=2, pipeline=2, schedule=schedule, zero=zero), micro_batch_size=1)
        for schedule in SCHEDULES
        for zero in (1, 2, 3)
    ),
    Case(L(replicate=2, pipeline=2), micro_batch_size=1, data="masked"),
    Case(L(replicate=2, shard=2, pipeline=2, zero=3, schedule="zbv"), micro_batch_size=1, architecture=TIED),
    Case(L(pipeline=2, tensor=2), architecture=TIED),
    Case(L(pipeline=2, tensor=2, sequence=True), architecture=TIED),
    Case(L(pipeline=2, tensor=2, schedule="interleaved", sequence=True), architecture=TIED),
    Case(L(pipeline=2, tensor=2, schedule="zbv", sequence=True), architecture=TIED),
    Case(L(2, 1, 2, 1, 2, sequence=True), micro_batch_size=1),
    Case(L(1, 2, 2, 1, 2, sequence=True), micro_batch_size=1),
    Case(L(1, 2, 2, 1, 2, zero=2, schedule="interleaved", sequence=True), micro_batch_size=1),
    Case(L(1, 2, 2, 1, 2, zero=3, schedule="zero_bubble", sequence=True), micro_batch_size=1),
    Case(L(1, 2, 2, 1, 2, zero=3, schedule="zbv", sequence=True), micro_batch_size=1),
    Case(L(pipeline=2, context=2), data="long", architecture=TIED),
    Case(L(1, 2, 2, 2, zero=3, schedule="gpipe"), data="long", micro_batch_size=1),
    Case(L(1, 2, 2, 2, zero=3), data="long", micro_batch_size=1),
    Case(L(1, 2, 2, 2, zero=2, schedule="zero_bubble"), data="long", micro_batch_size=1),
    Case(L(pipeline=2, context=2, tensor=2, sequence=True, schedule="interleaved"), architecture=WINDOW),
    Case(L(pipeline=2), recompute="full", architecture=STARCODER),
    Case(L(pipeline=2, schedule="interleaved"), recompute="selective", options=Z_LOSS),
    Case(L(pipeline=2), compile=True),
    Case(L(shard=2, pipeline=2, zero=2, offload=True), micro_batch_size=1, architecture=TIED),
]
FROZEN = [
    # the head alone: no backward goes into the decoder where it is whole
    *(
        Case(layout, frozen="all but the head")
        for layout in (
            L(),
            *(L(shard=2, zero=zero) for zero in (1, 2, 3)),
            L(replicate=2),
            L(context=2, zero=2),
            *(L(tensor=2, sequence=sequence) for sequence in (False, True)),
            *(L(pipeline=2, schedule=schedule) for schedule in SCHEDULES),
        )
    ),
    Case(L(shard=2, offload=True), frozen="all but the head", data="masked", micro_batch_size=1),
    Case(L(context=2, tensor=2, offload=True), frozen="all but the head", data="long"),
    Case(L(shard=2, pipeline=2, zero=3), micro_batch_size=1, frozen="all but the head", recompute="full"),
    # all that the first process of a pipeline has, or the last
    *(
        Case(L(pipeline=2, schedule=schedule, zero=zero), frozen=frozen)
        for frozen in ("the first half", "the last half")
        for schedule, zero in zip(SCHEDULES, (3, 1, 2, 3, 2), strict=True)
    ),
    *(Case(L(pipeline=2, schedule=schedule), frozen="the first half") for schedule in SCHEDULES),
    Case(L(pipeline=2), micro_batch_size=4, frozen="the first half", architecture=TIED),
    Case(L(pipeline=2, tensor=2, schedule="interleaved"), frozen="the first half", data="masked"),
    Case(L(pipeline=4), micro_batch_size=1, frozen="the last half", options=Z_LOSS),
    Case(L(pipeline=2, schedule="zero_bubble", offload=True), frozen="the last half", recompute="full"),
    Case(L(shard=2, pipeline=2, zero=2, schedule="zbv"), micro_batch_size=1, frozen="the last half"),
    *(Case(L(shard=2, zero=zero), frozen="the first half") for zero in (1, 2, 3)),
    Case(L(shard=2, zero=3), frozen="the first half", compile=True),
    Case(L(replicate=2, context=2, zero=2), micro_batch_size=1, frozen="the last half"),
    Case(L(shard=2, tensor=2, zero=3, sequence=True), frozen="the last half", recompute="selective"),
    Case(L(shard=2), micro_batch_size=1, frozen="all but the head", dtype=torch.bfloat16),
    Case(L(pipeline=2, schedule="zbv", zero=3), frozen="the first half", dtype=torch.bfloat16),
    Case(L(pipeline=2, schedule="zero_bubble"), frozen="the last half", dtype=torch.bfloat16),
]
BF16 = [
    replace(case, dtype=torch.bfloat16)
    for case in (
        Case(L(shard=2), micro_batch_size=1),  # one reduction a step: what it is made in, shows
        Case(L(shard=2, zero=3), micro_batch_size=1),
        Case(L(replicate=2, shard=2, zero=2), micro_batch_size=1),
        Case(L(context=2), data="long"),
        Case(L(tensor=2, sequence=True)),
        Case(L(replicate=2), micro_batch_size=4),
        Case(L(shard=2), architecture=TIED, micro_batch_size=1),
        Case(L(shard=2, zero=3), data="masked"),
        Case(L(tensor=2), architecture=STARCODER, options=Z_LOSS),
        Case(L(context=2, zero=3), recompute="full"),
        *(Case(L(pipeline=2, schedule=schedule, zero=zero)) for schedule in SCHEDULES for zero in (1, 2, 3)),
        # one micro-batch (1f1b wants two): what the backward of the weights makes is reduced as it is
        *(
            Case(L(pipeline=2, schedule=schedule), micro_batch_size=8)
            for schedule in SCHEDULES
            if schedule != "1f1b"
        ),
        Case(L(shard=2, pipeline=2, schedule="zero_bubble", zero=2), micro_batch_size=1),
        Case(L(pipeline=2), architecture=WIDE),
        Case(L(tensor=2, sequence=True), architecture=WIDE),
        Case(L(pipeline=2, schedule="zbv"), architecture=replace(WIDE, tie_word_embeddings=True)),
    )
]
# Rows that have many features at once, so that few of them have every two features that can go together.
MIXED = [
    Case(
        L(pipeline=2, zero=2, schedule="gpipe", offload=True),
        micro_batch_size=4,
        architecture=TIED,
        recompute="selective",
        data="masked",
        options=Z_LOSS,
    ),
    Case(
        L(pipeline=2, offload=True),
        micro_batch_size=4,
        architecture=UNEVEN,
        recompute="selective",
        data="masked",
        options=Z_LOSS,
    ),
    Case(
        L(pipeline=2, zero=2, schedule="zero_bubble"),
        micro_batch_size=1,
        architecture=UNEVEN,
        recompute="full",
        data="long",
        options=Z_LOSS,
    ),
    Case(
        L(pipeline=2, schedule="zbv", offload=True),
        micro_batch_size=4,
        architecture=TIED,
        recompute="full",
        data="long",
    ),
    Case(
        L(pipeline=2, zero=3, schedule="interleaved", offload=True),
        micro_batch_size=1,
        architecture=LLAMA,
        recompute="selective",
        data="masked",
    ),
    Case(
        L(tensor=2, zero=2, sequence=True, offload=True),
        micro_batch_size=4,
        architecture=STARCODER,
        recompute="selective",
        data="masked",
        options=Z_LOSS,
    ),
    Case(
        L(tensor=2, offload=True),
        micro_batch_size=4,
        architecture=STARCODER,
        recompute="selective",
        data="long",
    ),
    Case(
        L(pipeline=2, context=2, schedule="zero_bubble", offload=True),
        architecture=LLAMA,
        recompute="selective",
        data="masked",
    ),
    Case(
        L(tensor=2, zero=3, sequence=True, offload=True),
        micro_batch_size=8,
        architecture=UNEVEN,
        recompute="full",
        data="long",
        options=Z_LOSS,
    ),
    Case(
        L(pipeline=2, context=2, zero=2, schedule="interleaved"),
        micro_batch_size=4,
        architecture=STARCODER,
        recompute="full",
        data="long",
        options=Z_LOSS,
    ),
    Case(L(shard=2, zero=2), architecture=STARCODER, recompute="selective", data="masked", options=Z_LOSS),
    Case(
        L(pipeline=2, zero=3, schedule="gpipe"),
        micro_batch_size=4,
        architecture=STARCODER,
        recompute="full",
        data="long",
        options=Z_LOSS,
    ),
    Case(
        L(replicate=2, pipeline=2, zero=2, schedule="zbv"),
        micro_batch_size=1,
        architecture=STARCODER,
        recompute="selective",
        data="masked",
        options=Z_LOSS,
    ),
    Case(
        L(tensor=2, zero=3, offload=True),
        micro_batch_size=1,
        architecture=TIED,
        compile=True,
        data="masked",
        options=Z_LOSS,
    ),
    Case(
        L(pipeline=2, tensor=2, schedule="gpipe", sequence=True),
        micro_batch_size=1,
        architecture=LLAMA,
        recompute="full",
    ),
    Case(
        L(shard=2, pipeline=2, schedule="interleaved"),
        micro_batch_size=1,
        architecture=UNEVEN,
        recompute="selective",
        data="masked",
    ),
    Case(L(shard=2, pipeline=2, zero=3), micro_batch_size=1, architecture=TIED, recompute="full"),
    Case(
        L(pipeline=2, zero=3, schedule="zero_bubble"),
        micro_batch_size=1,
        architecture=STARCODER,
        data="masked",
        options=Z_LOSS,
    ),
    Case(
        L(replicate=2, zero=2, offload=True),
        micro_batch_size=1,
        architecture=UNEVEN,
        compile=True,
        recompute="selective",
        data="long",
    ),
    Case(L(shard=2, context=2, zero=3, offload=True), micro_batch_size=4, architecture=WINDOW),
    Case(
        L(pipeline=2, tensor=2, schedule="gpipe", offload=True),
        micro_batch_size=1,
        architecture=UNEVEN,
        recompute="full",
    ),
    Case(
        L(context=2, tensor=2, sequence=True, offload=True),
        micro_batch_size=1,
        architecture=TIED,
        recompute="full",
    ),
    Case(L(pipeline=2, context=2, schedule="zbv"), micro_batch_size=1, architecture=UNEVEN, recompute="full"),
    Case(L(replicate=2, tensor=2, zero=3), micro_batch_size=1, architecture=LLAMA, data="long"),
    Case(L(pipeline=2, tensor=2, sequence=True, offload=True), architecture=WINDOW, recompute="full"),
    Case(
        L(tensor=2, sequence=True),
        architecture=WINDOW,
        compile=True,
        recompute="full",
        data="long",
        options=Z_LOSS,
    ),
    Case(
        L(replicate=2, pipeline=2, context=2, zero=2),
        micro_batch_size=1,
        architecture=STARCODER,
        recompute="full",
        data="long",
    ),
    Case(
        L(pipeline=2, tensor=2, zero=3, schedule="zero_bubble", sequence=True),
        architecture=WINDOW,
        data="long",
    ),
    Case(
        L(replicate=2, pipeline=2, tensor=2, zero=2, schedule="interleaved", sequence=True),
        micro_batch_size=1,
        architecture=TIED,
        recompute="full",
        data="masked",
    ),
    Case(L(pipeline=2, tensor=2, zero=3, schedule="zbv"), architecture=LLAMA, data="long"),
    Case(L(pipeline=2, schedule="zero_bubble"), micro_batch_size=4, architecture=TIED, recompute="selective"),
    Case(
        L(replicate=2, shard=2, pipeline=2, schedule="gpipe"),
        micro_batch_size=1,
        architecture=WINDOW,
        recompute="full",
        data="long",
    ),
    Case(
        L(pipeline=2, tensor=2, schedule="interleaved"),
        micro_batch_size=4,
        architecture=WINDOW,
        recompute="selective",
        options=Z_LOSS,
    ),
    Case(
        L(shard=2, pipeline=2, tensor=2, zero=2, schedule="zbv", sequence=True),
        micro_batch_size=1,
        architecture=WINDOW,
        data="masked",
    ),
    Case(
        L(shard=2, pipeline=2, tensor=2, schedule="zero_bubble", offload=True),
        micro_batch_size=1,
        architecture=LLAMA,
        recompute="full",
        data="long",
        options=Z_LOSS,
    ),
    Case(L(context=2, zero=2), architecture=STARCODER, compile=True, recompute="selective", options=Z_LOSS),
    Case(
        L(pipeline=2, zero=3, offload=True),
        micro_batch_size=1,
        architecture=LLAMA,
        compile=True,
        recompute="full",
        data="long",
    ),
    Case(L(pipeline=2, context=2, schedule="gpipe"), recompute="selective", data="long", options=Z_LOSS),
    Case(L(context=2, tensor=2, zero=3, offload=True), architecture=STARCODER, options=Z_LOSS),
    Case(L(replicate=2, pipeline=2, zero=3, schedule="zero_bubble"), micro_batch_size=1, architecture=WINDOW),
    Case(L(pipeline=2, tensor=2, zero=2), micro_batch_size=4, architecture=TIED, options=Z_LOSS),
    Case(
        L(pipeline=2, zero=3, schedule="gpipe", offload=True),
        micro_batch_size=1,
        architecture=LLAMA,
        compile=True,
        recompute="full",
        data="masked",
    ),
    Case(
        L(shard=2, pipeline=2, zero=2, schedule="interleaved", offload=True), architecture=LLAMA, compile=True
    ),
]
LORA = Adapter(2, 4.0, MODULES)
FEW = Adapter(3, 3.0, ("q_proj", "v_proj"), rank_stabilized=True)
"""The adapter of the dialect's default: some matrices have none."""
BESIDE = replace(LORA, freeze_others=False)
DORA = replace(LORA, dora=True)
QLORA = replace(LORA, quantization=Quantization(16))
NARROW = replace(LORA, quantization=Quantization(16, double=True), dora=True)
"""All of it at once."""
DROPPED = replace(LORA, dropout=0.25)
ADAPTERS = [
    Case(L(), adapter=LORA),
    *(Case(L(shard=2, zero=zero), micro_batch_size=1, adapter=LORA) for zero in (1, 2, 3)),
    *(Case(L(tensor=2, sequence=sequence), adapter=LORA) for sequence in (False, True)),
    *(Case(L(tensor=2, sequence=sequence), adapter=DORA) for sequence in (False, True)),
    *(Case(L(tensor=2, sequence=sequence), adapter=BESIDE, data="masked") for sequence in (False, True)),
    Case(L(tensor=2), adapter=LORA, architecture=STARCODER),
    Case(L(tensor=2, sequence=True), adapter=FEW, architecture=STARCODER),
    Case(L(shard=2, zero=3), adapter=DORA, recompute="full"),
    Case(L(shard=2, zero=3), adapter=FEW, recompute="selective", architecture=TIED),
    Case(L(shard=2, zero=2), adapter=BESIDE, micro_batch_size=1),
    Case(L(shard=2, zero=3), adapter=DORA, compile=True),
    Case(L(tensor=2, sequence=True), adapter=LORA, compile=True),
    Case(L(shard=2, zero=3, offload=True), adapter=LORA, micro_batch_size=1, data="masked"),
    Case(L(context=2, zero=2), adapter=LORA, data="long"),
    Case(L(replicate=2, shard=2, zero=3), adapter=FEW, micro_batch_size=1, architecture=WINDOW),
    Case(L(shard=2, tensor=2, sequence=True, zero=3), adapter=DORA, micro_batch_size=1, recompute="full"),
    *(Case(L(pipeline=2, schedule=schedule), adapter=LORA) for schedule in SCHEDULES),
    Case(L(shard=2, pipeline=2, zero=3, schedule="zbv"), adapter=FEW, micro_batch_size=1),
    Case(L(pipeline=2, tensor=2, sequence=True), adapter=DORA, architecture=TIED),
    # inputs that are left out: which ones, every layout finds for itself
    Case(L(shard=2, zero=3), adapter=DROPPED, micro_batch_size=1, recompute="selective"),
    Case(L(context=2, zero=2), adapter=DROPPED, data="long"),
    Case(L(tensor=2), adapter=replace(DROPPED, dora=True)),
    Case(L(tensor=2, sequence=True), adapter=DROPPED, recompute="full", architecture=STARCODER),
    Case(L(pipeline=2), adapter=DROPPED, recompute="full"),
    Case(L(shard=2, pipeline=2, schedule="zero_bubble"), adapter=DROPPED, micro_batch_size=1),
    # the base in four bits
    Case(L(), adapter=QLORA, architecture=BLOCKS),
    *(
        Case(L(shard=2, zero=zero), micro_batch_size=1, adapter=QLORA, architecture=BLOCKS)
        for zero in (1, 2, 3)
    ),
    *(Case(L(tensor=2, sequence=sequence), adapter=QLORA, architecture=BLOCKS) for sequence in (False, True)),
    Case(L(shard=2, tensor=2, zero=3), adapter=NARROW, architecture=BLOCKS, micro_batch_size=1),
    Case(L(shard=2, zero=3), adapter=NARROW, architecture=BLOCKS, recompute="full"),
    Case(L(shard=2, zero=2), adapter=QLORA, architecture=BLOCKS, compile=True),
    Case(L(pipeline=2), adapter=QLORA, architecture=BLOCKS),
    Case(L(shard=2, zero=3), adapter=FEW, dtype=torch.bfloat16),
    Case(L(tensor=2, sequence=True), adapter=replace(FEW, dora=True), dtype=torch.bfloat16),
    Case(
        L(shard=2, tensor=2, zero=2),
        adapter=replace(FEW, quantization=Quantization(16)),
        architecture=BLOCKS,
        dtype=torch.bfloat16,
        micro_batch_size=1,
    ),
    Case(L(shard=2, zero=3), adapter=NARROW, architecture=BLOCKS, dtype=torch.bfloat16),
]
# Three features that meet in one line of code, which no cover of pairs need have: the mutants say which.
TRIPLES = [
    Case(L(context=2, tensor=2, sequence=True, zero=3), data="long", architecture=WINDOW),
    Case(L(shard=2), micro_batch_size=1),
    Case(L(shard=2), micro_batch_size=1, data="masked"),
    Case(L(pipeline=2, schedule="zero_bubble", zero=3), dtype=torch.bfloat16),
]
CASES: list[Case] = list(
    dict.fromkeys([*TRIPLES, *DATA, *CONTEXT, *TENSOR, *PIPELINE, *MIXED, *FROZEN, *ADAPTERS, *BF16])
)


# --- what a row is about ----------------------------------------------------------------------------------------


def features(case: Case) -> tuple[str, ...]:
    """What is special about a row; the plainest one has its ZeRO stage and no pipeline."""
    layout, shape = case.layout, case.architecture
    found = {
        "replicate": layout.replicate > 1,
        "shard": layout.shard > 1,
        f"zero {layout.zero_stage}": True,
        "offload": layout.offload,
        f"pipeline {layout.schedule}": layout.pipeline > 1,
        # Micro-batches one after the other: as much a way of its own as each schedule.
        "no pipeline": layout.pipeline == 1,
        "context": layout.context > 1,
        "tensor": layout.tensor > 1 and not layout.sequence_parallel,
        "tensor with sequence": layout.tensor > 1 and layout.sequence_parallel,
        f"recompute {case.recompute}": case.recompute != "none",
        "compile": case.compile,
        "tied": shape.tie_word_embeddings,
        "biases": shape.mlp_bias,
        "no bias": not shape.qkv_bias,
        "wide stream": shape.full_precision_residual,
        "window": shape.window_size is not None,
        "uneven": shape == UNEVEN,
        "z-loss": case.options.z_loss != 0,
        "torch loss": case.options.implementation == "torch",
        "accumulation": case.rows > case.layout.data * case.micro_batch_size,
        f"{case.data} data": case.data != "packed",
        "bf16": case.dtype == torch.bfloat16,
        "frozen": case.frozen != "nothing",
        "head alone": case.frozen == "all but the head",
        "adapter": case.adapter is not None,
        "adapter beside": case.adapter is not None and not case.adapter.freeze_others,
        "dora": case.adapter is not None and case.adapter.dora,
        "nf4": case.adapter is not None and case.adapter.quantization is not None,
        "dropout": case.has_dropout,
        "double nf4": case.adapter is not None and case.adapter.quantization == NARROW.quantization,
        "few adapted": case.adapter is not None and case.adapter.modules == FEW.modules,
    }
    return tuple(name for name, there in found.items() if there)


_SCHEDULES = tuple(f"pipeline {schedule}" for schedule in SCHEDULES)
_STAGES = tuple(f"zero {stage}" for stage in (1, 2, 3))
_KINDS = ("replicate", "shard", "context", "tensor", "tensor with sequence")
TOGETHER: set[frozenset[str]] = {
    frozenset(pair)
    for some, others in (
        (
            _SCHEDULES,
            (*_STAGES, *_KINDS, "bf16", "frozen", "tied", "offload", "recompute full", "masked data"),
        ),
        (
            _STAGES,
            (*_KINDS, "bf16", "frozen", "head alone", "tied", "offload", "recompute full", "masked data"),
        ),
        (_KINDS, (*_KINDS, "bf16", "frozen", "head alone", "tied", "offload", "compile", "recompute full")),
        (("bf16",), ("frozen", "head alone", "wide stream", "tied", "masked data")),
        (("context",), ("whole data", "long data", "masked data", "window")),
        (("accumulation",), (*_STAGES, "offload", "bf16")),
        (
            ("adapter",),
            (*_STAGES, *_KINDS, *_SCHEDULES, "bf16", "compile", "recompute full", "recompute selective"),
        ),
        (
            ("dora", "nf4"),
            ("shard", "tensor", "tensor with sequence", "zero 3", "bf16", "compile", "recompute full"),
        ),
        (("no pipeline",), ("bf16", "frozen", "head alone", "offload", "compile")),
    )
    for pair in product(some, others)
    if len(set(pair)) == 2 and set(pair) != {"tensor", "tensor with sequence"}
}
"""Features that rows must have together: a hole in the table itself no cover of it can see."""


def name_of(case: Case) -> str:
    """A row's name: the processes along each dimension, then its other features."""
    layout = case.layout
    kinds = {
        "copies": layout.replicate,
        "shards": layout.shard,
        layout.schedule: layout.pipeline,
        "context": layout.context,
        "tensor": layout.tensor,
    }
    words = [f"{kind}{count}" for kind, count in kinds.items() if count > 1] or ["one"]
    sizes = {
        "frozen",
        "head alone",
        "no pipeline",
        "replicate",
        "shard",
        "context",
        "tensor",
        f"pipeline {layout.schedule}",
    }
    words += [
        word.replace("tensor with ", "").replace(" ", "-") for word in features(case) if word not in sizes
    ]
    if case.frozen != "nothing":
        words.append(f"{case.frozen} frozen".replace(" ", "-"))
    return ",".join(words)


def pairs(case: Case) -> set[tuple[str, str]]:
    return set(combinations(features(case), 2))


def pairwise_cover(cases: Sequence[Case]) -> list[Case]:
    """Some of the cases in which every pair of features of all the cases is, `TRIPLES` among them: greedily the row with
    the most new pairs a process of its world (time grows so), the first of them where several are as good."""
    chosen: list[Case] = list(TRIPLES)
    missing: set[tuple[str, str]] = set().union(*map(pairs, cases)).difference(*map(pairs, chosen))
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing) / (1 + case.layout.world))
        chosen.append(best)
        missing -= pairs(best)
    return [case for case in cases if case in chosen]
