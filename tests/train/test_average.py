"""`modelyard average`: exact sums, what its result can be used for, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from modelyard.cli import main
from modelyard.config.architecture import Architecture, Rotary
from modelyard.errors import UserError
from modelyard.files import sha256
from modelyard.model.formats import export_huggingface
from modelyard.train import average as module
from modelyard.train.average import AveragedWeights, average
from modelyard.train.checkpoint import Checkpoint, save_checkpoint
from modelyard.train.evaluate import evaluate
from modelyard.train.run import train
from tests.train.helpers import CONFIG, loaded, losses

SHAPE = Architecture(12, 8, 1, 2, 1, 4, 6, rotary=Rotary("default", 500_000.0), max_position_embeddings=64)
NAME = "layers.0.mlp.up_proj.weight"  # 6 × 8


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save(
    folder: str,
    seed: int = 0,
    change: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
    *,
    shape: Architecture = SHAPE,
    dtype: torch.dtype = torch.float32,
    iteration: int = 7,
    config: dict[str, Any] | None = None,
) -> Path:
    """A checkpoint of random weights."""
    random = torch.Generator().manual_seed(seed)
    parameters = {
        name: torch.randn(size, generator=random, dtype=dtype)
        for name, size in shape.parameter_shapes().items()
    }
    change(parameters)
    save_checkpoint(
        Path(folder),
        parameters=parameters,
        moments={f"{name}.exp_avg": p for name, p in parameters.items()},
        state={
            "progress": {"iteration": iteration},
            "architecture": dataclasses.asdict(shape),
            "data_fingerprint": f"data {seed}",
        },
        config={"training": {"export": {"format": None}}} if config is None else config,
    )
    return Path(folder)


def averaged(*folders: Path | str, weights: Sequence[str] | None = None, to: str = "mean") -> Checkpoint:
    given = None if weights is None else [Fraction(weight) for weight in weights]
    assert average([Path(folder) for folder in folders], Path(to), weights=given) == 0
    return Checkpoint(Path(to))


def bits(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.load(name).view(torch.int32) for name in checkpoint.names()}


def same_bits(one: Checkpoint, other: Checkpoint) -> bool:
    mine, theirs = bits(one), bits(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def refused(words: Sequence[object], capsys: pytest.CaptureFixture[str], to: str = "mean") -> str:
    """What the command says; one line, exit status 2, and nothing is there that was not there before."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main(["average", *map(str, words), "--to", to]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sorted(Path().rglob("*")) == before
    (line,) = err.splitlines()
    return line


EDGES = [-0.0, 0.0, 1e-45, -1e-38, 3.4028235e38, -3.4028235e38, 0.1, -1 / 3]


def test_the_average_of_one_and_of_equal_ones_is_itself() -> None:
    def edges(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME][0] = torch.tensor(EDGES)

    one = Checkpoint(save("a", change=edges))
    assert one.load(NAME)[0, 0].signbit()
    shutil.copytree("a", "b")
    shutil.copytree("a", "c")
    assert same_bits(one, averaged("a", to="of one"))
    assert same_bits(one, averaged("a", "b", to="of two"))
    assert same_bits(one, averaged("a", "b", "c", weights=["0.1", "0.2", "0.4"], to="of three"))
    # Nothing but the weights of it is kept.
    assert set(Checkpoint(Path("of one")).tensors()) == {f"model.{name}" for name in SHAPE.parameter_shapes()}


def exact(values: Sequence[torch.Tensor], weights: Sequence[Fraction]) -> torch.Tensor:
    """The weighted mean of each element in rational numbers, rounded to fp32."""
    total = sum(weights)
    columns = zip(*(value.reshape(-1).tolist() for value in values), strict=True)
    means = [sum(w * Fraction(v) for w, v in zip(weights, column, strict=True)) / total for column in columns]
    return torch.tensor([float(mean) for mean in means], dtype=torch.float64).float().view(values[0].shape)


