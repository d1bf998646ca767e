"""PEFT's folders: read without PEFT, and against PEFT itself both ways."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelyard.config.adapter import Adapter
from modelyard.config.adapter_files import stored_adapter
from modelyard.errors import UserError
from modelyard.model.adapter import adapt
from modelyard.model.decoder import Decoder
from modelyard.model.formats import open_huggingface
from modelyard.model.formats.huggingface import huggingface_name
from modelyard.model.formats.peft import open_peft, peft_name, write_peft
from modelyard.train.models_on_disk import base_fingerprint, open_model
from tests.model.adapters import ALL, KINDS, random_adapter
from tests.model.families import FAMILIES, reference_model, whole_rows

MODELS = [name for name in FAMILIES if name != "llama-2"]
IDS = torch.arange(40).view(2, 20) * 7 % 97


def saved(name: str, folder: Path) -> Any:
    """The reference model of this name, and its folder."""
    model = reference_model(name)
    model.save_pretrained(folder)
    return model


def written(base: Path, folder: Path, adapter: Adapter = ALL) -> Any:
    """A random adapter of a model, written to `folder`; the model."""
    model = open_huggingface(base)
    source = random_adapter(adapter, model.architecture, model.weights)
    write_peft(
        source,
        folder,
        adapter=adapter,
        architecture=model.architecture,
        family=model.family,
        base_path=base,
        fingerprint=base_fingerprint(base),
    )
    return model


def test_names_by_hand() -> None:
    name = "layers.11.mlp.up_proj.lora_A"
    assert peft_name(name, "llama") == "base_model.model.model.layers.11.mlp.up_proj.lora_A.weight"
    assert peft_name(name, "starcoder2") == "base_model.model.model.layers.11.mlp.c_fc.lora_A.weight"
    name = "layers.0.self_attn.o_proj.lora_magnitude"
    assert (
        peft_name(name, "qwen2") == "base_model.model.model.layers.0.self_attn.o_proj.lora_magnitude_vector"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_what_we_compute(name: str, kind: str, tmp_path: Path) -> None:
    """Our folder in PEFT's hands, on transformers' model, against our model with the adapter applied; and merged."""
    peft = pytest.importorskip("peft")
    reference = saved(name, tmp_path / "base")
    adapter = Adapter(**{**vars(ALL), **KINDS[kind]})
    model = written(tmp_path / "base", tmp_path / "adapter", adapter)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    assert theirs.peft_config["default"].use_dora == adapter.dora
    with torch.no_grad():
        logits = theirs(IDS).logits

        with torch.device("meta"):
            ours = Decoder(model.architecture)
        adapt(ours, adapter, torch.float32)
        ours.to_empty(device="cpu")
        weights = open_peft(tmp_path / "adapter", adapter, model.architecture, model.family)
        for parameter_name, parameter in ours.named_parameters():
            parameter.copy_((weights if ".lora_" in parameter_name else model.weights).load(parameter_name))
        applied = ours.logits(ours(IDS, *whole_rows(*IDS.shape)))
    torch.testing.assert_close(applied, logits, rtol=0, atol=5e-5)

    merged = theirs.merge_and_unload().state_dict()
    found = open_model(tmp_path / "adapter").weights
    for parameter_name in found.names():
        expected = merged[huggingface_name(parameter_name, model.family)]
        torch.testing.assert_close(found.load(parameter_name), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "targets", "kind"),
    [
        ("llama-3", ["q_proj", "v_proj"], {}),
        ("llama-3", ["self_attn.o_proj", "mlp.down_proj"], {"use_rslora": True}),
        ("qwen2", "all-linear", {"use_dora": True}),
        ("starcoder2", ["c_fc", "c_proj", "k_proj"], {}),
        ("starcoder2", "all-linear", {"use_dora": True}),
    ],
)
def test_what_peft_writes_is_read(name: str, targets: Any, kind: dict[str, bool], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    reference = saved(name, tmp_path / "base")
    reference.name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=targets, lora_dropout=0.1, task_type="CAUSAL_LM", **kind
    )
    theirs = peft.get_peft_model(reference, config)
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if "lora_" in parameter_name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "adapter")
    stored = stored_adapter(tmp_path / "adapter")
    assert stored is not None
    assert (stored.adapter.rank, stored.adapter.alpha, stored.adapter.dropout) == (4, 7.0, 0.1)
    assert (stored.adapter.dora, stored.adapter.rank_stabilized) == (
        kind.get("use_dora", False),
        kind.get("use_rslora", False),
    )
    merged = theirs.merge_and_unload().state_dict()
    model = open_model(tmp_path / "adapter")
    for parameter_name in model.weights.names():
        expected = merged[huggingface_name(parameter_name, model.family)]
        torch.testing.assert_close(model.weights.load(parameter_name), expected, rtol=1e-6, atol=1e-6)


def test_our_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    saved("starcoder2", tmp_path / "base")
    adapter = Adapter(rank=2, alpha=0.5, modules=("q_proj", "up_proj"), dropout=0.25, dora=True)
    model = written(tmp_path / "base", tmp_path / "adapter", adapter)
    stored = stored_adapter(tmp_path / "adapter")
    assert stored is not None
    assert stored.adapter == adapter
    assert (stored.base_path, stored.fingerprint) == (
        str(tmp_path / "base"),
        base_fingerprint(tmp_path / "base"),
    )
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["c_fc", "q_proj"]
    source = random_adapter(adapter, model.architecture, model.weights)
    weights = open_peft(tmp_path / "adapter", adapter, model.architecture, "starcoder2")
    assert set(weights.names()) == set(source.names())
    for name in source.names():
        assert torch.equal(weights.load(name), source.load(name))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    saved("llama-3", tmp_path / "base")
    model = written(tmp_path / "base", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    whole = load_file(file)
    a = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

    def said(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, file)
        with pytest.raises(UserError) as refusal:
            open_model(tmp_path / "adapter")
        return str(refusal.value)

    begin = f"{tmp_path}/adapter is no whole adapter of {tmp_path}/base: adapter_model.safetensors"
    end = "; it was cut short, or is that of another base"
    assert said({k: v for k, v in whole.items() if k != a}) == (
        f"{begin} lacks 'layers.1.self_attn.q_proj.lora_A'{end}"
    )
    assert said(whole | {"base_model.model.lm_head.weight": torch.zeros(2)}) == (
        f"{begin} has weights that the architecture has no place for: 'base_model.model.lm_head.weight'{end}"
    )
    assert said(whole | {a: torch.zeros(4, 32)}) == (
        f"{begin}: 'layers.1.self_attn.q_proj.lora_A' has shape [4, 32], the architecture wants [3, 32]{end}"
    )
    assert said(whole | {a: torch.zeros(3, 32, dtype=torch.int8)}) == f"{file}: '{a}' is int8, no real number"
    file.unlink()
    (tmp_path / "adapter/adapter_model.bin").touch()
    with pytest.raises(UserError, match=r"pickled \.bin file, which can run code when read"):
        open_peft(tmp_path / "adapter", ALL, model.architecture, "llama")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    saved("llama-3", tmp_path / "base")
    written(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(UserError, match="exists already"):
        written(tmp_path / "base", tmp_path / "adapter")
