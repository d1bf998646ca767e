"""What a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelyard.config import disk
from modelyard.config.peft import PeftConfig
from modelyard.config.train import TrainConfig
from modelyard.config.training import CheckpointConfig, ExportConfig
from tests.config.helpers import load_tiny


def config_of(folder: Path, *overrides: str) -> TrainConfig:
    return load_tiny(folder, f"run.experiment_dir={folder}/run", *overrides).train


@pytest.mark.parametrize(
    ("iterations", "settings", "expected"),
    [
        (100, {}, (1, 1)),  # without an interval, once at the end
        (100, {"interval": 10, "keep": None}, (10, 10)),
        # The final one lies on the interval; one more than `keep` while the newest is written.
        (100, {"interval": 10, "keep": 3}, (10, 4)),
        (105, {"interval": 10, "keep": 3}, (11, 5)),
        (100, {"interval": 10, "keep": 3, "keep_every": 5}, (10, 6)),
        (100, {"interval": 10, "offset": 5, "keep": None}, (11, 11)),
        (100, {"interval": 1000, "keep": 5}, (1, 1)),
        (0, {"interval": 10}, (0, 0)),
    ],
)
def test_how_many_saves(
    tmp_path: Path, iterations: int, settings: dict[str, int], expected: tuple[int, int]
) -> None:
    config = config_of(tmp_path, f"training.train_iters={iterations}")
    assert disk.saves(config, CheckpointConfig(**settings)) == expected


def test_bytes(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    assert loaded.architecture is not None
    count = loaded.architecture.parameter_count()
    assert disk.checkpoint_bytes(loaded.train, loaded.architecture) == 12 * count
    assert disk.export_bytes(loaded.train, loaded.architecture) == 2 * count
    config = config_of(
        tmp_path, "training.checkpoint={interval: 50, keep: 1}", "training.export={interval: 50, format: llama}",
        "model.distributed.training_dtype=float64",
    )  # fmt: skip
    assert disk.run_bytes(config, loaded.architecture) == 2 * 24 * count + 2 * 2 * count
    assert ExportConfig().keep is None


def test_bytes_of_an_export_of_an_adapter(tmp_path: Path) -> None:
    """PEFT's folder has the adapter alone; the merged model is as large as the base."""
    loaded = load_tiny(tmp_path)
    shape, peft = loaded.architecture, PeftConfig(type="lora", rank=2, layers=["query"])
    assert shape is not None
    transformer = loaded.train.model.base_model.transformer.model_copy(update={"peft": peft})
    base_model = loaded.train.model.base_model.model_copy(update={"transformer": transformer})
    model = loaded.train.model.model_copy(update={"base_model": base_model})

    def exported(**settings: Any) -> int:
        export = ExportConfig.model_validate({"interval": 1} | settings)
        training = loaded.train.training.model_copy(update={"export": export})
        config = loaded.train.model_copy(update={"model": model, "training": training})
        return disk.export_bytes(config, shape)

    own = 2 * 2 * (64 + 64)  # two layers, rank 2, of a matrix of 64 x 64
    assert exported(format="peft") == 4 * own
    assert exported(format="peft", data_type="bf16") == 2 * own
    assert exported(format="llama") == 2 * shape.parameter_count()


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tiny(tmp_path, f"run.experiment_dir={tmp_path}/run", "training.checkpoint.interval=50")
    assert loaded.architecture is not None
    assert disk.disk_problem(loaded.train, loaded.architecture) is None
    monkeypatch.setattr(disk, "free_bytes", lambda config: 1000)
    problem = disk.disk_problem(loaded.train, loaded.architecture)
    assert problem is not None
    assert "1000 B are free; lower training.checkpoint.keep" in problem


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    """/proc is one to root as well, whom no permissions keep out."""
    loaded = load_tiny(tmp_path, "run.experiment_dir=/proc/nowhere/run")
    assert loaded.architecture is not None
    assert disk.disk_problem(loaded.train, loaded.architecture) == (
        "run.experiment_dir: /proc/nowhere/run cannot be written to: /proc is not writable"
    )


def test_what_the_run_wrote_already_is_its_own(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    before = disk.free_bytes(config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_bytes(b"x" * (1 << 20))
    assert abs(disk.free_bytes(config) - before) < 50 << 20


def test_sizes_as_people_read_them() -> None:
    assert [disk.size(number) for number in (0, 1023, 1024, 1536 << 20, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 GiB", "5.0 TiB",
    ]  # fmt: skip


def test_a_file_that_goes_away_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may be at work in the folder until the lock says so."""
    (tmp_path / "there").write_bytes(bytes(10))
    monkeypatch.setattr(disk.os, "walk", lambda folder: [(str(folder), [], ["there", "gone"])])
    assert disk._used(tmp_path) == 10
