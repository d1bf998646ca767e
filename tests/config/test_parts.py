"""What several keys of the newest dialect decide together."""

from __future__ import annotations

from itertools import product

import pytest

from tests.config.newest import BASE, BLOCK, SMALL, load_small, load_texts, problems_of_texts, small_problems

# Blocks without a word about biases: the general keys hold, and they say yes.
SILENT = SMALL.replace(", add_linear_biases: no", "")


@pytest.mark.parametrize("where", product((False, True), repeat=3))
def test_every_choice_of_biases(where: tuple[bool, bool, bool]) -> None:
    qkv, output, mlp = ("yes" if bias else "no" for bias in where)
    overrides = [f"{BLOCK}mixer.{name}_layer.bias.enabled={qkv}" for name in ("query", "key", "value")]
    overrides += [f"{BLOCK}mixer.dense_layer.bias.enabled={output}", f"{BLOCK}mlp.add_linear_biases={mlp}"]
    shape = load_texts(SILENT, overrides=tuple(overrides)).architecture
    assert shape is not None
    assert (shape.qkv_bias, shape.output_bias, shape.mlp_bias) == where


def test_biases_are_everywhere_where_nothing_is_said() -> None:
    shape = load_texts(SILENT).architecture
    assert shape is not None
    assert (shape.qkv_bias, shape.output_bias, shape.mlp_bias) == (True, True, True)


def test_a_layers_own_word_wins_over_the_general_one() -> None:
    loaded = load_small(f"{BLOCK}mixer.add_linear_biases=yes", f"{BLOCK}mixer.dense_layer.bias.enabled=no")
    assert loaded.train.model.base_model.transformer.add_linear_biases == "only_attn_qkv"
    assert [notice for notice in loaded.notices if "biases" in notice or "bias." in notice] == [
        f"override 1: {BLOCK}mixer.add_linear_biases is now {BASE}transformer.add_linear_biases: only_attn_qkv",
        f"override 2: {BLOCK}mixer.dense_layer.bias.enabled is now {BASE}transformer.add_linear_biases: only_attn_qkv",
        f"a:13: {BLOCK}mlp.add_linear_biases is now {BASE}transformer.add_linear_biases: only_attn_qkv",
    ]


def test_one_switch_over_todays_word() -> None:
    """An override changes what it names and nothing else."""
    loaded = load_small(f"{BASE}transformer.add_linear_biases=everywhere", f"{BLOCK}mlp.add_linear_biases=no")
    assert loaded.train.model.base_model.transformer.add_linear_biases == "only_attn"


def test_biases_that_have_no_word() -> None:
    assert small_problems(f"{BLOCK}mixer.query_layer.bias.enabled=yes") == [
        "override 1: query_layer, key_layer, value_layer have a bias all or none here; write bias.enabled for each of them"
    ]
    for value in ("3", "0"):
        assert small_problems(f"{BLOCK}mlp.layer_2.bias.enabled={value}") == [
            f"override 1: {BLOCK}mlp.layer_2.bias.enabled = {value}: expected yes or no"
        ]


def test_blocks_and_head_have_one_normalization() -> None:
    (problem,) = small_problems(f"{BLOCK}normalization.epsilon=1e-6")
    assert problem == (
        f"override 1: {BLOCK}normalization.epsilon = 1e-06, but {BASE}head.normalization.epsilon = 1e-05 (not given, the "
        "default); blocks and head have one normalization here: write the same in both"
    )
    loaded = load_small(f"{BLOCK}normalization.epsilon=1e-6", f"{BASE}head.normalization.epsilon=1e-06")
    assert loaded.architecture is not None
    assert loaded.architecture.norm_epsilon == 1e-6
    (problem,) = problems_of_texts(
        SMALL.replace("head: {normalization: {type: rms_norm}}", "head: {lr_scale: 1}")
    )
    assert problem == (
        f"a:11: {BLOCK}normalization.type = 'rms_norm', but {BASE}head.normalization.type = 'layer_norm' (not given, the "
        "default); blocks and head have one normalization here: write the same in both"
    )


@pytest.mark.parametrize(
    ("layer", "name"),
    [("mixer.dense_layer", "attn_proj"), ("mlp.layer_1", "mlp_1"), ("mlp.layer_2", "mlp_2")],
)
def test_initial_weights(layer: str, name: str) -> None:
    key = f"{BLOCK}{layer}.weight.initialization"
    transformer = load_small(
        f"{key}={{type: normal, std: 0.01, max: 0.03, min: -0.03}}"
    ).train.model.base_model.transformer
    found = [getattr(transformer, f"init_method_{bound}_{name}") for bound in ("std", "min", "max")]
    assert found == [0.01, -0.03, 0.03]


