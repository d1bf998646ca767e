"""Kills for `benchmarks/faults.py`: a run is killed (-9) again and again until it has ended, and compared with one that
nobody stopped.

The runs are forked from a process that has imported torch, so that a kill costs a second and not five; a few are
processes of their own. A forked run notes what it is doing in a byte of shared memory (the functions below are wrapped
to do so, nothing else about them changes). Every other kill comes from outside, a random time after a phase began;
the rest hit a random call inside the phase, which the run counts itself: those can be repeated.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults_marker import PHASES, Marker, count_calls_in, mark_everything

ROOT = Path(__file__).resolve().parent.parent

TARGETS = ("step", "save", "resume", "seal", "evaluate", "prune", "between", "export", "samples")
"""What the kills are aimed at, in turn; where they hit is what counts."""
SHORT = ("seal", "prune")
"""Over in a millisecond: a kill from outside would come too late."""
SECONDS_WITHOUT_SIGN = 120
PROCESSES = 20
"""Every how many kills one is of a real process."""

TRAIN = """\
training:
  train_iters: {iterations}
  logs: {{interval: 1, tensorboard: no}}
  evaluators:
    validation:
      interval: 4
      evaluator: {{type: loss, iterations: 2, dataset_name: validation}}
    samples:
      interval: 5
      evaluator: {{type: samples, prompts: ["import json\\n", "def "], max_new_tokens: 6, temperature: 0.7, top_k: 40}}
  checkpoint: {{interval: 3, keep: 2}}
  export: {{format: llama, interval: 7, keep: 2, data_type: float32}}
  test_iters: 2
batch: {{sequence_length: 48, micro_batch_size: 2, batch_size: 4, cross_document_attention: no}}
data:
  datasets:
    training: {{type: file, path: {data}/fast_llm_config_training.yaml}}
    validation: {{type: file, path: {data}/fast_llm_config_validation.yaml}}
    test: {{type: file, path: {data}/fast_llm_config_validation.yaml}}
optimizer:
  weight_decay: 0.1
  learning_rate: {{base: 3e-3, minimum: 3e-4, decay_style: cosine, decay_iterations: {iterations}, warmup_iterations: 2}}
model:
  base_model:
    vocab_size: 320
    transformer:
      num_layers: 2
      hidden_size: 32
      num_attention_heads: 4
      head_groups: 2
      ffn_hidden_size: 64
      gated: yes
      add_linear_biases: no
      normalization: {{type: rms_norm}}
      rotary: {{type: default}}
run: {{experiment_dir: run}}
"""


def preload() -> None:
    """Import what a run imports sooner or later, so that no fork has to."""
    import torch
    import torch._dynamo
    from transformers import AutoTokenizer  # noqa: F401

    import modelyard.cli
    import modelyard.generate.text
    import modelyard.train.export
    import modelyard.train.run  # noqa: F401

    torch.set_num_threads(1)


def write_config(place: Path, data: Path, iterations: int) -> Path:
    file = place / "kill.yaml"
    file.write_text(TRAIN.format(data=data, iterations=iterations))
    return file


# The run in a forked process


def start(folder: Path, marker: Marker, words: list[str], *, count_calls: Path | None = None) -> int:
    """Fork a run in `folder`; returns the process id. What it says goes to `folder / "said.txt"`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.chdir(folder)
        output = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        mark_everything(marker)
        from modelyard.cli import main

        if count_calls is not None:
            count_calls_in(marker, count_calls)
        marker.begin("resume")
        status = main(words)
        marker.at_end()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> int | None:
    """Exit status of a process, None while it lives."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def run_to_end(
    folder: Path, marker: Marker, words: list[str], *, count_calls: Path | None = None
) -> tuple[dict[str, float], int]:
    """A run that nobody stops; returns the usual seconds of each phase, and the exit status."""
    marker.clear()
    child = start(folder, marker, words, count_calls=count_calls)
    seconds: Counter[str] = Counter()
    last = time.perf_counter()
    while (status := ended(child)) is None:
        time.sleep(0.0005)
        now = time.perf_counter()
        for phase in marker.phases:
            seconds[phase] += now - last
        last = now
    return {phase: seconds[phase] / max(1, marker.times(phase)) for phase in PHASES}, status


# The truth, and what is compared with it

TRAINED = (
    "iteration",
    "evaluator",
    "loss",
    "loss_mean",
    "grad_norm",
    "learning_rate",
    "tokens",
    "targets",
    "skipped_steps",
    "samples",
)
"""Keys of metrics.jsonl that say what was trained; the others depend on the clock."""


def records(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds of the training itself, line by line."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in TRAINED} for line in lines]


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint as bytes, optimizer and all."""
    import torch

    from modelyard.train.checkpoint import Checkpoint

    opened = Checkpoint(checkpoint)
    shapes = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in opened.tensors().items()}
    opened.load_into(shapes)
    return {name: tensor.numpy().tobytes() for name, tensor in shapes.items()}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass
