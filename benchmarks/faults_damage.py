"""Damage on the disk for `benchmarks/faults.py`: each file of a checkpoint and of a token store, in each way.

Every case starts the program on a copy of a run in which one thing is damaged. It is let go up to the first step: by
then it must have named what is wrong and either gone back to the newest good checkpoint or refused with exit status 2.
What is left over beside (`*.tmp`, a lock, torn logs) must hinder nothing: those runs go on to their end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults_kills import Marker, differences, find_truth, preload, run_to_end, said, write_config

STARTED = 99
ITERATIONS = 12


def _flip(part: float) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[min(len(content) - 1, int(len(content) * part))] ^= 1
        path.write_bytes(content)

    return flip


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _cut_one(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\x00")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut in half": _cut,
    "one byte short": _cut_one,
    "one byte longer": _longer,
    "emptied": lambda path: path.write_bytes(b""),
    "a bit flipped at the beginning": _flip(0.0),
    "a bit flipped in the middle": _flip(0.5),
    "a bit flipped at the end": _flip(1.0),
    "filled with zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "removed": lambda path: path.unlink(),
    "unreadable (a folder in its place)": _folder,
    "unreadable (a link to nowhere)": _dangling,
}


class Harmless(Exception):
    """The damage changed nothing: a last line end is gone, or zeros were filled with zeros."""


def _damage(path: Path, how: str) -> None:
    before = path.read_bytes()
    DAMAGES[how](path)
    if path.is_file() and (
        path.read_bytes() == before or _as_json(path.read_bytes()) == _as_json(before) is not None
    ):
        raise Harmless


def _as_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


@dataclass
class Damage:
    kind: str
    """What was damaged: `checkpoint`, `store`, `left over`."""
    what: str
    lost: str | None


@dataclass
class Scene:
    """A run that left after 9 of its 12 iterations, with checkpoints at 3, 6 and 9."""

    place: Path
    marker: Marker
    config: Path
    run: Path


def _try(scene: Scene, words: list[str], folder: Path) -> int:
    """Start in `folder` and stop before the first step; returns the exit status, or `STARTED`."""

    def refuse(*_: object, **__: object) -> None:
        os._exit(STARTED)  # whatever happened until here is on the disk and in said.txt

    from modelyard.train import state

    before = state.train_step
    state.train_step = refuse  # type: ignore[assignment]
    try:
        return run_to_end(folder, scene.marker, words)[1]
    finally:
        state.train_step = before


def _checkpoint_case(scene: Scene, file: str, how: str) -> str | None:
    folder = _copy(scene)
    _damage(folder / "run" / "checkpoint" / "9" / file, how)
    status = _try(scene, ["train", str(scene.config)], folder)
    text = said(folder)
    if status != STARTED:
        return f"ended with {status}: {text}"
    if "run/checkpoint/9 is damaged" not in text or "run/checkpoint/9/" not in text:
        return f"not named: {text}"
    if "resuming from run/checkpoint/6" not in text:
        return f"did not go back to checkpoint 6: {text}"
    names = sorted(path.name for path in (folder / "run" / "checkpoint").iterdir())
    return None if names == ["3", "6", "9.damaged"] else f"checkpoints are now {names}"


def _last_checkpoint_case(scene: Scene, file: str, how: str) -> str | None:
    """The same where there is no other: refused, and everything left as it is."""
    folder = _copy(scene)
    for older in ("3", "6"):
        shutil.rmtree(folder / "run" / "checkpoint" / older)
    _damage(folder / "run" / "checkpoint" / "9" / file, how)
    return _refused(scene, folder, ["train", str(scene.config)], "run/checkpoint/9")


def _store_case(scene: Scene, data: Path, file: str, how: str) -> str | None:
    folder = _copy(scene)
    shutil.copytree(data, folder / "data")
    _damage(folder / "data" / file, how)
    words = ["train", str(scene.config)]
    words += [
        f"data.datasets.{name}.path=data/fast_llm_config_{split}.yaml" for name, split in SPLITS.items()
    ]
    # A description of a dataset is a text file without a checksum: a change that changes nothing is none.
    harmless = file.endswith(".yaml")
    return _refused(scene, folder, words, "data/", harmless=harmless)


SPLITS = {"training": "training", "validation": "validation", "test": "validation"}


def _refused(
    scene: Scene, folder: Path, words: list[str], name: str, *, harmless: bool = False
) -> str | None:
    before = _contents(folder)
    status = _try(scene, words, folder)
    text = said(folder)
    (folder / "said.txt").unlink(missing_ok=True)
    if status == STARTED and harmless:
        return None  # It went on from checkpoint 9: refuse_changes has compared the data's fingerprint with its own.
    if status != 2:
        return f"ended with {status}: {text}"
    if name not in text or any(not line.startswith("error: ") for line in text.splitlines()):
        return f"not named: {text}"
    after = _contents(folder)
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    return f"changed: {sorted(changed)}" if changed else None


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _copy(scene: Scene) -> Path:
    folder = scene.place / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scene.run, folder)
    return folder


def _append(path: str, content: bytes) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        file = run / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((file.read_bytes() if file.exists() else b"") + content)

    return write


def _torn_record(run: Path) -> None:
    """The last record of the log, which repeats nothing: what a power cut may take of a file that was not synced."""
    _append("metrics.jsonl", b'{"iteration": 9, "evaluator": "x", "loss": 1.0, "time": 1}')(run)


def _torn(path: str) -> Callable[[Path], None]:
    return lambda run: _cut_one(run / path) or _cut_one(run / path)  # type: ignore[func-returns-value]


LEFT_OVER: dict[str, Callable[[Path], None]] = {
    "a .lock": _append(".lock", b"4711"),
    "checkpoint/12.tmp": _append("checkpoint/12.tmp/__0_0.distcp", b"x" * 1000),
    "checkpoint/9.tmp beside checkpoint/9": _append("checkpoint/9.tmp/.metadata", b"x"),
    "export/llama/12.tmp": _append("export/llama/12.tmp/model.safetensors", b"x"),
    "tokenizer.tmp": _append("tokenizer.tmp/tokenizer.json", b"x"),
    "metrics.jsonl with a record without its line end": _torn_record,
    "metrics.jsonl with JSON that is no record": _append("metrics.jsonl", b'3\n[1]\n{"loss": 1}\nnull\n'),
    "metrics.jsonl with half a line at its end": _append("metrics.jsonl", b'{"iteration": 10, "lo'),
    "metrics.jsonl with records after the checkpoint": _append(
        "metrics.jsonl", b'{"iteration": 10, "loss": 1.0}\n'
    ),
    "metrics.jsonl with bytes that are no text": _append("metrics.jsonl", b"\xff\x00\xfe\n"),
    "events.jsonl with half a line at its end": _append("events.jsonl", b'{"event": "sav'),
    "log.txt gone": lambda run: (run / "log.txt").unlink(),
    "an empty folder checkpoint/11": lambda run: (run / "checkpoint" / "11").mkdir(),
    "a file checkpoint/11": _append("checkpoint/11", b""),
    "a folder of the user in checkpoint/": lambda run: (run / "checkpoint" / "notes").mkdir(),
    "config.json torn": _torn("config.json"),
}


def _left_over_case(scene: Scene, how: str, truth_run: Callable[[Path], list[str]]) -> str | None:
    folder = _copy(scene)
    LEFT_OVER[how](folder / "run")
    _, status = run_to_end(folder, scene.marker, ["train", str(scene.config)])
    if status:
        return f"ended with {status}: {said(folder)}"
    if "Traceback" in said(folder):
        return said(folder)
    return "; ".join(truth_run(folder / "run")) or None


def run_damages(place: Path, data: Path, *, few: bool = False) -> Iterator[Damage]:
    """Every kind of damage to every file; with `few` one file each and every third kind."""
    preload()
    marker = Marker()
    config = write_config(place, data, ITERATIONS)
    truth = find_truth(place, marker, config)
    scene = Scene(place, marker, config, place / "scene")
    scene.run.mkdir()
    words = ["train", str(config), "training.checkpoint.keep=", "training.shutdown.interval=9"]
    _, status = run_to_end(scene.run, marker, words)
    if status:
        raise RuntimeError(said(scene.run))
    (scene.run / "said.txt").unlink()

    def ends_as_the_truth(run: Path) -> list[str]:
        for extra in ("11.damaged", "11", "notes"):
            path = run / "checkpoint" / extra
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        return differences(run, truth)

    def tried(kind: str, file: str, how: str, case: Callable[[], str | None]) -> Iterator[Damage]:
        try:
            yield Damage(kind, f"{file} {how}", case())
        except Harmless:
            return

    kinds = list(DAMAGES)[::3] if few else list(DAMAGES)
    checkpoint = scene.run / "run" / "checkpoint" / "9"
    for file in sorted(path.name for path in checkpoint.iterdir())[: 2 if few else None]:
        for how in kinds:
            kind = "a file of the newest of three checkpoints"
            yield from tried(kind, file, how, partial(_checkpoint_case, scene, file, how))
        for how in kinds[::3]:
            kind = "a file of the only checkpoint"
            yield from tried(kind, file, how, partial(_last_checkpoint_case, scene, file, how))
    files = sorted(str(path.relative_to(data)) for path in (data / "training").rglob("*") if path.is_file())
    files.append("fast_llm_config_training.yaml")
    for file in files[-2:] if few else files:
        for how in kinds:
            yield from tried(
                "a file of a token store", file, how, partial(_store_case, scene, data, file, how)
            )
    for how in list(LEFT_OVER)[::4] if few else LEFT_OVER:
        yield Damage("left over or torn beside them", how, _left_over_case(scene, how, ends_as_the_truth))
