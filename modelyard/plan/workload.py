"""What one optimizer step computes and how it is laid out: all that the planner's formulas ask of a configuration. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from modelyard.config.adapter import Adapter
from modelyard.config.architecture import Architecture
from modelyard.config.layout import Layout, Recompute, layout_of, splits_backward
from modelyard.parallel.stages import split_layers, stages_of

if TYPE_CHECKING:  # the formulas need no pydantic
    from modelyard.config.train import TrainConfig

WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""


@dataclass(frozen=True)
class Workload:
    """One optimizer step of a model in a layout."""

    architecture: Architecture
    layout: Layout
    batch_rows: int
    """Rows of the whole step, over all processes."""
    micro_rows: int
    """Rows of one forward and backward of one data-parallel process."""
    sequence_length: int
    dtype: str = "bfloat16"
    """What is computed with; a key of `WIDTHS`."""
    recompute: Recompute = "none"
    document_length: float | None = None
    """Mean length of the documents that attention keeps apart, in tokens; None: a row is one document."""
    compiled: bool = False
    on_gpu: bool = False
    """Whether a GPU computes; chunks of the loss are larger there."""
    optimizer_state: Literal["float32", "8bit"] = "float32"
    offload_activations: bool = False
    cross_entropy: str = "auto"
    """`auto`, `fused` or `torch`."""
    adapter: Adapter | None = None
    frozen: frozenset[str] = frozenset()
    """Logical parameters without a gradient, the adapter's base among them."""

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return WIDTHS[self.dtype]

    @property
    def master_width(self) -> int:
        """Bytes of a number that the optimizer keeps."""
        return 8 if self.dtype == "float64" else 4

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes of each process in a step."""
        return self.batch_rows // (self.layout.data * self.micro_rows)

    @property
    def tokens(self) -> int:
        """Of one micro-batch on one process: its rows' share of it along `context`; with sequence parallelism the
        residual stream has 1 / tensor of them."""
        return self.micro_rows * self.sequence_length // self.layout.context

    @property
    def step_tokens(self) -> int:
        """Of the whole step."""
        return self.batch_rows * self.sequence_length

    @cached_property
    def stage_layers(self) -> list[range]:
        """The layers of each pipeline stage, as they will be split."""
        return split_layers(self.architecture, self.layout.stages, self.sequence_length)

    def stages_at(self, place: int) -> list[int]:
        """The stages of the process at `place` along the pipeline."""
        return [0] if self.layout.pipeline == 1 else stages_of(place, self.layout)


def workload_of(
    config: TrainConfig,
    architecture: Architecture,
    world: int,
    *,
    on_gpu: bool,
    document_length: float | None = None,
) -> Workload:
    """What a step of `config` is on `world` processes. Raises UserError where there is no such layout.

    `on_gpu`: what is decided by the device, as `training.compile: auto` is. Where documents do not see each other,
    `document_length` is their mean length in tokens; None takes a row for one document, which is the most work.
    """
    from modelyard.config.peft import adapter_of
    from modelyard.config.scales import rate_scales

    layout = layout_of(config, world)
    multi_stage = config.model.multi_stage
    default = config.optimizer.default_learning_rate_scale
    scales = rate_scales(config.model.base_model, architecture, 1.0 if default is None else default)
    compiled = config.training.compile
    if compiled == "auto":
        compiled = on_gpu and not splits_backward(config.model.distributed)
    isolated = not config.batch.cross_document_attention
    return Workload(
        architecture,
        layout,
        batch_rows=config.batch.batch_size,
        micro_rows=config.batch.micro_rows(layout.data),
        sequence_length=config.batch.sequence_length,
        dtype=config.model.distributed.training_dtype,
        recompute=multi_stage.recompute,
        document_length=document_length if isolated else None,
        compiled=compiled,
        on_gpu=on_gpu,
        optimizer_state=config.optimizer.state,
        offload_activations=multi_stage.offload_activations,
        cross_entropy=config.model.base_model.cross_entropy_impl,
        adapter=adapter_of(config.model.base_model.transformer.peft),
        frozen=frozenset(name for name, scale in scales.items() if scale == 0),
    )
