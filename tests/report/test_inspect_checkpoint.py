"""`modelyard inspect` of checkpoints and Hugging Face folders: what they hold, and whether it is sound."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelyard.cli import main
from modelyard.config.architecture import Architecture, Rotary
from modelyard.config.loader import load_config
from modelyard.report.inspect_checkpoint import _architecture_rows
from modelyard.report.inspect_tensors import measure
from modelyard.train.checkpoint import Checkpoint, save_checkpoint
from tests.config.helpers import TINY, write


def test_measures_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([[3.0, -4.0], [math.nan, math.inf]], dtype=torch.bfloat16)
    for at_once in (1, 3, 1 << 24):
        monkeypatch.setattr("modelyard.report.inspect_tensors._SLICE", at_once)
        found = measure(values)
        assert (found.norm, found.smallest, found.largest) == (5.0, -4.0, 3.0)
        assert (found.nan, found.infinite) == (1, 1)
    # 10^4 of 10^-3 in bf16: 10^-3 is 0.00099945..., so the norm is 100 times that.
    assert measure(torch.full((100, 100), 1e-3, dtype=torch.bfloat16)).norm == pytest.approx(
        0.0999451, rel=1e-5
    )


class Inspected:
    def __init__(self, status: int, out: str, values: dict[str, Any]):
        self.status, self.out, self.values = status, out, values


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]):
    def run(*words: object) -> Inspected:
        status = main(["inspect", *map(str, words)])
        printed = capsys.readouterr()
        assert main(["inspect", *map(str, words), "--json"]) == status
        values = capsys.readouterr().out
        return Inspected(status, printed.out + printed.err, json.loads(values) if values else {})

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of two iterations on random tokens, with a checkpoint and an export of each."""
    folder = tmp_path_factory.mktemp("experiment")
    text = TINY.replace(
        "training: {train_iters: 100}", "training: {train_iters: 2, checkpoint: {interval: 1, keep: null}}"
    )
    words = [
        f"run.experiment_dir={folder / 'run'}", "training.export={interval: 1, format: llama}",
        "model.distributed.seed=77", "training.logs.tensorboard=no",
    ]  # fmt: skip
    assert main(["train", str(write(folder, text)), *words]) == 0
    return folder / "run"


@pytest.fixture
def experiment(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def rewrite(experiment: Path, name: str, change) -> Path:
    """The newest checkpoint once more, with one tensor changed, whole by its manifest."""
    folder = experiment / "checkpoint" / "2"
    checkpoint = Checkpoint(folder)
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in checkpoint.tensors().items()}
    checkpoint.load_into(tensors)
    change(tensors[name])
    state, config = checkpoint.state, checkpoint.config
    shutil.rmtree(folder)
    save_checkpoint(
        folder,
        parameters={
            k.removeprefix("model."): torch.nn.Parameter(t)
            for k, t in tensors.items()
            if k.startswith("model.")
        },
        moments={k.removeprefix("optimizer."): t for k, t in tensors.items() if k.startswith("optimizer.")},
        state={key: value for key, value in state.items() if key != "format_version"},
        config=config,
    )
    return folder


def test_what_an_experiment_holds(inspect, experiment: Path) -> None:
    found = inspect(experiment)
    assert found.status == 0, found.out
    config = load_config([write(experiment, TINY)])
    assert config.architecture is not None
    parameters = config.architecture.parameter_count()
    assert f"checkpoint {experiment / 'checkpoint' / '2'}" in found.out
    for line in (
        "iteration        2 of 2",
        "layout           1 process",
        "stays            while it is among the newest (training.checkpoint.keep)",
        "tokens           512 positions, padding included",
        "optimizer steps  2, 0 skipped",
        "started from     random weights",
        "seed             77",
        "beside it        1",
        "exports          llama 1, 2",
        f"{parameters:,}",
        "every file has the size and checksum of manifest.json",
    ):
        assert line in found.out
    checkpoint = found.values["checkpoint"]
    assert (checkpoint["iteration"], checkpoint["parameters"]) == (2, parameters)
    tensors = found.values["tensors"]
    stored = Checkpoint(experiment / "checkpoint" / "2")
    assert set(tensors) == set(stored.tensors())
    # Three of each: the weight and two moments. The norm is the tensor's own.
    assert sum(math.prod(t["shape"]) for t in tensors.values()) == 3 * parameters
    weight = stored.load("layers.1.mlp.up_proj.weight")
    facts = tensors["model.layers.1.mlp.up_proj.weight"]
    assert facts["norm"] == pytest.approx(weight.double().norm().item())
    assert (facts["smallest"], facts["largest"]) == (weight.min().item(), weight.max().item())


