"""Traces of named iterations: what is in them, and that they change no number."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from modelyard.config.traces import trace_warnings, traced_iterations
from modelyard.config.training import GuideProfilingConfig
from modelyard.train.profiling import memory_timeline
from modelyard.train.run import train
from tests.train.helpers import loaded, losses

pytestmark = pytest.mark.usefixtures("tiny")


def test_a_traced_run_has_the_same_numbers_and_a_trace() -> None:
    assert train(loaded("training.train_iters=4")) == 0
    settings = ("training.train_iters=4", "batch.micro_batch_size=4", "run.experiment_dir=traced")
    assert train(loaded(*settings, "training.profiling={iterations: [2], memory: yes}")) == 0
    assert losses("traced") == losses("run")
    assert [path.name for path in Path("traced/profile").iterdir()] == ["2"]
    assert not Path("run/profile").exists()

    folder = Path("traced/profile/2")
    assert sorted(path.name for path in folder.iterdir()) == ["memory.json", "operators.txt", "trace.json.gz"]
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "user_annotation"}
    assert spans["forward"][1] <= spans["backward"][0] < spans["backward"][1] <= spans["optimizer"][0]
    products = [e["ts"] for e in events if e.get("name") == "aten::mm"]
    assert any(spans["forward"][0] < moment < spans["forward"][1] for moment in products)
    assert "aten::mm" in (folder / "operators.txt").read_text()
    memory = json.loads((folder / "memory.json").read_text())
    # At least the logits of 64 tokens of 32, or what stands for them, in fp32.
    assert memory["peak_bytes"] > 64 * 32 * 4
    assert memory["peak_bytes"] == max(held for _, held in memory["timeline"])
    assert {"forward", "backward", "optimizer"} <= memory["phases"].keys()


def test_a_trace_that_cannot_be_written_costs_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/profile.out").touch()
    Path("run/profile").symlink_to("profile.out")  # a file where the folder should be
    assert train(loaded("training.train_iters=2", "training.profiling.iterations=[1]"), force=True) == 0
    assert "warning: the profile of iteration 1 cannot be written" in capsys.readouterr().out


def test_memory_over_time_by_hand() -> None:
    def allocation(moment: float, size: int) -> dict:
        return {"name": "[memory]", "ts": moment, "args": {"Bytes": size}}

    def phase(name: str, begin: float, length: float) -> dict:
        return {"name": name, "cat": "user_annotation", "ts": begin, "dur": length}

    events = [
        phase("forward", 10, 10), phase("backward", 20.5, 10), phase("Optimizer.step#AdamW.step", 0, 100),
        allocation(5, 8), allocation(12, 100), allocation(25, 50), allocation(13, -30), allocation(26, -128),
    ]  # fmt: skip
    assert memory_timeline(events) == {
        "peak_bytes": 128,
        "peak_phase": "backward",
        "phases": {"other": 8, "forward": 108, "backward": 128},
        "timeline": [[0, 8], [7, 108], [8, 78], [20, 128], [21, 0]],
    }
    assert memory_timeline([])["peak_phase"] is None


def test_the_schedule_of_the_guides() -> None:
    """torch.profiler.schedule(skip_first=1, wait=1, warmup=1, active=2) without end, steps counted from 1."""

    def due(**settings: int | bool) -> list[int]:
        schedule = GuideProfilingConfig(**settings)
        return [step for step in range(1, 13) if schedule.due(step)]

    assert due(cpu=True, export=True, skip=1, wait=1, warmup=1, cycles=2) == [4, 5, 8, 9, 12]
    assert due(cuda=True, averages=True) == [3, 5, 7, 9, 11]
    assert due(cpu=True) == due(export=True) == due() == []


def test_the_schedule_of_the_guides_is_read() -> None:
    settings = ("training.train_iters=3", "profiling={cpu: yes, trace: yes, skip: 0, warmup: 2}")
    assert train(loaded(*settings)) == 0
    assert [path.name for path in Path("run/profile").iterdir()] == ["3"]


@pytest.mark.parametrize("train_iters", [1, 4, 5, 12, 13])
def test_the_folders_of_a_schedule_are_counted_before(train_iters: int) -> None:
    for settings in (
        "{cpu: yes, trace: yes, skip: 1, wait: 1, warmup: 1, cycles: 2}",
        "{cpu: yes, export: yes}",
        "{}",
    ):
        config = loaded(f"training.train_iters={train_iters}", f"profiling={settings}").train
        due = [i for i in range(1, train_iters + 1) if config.profiling.due(i)]
        assert traced_iterations(config) == len(due)


def test_traces_that_never_come_and_those_that_never_end_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = loaded("training.train_iters=2", "training.profiling.iterations=[2, 40, 3]").train
    never = "training.profiling.iterations: 3, 40: never traced, training.train_iters is 2"
    assert trace_warnings(config) == [never]
    config = loaded("training.train_iters=12", "profiling={cpu: yes, trace: yes, wait: 1, cycles: 2}").train
    assert trace_warnings(config) == [
        "profiling traces 2 of every 4 iterations to the end: 5 folders in run/profile; "
        "training.profiling.iterations names single ones"
    ]
    assert trace_warnings(loaded("training.profiling.iterations=[1, 12]").train) == []
    assert train(loaded("training.train_iters=1", "training.profiling.iterations=[2]")) == 0
    assert "warning: training.profiling.iterations: 2: never traced" in capsys.readouterr().out
