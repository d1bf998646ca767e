"""What adapter_config.json may say, and what a config takes from an adapter that it goes on with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.config.adapter import MODULES, Adapter, Quantization, adapter_to_dict
from modelyard.config.adapter_files import base_file, peft_config, stored_adapter
from modelyard.config.disk import export_bytes
from modelyard.config.loader import load_config
from modelyard.config.peft import PeftConfig, adapter_of
from modelyard.config.pretrained import read_shape
from modelyard.errors import UserError
from modelyard.plan.summary import summarise

# As PEFT 0.21 writes it.
CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "models/base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["v_proj", "q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
ADAPTER = Adapter(rank=8, alpha=16.0, modules=("q_proj", "v_proj"), dropout=0.05)


def folder(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "adapter"
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    return path


def read(tmp_path: Path, **changes: Any) -> Adapter:
    stored = stored_adapter(folder(tmp_path, **changes))
    assert stored is not None
    return stored.adapter


def test_what_peft_writes(tmp_path: Path) -> None:
    stored = stored_adapter(folder(tmp_path))
    assert stored is not None
    assert stored.adapter == ADAPTER
    assert (stored.base_path, stored.fingerprint, stored.is_peft) == ("models/base", None, True)
    assert read(tmp_path, sine_share=0.0, sine_config=None, sine=False, sines=[]) == ADAPTER
    assert read(tmp_path, use_rslora=True, use_dora=True, lora_alpha=0.5) == Adapter(
        8, 0.5, ("q_proj", "v_proj"), 0.05, rank_stabilized=True, dora=True
    )


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        ("all-linear", MODULES),
        (["mlp.down_proj", "self_attn.k_proj"], ("k_proj", "down_proj")),
        (["c_proj", "c_fc", "o_proj"], ("o_proj", "up_proj", "down_proj")),
        ([f"model.layers.{n}.mlp.up_proj" for n in (2, 0, 1)], ("up_proj",)),
    ],
)
def test_target_modules(targets: Any, modules: tuple[str, ...], tmp_path: Path) -> None:
    assert read(tmp_path, target_modules=targets).modules == modules


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported (only 'LORA')"),
        ({"bias": "all"}, "bias 'all' is not supported (only 'none'): it trains the base's biases too"),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save ['lm_head'] is not supported: it has whole modules beside the adapter; merge it with PEFT "
            "(merge_and_unload)",
        ),
        (
            {"rank_pattern": {"q_proj": 4}},
            "rank_pattern {'q_proj': 4} is not supported: every adapter has one rank here",
        ),
        (
            {"alpha_pattern": {"a": 4}},
            "alpha_pattern {'a': 4} is not supported: every adapter has one alpha here",
        ),
        (
            {"layers_to_transform": [1]},
            "layers_to_transform [1] is not supported: every block is adapted here",
        ),
        (
            {"fan_in_fan_out": True},
            "fan_in_fan_out True is not supported: it is for transposed matrices, which no family that is read here has",
        ),
        (
            {"use_bdlora": {"nblocks": 2}},
            "use_bdlora {'nblocks': 2} is not supported: its matrices have blocks",
        ),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights 'pissa' is not supported: it changed the base's weights; convert it with PEFT (save_pretrained "
            "with path_initial_model_for_weight_conversion)",
        ),
        ({"r": 0}, "r should be a whole number above 0, not 0"),
        ({"r": True}, "r should be a whole number above 0, not True"),
        ({"lora_alpha": float("nan")}, "lora_alpha should be a number above 0, not nan"),
        ({"lora_dropout": 1}, "lora_dropout should be a number from 0 to below 1, not 1"),
        (
            {"target_modules": ".*_proj"},
            "target_modules '.*_proj' is a pattern; name the modules in a list (of q_proj, k_proj, v_proj, o_proj, gate_proj, "
            "up_proj, down_proj)",
        ),
        (
            {"target_modules": ["q_proj", "lm_head", "embed_tokens", "mlp.q_proj"]},
            "target_modules names ['lm_head', 'embed_tokens', 'mlp.q_proj']: only matrices that every block has are adapted "
            "(q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj)",
        ),
        (
            {"target_modules": ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]},
            "target_modules names up_proj of some layers alone; every block is adapted here",
        ),
        ({"target_modules": []}, "target_modules should be a list of modules' names, not []"),
        ({"layers_to_transform": 0}, "layers_to_transform 0 is not supported: every block is adapted here"),
        ({"sine_lora": 2}, "sine_lora 2 is not known here, nor what it does to the model"),
        ({"sine_layer": 0}, "sine_layer 0 is not known here, nor what it does to the model"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = folder(tmp_path, **changes)
    with pytest.raises(UserError) as refusal:
        stored_adapter(path)
    assert refusal.value.problems == [f"{path}/adapter_config.json: {problem}"]


def test_files_that_are_no_json(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json is not valid JSON: Expecting"):
        stored_adapter(path)
    folder(tmp_path)
    (path / "modelyard_adapter.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match=r"modelyard_adapter.json has format 2; this version reads 1"):
        stored_adapter(path)
    (path / "modelyard_adapter.json").write_text('{"format_version": 1, "base": {}}')
    with pytest.raises(
        UserError, match=r"modelyard_adapter.json cannot be read \(KeyError\('quantization'\)\)"
    ):
        stored_adapter(path)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    adapter = Adapter(4, 6.0, ("k_proj", "down_proj"), 0.1, True, True, quantization=Quantization(32, True))
    path = folder(tmp_path)
    (path / "adapter_config.json").write_text(json.dumps(peft_config(adapter, ["k_proj", "c_proj"], "/base")))
    (path / "modelyard_adapter.json").write_text(json.dumps(base_file(adapter, "/base", "abc")))
    stored = stored_adapter(path)
    assert stored is not None
    assert stored.adapter == adapter
    assert (stored.base_path, stored.fingerprint) == ("/base", "abc")


def test_a_checkpoint_says_it_too(tmp_path: Path) -> None:
    assert stored_adapter(tmp_path) is None
    state = {"adapter": adapter_to_dict(ADAPTER), "base": {"path": "/base", "fingerprint": "abc"}}
    (tmp_path / "state.json").write_text(json.dumps(state))
    stored = stored_adapter(tmp_path)
    assert stored is not None
    assert (stored.adapter, stored.base_path, stored.fingerprint) == (ADAPTER, "/base", "abc")
    (tmp_path / "state.json").write_text('{"adapter": null}')
    assert stored_adapter(tmp_path) is None
    (tmp_path / "state.json").write_text('{"adapter": {"rank": 2}}')
    with pytest.raises(UserError, match=r"state.json does not describe an adapter that can be read"):
        stored_adapter(tmp_path)


# --- pretrained.adapter -----------------------------------------------------------------------------------------

BASE = """\
{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
 "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}"""
TRAIN = """\
training: {train_iters: 2}
batch: {sequence_length: 16, batch_size: 2}
data: {datasets: {training: {type: random}}}
pretrained: {path: base, adapter: adapter}
run: {experiment_dir: run}
"""
PEFT = "model.base_model.transformer.peft"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path)
    Path("base").mkdir()
    Path("base/config.json").write_text(BASE)
    Path("base/model.safetensors").touch()
    Path("train.yaml").write_text(TRAIN)
    return tmp_path