def test_what_was_not_left_at_its_default(inspect, experiment: Path) -> None:
    out = inspect(experiment).out
    section = out[out.index("config: what is not the default") : out.index("tensors, by kind")]
    keys = {
        line.split()[0]: line.split(maxsplit=1)[1]
        for line in section.splitlines()[1:]
        if "  " in line.strip()
    }
    assert keys["training.train_iters"] == "2"
    assert keys["model.distributed.seed"] == "77"
    assert keys["training.export.format"] == '"llama"'
    assert "optimizer.beta_1" not in keys
    assert "batch.truncate_documents" not in keys


def test_by_kind_and_each(inspect, experiment: Path) -> None:
    out = inspect(experiment / "checkpoint" / "1").out
    assert "model.layers.*.mlp.up_proj.weight" in out
    assert "2 × 256 × 64" in out
    assert "model.layers.1.mlp" not in out
    out = inspect(experiment / "checkpoint" / "1", "--tensors").out
    assert "model.layers.0.mlp.up_proj.weight" in out
    assert "optimizer.norm.weight.exp_avg_sq" in out
    assert "by kind" not in out


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model.layers.0.mlp.up_proj.weight", math.nan, "has 1 of 16,384 values NaN"),
        ("optimizer.norm.weight.exp_avg", math.inf, "has 1 of 64 values infinite"),
        ("optimizer.norm.weight.exp_avg_sq", -0.25, "has negative values (down to -0.25)"),
    ],
)
def test_values_that_are_wrong(inspect, experiment: Path, name: str, value: float, said: str) -> None:
    def change(tensor: torch.Tensor) -> None:
        tensor.view(-1)[3] = value

    folder = rewrite(experiment, name, change)
    found = inspect(folder)
    assert found.status == 1
    (fault,) = found.values["faults"]
    assert fault.startswith(f"{folder}: '{name}'")
    assert said in fault
    assert inspect(folder, "--scan-limit", 0).status == 0


def test_damaged_files_are_named(inspect, experiment: Path) -> None:
    folder = experiment / "checkpoint" / "2"
    state = folder / "state.json"
    state.write_bytes(state.read_bytes().replace(b'"seed": 77', b'"seed": 78'))
    found = inspect(folder)
    assert found.status == 1
    assert f"fault: {state} differs from its checksum: this checkpoint is damaged, use another" in found.out
    state.write_text("{")
    found = inspect(folder)
    assert found.status == 1
    assert f"fault: {state} has 1 bytes" in found.out
    assert "Nothing more of it can be read." in found.out
    # Of the experiment the newest whole one is shown, and the damaged one is named.
    found = inspect(experiment)
    assert found.status == 1
    assert f"checkpoint {experiment / 'checkpoint' / '1'}" in found.out
    assert f"fault: {state} has 1 bytes" in found.out


def test_weights_cut_short(inspect, experiment: Path) -> None:
    folder = experiment / "checkpoint" / "2"
    weights = next(folder.glob("*.distcp"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = inspect(folder)
    assert found.status == 1
    assert f"fault: {weights} has" in found.out
    assert "Traceback" not in found.out


def test_an_export(inspect, experiment: Path) -> None:
    found = inspect(experiment / "export" / "llama")
    assert found.status == 0
    assert f"Hugging Face folder {experiment / 'export' / 'llama' / '2'}" in found.out
    assert "family      llama (LlamaForCausalLM)" in found.out
    assert "warning: " in found.out
    assert "has no tokenizer" in found.out
    assert found.values["tensors"]["norm.weight"]["dtype"] == "bfloat16"
    file = experiment / "export" / "llama" / "2" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, file, metadata={"format": "pt"})
    found = inspect(file.parent)
    assert found.status == 1
    assert "'norm.weight' has 1 of 64 values NaN" in found.out


def test_a_tokenizer_that_the_model_has_no_room_for(inspect, experiment: Path, tmp_path: Path) -> None:
    from modelyard.data.tokenizer_training import train_tokenizer

    folder = experiment / "export" / "llama" / "2"
    train_tokenizer((f"word{n} " * 3 for n in range(2000)), folder, vocab_size=600)
    found = inspect(folder)
    assert found.status == 1
    assert f"fault: the tokenizer in {folder} has 600 tokens, the model 512: it is another's" in found.out


def test_a_page_of_a_checkpoint(inspect, experiment: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(experiment), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<td>model.layers.*.mlp.up_proj.weight</td><td>2 × 256 × 64</td><td>float32</td>" in page


def test_fields_that_do_not_apply_are_left_out() -> None:
    shape = Architecture(100, 64, 2, 4, 2, 16, 128, rotary=Rotary("yarn", scale_factor=4.0))
    rows = dict(_architecture_rows(shape))
    assert "full attention layers" not in rows
    assert rows["rotary"] == (
        "type yarn, theta 10000.0, scale_factor 4.0, original_context_length 8,192, beta_fast 32.0, beta_slow 1.0"
    )
    windowed = replace(shape, window_size=32, full_attention_layers=1, rotary=Rotary("none"))
    rows = dict(_architecture_rows(windowed))
    assert (rows["window size"], rows["full attention layers"], rows["rotary"]) == ("32", "1", "type none")
