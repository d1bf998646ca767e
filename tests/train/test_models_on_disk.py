"""Adapters and what they adapt, found and put together."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelyard.cli import main
from modelyard.config.adapter import Adapter, Quantization
from modelyard.config.architecture import Architecture
from modelyard.errors import UserError
from modelyard.model.formats import WeightSource, open_huggingface
from modelyard.model.formats.merged import DequantizedWeights, MergedWeights
from modelyard.model.formats.peft import write_peft
from modelyard.train.checkpoint import Checkpoint, save_checkpoint
from modelyard.train.models_on_disk import base_fingerprint, first_adapter, open_model
from tests.model.adapters import ALL, InMemory, adapter_checkpoint, random_adapter
from tests.model.families import reference_model


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`base`, a Hugging Face folder; `peft` and `run/checkpoint/4`, the same adapter of it."""
    monkeypatch.chdir(tmp_path)
    reference_model("qwen2").save_pretrained("base")
    make_adapters(ALL)
    return tmp_path


def make_adapters(adapter: Adapter, suffix: str = "") -> InMemory:
    base = open_huggingface(Path("base"))
    values = random_adapter(adapter, base.architecture, base.weights)
    write_peft(
        values,
        Path(f"peft{suffix}"),
        adapter=adapter,
        architecture=base.architecture,
        family=base.family,
        base_path=Path("base").resolve(),
        fingerprint=base_fingerprint(Path("base")),
    )
    folder = Path(f"run{suffix}/checkpoint/4")
    adapter_checkpoint(folder, adapter, base.architecture, values.tensors, Path("base"))
    return values


def shape_and_weights() -> tuple[Architecture, WeightSource]:
    base = open_huggingface(Path("base"))
    return base.architecture, base.weights


@pytest.mark.usefixtures("project")
def test_every_form_of_an_adapter_is_the_merged_model() -> None:
    base = open_huggingface(Path("base"))
    expected = MergedWeights(base.weights, random_adapter(ALL, base.architecture, base.weights), ALL)
    for path, folder in (
        ("peft", "peft"),
        ("run", "run/checkpoint/4"),
        ("run/checkpoint/4", "run/checkpoint/4"),
    ):
        model = open_model(Path(path))
        assert model.folder == Path(folder)
        assert (model.family, model.is_huggingface) == ("qwen2", True)
        assert model.adapted is not None
        assert model.adapted.adapter == ALL
        for name in base.weights.names():
            assert torch.equal(model.weights.load(name), expected.load(name))
    assert open_model(Path("run")).checkpoint is not None
    assert open_model(Path("peft")).checkpoint is None


@pytest.mark.usefixtures("project")
def test_a_quantised_base_is_quantised_again() -> None:
    adapter = dataclasses.replace(ALL, quantization=Quantization(16))
    values = make_adapters(adapter, "-q")
    base = open_huggingface(Path("base"))
    known = DequantizedWeights(base.weights, Quantization(16), base.architecture)
    expected = MergedWeights(known, values, adapter)
    name = "layers.1.mlp.down_proj.weight"
    for path in ("peft-q", "run-q"):
        assert torch.equal(open_model(Path(path)).weights.load(name), expected.load(name))
    assert not torch.equal(expected.load(name), open_model(Path("peft")).weights.load(name))


@pytest.mark.usefixtures("project")
def test_a_base_that_was_trained_too_lies_in_the_checkpoint() -> None:
    base = open_huggingface(Path("base"))
    adapter = dataclasses.replace(ALL, freeze_others=False)
    values = random_adapter(adapter, base.architecture, base.weights)
    tensors = {name: base.weights.load(name) * 2 for name in base.weights.names()} | values.tensors
    adapter_checkpoint(Path("both/checkpoint/1"), adapter, base.architecture, tensors, None)
    model = open_model(Path("both"))
    name = "layers.0.self_attn.q_proj.weight"
    expected = MergedWeights(InMemory({name: tensors[name]}), values, adapter)
    assert torch.equal(model.weights.load(name), expected.load(name))
    assert set(model.weights.names()) == set(base.weights.names())
    with pytest.raises(
        UserError, match=r"--base base: both/checkpoint/1 is a whole model and adapts no other"
    ):
        open_model(Path("both"), base=Path("base"))


