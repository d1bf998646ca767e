"""What a run that trains an adapter leaves behind, in every verb that takes models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modelyard.cli import main
from modelyard.model.formats import open_huggingface
from modelyard.train.models_on_disk import open_model
from modelyard.train.run import train
from tests.parallel.processes import run_distributed
from tests.train.helpers import CONFIG, lines, loaded

PEFT = "model.base_model.transformer.peft"
HELD_OUT = "{v: {interval: 4, evaluator: {type: loss, dataset_name: held_out, iterations: 2}}}"
OF_BASE = ("pretrained.path=base/export/llama/2", f"training.evaluators={HELD_OUT}")
QUANTISED = (f"{PEFT}.quantization=nf4", f"{PEFT}.quantization_block=16")


@pytest.fixture
def base(tiny: Path) -> Path:
    """`base`, a run whose export `base/export/llama/2` is adapted."""
    wider = (
        CONFIG.replace("ffn_hidden_size: 16", "ffn_hidden_size: 32, head_groups: 2")
        .replace("num_layers: 1", "num_layers: 2")
        .replace(" hidden_size: 8", " hidden_size: 32")
    )
    Path("train.yaml").write_text(wider)
    export = "training.export={interval: 2, format: llama, data_type: float32}"
    checkpoint = "training.checkpoint={interval: 2}"
    assert train(loaded("training.train_iters=2", export, checkpoint, "run.experiment_dir=base")) == 0
    return tiny


def lora(folder: str, *overrides: str, format: str = "peft", iterations: int = 4) -> tuple[str, ...]:
    """The overrides of a run of so many iterations, which it has trained."""
    keys = (
        *OF_BASE,
        f"{PEFT}.type=lora",
        f"{PEFT}.rank=2",
        f"{PEFT}.layers=[all]",
        "training.checkpoint={interval: 4}",
        f"training.export={{interval: 4, format: {format}, data_type: float32}}",
        f"run.experiment_dir={folder}",
        *overrides,
    )
    assert train(loaded(f"training.train_iters={iterations}", *keys)) == 0
    return keys


def same_weights(one: Path, other: Path, **closeness: float) -> None:
    first, second = open_model(one), open_model(other)
    for name in first.weights.names():
        torch.testing.assert_close(
            first.weights.load(name), second.weights.load(name), **({"rtol": 0, "atol": 0} | closeness)
        )


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> float:
    capsys.readouterr()
    assert main(["evaluate", "train.yaml", *words, "--json"]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record["loss"]


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("kind", [(), (f"{PEFT}.dora=yes",), QUANTISED], ids=["lora", "dora", "nf4"])
def test_checkpoint_and_exports_are_one_model(
    kind: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint with its base, the adapter as PEFT reads it, the merged folder: one model, whose loss is the run's."""
    keys = lora("run", *kind)
    capsys.readouterr()
    words = lora("whole", *kind, format="llama")
    assert main(["validate", "train.yaml", "training.train_iters=4", *words]) == 0
    said_so = capsys.readouterr().out.count(
        "format llama: the adapter is merged into what it is trained on, the"
    )
    assert said_so == (2 if kind == QUANTISED else 0)  # as the run begins, and before it
    same_weights(Path("run"), Path("run/export/peft/4"))
    same_weights(Path("run"), Path("whole/export/llama/4"))
    said = next(line["loss"] for line in lines("run/metrics.jsonl") if line.get("evaluator") == "v")
    assert evaluated(capsys, *keys) == pytest.approx(said, rel=1e-5)
    assert evaluated(capsys, *keys, "--checkpoint", "run/export/peft/4") == pytest.approx(said, rel=1e-5)
    assert abs(said - evaluated(capsys, *OF_BASE, "run.experiment_dir=base")) > 1e-3  # what was learned shows
    onto = ["--onto", "dequantized"] if kind == QUANTISED else []
    assert main(["merge", "run", "--to", "merged", *onto]) == 0
    same_weights(Path("run"), Path("merged"))


@pytest.mark.usefixtures("base")
def test_a_base_that_is_trained_too(capsys: pytest.CaptureFixture[str]) -> None:
    keys = lora("run", f"{PEFT}.freeze_others=no", format="llama")
    same_weights(Path("run"), Path("run/export/llama/4"))
    moved = open_huggingface(Path("run/export/llama/4")).weights
    before = open_huggingface(Path("base/export/llama/2")).weights
    assert not torch.equal(moved.load("embed_tokens.weight"), before.load("embed_tokens.weight"))
    said = next(line["loss"] for line in lines("run/metrics.jsonl") if line.get("evaluator") == "v")
    assert evaluated(capsys, *keys) == pytest.approx(said, rel=1e-5)
    capsys.readouterr()
    assert main(["convert", "run", "adapter", "--format", "peft"]) == 2
    assert "was trained with freeze_others: no, and PEFT's folder has no place for the base" in (
        capsys.readouterr().err
    )


