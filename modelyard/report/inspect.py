"""`modelyard inspect`: what training data, a batch or a checkpoint looks like, and what is wrong with it.

The exit status is 1 where something is wrong with what was looked at, after all of it was shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.data.foreign_file import is_foreign
from modelyard.data.store import FORMAT
from modelyard.errors import UserError, missing_path
from modelyard.report.inspect_blocks import Inspection
from modelyard.report.inspect_data import Options
from modelyard.report.inspect_store import inspect_store, stores_of

if TYPE_CHECKING:
    from modelyard.config.loader import Loaded


def inspect_command(
    words: Sequence[str],
    options: Options,
    load: Callable[[], Loaded],
    *,
    html: Path | None = None,
    as_json: bool = False,
) -> int:
    """Inspect what `words` name and show it. Returns the exit status: 1 with a fault, else 0.

    Args:
        words: a store's, checkpoint's or model's folder, or what another program prepared (a `.bin`/`.idx` pair, a single
            file); or config files and overrides, which `load` reads.
        options: what is shown, and how much.
        load: the config that the words make.
        html: where to write a page too; then the terminal gets the faults and warnings alone.
        as_json: one JSON object on standard output in place of the text.

    Raises:
        UserError: there is nothing of these kinds there, or it cannot be opened.
    """
    folder = Path(words[0]).expanduser() if words else None
    if folder is not None and (folder.is_dir() or is_foreign(folder)):
        if len(words) > 1:
            raise UserError(f"{folder} is inspected alone; what is '{words[1]}'?")
        inspection = Inspection(f"Inspection of {folder}")
        _inspect_folder(folder, options, inspection)
    else:
        for word in words:
            if "=" not in word and not Path(word).expanduser().exists():
                raise UserError(missing_path(word))
        inspection = Inspection(f"Inspection of {', '.join(words)}")
        _inspect_config(words, options, load, inspection)
    return _show(inspection, options, html=html, as_json=as_json)


def _inspect_folder(folder: Path, options: Options, inspection: Inspection) -> None:
    if not folder.is_dir():
        inspect_store(folder, options, inspection)
    elif stores := stores_of(folder):
        for store in stores:
            inspect_store(store, options, inspection)
    elif _is_store(folder):
        inspect_store(folder, options, inspection)
    else:
        # These need torch.
        from modelyard.report.inspect_checkpoint import inspect_model

        if not inspect_model(folder, options, inspection):
            raise UserError(
                f"{folder} is no token store (manifest.json), no checkpoint or experiment with one (checkpoint/), no Hugging "
                "Face folder (config.json) and no adapter (adapter_config.json)"
            )


def _is_store(folder: Path) -> bool:
    """A store, or what is left of one: its own reader says then what is wrong."""
    if (folder / "tokens_00000.bin").exists():
        return True
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return isinstance(manifest, dict) and manifest.get("format") == FORMAT
    except (OSError, ValueError):
        return False


def _inspect_config(
    words: Sequence[str], options: Options, load: Callable[[], Loaded], inspection: Inspection
) -> None:
    from modelyard.report.inspect_config import inspect_config

    for word in words:
        if "=" not in word and (stored := _stores_of_dataset_file(Path(word))):
            raise UserError(
                f"{word} is a dataset file: inspect its store, {stored[0]}, or the training config that reads it"
            )
    loaded = load()
    if loaded.kind == "prepare":
        output = loaded.prepare.output_path
        there = (
            f"inspect what it made, {output}" if output.exists() else f"run it first, then inspect {output}"
        )
        raise UserError(f"{words[0]} is a preparation config: {there}")
    inspect_config(loaded, options, inspection)


def _stores_of_dataset_file(path: Path) -> list[Path]:
    from modelyard.config.yaml import read_yaml

    if not path.is_file():
        return []
    try:
        values = read_yaml(path).values
    except UserError:
        return []
    if not isinstance(values, dict) or "type" not in values:
        return []
    return [path.parent / str(values.get("path", ""))]


def _show(inspection: Inspection, options: Options, *, html: Path | None, as_json: bool) -> int:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding lacks
    if html is not None:
        from modelyard.report.inspect_html import page_of
        from modelyard.report.page import write_page

        write_page(html, page_of(inspection), option="--html")
    if as_json:
        values = {**inspection.values, "faults": inspection.faults, "warnings": inspection.warnings}
        print(json.dumps(values, ensure_ascii=True, allow_nan=False))
    else:
        from modelyard.report.inspect_terminal import Terminal

        if html is not None:
            inspection.blocks.clear()
        Terminal(ids=options.ids).show(inspection)
        if html is not None:
            print(f"wrote {html}")
    return 1 if inspection.faults else 0
