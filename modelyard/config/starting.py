"""What a configuration is written over: the shape of a preset or of a pretrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelyard.config.adapter import LAYERS, MODULES
from modelyard.config.adapter_files import no_adapter, origin_of, peft_section, stored_adapter
from modelyard.config.architecture import Architecture
from modelyard.config.document import Document, KeyPath, dotted
from modelyard.config.huggingface import FAMILIES, can_export
from modelyard.config.model import base_model_of
from modelyard.config.peft import adapter_of, yaml_line
from modelyard.config.presets import preset
from modelyard.config.pretrained import has_shape, is_checkpoint, read_shape
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError, missing_path

BASE_MODEL: KeyPath = ("model", "base_model")
PEFT: KeyPath = (*BASE_MODEL, "transformer", "peft")


def shape_is_absent(document: Document, base: Document) -> bool:
    """Whether the shape comes from a pretrained model that is not there; `base` is its `starting_point`."""
    return _wants_pretrained(document) and not base.has(BASE_MODEL)


def starting_point(
    document: Document, problems: list[str]
) -> tuple[Document, Architecture | None, list[str]]:
    """Preset and pretrained model as a document to merge the user's over; the pretrained shape; warnings."""
    base, architecture, warnings = _starting_model(document, problems)
    if isinstance(adapter := document.get(("pretrained", "adapter")), str):
        gated = architecture is None or architecture.gated
        warnings += _read_adapter(Path(adapter).expanduser(), gated, document, base, problems)
    return base, architecture, warnings


def _starting_model(
    document: Document, problems: list[str]
) -> tuple[Document, Architecture | None, list[str]]:
    base = Document({}, {}, document.name)
    warnings: list[str] = []
    name, path = document.get(("model", "preset")), document.get(("pretrained", "path"))
    if isinstance(name, str):
        try:
            base.put(BASE_MODEL, base_model_of(preset(name)), f"preset {name}")
        except UserError as error:
            problems += [f"{document.origin(('model', 'preset'))}: {problem}" for problem in error.problems]
    if not _wants_pretrained(document):
        return base, None, warnings
    folder, origin = Path(path).expanduser(), document.origin(("pretrained", "path"))
    if not has_shape(folder):
        missing = folder / "config.json" if folder.exists() else folder
        return base, None, [f"{origin}: pretrained.path: {missing_path(missing)}"]
    try:
        architecture, family = read_shape(folder)
        values = base_model_of(architecture)
    except (UserError, ValueError) as error:
        problems += [f"{origin}: pretrained.path: {problem}" for problem in str(error).splitlines()]
        return base, None, warnings
    if is_checkpoint(folder) and document.get((*PEFT, "type")) == "lora":
        stored = stored_adapter(folder)
        if stored is not None and stored.adapter.freeze_others:
            problems.append(
                f"{origin}: pretrained.path: {folder} is the checkpoint of an adapter; to go on with it write it as "
                "pretrained.adapter, and the model that it adapts as pretrained.path; for a new one on top of it `modelyard merge` "
                "it first"
            )
    wanted = document.get(("pretrained", "format"), "auto")
    if isinstance(wanted, str) and wanted in FAMILIES and is_checkpoint(folder):
        if reason := can_export(architecture, wanted):  # a checkpoint is of no family; it may fit several
            problems.append(
                f"{document.origin(('pretrained', 'format'))}: pretrained.format is {wanted}, which the checkpoint {folder} "
                f"does not fit ({reason}); write format: auto"
            )
    elif isinstance(wanted, str) and wanted in FAMILIES and wanted != family:
        problems.append(
            f"{document.origin(('pretrained', 'format'))}: pretrained.format is {wanted}, but {folder}/config.json "
            f"says {family}; write format: {family}"
        )
    files = "*.distcp" if is_checkpoint(folder) else "*.safetensors"
    if document.get(("pretrained", "model_weights"), True) is True and not any(folder.glob(files)):
        warnings.append(f"{origin}: pretrained.path: {folder} has no weights ({files})")
    if isinstance(name, str) and base.get(BASE_MODEL) != values:
        origin_of_preset = document.origin(("model", "preset"))
        warnings.append(
            f"{origin_of_preset}: model.preset {name} has no effect: the shape is that of pretrained.path {folder}"
        )
    from_folder = Document({}, {}, document.name)
    from_folder.put(
        BASE_MODEL, values, str(folder / ("state.json" if is_checkpoint(folder) else "config.json"))
    )
    base.merge(from_folder)
    return base, architecture, warnings


