"""Can the matrix of layouts see a mistake? Each mutant is one, made on purpose; which row of the table catches it?

    python benchmarks/mutants.py [--only WORDS] [--minutes 7] [--write-docs]

The tree is copied to a scratch folder, one mutant is put into it (an exact replacement in one file: `mutants_list.py`),
and rows of tests/parallel/cases.py are run: those with the features it should show in, then the others, and always those
that `make test` runs before the slow ones. A row catches a mutant when it fails; what it said tells how. The rows that
caught something are then run on the tree as it is: there they must pass, or their catch is worth nothing.

A mutant that survives all rows is a hole in the table: exit status 1. Writes benchmarks/results/mutants.json, and with
`--write-docs` the table of docs/layouts.md. Four minutes on two cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.mutants_list import MUTANTS, Mutant  # noqa: E402

DOCS = ROOT / "docs" / "layouts.md"
NAME = "mutants"
AT_ONCE = 2
TIMEOUT = 25.0
"""Seconds for a row: a process that waits for a message that no one sends is a catch, too."""


@dataclass
class Verdict:
    mutant: str
    caught_by: str | None
    """The row's name; None: it survived."""
    how: str
    is_quick: bool
    """Whether `make test` runs that row."""
    tried: int
    """Rows run, the one that caught it included."""
    seconds: float


def in_order(cases: Iterable[Any], wanted: tuple[str, ...]) -> list[Any]:
    """Rows with all the wanted features, then the others; the quick ones first, and the smaller."""
    from tests.parallel.cases import CASES, features, pairwise_cover

    quick = pairwise_cover(CASES)

    def rank(case: Any) -> tuple[bool, bool, int, int, bool]:
        missing = len(set(wanted) - set(features(case)))
        return missing > 0, case not in quick, missing, case.layout.world, case.compile

    return sorted(cases, key=rank)


def judge(folder: Path, mutant: Mutant | None, rows: list[str] | None, deadline: float) -> list[Verdict]:
    """Run rows on the tree in `folder`, in this process, which has imported nothing of the program yet.

    With a mutant: until one fails. Without: all of `rows`, a verdict each, `caught_by` None where the row passed.
    """
    import warnings

    warnings.simplefilter("ignore")
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in (str(ROOT), ""))]
    for name in [name for name in sys.modules if name.split(".")[0] in ("modelyard", "tests", "benchmarks")]:
        del sys.modules[name]
    import modelyard
    from tests.parallel.cases import CASES, name_of, pairwise_cover
    from tests.parallel.matrix import hold

    assert Path(modelyard.__file__).parent.parent == folder, modelyard.__file__
    quick = pairwise_cover(CASES)
    named = {name_of(case): case for case in CASES}
    cases = in_order(CASES, mutant.shows_in) if mutant else [named[row] for row in rows or ()]
    verdicts: list[Verdict] = []
    begin = time.monotonic()
    for tried, case in enumerate(cases, 1):
        how = None
        try:
            hold(case, twice=True, timeout=TIMEOUT)
        except Exception as error:
            how = in_one_line(str(error) or repr(error))
        seconds = time.monotonic() - begin
        if mutant is None:
            verdicts.append(Verdict("none", name_of(case) if how else None, how or "", False, tried, seconds))
        elif how:
            return [Verdict(mutant.name, name_of(case), how, case in quick, tried, seconds)]
        elif time.monotonic() > deadline:
            return [Verdict(mutant.name, None, "out of time", False, tried, seconds)]
    return verdicts if mutant is None else [Verdict(mutant.name, None, "", False, len(cases), seconds)]


