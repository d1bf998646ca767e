"""`modelyard convert` and what `--tokenizer` may name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelyard.cli import main
from modelyard.errors import UserError
from modelyard.train.run import train
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
