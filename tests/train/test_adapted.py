"""Adapters on disk compute what the run computes that trained them, in every type and layout."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelyard.cli import main
from modelyard.config.adapter import block_matrices
from modelyard.errors import UserError
from modelyard.generate.command import load_model
from modelyard.generate.text import Generator, SamplingOptions
from modelyard.model.adapter import AdaptedLinear
from modelyard.model.decoder import Decoder
from modelyard.model.formats import export_huggingface, load_decoder
from modelyard.model.init import DrawnWeights, InitStd
from modelyard.train.evaluate import evaluate
from modelyard.train.models_on_disk import open_model
from modelyard.train.run import train
from tests.generate.chat_models import VOCABULARY, write_tokenizer
from tests.parallel.processes import run_distributed
from tests.train.helpers import lines, loaded, new_run
from tests.train.test_adapters import CONFIG, DORA, DROPOUT, PEFT, QLORA, SHAPE

pytestmark = pytest.mark.usefixtures("base")

BF16 = "model.distributed.training_dtype=bf16"
WORDS = dataclasses.replace(SHAPE, vocab_size=VOCABULARY)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`base`, a model with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    # A small rate: updates that are lost where they are added to matrices in bf16.
    Path("train.yaml").write_text(CONFIG.replace("base: 0.05", "base: 0.002"))
    weights = DrawnWeights(WORDS, InitStd.for_architecture(WORDS), 1, torch.device("cpu"))
    export_huggingface(weights, Path("base"), architecture=WORDS, family="llama", dtype=torch.float32)
    write_tokenizer(Path("base"))


def trained(*overrides: str) -> None:
    assert train(loaded(*overrides), force=False) == 0


def evaluated(capsys: pytest.CaptureFixture[str], *overrides: str, **named: Path) -> float:
    capsys.readouterr()
    assert evaluate(loaded(*overrides), **({"checkpoint": None} | named), as_json=True) == 0
    loss: float = json.loads(capsys.readouterr().out)["loss"]
    return loss


def said(folder: str = "run") -> float:
    """The loss of the run's own last evaluation."""
    return [line["loss"] for line in lines(f"{folder}/metrics.jsonl") if "evaluator" in line][-1]


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    ids = torch.randint(VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(3))
    hidden = model(ids, torch.arange(16)[None], torch.tensor([[0, 16]], dtype=torch.int32))
    return model.logits(hidden[0])