def test_where_the_base_is_looked_for(project: Path) -> None:
    config = Path("peft/adapter_config.json")
    Path("peft/modelyard_adapter.json").unlink()

    def naming(name: str | None) -> Path:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
        return Path("peft")

    for name in ("base", "../base", str(project / "base")):
        found = open_model(naming(name)).adapted
        assert found is not None
        assert found.base_path is not None
        assert found.base_path.resolve() == project / "base"
    path = naming("meta-llama/Llama-3.1-8B")
    with pytest.raises(UserError) as refusal:
        open_model(path)
    assert str(refusal.value) == (
        "peft adapts 'meta-llama/Llama-3.1-8B', which is no folder here; give the base with --base DIR"
    )
    assert open_model(path, base=Path("base")).architecture.vocab_size == 97
    with pytest.raises(
        UserError, match=r"^base bass does not exist \(there is no 'bass' in the working directory; nea"
    ):
        open_model(path, base=Path("bass"))
    with pytest.raises(UserError, match=r"^peft does not say what it adapts; give that with --base DIR$"):
        open_model(naming(None))
    for name in ("../peft", str(project / "peft")):
        with pytest.raises(UserError, match=r"^peft names itself as its base"):
            open_model(naming(name))


@pytest.mark.usefixtures("project")
def test_an_adapter_of_an_adapter() -> None:
    """Its base is the merged model."""
    below = open_model(Path("peft"))
    values = random_adapter(ALL, below.architecture, below.weights)
    adapter_checkpoint(Path("second/checkpoint/1"), ALL, below.architecture, values.tensors, Path("peft"))
    name = "layers.1.self_attn.v_proj.weight"
    expected = MergedWeights(below.weights, values, ALL).load(name)
    assert torch.equal(open_model(Path("second")).weights.load(name), expected)


@pytest.mark.usefixtures("project")
def test_adapters_that_adapt_each_other() -> None:
    for one, other in (("peft", "second"), ("second", "peft")):
        if one == "second":
            shutil.copytree("peft", one)
        Path(one, "modelyard_adapter.json").unlink(missing_ok=True)
        config = json.loads(Path(one, "adapter_config.json").read_text())
        Path(one, "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": other}))
    with pytest.raises(
        UserError,
        match=r"^second names peft, which adapts second in turn, as its base; give the model that it",
    ):
        open_model(Path("peft"))


