"""The figures at the top of the page, computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.report.run import Run, read_run
from modelyard.report.summary import Losses, differences, figures, phase_seconds, rows
from modelyard.report.units import UNKNOWN
from tests.report.fake import START, event, record, write_run

CONFIG: dict[str, Any] = {"training": {"train_iters": 40}, "data": {"files": ["a"]}}


def evaluation(iteration: int, loss: float | None) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "evaluator": "held out",
        "loss": loss,
        "targets": 9,
        "time": START + 2 * iteration,
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = write_run(
        tmp_path / "run",
        [
            # 10,000 tokens at 500/s are 20 s, the next 10,000 at 1,000/s are 10 s.
            record(10, data_wait_share=0.3, model_flops_per_second=1e12),
            evaluation(10, 7.0),
            record(
                20,
                tokens_per_second=1000.0,
                data_wait_share=0.0,
                model_flops_per_second=4e12,
                memory_bytes=5 * 2**30,
            ),
            evaluation(20, 6.5),
            record(
                30, loss=None, loss_mean=None, tokens_per_second=1000.0, data_wait_share=0.0, skipped_steps=2
            ),
            evaluation(30, 6.75),
        ],
        events=[event("started", 0, 0.0), event("resumed", 20, 45.0), event("stopped", 30, 61.0)],
        config=CONFIG,
    )
    return read_run(folder)


def test_figures(run: Run) -> None:
    found = figures(run)
    assert found.parameters == 1_234_567
    assert (found.iterations, found.planned_iterations, found.tokens) == (30, 40, 30_000)
    assert found.train_loss == Losses(final=None, best=6.5, best_at=20)
    assert found.evaluators == {"held out": Losses(final=6.75, best=6.5, best_at=20)}
    assert found.tokens_per_second == pytest.approx(30_000 / (20 + 10 + 10))
    assert found.data_wait_share == pytest.approx(0.3 * 20 / 40)
    assert found.model_flops_per_second == pytest.approx((1e12 * 20 + 4e12 * 10 + 1.5e12 * 10) / 40)
    assert found.mfu is None
    assert found.peak_memory == 5 * 2**30
    assert found.seconds == pytest.approx(61 - 5)  # the pause from the record at 40 s to the resume at 45 s
    assert (found.resumes, found.skipped_steps) == (1, 2)
    assert found.state == "stopped at iteration 30"
    assert found.last_time == START + 61


def test_rows(run: Run) -> None:
    assert rows([figures(run)]) == [
        ("State", ["stopped at iteration 30"]),
        ("Last record", ["2025-06-15 15:07 UTC"]),
        ("Parameters", ["1.23 M"]),
        ("Iterations", ["30 of 40"]),
        ("Tokens", ["30 k"]),
        ("Train loss, final", ["not finite"]),
        ("Train loss, best", ["6.5000 at 20"]),
        ("held out loss, final", ["6.7500"]),
        ("held out loss, best", ["6.5000 at 20"]),
        ("Mean speed", ["750 tokens/s"]),
        ("Model FLOP/s", ["1.88 TFLOP/s"]),
        ("Peak memory", ["5.0 GiB"]),
        ("Time at work", ["56 s"]),
        ("Waiting for data", ["15.0%"]),
        ("Resumes", ["1"]),
        ("Skipped steps", ["2"]),
    ]


def test_processes(tmp_path: Path) -> None:
    """As the run's last start had them; a run that does not tell is unknown beside one that does."""
    line = "4 processes = 2 pipeline x 2 tensor, zero_stage 1"
    folder = write_run(tmp_path / "run", [record(1)], config=CONFIG)
    old = read_run(folder)
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**description, "processes": 4, "layout": line}))
    table = dict(rows([figures(read_run(folder)), figures(old)]))
    assert table["Processes"] == [line, UNKNOWN]


def test_phase_seconds(run: Run) -> None:
    totals = phase_seconds(run)
    assert totals is not None
    assert totals["backward"] == pytest.approx(2.4)
    assert sum(totals.values()) == pytest.approx(6.0)


def test_one_record_of_an_old_run(tmp_path: Path) -> None:
    lines = [{"iteration": 1, "loss": 9.0, "time": START}]
    found = figures(read_run(write_run(tmp_path / "run", lines)))
    assert found.train_loss == Losses(9.0, 9.0, 1)
    assert found.tokens_per_second is None
    assert found.resumes is None
    assert found.seconds == 0.0
    assert found.state == "no end recorded: running, or killed"


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        (["started"], "no end recorded: running, or killed"),
        (["started", "finished"], "finished"),
        (["started", "failed"], "failed at iteration 1"),
        (["started", "stopped", "resumed"], "no end recorded: running, or killed"),
    ],
)
def test_state(tmp_path: Path, kinds: list[str], state: str) -> None:
    events = [event(kind, 1, float(at)) for at, kind in enumerate(kinds)]
    assert figures(read_run(write_run(tmp_path / "run", [record(1)], events=events))).state == state


def test_a_run_as_long_as_planned_has_finished(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [record(40)], config=CONFIG)
    assert figures(read_run(folder)).state == "finished"


def test_no_records(tmp_path: Path) -> None:
    found = figures(read_run(write_run(tmp_path / "run", [])))
    assert (found.iterations, found.tokens, found.train_loss, found.seconds) == (0, None, None, None)
    assert rows([found]) == [
        ("State", ["no end recorded: running, or killed"]),
        ("Iterations", ["0"]),
        ("Skipped steps", ["0"]),
    ]


def test_differences() -> None:
    other = {"training": {"extra": None, "train_iters": 50}, "data": {"files": ["a"]}}
    assert differences([other, CONFIG, None]) == [
        ("training.train_iters", ["50", "40", None]),
        ("training.extra", ["null", None, None]),
    ]
    assert differences([CONFIG, CONFIG]) == []
    assert differences([CONFIG, None]) == []