@pytest.mark.parametrize(
    ("weights", "by_hand"),
    [
        (None, [8 / 3, 2.0**-24 / 3]),
        (["1", "2", "3"], [3.0, (1 - 3 + 3 * 2.0**-24) / 6]),
        (["0.1", "0.2", "0.3"], [3.0, (1 - 3 + 3 * 2.0**-24) / 6]),
        (["0", "1", "0"], [2.0, 0.0]),
        (["2", "1", "2"], [14 / 5, 2 * 2.0**-24 / 5]),
        # Too fine to be whole numbers of 29 bits.
        (["1e-12", "1", "3"], [14 / 4, (1e-12 - 3 + 3 * 2.0**-24) / 4]),
    ],
)
def test_means_by_hand(weights: list[str] | None, by_hand: list[float]) -> None:
    """Of 2, 2, 4 and of 1, 0, -1 + 2^-24, whose sums in fp32 would round."""
    folders = [
        save(name, seed, lambda tensors, row=row: tensors["norm.weight"][:2].copy_(torch.tensor(row)))
        for seed, (name, row) in enumerate(
            {"a": [2.0, 1.0], "b": [2.0, 0.0], "c": [4.0, -1.0 + 2.0**-24]}.items()
        )
    ]
    given = [Fraction(weight) for weight in weights or ["1"] * 3]
    result = averaged(*folders, weights=weights)
    sources = [Checkpoint(folder) for folder in folders]
    for name in result.names():
        assert result.dtype(name) == torch.float32
        expected = exact([source.load(name) for source in sources], given)
        assert torch.equal(result.load(name), expected), name
    assert torch.equal(result.load("norm.weight")[:2], torch.tensor(by_hand, dtype=torch.float64).float())


def test_the_order_of_the_sources_changes_nothing() -> None:
    """1e30 + 1 - 1e30 is 1 or 0 in fp64, as one adds."""
    for name, value in {"a": 1e30, "b": 1.0, "c": -1e30}.items():
        save(name, ord(name), lambda tensors, value=value: tensors[NAME].fill_(value))
    first, *others = itertools.permutations([("a", "1"), ("b", "2"), ("c", "1")])
    expected = averaged(*(f for f, _ in first), weights=[w for _, w in first], to="0")
    for number, order in enumerate(others, start=1):
        folders, weights = zip(*order, strict=True)
        assert same_bits(expected, averaged(*folders, weights=weights, to=str(number)))


def test_fp64_stays_fp64() -> None:
    save("a", 1, dtype=torch.float64)
    save("b", 2)
    result = averaged("a", "b")
    assert result.dtype(NAME) == torch.float64
    expected = (Checkpoint(Path("a")).load(NAME) + Checkpoint(Path("b")).load(NAME).double()) / 2
    assert torch.equal(result.load(NAME), expected)


def test_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is made, the writer still has the one before and no other."""
    alive: list[StorageWeakRef] = []
    most, load = [0], AveragedWeights.load

    def counted(self: AveragedWeights, name: str) -> torch.Tensor:
        most[0] = max(most[0], sum(not ref.expired() for ref in alive))
        result = load(self, name)
        alive.append(StorageWeakRef(result.untyped_storage()))
        return result

    monkeypatch.setattr(AveragedWeights, "load", counted)
    averaged(save("a"), save("b", 1))
    assert len(alive) == len(SHAPE.parameter_shapes()) == 12
    assert most[0] == 1


MEASURED = """
import re
from pathlib import Path
from modelyard.train.average import average

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

average([Path("small")], Path("warm"))  # what is imported is not counted
before = peak()
average([Path("a"), Path("b"), Path("c")], Path("mean"))
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_of_a_few_tensors() -> None:
    """Three models of 128 MB whose largest tensors have 32 MB."""
    large = replace(
        SHAPE, vocab_size=8192, hidden_size=1024, ffn_hidden_size=2048, head_size=512, num_layers=2
    )
    save("small")
    for seed, name in enumerate("abc"):
        save(name, seed, shape=large)
    largest = 4 * 8192 * 1024
    assert 4 * large.parameter_count() > 3.5 * largest
    done = subprocess.run([sys.executable, "-c", MEASURED], check=True, capture_output=True, text=True)
    grown = int(done.stdout.splitlines()[-1])
    assert 2 * largest < grown < 6 * largest


def test_values_are_added_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    save("a", 1)
    save("b", 2)
    whole = averaged("a", "b", weights=["1", "2"], to="whole")
    monkeypatch.setattr(module, "_AT_ONCE", 5)
    assert same_bits(whole, averaged("a", "b", weights=["1", "2"], to="pieces"))


