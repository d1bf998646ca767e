"""What `modelyard validate` says of a layout: which processes there are, and what each of them has. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard.config.architecture import Architecture
from modelyard.config.disk import size
from modelyard.config.layout import Layout, listed
from modelyard.config.train import TrainConfig
from modelyard.parallel.stages import split_layers, stages_of

Rows = list[tuple[str, str]]

_WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
"""Bytes of a number."""
_RECOMPUTED = {
    "selective": "in the backward, all activations but those of matrix products and attention",
    "full": "in the backward, every block from its input on",
}


def layout_rows(
    config: TrainConfig, architecture: Architecture | None, layout: Layout, possible: Sequence[int] = ()
) -> Rows:
    """Name and text of each line; `possible`: the numbers of processes to choose from, where there is still a choice."""
    rows = [("processes", _processes(layout, possible)), ("data", _data(config, layout))]
    if layout.pipeline > 1:
        rows.append(("pipeline", _pipeline(layout)))
        if architecture is not None:
            rows += _stages(config, architecture, layout)
    if layout.context > 1:
        length = config.batch.sequence_length
        tokens = f"{length // layout.context:,} of {length:,} tokens each, in two stretches"
        rows.append(("context", f"{layout.context} share each row: {tokens}"))
    if layout.tensor > 1:
        between = ", and the tokens in between" if layout.sequence_parallel else ""
        rows.append(("tensor", f"{layout.tensor} share each matrix{between}"))
    if layout.world > 1:
        rows.append((f"ZeRO {layout.zero_stage}", _zero(layout)))
    if layout.offload:
        rows.append(("in host memory", "master weights, gradients and optimizer state"))
    if config.model.multi_stage.recompute != "none":
        rows.append(("computed again", _RECOMPUTED[config.model.multi_stage.recompute]))
    if config.model.multi_stage.offload_activations:
        rows.append(("offloaded", _offloaded(config, architecture, layout)))
    return rows


def layout_line(layout: Layout) -> str:
    """The layout in one line, as records keep it."""
    if layout.world == 1:
        return "1 process"
    return f"{layout.world} processes = {_product(layout)}, zero_stage {layout.zero_stage}"


def _processes(layout: Layout, possible: Sequence[int]) -> str:
    if layout.world == 1:
        return "1 (--nproc N shows what another number does)"
    near = listed(list(possible), layout.world)
    choice = f" ({near} processes are possible)" if len(possible) > 1 else ""
    return f"{layout.world} = {_product(layout)}{choice}"


def _product(layout: Layout) -> str:
    sizes = {
        "data": layout.data,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "tensor": layout.tensor,
    }
    return " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1)


def _data(config: TrainConfig, layout: Layout) -> str:
    batch = config.batch
    count, rows = batch.micro_batches(layout.data), batch.micro_rows(layout.data)
    micro = f"{count:,} micro-batches of {rows:,}" if count > 1 else "one micro-batch"
    if layout.data == 1:
        return f"all {batch.batch_size:,} rows of a step, in {micro}"
    each = f"{batch.batch_size // layout.data:,} of {batch.batch_size:,} each"
    return f"{layout.data} share the rows of a step: {each}, in {micro}"


def _pipeline(layout: Layout) -> str:
    each = (
        f", {layout.stages_per_process} of {layout.stages} stages each"
        if layout.stages_per_process > 1
        else ""
    )
    return f"{layout.pipeline} share the layers{each}, as {layout.schedule} has it"


def _offloaded(config: TrainConfig, architecture: Architecture | None, layout: Layout) -> str:
    text = "from a GPU, every block's input, to the host's memory until the backward"
    if architecture is None:
        return text
    stages = split_layers(architecture, layout.stages, config.batch.sequence_length)
    # The last block of all keeps its own.
    each = [len(layers) - (layers.stop == architecture.num_layers) for layers in stages]
    most = max(sum(each[s] for s in stages_of(place, layout)) for place in range(layout.pipeline))
    tokens = config.batch.micro_rows(layout.data) * config.batch.sequence_length // layout.context
    if layout.sequence_parallel:
        tokens //= layout.tensor
    width = _WIDTHS[config.model.distributed.training_dtype]
    if architecture.full_precision_residual:
        width = max(width, 4)
    there = size(most * tokens * architecture.hidden_size * width)
    return f"{text}: {there} a process for each micro-batch on its way; on a CPU nothing changes"


def _stages(config: TrainConfig, architecture: Architecture, layout: Layout) -> Rows:
    ranges = split_layers(architecture, layout.stages, config.batch.sequence_length)

    def words(stage: int) -> str:
        layers = ranges[stage]
        text = f"layers {layers[0]}-{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        return ("embedding, " if stage == 0 else "") + text + (", head" if stage == layout.stages - 1 else "")

    return [
        (f"  {place}", "; ".join(words(stage) for stage in stages_of(place, layout)))
        for place in range(layout.pipeline)
    ]


def _zero(layout: Layout) -> str:
    parts = layout.shard * layout.context
    if parts == 1 and layout.replicate > 1:
        each = layout.pipeline * layout.tensor
        where = "whole in one process" if each == 1 else f"on {each} processes"
        return f"nothing to share: {layout.replicate} copies of the model, each {where}"
    if parts == 1:
        return "nothing to share: no two processes have the same weights and other tokens"
    kept = ["optimizer state and master weights"]
    if layout.zero_stage > 1:
        kept.append("gradients between micro-batches")
    if layout.zero_stage > 2:
        kept.append("weights between forward and backward")
    copies = f"; {layout.replicate} copies of the model" if layout.replicate > 1 else ""
    return f"each keeps 1/{parts} of {', '.join(kept)}{copies}"
