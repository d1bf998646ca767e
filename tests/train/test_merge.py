"""`modelyard merge`: what it writes, how it finds out that this is right, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modelyard.cli import main
from modelyard.config.adapter import Quantization
from modelyard.errors import RunFailed
from modelyard.model.formats import open_huggingface
from modelyard.model.formats.merged import DequantizedWeights, MergedWeights
from modelyard.train import merge as merging
from modelyard.train.merge import BOUNDS, Comparison, _verdict, compare
from modelyard.train.models_on_disk import open_model
from tests.model.adapters import ALL, InMemory, random_adapter
from tests.model.families import reference_model
from tests.train.test_models_on_disk import make_adapters

QUANTISED = dataclasses.replace(ALL, quantization=Quantization(16))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat_tokenizers: dict[str, Path]) -> Path:
    """`base`, with a tokenizer; `peft`, an adapter of it, `peft-q` one that was trained on it quantised."""
    monkeypatch.chdir(tmp_path)
    reference_model("llama-3", vocab_size=290).save_pretrained("base")
    for file in chat_tokenizers["llama3"].iterdir():
        Path("base", file.name).write_bytes(file.read_bytes())
    make_adapters(ALL)
    make_adapters(QUANTISED, "-q")
    return tmp_path


@pytest.mark.usefixtures("project")
def test_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """transformers computes from it what it computes from the base with PEFT's formula in every matrix."""
    transformers = pytest.importorskip("transformers")
    assert main(["merge", "peft", "--to", "merged"]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("compared on 4")  # 256 random ones, and the text in single bytes
    assert "merged in float32 differ by at most" in first
    assert second.endswith("the likeliest token is the same after 100.0%")
    assert last == f"wrote merged (peft merged into {Path('base').resolve()})"

    adapter = load_file("peft/adapter_model.safetensors")
    reference = transformers.AutoModelForCausalLM.from_pretrained("base")
    state = reference.state_dict()
    for name in [name for name in adapter if name.endswith("lora_A.weight")]:
        matrix = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        state[f"{matrix}.weight"] += ALL.scale * b @ a
    found = transformers.AutoModelForCausalLM.from_pretrained("merged").state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    assert Path("merged/tokenizer.json").read_bytes() == Path("base/tokenizer.json").read_bytes()
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == "float32"


@pytest.mark.usefixtures("project")
def test_types(capsys: pytest.CaptureFixture[str]) -> None:
    """The base's own, unless another is asked for; rounded once."""
    assert main(["convert", "base", "narrow", "--dtype", "bf16"]) == 0
    Path("peft/modelyard_adapter.json").unlink()  # for narrow is another base
    assert main(["merge", "peft", "--to", "merged", "--base", "narrow"]) == 0
    base = open_huggingface(Path("narrow"))
    exact = MergedWeights(base.weights, random_adapter(ALL, base.architecture, InMemory({})), ALL)
    written = open_huggingface(Path("merged"))
    for name in written.weights.names():
        assert written.weights.dtype(name) == torch.bfloat16
        assert torch.equal(written.weights.load(name), exact.load(name).bfloat16())
    assert "as written in bfloat16: " in capsys.readouterr().out
    assert main(["merge", "peft", "--to", "wide", "--base", "narrow", "--dtype", "fp32"]) == 0
    name = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(open_huggingface(Path("wide")).weights.load(name), exact.load(name))


@pytest.mark.usefixtures("project")
def test_onto_what_a_quantised_adapter_is_merged(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for path in ("peft-q", "run-q"):
        assert main(["merge", path, "--to", "merged"]) == 2
        command = f"modelyard merge {path} --to merged --onto"
        assert capsys.readouterr().err == (
            f"error: {path} was trained on a quantised base: write `{command} original` to merge it into the base's own "
            f"weights, or `{command} dequantized` for those that it was trained with\n"
        )
        assert main(["convert", path, "merged"]) == 2
        assert capsys.readouterr().err.startswith(
            f"error: {path} was trained on a quantised base; write `modelyard merge {path} --to merged --onto original`"
        )
    assert main(["merge", "peft", "--to", "merged", "--onto", "dequantized"]) == 2
    assert "trained on a base that was not quantised; leave --onto out" in capsys.readouterr().err
    assert not Path("merged").exists()

    assert main(["merge", "peft-q", "--to", "original", "--onto", "original"]) == 0
    assert main(["merge", "run-q", "--to", "dequantized", "--onto", "dequantized"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("base, quantised and made numbers again)")
    base = open_huggingface(Path("base"))
    values = random_adapter(QUANTISED, base.architecture, base.weights)
    known = DequantizedWeights(base.weights, Quantization(16), base.architecture)
    name = "layers.0.mlp.gate_proj.weight"
    for onto, below in (("original", base.weights), ("dequantized", known)):
        expected = MergedWeights(below, values, QUANTISED).load(name)
        assert torch.equal(open_huggingface(Path(onto)).weights.load(name), expected)


@pytest.mark.usefixtures("project")
def test_what_is_no_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    for words, line in (
        (
            ["base", "--to", "merged"],
            "base is no adapter but a whole model: there is nothing to merge (`modelyard convert` writes it in another form)",
        ),
        (["peft", "--to", "base"], "base exists already; choose another folder or remove it"),
        (
            ["peft", "--to", "merged", "--base", "peft-q"],
            f"peft was trained on other weights ({Path('base').resolve()}), fingerprint ",
        ),
        (
            ["peft", "--to", "merged", "--format", "starcoder2"],
            "format starcoder2 has layer_norm, the model rms_norm",
        ),
    ):
        capsys.readouterr()
        assert main(["merge", *words]) == 2
        assert capsys.readouterr().err.startswith(f"error: {line}")
        assert not Path("merged").exists()
    assert not Path("merged.tmp").exists()


def test_nothing_is_written_where_logits_differ(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that is lost for one matrix is found, and so is a file that reads back otherwise."""
    load = MergedWeights.load
    capsys.readouterr()

    def forgetful(self: MergedWeights, name: str) -> torch.Tensor:
        forgotten = name == "layers.1.self_attn.v_proj.weight"
        return self.base.load(name) if forgotten else load(self, name)

    monkeypatch.setattr(MergedWeights, "load", forgetful)
    assert main(["merge", "peft", "--to", "merged"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the model merged in float32 is not base and adapter: on 4")
    assert err.endswith("0.0001 of that is allowed; merged is not written\n")
    monkeypatch.setattr(MergedWeights, "load", load)

    def damaged(folder: Path) -> object:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        return open_huggingface(folder)

    monkeypatch.setattr(merging, "open_huggingface", damaged)
    assert main(["merge", "peft", "--to", "merged"]) == 1
    assert "reads back otherwise than it was written; is the disk sound?" in capsys.readouterr().err
    assert sorted(path.name for path in project.iterdir()) == ["base", "peft", "peft-q", "run", "run-q"]


@pytest.mark.usefixtures("project")
def test_the_comparison_is_of_the_logits_of_transformers() -> None:
    """Block by block, documents by themselves: the same largest logits and differences as of whole models."""
    transformers = pytest.importorskip("transformers")
    model = open_model(Path("peft"))
    adapted = model.adapted
    assert adapted is not None
    assert main(["merge", "peft", "--to", "merged"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained("merged")
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    documents = [[5, 99, 200, 7], [5, 1, 280]]
    with torch.no_grad():
        after = torch.cat([merged(torch.tensor([ids])).logits[0] for ids in documents])
        before = torch.cat([base(torch.tensor([ids])).logits[0] for ids in documents])
    # What is written is here the base: the adapter's whole effect is then the difference.
    found = compare(
        model.architecture, adapted.base, ALL, adapted.weights, adapted.base, adapted.base, documents
    )
    assert found.tokens == 7
    assert found.largest == pytest.approx(float(after.abs().max()), rel=1e-4)
    assert found.effect == pytest.approx(float((after - before).abs().max()), rel=1e-4)
    assert found.merged == found.written == found.effect
    assert found.agreement == float((after.argmax(-1) == before.argmax(-1)).double().mean())


def test_verdicts() -> None:
    good = Comparison(tokens=100, largest=10.0, effect=2.0, merged=5e-4, written=5e-4, agreement=1.0)
    assert len(_verdict(good, torch.float32, Path("to"))) == 2
    for dtype, bound in ((torch.float32, 1e-4), (torch.float16, 0.03), (torch.bfloat16, 0.2)):
        assert BOUNDS[dtype] == bound
        just = dataclasses.replace(good, written=bound * 9.99)
        assert _verdict(just, dtype, Path("to"))
        for written in (bound * 10.01, float("nan")):
            with pytest.raises(
                RunFailed, match=r"on 100 tokens logits differ by up to .*; to is not written"
            ):
                _verdict(dataclasses.replace(good, written=written), dtype, Path("to"))
        with pytest.raises(RunFailed, match=r"^the model merged in float32 is not base and adapter"):
            _verdict(dataclasses.replace(good, merged=2e-3), dtype, Path("to"))
    lost = dataclasses.replace(good, written=0.6)
    assert _verdict(lost, torch.bfloat16, Path("to"))[-1].startswith(
        "warning: rounding to bfloat16 makes a difference"
    )


@pytest.mark.usefixtures("project")
def test_what_generates_with_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter on its base, wherever that is, says what the merged model says; the base alone says something else."""
    assert main(["merge", "peft", "--to", "merged"]) == 0
    words = ["--prompt", "the ship", "--temperature", "0", "--max-new-tokens", "12", "--json"]

    def said(*model: str) -> list[int]:
        capsys.readouterr()
        assert main(["generate", *model, *words]) == 0
        ids: list[int] = json.loads(capsys.readouterr().out)["token_ids"]
        return ids

    merged = said("merged")
    assert said("peft") == said("run") == merged
    assert said("base") != merged
    Path("base").rename("moved")
    assert said("run", "--base", "moved") == merged
    assert main(["generate", "run", *words]) == 2
    assert capsys.readouterr().err.endswith("which is no folder here; give the base with --base DIR\n")