def configured(*overrides: str) -> Adapter | None:
    return adapter_of(load_config(["train.yaml"], overrides).train.model.base_model.transformer.peft)


def test_peft_is_as_the_adapter_says(project: Path) -> None:
    assert configured() == ADAPTER
    assert configured(f"{PEFT}.dropout=0.2", f"{PEFT}.rank=8", f"{PEFT}.layers=[value, query]") == Adapter(
        8, 16.0, ("q_proj", "v_proj"), 0.2
    )
    assert configured(f"{PEFT}.type=none") is None
    folder(project, target_modules="all-linear", use_dora=True)
    assert configured(f"{PEFT}.layers=[all]") == Adapter(8, 16.0, MODULES, 0.05, dora=True)


@pytest.mark.usefixtures("project")
def test_another_rank_than_the_adapter_has() -> None:
    with pytest.raises(UserError) as refusal:
        configured(f"{PEFT}.rank=4", f"{PEFT}.layers=[query]")
    assert refusal.value.problems == [
        f"override 1: {PEFT}.rank is another than that of pretrained.adapter adapter (8); leave it out",
        f"override 2: {PEFT}.layers is another than that of pretrained.adapter adapter (query, value); leave it out",
    ]


def quantised(path: Path, how: Quantization | None) -> None:
    """Have the adapter say how its base was kept, as folders from here do."""
    values = base_file(Adapter(8, 16.0, ("q_proj",), quantization=how), "base", "abc")
    (path / "adapter" / "modelyard_adapter.json").write_text(json.dumps(values))


