"""The newest dialect, key by key: what it is today, whose defaults hold, what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelyard.config.architecture import Architecture
from modelyard.config.document import dotted
from modelyard.config.loader import load_config
from modelyard.config.newest import RULES, To
from modelyard.config.presets import PRESETS
from modelyard.plan.summary import summarise
from tests.config.helpers import TINY
from tests.config.newest import (
    BASE,
    BLOCK,
    LLAMA,
    QWEN_BY_LAYER,
    QWEN_BY_THE_OUTPUT,
    RUN,
    SMALL,
    load_small,
    load_texts,
    problems_of_texts,
    small_problems,
)


@pytest.mark.parametrize(
    ("text", "preset", "parameters"),
    [
        (LLAMA, "llama-3.1-8b", 8_030_261_248),
        (QWEN_BY_THE_OUTPUT, "qwen-2.5-7b", 7_615_616_512),
        (QWEN_BY_LAYER, "qwen-2.5-7b", 7_615_616_512),
    ],
)
def test_the_guides_architectures(text: str, preset: str, parameters: int) -> None:
    architecture = load_texts(RUN, text).architecture
    assert architecture is not None
    assert architecture.parameter_count() == parameters
    expected = PRESETS[preset]
    # What the model is said to support is no part of that dialect's architecture.
    assert architecture == Architecture(
        **{**vars(expected), "max_position_embeddings": architecture.max_position_embeddings}
    )


def test_with_a_training_file_of_the_older_dialect(shared: Path) -> None:
    """The dialect is decided part by part: the model is of the newest, the batch of the older one."""
    folder = shared / "configs"
    llama = folder.joinpath("llama-3.1-8b-train.yaml").read_text()
    loaded = load_texts(llama, LLAMA)
    old = load_config([folder / f"llama-3.1-8b-{part}.yaml" for part in ("train", "architecture-part")])
    assert loaded.architecture == old.architecture
    assert loaded.train.batch == old.train.batch
    assert loaded.train.batch.cross_document_attention
    assert [notice for notice in loaded.notices if "defaults hold" in notice] == [
        "b:3: model.base_model.hidden_size is the newest dialect (Fast-LLM >= 0.3); where nothing is written its defaults "
        "hold, not today's: model.base_model.transformer.init_method_std_attn_proj: 0.015625, "
        "model.base_model.transformer.init_method_std_mlp_2: 0.015625"
    ]


def test_its_defaults() -> None:
    """Tied embeddings, head size, feed-forward size, initial weights, isolated documents: none as in the older dialect."""
    loaded = load_small()
    shape, transformer = loaded.architecture, loaded.train.model.base_model.transformer
    assert shape is not None
    assert (shape.tie_word_embeddings, shape.head_size, shape.ffn_hidden_size) == (False, 128, 4096)
    assert transformer.init_method_std_attn_proj == transformer.init_method_std_mlp_2 == 0.125  # 64 ** -0.5
    assert not loaded.train.batch.cross_document_attention
    assert loaded.train.batch.use_loss_masking_spans == "auto"
    assert loaded.notices[-2:] == [
        "a:6: model.base_model.hidden_size is the newest dialect (Fast-LLM >= 0.3); where nothing is written its defaults "
        "hold, not today's: model.base_model.tie_word_embeddings: no, model.base_model.transformer.kv_channels: 128, "
        "model.base_model.transformer.ffn_hidden_size: 4096, model.base_model.transformer.init_method_std_attn_proj: 0.125, "
        "model.base_model.transformer.init_method_std_mlp_2: 0.125",
        "a:2: data.micro_batch_size is the newest dialect (Fast-LLM >= 0.3); where nothing is written its defaults hold, "
        "not today's: batch.cross_document_attention: no, batch.use_loss_masking_spans: auto",
    ]
    text, problems, _ = summarise(loaded)
    assert problems == []
    assert "kv_channels: 128" in text


def test_the_older_dialects_defaults_are_as_they_were() -> None:
    shape = load_texts(TINY).architecture
    assert shape is not None
    assert (shape.tie_word_embeddings, shape.head_size, shape.ffn_hidden_size) == (True, 16, 256)


def test_what_is_written_wins_over_its_defaults() -> None:
    loaded = load_small(
        f"{BASE}tied_embedding_weight=yes",
        f"{BLOCK}mixer.head_size=32",
        f"{BASE}transformer.ffn_hidden_size=96",
        "batch.cross_document_attention=yes",
    )
    shape = loaded.architecture
    assert shape is not None
    assert (shape.tie_word_embeddings, shape.head_size, shape.ffn_hidden_size) == (True, 32, 96)
    assert loaded.train.batch.cross_document_attention


def test_a_preset_has_no_defaults_of_the_dialect() -> None:
    text = "training: {train_iters: 1}\nbatch: {batch_size: 1}\ndata: {datasets: {training: {type: random}}}\nrun: {experiment_dir: x}\n"
    loaded = load_texts(text + "model: {preset: qwen-2.5-0.5b}\n", overrides=(f"{BASE}decoder.num_blocks=2",))
    assert loaded.architecture is not None
    assert loaded.architecture.num_layers == 2
    assert loaded.architecture.head_size == 64
    assert loaded.architecture.tie_word_embeddings
    assert loaded.train.model.base_model.transformer.init_method_std_attn_proj is None


VALUES = {
    "hidden_size": 32,
    "peft": {"type": "none"},
    "rotary": {"type": "llama3", "theta": 5},
    "recompute_level": "full",
    "routing": "aux_loss",
    "activation": "silu",
    "loss_implementation": "torch",
    "cross_entropy_implementation": "torch",
}


@pytest.mark.parametrize("key", [key for key, rule in RULES.items() if isinstance(rule, To)], ids=dotted)
def test_renamed_keys(key: tuple[str, ...]) -> None:
    """Each key of the table arrives where the table says, with a note, in a file and as an override."""
    from modelyard.config.reading import merge_documents
    from modelyard.config.yaml import parse_override

    rule = RULES[key]
    assert isinstance(rule, To)
    value = VALUES.get(key[-1], 3)
    reading = merge_documents([parse_override(f"{dotted(key)}={value}", 1)])
    assert reading.document.get(rule.target) == value
    assert reading.notices[0] == f"override 1: {dotted(key)} is now {dotted(rule.target)}"
    assert not reading.document.has(key)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("model.distributed.compute_dtype=bf16", "bfloat16"),
        ("data.seed=3", 3),
        ("data.shuffle=full", "full"),
        ("data.truncate_documents=no", False),
    ],
)
def test_renamed_keys_elsewhere(override: str, found: object) -> None:
    config = load_small(override).train
    sampling = config.data.sampling
    assert found in (
        config.model.distributed.training_dtype,
        sampling.seed,
        sampling.shuffle,
        config.batch.truncate_documents,
    )


def test_keys_of_the_weeks_around_0_3() -> None:
    text = SMALL.replace("embeddings:", "embeddings_layer:").replace(
        "head: {", "output_layer: {tied_weight: no, "
    )
    loaded = load_texts(text)
    assert loaded.architecture == load_small().architecture
    assert "a:7: model.base_model.embeddings_layer is now model.base_model.embeddings" in loaded.notices
    (problem,) = problems_of_texts(text.replace("tied_weight: no, ", ""))
    assert problem == (
        "a:14: model.base_model.output_layer is a spelling of a few weeks in which the default of tied_weight changed; write "
        "model.base_model.tied_embedding_weight: yes or no"
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (f"{BLOCK}mixer.hed_size=3", f"unknown key 'hed_size' in {BLOCK}mixer; did you mean 'head_size'?"),
        (f"{BLOCK}mixr.heads=3", "unknown key 'mixr' in model.base_model.decoder.block; did you mean 'mixer'?"),
        (f"{BASE}decodr.num_blocks=3", "unknown key 'decodr' in model.base_model; did you mean 'decoder'?"),
        (f"{BASE}decoder.num_block=3", f"unknown key 'num_block' in {BASE}decoder; did you mean 'num_blocks'?"),
        (
            f"{BASE}embeddings.vocabsize=3",
            "unknown key 'vocabsize' in model.base_model.embeddings; did you mean 'vocab_size'?",
        ),
        (
            f"{BASE}head.normalization.epsilo=3",
            f"unknown key 'epsilo' in {BASE}head.normalization; did you mean 'epsilon'?",
        ),
        (
            f"{BLOCK}mixer.rotary.thta=3",
            f"unknown key 'thta' in {BASE}transformer.rotary; did you mean 'theta'? (written as {BLOCK}mixer.rotary)",
        ),
        (
            f"{BLOCK}mixer.dense_layer.bias.enable=no",
            f"unknown key 'enable' in {BLOCK}mixer.dense_layer.bias; did you mean 'enabled'?",
        ),
        ("data.microbatch_size=4", "unknown key 'microbatch_size' in data; did you mean 'micro_batch_size'?"),
        (
            "model.distributed.compute_dtyp=bf16",
            "unknown key 'compute_dtyp' in model.distributed; did you mean 'compute_dtype'?",
        ),
        (
            f"{BLOCK}mixer.kv_channels=3",
            f"unknown key 'kv_channels' in {BLOCK}mixer; beside these keys it is called {BLOCK}mixer.head_size",
        ),
        (
            f"{BLOCK}mixer.intermediate_size=3",
            f"unknown key 'intermediate_size' in {BLOCK}mixer; it belongs to {BLOCK}mlp.intermediate_size",
        ),
        (
            f"{BASE}embeddings.position_embeddings=yes",
            f"{BASE}embeddings.position_embeddings = yes: expected a section with enabled, initialization, lr_scale",
        ),
        (
            f"{BLOCK}mixer.heads=abc",
            f"{BASE}transformer.num_attention_heads = 'abc': expected a whole number (written as {BLOCK}mixer.heads)",
        ),
        (f"{BLOCK}mlp.type=moe", f"{BLOCK}mlp.type = 'moe': mixtures of experts are not supported; write type: mlp"),
        (
            f"{BLOCK}mlp.experts=8",
            f"{BASE}transformer.num_experts = 8: mixtures of experts are not supported; write num_experts: 1 "
            f"(written as {BLOCK}mlp.experts)",
        ),
        (f"{BLOCK}mixer.type=mamba", f"{BLOCK}mixer.type = 'mamba': only mixers of type attention are supported"),
        (f"{BLOCK}mixer.causal=no", f"{BLOCK}mixer.causal = no: attention is causal here"),
        (f"{BLOCK}dropout=0.1", f"{BLOCK}dropout = 0.1: dropout is not supported; write dropout: 0"),
        (
            f"{BLOCK}lr_scale=0.5",
            f"{BLOCK}lr_scale = 0.5: only embeddings, mixer, mlp and head.output_weight have an lr_scale of their own here; "
            "leave it out",
        ),
        (
            f"{BLOCK}mlp.layer_1.apply_peft=yes",
            f"{BLOCK}mlp.layer_1.apply_peft = yes: which matrices have an adapter is said once: leave it out, and write "
            "base_model.peft.layers",
        ),
        (
            f"{BASE}peft={{type: lora}}",
            f"{BASE}transformer.peft.type: there is nothing to adapt: the base would be random and stay so; give "
            f"pretrained.path, or write freeze_others: no (written as {BASE}peft.type)",
        ),
        (
            "model.distributed.use_cuda=no",
            "model.distributed.use_cuda = no: a GPU is used where there is one; CUDA_VISIBLE_DEVICES= in front of the "
            "command hides it",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(override: str, problem: str) -> None:
    assert small_problems(override) == [f"override 1: {problem}"]


@pytest.mark.parametrize(
    "override",
    [
        f"{BLOCK}type=decoder",
        f"{BLOCK}mixer.type=attention",
        f"{BLOCK}mixer.implementation=sdpa",
        f"{BLOCK}mlp.type=mlp",
        f"{BLOCK}mlp.layer_2.lr_scale=1.0",
        f"{BLOCK}normalization.implementation=triton",
        f"{BLOCK}dropout=0",
        f"{BASE}decoder.type=fixed",
        f"{BASE}head.output_weight.initialization={{type: default}}",
        "schedule.micro_batch_splits=1",
    ],
)
def test_what_says_nothing_is_left_out_with_a_note(override: str) -> None:
    loaded, plain = load_small(override), load_small()
    assert loaded.config == plain.config
    (notice,) = [notice for notice in loaded.notices if notice not in plain.notices]
    assert notice.startswith(f"override 1: {override.partition('=')[0]}")
    assert notice.endswith("is left out: it is so in any case")


def test_keys_without_effect_are_told() -> None:
    loaded = load_small("model.distributed.reproducible_init=yes", "run.model_debug_level=0")
    assert [row.key for row in loaded.without_effect] == [
        "model.distributed.reproducible_init",
        "run.model_debug_level",
    ]


def test_overrides_in_either_spelling_on_either_file() -> None:
    """The later wins, whatever it is called."""
    newer = load_small(
        f"{BASE}decoder.num_blocks=3", f"{BASE}transformer.num_layers=5", f"{BLOCK}mixer.heads=8"
    )
    assert newer.architecture is not None
    assert (newer.architecture.num_layers, newer.architecture.num_attention_heads) == (5, 8)
    older = load_texts(TINY, overrides=(f"{BASE}decoder.num_blocks=3",))
    assert older.architecture is not None
    assert (older.architecture.num_layers, older.architecture.head_size) == (3, 16)
    assert older.notices == [
        "override 1: model.base_model.decoder.num_blocks is now model.base_model.transformer.num_layers"
    ]


def test_a_model_in_two_dialects_is_refused() -> None:
    assert problems_of_texts(TINY, "model: {base_model: {decoder: {num_blocks: 3}}}\n") == [
        "b:1: model.base_model.decoder is the newest dialect (Fast-LLM >= 0.3), model.base_model.vocab_size (a:6) is not, and "
        "their defaults differ; write both in one spelling"
    ]


def test_both_spellings_of_a_key_in_one_file() -> None:
    text = SMALL.replace(
        "    hidden_size: 64\n", "    hidden_size: 64\n    transformer: {use_flash_attention: yes}\n"
    )
    text = text.replace("mixer: {", "mixer: {use_flash_attention: no, ")
    assert problems_of_texts(text) == [
        f"a:13: {BLOCK}mixer.use_flash_attention is an older spelling of {BASE}transformer.use_flash_attention, which is also "
        "given (a:7); keep one"
    ]


def test_without_rotary_positions_nothing_is_guessed() -> None:
    text = SMALL.replace(", rotary: {type: default}", "")
    assert problems_of_texts(text) == [
        "a:6: model.base_model.hidden_size is the newest dialect (Fast-LLM >= 0.3), and the model has no rotary positions; "
        "write decoder.block.mixer.rotary: {type: default}, or embeddings.position_embeddings.enabled: yes or no"
    ]
    loaded = load_texts(text, overrides=(f"{BASE}embeddings.position_embeddings.enabled=no",))
    assert loaded.train.model.base_model.use_position_embeddings is False


def test_empty_sections() -> None:
    assert (
        load_small(f"{BLOCK}mixer.query_layer=null", f"{BASE}decoder.block.mlp.layer_1={{}}").notices
        == load_small().notices
    )
