import dataclasses
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from modelyard.config.architecture import Architecture, Rotary
from modelyard.errors import UserError
from modelyard.train.checkpoint import Checkpoint, newest_usable, open_checkpoint, save_checkpoint

SHAPE = Architecture(8, 4, 1, 2, 1, 2, 6, rotary=Rotary("llama3", 500_000.0))


def save(folder: Path, iteration: int, fill: float = 1.0) -> Path:
    torch.manual_seed(0)
    parameters = {name: torch.randn(shape) * fill for name, shape in SHAPE.parameter_shapes().items()}
    save_checkpoint(
        folder / str(iteration),
        parameters=parameters,
        moments={f"{name}.exp_avg": p * 2 for name, p in parameters.items()},
        state={"progress": {"iteration": iteration}, "architecture": dataclasses.asdict(SHAPE)},
        config={"training": {"train_iters": 5}},
    )
    return folder / str(iteration)


def test_round_trip(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path, 3))
    assert checkpoint.iteration == 3
    assert checkpoint.architecture == SHAPE
    assert checkpoint.config == {"training": {"train_iters": 5}}
    assert set(checkpoint.names()) == set(SHAPE.parameter_shapes())
    torch.manual_seed(0)
    for name, shape in SHAPE.parameter_shapes().items():
        expected = torch.randn(shape)
        assert checkpoint.shape(name) == shape
        assert torch.equal(checkpoint.load(name), expected)
        moment = torch.empty(shape)
        checkpoint.load_into({f"optimizer.{name}.exp_avg": moment})
        assert torch.equal(moment, expected * 2)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path, 3))
    with pytest.raises(UserError) as error:
        checkpoint.load_into({"model.nothing": torch.empty(1), "model.norm.weight": torch.empty(5)})
    assert "has no tensor 'model.nothing'" in error.value.problems[0]
    assert "'model.norm.weight' has shape (4,), the config makes it (5,)" in error.value.problems[1]


def test_newest_whole_one_is_used(tmp_path: Path) -> None:
    save(tmp_path, 3)
    data = next(save(tmp_path, 6).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    usable, damaged = newest_usable(tmp_path)
    assert usable == tmp_path / "3"
    assert list(damaged) == [tmp_path / "6"]
    with pytest.raises(UserError, match="bytes where its manifest says"):
        Checkpoint(tmp_path / "6")


def test_nothing_is_run_from_a_hostile_folder(tmp_path: Path) -> None:
    """A pickle that would call a function is refused, even with a manifest that fits."""
    from modelyard.files import complete_or_absent

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    whole = save(tmp_path, 3)
    with complete_or_absent(tmp_path / "4", manifest=True) as temporary:
        for file in whole.iterdir():
            if file.name != "manifest.json":
                (temporary / file.name).write_bytes(file.read_bytes())
        (temporary / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="has no place in a checkpoint's metadata"):
        Checkpoint(tmp_path / "4")
    assert not (tmp_path / "owned").exists()


def test_finding_the_checkpoint_that_a_path_means(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoint"
    assert open_checkpoint(tmp_path / "run") is None
    save(directory, 3)
    newest = save(directory, 12)
    (directory / "20.tmp").mkdir()
    for path in (tmp_path / "run", directory, newest):
        assert (found := open_checkpoint(path)) is not None
        assert found.folder == newest


def test_a_checkpoint_is_verified_once_to_be_used(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `evaluate` and by what `generate` and `convert` open; a damaged one is passed over, and named where it is all."""
    from modelyard.train.evaluate import evaluate
    from modelyard.train.export import open_model
    from modelyard.train.run import train
    from tests.train.helpers import loaded

    config = loaded(
        "training.train_iters=2",
        "training.checkpoint={interval: 1, offset: 0}",
        "training.evaluators={held_out: {interval: 1, evaluator: {iterations: 1}}}",
    )
    assert train(config) == 0
    looked_at: list[str] = []
    problems = Checkpoint.problems

    def counted(folder: Path) -> list[str]:
        looked_at.append(folder.name)
        return problems(folder)

    monkeypatch.setattr(Checkpoint, "problems", staticmethod(counted))
    assert evaluate(config, checkpoint=None, as_json=True) == 0
    assert evaluate(config, checkpoint=Path("run/checkpoint/1"), as_json=True) == 0
    assert open_model(Path("run")).folder == Path("run/checkpoint/2")
    assert looked_at == ["2", "1", "2"]
    size = Path("run/checkpoint/2/state.json").stat().st_size
    Path("run/checkpoint/2/state.json").write_text("{")
    capsys.readouterr()
    assert open_model(Path("run")).folder == Path("run/checkpoint/1")
    assert capsys.readouterr().err == (
        "warning: checkpoint run/checkpoint/2 is damaged (run/checkpoint/2/state.json has 1 bytes where its manifest "
        f"says {size:,}); run/checkpoint/1 is used instead\n"
    )
    Path("run/checkpoint/1/.metadata").unlink()
    with pytest.raises(UserError, match=r"checkpoint/2/state.json has 1 bytes where its manifest says"):
        open_model(Path("run"))
    shutil.rmtree("run/checkpoint")
    with pytest.raises(UserError, match=r"run is the folder of a run that has no checkpoint yet"):
        open_model(Path("run"))
