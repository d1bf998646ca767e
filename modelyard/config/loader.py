"""From YAML files and overrides to a checked configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelyard.config.architecture import Architecture
from modelyard.config.data import ConcatenatedMemmapDataset, DatasetConfig, FileDataset, MemmapDataset
from modelyard.config.dialect import Notice
from modelyard.config.document import Document, KeyPath, dotted
from modelyard.config.huggingface import can_export
from modelyard.config.layout import Problem, shape_problems
from modelyard.config.layout import without_effect as nothing_to_lay_out
from modelyard.config.model import architecture_of, architecture_problems
from modelyard.config.neighbours import NoEffect, take_neighbours
from modelyard.config.newest import BATCH_SIZE, DIALECT
from modelyard.config.peft import peft_export_problem, peft_problems
from modelyard.config.peft import without_effect as nothing_to_adapt
from modelyard.config.prepare import PrepareConfig
from modelyard.config.problems import explain, faulty_paths, shown
from modelyard.config.reading import Kind, Reading, read_documents
from modelyard.config.scales import scale_problems
from modelyard.config.scales import without_effect as nothing_to_scale
from modelyard.config.starting import BASE_MODEL, dequantized_bases, shape_is_absent, starting_point
from modelyard.config.train import TrainConfig
from modelyard.config.training import ChatEvaluatorConfig, LossEvaluatorConfig
from modelyard.errors import UserError, did_you_mean, missing_path

TRANSFORMER: KeyPath = (*BASE_MODEL, "transformer")

STRETCHING = ("type", "scale_factor", "original_context_length")
# One of these has to be given, or else a preset or pretrained model: the rest have the dialect's defaults.
SHAPE_KEYS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "head_groups",
    "kv_channels",
    "ffn_hidden_size",
)


@dataclass(frozen=True)
class Loaded:
    """A configuration that can be started, and what there is to say about it."""

    kind: Kind
    config: TrainConfig | PrepareConfig
    architecture: Architecture | None
    """The model's shape; None for preparation, and while the pretrained folder is not there."""
    notices: list[str]
    """One line for each older spelling that was rewritten."""
    warnings: list[str]
    """Data or weights that are not there (yet), and the like: no obstacle to `validate`, errors for `train`."""
    document: dict[str, Any]
    """What the user wrote, merged and in today's spelling, before defaults, preset and pretrained model."""
    origins: dict[KeyPath, str] = field(default_factory=dict, repr=False)
    """Where each key of `document` was written: `FILE:LINE` or `override N`."""
    without_effect: list[NoEffect] = field(default_factory=list)
    """Keys that were given and that nothing here depends on."""
    problems: list[str] = field(default_factory=list)
    """What has to be changed before it can run; empty unless `load_config(..., keep_problems=True)` was asked."""
    silent_shape: dict[KeyPath, Any] = field(default_factory=dict)
    """Keys that make the kind of decoder, where nothing is written and the dialect's defaults hold."""
    remarks: list[str] = field(default_factory=list)
    """One line for each thing that a run will do and that may be another than the one that was meant."""

    def located(self, problems: Iterable[str]) -> list[str]:
        """Problems that begin with a key of `document` get the place where it is written."""
        lines = []
        for problem in problems:
            origin = self.origins.get(tuple(problem.partition(": ")[0].split(".")))
            lines.append(f"{origin}: {problem}" if origin else problem)
        return lines

    def placed(self, problems: Iterable[Problem]) -> list[str]:
        """Problems of keys, each with the place where the key, or else the section around it, is written."""
        document = Document(self.document, self.origins, "")
        origins = [document.origin(tuple(key.split("."))) for key, _ in problems]
        return [
            f"{origin}: {key}: {problem}" if origin else f"{key}: {problem}"
            for origin, (key, problem) in zip(origins, problems)
        ]

    @property
    def train(self) -> TrainConfig:
        """The configuration of a training run."""
        assert isinstance(self.config, TrainConfig)
        return self.config

    @property
    def prepare(self) -> PrepareConfig:
        """The configuration of a preparation."""
        assert isinstance(self.config, PrepareConfig)
        return self.config


def load_config(
    files: Sequence[Path | str],
    overrides: Sequence[str] = (),
    *,
    kind: str | None = None,
    keep_problems: bool = False,
) -> Loaded:
    """Read, repair, merge and check a configuration.

    Files are merged left to right, then the overrides (`a.b.c=value`). `kind` ("train" or "prepare") is what the
    caller can use; None takes what the keys say. Raises UserError with every problem found; with `keep_problems`
    those of a configuration that could be understood are in `problems` instead, for a caller that shows it whole.
    """
    return load_reading(read_documents(files, overrides, kind), keep_problems=keep_problems)