class Truth:
    """The run that nobody stopped: its numbers, every checkpoint and export, and which of them stay."""

    records: list[dict[str, Any]]
    checkpoints: dict[str, dict[str, bytes]]
    exports: dict[str, dict[str, bytes]]
    stay: tuple[list[str], list[str]]
    seconds: dict[str, float] = field(default_factory=dict)


def find_truth(place: Path, marker: Marker, config: Path) -> Truth:
    """Runs twice: as the config says, and once keeping every checkpoint and export."""
    usual, whole = place / "truth", place / "truth-whole"
    for folder in (usual, whole):
        folder.mkdir()
    seconds, failed = run_to_end(usual, marker, ["train", str(config)])
    keep_all = ["training.checkpoint.keep=", "training.export.keep="]
    words = ["train", str(config), *keep_all]
    _, also_failed = run_to_end(whole, marker, words, count_calls=place / "calls.json")
    if failed or also_failed:
        raise RuntimeError(f"the run that nobody stops fails: {said(usual)}{said(whole)}")
    marker.calls = json.loads((place / "calls.json").read_text())
    stay = stays(usual / "run")
    return Truth(
        records(usual / "run"),
        {p.name: tensors(p) for p in (whole / "run" / "checkpoint").iterdir()},
        {p.name: folder_bytes(p) for p in (whole / "run" / "export" / "llama").iterdir()},
        stay,
        seconds,
    )


def stays(run: Path) -> tuple[list[str], list[str]]:
    """Names of all that is in the folders of checkpoints and of exports."""
    names = (
        [p.name for p in folder.iterdir()] if folder.is_dir() else []
        for folder in (run / "checkpoint", run / "export" / "llama")
    )
    checkpoints, exports = names
    return sorted(checkpoints), sorted(exports)


def false_folders(run: Path, truth: Truth) -> list[str]:
    """Folders that read as complete and are not: those with a number for a name that differ from the truth's."""
    problems = []
    checkpoints, exports = stays(run)
    for name in filter(str.isdigit, checkpoints):
        try:
            same = tensors(run / "checkpoint" / name) == truth.checkpoints[name]
        except Exception as error:
            problems.append(f"checkpoint/{name} cannot be read: {error!r}")
            continue
        if not same:
            problems.append(f"checkpoint/{name} has other tensors than the run never stopped")
    for name in filter(str.isdigit, exports):
        if folder_bytes(run / "export" / "llama" / name) != truth.exports.get(name):
            problems.append(f"export/llama/{name} differs from that of the run never stopped")
    return problems


def differences(run: Path, truth: Truth) -> list[str]:
    """In what a finished run differs from the truth."""
    problems = false_folders(run, truth)
    found = records(run)
    if found != truth.records:
        keys = [(r["iteration"], r.get("evaluator")) for r in found]
        wrong = [record for record in found if record not in truth.records]
        problems.append(f"metrics.jsonl differs: {wrong[:2] or keys}")
    if stays(run) != truth.stay:
        problems.append(f"folders {stays(run)}, not {truth.stay}")
    return problems


# Killing


