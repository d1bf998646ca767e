"""`modelyard validate`: everything that can be known about a configuration before it is started. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import yaml

from modelyard.config.adapter import matmul_flops_per_token
from modelyard.config.architecture import Architecture
from modelyard.config.disk import (
    checkpoint_bytes,
    disk_problem,
    export_bytes,
    free_bytes,
    run_bytes,
    saves,
    size,
)
from modelyard.config.huggingface import can_export
from modelyard.config.layout import layout_of, possible_worlds, shape_problems, smallest_world, world_problems
from modelyard.config.loader import Loaded
from modelyard.config.model import base_model_of
from modelyard.config.optimizer import LearningRateConfig
from modelyard.config.peft import adapter_of, adapter_words, quantization_words
from modelyard.config.prepare import PrepareConfig
from modelyard.config.pretrained import unreadable_weights
from modelyard.config.scales import rate_scales
from modelyard.config.traces import trace_warnings
from modelyard.config.train import TrainConfig
from modelyard.data.lanes import MASK_LANE, has_kinds
from modelyard.data.stream import DataStream, ids_outside_vocabulary
from modelyard.errors import UserError, missing_path
from modelyard.plan.layout import layout_rows
from modelyard.train.schedule import learning_rate

_PLOT_COLUMNS = 60
_PLOT_ROWS = 6
_EIGHTHS = " ▁▂▃▄▅▆▇█"


NO_MASKS = "no dataset has a loss mask: every token is trained on (batch.use_loss_masking_spans: auto)"
ANY_VOCABULARY = 2**31
"""Stands for a vocabulary that is not known yet."""


def summarise(loaded: Loaded, processes: int | None = None) -> tuple[str, list[str], list[str]]:
    """The whole summary as text, what has to be changed before it can run, and what may have to be.

    `processes` is how many the run is to have; None: as few as it can.
    Problems that make a configuration unreadable are raised by `load_config` before this.
    """
    problems, warnings = list(loaded.problems), list(loaded.warnings)
    blocks = [("configuration", yaml_text(resolved(loaded)))]
    if loaded.kind == "prepare":
        warnings += _missing_sources(loaded.prepare)
    else:
        blocks += _training_blocks(loaded, processes, problems, warnings)
    text = "\n\n".join(f"{title}\n{indented(body)}" for title, body in blocks if body)
    return text, list(dict.fromkeys(problems)), list(dict.fromkeys(warnings))


def resolved(loaded: Loaded) -> dict[str, Any]:
    """The configuration with every default, preset and derived value written out, as it would be written in YAML."""
    values: dict[str, Any] = loaded.config.model_dump(mode="json")
    if loaded.architecture is not None:
        base_model = values["model"]["base_model"]
        shape = base_model_of(loaded.architecture)
        transformer = shape.pop("transformer")
        assert isinstance(transformer, dict)
        base_model |= shape
        base_model["transformer"] |= transformer
    elif loaded.kind == "train":
        # Defaults here would read as the shape of a model that nobody asked for.
        values["model"]["base_model"] = loaded.document.get("model", {}).get("base_model", {})
    return values


def yaml_text(values: dict[str, Any]) -> str:
    """Compact YAML: innermost sections on one line."""
    return yaml.safe_dump(
        values, sort_keys=False, default_flow_style=None, width=108, allow_unicode=True
    ).rstrip()


def _missing_sources(config: PrepareConfig) -> list[str]:
    """Local paths that are not there; what can be a name on the Hub is not looked for."""
    paths = {"dataset.path": config.dataset.path, "tokenizer.path": config.tokenizer.path}
    return [
        f"{key}: {missing_path(path)}"
        for key, path in paths.items()
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) and not Path(path).expanduser().exists()
    ]


def _training_blocks(
    loaded: Loaded, processes: int | None, problems: list[str], warnings: list[str]
) -> list[tuple[str, str]]:
    config, architecture = loaded.train, loaded.architecture
    blocks = [("model", table(_model_rows(config, architecture)))]
    if config.pretrained is not None and config.pretrained.model_weights:
        problems += unreadable_weights(config.pretrained.path)
    blocks.append(("batch", table(_batch_rows(config))))
    blocks.append(("layout", table(_layout_rows(loaded, processes, problems))))
    blocks.append(("data", table(_data_rows(config, architecture, problems, warnings))))
    if architecture is not None:
        blocks.append(("compute", table(_compute_rows(config, architecture))))
        blocks.append(("disk", table(_disk_rows(config, architecture))))
        if problem := disk_problem(config, architecture):
            warnings.append(problem)
    if config.training.train_iters:
        blocks.append(("learning rate", plot(config.optimizer.learning_rate, config.training.train_iters)))
    rows = [(row.key, row.why) for row in loaded.without_effect]
    blocks.append(("accepted without effect here", table(rows)))
    warnings += _odd_lengths(config) + trace_warnings(config)
    return blocks


def _model_rows(config: TrainConfig, architecture: Architecture | None) -> list[tuple[str, str]]:
    if architecture is None:
        missing = f"{config.pretrained.path} is there" if config.pretrained else "an architecture is given"
        return [("parameters", f"unknown until {missing}")]
    embedding = architecture.vocab_size * architecture.hidden_size
    tied = (
        "tied with the output layer"
        if architecture.tie_word_embeddings
        else "and as many in the output layer"
    )
    export = config.training.export.format
    what = "the adapter" if export == "peft" else "this architecture"
    holds = "cannot" if export and export != "peft" and can_export(architecture, export) else "can"
    start = "random weights"
    if config.pretrained is not None:
        start = f"{config.pretrained.path} ({'weights' if config.pretrained.model_weights else 'shape only'})"
    return [
        ("parameters", f"{architecture.parameter_count():,} ({embedding:,} in the embedding, {tied})"),
        (
            "shape",
            f"{architecture.num_layers} layers, width {architecture.hidden_size}, {architecture.num_attention_heads} heads "
            f"of {architecture.head_size} in {architecture.head_groups} groups, feed-forward {architecture.ffn_hidden_size}",
        ),
        ("kind", _kind(architecture)),
        *_trained_rows(config, architecture),
        ("starts from", start),
        (
            "types",
            f"{config.model.distributed.training_dtype} compute, {_master(config)} weights and optimizer"
            + (", moments in 8 bits between steps" if config.optimizer.state == "8bit" else ""),
        ),
        ("export format", f"{export}: {holds} hold {what}" if export else "none (no exports)"),
    ]


def _kind(architecture: Architecture) -> str:
    """What distinguishes one decoder of this shape from another, in words."""
    gated = "gated" if architecture.gated else "not gated"
    word = base_model_of(architecture)["transformer"]["add_linear_biases"]  # type: ignore[index]
    positions = [f"rotary {architecture.rotary.type}"] if architecture.rotary.type != "none" else []
    if architecture.position_embeddings is not None:
        positions.append(f"{architecture.position_embeddings:,} learned positions")
    return (
        f"{architecture.norm_type}, feed-forward {architecture.activation} ({gated}), biases {word}, "
        f"{' and '.join(positions) or 'no positions'}"
    )


def _trained_rows(config: TrainConfig, architecture: Architecture) -> list[tuple[str, str]]:
    """What is trained, where that is not all of the parameters."""
    default = config.optimizer.default_learning_rate_scale
    scales = rate_scales(config.model.base_model, architecture, 1.0 if default is None else default)
    adapter = adapter_of(config.model.base_model.transformer.peft)
    shapes = architecture.parameter_shapes() | (adapter.shapes(architecture) if adapter else {})
    frozen = sum(prod(shapes[name]) for name, scale in scales.items() if scale == 0)
    trained = sum(map(prod, shapes.values())) - frozen
    rows = []
    if adapter is not None:
        own, whole = adapter.parameter_count(architecture), architecture.parameter_count()
        rows.append(
            ("adapter", f"{adapter_words(adapter)}: {own:,} parameters ({own / whole:.2%} of the base's)")
        )
        if (how := adapter.quantization) is not None:
            rows.append(("base", quantization_words(how, architecture)))
    if frozen:
        why = "" if adapter and adapter.freeze_others else " by a learning-rate scale of 0"
        rows.append(("trained", f"{trained:,} ({frozen:,} frozen{why})"))
    return rows


def _master(config: TrainConfig) -> str:
    return "float64" if config.model.distributed.training_dtype == "float64" else "float32"


def _batch_rows(config: TrainConfig) -> list[tuple[str, str]]:
    batch, iterations = config.batch, config.training.train_iters
    return [
        (
            "tokens per iteration",
            f"{batch.tokens:,} ({batch.batch_size:,} rows of {batch.sequence_length:,})",
        ),
        ("total tokens", f"{batch.tokens * iterations:,} ({iterations:,} iterations)"),
        ("documents", _packing(config)),
    ]


def _layout_rows(loaded: Loaded, processes: int | None, problems: list[str]) -> list[tuple[str, str]]:
    processes = processes or smallest_world(loaded.train)
    if impossible := world_problems(loaded.train, processes):
        problems += loaded.placed(impossible)
    if impossible or shape_problems(loaded.train, loaded.architecture):
        return [("processes", f"{processes} cannot be laid out so")]
    layout = layout_of(loaded.train, processes)
    return layout_rows(loaded.train, loaded.architecture, layout, possible_worlds(loaded.train))


def _packing(config: TrainConfig) -> str:
    batch = config.batch
    cut = "cut at the ends of rows" if batch.truncate_documents else "packed whole"
    if batch.truncate_documents and batch.overlong == "auto":
        cut += " (conversations: packed whole)"
    seen = (
        "attention over all of a row" if batch.cross_document_attention else "attention within each document"
    )
    masks = {
        True: ", masked spans left out of the loss",
        False: "",
        "auto": ", masked spans, if any, left out of the loss",
    }
    return f"{cut}, {seen}{masks[batch.use_loss_masking_spans]}"


def _data_rows(
    config: TrainConfig, architecture: Architecture | None, problems: list[str], warnings: list[str]
) -> list[tuple[str, str]]:
    """Opens the data as training would; what is there and cannot be used is a problem, what is not there a warning."""
    rows, streams = [], []
    steps = config.batch.batch_size * config.training.train_iters
    for name, dataset in config.data.datasets.items():
        if any(f"data.datasets.{name}: " in warning for warning in warnings):
            rows.append((name, "not there yet"))
            continue
        try:
            stream = DataStream(
                dataset,
                name=name,
                sampling=config.data.sampling,
                batch=config.batch,
                vocab_size=architecture.vocab_size if architecture else ANY_VOCABULARY,
                total_rows=steps if name == "training" else None,
            )
            found = stream.statistics(steps)["datasets"]
        except UserError as error:
            absent = all("does not exist" in problem for problem in error.problems)
            (warnings if absent else problems).extend(
                f"data.datasets.{name}: {problem}" for problem in error.problems
            )
            rows.append((name, "not there yet" if absent else "cannot be used"))
            continue
        streams.append(stream)
        rows += [(name, _source_text(name, facts)) for facts in found]
    problems += ids_outside_vocabulary(streams)
    datasets = [dataset for stream in streams for dataset in stream.datasets]
    if any(map(has_kinds, datasets)):
        rows.append(("conversations", f"packed whole, trained on by the loss lane {config.batch.loss_lane}"))
    masked = [MASK_LANE in dataset.lanes or has_kinds(dataset) for dataset in datasets]
    if config.batch.use_loss_masking_spans == "auto" and masked and not any(masked):
        rows.append(("loss", NO_MASKS))
    return rows


def _source_text(name: str, facts: dict[str, Any]) -> str:
    text = f"{facts['tokens']:,} tokens in {facts['documents']:,} documents"
    if facts["share"] < 1:
        text += f", {facts['share']:.1%} of the rows"
    if name == "training":
        text += f": {facts['epochs']:.2f} epochs"
    if facts["over_long_documents"]:
        text += f"; {facts['over_long_documents']:,} of {facts['documents_seen']:,} documents are longer than a row and left out"
    return f"{text} ({facts['name']})"


def _compute_rows(config: TrainConfig, architecture: Architecture) -> list[tuple[str, str]]:
    length = config.batch.sequence_length
    products = matmul_flops_per_token(architecture, adapter_of(config.model.base_model.transformer.peft))
    causal = products + architecture.attention_flops_per_token(length, causal=True)
    full = products + architecture.attention_flops_per_token(length, causal=False)
    tokens = config.batch.tokens * config.training.train_iters
    return [
        ("FLOPs per token", f"{causal / 1e9:,.4g} G with causal attention (Fast-LLM, Megatron)"),
        ("", f"{full / 1e9:,.4g} G with the full square (PaLM, torchtitan)"),
        ("FLOPs of the run", f"{causal * tokens:.3g} causal, {full * tokens:.3g} full"),
    ]


def _disk_rows(config: TrainConfig, architecture: Architecture) -> list[tuple[str, str]]:
    rows = []
    checkpoint, export = config.training.checkpoint, config.training.export
    for name, section, each in (
        ("checkpoint", checkpoint, checkpoint_bytes(config, architecture)),
        ("export", export, export_bytes(config, architecture)),
    ):
        written, at_a_time = saves(config, section)
        what = _checkpointed(config) if name == "checkpoint" else config.training.export.data_type
        often = f"{written:,} written, at most {at_a_time:,} at a time" if written else "none (no interval)"
        rows.append((name, f"{size(each)} ({what}); {often}"))
    needed, free = run_bytes(config, architecture), free_bytes(config)
    rows.append(
        ("the run writes", f"up to {size(needed)}; {size(free)} free for {config.run.experiment_dir}")
    )
    return rows


def _checkpointed(config: TrainConfig) -> str:
    adapter = adapter_of(config.model.base_model.transformer.peft)
    alone = adapter is not None and adapter.freeze_others
    return "the adapter + 2 Adam moments" if alone else "weights + 2 Adam moments"


def _odd_lengths(config: TrainConfig) -> list[str]:
    """Schedules that are possible and probably not meant."""
    rate, iterations = config.optimizer.learning_rate, config.training.train_iters
    if not iterations or rate.schedule is not None:
        return []
    if rate.warmup_iterations >= iterations:
        return [f"the warm-up ({rate.warmup_iterations:,} iterations) is as long as the run ({iterations:,})"]
    if (
        rate.decay_style != "constant"
        and rate.decay_iterations is not None
        and rate.decay_iterations > iterations
    ):
        return [
            f"the run ends at {iterations:,}, before the learning rate reaches its minimum at {rate.decay_iterations:,} "
            "(optimizer.learning_rate.decay_iterations)"
        ]
    return []


def plot(config: LearningRateConfig, iterations: int) -> str:
    """The learning rate over the run, in plain text of at most 78 columns."""
    columns = min(_PLOT_COLUMNS, iterations)
    steps = [1 + column * (iterations - 1) // max(1, columns - 1) for column in range(columns)]
    rates = [learning_rate(config, step) for step in steps]
    top = max(rates) or 1.0
    lines = []
    for row in reversed(range(_PLOT_ROWS)):
        cells = [_EIGHTHS[min(8, max(0, round(8 * (rate / top * _PLOT_ROWS - row))))] for rate in rates]
        label = f"{max(rates):.2e}" if row == _PLOT_ROWS - 1 else "0" if row == 0 else ""
        lines.append(f"{label:>8} |{''.join(cells)}".rstrip())
    lines.append(f"{'':>8} +{'-' * columns}")
    last = f"{iterations:,}" if iterations > 1 else ""
    lines.append(f"{'step':>8}  1{last:>{max(len(last) + 1, columns - 1)}}".rstrip())
    return "\n".join([*lines, _ends(config, iterations)])


def _ends(config: LearningRateConfig, iterations: int) -> str:
    first, last = learning_rate(config, 1), learning_rate(config, iterations)
    return f"first {first:.3e}, last {last:.3e}" + (
        f" ({config.decay_style})" if config.schedule is None else ""
    )


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names in one column, texts in another."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def indented(text: str) -> str:
    """Every line by two blanks."""
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