@pytest.mark.usefixtures("base")
def test_convert(capsys: pytest.CaptureFixture[str]) -> None:
    lora("run")
    assert main(["convert", "run", "adapter", "--format", "peft"]) == 0
    same_weights(Path("run"), Path("adapter"))
    assert main(["convert", "adapter", "again", "--format", "peft", "--dtype", "bf16"]) == 0
    same_weights(Path("run"), Path("again"), rtol=0, atol=1e-2)
    assert main(["convert", "run", "merged"]) == 0
    same_weights(Path("run"), Path("merged"))
    capsys.readouterr()
    assert main(["convert", "base", "nothing", "--format", "peft"]) == 2
    assert capsys.readouterr().err == (
        "error: base/checkpoint/2 holds no adapter, and --format peft writes nothing else\n"
    )
    Path("base").rename("moved")
    assert main(["convert", "run", "lost"]) == 2
    assert main(["convert", "run", "found", "--base", "moved/export/llama/2"]) == 0
    same_weights(Path("merged"), Path("found"))


@pytest.mark.usefixtures("base")
def test_going_on_with_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    """From PEFT's folder or a checkpoint; without peft, merged. The first evaluation is that of the run before."""
    lora("run")
    said = next(line["loss"] for line in lines("run/metrics.jsonl") if line.get("evaluator") == "v")
    at_start = "training.evaluators.v.at_start=yes"
    for folder, adapter, keys in (
        ("a", "run/export/peft/4", ()),
        ("b", "run/checkpoint/4", (f"{PEFT}.dropout=0.0",)),
        ("c", "run/checkpoint/4", (f"{PEFT}.type=none",)),
    ):
        words = (f"pretrained.adapter={adapter}", f"run.experiment_dir={folder}", at_start)
        assert train(loaded("training.train_iters=1", *OF_BASE, *words, *keys)) == 0
        first = next(
            line["loss"] for line in lines(f"{folder}/metrics.jsonl") if line.get("evaluator") == "v"
        )
        assert first == pytest.approx(said, rel=1e-6)
    assert open_model(Path("a")).adapted is not None
    assert open_model(Path("c")).adapted is None
    assert "adapter from run/export/peft/4" in capsys.readouterr().out


@pytest.mark.usefixtures("base")
def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    lora("run", *QUANTISED, f"{PEFT}.dora=yes")
    for path in ("run", "run/export/peft"):
        capsys.readouterr()
        assert main(["inspect", path]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "kind DoRA, of rank 2, alpha 8: a factor of 4" in out
        assert "trained on the base in NF4, blocks of 16" in out
        assert "the weights that it was trained on (" in out
        assert "parameters 2,240 beside 15,520 (14.43%)" in out
        assert "lora_magnitude" in out
        assert "nothing wrong was found" in out
    assert main(["inspect", "run", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["adapter"]["rank"] == 2
    assert values["adapter"]["base"] == str(Path("base/export/llama/2").resolve())

    Path("base").rename("moved")
    assert main(["inspect", "run/export/peft"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "which is not here" in out
    assert "give it with --base DIR where it is used" in out
    lora_of_another = "training.export={interval: 2, format: llama, data_type: float32}"
    assert train(loaded("training.train_iters=2", lora_of_another, "run.experiment_dir=base",
                        "model.distributed.seed=1")) == 0  # fmt: skip
    assert main(["inspect", "run"]) == 1
    assert "was trained on other weights" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(
    ("format", "processes", "layout"),
    [
        ("peft", 2, ("model.multi_stage.zero_stage=3",)),
        (
            "llama",
            4,
            ("model.distributed={tensor_parallel: 2, pipeline_parallel: 2}", "batch.micro_batch_size=2"),
        ),
    ],
    ids=["ZeRO 3", "tensor x pipeline"],
)
def test_exports_of_several_processes(
    format: str, processes: int, layout: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    """What each has of the adapter is put together; the base, which none has whole, is read again."""
    kind = (*QUANTISED, f"{PEFT}.dora=yes", "model.distributed.training_dtype=float64")
    keys = lora("one", *kind, format=format)
    run_distributed(lora_alone, processes, "many", *kind, *layout, format)
    same_weights(Path("one"), Path(f"one/export/{format}/4"), rtol=1e-5, atol=1e-5)
    same_weights(Path(f"one/export/{format}/4"), Path(f"many/export/{format}/4"), rtol=1e-6, atol=1e-7)
    same_weights(Path("many"), Path(f"many/export/{format}/4"), rtol=1e-5, atol=1e-5)
    if format == "peft":
        alone = evaluated(capfd, *keys)
        capfd.readouterr()
        words = ("evaluate", "train.yaml", *keys, *layout, "--json", "--checkpoint")
        assert run_distributed(main, processes, [*words, "one/checkpoint/4"]) == [0] * processes
        assert json.loads(capfd.readouterr().out)["loss"] == pytest.approx(alone, rel=1e-6)


def lora_alone(folder: str, *words: str) -> None:
    *overrides, format = words
    lora(folder, *overrides, format=format)
