"""Runs that train an adapter: what their checkpoints hold, that they go on to the bit, and on which base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from modelyard.config.adapter import is_adapter_parameter, matmul_flops_per_token
from modelyard.config.architecture import Architecture
from modelyard.errors import UserError
from modelyard.model.dropout import token_numbers
from modelyard.model.formats import export_huggingface, open_huggingface
from modelyard.model.init import DrawnWeights, InitStd
from modelyard.parallel.world import connected
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.console import Console
from modelyard.train.evaluate import evaluate
from modelyard.train.metrics import IntervalMeter, training_record
from modelyard.train.run import train
from modelyard.train.state import Run
from tests.parallel.processes import run_distributed
from tests.train.helpers import loaded, losses, new_run

pytestmark = pytest.mark.usefixtures("base")

SHAPE = Architecture(
    vocab_size=32,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=2,
    head_groups=2,
    head_size=16,
    ffn_hidden_size=64,
    max_position_embeddings=64,
)
PEFT = "model.base_model.transformer.peft"
CONFIG = """\
training:
  train_iters: 6
  logs: {interval: 1, tensorboard: no}
  checkpoint: {interval: 3, keep: 3}
  evaluators: {held_out: {interval: 3, iterations: 2, evaluator: {type: loss, dataset_name: held_out}}}
batch: {sequence_length: 16, batch_size: 4}
data: {datasets: {training: {type: random, num_documents: 50, document_length: 20}, held_out: {type: random}}}
optimizer: {learning_rate: {base: 0.05, warmup_iterations: 0, decay_style: constant}}
pretrained: {format: llama, path: base}
model:
  base_model:
    transformer: {peft: {type: lora, rank: 4, alpha: 8.0, layers: [all], quantization_block: 16}}
