"""`model.base_model.transformer.peft`: low-rank adapters beside, or in place of, training every weight. No torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from modelyard.config.adapter import LAYERS, MODULES, Adapter, Quantization, block_matrices
from modelyard.config.architecture import Architecture
from modelyard.config.base import Section
from modelyard.errors import did_you_mean


class PeftConfig(Section):
    """Low-rank adapters: small matrices that are trained beside those of the blocks, which keep their values."""

    type: Literal["none", "lora"] = "none"
    """`lora`: adapters as in arXiv 2106.09685; `none`: every weight is trained."""
    rank: int = Field(default=8, gt=0)
    """Rows of the small matrices: numbers that an adapter passes on for each token."""
    alpha: float = Field(default=8.0, gt=0)
    """What an adapter gives is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are left out in training: the same ones however processes share the work."""
    layers: list[str] = Field(default_factory=lambda: ["query", "value"])
    """Which matrices have an adapter: query, key, value, key_value, dense (the attention's output), mlp_1 (gate and up),
    mlp_2 (down), or all. All of them learn most."""
    freeze_others: bool = True
    """Whether everything else keeps its values: no gradient, no optimizer state, not in checkpoints."""
    rank_stabilized: bool = False
    """Divide alpha by the root of the rank instead (rsLoRA, arXiv 2312.03732), for ranks above 64 or so."""
    dora: bool = False
    """Learn the length of each row of a matrix apart from its direction (DoRA, arXiv 2402.09353)."""
    quantization: Literal["none", "nf4"] = "none"
    """How the frozen matrices of the blocks are kept: nf4 takes about 4.5 bits a weight (QLoRA, arXiv 2305.14314)."""
    quantization_block: int = Field(default=64, gt=0)
    """nf4: weights that share a scale."""
    double_quantization: bool = False
    """nf4: keep scales in 8 bits too, about 4.1 bits a weight."""

    @model_validator(mode="before")
    @classmethod
    def _type_is_said(cls, values: Any) -> Any:
        if isinstance(values, dict) and values and "type" not in values:
            raise ValueError(
                "without a type every weight is trained; write type: lora, or type: none to say so"
            )
        return values

    @field_validator("type", mode="before")
    @classmethod
    def _kinds_of_lora(cls, value: Any) -> Any:
        if isinstance(value, str) and (keys := _KINDS.get(value.lower())):
            raise ValueError(f"'{value}' is a kind of lora; write type: lora, {keys}")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


_KINDS = {
    "dora": "dora: yes",
    "rslora": "rank_stabilized: yes",
    "qlora": "quantization: nf4",
    "qdora": "dora: yes, quantization: nf4",
}
_WORD_OF = {module: word for word, modules in LAYERS.items() for module in modules if word != "key_value"}


def modules_of(peft: PeftConfig) -> tuple[str, ...]:
    """The matrices that `layers` means, in the model's order."""
    if "all" in peft.layers:
        return MODULES
    wanted = {module for layer in peft.layers for module in LAYERS.get(layer, ())}
    return tuple(module for module in MODULES if module in wanted)


def adapter_of(peft: PeftConfig) -> Adapter | None:
    """The adapter of a resolved section that has no `peft_problems`; None where every weight is trained."""
    if peft.type == "none":
        return None
    quantization = None
    if peft.quantization == "nf4":
        quantization = Quantization(peft.quantization_block, peft.double_quantization)
    return Adapter(
        rank=peft.rank,
        alpha=peft.alpha,
        modules=modules_of(peft),
        dropout=peft.dropout,
        rank_stabilized=peft.rank_stabilized,
        dora=peft.dora,
        freeze_others=peft.freeze_others,
        quantization=quantization,
    )


def adapter_words(adapter: Adapter) -> str:
    """An adapter as one reads it: `LoRA of rank 8 on q_proj, v_proj`."""
    where = "every matrix of the blocks" if adapter.modules == MODULES else ", ".join(adapter.modules)
    return f"{_kind(adapter)} of rank {adapter.rank} on {where}"


def adapter_in_short(adapter: Adapter, architecture: Architecture) -> str:
    """`448,512 (LoRA, rank 16)`: how many numbers it has, and its kind."""
    return f"{adapter.parameter_count(architecture):,} ({_kind(adapter)}, rank {adapter.rank})"


def _kind(adapter: Adapter) -> str:
    kind = "DoRA" if adapter.dora else "LoRA"
    kind = f"rs{kind}" if adapter.rank_stabilized else kind
    return f"Q{kind}" if adapter.quantization else kind


def quantization_keys(how: Quantization | None) -> dict[str, Any]:
    """The keys of `peft` that say how a base is kept."""
    if how is None:
        return {"quantization": "none"}
    return {
        "quantization": "nf4",
        "quantization_block": how.block,
        "double_quantization": how.double,
    }


def yaml_line(key: str, value: str | int | bool) -> str:
    """`double_quantization: no`"""
    return f"{key}: {('no', 'yes')[value] if isinstance(value, bool) else value}"


def quantization_words(how: Quantization, architecture: Architecture) -> str:
    """How a quantized base is kept, and what its matrices take: `nf4 in blocks of 64, 4.50 bits a weight: 3.6 GiB`."""
    matrices = block_matrices(architecture).values()
    weights = sum(rows * width for rows, width in matrices)
    if how.double:
        held = weights // 2 + weights // how.block + sum(8 * rows for rows, _ in matrices)
    else:
        held = weights // 2 + weights // how.block * 4
    scales = ", scales in 8 bits" if how.double else ""
    return (
        f"nf4 in blocks of {how.block}{scales}: {8 * held / weights:.2f} bits a weight, {held / 2**20:,.1f} MiB for the blocks' "
        "matrices"
    )


def peft_problems(
    peft: PeftConfig,
    architecture: Architecture,
    *,
    tensor_parallel: int,
    has_weights: bool,
    has_path: bool = False,
) -> list[tuple[str, str]]:
    """What of the section cannot be meant: (its key, one-line problem with the line to write).

    `has_weights`: whether training begins with weights that somebody trained; `has_path`: whether such are named.
    """
    problems = []
    known = (*LAYERS, "all")
    for layer in peft.layers:
        if layer not in known:
            hint = did_you_mean(layer, known) or f"; there are: {', '.join(known)}"
            if layer in _WORD_OF:
                hint = f"; it is called '{_WORD_OF[layer]}' here"
            problems.append(("layers", f"there is no layer '{layer}'{hint}"))
    if peft.type == "none":
        if peft.quantization != "none":
            problems.append(
                (
                    "quantization",
                    "only a frozen base can be quantized; write type: lora, or quantization: none",
                )
            )
        return problems
    if not peft.layers:
        problems.append(("layers", "no layer has an adapter; write layers: [all], or type: none"))
    matrices = block_matrices(architecture)
    of_adapter = {
        name: shape for name, shape in matrices.items() if name.rpartition(".")[2] in modules_of(peft)
    }
    limit = max((min(shape) for shape in of_adapter.values()), default=0)
    if of_adapter and peft.rank >= limit:
        problems.append(
            (
                "rank",
                f"rank {peft.rank} is no less than that of any matrix it is to adapt (at most {limit}), so that nothing is "
                "saved; lower it, or write type: none",
            )
        )
    if peft.freeze_others and not has_weights:
        problems.append(
            (
                "type",
                "there is nothing to adapt: the base would be random and stay so; "
                f"{'write pretrained.model_weights: yes' if has_path else 'give pretrained.path'}, or write freeze_others: no",
            )
        )
    if peft.quantization == "nf4":
        problems += _quantization_problems(peft, matrices, tensor_parallel)
    elif peft.double_quantization:
        problems.append(("double_quantization", "nothing is quantized; write quantization: nf4"))
    return problems


def without_effect(peft: PeftConfig) -> dict[str, str]:
    """Keys of the section that change nothing as the others are, and why."""
    if peft.type == "none":
        alone = "there is no adapter (type: none)"
        return {key: alone for key in PeftConfig.model_fields if key != "type"}
    if peft.quantization == "none":
        return {"quantization_block": "nothing is quantized (quantization: none)"}
    return {}


def peft_export_problem(peft: PeftConfig) -> str | None:
    """Why `training.export.format: peft` has nothing to write, in one line; None where it has."""
    if peft.type == "none":
        return "format peft holds adapters, and every weight is trained; write the model's family, as llama"
    if not peft.freeze_others:
        return "format peft has no place for the base, which is trained too (freeze_others: no); write the model's family, as llama"
    return None


_BY_COLUMNS = ("o_proj", "down_proj")
_WIDEST = 8
"""Bytes of the widest number in which 8-bit scales may be held."""


def _quantization_problems(
    peft: PeftConfig, matrices: dict[str, tuple[int, int]], tensor_parallel: int
) -> list[tuple[str, str]]:
    if not peft.freeze_others:
        return [("quantization", "quantized matrices cannot be trained; write freeze_others: yes")]
    widths = {}
    for name, (_, width) in matrices.items():
        module = name.rpartition(".")[2]
        widths[module] = width // tensor_parallel if module in _BY_COLUMNS else width
    block = peft.quantization_block
    wrong = {module: width for module, width in widths.items() if width % block}
    if wrong or block % 16:
        possible = [size for size in (128, 64, 32, 16) if not any(width % size for width in widths.values())]
        module, width = next(iter((wrong or widths).items()))
        reason = f"{module} has rows of {width} weights" if wrong else "a block is a multiple of 16"
        if wrong and module in _BY_COLUMNS and tensor_parallel > 1:
            reason += f" on each of {tensor_parallel} tensor-parallel processes"
        write = f"write {possible[0]}" if possible else "write quantization: none"
        return [("quantization_block", f"{reason}, which blocks of {block} do not fill; {write}")]
    if peft.double_quantization:
        for module, width in widths.items():
            if width // block % _WIDEST:
                return [
                    (
                        "double_quantization",
                        f"rows of {module} have {width // block} scales, which is no multiple of {_WIDEST}; write "
                        "double_quantization: no",
                    )
                ]
    return []