def test_against_torch_and_transformers() -> None:
    """Three models saved by transformers, and one of our checkpoints of the third: the same as torch's own mean of the
    state dicts, and within its fp32 rounding as torch's AveragedModel."""
    from torch.optim.swa_utils import AveragedModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, eos_token_id=[2, 3],
    )  # fmt: skip
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
        models[-1].save_pretrained(f"hf{seed}")
    reference = AveragedModel(models[0])
    for model in models:
        reference.update_parameters(model)
    average([Path("hf2")], Path("third"))
    average([Path("hf0"), Path("hf1"), Path("third")], Path("mean"))
    assert main(["convert", "mean", "made", "--dtype", "fp32"]) == 0
    made = LlamaForCausalLM.from_pretrained("made")
    wanted = dict(reference.module.state_dict())
    for name, value in made.state_dict().items():
        stacked = torch.stack([model.state_dict()[name].double() for model in models])
        assert torch.equal(value, stacked.mean(0).float()), name
        assert torch.allclose(value, wanted[name], rtol=0, atol=3e-7), name
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(made(tokens).logits, reference.module(tokens).logits, atol=1e-4)
    # What the folders say beside the weights is carried along.
    assert made.config.eos_token_id == [2, 3]
    assert json.loads(Path("made/generation_config.json").read_text())["eos_token_id"] == [2, 3]


def test_where_it_came_from() -> None:
    config = {"training": {"export": {"format": "mistral"}}, "optimizer": {"beta_1": 0.9, "beta_2": 0.99}}
    other = {"training": {"export": {"format": "mistral"}}, "optimizer": {"beta_1": 0.8, "beta_2": 0.99}}
    save("run/checkpoint/30", 1, iteration=30, config=other)
    save("run/checkpoint/40", 2, iteration=40, config=config)
    source = Checkpoint(Path("run/checkpoint/40"))
    export_huggingface(source, Path("hf"), architecture=SHAPE, family="llama")
    averaged("run/checkpoint/30", to="inner")
    result = averaged("run/checkpoint/30", "run", "hf", "inner", weights=["1", "4", "2", "1"])
    assert result.iteration == 40
    assert result.is_average
    assert not source.is_average
    assert result.architecture == SHAPE
    assert result.config == other  # that of the last with one, the average's
    assert result.state["family"] == "mistral"
    here = Path().resolve()
    manifests = {name: sha256(Path(name, "manifest.json")) for name in ("run/checkpoint/30", "run/checkpoint/40", "inner")}  # fmt: skip
    first = {
        "path": str(here / "run/checkpoint/30"),
        "share": "1/8",
        "iteration": 30,
        "sha256": {"manifest.json": manifests["run/checkpoint/30"]},
        "data_fingerprint": "data 1",
    }
    assert result.state["averaged"] == [
        first,
        {
            "path": str(here / "run/checkpoint/40"),
            "share": "1/2",
            "iteration": 40,
            "sha256": {"manifest.json": manifests["run/checkpoint/40"]},
            "data_fingerprint": "data 2",
            "config": {"optimizer.beta_1": 0.9},
        },
        {
            "path": str(here / "hf"),
            "share": "1/4",
            "sha256": {name: sha256(Path("hf", name)) for name in ("config.json", "model.safetensors")},
        },
        {
            "path": str(here / "inner"),
            "share": "1/8",
            "iteration": 30,
            "sha256": {"manifest.json": manifests["inner"]},
            "averaged": [first | {"share": "1"}],
        },
    ]


