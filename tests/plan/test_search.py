"""Layouts ranked: those that fit, the fastest first, against going through all of them."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
import yaml

from modelyard.config.layout import layout_of
from modelyard.config.loader import load_config
from modelyard.plan.duration import duration_of
from modelyard.plan.hardware import Cluster, cluster_of, load_hardware
from modelyard.plan.memory import least_memory, most_of_all
from modelyard.plan.room import room_of
from modelyard.plan.search import anything_fits, at_least, candidates, lines_to_paste, search, why_slower
from modelyard.plan.workload import Workload, workload_of

CONFIG = {
    "training": {"train_iters": 10},
    "batch": {"sequence_length": 2048, "batch_size": 16},
    "data": {"datasets": {"training": {"type": "random"}}},
    "model": {"preset": "llama-3.2-1b", "distributed": {"training_dtype": "bf16"}},
    "run": {"experiment_dir": "unused"},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "train.yaml"
    path.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    """Eight small devices, four in a node: the model does not fit on any without being shared."""
    return cluster_of(replace(load_hardware("h100"), memory=12 << 30), 8, gpus_per_node=4)


def test_finds_what_going_through_all_finds(path: Path, cluster: Cluster) -> None:
    loaded = load_config([path])
    assert loaded.architecture is not None
    base = workload_of(loaded.train, loaded.architecture, 1, on_gpu=True)
    found, looked_at = search(loaded.train, loaded.architecture, base, cluster, best=3)
    everything = [work for _, work in candidates(loaded.train, loaded.architecture, base, cluster)]
    assert len(everything) == looked_at > 100
    fitting: list[tuple[float, Workload]] = []
    for work in everything:
        duration = duration_of(work, cluster).step
        assert at_least(work, cluster) <= duration  # else the search would end too early
        _, memory = most_of_all(work)
        assert least_memory(work) <= memory.peak
        if room_of(memory, cluster.hardware).fits:
            fitting.append((duration, work))
    assert 0 < len(fitting) < len(everything)
    assert anything_fits(loaded.train, loaded.architecture, base, cluster)
    least = min(room_of(most_of_all(work)[1], cluster.hardware).needed for work in everything)
    for room, fits in ((ceil(least), True), (int(least) - 1, False)):
        tight = replace(cluster, hardware=replace(cluster.hardware, memory=room))
        assert anything_fits(loaded.train, loaded.architecture, base, tight) is fits
    assert found[0].duration.step == min(step for step, _ in fitting)
    steps = [one.duration.step for one in found]
    assert steps == sorted(steps)
    assert all(one.room.fits for one in found)
    assert (
        why_slower(found[1], found[0]).startswith(f"{steps[1] / steps[0] - 1:+.1%}") or steps[1] == steps[0]
    )


def test_the_lines_give_that_layout(path: Path, cluster: Cluster, tmp_path: Path) -> None:
    loaded = load_config([path])
    assert loaded.architecture is not None
    base = workload_of(loaded.train, loaded.architecture, 1, on_gpu=True)
    found, _ = search(loaded.train, loaded.architecture, base, cluster, best=10)
    for one in found:
        extra = tmp_path / "layout.yaml"
        extra.write_text(lines_to_paste(one), encoding="utf-8")
        pasted = load_config([path, extra])
        assert pasted.architecture is not None
        assert layout_of(pasted.train, 8) == one.workload.layout
        work = workload_of(pasted.train, pasted.architecture, 8, on_gpu=True)
        assert work == one.workload
        assert duration_of(work, cluster).step == one.duration.step  # as if it were planned alone


def test_a_split_backward_is_not_compiled(path: Path, cluster: Cluster) -> None:
    loaded = load_config([path])
    assert loaded.architecture is not None
    base = workload_of(loaded.train, loaded.architecture, 1, on_gpu=True)
    assert base.compiled
    compiled = {
        work.layout.schedule: work.compiled
        for _, work in candidates(loaded.train, loaded.architecture, base, cluster)
    }
    assert compiled == {"1f1b": True, "interleaved": True, "zero_bubble": False, "zbv": False}
