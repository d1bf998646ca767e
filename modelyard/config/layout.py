"""How the processes of a run share its work; no torch here, so that a layout is judged when the config is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Literal, cast

from modelyard.config.fp8 import fp8_problems
from modelyard.errors import UserError

if TYPE_CHECKING:  # the train step knows layouts, and no pydantic
    from modelyard.config.architecture import Architecture
    from modelyard.config.model import DistributedConfig
    from modelyard.config.train import TrainConfig

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"]
Recompute = Literal["none", "selective", "full"]
ZeroStage = Literal[1, 2, 3]

DIMENSIONS = ("replicate", "shard", "pipeline", "context", "tensor")
"""Outermost first: neighbours in rank share what needs the most communication (the order of arXiv 2407.21783, 3.3.2)."""

STAGES_PER_PROCESS: dict[Schedule, int] = {
    "gpipe": 1,
    "1f1b": 1,
    "interleaved": 2,
    "zero_bubble": 2,
    "zbv": 2,
}
"""Pipeline stages that a process has where the configuration says nothing."""
FIXED_STAGES: tuple[Schedule, ...] = ("gpipe", "1f1b", "zbv")
"""Schedules that are made for this many and no others."""
SPLIT_BACKWARD: tuple[Schedule, ...] = ("zero_bubble", "zbv")
"""Schedules that run the backward of inputs and of weights apart, which torch.compile's code cannot."""


@dataclass(frozen=True)
class Layout:
    """Processes along each dimension, and how the data-parallel ones share the model."""

    replicate: int = 1
    """Groups of data-parallel processes, each with a whole copy of the model."""
    shard: int = 1
    """Data-parallel processes that share one copy."""
    pipeline: int = 1
    """Processes that the layers are spread over."""
    context: int = 1
    """Processes that a row's tokens are spread over."""
    tensor: int = 1
    """Processes that each matrix is spread over."""
    sequence_parallel: bool = False
    """Whether tensor-parallel processes share the tokens between their matrices, too."""
    zero_stage: ZeroStage = 1
    """What the processes that share a copy keep only their part of: optimizer state and master weights (1), gradients
    between micro-batches too (2), weights between forward and backward too (3)."""
    offload: bool = False
    """Whether master weights, gradients and optimizer state live in the host's memory."""
    schedule: Schedule = "1f1b"
    stages_per_process: int = 1
    """Pipeline stages that each process has."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Processes along each of `DIMENSIONS`."""
        return tuple(getattr(self, name) for name in DIMENSIONS)

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.replicate * self.shard * self.pipeline * self.context * self.tensor

    @property
    def data(self) -> int:
        """Shares that the rows of a batch are dealt into."""
        return self.replicate * self.shard

    @property
    def stages(self) -> int:
        """Pipeline stages in all."""
        return self.pipeline * self.stages_per_process


Problem = tuple[str, str]
"""(key, what is wrong with it and what is possible)."""


def layout_of(config: TrainConfig, world: int) -> Layout:
    """The layout of `config` on `world` processes. Raises UserError with a line for each reason why there is none."""
    if problems := world_problems(config, world):
        raise UserError(*lines(problems))
    distributed, multi_stage = config.model.distributed, config.model.multi_stage
    pipeline = distributed.pipeline_parallel
    replicas = distributed.data_parallel_replicas
    return Layout(
        replicate=replicas,
        shard=world // (_model_processes(distributed) * replicas),
        pipeline=pipeline,
        context=distributed.sequence_data_parallel,
        tensor=distributed.tensor_parallel,
        sequence_parallel=distributed.sequence_tensor_parallel and distributed.tensor_parallel > 1,
        zero_stage=cast(ZeroStage, multi_stage.zero_stage or 1),
        offload=multi_stage.cpu_offload,
        # Without a pipeline there is nothing to schedule.
        schedule=distributed.pipeline_schedule if pipeline > 1 else "1f1b",
        stages_per_process=stages_per_process(distributed) if pipeline > 1 else 1,
    )


def lines(problems: Iterable[Problem]) -> list[str]:
    """Problems as people read them."""
    return [f"{key}: {problem}" for key, problem in problems]


