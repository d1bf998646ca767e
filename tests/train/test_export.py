"""`modelyard convert` and what `--tokenizer` may name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modelyard.cli import main
from modelyard.errors import RunFailed, UserError
from modelyard.model.formats.safetensors import read_entries
from modelyard.parallel.world import connected
from modelyard.train import export as exports
from modelyard.train.models_on_disk import base_fingerprint
from modelyard.train.run import train
from tests.parallel.processes import run_distributed
from tests.train.helpers import loaded


@pytest.fixture
def trained(tiny: Path) -> Path:
    assert (
        train(loaded("training.train_iters=3", "training.checkpoint={interval: 1, offset: 0, keep: 3}")) == 0
    )
    (tiny / "empty").mkdir()
    return tiny


def test_a_tokenizer_that_is_not_there_stops_before_anything_is_written(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    expected = {
        "emty": "error: --tokenizer: emty does not exist (there is no 'emty' in the working directory; nearest there: empty)\n",
        "empty": "error: --tokenizer: empty holds no tokenizer (none of tokenizer.json, tokenizer.model, vocab.json)\n",
        "train.yaml": "error: --tokenizer: train.yaml is a file; name the folder that it lies in\n",
    }
    for named, line in expected.items():
        for words in (["convert", "run", "made"], ["generate", "run", "--prompt", "x"]):
            assert main([*words, "--tokenizer", named]) == 2
            out, err = capsys.readouterr()
            assert (out, err) == ("", line)
    assert not Path("made").exists()


def test_convert_says_what_it_wrote(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("tokenizer").mkdir()
    Path("tokenizer/tokenizer.json").write_text("{}")
    capsys.readouterr()
    assert main(["convert", "run", "a", "--tokenizer", "tokenizer"]) == 0
    assert capsys.readouterr().out == "wrote a (iteration 3, from run/checkpoint/3)\n"
    assert Path("a/tokenizer.json").read_text() == "{}"

    Path("run/checkpoint/3/state.json").write_text("{")
    assert main(["convert", "run", "b"]) == 0
    out, err = capsys.readouterr()
    assert out == "wrote b (iteration 2, from run/checkpoint/2)\n"
    assert err.startswith("warning: checkpoint run/checkpoint/3 is damaged (")

    assert main(["convert", "a", "c"]) == 0
    assert capsys.readouterr().out == "wrote c (from a)\n"


def test_convert_writes_nothing_among_the_checkpoints_of_a_run(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["convert", "run", "run/checkpoint/hf"]) == 2
    run = Path("run").resolve()
    assert capsys.readouterr().err == (
        f"error: run/checkpoint/hf is inside the run {run}; name a folder elsewhere\n"
    )
    assert not Path("run/checkpoint/hf").exists()


def test_convert_takes_every_family(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a family cannot hold is said by what writes it, not by a list on the command line."""
    assert main(["convert", "run", "q", "--format", "mistral"]) == 0
    assert json.loads(Path("q/config.json").read_text())["model_type"] == "mistral"
    assert main(["convert", "run", "s", "--format", "starcoder2"]) == 2
    err = capsys.readouterr().err
    assert "starcoder2" in err
    assert "invalid choice" not in err
    assert not Path("s").exists()


@pytest.mark.usefixtures("tiny")
def test_exports_need_the_folder_that_was_started_from() -> None:
    """A run goes on from its checkpoint without it; one that exports is told at its start, not at its end."""
    export = "training.export={interval: 2, format: llama, data_type: float32}"
    assert train(loaded("training.train_iters=2", export, "run.experiment_dir=base")) == 0
    Path("base/export/llama/2").rename("model")
    keys = ("pretrained.path=model", "training.checkpoint={interval: 2, offset: 0}")
    assert train(loaded(*keys, "training.train_iters=2")) == 0
    Path("model").rename("elsewhere")
    with pytest.raises(
        UserError, match=r"pretrained.path: model is gone, and training.export takes from its config.json"
    ):
        train(loaded(*keys, "training.train_iters=4", export))
    assert train(loaded(*keys, "training.train_iters=4")) == 0


def test_every_parameter_comes_in_its_own_type() -> None:
    """What is frozen beside an adapter may be narrower than the rest; its stage knows."""
    found = run_distributed(_live, 2)
    assert found[0] == {
        "a": ("torch.float32", 1.1),
        "b": ("torch.bfloat16", 2.5),
        "c": ("torch.float64", 3.3),
    }


def _live() -> dict[str, tuple[str, float]]:
    with connected(backend="gloo", timeout=60.0, traces=Path("traces")) as world:
        ours = (
            {"a": torch.full((3,), 1.1)},
            {"b": torch.full((3,), 2.5).bfloat16(), "c": torch.full((3,), 3.3, dtype=torch.float64)},
        )[world.rank]
        weights = SimpleNamespace(master=ours)
        parallel: Any = SimpleNamespace(weights=weights, own=list(ours), whole=dict)
        live = exports.LiveWeights(parallel, world, dict.fromkeys("abc", (3,)))
        if not world.is_main:
            live.serve()
            return {}
        loaded = {name: live.load(name) for name in live.names()}
        live.done()
        assert all(tensor.dtype == live.dtype(name) for name, tensor in loaded.items())
        return {name: (str(tensor.dtype), round(tensor[2].item(), 6)) for name, tensor in loaded.items()}


ADAPTER = (
    "pretrained.path=base/export/llama/2",
    "model.base_model.transformer.peft={type: lora, rank: 2}",
    "training.train_iters=2",
)


@pytest.fixture
def base(tiny: Path) -> Path:
    export = "training.export={interval: 2, format: llama, data_type: float32}"
    assert train(loaded("training.train_iters=2", export, "run.experiment_dir=base")) == 0
    return tiny


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(
    ("words", "dtype"), [("", torch.float32), (", data_type: bf16", torch.bfloat16)], ids=["default", "bf16"]
)
def test_the_type_of_an_exported_adapter(words: str, dtype: torch.dtype) -> None:
    """That of its training, unless another is asked for."""
    assert train(loaded(*ADAPTER, f"training.export={{interval: 2, format: peft{words}}}")) == 0
    entries = read_entries(Path("run/export/peft/2/adapter_model.safetensors"))
    assert entries
    assert {entry.dtype for entry in entries.values()} == {dtype}
    kept = json.loads(Path("run/export/peft/2/modelyard_adapter.json").read_text())
    folder = Path("base/export/llama/2").resolve()
    assert kept["base"] == {"path": str(folder), "fingerprint": base_fingerprint(folder)}


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("format", ["peft", "llama"])
def test_a_base_that_is_another_by_now(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody writes another model into its folder while the run trains."""
    other = ("model.distributed.seed=5", "run.experiment_dir=other")
    export_too = "training.export={interval: 2, format: llama, data_type: float32}"
    assert train(loaded("training.train_iters=2", export_too, *other)) == 0
    folder = Path("base/export/llama/2")
    before, write = base_fingerprint(folder), exports._write

    def swapped(*arguments: Any) -> None:
        shutil.rmtree(folder)
        shutil.copytree("other/export/llama/2", folder)
        write(*arguments)

    monkeypatch.setattr(exports, "_write", swapped)
    with pytest.raises(RunFailed) as refusal:
        train(loaded(*ADAPTER, f"training.export={{interval: 2, format: {format}}}"))
    assert (
        f"pretrained.path: the weights in {folder} (fingerprint {base_fingerprint(folder)[:12]}) are no longer those that the run "
        f"was started with ({before[:12]}); put these back"
    ) in str(refusal.value)
    assert not Path("run/export", format, "2").exists()
