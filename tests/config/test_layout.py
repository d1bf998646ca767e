"""Every layout that is possible is found, and every other one refused with what is possible near by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelyard.config.layout import (
    FIXED_STAGES,
    STAGES_PER_PROCESS,
    Layout,
    divisors,
    layout_of,
    listed,
    multiples,
    possible_worlds,
    smallest_world,
    takes,
    world_problems,
)
from modelyard.config.loader import Loaded, load_config
from modelyard.errors import UserError
from tests.config.helpers import TINY, load_tiny, tiny_problems, write

SHAPE = (
    "model.base_model.transformer.num_layers=8",
    "model.base_model.transformer.num_attention_heads=8",
    "model.base_model.transformer.head_groups=4",
    "model.base_model.transformer.ffn_hidden_size=96",
    "batch.batch_size=32",
)


def overrides(**keys: Any) -> list[str]:
    """`tensor_parallel=2` and the like, as on the command line; what is of another section is named in full."""
    sections = {"zero_stage": "multi_stage", "cpu_offload": "multi_stage", "recompute": "multi_stage"}
    words = []
    for key, value in keys.items():
        name = key.replace("__", ".")
        if "." not in name:
            name = f"model.{sections.get(key, 'distributed')}.{key}"
        words.append(f"{name}={value}")
    return words


def load(folder: Path, **keys: Any) -> Loaded:
    return load_tiny(folder, *SHAPE, *overrides(**keys))


ONE_OF_EACH = {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_data_parallel": 2}

POSSIBLE: list[tuple[dict[str, Any], int, Layout]] = [
    ({}, 1, Layout()),
    ({}, 4, Layout(shard=4)),
    ({"zero_stage": 2}, 4, Layout(shard=4, zero_stage=2)),
    ({"zero_stage": 3, "cpu_offload": "yes"}, 2, Layout(shard=2, zero_stage=3, offload=True)),
    ({"data_parallel_replicas": 2}, 8, Layout(replicate=2, shard=4)),
    ({"data_parallel_replicas": 4}, 4, Layout(replicate=4, shard=1)),
    ({"tensor_parallel": 4}, 4, Layout(tensor=4)),
    ({"tensor_parallel": 2}, 8, Layout(shard=4, tensor=2)),
    (
        {"tensor_parallel": 2, "sequence_tensor_parallel": "yes"},
        2,
        Layout(tensor=2, sequence_parallel=True),
    ),
    ({"sequence_tensor_parallel": "yes"}, 2, Layout(shard=2)),
    ({"sequence_data_parallel": 4}, 8, Layout(shard=2, context=4)),
    ({"pipeline_parallel": 4, "batch__micro_batch_size": 1}, 8, Layout(shard=2, pipeline=4)),
    ({"pipeline_parallel": 4, "batch__micro_batch_size": 8}, 4, Layout(pipeline=4)),
    ({"pipeline_parallel": 2, "pipeline_schedule": "gpipe"}, 2, Layout(pipeline=2, schedule="gpipe")),
    (
        {"pipeline_parallel": 2, "pipeline_schedule": "interleaved", "batch__micro_batch_size": 4},
        2,
        Layout(pipeline=2, schedule="interleaved", stages_per_process=2),
    ),
    (
        {"pipeline_parallel": 2, "pipeline_schedule": "zero_bubble", "stages_per_process": 4},
        2,
        Layout(pipeline=2, schedule="zero_bubble", stages_per_process=4),
    ),
    (
        {"pipeline_parallel": 2, "pipeline_schedule": "zero_bubble", "stages_per_process": 1},
        2,
        Layout(pipeline=2, schedule="zero_bubble"),
    ),
    (
        {"pipeline_parallel": 4, "pipeline_schedule": "zbv", "stages_per_process": 2},
        4,
        Layout(pipeline=4, schedule="zbv", stages_per_process=2),
    ),
    # Without a pipeline there is no schedule, whatever is written.
    ({"pipeline_schedule": "zbv", "stages_per_process": 3}, 2, Layout(shard=2)),
    (
        ONE_OF_EACH | {"data_parallel_replicas": 2, "batch__micro_batch_size": 2},
        32,
        Layout(replicate=2, shard=2, pipeline=2, context=2, tensor=2),
    ),
    ({"batch__sequential_micro_batches": 4}, 8, Layout(shard=8)),
    ({"batch__micro_batch_size": 2, "batch__sequential_micro_batches": 4}, 4, Layout(shard=4)),
    # compile: auto goes with every schedule, and yes with most.
    ({"pipeline_parallel": 2, "pipeline_schedule": "gpipe", "training__compile": "yes"}, 2, Layout(pipeline=2, schedule="gpipe")),
    ({"recompute": "selective"}, 2, Layout(shard=2)),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "world", "layout"), POSSIBLE, ids=lambda value: str(value)[:60])
def test_a_layout(tmp_path: Path, keys: dict[str, Any], world: int, layout: Layout) -> None:
    config = load(tmp_path, **keys).train
    assert layout_of(config, world) == layout
    assert layout.world == world
    assert world % smallest_world(config) == 0
    assert config.batch.micro_batches(layout.data) * config.batch.micro_rows(layout.data) * layout.data == 32


def test_sizes() -> None:
    layout = Layout(replicate=2, shard=3, pipeline=5, context=7, tensor=11, stages_per_process=2)
    assert (layout.sizes, layout.world, layout.data, layout.stages) == ((2, 3, 5, 7, 11), 2310, 6, 10)


T, P, C = "tensor_parallel", "pipeline_parallel", "sequence_data_parallel"
D = "model.distributed"

FOR_ANY_WORLD: list[tuple[dict[str, Any], str]] = [
    (
        {T: 16},
        f"{D}.{T}: 16 processes cannot share num_attention_heads 8 evenly; sizes that work: 1, 2, 4",
    ),
    (
        {T: 8},
        f"{D}.{T}: 8 processes cannot share head_groups 4 evenly, and each needs its own keys and values, which are not "
        "replicated; sizes that work: 1, 2, 4",
    ),
    (
        {T: 4, "model__base_model__transformer__ffn_hidden_size": 90},
        f"{D}.{T}: 4 processes cannot share ffn_hidden_size 90 evenly; sizes that work: 1, 2",
    ),
    (
        {T: 4, "model__base_model__vocab_size": 509},
        f"{D}.{T}: 4 processes cannot share vocab_size 509 evenly; write model.base_model.vocab_size: 512, with rows that "
        "no token has",
    ),
    (
        {C: 3},
        "batch.sequence_length: 64 tokens are not a multiple of 2 x sequence_data_parallel 3 = 6; nearest that are: 60 and 66",
    ),
    (
        {T: 4, "sequence_tensor_parallel": "yes", "batch__sequence_length": 66},
        "batch.sequence_length: 66 tokens are not a multiple of tensor_parallel 4; nearest that are: 64 and 68",
    ),
    (
        {T: 4, C: 4, "sequence_tensor_parallel": "yes", "batch__sequence_length": 72},
        "batch.sequence_length: 72 tokens are not a multiple of 2 x sequence_data_parallel 4 x tensor_parallel 4 = 32; "
        "nearest that are: 64 and 96",
    ),
    (
        {P: 9, "batch__micro_batch_size": 1},
        f"{D}.{P}: 9 processes = 9 stages need a layer each, and num_layers is 8; at most 8 work with 1 stage a process",
    ),
    (
        {P: 5, "pipeline_schedule": "zbv"},
        f"{D}.{P}: 5 processes x 2 stages = 10 stages need a layer each, and num_layers is 8; at most 4 work with 2 stages a "
        "process, or write pipeline_schedule: 1f1b, with one",
    ),
    (
        {P: 4, "pipeline_schedule": "interleaved", "stages_per_process": 3},
        f"{D}.{P}: 4 processes x 3 stages = 12 stages need a layer each, and num_layers is 8; at most 2 work with 3 stages a "
        "process, or write pipeline_schedule: 1f1b, with one",
    ),
    (
        {P: 2, "stages_per_process": 2},
        f"{D}.stages_per_process: 2 with pipeline_schedule 1f1b, which is made for 1; leave it out, or write "
        "pipeline_schedule: interleaved or zero_bubble",
    ),
    (
        {P: 2, "stages_per_process": 3, "pipeline_schedule": "zbv"},
        f"{D}.stages_per_process: 3 with pipeline_schedule zbv, which is made for 2; leave it out, or write "
        "pipeline_schedule: interleaved or zero_bubble",
    ),
    *(
        (
            {P: 2, "pipeline_schedule": schedule, "training__compile": "yes"},
            f"training.compile: yes with pipeline_schedule {schedule}, which runs parts of the backward on their own, and "
            "compiled code cannot; write compile: no, or pipeline_schedule: interleaved or 1f1b",
        )
        for schedule in ("zero_bubble", "zbv")
    ),
    *(
        (
            {"recompute": mode, "model__multi_stage__offload_activations": "yes"},
            f"model.multi_stage.offload_activations: yes with recompute: {mode}, which keeps more of a block than its input, and "
            "only that is offloaded; write recompute: full, or offload_activations: no",
        )
        for mode in ("none", "selective")
    ),
]


@pytest.mark.parametrize(("keys", "problem"), FOR_ANY_WORLD, ids=lambda value: str(value)[:60])
def test_refused_for_any_number_of_processes(tmp_path: Path, keys: dict[str, Any], problem: str) -> None:
    words = [*SHAPE, *overrides(**keys)]
    problems = tiny_problems(tmp_path, *words)
    key = problem.partition(": ")[0]
    place = next(
        (f"override {n}" for n, word in enumerate(words, 1) if word.startswith(key + "=")), "config.yaml:2"
    )
    assert f"{place}: {problem}" in problems


def test_a_vocabulary_of_weights_stays_as_it_is(tmp_path: Path) -> None:
    """Padding is no way out where the matrix is read from a file."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 510, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    import json

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    text = TINY[: TINY.index("model:")] + "run: {experiment_dir: x}\n"
    words = [f"pretrained.path={tmp_path / 'model'}", "model.distributed.tensor_parallel=4"]
    with pytest.raises(UserError) as raised:
        load_config([write(tmp_path, text)], words)
    assert raised.value.problems == [
        "override 2: model.distributed.tensor_parallel: 4 processes cannot share vocab_size 510 evenly; the weights have so "
        "many rows; sizes that work: 1, 2"
    ]