def in_one_line(message: str) -> str:
    """The last line of a failed row that says something, without the name of the exception."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    line = next((line for line in reversed(lines) if "Error" in line or ":" in line), lines[-1])
    return re.sub(r"^(\w+\.)*AssertionError: ", "", line)[:160]


def work(folder: Path, mutant: Mutant | None, rows: list[str] | None, deadline: float, answer: Any) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    try:
        answer.send([asdict(verdict) for verdict in judge(folder, mutant, rows, deadline)])
    except BaseException as error:
        answer.send(repr(error))
    os._exit(0)


def copy_tree(source: Path, destination: Path, mutant: Mutant | None = None) -> Path:
    for name in ("modelyard", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "system")
        shutil.copytree(source / name, destination / name, ignore=ignored)
    if mutant:
        mutant.put_into(destination)
    return destination


def run(place: Path, mutants: list[Mutant], minutes: float) -> list[Verdict]:
    """The verdicts on all mutants, `AT_ONCE` at a time, each in its own copy and a process of its own."""
    fork = multiprocessing.get_context("fork")
    deadline = time.monotonic() + 60 * minutes
    # All of them from one state of the tree, and none started where one cannot be made.
    folders = [copy_tree(place / "unchanged", place / str(n), mutant) for n, mutant in enumerate(mutants)]
    waiting = list(zip(folders, mutants, strict=True))
    running: dict[Any, tuple[Any, Mutant]] = {}  # by the pipe that the answer comes through
    verdicts: dict[str, Verdict] = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            folder, mutant = waiting.pop(0)
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=work, args=(folder, mutant, None, deadline, sender))
            process.start()
            running[receiver] = process, mutant
        for answered in multiprocessing.connection.wait(list(running)):
            process, mutant = running.pop(answered)
            found: Any = answered.recv()  # type: ignore[union-attr, call-arg]
            process.join()
            if isinstance(found, str):
                raise SystemExit(f"{mutant.name}: {found}")
            verdict = verdicts[mutant.name] = Verdict(**found[0])
            said = f"{verdict.caught_by}: {verdict.how}" if verdict.caught_by else f"SURVIVED {verdict.how}"
            print(
                f"{mutant.name:58} {verdict.tried:3} rows {verdict.seconds:5.1f} s  {said}"[:220], flush=True
            )
    return [verdicts[mutant.name] for mutant in mutants]


def unchanged(place: Path, rows: list[str]) -> list[Verdict]:
    """What `rows` say of the tree as it is."""
    folder = place / "unchanged"
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(folder, None, rows, 0.0, sender))
    process.start()
    found = receiver.recv()
    process.join()
    if isinstance(found, str):
        raise SystemExit(found)
    return [Verdict(**verdict) for verdict in found]


def table(verdicts: list[dict[str, Any]]) -> str:
    """Markdown: mechanism, mutant, the row that caught it, how."""
    lines = ["| where | mistake | caught by the row | which said |", "| --- | --- | --- | --- |"]
    where = {mutant.name: mutant.file for mutant in MUTANTS}
    for verdict in verdicts:
        caught = f"`{verdict['caught_by']}`" if verdict["caught_by"] else "**nothing**"
        how = verdict["how"].replace("|", "\\|")
        lines.append(f"| {Path(where[verdict['mutant']]).name} | {verdict['mutant']} | {caught} | {how} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="mutants whose name or file has this in it")
    parser.add_argument(
        "--minutes", type=float, default=7, help="mutants that are not caught by then survive"
    )
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/layouts.md")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if arguments.only in f"{mutant.name} {mutant.file}"]

    # Before the first fork: torch takes longer to import than a row to run.
    import torch.distributed.fsdp
    import torch.distributed.pipelining  # noqa: F401

    from benchmarks.common import put_into, write_result

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        copy_tree(ROOT, Path(temporary) / "unchanged")
        verdicts = run(Path(temporary), mutants, arguments.minutes)
        rows = sorted({verdict.caught_by for verdict in verdicts if verdict.caught_by})
        failed = [verdict for verdict in unchanged(Path(temporary), rows) if verdict.caught_by]
    survivors = [verdict.mutant for verdict in verdicts if not verdict.caught_by]
    print(
        f"{len(mutants)} mutants, {len(survivors)} survived; {len(rows)} rows caught the others, "
        f"{sum(verdict.is_quick for verdict in verdicts)} of them rows that `make test` runs; "
        f"{time.monotonic() - begin:.0f} s"
    )
    for verdict in failed:
        print(f"fails without any mutant: {verdict.caught_by}: {verdict.how}")
    for name in survivors:
        print(f"survived: {name}")
    if failed:
        print("nothing is written: the tree itself fails")
    elif not arguments.only:
        found = [asdict(verdict) for verdict in verdicts]
        path = write_result(NAME, {"mutants": found})
        print(f"wrote {path}")
        if arguments.write_docs:
            put_into(DOCS, NAME, table(found))
            print(f"wrote {DOCS}")
    sys.exit(1 if survivors or failed else 0)


if __name__ == "__main__":
    main()