def test_another_quantization_than_the_adapter_was_trained_with(project: Path) -> None:
    """It would be another model. PEFT's own folders do not say."""
    nf4 = [f"{PEFT}.quantization=nf4", f"{PEFT}.quantization_block=32"]
    assert configured(*nf4) == dataclasses.replace(ADAPTER, quantization=Quantization(32))

    def refused(*overrides: str) -> list[str]:
        with pytest.raises(UserError) as refusal:
            configured(*overrides)
        return [line.partition(f"{PEFT}.")[2] for line in refusal.value.problems]

    said = "pretrained.adapter adapter was trained with another; write"
    quantised(project, None)
    assert configured() == ADAPTER
    assert refused(*nf4) == [f"quantization: {said} quantization: none"]
    quantised(project, Quantization(16))
    assert configured() == dataclasses.replace(ADAPTER, quantization=Quantization(16))
    assert configured(f"{PEFT}.quantization_block=16") == configured()
    assert refused(f"{PEFT}.quantization=none") == [f"quantization: {said} quantization: nf4"]
    assert refused(*nf4) == [f"quantization_block: {said} quantization_block: 16"]
    assert f"double_quantization: {said} double_quantization: no" in refused(
        f"{PEFT}.double_quantization=yes"
    )


def test_adapters_of_a_quantised_base_that_are_merged(project: Path) -> None:
    """What they are merged into is said, and nothing of them is left in the config."""
    quantised(project, Quantization(16))
    loaded = load_config(["train.yaml"], [f"{PEFT}.type=none"])
    assert loaded.remarks == [
        "train.yaml:4: pretrained.adapter: adapter is merged into what it was trained on, its base quantised and "
        "made numbers again (into the base as it is: modelyard merge --onto original)"
    ]
    assert loaded.train.model.base_model.transformer.peft == PeftConfig()
    assert loaded.without_effect == []
    export = ("training.export.interval=1", "training.export.format=llama")
    assert load_config(["train.yaml"], export).remarks == [
        "override 2: training.export.format llama: the adapter is merged into what it is trained on, the base quantised and made "
        "numbers again (into the base as it is: format peft, then modelyard merge --onto original)"
    ]
    assert load_config(["train.yaml"], [*export, "training.export.format=peft"]).remarks == []
    folder(project, target_modules=["gate_proj"])
    assert configured(f"{PEFT}.type=none") is None  # no word of peft.layers is needed
    (project / "adapter/modelyard_adapter.json").unlink()
    for words in ((f"{PEFT}.type=none",), (f"{PEFT}.layers=[mlp_1]",)):
        folder(project, target_modules=["gate_proj", "up_proj"])
        assert load_config(["train.yaml"], [*words, *export]).remarks == []