@dataclass
class Kill:
    number: int
    wanted: str
    hit: str
    lost: str | None = None


def kill_forked(
    folder: Path, marker: Marker, words: list[str], phase: str, rng: random.Random, seconds: dict[str, float]
) -> tuple[str | None, int | None]:
    """Start a run and kill it in `phase`; returns (the phase that was hit, None), or (None, status) where it ended before."""
    begin_with = "step" if phase == "between" else phase
    times = 1 if phase == "resume" else rng.choice((1, 1, 1, 2, 3))
    by_calls = phase in SHORT or (phase != "between" and rng.random() < 0.5)
    share = rng.random() if by_calls else None
    marker.clear(begin_with, times, share)
    child = start(folder, marker, words)
    limit = time.monotonic() + SECONDS_WITHOUT_SIGN
    while (status := ended(child)) is None and time.monotonic() < limit:
        if marker.reached and share is None:
            marker.go()
            time.sleep(rng.uniform(0, seconds[phase] if phase != "between" else 3 * seconds["step"]))
            break
        time.sleep(0.0002)
    if status is None:
        os.kill(child, signal.SIGKILL)
        _, raw = os.waitpid(child, 0)
        status = os.waitstatus_to_exitcode(raw)
    return (marker.hit(phase), None) if status == -signal.SIGKILL else (None, status)


def kill_process(folder: Path, words: list[str], rng: random.Random) -> tuple[str | None, int | None]:
    """The same with the program as users start it, killed a moment after it says or writes something of the kind."""
    sign = rng.choice(("checkpoint/*.tmp", "export/*/*.tmp", "log.txt"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").glob(sign)}
    process = subprocess.Popen(
        [sys.executable, "-m", "modelyard", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    limit = time.monotonic() + SECONDS_WITHOUT_SIGN
    while process.poll() is None and time.monotonic() < limit:
        try:
            if any(path.stat().st_mtime_ns != before.get(path) for path in (folder / "run").glob(sign)):
                break
        except FileNotFoundError:
            continue
        time.sleep(0.0002)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    status = process.wait()
    return ("a process", None) if status == -signal.SIGKILL else (None, status)


def run_kills(
    count: int, seed: int, place: Path, data: Path, *, processes: bool = True, iterations: int = 24
) -> Iterator[Kill]:
    """`count` kills, each followed by a start without a hand; every run that ends is compared with the truth.

    `data` is what `prepare` wrote. Every other kill hits a run that writes its checkpoints beside the training. Each is
    yielded once the run that it hit has ended.
    """
    preload()
    marker = Marker()
    config = write_config(place, data, iterations)
    truth = find_truth(place, marker, config)
    words = usual = ["train", str(config)]
    number = starts = 0
    while number < count:
        folder = place / f"killed-{starts}"
        folder.mkdir()
        kills: list[Kill] = []
        status: int | None = None
        while status is None:  # start, kill, start, kill, … until a start comes to the end of the run
            rng = random.Random(f"{seed}/{starts}")
            starts += 1
            if number >= count:
                status = run_to_end(folder, marker, words)[1]
                break
            wanted = TARGETS[number % len(TARGETS)]
            words = usual if number % 2 else [*usual, "training.checkpoint.asynchronous=no"]
            if processes and number % PROCESSES == PROCESSES - 1:
                wanted = "a process"
                hit, status = kill_process(folder, words, rng)
            else:
                hit, status = kill_forked(folder, marker, words, wanted, rng, truth.seconds)
            if hit is not None:
                kills.append(
                    Kill(number, wanted, hit, "; ".join(false_folders(folder / "run", truth)) or None)
                )
                number += 1
        problems = (
            differences(folder / "run", truth) if not status else [f"ended with {status}: {said(folder)}"]
        )
        for kill in kills:
            kill.lost = kill.lost or "; ".join(problems) or None
            yield kill
        if not problems:
            shutil.rmtree(folder)


def said(folder: Path) -> str:
    """The end of what a forked run said."""
    file = folder / "said.txt"
    return file.read_text(errors="replace")[-3000:] if file.exists() else ""
