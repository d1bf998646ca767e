"""What `modelyard inspect` says of an adapter: its kind, its size, and whether what it adapts is there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from modelyard.config.adapter import Adapter
from modelyard.config.adapter_files import PEFT_WEIGHTS, StoredAdapter, stored_adapter
from modelyard.config.architecture import Architecture
from modelyard.config.disk import size
from modelyard.errors import UserError
from modelyard.model.formats.huggingface import HuggingFaceWeights
from modelyard.model.formats.safetensors import read_entries
from modelyard.report.inspect_blocks import Facts, Heading, Inspection
from modelyard.report.inspect_data import Options
from modelyard.report.inspect_tensors import show_tensors
from modelyard.train.models_on_disk import open_model


def inspect_peft(folder: Path, options: Options, inspection: Inspection) -> None:
    """Add everything there is to see of an adapter as PEFT writes it. Raises UserError where it is none that can be used."""
    stored = stored_adapter(folder)
    assert stored is not None
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    names = ", ".join(path.name for path in files[:12]) + (" …" if len(files) > 12 else "")
    inspection.add(
        Heading(f"adapter {folder}"), Facts([("files", f"{size(total)} in {len(files)} files: {names}")])
    )
    inspection.values["peft"] = {"path": str(folder), "bytes": total}
    show_adapter(stored, None, options, inspection)
    weights = HuggingFaceWeights(read_entries(folder / PEFT_WEIGHTS))
    tensors = {name: (weights.shape(name), weights.dtype(name)) for name in weights.names()}
    show_tensors(tensors, weights.load, options, inspection, str(folder))


def stored_shapes(architecture: Architecture, adapter: Adapter | None) -> dict[str, tuple[int, ...]]:
    """The parameters that a checkpoint has to have: of an adapter that is trained alone, only its own."""
    if adapter is None:
        return architecture.parameter_shapes()
    base = {} if adapter.freeze_others else architecture.parameter_shapes()
    return base | adapter.shapes(architecture)


def show_adapter(
    stored: StoredAdapter, architecture: Architecture | None, options: Options, inspection: Inspection
) -> None:
    """Add what is known of an adapter. `architecture` is the base's; None takes it from the base, where that is there.

    A base that is there is opened, and its weights compared with what the adapter was trained on, unless no values are to be
    read (`--scan-limit 0`).
    """
    adapter = stored.adapter
    kind = ("DoRA" if adapter.dora else "LoRA") + (", rank-stabilised" if adapter.rank_stabilized else "")
    rows = [
        ("kind", f"{kind}, of rank {adapter.rank}, alpha {adapter.alpha:g}: a factor of {adapter.scale:.4g}"),
        ("matrices", f"{', '.join(adapter.modules)} of every block"),
    ]
    if adapter.dropout:
        rows.append(("dropout", f"{adapter.dropout:g}, in training"))
    if (how := adapter.quantization) is not None:
        double = ", their scales in 8 bits" if how.double else ""
        rows.append(("trained on", f"the base in NF4, blocks of {how.block}{double}"))
    text, architecture = _base(stored, architecture, options, inspection)
    rows.append(("base", text))
    if architecture is not None:
        own, whole = adapter.parameter_count(architecture), architecture.parameter_count()
        rows.append(("parameters", f"{own:,} beside {whole:,} ({own / whole:.2%})"))
    inspection.add(Heading("adapter"), Facts(rows))
    inspection.values["adapter"] = asdict(adapter) | {
        "base": stored.base_path,
        "fingerprint": stored.fingerprint,
    }


def _base(
    stored: StoredAdapter, architecture: Architecture | None, options: Options, inspection: Inspection
) -> tuple[str, Architecture | None]:
    """Where the base is and what of it is known, and its shape."""
    if not stored.adapter.freeze_others:
        return "here: it is trained as well", architecture
    named = stored.base_path or "not said"
    if options.scan_limit <= 0:
        return named, architecture
    place = Path(named).expanduser()
    if stored.base_path is None or not (place.is_dir() or (stored.folder / place).is_dir()):
        inspection.warn(
            f"{stored.folder}: its base ({named}) is not here; give it with --base DIR where it is used"
        )
        return f"{named}, which is not here", architecture
    try:
        model = open_model(stored.folder)
    except UserError as error:
        inspection.fault(*error.problems)
        return f"{named}, with which it cannot be used", architecture
    same = (
        ""
        if stored.fingerprint is None
        else f", the weights that it was trained on ({stored.fingerprint[:12]}…)"
    )
    return f"{named}{same}", model.architecture