FOR_SOME_WORLDS: list[tuple[dict[str, Any], int, str]] = [
    (
        {T: 4, P: 2, "batch__micro_batch_size": 1},
        12,
        f"{D}.{T}: tensor_parallel 4 x pipeline_parallel 2 = 8 needs a multiple of 8 processes, and there are 12; nearest "
        "that are: 8 and 16",
    ),
    (
        {C: 4},
        1,
        f"{D}.{C}: sequence_data_parallel 4 needs a multiple of 4 processes, and there is 1; start it with --nproc 4, or "
        "torchrun --nproc_per_node=4",
    ),
    ({P: 2}, 3, f"{D}.{P}: pipeline_parallel 2 needs a multiple of 2 processes, and there are 3; nearest that are: 2 and 4"),
    (
        {"data_parallel_replicas": 3, T: 2},
        8,
        f"{D}.data_parallel_replicas: 3 does not divide the 4 data-parallel processes (8 in all / 2); that do: 1, 2, 4",
    ),
    (
        {"data_parallel_replicas": 2},
        1,
        f"{D}.data_parallel_replicas: 2 does not divide the 1 data-parallel process (1 in all / 1); that do: 1",
    ),
    (
        {},
        6,
        "batch.batch_size: 32 rows cannot be dealt evenly to 6 data-parallel processes; possible: batch_size 30 or 36, or "
        "--nproc 1, 2, 4, 8, 16, 32",
    ),
    (
        {"batch__batch_size": 8},
        16,
        "batch.batch_size: 8 rows cannot be dealt evenly to 16 data-parallel processes; possible: batch_size 16, or --nproc "
        "1, 2, 4, 8",
    ),
    (
        # Not 64: each of 16 would have two rows, for four stages.
        {P: 4, "batch__micro_batch_size": 1},
        24,
        "batch.batch_size: 32 rows cannot be dealt evenly to 6 data-parallel processes; possible: batch_size 30 or 36, or "
        "--nproc 4, 8, 16, 32",
    ),
    (
        {"batch__micro_batch_size": 8},
        8,
        "batch.micro_batch_size: 8 does not divide the 4 rows that each of 8 data-parallel processes has of batch_size 32; "
        "that do: 1, 2, 4",
    ),
    (
        {"batch__sequential_micro_batches": 16},
        4,
        "batch.sequential_micro_batches: 16 does not divide the 8 rows that each of 4 data-parallel processes has of "
        "batch_size 32; that do: 1, 2, 4, 8",
    ),
    (
        {"batch__micro_batch_size": 2, "batch__sequential_micro_batches": 4},
        8,
        "batch.sequential_micro_batches: 4 x micro_batch_size 2 on 8 data-parallel processes is 64 rows, and batch_size is "
        "32; write sequential_micro_batches: 2, or leave it out",
    ),
    (
        {"batch__micro_batch_size": 2, "batch__sequential_micro_batches": 4},
        1,
        "batch.sequential_micro_batches: 4 x micro_batch_size 2 on one process is 8 rows, and batch_size is 32; write "
        "sequential_micro_batches: 16, or leave it out",
    ),
    (
        {P: 4, "batch__micro_batch_size": 8},
        8,
        "batch.micro_batch_size: 8 of 16 rows make 2 micro-batches a step, and 1f1b needs at least one for each of 4 stages; "
        "micro_batch_size that work: 1, 2, 4",
    ),
    (
        {P: 4},
        4,
        "batch.micro_batch_size: all 32 rows at once, the default, make 1 micro-batch a step, and 1f1b needs at least one for "
        "each of 4 stages; "
        "micro_batch_size that work: 1, 2, 4, 8",
    ),
    (
        {P: 8},
        64,
        "batch.micro_batch_size: all 4 rows at once, the default, make 1 micro-batch a step, and 1f1b needs at least one for "
        "each of 8 stages; "
        "nearest batch_size that works: 64",
    ),
    (
        {P: 4, "batch__sequential_micro_batches": 2},
        8,
        "batch.sequential_micro_batches: 2 micro-batches a step, and 1f1b needs at least one for each of 4 stages; that work: "
        "4, 8, 16",
    ),
    (
        {P: 3, "pipeline_schedule": "interleaved", "batch__micro_batch_size": 2},
        3,
        "batch.micro_batch_size: 2 of 32 rows make 16 micro-batches a step, and interleaved takes them in 5 rounds of equal "
        "length; micro_batch_size that work: 4, 8, 16, 32",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "world", "problem"), FOR_SOME_WORLDS, ids=lambda value: str(value)[:60])