def load_reading(reading: Reading, *, keep_problems: bool = False) -> Loaded:
    """Check what was read; `load_config` from there on. `reading` is left as it is."""
    problems = list(reading.problems)
    try:
        return _checked(reading, problems, keep_problems)
    except UserError as error:
        raise UserError(*reading.as_written(error.problems)) from None


def _checked(reading: Reading, problems: list[str], keep_problems: bool) -> Loaded:
    document = Document(
        deepcopy(reading.document.values), dict(reading.document.origins), reading.document.name
    )
    notices: list[str] = list(reading.notices)
    written = reading.document.values
    origins = reading.document.origins
    if reading.kind == "prepare":
        prepare_config, _ = _validated(document, PrepareConfig, problems)
        if problems:
            raise UserError(*dict.fromkeys(problems))
        return Loaded("prepare", prepare_config, None, notices, [], written, origins)

    more_problems, without_effect = take_neighbours(document)
    problems += more_problems
    before = len(problems)
    base, pretrained, warnings = starting_point(document, problems)
    found_start = len(problems) == before
    if any(document.has((*TRANSFORMER, "rotary", key)) for key in STRETCHING):
        # The positions are stretched in another way than the preset or pretrained model says: its longest is void.
        base.discard((*BASE_MODEL, "max_position_embeddings"))
    notices += add_defaults(reading, document, base)
    explicit = Document(deepcopy(document.values), dict(document.origins), document.name)
    base.merge(document)
    # Where the translation says what is missing, it says it better.
    said = (BATCH_SIZE,) if reading.translation.batch_size_is_said else ()
    config, faulty = _validated(base, TrainConfig, problems, said)
    assert isinstance(config, TrainConfig)
    architecture = None
    known = found_start and (
        config.pretrained is None or config.pretrained.load_config == "none" or pretrained is not None
    )
    if known and not faulty & {"model", "pretrained"}:
        architecture = _architecture(config, base, explicit, problems)
        warnings += _short_positions(architecture, config, base)
    if architecture is not None:
        _check_export(config, architecture, base, problems)
        default = config.optimizer.default_learning_rate_scale
        factors = scale_problems(config.model.base_model, architecture, 1.0 if default is None else default)
        for key, problem in factors:
            path = (*BASE_MODEL, *key.split("."))
            problems.append(f"{base.origin(path)}: {dotted(path)}: {problem}")
        has_weights = config.pretrained is not None and config.pretrained.model_weights
        tensor_parallel = config.model.distributed.tensor_parallel
        for key, problem in peft_problems(
            config.model.base_model.transformer.peft,
            architecture,
            tensor_parallel=tensor_parallel,
            has_weights=has_weights,
            has_path=config.pretrained is not None,
        ):
            path = (*TRANSFORMER, "peft", key)
            problems.append(f"{base.origin(path)}: {dotted(path)}: {problem}")
        if pretrained is not None and has_weights:
            _check_weights_fit(architecture, pretrained, base, problems)
    if not faulty & {"model", "model.distributed", "batch", "training"}:
        for key, problem in shape_problems(config, architecture):
            problems.append(f"{base.origin(tuple(key.split('.')))}: {key}: {problem}")
        for key, why in nothing_to_lay_out(config).items():
            if document.has(tuple(key.split("."))):
                without_effect.append(NoEffect(key, object, why))
    if not faulty & {"training", "data"}:
        _check_names(config, base, problems, warnings)
    without_effect += _scaler_without_effect(config, document)
    if "model" not in faulty:
        model = config.model.base_model
        idle = {
            f"transformer.peft.{key}": why for key, why in nothing_to_adapt(model.transformer.peft).items()
        }
        for key, why in (idle | nothing_to_scale(model)).items():
            if document.get((*BASE_MODEL, *key.split("."))) is not None:
                without_effect.append(NoEffect(f"model.base_model.{key}", object, why))
    if problems and (faulty or not keep_problems):
        raise UserError(*dict.fromkeys(problems))
    warnings += _missing_data(config, base)
    silent = _silent_shape(config, base) if architecture is not None else {}
    notices += _chosen_shape(silent, base)
    return Loaded(
        "train",
        config,
        architecture,
        notices,
        warnings,
        written,
        origins,
        without_effect,
        reading.as_written(problems),
        silent,
        dequantized_bases(config, base),
    )


