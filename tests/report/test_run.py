"""What is read of an experiment folder, whole or not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from modelyard.errors import UserError
from modelyard.report.run import PHASES, names, read_run
from modelyard.report.summary import phase_seconds
from tests.report.fake import START, event, record, write_run


def test_records_become_columns(tmp_path: Path) -> None:
    evaluation = {"iteration": 20, "evaluator": "held out", "loss": 7.25, "targets": 900, "time": START + 41}
    samples = {
        "iteration": 20,
        "evaluator": "stories",
        "samples": [{"prompt": "Once", "text": " upon"}],
        "time": START + 42,
    }
    folder = write_run(
        tmp_path / "run",
        [record(10), record(20), evaluation, samples],
        events=[
            event("started", 0, -1.0),
            event("saved", 20, 43.0, "saved checkpoint/20 in 1.0 s", bytes=12),
        ],
        config={"training": {"train_iters": 20}},
    )
    run = read_run(folder)
    assert run.remarks == []
    assert run.training["iteration"].tolist() == [10, 20]
    assert run.column("loss").tolist() == [7.0, 6.0]
    assert run.column("tokens").tolist() == [10_000, 20_000]
    assert run.column("seconds.backward").tolist() == [0.8, 0.8]
    assert np.isnan(run.column("mfu_causal")).tolist() == [True, True]
    assert not run.has("mfu_causal")
    assert {key: column.tolist() for key, column in run.evaluators["held out"].items()} == {
        "iteration": [20],
        "time": [START + 41],
        "loss": [7.25],
        "targets": [900],
    }
    assert [(s.iteration, s.evaluator, s.texts) for s in run.samples] == [
        (20, "stories", [("Once", " upon")])
    ]
    assert run.events is not None
    assert [(e.kind, e.iteration, e.time, e.text) for e in run.events] == [
        ("started", 0, START - 1, "started"),
        ("saved", 20, START + 43, "saved checkpoint/20 in 1.0 s"),
    ]
    assert run.config == {"training": {"train_iters": 20}}
    assert run.facts["parameters"] == 1_234_567


def test_scores_of_kinds_become_columns(tmp_path: Path) -> None:
    """Of a kind that an evaluation does not have there is no number; what is no score is nothing."""
    kinds = {"content": {"loss": 1.5, "accuracy": 0.5, "targets": 8}, "terminator": 3}
    base = {"evaluator": "talks", "loss": 1.5, "targets": 9}
    folder = write_run(
        tmp_path / "run",
        [
            record(10),
            {**base, "iteration": 10, "accuracy": 0.5, "kinds": kinds},
            {**base, "iteration": 20, "accuracy": 0.625, "kinds": "none"},
        ],
    )
    columns = read_run(folder).evaluators["talks"]
    assert columns["accuracy"].tolist() == [0.5, 0.625]
    assert columns["loss.content"].tolist() == pytest.approx([1.5, np.nan], nan_ok=True)
    assert columns["accuracy.content"].tolist() == pytest.approx([0.5, np.nan], nan_ok=True)
    assert not any(key.endswith("terminator") for key in columns)


def test_the_phases_are_those_that_training_measures() -> None:
    from modelyard.train.phases import PHASES as MEASURED

    assert PHASES == MEASURED


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [record(1), record(2)], tail='{"iteration": 3, "lo'))
    assert run.training["iteration"].tolist() == [1, 2]
    assert run.remarks[0].startswith("The last line of metrics.jsonl is not whole")


def test_damaged_lines_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [record(1)], tail='{"iteration": 2,\n[1, 2]\n{"loss": 3}\n')
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n{"iteration": 4, "loss": 2.0}')  # whole, though no newline follows yet
    run = read_run(folder)
    assert run.training["iteration"].tolist() == [1, 4]
    assert run.remarks[:2] == [
        "3 lines of metrics.jsonl cannot be read and are left out: line 2, 3, 5.",
        "1 record of metrics.jsonl has no iteration and is left out.",
    ]


def test_what_is_not_finite_is_no_number(tmp_path: Path) -> None:
    # Older records, or those of other programs, may say NaN or Infinity where ours say null.
    tail = '{"iteration": 2, "loss": NaN}\n{"iteration": 3, "loss": Infinity}\n{"iteration": 4, "loss": "high"}\n'
    run = read_run(write_run(tmp_path / "run", [record(1, loss=None)], tail=tail))
    assert np.isnan(run.column("loss")).tolist() == [True] * 4
    assert run.column("grad_norm")[0] == 1.5


def test_records_are_ordered(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [record(30), record(10), record(20)]))
    assert run.training["iteration"].tolist() == [10, 20, 30]
    assert run.column("loss").tolist() == [7.0, 6.0, 5.0]


def test_an_old_run_takes_its_configuration_from_the_newest_checkpoint(tmp_path: Path) -> None:
    old = record(1)
    del old["seconds"]
    folder = write_run(tmp_path / "run", [old])
    shape = {
        "vocab_size": 10,
        "hidden_size": 4,
        "num_layers": 0,
        "num_attention_heads": 1,
        "head_groups": 1,
        "head_size": 4,
        "ffn_hidden_size": 8,
        "tie_word_embeddings": True,
        "rotary": {"type": "default"},
    }
    for iteration in (9, 10):
        checkpoint = folder / "checkpoint" / str(iteration)
        checkpoint.mkdir(parents=True)
        (checkpoint / "config.yaml").write_text(yaml.safe_dump({"training": {"train_iters": iteration}}))
        state = {"architecture": shape, "modelyard_version": "0.1.0", "initialized_on": "cpu"}
        (checkpoint / "state.json").write_text(json.dumps(state))
    run = read_run(folder)
    assert run.config == {"training": {"train_iters": 10}}
    assert run.facts["parameters"] == 10 * 4 + 4  # the embedding and the last norm
    assert [remark.split(" (")[0] for remark in run.remarks] == [
        "events.jsonl is not there",
        "config.json is not there",
        "The records do not say where the time went",
    ]

    (folder / "checkpoint/10/state.json").write_text("{")  # damaged: the one before serves
    assert read_run(folder).config == {"training": {"train_iters": 9}}


def test_a_resume_on_other_processes_says_so(tmp_path: Path) -> None:
    """The first start is from a version that did not tell."""
    layouts = [None, "1 process", "1 process", "2 processes = 2 data, zero_stage 1"]
    events = []
    for at, layout in enumerate(layouts):
        more = {} if layout is None else {"processes": int(layout[0]), "layout": layout}
        events += [event("resumed", at, 2.0 * at, "on", **more), event("saved", at, 2.0 * at + 1, "saved")]
    found = read_run(write_run(tmp_path / "run", [record(1)], events=events)).events
    assert found is not None
    assert [one.text for one in found if one.kind == "resumed"] == [
        "on", "on", "on", "on; on 2 processes = 2 data, zero_stage 1, before on 1 process",
    ]  # fmt: skip
    assert {one.text for one in found if one.kind == "saved"} == {"saved"}


def test_what_came_after_the_last_record_counts_with_it(tmp_path: Path) -> None:
    ends = [
        event("stopped", 10, 21.0, more={"checkpoint": 3.0}),
        event("finished", 20, 50.0, more={"checkpoint": 4.0, "evaluation": 5.0}),
    ]
    for end in ends:
        end["seconds"] = end.pop("more")
    saved = {**event("saved", 20, 49.0), "seconds": 4.0, "bytes": 9}
    run = read_run(write_run(tmp_path / "run", [record(10), record(20)], events=[*ends, saved]))
    assert run.column("seconds.checkpoint").tolist() == [3.0, 4.0]
    assert run.column("seconds.evaluation").tolist() == [0.0, 5.0]
    assert run.column("seconds.forward").tolist() == [0.4, 0.4]


def test_sessions_before_the_first_record_count_with_it(tmp_path: Path) -> None:
    """Stopped at 3 and at 7, records every 10: what both spent is in the first record, and in the totals."""
    ends = [
        {**event("stopped", 3, 4.0), "seconds": {"forward": 1.0, "checkpoint": 2.0, "other": None}},
        {**event("shutdown", 7, 9.0), "seconds": {"forward": 1.5, "backward": 3.0}},
        {**event("stopped", 13, 30.0), "seconds": {"forward": 0.25}},
    ]
    folder = write_run(tmp_path / "run", [record(10), record(20)], events=ends)
    run = read_run(folder)
    assert run.column("seconds.forward").tolist() == pytest.approx([0.4 + 1.0 + 1.5 + 0.25, 0.4])
    assert run.column("seconds.backward").tolist() == pytest.approx([3.8, 0.8])
    assert run.column("seconds.checkpoint").tolist() == [2.0, 0.0]
    totals = phase_seconds(run)
    assert totals is not None
    assert sum(totals.values()) == pytest.approx(4.0 + 3.0 + 4.5 + 0.25)
    assert phase_seconds(read_run(write_run(tmp_path / "empty", [], events=ends))) is None


def test_nothing_but_an_empty_file(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", []))
    assert run.training["iteration"].tolist() == []
    assert run.config is None
    assert "metrics.jsonl has no training records yet." in run.remarks


def test_a_broken_config_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [record(1)], events=[])
    (folder / "config.json").write_text('{"config": ')
    assert read_run(folder).remarks[0].startswith("config.json cannot be read (JSONDecodeError")


def test_what_is_no_run_is_refused_with_a_way_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "first", [record(1)])
    (run / "checkpoint").mkdir()
    with pytest.raises(UserError, match=r"firts does not exist .*nearest there: .*first"):
        read_run(tmp_path / "runs" / "firts")
    with pytest.raises(UserError, match=r"no metrics\.jsonl; runs in it: .*first"):
        read_run(tmp_path / "runs")
    with pytest.raises(UserError, match=r"no metrics\.jsonl; it lies in the run .*first$"):
        read_run(run / "checkpoint")
    with pytest.raises(UserError, match=r"is a file, not the folder of a run; name its folder, .*first"):
        read_run(run / "metrics.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"run\.experiment_dir"):
        read_run(tmp_path / "empty")


def test_names_tell_folders_apart() -> None:
    assert names([Path("/x/a/run"), Path("/x/b/run"), Path("/x/b/other")]) == ["a/run", "b/run", "other"]
    assert names([Path("/a/run"), Path("/run")]) == ["a/run", "//run"]
    assert names([Path("/x/run")]) == ["run"]