def test_a_checkpoint_on_a_quantised_base_is_started_from(project: Path) -> None:
    checkpoint = project / "run/checkpoint/5"
    checkpoint.mkdir(parents=True)
    adapter = dataclasses.replace(ADAPTER, quantization=Quantization(16))
    architecture = dataclasses.asdict(read_shape(Path("base"))[0])
    state = {"adapter": adapter_to_dict(adapter), "base": {}, "architecture": architecture}
    (checkpoint / "state.json").write_text(json.dumps(state))
    for name in (".metadata", "__0_0.distcp"):
        (checkpoint / name).touch()
    started = ["pretrained={path: run/checkpoint/5}"]
    (line,) = load_config(["train.yaml"], [*started, "pretrained.adapter=null"]).remarks
    assert line.endswith(
        "pretrained.path: run/checkpoint/5 is merged into what it was trained on, its base quantised and made numbers again (into "
        "the base as it is: modelyard merge --onto original)"
    )
    shape = [*started, "pretrained.adapter=null", "pretrained.model_weights=no"]
    assert load_config(["train.yaml"], shape).remarks == []
    # The folder around it is that of a run.
    with pytest.raises(
        UserError,
        match=r"pretrained.adapter: run is the folder of a run; name one of its checkpoints: run/checkpoint/5$",
    ):
        configured("pretrained.adapter=run")


def test_adapters_that_cannot_be_gone_on_with(project: Path) -> None:
    with pytest.raises(
        UserError, match=r"override 1: pretrained.adapter: base holds no adapter: neither adapter_con"
    ):
        configured("pretrained.adapter=base")
    folder(project, target_modules=["gate_proj"])
    with pytest.raises(
        UserError, match=r"adapter adapts one of gate_proj and up_proj without the other, for which"
    ):
        configured()
    folder(project, bias="all")
    with pytest.raises(
        UserError, match=r"pretrained.adapter: adapter/adapter_config.json: bias 'all' is not supp"
    ):
        configured()
    with pytest.raises(
        UserError, match=r"adapter is an adapter; write it as pretrained.adapter, and the model that"
    ):
        read_shape(Path("adapter"))
    with pytest.raises(
        UserError,
        match=r"adapter: adapter adapts weights that are not read; write pretrained.model_weights: yes$",
    ):
        configured("pretrained.model_weights=no")
    Path("export/peft").mkdir(parents=True)
    folder(project).rename("export/peft/7")
    for name, what in ((".", "a run"), ("export/peft", "exports")):
        with pytest.raises(
            UserError, match=rf"the folder of {what}; name one of its adapters: export/peft/7$"
        ):
            configured(f"pretrained.adapter={name}")
    loaded = load_config(["train.yaml"], ["pretrained.adapter=gone", f"{PEFT}.type=lora"])
    assert loaded.warnings == [
        "override 1: pretrained.adapter: gone does not exist (there is no 'gone' in the working directory)"
    ]


@pytest.mark.usefixtures("project")
def test_exports_of_adapters() -> None:
    export = "training.export={interval: 1, format: peft}"
    loaded = load_config(["train.yaml"], [export])
    assert loaded.train.training.export.format == "peft"
    assert loaded.architecture is not None
    # In each of two blocks 8 x 32 + 32 x 8 numbers of the query, 8 x 32 + 16 x 8 of the value, in four bytes.
    assert export_bytes(loaded.train, loaded.architecture) == 4 * 2 * (512 + 384)
    narrow = load_config(["train.yaml"], [export, "training.export.data_type=bf16"])
    assert export_bytes(narrow.train, loaded.architecture) == 2 * 2 * (512 + 384)
    merged = load_config(["train.yaml"], [export, "training.export.format=llama"])
    assert export_bytes(merged.train, loaded.architecture) == 2 * loaded.architecture.parameter_count()
    assert "export format  peft: can hold the adapter" in summarise(loaded)[0]
    problem = "override 1: training.export.format: format peft"
    with pytest.raises(UserError) as refusal:
        load_config(["train.yaml"], [export, f"{PEFT}.type=none"])
    assert (
        str(refusal.value)
        == f"{problem} holds adapters, and every weight is trained; write the model's family, as llama"
    )
    with pytest.raises(UserError) as refusal:
        load_config(["train.yaml"], [export, f"{PEFT}.freeze_others=no"])
    assert str(refusal.value) == (
        f"{problem} has no place for the base, which is trained too (freeze_others: no); write the model's family, as llama"
    )