def smallest_world(config: TrainConfig) -> int:
    """The number of processes of which the layout needs a multiple."""
    return _model_processes(config.model.distributed) * config.model.distributed.data_parallel_replicas


def stages_per_process(distributed: DistributedConfig) -> int:
    """Pipeline stages of each process, given or by default."""
    return distributed.stages_per_process or STAGES_PER_PROCESS[distributed.pipeline_schedule]


def splits_backward(distributed: DistributedConfig) -> bool:
    """Whether a pipeline runs the backward of inputs and of weights apart, so that nothing can be compiled."""
    return distributed.pipeline_parallel > 1 and distributed.pipeline_schedule in SPLIT_BACKWARD


def _model_processes(distributed: DistributedConfig) -> int:
    """Processes that compute one row together."""
    return distributed.tensor_parallel * distributed.pipeline_parallel * distributed.sequence_data_parallel


# What holds for any number of processes


def shape_problems(config: TrainConfig, architecture: Architecture | None) -> list[Problem]:
    """Why the model and its rows cannot be split as the config says; what needs the model's shape is left out without it."""
    problems = [*_row_problems(config), *_schedule_problems(config), *_offload_problems(config)]
    if architecture is not None:
        problems += [*_tensor_problems(config, architecture), *_layer_problems(config, architecture)]
    return problems + fp8_problems(config, architecture)


def _tensor_problems(config: TrainConfig, architecture: Architecture) -> Iterator[Problem]:
    key, processes = "model.distributed.tensor_parallel", config.model.distributed.tensor_parallel
    heads, groups = architecture.num_attention_heads, architecture.head_groups
    inner, vocabulary = architecture.ffn_hidden_size, architecture.vocab_size
    possible = f"sizes that work: {listed(divisors(gcd(heads, groups, inner)), processes)}"
    if heads % processes:
        yield key, f"{processes} processes cannot share num_attention_heads {heads} evenly; {possible}"
    if groups % processes:
        reason = "each needs its own keys and values, which are not replicated"
        yield key, f"{processes} processes cannot share head_groups {groups} evenly, and {reason}; {possible}"
    if inner % processes:
        yield key, f"{processes} processes cannot share ffn_hidden_size {inner} evenly; {possible}"
    if vocabulary % processes:
        padded = vocabulary + -vocabulary % processes
        fix = f"write model.base_model.vocab_size: {padded}, with rows that no token has"
        if config.pretrained is not None and config.pretrained.model_weights:
            sizes = divisors(gcd(heads, groups, inner, vocabulary))
            fix = f"the weights have so many rows; sizes that work: {listed(sizes, processes)}"
        yield key, f"{processes} processes cannot share vocab_size {vocabulary} evenly; {fix}"


def _row_problems(config: TrainConfig) -> Iterator[Problem]:
    distributed, length = config.model.distributed, config.batch.sequence_length
    factors = []
    if (context := distributed.sequence_data_parallel) > 1:
        factors.append((f"2 x sequence_data_parallel {context}", 2 * context))
    if distributed.sequence_tensor_parallel and distributed.tensor_parallel > 1:
        factors.append((f"tensor_parallel {distributed.tensor_parallel}", distributed.tensor_parallel))
    needed, words = 1, " x ".join(word for word, _ in factors)
    for _, size in factors:
        needed *= size
    if length % needed:
        product = words if words.endswith(f" {needed}") else f"{words} = {needed}"
        yield (
            "batch.sequence_length",
            f"{length} tokens are not a multiple of {product}; nearest that are: {multiples(length, needed)}",
        )


def _schedule_problems(config: TrainConfig) -> Iterator[Problem]:
    distributed = config.model.distributed
    schedule, given = distributed.pipeline_schedule, distributed.stages_per_process
    if distributed.pipeline_parallel == 1:
        return
    if given is not None and schedule in FIXED_STAGES and given != STAGES_PER_PROCESS[schedule]:
        free = [name for name in STAGES_PER_PROCESS if name not in FIXED_STAGES]
        yield (
            "model.distributed.stages_per_process",
            f"{given} with pipeline_schedule {schedule}, which is made for {STAGES_PER_PROCESS[schedule]}; "
            f"leave it out, or write pipeline_schedule: {' or '.join(free)}",
        )
    if splits_backward(distributed) and config.training.compile is True:
        yield (
            "training.compile",
            f"yes with pipeline_schedule {schedule}, which runs parts of the backward on their own, and compiled code "
            "cannot; write compile: no, or pipeline_schedule: interleaved or 1f1b",
        )


