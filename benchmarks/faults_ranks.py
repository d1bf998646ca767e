"""Kills for `benchmarks/faults.py` of runs in several processes: one rank, all of them, the launcher that started them.

Each run is the command a user types, `modelyard train … --nproc N --max-restarts K`, nothing about it changed. What it is
doing is seen from outside: its folder is looked at every millisecond, and a random moment after the phase that is
aimed at has begun, the victims get signal 9. Of ranks the launcher starts new ones; a launcher is started again here, by
the same command, or in another layout. Runs that have come to their end are compared with one that nobody stopped.

When a kill comes is drawn from the seed, the layout and the kill's number; what the processes do in that moment is their own.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults_jobs import LAYOUTS, PHASES, Hangs, Job
from benchmarks.faults_kills import (
    Kill,
    Truth,
    differences,
    false_folders,
    folder_bytes,
    records,
    stays,
    tensors,
)

ITERATIONS = 42
"""A multiple of the intervals of checkpoints and exports: what stays of both is the newest `KEEP`."""
TRAIN = """\
training:
  train_iters: {iterations}
  logs: {{interval: 1, tensorboard: no}}
  evaluators:
    validation:
      interval: 8
      evaluator: {{type: loss, iterations: 2, dataset_name: validation}}
    samples:
      interval: 10
      evaluator: {{type: samples, prompts: ["import json\\n", "def "], max_new_tokens: 6, temperature: 0.7, top_k: 40}}
  checkpoint: {{interval: 3, keep: {keep}}}
  export: {{format: llama, interval: 7, keep: {keep}, data_type: float32}}
  test_iters: 2
  compile: no
batch: {{sequence_length: 48, micro_batch_size: 1, batch_size: 8, cross_document_attention: no}}
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
      num_layers: 4
      hidden_size: 64
      num_attention_heads: 4
      head_groups: 2
      ffn_hidden_size: 192
      gated: yes
      add_linear_biases: no
      normalization: {{type: rms_norm}}
      rotary: {{type: default}}
  distributed: {{timeout: 60}}
run: {{experiment_dir: run}}
"""
KEEP = 2

MOVES: tuple[tuple[str | None, int], ...] = (
    ("ZeRO 1 on 2", 1),
    ("tensor 2 with sequence parallelism", 4),
    (None, 2),
    ("ZeRO 3 on 2", 2),
    ("pipeline 2 (1f1b)", 1),
    ("contexts 2", 8),
    (None, 8),
    ("2 replicas x 2 shards", 2),
    ("ZeRO 2 on 2, offloaded", 4),
    ("pipeline 2 x ZeRO 3 on 2", 1),
)
"""Layouts (None: one process by itself) and micro-batch sizes that a run goes through, each after a kill."""
LEGS = 5
"""Kills of one run that moves."""
SHARE_OF_MOVES = 6
"""Every how many kills one is followed by a move."""
ALLOWED = 1e-5
"""How far a loss or the norm of a gradient may be from that of the run that stayed in one layout, as a part of it."""

VICTIMS = ("one rank", "all ranks", "one rank", "the launcher")
AIMS = ("save", "load", "export", "step")
EARLY = 0.25
"""Share of the kills aimed at loading that come before it, while the processes start."""


@dataclass
class RankKill(Kill):
    layout: str = ""
    victim: str = ""
    moved_to: str | None = None
    """The layout that the run was started again in, where that is another."""
    furthest: float | None = None
    """Then: the largest difference of a loss or norm from the run that stayed, as a part of it."""


class Plan(NamedTuple):
    """One kill as it is meant."""

    number: int
    victim: str
    aim: str


# The truth


def write_config(folder: Path, data: Path) -> tuple[Path, Path]:
    """Two configs: as the runs have it, and for the truth, which keeps all."""
    files = folder / "kill.yaml", folder / "truth.yaml"
    for file, keep in zip(files, (KEEP, "null"), strict=True):
        file.write_text(TRAIN.format(data=data, iterations=ITERATIONS, keep=keep))
    return files


def find_truth(folder: Path, config: Path, layout: str) -> Truth:
    """A run in the layout that nobody stops, and how long its phases take."""
    job = Job(folder, config, layout)
    job.start(0)
    seconds: Counter[str] = Counter()
    begun: Counter[str] = Counter()
    before, last = "", time.perf_counter()
    while job.ended is None:
        phase, now = job.sight.phase, time.perf_counter()
        seconds[phase] += now - last
        begun[phase] += phase != before
        before, last = phase, now
        time.sleep(0.001)
    if problems := job.end():
        raise RuntimeError(f"the run that nobody stops, {layout}: {'; '.join(problems)}\n{job.stop()}")
    checkpoints = {path.name: tensors(path) for path in (job.run / "checkpoint").iterdir()}
    exports = {path.name: folder_bytes(path) for path in (job.run / "export" / "llama").iterdir()}
    newest = tuple(sorted(sorted(names, key=int)[-KEEP:]) for names in stays(job.run))
    usual = {phase: seconds[phase] / max(1, begun[phase]) for phase in PHASES}
    return Truth(records(job.run), checkpoints, exports, newest, usual)  # type: ignore[arg-type]


def furthest(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> tuple[float, list[str]]:
    """The largest difference of a loss or norm, as a part of it; and what else differs of two runs' records."""
    keys = [[(r["iteration"], r.get("evaluator")) for r in both] for both in (found, expected)]
    if keys[0] != keys[1]:
        return 0.0, [f"other records: {keys[0]}"]
    largest, problems = 0.0, []
    for mine, theirs in zip(found, expected, strict=True):
        if mine.keys() != theirs.keys():
            problems.append(f"other keys: {sorted(mine)}, {sorted(theirs)}")
            continue
        for key, value in theirs.items():
            if key in ("loss", "loss_mean", "grad_norm"):
                largest = max(largest, abs(mine[key] - value) / abs(value))
            elif mine[key] != value:
                problems.append(f"{key} of iteration {theirs['iteration']}: {mine[key]!r}, not {value!r}")
    return largest, problems