def test_initial_weights_of_several_layers() -> None:
    keys = [f"{BLOCK}mixer.{name}_layer.weight.initialization.std" for name in ("query", "key", "value")]
    config = load_small(*(f"{key}=0.01" for key in keys)).train
    assert config.model.base_model.transformer.init_method_std_qkv == 0.01
    (problem,) = small_problems(f"{keys[0]}=0.01")
    assert problem.startswith(
        f"override 1: these begin alike here ({keys[0].removesuffix('.std')}: std 0.01, "
    )
    # The embedding and the output layer begin alike here, unless they are one.
    embedding = f"{BASE}embeddings.word_embeddings.initialization={{type: normal, std: 0.5}}"
    assert "these begin alike here" in small_problems(embedding)[0]
    for other in (f"{BASE}head.output_weight.initialization.std=0.5", f"{BASE}tied_embedding_weight=yes"):
        assert load_small(embedding, other).train.model.base_model.init_method_std_embed == 0.5


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{type: uniform}", "initial weights are normal here; write {type: normal, std: NUMBER}"),
        ("{type: normal}", "write its std, a number above 0"),
        ("{type: normal, sdt: 1}", "unknown key 'sdt'; did you mean 'std'?"),
        ("{type: normal, std: 1, mean: 2}", "initial weights have mean 0 here"),
        ("{type: normal, std: big}", "std, min and max are numbers"),
        ("{type: default, std: 1}", "'std' belongs to type: normal"),
        ("3", "expected {type: normal, std: NUMBER}"),
    ],
)
def test_initial_weights_that_are_not_understood(value: str, problem: str) -> None:
    (line,) = small_problems(f"{BLOCK}mlp.layer_2.weight.initialization={value}")
    assert line.startswith(f"override 1: {BLOCK}mlp.layer_2.weight.initialization = ")
    assert line.endswith(f": {problem}")


def test_losses() -> None:
    loaded = load_small(
        f"{BASE}head.losses={{main: {{type: label, loss_implementation: torch}}, z: {{type: z_loss, weight: 1e-4}}}}"
    )
    base_model = loaded.train.model.base_model
    assert (base_model.logit_z_loss, base_model.cross_entropy_impl) == (1e-4, "torch")
    assert f"override 1: {BASE}head.losses.z.weight is now {BASE}logit_z_loss: 0.0001" in loaded.notices


def test_triton_is_read_as_fused_in_every_spelling() -> None:
    loaded = load_small(f"{BASE}head.losses={{main: {{loss_implementation: triton}}}}")
    assert loaded.train.model.base_model.cross_entropy_impl == "fused"


@pytest.mark.parametrize(
    ("losses", "problems"),
    [
        ("{a: {type: label}, b: {type: grpo}}", [".b.type = 'grpo': only label and z_loss are supported"]),
        ("{a: {type: label, weight: 2}}", [".a.weight = 2: the label loss has weight 1; scale the others by it"]),
        ("{z: {type: z_loss}}", [": there is no loss of type label, which always trains here; add it"]),
        ("{a: {type: label}, b: {}}", [".b: a second loss of type label; there is one of each here"]),
        ("{a: 3}", [".a = 3: expected a section with type, weight", ": there is no loss of type label, which always trains here; add it"]),
    ],
)  # fmt: skip
def test_losses_that_are_refused(losses: str, problems: list[str]) -> None:
    assert small_problems(f"{BASE}head.losses={losses}") == [
        f"override 1: {BASE}head.losses{line}" for line in problems
    ]


def test_a_misspelt_key_of_a_loss() -> None:
    assert small_problems(f"{BASE}head.losses={{a: {{typ: label}}}}") == [
        f"override 1: unknown key 'typ' in {BASE}head.losses.a; did you mean 'type'?"
    ]


ONE = (
    "{normalization: {type: rms_norm}, mixer: {heads: 4, add_linear_biases: no, rotary: {type: default}}, "
    "mlp: {gated: yes, add_linear_biases: no}}"
)
PATTERN = (
    SMALL.partition("      block:\n")[0]
    + f"      type: pattern\n      pattern: [a, b, a]\n      blocks:\n        a: {ONE}\n        b: {ONE}\n"
    + SMALL[SMALL.index("    head:") :]
)


def test_a_pattern_of_equal_blocks() -> None:
    loaded = load_texts(PATTERN)
    assert loaded.config == load_small().config
    assert (
        "a:12: model.base_model.decoder.blocks: a, b, all equal: read as model.base_model.decoder.block"
        in loaded.notices
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("blocks.b.mixer.heads=8", "decoder.blocks.b differs from a in mixer.heads (4, 8): all blocks are alike here"),
        ("blocks.b.mlp.layer_1.lr_scale=0.5", "decoder.blocks.b differs from a in mlp.layer_1 (null, {'lr_scale': 0.5}): all blocks are alike here"),
        ("pattern.1=c", "decoder.pattern: there is no block 'c' (there are: a, b)"),
        ("pattern=[]", "decoder.type: pattern needs blocks (NAME: block) and pattern (a list of their names)"),
        ("type=patern", "decoder.type = 'patern': expected fixed, or pattern with equal blocks; did you mean 'pattern'?"),
        ("block.mixer.heads=8", "decoder.block does nothing beside model.base_model.decoder.type: pattern; write model.base_model.decoder.blocks.NAME"),
    ],
)  # fmt: skip
def test_other_patterns_are_refused(override: str, problem: str) -> None:
    (line,) = problems_of_texts(PATTERN, overrides=(f"{BASE}decoder.{override}",))
    assert line.partition(": ")[2] == f"{BASE}{problem}"


def test_a_misspelt_key_in_every_block_of_a_pattern() -> None:
    overrides = tuple(f"{BASE}decoder.blocks.{name}.mixer.hed=8" for name in "ab")
    assert problems_of_texts(PATTERN, overrides=overrides) == [
        f"override 1: unknown key 'hed' in {BLOCK}mixer; did you mean 'heads'?"
    ]


def test_an_override_over_a_pattern() -> None:
    loaded = load_texts(PATTERN, overrides=(f"{BASE}transformer.num_attention_heads=2",))
    assert loaded.architecture is not None
    assert loaded.architecture.num_attention_heads == 2
