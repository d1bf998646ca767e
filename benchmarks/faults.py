"""Try to break it: kills, damage on the disk, and configs that nobody meant. What is lost?

    python benchmarks/faults.py [--only kills|ranks|damage|fuzz] [--kills N] [--fuzz 2000] [--seed 0] [--write-docs]

- kills: a small real run (Python's own standard library as text) is killed with -9 in every phase, and started again
  without a hand, until it has ended: weights, optimizer, every logged loss and sample, and every folder that reads as
  complete must be bit-equal to those of a run never stopped.
- ranks: runs in several processes, in nine layouts, lose one rank, all of them or their launcher, and go on by elastic
  restarts, by the same command, or by another layout: as above; after a change of layout losses within fp32 rounding.
- damage: each file of a checkpoint and of a token store is cut, flipped, emptied, removed, made unreadable: found and
  named before a step is taken, and the newest good checkpoint used where there is one.
- fuzz: configs of the examples (and of ../shared/configs where that is) changed at random: valid, or a clear line and
  exit status 2; no traceback, no hang, nothing written.

Prints how many were tried, survived and lost, and the seed that repeats them; exit status 1 when something was lost.
Writes benchmarks/results/faults.json, and with `--write-docs` the table of docs/faults.md. Two cores, about half an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.faults_fuzz import base_configs, prepare_folder, run_as_process, run_in_process  # noqa: E402
from benchmarks.faults_kills import PROCESSES, run_kills  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "faults.json"
DOCS = ROOT / "docs" / "faults.md"
KILLS, KILLS_OF_RANKS = 100, 60
AS_PROCESSES = 50
"""Every how many mutated configs one is also given to the program in a process of its own."""

Rows = dict[str, dict[str, int]]
"""Kind → tried and lost."""


@contextmanager
def in_a_process() -> Iterator[bool]:
    """Do the block in a forked process, so that nothing of it (threads, imports) is in this one. Yields True there."""
    child = os.fork()
    if child == 0:
        try:
            yield True
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("the project to be damaged could not be built")
    yield False


def build(place: Path) -> Path:
    """A project with prepared data, made in a process of its own; returns the folder of the data."""
    with in_a_process() as there:
        if there:
            from benchmarks.bad_input import build_project

            build_project(place / "project")
    return place / "project" / "data"


def report(name: str, what: str, lost: str | None) -> None:
    if lost:
        print(f"LOST  {name}: {what}\n      {lost.strip()[-3000:]}", flush=True)


def count(rows: Rows, kind: str, lost: str | None) -> None:
    row = rows.setdefault(kind, {"tried": 0, "lost": 0})
    row["tried"] += 1
    row["lost"] += bool(lost)


def kills(number: int, seed: int, place: Path, data: Path) -> Rows:
    rows: Rows = {}
    for kill in run_kills(number, seed, place, data):
        report("kill", f"{kill.number} of seed {seed}, aimed at {kill.wanted}, in {kill.hit}", kill.lost)
        count(rows, PHASE_WORDS[kill.hit], kill.lost)
    return dict(sorted(rows.items(), key=lambda row: list(PHASE_WORDS.values()).index(row[0])))


PHASE_WORDS = {
    "resume": "while starting or resuming",
    "step": "in a step",
    "save": "while writing a checkpoint",
    "seal": "while checksums are made, files synced and folders renamed",
    "prune": "while removing older checkpoints and exports",
    "evaluate": "in an evaluation of the loss",
    "samples": "while writing samples",
    "export": "while writing an export",
    "between": "between these",
    "a process": "somewhere, in a process started from the command line",
}


def ranks(number: int, seed: int, place: Path, data: Path, layout: str | None) -> tuple[Rows, dict[str, Any]]:
    """The rows, and by layout how many kills there were; the furthest that a loss was after moves."""
    from benchmarks.faults_ranks import ALLOWED, run_ranks

    rows: Rows = {}
    layouts: Counter[str] = Counter()
    furthest = 0.0
    for kill in run_ranks(number, seed, place, data, only=layout):
        what = f"{kill.number} of {number}, seed {seed}, {kill.victim}, aimed at {kill.wanted}, in {kill.hit}"
        again = "moves" if kill.moved_to else kill.layout
        repeat = f"--only ranks --kills {number} --seed {seed} --layout '{again}'"
        report("kill", f"{what}, {kill.layout} ({repeat})", kill.lost)
        row = f"{kill.victim}, {RANK_PHASES[kill.hit]}"
        count(rows, MOVED if kill.moved_to else row, kill.lost)
        layouts[kill.layout] += not kill.moved_to
        furthest = max(furthest, kill.furthest or 0.0)
    in_order = {name: rows[name] for name in sorted(rows, key=lambda name: (name == MOVED, name))}
    facts = {"layouts": dict(+layouts), "furthest_after_moves": furthest, "allowed_after_moves": ALLOWED}
    return in_order, facts


MOVED = "the launcher, then started again in another layout"
RANK_PHASES = {
    "start": "while starting",
    "load": "while loading",
    "step": "in a step or an evaluation",
    "save": "while writing a checkpoint",
    "prune": "while removing an older checkpoint or export",
    "export": "while writing an export",
}


def damage(place: Path, data: Path, *, few: bool = False) -> Rows:
    from benchmarks.faults_damage import run_damages

    rows: Rows = {}
    for case in run_damages(place, data, few=few):
        report(case.kind, case.what, case.lost)
        count(rows, case.kind, case.lost)
    return rows


def fuzz(number: int, seed: int, place: Path) -> Rows:
    bases = base_configs(ROOT.parent / "shared")
    folder = place / "fuzz"
    prepare_folder(folder, bases)
    rows: Rows = {}
    refused = []
    for case, kind, lost in run_in_process(seed, number, folder, bases):
        report("config", f"seed {seed}, {case.describe()}", lost)
        count(rows, "valid" if kind == "valid" else "refused with a line", lost)
        if kind == "refused":
            refused.append(case)
    for case in random.Random(seed).sample(refused, min(len(refused), -(-number // AS_PROCESSES))):
        lost = run_as_process(case, folder, "validate")
        report("config as a process", f"seed {seed}, {case.describe()}", lost)
        count(rows, "the same, started as a process", lost)
    return rows


TITLES = {
    "kills": "kill -9, then started again",
    "ranks": "kill -9 of ranks and launchers of several processes",
    "damage": "damage on the disk",
    "fuzz": "configs changed at random",
}


def table(parts: dict[str, Rows]) -> str:
    """The table of the terminal and of docs/faults.md."""
    lines = ["| what | tried | survived | lost |", "|---|---:|---:|---:|"]
    for part, rows in parts.items():
        total = Counter()
        for row in rows.values():
            total.update(row)
        lines.append(
            f"| **{TITLES[part]}** | **{total['tried']:,}** | **{total['tried'] - total['lost']:,}** | **{total['lost']:,}** |"
        )
        for kind, row in rows.items():
            lines.append(f"| {kind} | {row['tried']:,} | {row['tried'] - row['lost']:,} | {row['lost']:,} |")
    return "\n".join(lines)


BEGIN, END = "<!-- table: written by benchmarks/faults.py --write-docs -->", "<!-- end of the table -->"


def write_docs(results: dict[str, Any]) -> None:
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    note = (
        f"`python benchmarks/faults.py`, {results['date']}, seed {results['seed']}, torch {results['torch']}, "
        f"{results['device']}:"
    )
    ranks = results["ranks"]
    layouts = "; ".join(f"{name}: {number}" for name, number in ranks["layouts"].items())
    of_ranks = (
        f"Kills of ranks and launchers by layout, but for moves: {layouts}. After changes of the layout, a loss or gradient norm was at most "
        f"{ranks['furthest_after_moves']:.1e} of itself away from that of the run that stayed in one layout (allowed "
        f"{ranks['allowed_after_moves']:g}); without a change all bits were the same."
    )
    text = f"{before}{BEGIN}\n{note}\n\n{table(results['parts'])}\n\n{of_ranks}\n{END}{after}"
    DOCS.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(TITLES), help="default: all of them")
    parser.add_argument("--kills", type=int, metavar="N", help="default: 100, and 60 of several processes")
    parser.add_argument("--fuzz", type=int, default=2000, metavar="N", help="default: 2000")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    parser.add_argument("--layout", metavar="NAME", help="ranks: of all the kills those in this layout alone")
    parser.add_argument(
        "--few",
        action="store_true",
        help="no kills of several processes; damage: two files of a checkpoint, every third kind",
    )
    parser.add_argument("--write-docs", action="store_true", help="write the table into docs/faults.md")
    options = parser.parse_args()
    parts: dict[str, Rows] = {}
    facts: dict[str, Any] = {}
    names = [name for name in TITLES if not (options.few and name == "ranks")]
    with tempfile.TemporaryDirectory(prefix="faults-") as where:
        place = Path(where)
        data = build(place)
        for name in names if options.only is None else (options.only,):
            begin = time.perf_counter()
            folder = place / name
            folder.mkdir()
            if name == "kills":
                parts[name] = kills(options.kills or KILLS, options.seed, folder, data)
            elif name == "ranks":
                number = options.kills or KILLS_OF_RANKS
                parts[name], facts = ranks(number, options.seed, folder, data, options.layout)
            elif name == "damage":
                parts[name] = damage(folder, data, few=options.few)
            else:
                parts[name] = fuzz(options.fuzz, options.seed, folder)
            print(f"{TITLES[name]}: {time.perf_counter() - begin:.0f} s, seed {options.seed}", flush=True)
    print(table(parts))
    if options.only is None and not options.few:
        from benchmarks.common import write_result

        processes = f"every {PROCESSES}th kill"
        values = {"seed": options.seed, "processes": processes, "ranks": facts, "parts": parts}
        write_result("faults", values)
        if options.write_docs:
            write_docs(json.loads(RESULT.read_text(encoding="utf-8")))
    return int(any(row["lost"] for rows in parts.values() for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