run: {experiment_dir: run}
"""
FP64 = "model.distributed.training_dtype=float64"
QLORA = f"{PEFT}.quantization=nf4"
DORA = f"{PEFT}.dora=yes"
DROPOUT = f"{PEFT}.dropout=0.2"


def write_base(folder: str, seed: int = 1) -> None:
    weights = DrawnWeights(SHAPE, InitStd.for_architecture(SHAPE), seed, torch.device("cpu"))
    export_huggingface(weights, Path(folder), architecture=SHAPE, family="llama", dtype=torch.float32)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(CONFIG)
    write_base("base")


def trained(*overrides: str) -> None:
    assert train(loaded(*overrides), force=False) == 0


def tensors(folder: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(Path(folder))
    found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in checkpoint.tensors().items()}
    checkpoint.load_into(found)
    return found


def test_a_checkpoint_has_the_adapter_and_says_what_it_adapts() -> None:
    trained()
    checkpoint = Checkpoint(Path("run/checkpoint/6"))
    names = {name.removeprefix("model.") for name in checkpoint.tensors() if name.startswith("model.")}
    # two layers of seven matrices
    assert len(names) == 28
    assert all(is_adapter_parameter(name) for name in names)
    moments = {name for name in checkpoint.tensors() if name.startswith("optimizer.")}
    assert moments == {f"optimizer.{name}.{m}" for name in names for m in ("exp_avg", "exp_avg_sq")}
    assert checkpoint.architecture.parameter_shapes() == SHAPE.parameter_shapes()
    assert checkpoint.state["base"]["path"] == str(Path("base").resolve())
    assert checkpoint.state["adapter"]["rank"] == 4


@pytest.mark.parametrize(
    "overrides", [(DROPOUT,), (QLORA,), (DORA, "model.distributed.training_dtype=bf16", QLORA)]
)
def test_a_run_goes_on_to_the_bit(overrides: tuple[str, ...]) -> None:
    trained(*overrides)
    trained(*overrides, "run.experiment_dir=stopped", "training.train_iters=3")
    trained(*overrides, "run.experiment_dir=stopped")
    assert losses("stopped") == losses("run")
    one, other = tensors("run/checkpoint/6"), tensors("stopped/checkpoint/6")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    "layout",
    [
        ("model.multi_stage.zero_stage=3",),
        ("model.distributed={tensor_parallel: 2, sequence_tensor_parallel: yes}", DORA),
        ("model.multi_stage.zero_stage=2", QLORA),
        ("model.multi_stage.zero_stage=2", DROPOUT),
    ],
)
def test_another_layout_goes_on_with_it(layout: tuple[str, ...]) -> None:
    """In fp64, where only the order of sums is left to differ."""
    alone = (FP64, *(override for override in layout if override.startswith(PEFT)))
    trained(*alone)
    shutil.copytree("run", "other")
    for folder in ("other/checkpoint/6", "other/metrics.jsonl"):
        shutil.rmtree(folder) if Path(folder).is_dir() else Path(folder).unlink()
    found = run_distributed(_in_world, 2, "other", (FP64, *layout))
    expected = [losses()[iteration] for iteration in (4, 5, 6)]
    for rank in found:
        assert rank == pytest.approx(expected, rel=1e-11)


def _in_world(folder: str, overrides: tuple[str, ...]) -> list[float]:
    config = loaded(f"run.experiment_dir={folder}", *overrides)
    assert config.architecture is not None
    with connected(backend="gloo", timeout=60.0, traces=Path("traces")) as world:
        run = Run(config.train, config.architecture, force=False, console=Console(), world=world)
        assert run.progress.iteration == 3
        return [result.loss for result, _, _ in run.steps()]


def test_another_base_is_refused() -> None:
    trained("training.train_iters=3")
    shutil.rmtree("base")
    write_base("base", seed=2)
    with pytest.raises(
        UserError, match=r"the weights in base are not those that run.checkpoint.3 was trained on"
    ):
        new_run()


def test_the_base_may_move() -> None:
    trained("training.train_iters=3")
    shutil.move("base", "elsewhere")
    assert new_run("pretrained.path=elsewhere").progress.iteration == 3


def test_another_adapter_does_not_go_on() -> None:
    trained("training.train_iters=3")
    with pytest.raises(UserError, match=r"peft.alpha: was 8.0, is now 16.0"):
        new_run(f"{PEFT}.alpha=16")


@pytest.mark.parametrize(
    "change",
    [
        f"{PEFT}.rank=8",
        f"{PEFT}.dora=yes",
        f"{PEFT}.layers=[query]",
        f"{PEFT}.freeze_others=no",
        f"{PEFT}.type=none",
    ],
)
def test_force_is_not_offered_where_the_parameters_are_others(change: str) -> None:
    trained("training.train_iters=3")
    for force in (False, True):
        config = loaded(change)
        assert config.architecture is not None
        with pytest.raises(UserError) as raised:
            Run(config.train, config.architecture, force=force, console=Console())
        assert "--force" not in str(raised.value)


def test_the_same_adapter_in_other_words_goes_on() -> None:
    trained("training.train_iters=3")
    words = "[query, key_value, dense, mlp_1, mlp_2]"
    run = new_run(f"{PEFT}.layers={words}", f"{PEFT}.quantization_block=32")
    assert run.progress.iteration == 3


def test_going_on_wants_no_adapter_to_begin_with() -> None:
    trained("run.experiment_dir=first", "training.train_iters=3")
    second = ("run.experiment_dir=second", "training.train_iters=3", "pretrained.adapter=first/checkpoint/3")
    trained(*second)
    shutil.rmtree("first")
    assert new_run(*second).progress.iteration == 3


def test_adapters_that_a_rate_of_0_freezes_keep_their_values_in_fp32() -> None:
    trained("training.train_iters=3")
    before = tensors("run/checkpoint/3")
    trained(
        "run.experiment_dir=second",
        "training.train_iters=3",
        "pretrained.adapter=run/checkpoint/3",
        "model.base_model.transformer.attention_lr_scale=0",
        "model.distributed.training_dtype=bf16",
    )
    after = tensors("second/checkpoint/3")
    for name, tensor in before.items():
        if name.startswith("model.") and "self_attn" in name:
            assert after[name].dtype == torch.float32, name
            assert torch.equal(after[name], tensor), name


def test_a_base_with_nan_is_not_quantized() -> None:
    weights = DrawnWeights(SHAPE, InitStd.for_architecture(SHAPE), 1, torch.device("cpu"))
    draw = weights.load

    def broken(name: str) -> torch.Tensor:
        tensor = draw(name)
        if name == "layers.1.mlp.up_proj.weight":
            tensor[3, 5] = float("nan")
        return tensor

    weights.load = broken  # type: ignore[method-assign]
    shutil.rmtree("base")
    export_huggingface(weights, Path("base"), architecture=SHAPE, family="llama", dtype=torch.float32)
    with pytest.raises(
        UserError, match=r"'layers.1.mlp.up_proj.weight' cannot be quantized: a value is not finite"
    ):
        new_run(QLORA)


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    weights = DrawnWeights(SHAPE, InitStd.for_architecture(SHAPE), 1, torch.device("cpu"))
    draw = weights.load

    def pruned(name: str) -> torch.Tensor:
        tensor = draw(name)
        if name.endswith("up_proj.weight"):
            tensor[3] = 0
        return tensor

    weights.load = pruned  # type: ignore[method-assign]
    shutil.rmtree("base")
    export_huggingface(weights, Path("base"), architecture=SHAPE, family="llama", dtype=torch.float32)
    trained(DORA, "training.export={format: llama, interval: 6, data_type: float32}")
    assert all(loss == loss for loss in losses().values())
    exported = open_huggingface(Path("run/export/llama/6")).weights
    assert not exported.load("layers.0.mlp.up_proj.weight")[3].any()
    assert exported.load("layers.0.mlp.up_proj.weight").isfinite().all()


def test_the_base_keeps_its_values_and_an_export_has_the_merged_model() -> None:
    """By hand: W + 2 B A of what the checkpoint has, in fp32."""
    trained("training.export={format: llama, interval: 6, data_type: float32}")
    stored, exported = tensors("run/checkpoint/6"), open_huggingface(Path("run/export/llama/6")).weights
    before = open_huggingface(Path("base")).weights
    for name in SHAPE.parameter_shapes():
        expected = before.load(name)
        matrix = f"model.{name.removesuffix('.weight')}"
        if f"{matrix}.lora_A" in stored:
            delta = 2.0 * stored[f"{matrix}.lora_B"] @ stored[f"{matrix}.lora_A"]
            assert float(delta.abs().max()) > 0
            torch.testing.assert_close(exported.load(name), expected + delta, rtol=0, atol=1e-6)
        else:
            assert torch.equal(exported.load(name), expected), name


def test_an_adapter_goes_on_in_another_run() -> None:
    """From its checkpoint as `pretrained.adapter`: the first loss is that of the model it was, on the same rows."""
    trained()
    run = new_run("run.experiment_dir=second", "pretrained.adapter=run/checkpoint/6")
    ours = {n: p for n, p in run.weights.master.items() if is_adapter_parameter(n)}
    stored = tensors("run/checkpoint/6")
    assert ours.keys() == {n.removeprefix("model.") for n in stored if n.startswith("model.")}
    for name, parameter in ours.items():
        assert torch.equal(parameter, stored[f"model.{name}"]), name


def test_evaluation_without_training_is_that_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    trained()
    capsys.readouterr()
    assert evaluate(loaded(), checkpoint=Path("run/checkpoint/6"), as_json=True) == 0
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    wanted = next(r for r in records if r.get("evaluator") == "held_out" and r["iteration"] == 6)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


def test_a_record_counts_what_an_adapter_needs() -> None:
    run = new_run()
    assert run.adapter is not None
    result, rate, _ = next(run.steps())
    meter = IntervalMeter()
    meter.add(2.0, 0.0, 128)
    record = training_record(run, result, rate, meter, peak=1e9)
    flops = 64 * matmul_flops_per_token(SHAPE, run.adapter)
    flops += 64 * SHAPE.attention_flops_per_token(16, causal=True)
    assert record["model_flops_per_second"] == flops
    assert record["mfu_causal"] == pytest.approx(flops / 1e9)
    assert flops < 64 * SHAPE.matmul_flops_per_token()


def test_a_step_says_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run()
    own = sum(p.numel() for n, p in run.weights.master.items() if is_adapter_parameter(n))
    assert own == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    line = capsys.readouterr().out.splitlines()[0]
    assert line == (
        f"weights from base; LoRA of rank 4 on every matrix of the blocks: {own:,} parameters beside "
        f"{SHAPE.parameter_count():,} ({own / SHAPE.parameter_count():.2%})"
    )


def test_in_training_alone_inputs_are_left_out() -> None:
    trained("training.train_iters=3")
    trained("training.train_iters=3", DROPOUT, "run.experiment_dir=with")
    assert losses("with")[1] == losses("run")[1]  # B is zero still
    assert losses("with")[2] != losses("run")[2]
    run = new_run(DROPOUT, "run.experiment_dir=with")
    batch = run.stream.batch(0)
    with torch.no_grad():
        inputs = (batch.input_ids, batch.positions, batch.cu_seqlens)
        expected = run.parallel.models[0](*inputs)
        assert not torch.equal(
            run.parallel.models[0](*inputs, numbers=run._own_part(batch).numbers), expected
        )
        assert torch.equal(run.parallel.models[0](*inputs), expected)


def test_tokens_are_numbered_by_their_row_in_the_data() -> None:
    run = new_run(DROPOUT)
    batch = run.stream.batch(0)

    def first_row() -> float:
        numbers = run._own_part(batch).numbers
        assert numbers is not None
        seed = run.config.model.distributed.seed
        assert torch.equal(numbers, numbers[0, 0] + torch.arange(64).view(4, 16))
        return (int(numbers[0, 0]) - int(token_numbers(seed, 0, 1, 1))) / 16

    assert first_row() == 0
    run.progress.iteration = 5
    assert first_row() == 20
    run.progress.left_out = [1, 2]  # after going back from a spike
    assert first_row() == 28
    assert new_run("run.experiment_dir=without")._own_part(batch).numbers is None