@pytest.mark.parametrize(
    "kind",
    [(), (QLORA,), (QLORA, DORA), (DROPOUT,), (f"{PEFT}.freeze_others=no",)],
    ids=["lora", "nf4", "nf4 dora", "dropout", "all trained"],
)
def test_a_bf16_evaluation_is_that_of_the_run(
    kind: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    trained(BF16, *kind)
    assert evaluated(capsys, BF16, *kind) == pytest.approx(said(), rel=1e-6)


def test_an_adapter_of_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on the merged model, and evaluated on the adapter that was merged into it."""
    trained(BF16, QLORA)
    assert main(["merge", "run", "--to", "merged", "--onto", "dequantized", "--dtype", "float32"]) == 0
    export = "training.export={format: peft, interval: 6, data_type: float32}"
    second = (BF16, "pretrained.path=merged", "run.experiment_dir=second", export)
    trained(*second)
    assert said("second") != said()
    place = Path("second/export/peft/6")
    (place / "modelyard_adapter.json").unlink()  # the bases are two folders
    assert evaluated(capsys, *second, checkpoint=place, base=Path("run")) == pytest.approx(
        said("second"), rel=1e-6
    )


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        (("model.multi_stage.zero_stage=3", QLORA, DORA), "checkpoint"),
        (("model.distributed={tensor_parallel: 2, training_dtype: bf16}",), "export/peft"),
    ],
    ids=["ZeRO 3", "tensor"],
)
def test_in_several_processes_with_a_base_that_moved(
    layout: tuple[str, ...], form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train.yaml", BF16, "training.export={format: peft, interval: 6, data_type: float32}", *layout]
    assert run_distributed(main, 2, ["train", *words]) == [0, 0]
    Path("base").rename("moved")
    capfd.readouterr()
    named = ["--checkpoint", f"run/{form}/6", "--base", "moved", "--json"]
    moved = "pretrained.path=moved"
    assert run_distributed(main, 2, ["evaluate", *words, moved, *named]) == [0, 0]
    assert json.loads(capfd.readouterr().out)["loss"] == pytest.approx(said(), rel=1e-6)


@pytest.mark.parametrize(
    "kind",
    [(), (QLORA,), (QLORA, DORA), (f"{PEFT}.freeze_others=no",)],
    ids=["lora", "nf4", "nf4 dora", "all trained"],
)
def test_what_generates_is_the_model_that_was_trained(
    kind: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are the live run's, to the bit; a quantized base is quantized; lengths of rows were found once."""
    trained(BF16, *kind)
    decoder, folder = load_model(Path("run"), tokenizer=Path("base"), dtype="bfloat16", base=None)
    assert folder == Path("base")
    decoder.rotary_dtype = None  # as in training
    expected = logits(new_run(BF16, *kind).parallel.models[0])
    monkeypatch.setattr(AdaptedLinear, "_lengths", None)
    assert torch.equal(logits(decoder), expected)
    whole = {f"{matrix}.weight" for matrix in block_matrices(WORDS)}
    names = {name for name, _ in decoder.named_parameters()}
    assert (whole & names) == (set() if QLORA in kind else whole)
    packed = sum(p.nbytes for name, p in decoder.named_parameters() if "weight_" in name)
    bits = 4 + 32 / 16 if QLORA in kind else 0  # a scale for each 16
    assert packed == sum(rows * width for rows, width in block_matrices(WORDS).values()) * bits / 8


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_text_is_that_of_the_run(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the type of the base, fp32, without a word on types."""
    trained(QLORA)
    options = SamplingOptions(max_new_tokens=12, temperature=0)
    model = new_run(QLORA).parallel.models[0]
    prompt = "the ship"
    if verb == "chat":
        prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        words = ["--message", "the ship", "--family", "chatml", "--json", "--system", ""]
    else:
        words = ["--prompt", prompt, "--json"]
    expected = Generator(model, Path("base")).complete(prompt, options).token_ids
    for place in ("run", "run/checkpoint/6"):
        capsys.readouterr()
        assert main([verb, place, *words, "--max-new-tokens", "12", "--temperature", "0"]) == 0
        assert json.loads(capsys.readouterr().out)["token_ids"] == expected
    decoder, _ = load_model(Path("run"), tokenizer=None, dtype=None, base=None)
    assert decoder.output_weight.dtype == torch.float32


def test_what_cannot_be_packed_is_made_numbers_again() -> None:
    """Two scales of eight bits are no number of fp32: the values are the same, held as they are computed with."""
    trained(QLORA, "training.export={format: peft, interval: 6, data_type: float32}")
    place = Path("run/export/peft/6")
    beside = place / "modelyard_adapter.json"
    values = json.loads(beside.read_text())
    beside.write_text(json.dumps(values | {"quantization": {"block": 16, "double": True}}))
    decoder, _ = load_model(place, tokenizer=None, dtype=None, base=None)
    assert "layers.0.mlp.up_proj.weight" in dict(decoder.named_parameters())
    decoder.rotary_dtype = None
    merged = open_model(place)
    expected = load_decoder(merged.weights, WORDS, where="")
    torch.testing.assert_close(logits(decoder), logits(expected), rtol=0, atol=1e-5)
    assert float((logits(decoder) - logits(load_model(Path("run"), tokenizer=None, dtype=None, base=None)[0])).abs().max()) > 1e-4  # fmt: skip


def test_an_adapter_that_is_not_finite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    trained("training.export={format: peft, interval: 6, data_type: float32}")
    file = Path("run/export/peft/6/adapter_model.safetensors")
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 1] = torch.nan
    save_file(tensors, file)
    wrong = re.escape(
        "the adapter's 'layers.1.mlp.up_proj.lora_B' has 1 of 256 values that are NaN or infinite"
    )
    with pytest.raises(UserError, match=wrong):
        load_model(file.parent, tokenizer=None, dtype=None, base=None)
    with pytest.raises(UserError, match=wrong):
        evaluated(capsys, checkpoint=file.parent)