def _read_adapter(
    folder: Path, gated: bool, document: Document, base: Document, problems: list[str]
) -> list[str]:
    """Write what the adapter to go on with is like over `base`, and refuse what the user has otherwise; warnings."""
    origin = document.origin(("pretrained", "adapter"))
    if not folder.is_dir():
        return [f"{origin}: pretrained.adapter: {missing_path(folder)}"]
    if document.get(("pretrained", "model_weights"), True) is False:
        problems.append(
            f"{origin}: pretrained.adapter: {folder} adapts weights that are not read; write pretrained.model_weights: yes"
        )
        return []
    try:
        stored = stored_adapter(folder)
        if stored is None:
            raise UserError(no_adapter(folder))
        if not stored.adapter.freeze_others:
            raise UserError(
                f"{folder} has its base inside, which was trained with it; write pretrained.path: {folder} alone"
            )
        if document.get((*PEFT, "type"), "lora") != "lora":
            return []  # merged, whatever it adapts
        section = peft_section(stored, gated=gated)
    except UserError as error:
        problems += [f"{origin}: pretrained.adapter: {problem}" for problem in error.problems]
        return []
    base.put(PEFT, section, origin_of(stored))
    for key in ("rank", "alpha", "layers", "rank_stabilized", "dora"):
        wanted = document.get((*PEFT, key), section[key])
        if wanted != section[key] and not (key == "layers" and _same_layers(wanted, section[key])):
            value = ", ".join(section[key]) if key == "layers" else section[key]
            problems.append(
                f"{document.origin((*PEFT, key))}: {dotted((*PEFT, key))} is another than that of pretrained.adapter "
                f"{folder} ({value}); leave it out"
            )
    if stored.knows_quantization:
        problems += _other_quantization(folder, section, document)
    return []


def _other_quantization(folder: Path, section: dict[str, Any], document: Document) -> list[str]:
    """Where the user has the base kept otherwise than it was while the adapter was trained: it would be another model."""
    lines = []
    for key in ("quantization", "quantization_block", "double_quantization"):
        wanted = document.get((*PEFT, key), section.get(key))
        if key in section and wanted != section[key]:
            lines.append(
                f"{document.origin((*PEFT, key))}: {dotted((*PEFT, key))}: pretrained.adapter {folder} was trained with another; "
                f"write {yaml_line(key, section[key])}"
            )
    return lines


def dequantized_bases(config: TrainConfig, document: Document) -> list[str]:
    """One line for each place where an adapter that was trained on a quantised base is merged, and into what."""
    pretrained, export = config.pretrained, config.training.export
    adapter = adapter_of(config.model.base_model.transformer.peft)
    lines = []
    if pretrained is not None and pretrained.model_weights:
        folders = {"path": pretrained.path} | (
            {"adapter": pretrained.adapter} if pretrained.adapter is not None and adapter is None else {}
        )
        for key, folder in folders.items():
            if _is_of_quantized(folder):
                lines.append(
                    f"{document.origin(('pretrained', key))}: pretrained.{key}: {folder} is merged into what it was trained on, its "
                    "base quantised and made numbers again (into the base as it is: modelyard merge --onto original)"
                )
    if adapter is not None and adapter.quantization is not None and export.format not in (None, "peft"):
        lines.append(
            f"{document.origin(('training', 'export', 'format'))}: training.export.format {export.format}: the adapter is merged "
            "into what it is trained on, the base quantised and made numbers again (into the base as it is: format peft, then "
            "modelyard merge --onto original)"
        )
    return lines


def _is_of_quantized(folder: Path) -> bool:
    try:
        stored = stored_adapter(folder)
    except UserError:
        return False  # said where it is opened
    return stored is not None and stored.adapter.quantization is not None


def _same_layers(one: object, other: list[str]) -> bool:
    def modules(words: list[str]) -> set[str]:
        return {
            module for word in words for module in (MODULES if word == "all" else LAYERS.get(word, (word,)))
        }

    return (
        isinstance(one, list)
        and all(isinstance(word, str) for word in one)
        and modules(one) == modules(other)
    )


def known_start(document: Document) -> Document | None:
    """The `starting_point`, before anything is checked; None where the preset or pretrained model that is named cannot
    be read, so that nobody knows what it says."""
    base, pretrained, _ = starting_point(document, [])
    if _wants_pretrained(document):
        return None if pretrained is None else base
    return None if isinstance(document.get(("model", "preset")), str) and not base.has(BASE_MODEL) else base


def _wants_pretrained(document: Document) -> bool:
    """Whether the shape is to come from a pretrained model."""
    path, wanted = document.get(("pretrained", "path")), document.get(("pretrained", "load_config"), "model")
    return isinstance(path, str) and wanted == "model"
