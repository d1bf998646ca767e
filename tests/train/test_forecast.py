"""The plan of a run beside what its first iterations show."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modelyard.config.loader import load_config
from modelyard.plan.duration import duration_of
from modelyard.plan.hardware import cluster_of, load_hardware
from modelyard.plan.memory import memory_of
from modelyard.plan.workload import workload_of
from modelyard.train import forecast
from modelyard.train.forecast import LOOKED_AT, WARM_UP, Forecast

EXAMPLE = Path(__file__).parents[2] / "examples" / "train-llama-3.1-8b.yaml"


def a_run(said: list[str], **world: Any) -> Any:
    loaded = load_config([EXAMPLE], ["batch.batch_size=2"])
    return SimpleNamespace(
        config=loaded.train,
        architecture=loaded.architecture,
        console=SimpleNamespace(line=said.append),
        device=torch.device("cpu"),
        world=SimpleNamespace(**{"size": 1, "is_main": True, **world}),
        memory_before=1 << 20,
    )


@pytest.fixture
def on_an_h100(monkeypatch: pytest.MonkeyPatch) -> float:
    """Tokens a second that the plan says."""
    monkeypatch.setattr(forecast, "_hardware", lambda device: load_hardware("h100"))
    run = a_run([])
    work = workload_of(run.config, run.architecture, 1, on_gpu=False)
    duration = duration_of(work, cluster_of(load_hardware("h100"), 1))
    return 2 * 4096 / duration.step


def seen(plan: Forecast, tokens_per_second: float) -> None:
    for _ in range(WARM_UP):
        plan.look(1000.0, 0)  # the first ones are slow and do not count
    for _ in range(LOOKED_AT + 3):
        plan.look(2 * 4096 / tokens_per_second, 2 << 30)


def test_says_the_plan_and_keeps_it_for_the_records(on_an_h100: float) -> None:
    said: list[str] = []
    run = a_run(said)
    plan = Forecast(run)
    work = workload_of(run.config, run.architecture, 1, on_gpu=False)
    assert plan.record() == {
        "planned_memory_bytes": (1 << 20) + memory_of(work).peak,
        "planned_tokens_per_second": pytest.approx(on_an_h100),
    }
    (line,) = said
    assert line.startswith("planned: memory ")
    assert line.endswith(f" GiB, {on_an_h100:,.0f} tokens/s (docs/planner.md)")


def test_says_once_how_plan_and_run_compare(on_an_h100: float) -> None:
    said: list[str] = []
    plan = Forecast(a_run(said))
    seen(plan, 0.9 * on_an_h100)
    assert len(said) == 2
    assert "2.0 GiB so far" in said[1]
    assert f"{0.9 * on_an_h100:,.0f} in the last 10 iterations (-10%)" in said[1]
    assert "SLOWER" not in said[1]


def test_a_slow_run_is_told_so(on_an_h100: float) -> None:
    said: list[str] = []
    seen(Forecast(a_run(said)), 0.7 * on_an_h100)
    assert "(-30%): SLOWER THAN IT SHOULD BE" in said[1]


def test_a_machine_that_nobody_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_hardware", lambda device: None)
    said: list[str] = []
    plan = Forecast(a_run(said))
    assert "once `modelyard plan CONFIG --gpu this-machine` has measured it" in said[0]
    assert list(plan.record()) == ["planned_memory_bytes"]


def test_a_run_goes_on_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("none")

    monkeypatch.setattr(forecast, "most_of_all", fails)
    said: list[str] = []
    plan = Forecast(a_run(said))
    seen(plan, 1.0)
    assert said == ["warning: no plan of this run: ZeroDivisionError: none"]
    assert plan.record() == {}


def test_only_the_main_process_plans() -> None:
    said: list[str] = []
    assert Forecast(a_run(said, is_main=False)).record() == {}
    assert said == []