def test_refused_for_this_number_of_processes(
    tmp_path: Path, keys: dict[str, Any], world: int, problem: str
) -> None:
    loaded = load(tmp_path, **keys)
    with pytest.raises(UserError) as raised:
        layout_of(loaded.train, world)
    assert raised.value.problems == [problem]
    words = [*SHAPE, *overrides(**keys)]
    key = problem.partition(": ")[0]
    places = [f"override {n}" for n, word in enumerate(words, 1) if word.startswith(key + "=")]
    place = places[-1] if places else "override 5"  # the section
    assert loaded.placed(world_problems(loaded.train, world)) == [f"{place}: {problem}"]


def test_what_is_written_and_changes_nothing(tmp_path: Path) -> None:
    keys = {"sequence_tensor_parallel": "yes", "pipeline_schedule": "zbv", "stages_per_process": 2}
    assert [(row.key, row.why) for row in load(tmp_path, **keys).without_effect] == [
        (f"{D}.sequence_tensor_parallel", "there is no tensor parallelism to go with (tensor_parallel: 1)"),
        (f"{D}.pipeline_schedule", "there is no pipeline (pipeline_parallel: 1)"),
        (f"{D}.stages_per_process", "there is no pipeline (pipeline_parallel: 1)"),
    ]
    keys |= {T: 2, P: 2}
    assert load(tmp_path, **keys).without_effect == []


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("model.multi_stage.zero_stage=4", "expected a number of at most 3"),
        ("model.multi_stage.zero_stage=0", "expected a number of at least 1"),
        ("model.multi_stage.zero_stage=yes", "expected a whole number"),
        ("model.multi_stage.recompute=ful", "expected one of none, selective, full; did you mean 'full'?"),
        (f"{D}.pipeline_schedule=1f1", "gpipe, 1f1b, interleaved, zero_bubble, zbv; did you mean '1f1b'?"),
        (f"{D}.tensor_parallel=0", "expected a number above 0"),
        (f"{D}.timeout=0", "expected a number above 0"),
        (f"{D}.backend=mpi", "expected one of auto, gloo, nccl"),
    ],
)
def test_values_that_are_none(tmp_path: Path, key: str, allowed: str) -> None:
    (problem,) = tiny_problems(tmp_path, key)
    assert problem.startswith(f"override 1: {key.partition('=')[0]} = ")
    assert problem.endswith(allowed)