@pytest.mark.usefixtures("project")
def test_the_fingerprint_of_a_merged_base_is_made_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what lies on the disk: what a product of matrices gives differs from one processor to the next."""
    adapter = dataclasses.replace(ALL, quantization=Quantization(16))
    make_adapters(adapter, "-q")

    def multiplied(self: object, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was computed")

    with monkeypatch.context() as patch:
        patch.setattr(MergedWeights, "load", multiplied)
        patch.setattr(DequantizedWeights, "load", multiplied)
        base, plain, quantised = (base_fingerprint(Path(name)) for name in ("base", "peft", "peft-q"))
    assert base_fingerprint(Path("run")) == plain  # the same values in another form
    assert len({base, plain, quantised}) == 3
    below, above = open_huggingface(Path("base")), random_adapter(ALL, *shape_and_weights())
    before = base_fingerprint(MergedWeights(below.weights, above, ALL))
    assert before == plain
    stronger = dataclasses.replace(ALL, alpha=6.0)
    assert base_fingerprint(MergedWeights(below.weights, above, stronger)) != before
    assert (
        base_fingerprint(MergedWeights(below.weights, above, dataclasses.replace(ALL, dora=True))) != before
    )
    above.tensors["layers.1.mlp.up_proj.lora_B"][0, 0] += 1
    assert base_fingerprint(MergedWeights(below.weights, above, ALL)) != before
    wider = DequantizedWeights(below.weights, Quantization(32), below.architecture)
    narrow = DequantizedWeights(below.weights, Quantization(16), below.architecture)
    assert base_fingerprint(wider) != base_fingerprint(narrow)


@pytest.mark.usefixtures("project")
def test_another_base_is_refused() -> None:
    """Of the same shape, by its weights; of another, by its shape."""
    reference_model("qwen2").save_pretrained("other")
    tensors = load_file("other/model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, "other/model.safetensors")
    mine, theirs = base_fingerprint(Path("base")), base_fingerprint(Path("other"))
    for path, folder in (("peft", "peft"), ("run", "run/checkpoint/4")):
        with pytest.raises(UserError) as refusal:
            open_model(Path(path), base=Path("other"))
        assert str(refusal.value) == (
            f"{folder} was trained on other weights ({Path('base').resolve()}), fingerprint {mine[:12]}, than those in other, "
            f"{theirs[:12]}; give its own base with --base DIR"
        )
    reference_model("qwen2", hidden_size=48, intermediate_size=64).save_pretrained("wide")
    Path("peft/modelyard_adapter.json").unlink()
    with pytest.raises(UserError) as refusal:
        open_model(Path("peft"), base=Path("wide"))
    assert str(refusal.value) == (
        "peft is no whole adapter of wide: adapter_model.safetensors: 'layers.0.self_attn.q_proj.lora_A' has shape [3, 32], the "
        "architecture wants [3, 48] (and more such); it was cut short, or is that of another base"
    )
    with pytest.raises(
        UserError, match=r"run/checkpoint/4 is an adapter of a model of another shape than wide"
    ):
        open_model(Path("run"), base=Path("wide"))


@pytest.mark.usefixtures("project")
def test_the_base_is_gone() -> None:
    Path("base").rename("elsewhere")
    with pytest.raises(
        UserError, match=r"^run/checkpoint/4 adapts '/.*/base', which is no folder here; give the base wit"
    ):
        open_model(Path("run"))
    assert open_model(Path("run"), base=Path("elsewhere")).folder == Path("run/checkpoint/4")
    with pytest.raises(
        UserError, match=r"^--base elsewhere: elsewhere is a whole model and adapts no other; leave --base"
    ):
        open_model(Path("elsewhere"), base=Path("elsewhere"))
    Path("elsewhere/adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"^elsewhere has both a model and an adapter \(adapter_config.json\); put the"
    ):
        open_model(Path("elsewhere"))


@pytest.mark.usefixtures("project")
def test_fingerprints_are_of_values() -> None:
    """Not of types, files or forms; of the first 16,384 values of every tensor."""
    mine = base_fingerprint(Path("base"))
    model = open_huggingface(Path("base"))
    parameters = {name: model.weights.load(name) for name in model.weights.names()}
    state = {"progress": {"iteration": 1}, "architecture": dataclasses.asdict(model.architecture)}
    config = {"training": {"export": {"format": None}}}
    save_checkpoint(Path("ckpt/1"), parameters=parameters, moments={}, state=state, config=config)
    assert base_fingerprint(Path("ckpt/1")) == mine
    assert base_fingerprint(InMemory({n: t.double() for n, t in parameters.items()})) == mine
    assert base_fingerprint(InMemory({n: t.bfloat16() for n, t in parameters.items()})) != mine
    for at, same in ((0, False), (16_383, False), (16_384, True)):
        long = {"a": torch.zeros(20_000)}
        before = base_fingerprint(InMemory(long))
        long["a"][at] = 1.0
        assert (base_fingerprint(InMemory(long)) == before) == same
    assert base_fingerprint(InMemory({"a": torch.zeros(2, 3)})) != base_fingerprint(
        InMemory({"a": torch.zeros(3, 2)})
    )


@pytest.mark.usefixtures("project")
def test_going_on_with_an_adapter() -> None:
    model = open_huggingface(Path("base"))
    expected = random_adapter(ALL, model.architecture, model.weights)
    dropping = dataclasses.replace(ALL, dropout=0.5)
    for path in ("peft", "run/checkpoint/4"):
        weights = first_adapter(Path(path), dropping, Path("base"))
        assert all(torch.equal(weights.load(name), expected.load(name)) for name in expected.names())
    for wrong, line in (
        ({"rank": 4}, "pretrained.adapter: peft has rank 3, the config 4"),
        ({"dora": True}, "pretrained.adapter: peft has dora False, the config True"),
        ({"modules": ("q_proj",)}, "pretrained.adapter: peft has modules ('q_proj', 'k_proj', 'v_proj', "),
    ):
        with pytest.raises(UserError) as refusal:
            first_adapter(Path("peft"), dataclasses.replace(ALL, **wrong), Path("base"))
        assert str(refusal.value).startswith(line)
    nf4 = dataclasses.replace(ALL, quantization=Quantization(16))
    make_adapters(nf4, "-q")
    for path, wanted, keys in (
        ("peft-q", ALL, "quantization: nf4, quantization_block: 16, double_quantization: no"),
        ("run-q/checkpoint/4", dataclasses.replace(nf4, quantization=Quantization(32)),
         "quantization: nf4, quantization_block: 16, double_quantization: no"),
        ("peft", nf4, "quantization: none"),
    ):  # fmt: skip
        with pytest.raises(UserError) as refusal:
            first_adapter(Path(path), wanted, Path("base"))
        assert str(refusal.value) == (
            f"pretrained.adapter: {path} was trained on a base that was kept in another way; write {keys}"
        )
    assert first_adapter(Path("peft-q"), nf4, Path("base")).names()
    Path("peft/modelyard_adapter.json").rename("kept.json")
    assert first_adapter(Path("peft"), nf4, Path("base")).names()  # PEFT does not say how its base was kept
    Path("kept.json").rename("peft/modelyard_adapter.json")
    reference_model("qwen2", vocab_size=101).save_pretrained("other")
    with pytest.raises(UserError, match=r"^peft was trained on other weights"):
        first_adapter(Path("peft"), ALL, Path("other"))
    with pytest.raises(UserError, match=r"^pretrained.adapter: base holds no adapter"):
        first_adapter(Path("base"), ALL, Path("base"))
    with pytest.raises(
        UserError, match=r"adapter: run is the folder of a run; name one of its checkpoints: run/c"
    ):
        first_adapter(Path("run"), ALL, Path("base"))


@pytest.mark.usefixtures("project")
def test_adapters_are_averaged_as_whole_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["average", "peft", "run", "--to", "mean"]) == 0
    assert capsys.readouterr().out.startswith("wrote mean (")
    make_adapters(dataclasses.replace(ALL, quantization=Quantization(16)), "-q")
    assert main(["average", "peft", "run-q", "--to", "both"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "note: run-q/checkpoint/4 is averaged as it was trained: merged into its base quantised and made numbers again (into the "
        "base as it is: modelyard merge --onto original)"
    )
    mean, one = Checkpoint(Path("mean")), open_model(Path("peft"))
    for name in one.weights.names():
        assert torch.equal(mean.load(name), one.weights.load(name))
    origins = mean.state["averaged"]
    assert [origin["base"] for origin in origins] == [str(Path("base").resolve())] * 2
    assert list(origins[0]["sha256"]) == ["adapter_config.json", "adapter_model.safetensors"]
    capsys.readouterr()
    assert main(["inspect", "mean"]) == 0
    assert "adapter" in capsys.readouterr().out