def _validated(
    document: Document, schema: type[Any], problems: list[str], said: Collection[KeyPath] = ()
) -> tuple[Any, set[str]]:
    """The typed configuration, and which sections (see `_section`) have problems (they go to `problems`).

    So that what else is wrong can be said in the same go, the faulty keys are then left out. Raises UserError where
    nothing can be made of the rest.
    """
    try:
        return schema.model_validate(document.values), set()
    except ValidationError as error:
        problems += explain(error, document, schema, said)
        faulty = faulty_paths(error, document)
    rest = Document(deepcopy(document.values), {}, document.name)
    for path in faulty:
        rest.discard(path)
    try:
        return schema.model_validate(rest.values), {_section(path) for path in faulty}
    except ValidationError:
        raise UserError(*dict.fromkeys(problems)) from None


def _section(path: KeyPath) -> str:
    """The top-level section of a key; what of `model` says nothing about its shape by itself."""
    beside = path[0] == "model" and len(path) > 1 and path[1] not in ("base_model", "preset")
    return dotted(path[:2] if beside else path[:1])


def add_defaults(reading: Reading, document: Document, base: Document) -> list[Notice]:
    """Write defaults of the newest dialect that are not today's into `base`, where they hold; return what to say."""
    known = not shape_is_absent(document, base)
    defaults = reading.translation.defaults(document, base, shape_known=known)
    for path, value in defaults.items():
        base.put(path, value, f"default of {DIALECT}")
    return reading.translation.defaults_notice(defaults)


def _architecture(
    config: TrainConfig, document: Document, explicit: Document, problems: list[str]
) -> Architecture | None:
    """The model's shape, or None with the reasons in `problems`."""
    from_elsewhere = config.model.preset is not None or (
        config.pretrained is not None and config.pretrained.load_config == "model"
    )
    if not from_elsewhere and not any(explicit.has((*TRANSFORMER, key)) for key in SHAPE_KEYS):
        problems.append(
            f"{document.origin(BASE_MODEL)}: no architecture is given; write model.preset (such as llama-3.1-8b), or "
            "pretrained.path (a Hugging Face folder; with model_weights: no for its shape alone), or "
            "model.base_model.transformer (num_layers, hidden_size, ...)"
        )
        return None
    refused = architecture_problems(config.model.base_model, config.batch.sequence_length)
    for key, problem in refused:
        path = (*BASE_MODEL, *key.split("."))
        default = "" if document.has(path) else " (it is not given, and the dialect's default holds)"
        problems.append(f"{document.origin(path)}: {dotted(path)}: {problem}{default}")
    if refused:
        return None
    return architecture_of(config.model.base_model, config.batch.sequence_length)


def _short_positions(architecture: Architecture | None, config: TrainConfig, document: Document) -> list[str]:
    path, length = (*BASE_MODEL, "max_position_embeddings"), config.batch.sequence_length
    if architecture is None or (architecture.max_position_embeddings or length) >= length:
        return []
    return [
        f"{document.origin(path)}: {dotted(path)} = {architecture.max_position_embeddings}, but rows of {length} tokens "
        "are trained; exports will say that the model supports fewer than it has seen"
    ]


def _check_export(
    config: TrainConfig, architecture: Architecture, document: Document, problems: list[str]
) -> None:
    export, peft = config.training.export, config.model.base_model.transformer.peft
    if export.format == "peft":
        reason = peft_export_problem(peft)
    else:
        reason = None if export.format is None else can_export(architecture, export.format)
    if reason:
        path = ("training", "export", "format")
        problems.append(f"{document.origin(path)}: {dotted(path)}: {reason}")


_SHAPES = {
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "tie_word_embeddings",
    "transformer.num_layers": "num_layers",
    "transformer.hidden_size": "hidden_size",
    "transformer.num_attention_heads": "num_attention_heads",
    "transformer.head_groups": "head_groups",
    "transformer.kv_channels": "head_size",
    "transformer.ffn_hidden_size": "ffn_hidden_size",
    "transformer.gated": "gated",
    "transformer.normalization.type": "norm_type",
    "max_position_embeddings": "position_embeddings",
}


def _check_weights_fit(
    architecture: Architecture, pretrained: Architecture, document: Document, problems: list[str]
) -> None:
    """Weights are loaded: what was given explicitly must not change their shapes."""
    for key, name in _SHAPES.items():
        ours, theirs = getattr(architecture, name), getattr(pretrained, name)
        if ours != theirs:
            path = (*BASE_MODEL, *key.split("."))
            problems.append(
                f"{document.origin(path)}: {dotted(path)} = {shown(ours)}, but the pretrained weights have {shown(theirs)}; remove it, "
                "or write pretrained.model_weights: no"
            )
    biases = [(shape.qkv_bias, shape.output_bias, shape.mlp_bias) for shape in (architecture, pretrained)]
    if biases[0] != biases[1]:
        path = (*TRANSFORMER, "add_linear_biases")
        problems.append(
            f"{document.origin(path)}: {dotted(path)} does not fit the pretrained weights' biases; remove it, or write "
            "pretrained.model_weights: no"
        )


