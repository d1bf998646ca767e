"""`modelyard inspect CHECKPOINT`: what a checkpoint or a Hugging Face folder holds, where it comes from, whether it is sound."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from modelyard.config.adapter_files import PEFT_CONFIG, is_peft_folder, stored_adapter
from modelyard.config.architecture import Architecture
from modelyard.config.disk import size
from modelyard.config.huggingface import read_config
from modelyard.config.layout import Layout
from modelyard.config.scales import rate_scales
from modelyard.config.train import TrainConfig
from modelyard.errors import UserError
from modelyard.files import CHECKSUM_LIMIT, MANIFEST, damage, numbered_folders
from modelyard.model.formats import open_huggingface
from modelyard.model.formats.source import shape_problems
from modelyard.plan.layout import layout_line
from modelyard.report.inspect_adapter import inspect_peft, show_adapter, stored_shapes
from modelyard.report.inspect_blocks import Facts, Heading, Inspection, Note, Table
from modelyard.report.inspect_data import Options
from modelyard.report.inspect_tensors import show_tensors
from modelyard.train.checkpoint import Checkpoint, marked_retention
from modelyard.train.resume import flatten

_STRETCHED = ("type", "theta", "scale_factor", "original_context_length")
_ROTARY = {
    "none": ("type",),
    "default": ("type", "theta"),
    "llama3": (*_STRETCHED, "low_frequency_factor", "high_frequency_factor"),
    "yarn": (*_STRETCHED, "attention_factor", "beta_fast", "beta_slow"),
}
"""What each kind of rotary positions depends on."""
_STAYS = {
    "permanent": "for ever (training.checkpoint.keep_every)",
    "regular": "while it is among the newest (training.checkpoint.keep)",
    "ephemeral": "until there is a newer one",
}
"""How long a checkpoint stays, by what it is marked as."""


def inspect_checkpoint(folder: Path, options: Options, inspection: Inspection) -> None:
    """Add everything there is to see of a checkpoint folder. Raises UserError where nothing of it can be read."""
    total = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    checksums = options.verify or total <= CHECKSUM_LIMIT
    damaged = damage(folder, checksums=checksums)
    inspection.fault(*(f"{line}: this checkpoint is damaged, use another" for line in damaged))
    if damaged:
        verified = f"{len(damaged)} damaged file{'s' if len(damaged) > 1 else ''}"
    else:
        verified = f"every file has the size and {'checksum' if checksums else 'name'} of {MANIFEST}"
        verified += "" if checksums else " (--verify compares checksums too)"
    inspection.add(Heading(f"checkpoint {folder}"))
    siblings = _siblings(folder)
    rows = [("files", f"{size(total)} in {sum(p.is_file() for p in folder.iterdir())} files: {verified}")]
    inspection.values["checkpoint"] = {"path": str(folder), "bytes": total, "damaged": damaged}
    try:
        checkpoint = Checkpoint(folder, verify=False)
        rows += _average_provenance(checkpoint) if checkpoint.is_average else _provenance(checkpoint)
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        # Damaged; the files above say so. Where they do not, this does.
        if not damaged:
            inspection.fault(
                f"{folder} cannot be read: {error!r}" if not isinstance(error, UserError) else str(error)
            )
        inspection.add(Facts(rows + siblings), Note("Nothing more of it can be read."))
        return
    inspection.add(Facts(rows + siblings))
    if checkpoint.is_average:
        _show_averaged(checkpoint.state["averaged"], inspection)
    stored = stored_adapter(folder)
    if stored is not None:
        show_adapter(stored, checkpoint.architecture, options, inspection)
    inspection.add(Heading("architecture"), Facts(_architecture_rows(checkpoint.architecture)))
    if changed := _not_default(checkpoint.config):
        inspection.add(Heading("config: what is not the default"), Facts(changed))
    shapes = stored_shapes(checkpoint.architecture, stored.adapter if stored else None)
    inspection.fault(*shape_problems(checkpoint, shapes, folder))
    names = checkpoint.tensors()
    if not checkpoint.is_average:
        _optimizer_presence(checkpoint, inspection)

    def load(name: str) -> torch.Tensor:
        shape, dtype = names[name]
        tensor = torch.empty(shape, dtype=dtype)
        checkpoint.load_into({name: tensor})
        return tensor

    show_tensors(names, load, options, inspection, str(folder))
    inspection.values["checkpoint"] |= {
        "iteration": checkpoint.iteration,
        "state": {
            key: value for key, value in checkpoint.state.items() if key not in ("data", "architecture")
        },
        "parameters": checkpoint.architecture.parameter_count(),
        "architecture": dataclasses.asdict(checkpoint.architecture),
    }


def inspect_huggingface(folder: Path, options: Options, inspection: Inspection) -> None:
    """Add everything there is to see of a Hugging Face folder. Raises UserError where it is none that can be used."""
    model = open_huggingface(folder)
    config = read_config(folder)
    architecture, weights = model.architecture, model.weights
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    said = config.get("torch_dtype") or config.get("dtype") or "unsaid"
    inspection.add(
        Heading(f"Hugging Face folder {folder}"),
        Facts(
            [
                (
                    "files",
                    f"{size(total)} in {len(files)} files: {', '.join(path.name for path in files[:12])}{' …' if len(files) > 12 else ''}",
                ),
                (
                    "family",
                    f"{model.family} ({', '.join(map(str, config.get('architectures') or ())) or 'no architectures in config.json'})",
                ),
                (
                    "written by",
                    f"transformers {config['transformers_version']}"
                    if "transformers_version" in config
                    else "unsaid",
                ),
                ("type", str(said)),
                ("tokenizer", _tokenizer_text(folder, architecture, inspection)),
            ]
        ),
        Heading("architecture"),
        Facts(_architecture_rows(architecture)),
    )
    names = {name: (weights.shape(name), weights.dtype(name)) for name in weights.names()}
    inspection.values["huggingface"] = {
        "path": str(folder),
        "family": model.family,
        "bytes": total,
        "parameters": architecture.parameter_count(),
        "architecture": dataclasses.asdict(architecture),
    }
    show_tensors(names, weights.load, options, inspection, str(folder))


def _tokenizer_text(folder: Path, architecture: Architecture, inspection: Inspection) -> str:
    from modelyard.data.tokenizer import load_tokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        inspection.warn(f"{folder} has no tokenizer: put the one of its data beside the weights")
        return "none"
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > architecture.vocab_size:
        inspection.fault(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} tokens, the model {architecture.vocab_size:,}: it is "
            "another's"
        )
    ends = [
        f"{role} {token.text}" for role, token in (("begin", tokenizer.bos), ("end", tokenizer.eos)) if token
    ]
    return ", ".join([f"{tokenizer.vocab_size:,} tokens", *ends, f"sha256 {tokenizer.fingerprint[:16]}…"])


def _provenance(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    state = checkpoint.state
    progress_made = state["progress"]
    config = checkpoint.config
    rows = [
        ("iteration", f"{checkpoint.iteration:,} of {config['training']['train_iters']:,}"),
        ("stays", _STAYS[marked_retention(checkpoint.folder)]),
        ("tokens", f"{progress_made['tokens']:,} positions, padding included"),
        ("optimizer steps", f"{state['optimizer_steps']:,}, {progress_made['skipped_steps']:,} skipped"),
        ("started from", _start(config)),
        ("seed", str(state["seed"])),
        ("data", f"fingerprint {state['data_fingerprint']}"),
        *([("layout", layout_line(Layout(**state["layout"])))] if "layout" in state else []),
        (
            "written by",
            f"modelyard {state['modelyard_version']}, torch {state['torch_version']}, on {state['initialized_on']}",
        ),
    ]
    return rows


def _average_provenance(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    state = checkpoint.state
    return [
        (
            "average",
            f"of {len(state['averaged'])} models: weights alone, to use or to start from, not to go on from",
        ),
        ("iteration", f"{checkpoint.iteration:,}, that of the newest of them"),
        ("written by", f"modelyard {state['modelyard_version']}, torch {state['torch_version']}"),
    ]


def _show_averaged(sources: list[dict[str, Any]], inspection: Inspection) -> None:
    """What an average was made of, and what the configs of the sources differ in from the one that is kept."""
    rows = [
        [
            source["path"],
            source["share"],
            f"{source['iteration']:,}" if "iteration" in source else _form(source["sha256"]),
            "; ".join(f"{name} {digest[:16]}…" for name, digest in source["sha256"].items()),
        ]
        for source in sources
    ]
    columns = ["folder", "share", "iteration", "sha256"]
    inspection.add(Heading("averaged"), Table(columns, rows, words=frozenset({0, 3})))
    for source in sources:
        if differing := source.get("config"):
            shown = "; ".join(
                f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in differing.items()
            )
            inspection.add(Note(f"In the config of {source['path']}: {shown}"))


def _form(files: Iterable[str]) -> str:
    """What a source of an average that is no checkpoint is, from its files."""
    return "adapter" if PEFT_CONFIG in files else "Hugging Face"


def _start(config: dict[str, Any]) -> str:
    pretrained = config.get("pretrained")
    if not pretrained or not pretrained.get("model_weights"):
        return "random weights" + (f" in the shape of {pretrained['path']}" if pretrained else "")
    return f"the weights of {pretrained['path']}"


def _siblings(folder: Path) -> list[tuple[str, str]]:
    """The other checkpoints and the exports of the experiment that a checkpoint lies in."""
    if folder.parent.name != "checkpoint":
        return []
    experiment = folder.parent.parent
    rows = [
        (
            "beside it",
            ", ".join(path.name for path in numbered_folders(folder.parent) if path != folder) or "no other",
        )
    ]
    exports = [
        f"{family.name} {', '.join(path.name for path in numbered_folders(family))}"
        for family in sorted(experiment.glob("export/*"))
        if numbered_folders(family)
    ]
    if exports:
        rows.append(("exports", "; ".join(exports)))
    return rows


def _architecture_rows(architecture: Architecture) -> list[tuple[str, str]]:
    rows = [("parameters", f"{architecture.parameter_count():,}")]
    for field in dataclasses.fields(architecture):
        value = getattr(architecture, field.name)
        if value is None or (field.name == "full_attention_layers" and architecture.window_size is None):
            continue
        if field.name == "rotary":
            known = {name: getattr(value, name) for name in _ROTARY[value.type]}
            text = ", ".join(f"{k} {_word(v)}" for k, v in known.items() if v is not None)
        else:
            text = _word(value)
        rows.append((field.name.replace("_", " "), text))
    return rows


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _not_default(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The keys of a resolved config that are not as the dialect has them by default."""
    try:
        changed = TrainConfig.model_validate(config).model_dump(mode="json", exclude_defaults=True)
    except ValueError:
        changed = config  # of a version with other keys: all of it
    return [(key, json.dumps(value, ensure_ascii=False)) for key, value in flatten(changed).items()]