def _offload_problems(config: TrainConfig) -> Iterator[Problem]:
    kept = config.model.multi_stage
    if kept.offload_activations and kept.recompute != "full":
        yield (
            "model.multi_stage.offload_activations",
            f"yes with recompute: {kept.recompute}, which keeps more of a block than its input, and only that is offloaded; "
            "write recompute: full, or offload_activations: no",
        )


def _layer_problems(config: TrainConfig, architecture: Architecture) -> Iterator[Problem]:
    distributed, layers = config.model.distributed, architecture.num_layers
    pipeline, each = distributed.pipeline_parallel, stages_per_process(distributed)
    if pipeline == 1 or pipeline * each <= layers:
        return
    product = f"{pipeline} processes" + (f" x {each} stages" if each > 1 else "")
    most = layers // each
    fix = f"at most {most} work with {each} stage{'s' if each > 1 else ''} a process"
    if each > 1 and pipeline <= layers:
        fix += ", or write pipeline_schedule: 1f1b, with one"
    yield (
        "model.distributed.pipeline_parallel",
        f"{product} = {pipeline * each} stages need a layer each, and num_layers is {layers}; {fix}",
    )


# What depends on the number of processes


def world_problems(config: TrainConfig, world: int) -> list[Problem]:
    """Why `world` processes cannot be laid out as the config says."""
    distributed = config.model.distributed
    together, replicas = _model_processes(distributed), distributed.data_parallel_replicas
    if world % together:
        return [_world_problem(distributed, world, together)]
    data = world // together
    if data % replicas:
        return [
            (
                "model.distributed.data_parallel_replicas",
                f"{replicas} does not divide the {data} data-parallel process{'es' if data > 1 else ''} "
                f"({world} in all / {together}); that do: {listed(divisors(data), replicas)}",
            )
        ]
    return _batch_problems(config, data)


def _world_problem(distributed: DistributedConfig, world: int, together: int) -> Problem:
    sizes = {
        key: size
        for key in ("tensor_parallel", "pipeline_parallel", "sequence_data_parallel")
        if (size := getattr(distributed, key)) > 1
    }
    key = max(sizes, key=lambda key: sizes[key])
    product = " x ".join(f"{name} {size}" for name, size in sizes.items())
    product += f" = {together}" if len(sizes) > 1 else ""
    if world == 1:
        there = f"there is 1; start it with --nproc {together}, or torchrun --nproc_per_node={together}"
    else:
        there = f"there are {world}; nearest that are: {multiples(world, together)}"
    return f"model.distributed.{key}", f"{product} needs a multiple of {together} processes, and {there}"


def _batch_problems(config: TrainConfig, data: int) -> list[Problem]:
    batch = config.batch
    size, rows, sequential = batch.batch_size, batch.micro_batch_size, batch.sequential_micro_batches
    shares = f"{data} data-parallel processes" if data > 1 else "one process"
    if size % data:
        return [
            (
                "batch.batch_size",
                f"{size} rows cannot be dealt evenly to {shares}; possible: {_other_batches(config, data)}",
            )
        ]
    share = size // data
    if rows is not None and share % rows:
        possible = listed(divisors(share), rows)
        return [
            (
                "batch.micro_batch_size",
                f"{rows} does not divide the {share} rows that each of {shares} has of batch_size {size}; that do: {possible}",
            )
        ]
    if sequential is not None and share % sequential:
        possible = listed(divisors(share), sequential)
        return [
            (
                "batch.sequential_micro_batches",
                f"{sequential} does not divide the {share} rows that each of {shares} has of batch_size {size}; that do: {possible}",
            )
        ]
    if rows is not None and sequential is not None and rows * sequential != share:
        return [
            (
                "batch.sequential_micro_batches",
                f"{sequential} x micro_batch_size {rows} on {shares} is {rows * sequential * data} rows, and batch_size is {size}; "
                f"write sequential_micro_batches: {share // rows}, or leave it out",
            )
        ]
    return _micro_batch_problems(config, data)