def test_several_problems_at_once(tmp_path: Path) -> None:
    problems = tiny_problems(tmp_path, *SHAPE, *overrides(tensor_parallel=3, sequence_data_parallel=5))
    assert [problem.split(": ")[1] for problem in problems] == ["batch.sequence_length", *[f"{D}.{T}"] * 3]


def test_numbers_of_processes_that_are_possible(tmp_path: Path) -> None:
    """Of the divisors of 12 rows, times the processes that compute a row together."""

    def worlds(**keys: Any) -> list[int]:
        return possible_worlds(load_tiny(tmp_path, *SHAPE, *overrides(batch__batch_size=12, **keys)).train)

    assert worlds() == [1, 2, 3, 4, 6, 12]
    assert worlds(tensor_parallel=2) == [2, 4, 6, 8, 12, 24]
    assert worlds(tensor_parallel=2, data_parallel_replicas=2) == [4, 8, 12, 24]
    assert worlds(batch__micro_batch_size=2) == [1, 2, 3, 6]
    assert worlds(pipeline_parallel=4) == []  # all rows at once are too few micro-batches


def test_numbers_near_another() -> None:
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
    assert divisors(1) == [1]
    assert listed(divisors(5040), 30) == "21, 24, 28, 30, 35, 36"
    assert [multiples(10, 4), multiples(3, 8), multiples(8, 8)] == ["8 and 12", "8", "8 and 16"]


