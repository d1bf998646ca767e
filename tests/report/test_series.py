"""What the page draws: places on the axes, thinning, phases, marks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelyard.report.run import read_run
from modelyard.report.series import Places, bucket_means, keep_extremes, page_data
from tests.report.fake import START, event, record, write_run


def test_short_series_are_kept_whole() -> None:
    assert keep_extremes(np.arange(40.0), 10).tolist() == list(range(40))


def test_no_spike_is_lost_and_none_is_averaged() -> None:
    values = np.sin(np.arange(100_000) / 50)
    values[12_345], values[77_777], values[55_555], values[55_556] = 1e6, -1e6, np.nan, np.nan
    kept = keep_extremes(values, 100)
    assert len(kept) <= 100 * 3 + 2
    assert {0, 12_345, 55_555, 77_777, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    # The envelope is exact in every bucket.
    for begin in range(0, 100_000, 1000):
        inside = values[kept[(kept >= begin) & (kept < begin + 1000)]]
        assert np.nanmax(inside) == np.nanmax(values[begin : begin + 1000])
        assert np.nanmin(inside) == np.nanmin(values[begin : begin + 1000])


def test_means_of_buckets() -> None:
    last, means = bucket_means(np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan]), 3)
    assert last.tolist() == [1, 3, 5]
    assert means[:2].tolist() == [2.0, 5.0]
    assert np.isnan(means[2])


def test_pauses_are_no_time_at_work(tmp_path: Path) -> None:
    # Started at 0, killed after iteration 10 (at 20 s), resumed 1,000 s later, iteration 20 at 1,040 s.
    folder = write_run(
        tmp_path / "run",
        [record(10), record(20, time=START + 1040)],
        events=[event("started", 0, 0.0), event("resumed", 10, 1020.0), event("finished", 20, 1041.0)],
    )
    places = Places(read_run(folder))
    moments = np.array([START + 20, START + 500, START + 1020, START + 1040, np.nan])
    assert places.seconds(moments).tolist()[:4] == [20.0, 20.0, 20.0, 40.0]
    assert np.isnan(places.seconds(moments)[4])
    assert places.seconds_at_work == pytest.approx(41.0)


def test_without_events_time_runs_from_the_first_record(tmp_path: Path) -> None:
    places = Places(read_run(write_run(tmp_path / "run", [record(10), record(20)])))
    assert places.seconds(np.array([START + 20, START + 40])).tolist() == [0.0, 20.0]


def test_tokens_lie_in_a_line_between_records(tmp_path: Path) -> None:
    places = Places(read_run(write_run(tmp_path / "run", [record(10), record(20)])))
    assert places.tokens(np.array([5.0, 10.0, 16.0])).tolist() == [5_000, 10_000, 16_000]


def test_a_small_run_by_value(tmp_path: Path) -> None:
    evaluation = {"iteration": 15, "evaluator": "held out", "loss": 7.25, "targets": 900, "time": START + 31}
    folder = write_run(
        tmp_path / "run",
        [record(10), evaluation, record(20, loss=None, skipped_steps=1)],
        events=[event("started", 0, 0.0), event("skipped", 20, 39.0, "the loss is not finite")],
    )
    data = page_data(read_run(folder))
    assert data["series"]["loss"] == {"i": [10, 20], "t": [10000, 20000], "s": [20, 40], "v": [7, None]}
    assert data["series"]["loss_mean"]["v"] == [7.5, 6.5]
    assert data["series"]["learning_rate"]["v"] == [0.01, 0.02]
    assert data["series"]["memory_bytes"]["v"] == [3 * 2**30] * 2
    assert "mfu_causal" not in data["series"]
    assert data["evaluators"] == {"held out": {"i": [15], "t": [15000], "s": [31], "v": [7.25]}}
    assert data["phases"]["from"]["i"] == [0, 10]
    assert data["phases"]["to"] == {"i": [10, 20], "t": [10000, 20000], "s": [20, 40]}
    assert data["phases"]["seconds"]["backward"] == [0.8, 0.8]
    assert data["marks"] == [
        {"i": 20, "t": 20000, "s": 39, "kind": "skipped", "text": "the loss is not finite"}
    ]
    assert data["thinned"] is False


def test_scores_of_kinds_have_plots_of_their_own(tmp_path: Path) -> None:
    kinds = {"tool_call": {"loss": 0.5, "accuracy": 0.875, "targets": 8}}
    evaluation = {
        "iteration": 20,
        "evaluator": "talks",
        "loss": 1.5,
        "targets": 9,
        "accuracy": 0.75,
        "kinds": kinds,
    }
    older = {"iteration": 20, "evaluator": "text", "loss": 2.5, "targets": 9}
    data = page_data(read_run(write_run(tmp_path / "run", [record(20), evaluation, older])))
    assert {name: points["v"] for name, points in data["evaluators"].items()} == {
        "talks": [1.5],
        "text": [2.5],
    }
    assert {name: points["v"] for name, points in data["kind_losses"].items()} == {"talks: tool call": [0.5]}
    assert {name: points["v"] for name, points in data["accuracies"].items()} == {
        "talks": [0.75],
        "talks: tool call": [0.875],
    }
    assert data["accuracies"]["talks"]["i"] == [20]


def test_a_run_without_events_marks_where_steps_were_skipped(tmp_path: Path) -> None:
    rows = [record(10), record(20, skipped_steps=2), record(30, skipped_steps=2), record(40, skipped_steps=3)]
    marks = page_data(read_run(write_run(tmp_path / "run", rows)))["marks"]
    assert [(mark["i"], mark["kind"], mark["text"]) for mark in marks] == [
        (20, "skipped", "2 steps skipped by iteration 20"),
        (40, "skipped", "1 step skipped by iteration 40"),
    ]


def test_a_long_run_is_thinned_and_its_sums_stay(tmp_path: Path) -> None:
    count = 20_000
    rows = [
        record(k, loss=2.0 + (k == 4321) * 7, loss_mean=float(k % 2), mfu_causal=0.4)
        for k in range(1, count + 1)
    ]
    data = page_data(read_run(write_run(tmp_path / "run", rows, events=[])))
    loss = data["series"]["loss"]
    assert data["thinned"] is True
    assert len(loss["v"]) < 4000
    assert loss["i"][loss["v"].index(9)] == 4321
    assert data["series"]["loss_mean"]["smooth"]["v"] == [0.5] * 1000
    assert data["series"]["loss_mean"]["smooth"]["i"][:2] == [20, 40]
    phases = data["phases"]
    assert phases["intervals"] == count
    assert len(phases["to"]["i"]) == 400
    assert phases["from"]["i"][:2] == [0, 50]
    assert sum(phases["seconds"]["forward"]) == pytest.approx(0.4 * count)


def test_rare_events_stay_where_saves_are_many(tmp_path: Path) -> None:
    events = [event("saved", k, float(k)) for k in range(5000)] + [event("failed", 5000, 5000.0)]
    marks = page_data(read_run(write_run(tmp_path / "run", [record(5000)], events=events)))["marks"]
    assert len(marks) == 1000
    assert [mark["i"] for mark in marks if mark["kind"] == "failed"] == [5000]
    assert min(mark["i"] for mark in marks) == 5000 - 999


@pytest.mark.parametrize("events", [None, []])
def test_an_empty_run_has_nothing_to_draw(tmp_path: Path, events: list[dict[str, object]] | None) -> None:
    data = page_data(read_run(write_run(tmp_path / "run", [], events=events)))
    assert data == {
        "series": {},
        "evaluators": {},
        "kind_losses": {},
        "accuracies": {},
        "answers": {},
        "phases": None,
        "marks": [],
        "thinned": False,
    }