def _other_batches(config: TrainConfig, data: int) -> str:
    """Batch sizes that so many data-parallel processes can share, and numbers of processes that can share this one."""
    sizes = multiples(config.batch.batch_size, data).replace(" and ", " or ")
    worlds = listed(possible_worlds(config), data * _model_processes(config.model.distributed))
    return f"batch_size {sizes}" + (f", or --nproc {worlds}" if worlds else "")


def possible_worlds(config: TrainConfig) -> list[int]:
    """All numbers of processes that can be laid out as the config says, in order."""
    together = _model_processes(config.model.distributed)
    worlds = [data * together for data in divisors(config.batch.batch_size)]
    return [world for world in worlds if not world_problems(config, world)]


def _micro_batch_problems(config: TrainConfig, data: int) -> list[Problem]:
    """Micro-batches that the pipeline's schedule cannot take."""
    distributed, batch = config.model.distributed, config.batch
    pipeline, schedule = distributed.pipeline_parallel, distributed.pipeline_schedule
    there = batch.micro_batches(data)
    if pipeline == 1 or takes(schedule, pipeline, there):
        return []
    share, rows = batch.batch_size // data, batch.micro_rows(data)
    possible = [size for size in divisors(share) if takes(schedule, pipeline, share // size)]
    if schedule == "1f1b":
        why = f"1f1b needs at least one for each of {pipeline} stages"
    else:
        why = f"{schedule} takes them in {there // pipeline} rounds of equal length"
    if not possible:
        unit = pipeline * data
        fix = f"nearest batch_size that works: {-(-batch.batch_size // unit) * unit}"
    elif batch.sequential_micro_batches is not None:
        fix = f"that work: {listed(sorted(share // size for size in possible), there)}"
        return [("batch.sequential_micro_batches", f"{_micro_batches(there)} a step, and {why}; {fix}")]
    else:
        fix = f"micro_batch_size that work: {listed(possible, rows)}"
    given = (
        f"{rows} of {share} rows make"
        if batch.micro_batch_size
        else f"all {share} rows at once, the default, make"
    )
    return [("batch.micro_batch_size", f"{given} {_micro_batches(there)} a step, and {why}; {fix}")]


def _micro_batches(count: int) -> str:
    return "1 micro-batch" if count == 1 else f"{count} micro-batches"


def takes(schedule: Schedule, pipeline: int, micro_batches: int) -> bool:
    """Whether torch's schedule works with so many micro-batches (its own rules, torch 2.11 and 2.13)."""
    if schedule == "1f1b":
        return micro_batches >= pipeline
    if schedule in ("interleaved", "zero_bubble"):
        return micro_batches % max(1, micro_batches // pipeline) == 0
    return True


def without_effect(config: TrainConfig) -> dict[str, str]:
    """Keys that are given and change nothing in this layout, and why."""
    distributed = config.model.distributed
    found = {}
    if distributed.sequence_tensor_parallel and distributed.tensor_parallel == 1:
        found["sequence_tensor_parallel"] = "there is no tensor parallelism to go with (tensor_parallel: 1)"
    if distributed.pipeline_parallel == 1:
        alone = "there is no pipeline (pipeline_parallel: 1)"
        if distributed.pipeline_schedule != "1f1b":
            found["pipeline_schedule"] = alone
        if distributed.stages_per_process is not None:
            found["stages_per_process"] = alone
    return {f"model.distributed.{key}": why for key, why in found.items()}


# Numbers near another


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def listed(sizes: list[int], near: int, most: int = 6) -> str:
    """The sizes nearest to a number, in order."""
    return ", ".join(map(str, sorted(sorted(sizes, key=lambda size: (abs(size - near), size))[:most])))


def multiples(number: int, divisor: int) -> str:
    """The multiples of `divisor` below and above a number."""
    below = number // divisor * divisor
    return f"{below} and {below + divisor}" if below else str(divisor)
