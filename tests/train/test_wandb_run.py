"""Weights & Biases, offline: what was logged is read back from the file that would be sent."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from modelyard.config.training import TrainingConfig
from modelyard.errors import UserError
from modelyard.train.run import train
from tests.train.helpers import lines, loaded, losses

pytestmark = pytest.mark.usefixtures("tiny")
ON = (
    "training.wandb={entity_name: me, project_name: toys, group_name: small, alert: {interval: 2, offset: 1}}"
)
SECRET = "5ec7e7" * 7


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    wandb = pytest.importorskip("wandb", reason="needs the wandb package: pip install modelyard[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    Path("key").write_text(SECRET + "\n")
    monkeypatch.setenv("WANDB_API_KEY_PATH", "key")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("WANDB_API_KEY")
    yield wandb
    wandb.teardown()


def sent(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: a LevelDB log (blocks of 32 KiB) of protocol buffers behind 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


def history(path: Path) -> dict[int, dict[str, Any]]:
    """What was logged, by step."""
    rows = [record.history for record in sent(path) if record.WhichOneof("record_type") == "history"]
    return {
        row.step.num: {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in row.item}
        for row in rows
    }


def test_every_record_arrives_at_its_iteration_and_a_resumed_run_is_the_same(offline: Any) -> None:
    evaluators = "training.evaluators={held_out: {interval: 2, evaluator: {iterations: 1}}}"
    assert train(loaded("training.train_iters=3", evaluators, ON)) == 0
    assert train(loaded("training.train_iters=5", evaluators, ON)) == 0
    offline.teardown()  # its service may still be writing
    files = sorted(Path("run/wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == 2
    first, second = map(history, files)
    assert (list(first), list(second)) == ([1, 2, 3], [4, 5])
    logged = {step: row["training/loss"] for step, row in (first | second).items()}
    assert logged == losses("run")
    evaluations = {r["iteration"]: r["loss"] for r in lines("run/metrics.jsonl") if "evaluator" in r}
    assert {
        s: row["held_out/loss"] for s, row in (first | second).items() if "held_out/loss" in row
    } == evaluations
    assert first[1]["training/seconds/forward"] > 0

    run_id = json.loads(Path("run/wandb.json").read_text())["id"]
    for path in files:
        (run,) = (record.run for record in sent(path) if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.entity, run.project, run.run_group) == (run_id, "me", "toys", "small")
        assert run.display_name == "run"
    alerts = [record.alert.title for record in sent(files[0]) if record.WhichOneof("record_type") == "alert"]
    assert alerts == ["started", "iteration 1", "iteration 3", "finished"]
    # The key is where the user put it, and nowhere in the experiment.
    assert not [p for p in Path("run").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_the_name_of_the_key_file_is_used(offline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    seen: list[str | None] = []

    def init(**_: Any) -> None:
        seen.append(os.environ.get("WANDB_API_KEY"))
        raise RuntimeError("no connection\nand more")

    monkeypatch.setattr(offline, "init", init)
    assert train(loaded("training.train_iters=1", ON)) == 0
    assert seen == [SECRET]


def test_a_failure_there_never_stops_training(
    offline: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        id, dir, url = "abc", "x/files", None
        settings = type("Settings", (), {"mode": "offline"})

        def log(self, values: dict[str, Any], step: int) -> None:
            raise ConnectionError("the service is gone")

        def alert(self, **_: Any) -> None: ...

    monkeypatch.setattr(offline, "init", lambda **_: Broken())
    assert train(loaded("training.train_iters=3", ON)) == 0
    assert list(losses("run")) == [1, 2, 3]
    warning = "warning: Weights & Biases takes no records (the service is gone); training goes on without it"
    assert capsys.readouterr().out.count(warning) == 1


@pytest.mark.parametrize(
    "spec", [None, importlib.machinery.ModuleSpec("wandb", None)], ids=["absent", "a folder"]
)
def test_a_missing_package_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, spec: Any
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"pip install 'modelyard\[wandb\]'"):
        train(loaded(ON))
    assert not Path("run").exists()
    assert train(loaded("training.train_iters=1", "training.wandb={entity_name: null, project_name: x}")) == 0


def test_alerts_fall_on_log_lines() -> None:
    def training(interval: int, offset: int = 0) -> TrainingConfig:
        alert = {"interval": interval, "offset": offset}
        return TrainingConfig(train_iters=10, logs={"interval": 4, "offset": 1}, wandb={"alert": alert})

    assert training(8, 5).wandb.alert.interval == 8
    for interval, offset in ((6, 1), (8, 0)):
        with pytest.raises(ValidationError, match=r"must fall on log lines: a multiple of logs.interval 4"):
            training(interval, offset)
