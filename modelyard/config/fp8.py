"""Whether a config's matrices can be multiplied in fp8 (`training.fp8`). No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the train step knows layouts, which ask here, and no pydantic
    from modelyard.config.architecture import Architecture
    from modelyard.config.train import TrainConfig

MULTIPLE = 16
"""Of what every dimension that is summed along, and every width of a result, must be a multiple: what GPUs multiply in fp8
(torch._scaled_mm). The same holds where it is emulated, so that a file that works on a CPU works on a GPU."""


def fp8_problems(config: TrainConfig, architecture: Architecture | None) -> list[tuple[str, str]]:
    """(key, why `training.fp8` is not possible with it); what needs the model's shape is left out without it."""
    wanted = config.training.fp8
    if wanted == "none":
        return []
    distributed, dtype = config.model.distributed, config.model.distributed.training_dtype
    problems = []
    if dtype != "bfloat16":
        problems.append(
            f"{wanted} with model.distributed.training_dtype {dtype}: what is not in fp8 is to be in bfloat16; write "
            "training_dtype: bf16"
        )
    if config.model.base_model.transformer.peft.type != "none":
        problems.append(
            f"{wanted} with an adapter (model.base_model.transformer.peft.type), whose matrices are computed in another way; "
            "write fp8: none"
        )
    processes, context = distributed.tensor_parallel, distributed.sequence_data_parallel
    tokens = config.batch.sequence_length
    if tokens % (MULTIPLE * context):
        problems.append(
            f"{wanted} sums over the tokens of rows, and batch.sequence_length {tokens} is not a multiple of "
            f"{_product(MULTIPLE, 'sequence_data_parallel', context)}"
        )
    if architecture is not None:
        widths = {
            "hidden_size": (architecture.hidden_size, 1),
            "num_attention_heads x head_size": (
                architecture.num_attention_heads * architecture.head_size,
                processes,
            ),
            "head_groups x head_size": (architecture.head_groups * architecture.head_size, processes),
            "ffn_hidden_size": (architecture.ffn_hidden_size, processes),
        }
        problems += [
            f"{wanted} needs widths that are multiples of {_product(MULTIPLE, 'tensor_parallel', cut)}, and {name} is {width}"
            for name, (width, cut) in widths.items()
            if width % (MULTIPLE * cut)
        ]
    return [("training.fp8", problem) for problem in problems]


def _product(number: int, name: str, factor: int) -> str:
    return str(number) if factor == 1 else f"{number} x {name} {factor} = {number * factor}"