@pytest.mark.parametrize("pipeline", [2, 3, 4])
def test_micro_batches_that_a_schedule_takes(pipeline: int) -> None:
    """Torch's own schedules are asked, as one of `pipeline` processes would that never talk."""
    import torch
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, schedules
    from torch.testing._internal.distributed.fake_pg import FakeStore

    classes: dict[Any, Any] = {
        "gpipe": schedules.ScheduleGPipe,
        "1f1b": schedules.Schedule1F1B,
        "interleaved": schedules.ScheduleInterleaved1F1B,
        "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
        "zbv": schedules.ScheduleZBVZeroBubble,
    }
    dist.init_process_group("fake", rank=0, world_size=pipeline, store=FakeStore())
    try:
        for name, schedule in classes.items():
            each = STAGES_PER_PROCESS[name]
            places = [0, 2 * pipeline - 1] if name == "zbv" else [k * pipeline for k in range(each)]
            cpu, module = torch.device("cpu"), torch.nn.Identity()
            stages: Any = [PipelineStage(module, place, pipeline * each, cpu) for place in places]
            for count in range(1, 13):
                try:
                    schedule(
                        stages if each > 1 else stages[0], count, loss_fn=lambda *_: None, scale_grads=False
                    )
                    possible = True
                except ValueError:
                    possible = False
                assert takes(name, pipeline, count) is possible, (name, count)
            fixed = each > 1 and name in FIXED_STAGES
            if fixed:
                with pytest.raises(ValueError, match="exactly 2 stages"):
                    schedule(stages[:1], 4, loss_fn=lambda *_: None, scale_grads=False)
    finally:
        dist.destroy_process_group()