# Killing


def plans(count: int, seed: int, layouts: Collection[str]) -> tuple[dict[str, list[Plan]], list[list[Plan]]]:
    """Layout → kills of runs that stay in it; and kills of each run that moves."""
    moving = count // SHARE_OF_MOVES
    every = [(victim, aim) for victim in VICTIMS for aim in AIMS]
    random.Random(seed).shuffle(every)
    staying = [Plan(number, *every[number % len(every)]) for number in range(count - moving)]
    # Neighbours in number are neighbours in the same run.
    used = list(layouts)
    bounds = [len(staying) * n // len(used) for n in range(len(used) + 1)]
    by_layout = {name: staying[begin:end] for name, begin, end in zip(used, bounds, bounds[1:], strict=False)}
    moves = [
        Plan(number, "the launcher", AIMS[number % len(AIMS)]) for number in range(count - moving, count)
    ]
    return by_layout, [moves[n : n + LEGS] for n in range(0, len(moves), LEGS)]


def kill_once(
    job: Job, plan: Plan, rng: random.Random, seconds: dict[str, float], *, soon: bool = False
) -> str | None:
    """Wait for the moment, `soon` the first of its kind, and kill; the phase that was hit, None where the run ended before."""
    aim, times = plan.aim, 1 if soon else rng.choice((1, 1, 2, 3))
    if aim == "load":
        times, aim = 1, "start" if rng.random() < EARLY else aim
    if not job.reaches(aim, times):
        return None
    share = 0.6 if aim in ("start", "load") else 1.0  # those do not come again if this is too late
    time.sleep(rng.uniform(0, share * seconds[aim]))
    return job.kill(plan.victim, rng)


def stay_in(
    layout: str, todo: list[Plan], seed: int, place: Path, config: Path, truth: Truth
) -> Iterator[RankKill]:
    """Kills in one layout, as many in a run as come before its end; yields each kill when its run has been compared."""
    todo = list(todo)
    while todo:
        job = Job(place / f"killed-{todo[0].number}", config, layout)
        kills: list[RankKill] = []
        try:
            job.start(restarts=len(todo))
            while todo:
                plan = todo[0]
                rng = random.Random(f"{seed}/{layout}/{plan.number}")
                hit = kill_once(job, plan, rng, truth.seconds)
                if hit is None:
                    break
                kill = RankKill(plan.number, plan.aim, hit, None, layout, plan.victim)
                if plan.victim == "the launcher":
                    problems = [*job.left_over(), *false_folders(job.run, truth)]
                    job.start(restarts=len(todo) - 1)
                elif job.meet():  # the new ones are busy with their start, and write nothing
                    problems = false_folders(job.run, truth)
                elif job.ended == 0:  # it was over, and the processes on their way out
                    job.ranks_killed -= 1
                    break
                else:
                    problems = []  # how it ended says it
                kill.lost = "; ".join(problems) or None
                kills.append(kill)
                todo.pop(0)
            problems = job.end() or differences(job.run, truth)
        except Hangs as error:
            problems = [f"hangs: {error}"]
        yield from _judged(job, kills, problems, todo, layout)


def move_on(todo: list[Plan], seed: int, place: Path, config: Path, truth: Truth) -> Iterator[RankKill]:
    """Runs that are killed, launcher and all, and started again in the next of `MOVES`."""
    todo = list(todo)
    while todo:
        number = todo[0].number
        job = Job(place / f"moved-{number}", config, None)
        kills: list[RankKill] = []
        try:
            while True:
                job.layout, rows = move(number)
                job.overrides = [f"batch.micro_batch_size={rows}"]
                before = job.newest
                job.start(restarts=0)
                if not todo:
                    break
                plan, rng = todo[0], random.Random(f"{seed}/moves/{number}")
                if plan.aim != "load":  # the next layout is to read a checkpoint of this one
                    job.until_newer(before)
                hit = kill_once(job, plan, rng, truth.seconds, soon=True)
                if hit is None:
                    break
                here, there = named(*move(number)), named(*move(number + 1))
                lost = "; ".join(job.left_over()) or None
                kills.append(RankKill(number, plan.aim, hit, lost, here, plan.victim, there))
                number = todo.pop(0).number + 1
            problems = job.end() or _moved_differences(job.run, truth, kills)
        except Hangs as error:
            problems = [f"hangs: {error}"]
        yield from _judged(job, kills, problems, todo, named(*move(number)))


def _moved_differences(run: Path, truth: Truth, kills: list[RankKill]) -> list[str]:
    largest, problems = furthest(records(run), truth.records)
    for kill in kills:
        kill.furthest = largest
    if largest > ALLOWED:
        problems.append(f"losses or norms differ by {largest:.1e} of themselves (allowed {ALLOWED:g})")
    if stays(run) != truth.stay:
        problems.append(f"folders {stays(run)}, not {truth.stay}")
    return problems


def _judged(
    job: Job, kills: list[RankKill], problems: list[str], todo: list[Plan], layout: str
) -> Iterator[RankKill]:
    """The kills of a run, with what is wrong with it in the end; where none came, the one that was meant."""
    if not kills:
        problems = problems or ["the run ended before it was killed"]
    if problems:
        problems = [*problems, job.stop()]
        if not kills:
            plan = todo.pop(0)
            kills = [RankKill(plan.number, plan.aim, "start", None, layout, plan.victim)]
    for number, kill in enumerate(kills):
        told = problems if not number else [f"as kill {kills[0].number}, of the same run"] * bool(problems)
        kill.lost = "; ".join(filter(None, [kill.lost, *told])) or None
        yield kill
    if not problems:
        shutil.rmtree(job.folder)


def move(number: int) -> tuple[str | None, int]:
    """Layout and micro-batch size in which the run is that this kill hits."""
    return MOVES[number % len(MOVES)]


def named(layout: str | None, rows: int) -> str:
    return f"{layout or 'one process'}, micro-batches of {rows}"


def run_ranks(
    count: int,
    seed: int,
    place: Path,
    data: Path,
    *,
    layouts: Collection[str] = tuple(LAYOUTS),
    only: str | None = None,
) -> Iterator[RankKill]:
    """`count` kills of runs in several processes, about one in `SHARE_OF_MOVES` followed by a move to another layout.

    `data` is what `prepare` wrote. Of all the kills that `count`, `seed` and `layouts` mean, those in `only` are done: a
    layout, or "moves". Each kill is yielded once the run that it hit has ended.
    """
    config, of_truth = write_config(place, data)
    by_layout, moves = plans(count, seed, layouts)
    truth = None
    for number, (layout, todo) in enumerate(by_layout.items()):
        if only in (None, layout) and todo:
            found = find_truth(place / f"truth-{number}", of_truth, layout)
            truth = truth or found
            yield from stay_in(layout, todo, seed, place, config, found)
    if only in (None, "moves"):
        for todo in moves:
            truth = truth or find_truth(place / "truth-moves", of_truth, next(iter(LAYOUTS)))
            yield from move_on(todo, seed, place, config, truth)