def _optimizer_presence(checkpoint: Checkpoint, inspection: Inspection) -> None:
    names, frozen = set(checkpoint.tensors()), _frozen(checkpoint)
    missing = [
        f"optimizer.{name}.{moment}"
        for name in checkpoint.names()
        if name not in frozen
        for moment in ("exp_avg", "exp_avg_sq")
        if f"optimizer.{name}.{moment}" not in names
    ]
    if missing:
        inspection.fault(
            f"{checkpoint.folder} lacks {len(missing):,} of the optimizer's moments ({missing[0]} …): training cannot go on "
            "from it as if never stopped"
        )


def _frozen(checkpoint: Checkpoint) -> set[str]:
    """The parameters that were not trained, as far as the config says it."""
    try:
        config = TrainConfig.model_validate(checkpoint.config)
    except ValueError:
        return set()  # of a version with other keys
    default = config.optimizer.default_learning_rate_scale
    scales = rate_scales(
        config.model.base_model, checkpoint.architecture, 1.0 if default is None else default
    )
    return {name for name, scale in scales.items() if scale == 0}


def inspect_model(path: Path, options: Options, inspection: Inspection) -> bool:
    """A Hugging Face folder, a checkpoint, or an experiment's newest checkpoint; False where `path` is none of them."""
    if is_peft_folder(path):
        inspect_peft(path, options, inspection)
        return True
    if _is_model(path):
        inspect_huggingface(path, options, inspection)
        return True
    if any((path / name).exists() for name in ("state.json", ".metadata")):
        inspect_checkpoint(path, options, inspection)
        return True
    for directory in (path / "checkpoint", path):
        folders = list(reversed(numbered_folders(directory)))
        if not folders:
            continue
        if is_peft_folder(folders[0]):  # `EXPERIMENT_DIR/export/peft`
            inspect_peft(folders[0], options, inspection)
            return True
        if _is_model(folders[0]):  # `EXPERIMENT_DIR/export/llama`
            inspect_huggingface(folders[0], options, inspection)
            return True
        # What a run would go on from: the newest that is whole.
        for folder in folders:
            if not (lines := damage(folder, checksums=False)):
                break
            inspection.fault(
                *(f"{line}: this checkpoint is damaged, a run would not use it" for line in lines)
            )
        else:
            folder = folders[0]
        inspect_checkpoint(folder, options, inspection)
        return True
    return False


def _is_model(folder: Path) -> bool:
    """Whether config.json there is a model's. The folder of a run has one too, about the run."""
    file = folder / "config.json"
    try:
        return file.is_file() and "modelyard_version" not in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # reading it as a model's says what is wrong
