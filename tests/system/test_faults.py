"""The short form of `benchmarks/faults.py`: some kills in every phase, damage of every third kind, some mutated configs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import faults_fuzz
from benchmarks.faults import TITLES, table
from benchmarks.faults_fuzz import Answer, Case, base_configs, make_case, prepare_folder, unclear

ROOT = Path(__file__).resolve().parent.parent.parent


def rows(text: str) -> dict[str, tuple[int, int, int]]:
    """The printed table: what → (tried, survived, lost)."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[1].replace(",", "").isdigit():
            found[cells[0]] = tuple(int(cell.replace(",", "")) for cell in cells[1:])
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def short() -> tuple[int, str]:
    """The script as anybody runs it, in a process of its own since it forks: exit status, and what it printed."""
    done = subprocess.run(
        [sys.executable, "benchmarks/faults.py", "--few", "--kills", "9", "--fuzz", "50", "--seed", "1"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_nothing_is_lost(short: tuple[int, str]) -> None:
    """Kills, damage and mutated configs: what is lost is in the output, with how to repeat it."""
    status, text = short
    assert status == 0, text
    assert "LOST" not in text
    found = rows(text)
    assert found[TITLES["kills"]] == (9, 9, 0)
    damaged = found[TITLES["damage"]]
    assert damaged == (damaged[0], damaged[0], 0)
    assert damaged[0] >= 20
    assert TITLES["ranks"] not in found  # tests/system/test_faults_ranks.py
    assert found["valid"][0] + found["refused with a line"][0] == 50
    assert found["the same, started as a process"] == (1, 1, 0)


def test_a_case_is_a_function_of_seed_and_number() -> None:
    bases = base_configs(None)
    first, again = (make_case(7, 3, bases) for _ in range(2))
    assert (first.files, first.overrides, first.how) == (again.files, again.overrides, again.how)
    others = [make_case(number, 3, bases) for number in range(8, 20)]
    assert any(other.files != first.files for other in others)
    assert len({case.base for case in others}) > 3


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(0), None),
        (Answer("started"), None),
        (Answer(2, "error: train.yaml:3: unknown key 'x'\n"), None),
        (Answer(2, ""), "exit 2 without a word"),
        (Answer(2, "error: \n"), "a line that is no answer"),
        (Answer(2, "error: a\nb\n"), "a line that is no answer: 'b'"),
        (Answer(2, "error: KeyError: 'a'\n"), "shows our insides"),
        (Answer(2, "error: " + "x" * 2000), "a line of 2,007 characters"),
        (Answer(1, "error: a"), "1"),
        (Answer("Traceback …"), "Traceback …"),
    ],
)
def test_what_is_an_unclear_answer(answer: Answer, expected: str | None) -> None:
    found = unclear(answer)
    assert found is None if expected is None else expected in str(found)


def test_what_a_case_writes_and_where_verbs_disagree_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = {"one": [ROOT / "examples" / "train-tiny.yaml"]}
    prepare_folder(tmp_path / "top", bases)
    monkeypatch.chdir(tmp_path / "top" / "here")
    case = Case(0, "one", ["nothing"], {"config0.yaml": bases["one"][0].read_bytes()})

    def writes(verb: str, _: Case) -> Answer:
        Path("left-behind").write_text(verb)
        return Answer(2, "error: no\n")

    monkeypatch.setattr(faults_fuzz, "_answer", writes)
    assert "left-behind" in str(faults_fuzz.try_case(case, tmp_path / "top")[1])
    assert not Path("left-behind").exists()

    monkeypatch.setattr(
        faults_fuzz,
        "_answer",
        lambda verb, _: Answer(2, "error: no\n") if verb == "validate" else Answer("started"),
    )
    assert "validate refuses it, train does not" in str(faults_fuzz.try_case(case, tmp_path / "top")[1])


def test_a_kill_that_costs_something_is_seen(tmp_path: Path) -> None:
    """The comparison itself: one float of a checkpoint, one logged loss, one folder too many."""
    import numpy as np
    import torch

    from benchmarks.faults_kills import Truth, differences, records, stays, tensors
    from modelyard.train.checkpoint import save_checkpoint

    def save(folder: Path, value: float) -> None:
        parameter = torch.full((3,), value)
        save_checkpoint(folder, parameters={"a": parameter}, moments={}, state={}, config={})

    run = tmp_path / "run"
    save(run / "checkpoint" / "3", 1.0)
    (run / "export" / "llama").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"iteration": 3, "loss": 0.5, "tokens_per_second": 10.0}\n')
    truth = Truth(records(run), {"3": tensors(run / "checkpoint" / "3")}, {}, stays(run))
    assert truth.records == [{"iteration": 3, "loss": 0.5}]
    assert differences(run, truth) == []

    shutil.rmtree(run / "checkpoint" / "3")
    save(run / "checkpoint" / "3", float(np.nextafter(np.float32(1.0), np.float32(2.0))))
    (run / "metrics.jsonl").write_text('{"iteration": 3, "loss": 0.5000000000000001}\n')
    (run / "checkpoint" / "3.tmp").mkdir()
    problems = differences(run, truth)
    assert [problem.split(" ")[0] for problem in problems] == ["checkpoint/3", "metrics.jsonl", "folders"]


def test_the_table_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    found = rows(text)
    for name, least in LEAST.items():
        tried, survived, lost = found[name]
        assert tried >= least
        assert (survived, lost) == (tried, 0)
    values = yaml.safe_load((ROOT / "benchmarks" / "results" / "faults.json").read_text(encoding="utf-8"))
    assert table(values["parts"]) in text


LEAST = {TITLES["kills"]: 100, TITLES["ranks"]: 60, TITLES["damage"]: 100, TITLES["fuzz"]: 2000}
"""Tries that the table must have."""