def test_the_last_of_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    for number, iteration in enumerate((8, 9, 10, 11)):
        save(f"run/checkpoint/{iteration}", number, iteration=iteration)
    assert main(["average", "run", "--last", "3", "--weights", "1,2,3", "--to", "a"]) == 0
    named = "run/checkpoint/9: 1/6, run/checkpoint/10: 1/3, run/checkpoint/11: 1/2"
    assert capsys.readouterr().out == f"wrote a (the average of {named})\n"
    expected = averaged(*(f"run/checkpoint/{n}" for n in (9, 10, 11)), weights=["1", "2", "3"], to="b")
    assert same_bits(Checkpoint(Path("a")), expected)
    line = refused(["run", "--last", 5], capsys)
    assert line == "error: --last 5: run does not have so many checkpoints, it has 4 (8, 9, 10, 11)"
    assert refused(["run", "a", "--last", 2], capsys) == "error: --last 2 takes one experiment, and 2 folders are named"  # fmt: skip
    # One of them is damaged: none is left out by itself.
    Path("run/checkpoint/10/state.json").write_text("{")
    line = refused(["run", "--last", 3], capsys)
    assert line.startswith("error: run/checkpoint/10/state.json has 1 bytes where its manifest says")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("1,2", "--weights has 2 numbers for 3 models; give one for each"),
        ("1", "--weights has 1 number for 3 models; give one for each"),
        ("0,0.0,0", "--weights: their sum is 0; at least one has to be above 0"),
        ("1,-2,1", "argument --weights: '-2' is not a number from 0 on"),
        ("1,nan,1", "argument --weights: 'nan' is not a number from 0 on"),
        ("1,inf,1", "argument --weights: 'inf' is not a number from 0 on"),
        ("1,,1", "argument --weights: '' is not a number from 0 on"),
    ],
)
def test_weights_that_are_none(weights: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        save(name, ord(name))
    assert said in refused(["a", "b", "c", "--weights", weights], capsys)


def test_what_does_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    save("a", 1)
    save("wider", 2, shape=replace(SHAPE, ffn_hidden_size=5, rotary=Rotary("default", 10_000.0)))
    save("longer", 2, shape=replace(SHAPE, max_position_embeddings=128))
    save("vocabulary", 3, shape=replace(SHAPE, vocab_size=13))
    assert (
        refused(["a", "wider"], capsys)
        == "error: wider has another shape than a: ffn_hidden_size 5 (there 6), rotary.theta 10000.0 (there 500000.0)"
    )
    assert (
        refused(["a", "vocabulary"], capsys)
        == "error: vocabulary has another shape than a: vocab_size 13 (there 12)"
    )
    # The longest position is metadata: nothing is computed from it.
    assert averaged("a", "longer").architecture.max_position_embeddings == 128
    assert (
        refused(["a", "longer"], capsys) == "error: mean exists already; choose another folder or remove it"
    )


def test_tokenizers_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    def tokenizer(folder: str, words: list[str]) -> None:
        Path(folder).mkdir(parents=True)
        vocabulary = {word: number for number, word in enumerate(words)}
        text = json.dumps({"model": {"vocab": vocabulary, "merges": []}, "added_tokens": []})
        Path(folder, "tokenizer.json").write_text(text)

    for seed, name in enumerate("abc"):
        save(f"{name}/checkpoint/5", seed)
    save("none/checkpoint/5", 4)
    tokenizer("a/tokenizer", ["x", "y"])
    tokenizer("b/tokenizer", ["y", "x"])
    tokenizer("c/tokenizer", ["x", "y"])
    assert (
        refused(["a", "c", "b"], capsys)
        == "error: b/checkpoint/5 has another tokenizer than a/checkpoint/5 ('x' is token 0 in one and 1 in the other)"
    )
    averaged("none", "a", "c")
    assert Path("mean/tokenizer/tokenizer.json").read_text() == Path("a/tokenizer/tokenizer.json").read_text()
    for name, content in {"a": b"one", "b": b"two"}.items():
        Path(name, "tokenizer/tokenizer.json").unlink()
        Path(name, "tokenizer/tokenizer.model").write_bytes(content)
    assert refused(["a", "b"], capsys, to="pieces").endswith("(their tokenizer.model differ)")
    average([Path("b")], Path("pieces"))
    assert Path("pieces/tokenizer/tokenizer.model").read_bytes() == b"two"


def test_sources_that_cannot_be_averaged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NAME].view(-1)[[3, 40]] = torch.tensor([torch.nan, torch.inf])

    save("good")
    save("nan", 1, broken)
    monkeypatch.setattr(module, "_AT_ONCE", 20)  # found in any piece
    line = f"error: nan: '{NAME}' has 2 of 48 values that are NaN or infinite; leave this one out"
    assert refused(["good", "nan"], capsys) == line
    assert refused(["nan", "good", "--weights", "0,1"], capsys) == line
    shutil.copytree("good", "damaged")
    data = next(Path("damaged").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert refused(["good", "damaged"], capsys).startswith(f"error: {data} has ")
    assert (
        refused(["good", "goood"], capsys)
        == "error: model goood does not exist (there is no 'goood' in the working directory; nearest there: good)"
    )
    Path("empty").mkdir()
    assert (
        refused(["good", "empty"], capsys)
        == "error: empty holds neither a Hugging Face model (config.json), nor an adapter (adapter_config.json), nor a checkpoint"
    )
    assert refused(["good"], capsys, to="good") == "error: good exists already; choose another folder or remove it"  # fmt: skip


def test_a_place_among_the_checkpoints_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The run would find it and refuse to go on."""
    save("good")
    Path("run/checkpoint").mkdir(parents=True)
    Path("run/metrics.jsonl").touch()
    run = Path("run").resolve()
    for to in ("run/checkpoint/mean", "run/checkpoint/a/mean"):
        assert (
            refused(["good"], capsys, to=to)
            == f"error: {to} is inside the run {run}; name a folder elsewhere"
        )
    Path("run/metrics.jsonl").unlink()
    average([Path("good")], Path("run/checkpoint/mean"))  # no run's


def test_a_source_that_vanishes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a run that goes on and removes its older checkpoints."""
    save("a")
    save("b", 1)
    load = Checkpoint.load

    def vanishing(self: Checkpoint, name: str) -> torch.Tensor:
        if name == NAME and self.folder.name == "b":
            shutil.rmtree("b")
        return load(self, name)

    monkeypatch.setattr(Checkpoint, "load", vanishing)
    with pytest.raises(UserError, match="b cannot be read: No such file"):
        average([Path("a"), Path("b")], Path("mean"))
    assert not list(Path().glob("mean*"))


def test_a_disk_that_fills_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    save("a")

    def full(*args: object, **words: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(UserError, match="no space left while writing mean"):
        average([Path("a")], Path("mean"))
    assert not list(Path().glob("mean*"))


# --- what the result is good for --------------------------------------------------------------------------------

HELD_OUT = "training.evaluators={held_out: {interval: 1, evaluator: {iterations: 2}}}"


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from modelyard.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("train.yaml").write_text(CONFIG.replace("vocab_size: 32", "vocab_size: 300"))
        settings = "training.checkpoint={interval: 1, keep: null}"
        assert train(loaded("training.train_iters=6", settings)) == 0
        train_tokenizer(["some words and some more words"], Path("run/tokenizer"), vocab_size=270)
        assert average([Path("run")], Path("mean"), last=3) == 0
    return folder


@pytest.fixture
def trained(trained_once: Path, _own_folder: None) -> Checkpoint:
    """An experiment of six iterations, and the average of its last three checkpoints."""
    shutil.copytree(trained_once, Path(), dirs_exist_ok=True)
    return Checkpoint(Path("mean"))


def test_it_is_a_model_like_any_other(trained: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained.config["training"]["train_iters"] == 6
    capsys.readouterr()
    config = loaded(HELD_OUT, "run.experiment_dir=elsewhere")
    assert evaluate(config, checkpoint=Path("mean"), as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["iteration"] == 6
    # The same weights by way of a Hugging Face folder.
    assert main(["convert", "mean", "made", "--dtype", "fp32"]) == 0
    assert capsys.readouterr().out == "wrote made (iteration 6, from mean)\n"
    assert Path("made/tokenizer.json").is_file()
    written = {}
    for model in ("mean", "made"):
        assert main(["generate", model, "--prompt", "some", "--max-new-tokens", "8", "--json"]) == 0
        written[model] = json.loads(capsys.readouterr().out)
    assert written["mean"] == written["made"]
    assert len(written["mean"]["token_ids"]) == 8


def test_a_run_starts_from_it(trained: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    """With the first loss of a run that starts from the same weights in a Hugging Face folder."""
    assert main(["convert", "mean", "made", "--dtype", "fp32"]) == 0
    settings = ["training.train_iters=2", "training.export={interval: 2, format: llama}", HELD_OUT]
    for model in ("mean", "made"):
        here = [f"pretrained.path={model}", f"run.experiment_dir=from-{model}"]
        assert train(loaded(*settings, *here)) == 0
    out = capsys.readouterr().out
    assert "weights from mean" in out
    assert losses("from-mean") == losses("from-made")
    exports = [
        Path(f"from-{model}/export/llama/2/model.safetensors").read_bytes() for model in ("mean", "made")
    ]
    assert exports[0] == exports[1]
    # A checkpoint of a run is as good to start from.
    assert train(loaded(*settings, "pretrained.path=run/checkpoint/6", "run.experiment_dir=from-six")) == 0
    assert losses("from-six").keys() == {1, 2}
    assert losses("from-six") != losses("from-mean")


def test_no_run_goes_on_from_it(trained: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("mean", "run/checkpoint/7")
    before = sorted(Path("run").rglob("*"))
    for force in ([], ["--force"]):
        capsys.readouterr()
        assert main(["train", "train.yaml", "training.train_iters=9", *force]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            "error: run/checkpoint/7 is an average of models, without optimizer state: no run can go on from it; move it "
            "out of run/checkpoint, and to train from its weights name it as pretrained.path of a new run"
        )
        assert sorted(Path("run").rglob("*")) == before


def test_inspecting_it(trained: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", "mean"]) == 0
    out = capsys.readouterr().out
    assert "average     of 3 models: weights alone" in out
    assert "iteration   6, that of the newest of them" in out
    assert "/run/checkpoint/5" in out
    assert "exp_avg" not in out
    assert main(["inspect", "mean", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [source["iteration"] for source in values["checkpoint"]["state"]["averaged"]] == [4, 5, 6]
    assert set(values["tensors"]) == set(trained.tensors())