def _check_names(config: TrainConfig, document: Document, problems: list[str], warnings: list[str]) -> None:
    """Every dataset that is read is there, and every one that is there is read."""
    datasets: KeyPath = ("data", "datasets")
    names = list(config.data.datasets)
    read: dict[str, str] = {}
    if config.training.train_iters:
        read["training"] = document.origin(datasets)
    if config.training.test_iters:
        read["test"] = document.origin(("training", "test_iters"))
    for name, entry in config.training.evaluators.items():
        if isinstance(entry.evaluator, LossEvaluatorConfig):
            path = ("training", "evaluators", name, "evaluator", "dataset_name")
            read.setdefault(entry.evaluator.dataset_name or name, document.origin(path))
    for name, origin in read.items():
        if name not in names:
            known = f" (there are: {', '.join(names)})" if names else ""
            problems.append(f"{origin}: data.datasets has no '{name}'{did_you_mean(name, names) or known}")
    for name in names:
        if name not in read and name != "training":
            warnings.append(
                f"{document.origin((*datasets, name))}: data.datasets.{name} is read by no evaluator"
            )


def _scaler_without_effect(config: TrainConfig, document: Document) -> list[NoEffect]:
    """The section of the gradient scaler, where it is written and the dtype needs none."""
    key = "optimizer.gradient_scaler"
    if config.model.distributed.training_dtype == "float16" or not document.has(tuple(key.split("."))):
        return []
    return [NoEffect(key, dict, "only training_dtype float16 needs a scaled loss")]


def _silent_shape(config: TrainConfig, document: Document) -> dict[KeyPath, Any]:
    """What makes the kind of decoder and is left to the dialect's defaults, which are not those of Llama."""
    transformer = config.model.base_model.transformer
    values: dict[str, Any] = {
        "normalization.type": transformer.normalization.type,
        "gated": transformer.gated,
        "add_linear_biases": transformer.add_linear_biases,
        "rotary.type": transformer.rotary.type,
    }
    paths = {(*TRANSFORMER, *key.split(".")): value for key, value in values.items()}
    return {path: value for path, value in paths.items() if not document.has(path)}


def _chosen_shape(silent: dict[KeyPath, Any], document: Document) -> list[str]:
    """One line where defaults decide what kind of decoder is trained."""
    if not silent:
        return []
    held = ", ".join(
        f"{dotted(path[len(TRANSFORMER) :])}: {shown(value)}".replace("'", "")
        for path, value in silent.items()
    )
    return [
        f"{document.origin(TRANSFORMER)}: {dotted(TRANSFORMER)} does not say all that makes the kind of decoder; the "
        f"dialect's defaults hold: {held}"
    ]


def _missing_data(config: TrainConfig, document: Document) -> list[str]:
    """One line for each file or store of data that is named and not there."""
    lines = []
    for name, dataset in config.data.datasets.items():
        path: KeyPath = ("data", "datasets", name, "path")
        lines += [
            f"{document.origin(path)}: {dotted(path[:3])}: {missing_path(file)}"
            for file in _paths(dataset)
            if not file.exists()
        ]
    if config.data.tokenizer.path is not None and not config.data.tokenizer.path.exists():
        path = ("data", "tokenizer", "path")
        lines.append(f"{document.origin(path)}: {dotted(path)}: {missing_path(config.data.tokenizer.path)}")
    for name, entry in config.training.evaluators.items():
        file = entry.evaluator.path if isinstance(entry.evaluator, ChatEvaluatorConfig) else None
        if file is not None and not file.exists():
            path = ("training", "evaluators", name, "evaluator", "path")
            lines.append(f"{document.origin(path)}: {dotted(path)}: {missing_path(file)}")
    return list(dict.fromkeys(lines))


def _paths(dataset: DatasetConfig) -> Iterable[Path]:
    if isinstance(dataset, MemmapDataset) and not dataset.path.exists():
        index = dataset.path.with_name(dataset.path.name + ".idx")  # a pair of another program: a prefix
        yield index if index.exists() else dataset.path
    elif isinstance(dataset, FileDataset | MemmapDataset | ConcatenatedMemmapDataset):
        yield dataset.path
    for below in (getattr(dataset, "dataset", None), *getattr(dataset, "datasets", ())):
        if below is not None:
            yield from _paths(below)
