from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from modelyard.errors import UserError
from modelyard.model.decoder import Decoder
from modelyard.model.formats import export_huggingface, load_decoder, open_huggingface
from tests.model.families import FAMILIES, in_dtype, named_weights, ours, reference_model, whole_rows


def round_trip(source: Path, destination: Path, **options: Any) -> None:
    opened = open_huggingface(source)
    export_huggingface(
        opened.weights,
        destination,
        architecture=opened.architecture,
        family=opened.family,
        reference_folder=source,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_equal(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = in_dtype(reference_model(family), dtype)
    reference.save_pretrained(tmp_path / "theirs")
    round_trip(tmp_path / "theirs", tmp_path / "ours", dtype=None)

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor)

    configs = [AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "ours")]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[1] == configs[0]
    generation = [
        json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("theirs", "ours")
    ]
    assert generation[1] == generation[0]

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, reference(ids).logits)


def test_default_is_bf16_rounded_to_nearest(tmp_path: Path) -> None:
    reference = reference_model("llama-3")
    reference.save_pretrained(tmp_path / "theirs")
    round_trip(tmp_path / "theirs", tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(after[name], tensor.bfloat16())
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_shards_are_as_small_as_asked(tmp_path: Path) -> None:
    reference = reference_model("qwen2")
    reference.save_pretrained(tmp_path / "theirs")
    round_trip(tmp_path / "theirs", tmp_path / "ours", dtype=None, max_shard_bytes=12_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        tensors = load_file(tmp_path / "ours" / shard)
        assert sum(t.nbytes for t in tensors.values()) <= 12_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == shard for name in tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in reference.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), reference.parameters(), strict=True))
    # and we read shards, theirs and ours
    again = load_decoder(
        open_huggingface(tmp_path / "ours").weights, ours(reference).architecture, where="it"
    )
    assert all(torch.equal(p, named_weights(reference)[name]) for name, p in again.named_parameters())


def test_a_tied_head_that_was_stored_is_not_needed(tmp_path: Path) -> None:
    reference = reference_model("smollm2-tied")
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    opened = open_huggingface(tmp_path)
    model = load_decoder(opened.weights, opened.architecture, where=str(tmp_path))
    ids = torch.arange(9)[None]
    expected = reference(ids).logits
    torch.testing.assert_close(model.logits(model(ids, *whole_rows(1, 9))), expected, atol=1e-4, rtol=1e-4)


def test_weights_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    reference_model("llama-2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        open_huggingface(tmp_path)
    assert caught.value.problems == [
        f"{tmp_path} lacks 'norm.weight'",
        f"{tmp_path} has weights that the architecture has no place for: 'layers.0.self_attn.q_proj.bias'",
        f"{tmp_path}: 'layers.0.mlp.up_proj.weight' has shape [3, 4], the architecture wants [48, 32]",
    ]


def test_long_lists_are_cut(tmp_path: Path) -> None:
    reference_model("qwen2", num_hidden_layers=12).save_pretrained(tmp_path)
    tensors = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "bias" not in n}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 'layers\.0\.self_attn\.q_proj\.bias', .* and 28 more$"):
        open_huggingface(tmp_path)


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    reference_model("llama-2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match="git-lfs pointer"):
        open_huggingface(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="has no weights: neither"):
        open_huggingface(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pickled \.bin"):
        open_huggingface(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(UserError, match=r"model-00001-of-00001\.safetensors does not exist"):
        open_huggingface(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        open_huggingface(tmp_path)


class Memory:
    """A model's parameters as a source of weights."""

    def __init__(self, model: Decoder):
        self.tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def load(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class Failing(Memory):
    """The last tensor cannot be read."""

    def load(self, name: str) -> torch.Tensor:
        if name == self.names()[-1]:
            raise OSError("no space left")
        return super().load(name)


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    model = ours(reference_model("llama-2"))
    with pytest.raises(UserError, match="no space left"):
        export_huggingface(Failing(model), tmp_path / "out", architecture=model.architecture, family="llama")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    reference_model("llama-2").save_pretrained(tmp_path / "theirs")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        round_trip(tmp_path / "theirs", tmp_path / "out")


def test_a_family_that_cannot_hold_the_shape_is_refused(tmp_path: Path) -> None:
    model = ours(reference_model("qwen2"))
    with pytest.raises(UserError, match="format llama has biases on all of the attention or on none"):
        export_huggingface(Memory(model), tmp_path / "out", architecture=model.architecture, family="llama")
    assert not (tmp_path / "out").exists()


def test_special_tokens_come_from_the_tokenizer_where_nothing_else_says(tmp_path: Path) -> None:
    model = ours(reference_model("llama-2"))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    vocabulary = {"a": 0, "<s>": 5, "</s>": 9}
    (tokenizer / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<pad>", "id": 11}]})
    )
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(special))
    (tokenizer / "LICENSE").write_text("free")
    (tokenizer / "model.safetensors").write_text("not the tokenizer's")
    export_huggingface(
        Memory(model),
        tmp_path / "out",
        architecture=model.architecture,
        family="llama",
        tokenizer_folder=tokenizer,
        sequence_length=64,
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (5, 9, 11)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 5, "eos_token_id": 9, "pad_token_id": 11}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_real_weights_and_their_tokenizer_survive(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "weights" / "stories260K" / "hf"
    round_trip(folder, tmp_path / "ours", dtype=None)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (folder / name).read_bytes()
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    assert all(torch.equal(before[name], after[name]) for name in before | after)
