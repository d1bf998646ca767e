"""What several keys of the newest dialect decide together."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from modelyard.config.huggingface import write_config
from modelyard.config.loader import Loaded, load_config
from modelyard.config.migrate import migrate
from modelyard.config.presets import PRESETS
from tests.config.helpers import problems_of, write
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


# Over a preset or a pretrained model's shape

START = """\
training: {train_iters: 1}
batch: {batch_size: 1}
data: {datasets: {training: {type: random}}}
run: {experiment_dir: x}
"""
QKV_BIASES = tuple(f"{BLOCK}mixer.{name}_layer.bias.enabled=true" for name in ("query", "key", "value"))
EPSILON = f"{BLOCK}normalization.epsilon"
EMBEDDING = f"{BASE}embeddings.word_embeddings.initialization"
KINDS = pytest.mark.parametrize("kind", ["preset", "pretrained"])


def over(folder: Path, kind: str, name: str) -> Path:
    """A file with the shape called `name`: as a preset, or as a folder of which only the shape is taken."""
    if kind == "preset":
        return write(folder, START + f"model: {{preset: {name}}}\n")
    model = folder / name
    model.mkdir()
    family = "qwen2" if name.startswith("qwen") else "llama"
    (model / "config.json").write_text(
        json.dumps(write_config(PRESETS[name], family=family, dtype="bfloat16"))
    )
    return write(folder, START + f"pretrained: {{path: {model}, model_weights: no}}\n")


def biases_of(loaded: Loaded) -> tuple[bool, bool, bool]:
    shape = loaded.architecture
    assert shape is not None
    return shape.qkv_bias, shape.output_bias, shape.mlp_bias


@KINDS
@pytest.mark.parametrize(
    ("name", "overrides", "word", "where"),
    [
        ("llama-3.1-8b", QKV_BIASES, "only_attn_qkv", (True, False, False)),
        ("llama-3.1-8b", (f"{BLOCK}mlp.add_linear_biases=true",), "only_mlp", (False, False, True)),
        ("qwen-2.5-7b", (f"{BLOCK}mlp.add_linear_biases=false",), "only_attn_qkv", (True, False, False)),
        ("qwen-2.5-7b", (f"{BLOCK}mixer.dense_layer.bias.enabled=true",), "only_attn", (True, True, False)),
        ("qwen-2.5-7b", (f"{BLOCK}mixer.add_linear_biases=false",), "nowhere", (False, False, False)),
    ],
)
def test_biases_of_other_layers_stay_those_of_the_shape(
    kind: str,
    name: str,
    overrides: tuple[str, ...],
    word: str,
    where: tuple[bool, bool, bool],
    tmp_path: Path,
) -> None:
    file = over(tmp_path, kind, name)
    loaded = load_config([file], overrides)
    assert loaded.train.model.base_model.transformer.add_linear_biases == word
    assert biases_of(loaded) == where
    migrated = migrate([file], overrides)
    assert migrated.problems == []
    assert f"add_linear_biases: {word}  # was " in migrated.text
    assert biases_of(load_config([write(tmp_path, migrated.text, "migrated.yaml")])) == where


def test_the_pretrained_shape_comes_before_the_presets(tmp_path: Path) -> None:
    file = over(tmp_path, "pretrained", "qwen-2.5-7b")
    loaded = load_config([file], ["model.preset=llama-3.1-8b", f"{BLOCK}mlp.add_linear_biases=no"])
    assert biases_of(loaded) == (True, False, False)


@KINDS
def test_the_normalization_of_the_head_stays_that_of_the_shape(kind: str, tmp_path: Path) -> None:
    file = over(tmp_path, kind, "qwen-2.5-7b")
    place = "preset qwen-2.5-7b" if kind == "preset" else "qwen-2.5-7b/config.json"
    assert problems_of([file], f"{EPSILON}=1e-5") == [
        f"override 1: {EPSILON} = 1e-05, but {BASE}head.normalization.epsilon = 1e-06 (not given, that of {place}); "
        "blocks and head have one normalization here: write the same in both"
    ]
    for overrides, epsilon in (
        ((f"{EPSILON}=1e-6",), 1e-6),
        ((f"{EPSILON}=1e-5", f"{BASE}head.normalization.epsilon=1e-5"), 1e-5),
        ((f"{BLOCK}normalization.type=rms_norm",), 1e-6),
    ):
        shape = load_config([file], overrides).architecture
        assert shape is not None
        assert (shape.norm_type, shape.norm_epsilon) == ("rms_norm", epsilon)
    migrated = migrate([file], [f"{EPSILON}=1e-6"])
    assert migrated.problems == []
    assert "epsilon: 1.0e-06  # was base_model.decoder.block.normalization.epsilon\n" in migrated.text
    (problem,) = migrate([file], [f"{EPSILON}=1e-5"]).problems
    assert problem.startswith(f"override 1: {EPSILON} = 1e-05, but ")


@KINDS
def test_the_embedding_is_tied_where_the_shape_says_so(kind: str, tmp_path: Path) -> None:
    override = f"{EMBEDDING}={{type: normal, std: 0.5}}"
    file = over(tmp_path, kind, "llama-3.2-1b")
    loaded = load_config([file], [override])
    assert loaded.train.model.base_model.init_method_std_embed == 0.5
    assert loaded.architecture is not None
    assert loaded.architecture.tie_word_embeddings
    migrated = migrate([file], [override])
    assert migrated.problems == []
    assert (
        "init_method_std_embed: 0.5  # was base_model.embeddings.word_embeddings.initialization\n"
        in migrated.text
    )
    alone = over(tmp_path, kind, "llama-3.1-8b")  # its output layer has a start of its own
    (problem,) = problems_of([alone], override)
    assert problem.startswith(f"override 1: these begin alike here ({EMBEDDING}: std 0.5, {BASE}head.")


@pytest.mark.parametrize(
    "override",
    [f"{BLOCK}mlp.add_linear_biases=no", f"{EPSILON}=1e-06", f"{EMBEDDING}={{type: normal, std: 0.5}}"],
)
def test_what_only_an_absent_pretrained_model_could_tell(override: str, tmp_path: Path) -> None:
    """Nothing is guessed: it is said, and `migrate` is not done."""
    file = write(tmp_path, START + "pretrained: {path: not-there, model_weights: no}\n")
    key = override.partition("=")[0]
    transformer = f"{BASE}transformer"
    (line,) = [line for line in load_config([file], [override]).notices if key in line and "not tr" in line]
    assert line.startswith(f"override 1: {key} = ")
    assert line.endswith(
        " is not translated: what holds beside it is said by the preset or pretrained model, which cannot be read"
    )
    migrated = migrate([file], [override])
    assert migrated.problems == [line]
    assert f"# Not translated:\n#   {key}: " in migrated.text
    # What is said whole needs no other word.
    whole = {
        f"{BLOCK}mlp.add_linear_biases=no": f"{transformer}.add_linear_biases=only_attn",
        f"{EPSILON}=1e-06": f"{BASE}head.normalization.epsilon=1e-06",
    }.get(override, f"{BASE}tied_embedding_weight=yes")
    assert migrate([file], [whole, override]).problems == []


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
