"""What happens around the steps: skips, the rate's own count, precision, folders that stay. In one process."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import modelyard.train.run as run_module
import modelyard.train.state as state_module
from modelyard import kernels
from modelyard.errors import RunFailed, UserError
from modelyard.train.checkpoint import Checkpoint
from modelyard.train.phases import PHASES
from modelyard.train.run import train
from modelyard.train.step import StepResult, train_step
from tests.train.helpers import CONFIG, lines, loaded, new_run

pytestmark = pytest.mark.usefixtures("tiny")


def poison(monkeypatch: pytest.MonkeyPatch, iterations: set[int]) -> None:
    """Make the steps of these iterations report a loss that is not finite, without touching anything."""
    count = 0

    def step(*args: Any, **kwargs: Any) -> StepResult:
        nonlocal count
        count += 1
        if count in iterations:
            return StepResult(float("nan"), 1.0, 64, skipped="the loss is nan")
        return train_step(*args, **kwargs)

    monkeypatch.setattr(state_module, "train_step", step)


def test_skips_use_up_iterations_but_not_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2, 3, 6})
    run = new_run("training.max_skipped_steps=3")
    rates = [rate for _, rate, _ in run.steps()]
    assert rates == pytest.approx([0.01 / 8 * step for step in (1, 2, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8)])
    assert (run.progress.skipped_steps, run.progress.skipped_in_a_row) == (3, 0)
    assert (run.progress.iteration, run.optimizer.steps) == (12, 9)


def test_only_skips_in_a_row_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2, 4, 6, 7})
    run = new_run("training.max_skipped_steps=2")
    with pytest.raises(RunFailed, match="2 steps in a row were skipped"):
        list(run.steps())
    assert run.progress.iteration == 7


def test_training_dtype_is_what_the_model_computes_in() -> None:
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)):
        run = new_run(f"model.distributed.training_dtype={name}")
        assert {p.dtype for p in run.model.parameters()} == {dtype}
        master = torch.float64 if name == "fp64" else torch.float32
        assert {p.dtype for p in run.weights.master.values()} == {master}


def test_init_std_is_what_the_config_says() -> None:
    keys = "model.base_model.transformer"
    run = new_run("model.base_model.vocab_size=4096", f"{keys}.hidden_size=64", f"{keys}.ffn_hidden_size=256",
                  "model.base_model.init_method_std_embed=0.5", f"{keys}.init_method_std=0.02",
                  f"{keys}.init_method_std_mlp_2=0.3")  # fmt: skip
    std = {name: p.std().item() for name, p in run.weights.master.items()}
    assert std["embed_tokens.weight"] == pytest.approx(0.5, rel=0.02)
    assert std["layers.0.self_attn.q_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["layers.0.self_attn.o_proj.weight"] == pytest.approx(0.02 / 2**0.5, rel=0.05)
    assert std["layers.0.mlp.down_proj.weight"] == pytest.approx(0.3, rel=0.05)


def test_loss_options_reach_the_loss() -> None:
    options = ((), ("model.base_model.logit_z_loss=1e-2",), ("model.base_model.logits_scale_factor=0.5",))
    plain, z_loss, scaled = (next(new_run(*option).steps())[0].loss for option in options)
    # At the start the log-partition is about log(32); its square weighs 1e-2.
    assert z_loss - plain == pytest.approx(1e-2 * 3.5**2, rel=0.5)
    assert abs(scaled - plain) > 1e-3


def test_checkpoints_that_stay() -> None:
    """Every second from 1 on: 1 3 5 7 9 11 and the last, 12. Every second of those stays for ever: 3 7 11."""
    assert train(loaded()) == 0
    assert sorted(int(p.name) for p in Path("run/checkpoint").iterdir()) == [3, 5, 7, 9, 11, 12]


def test_a_schedule_of_stages_can_be_gone_on_from() -> None:
    stages = '{schedule: "linear,4,0,0.01;constant,-1,0.01"}'
    Path("train.yaml").write_text(CONFIG.replace("{base: 0.01, warmup_iterations: 8}", stages))
    assert train(loaded("training.train_iters=3")) == 0
    assert train(loaded("training.train_iters=5")) == 0
    assert Checkpoint(Path("run/checkpoint/5")).state["optimizer_steps"] == 5


def test_an_export_of_other_weights_is_replaced() -> None:
    from safetensors.torch import load_file

    export = "training.export={interval: 4, format: llama, data_type: fp32}"
    assert train(loaded("training.train_iters=4", export)) == 0
    before = load_file("run/export/llama/4/model.safetensors")
    import shutil

    shutil.rmtree("run/checkpoint")
    other = loaded("training.train_iters=4", export, "model.distributed.seed=9")
    with pytest.raises(UserError, match=r"run belongs to another run.*seed: was 1234, is now 9"):
        train(other)
    assert torch.equal(
        before["model.embed_tokens.weight"],
        load_file("run/export/llama/4/model.safetensors")["model.embed_tokens.weight"],
    )
    assert train(other, force=True) == 0
    after = load_file("run/export/llama/4/model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(
        after["model.embed_tokens.weight"], Checkpoint(Path("run/checkpoint/4")).load("embed_tokens.weight")
    )


def test_all_checkpoints_damaged_is_refused() -> None:
    assert train(loaded("training.train_iters=2")) == 0
    for manifest in Path("run/checkpoint").glob("*/manifest.json"):
        manifest.unlink()
    metrics = Path("run/metrics.jsonl").read_text()
    with pytest.raises(UserError, match="every checkpoint in run/checkpoint is damaged"):
        train(loaded("training.train_iters=3"))
    assert Path("run/metrics.jsonl").read_text() == metrics
    assert train(loaded("training.train_iters=3"), force=True) == 0
    assert sorted(p.name for p in Path("run/checkpoint").iterdir()) == ["1", "1.damaged", "2.damaged", "3"]


def test_test_set_once_at_the_end() -> None:
    settings = ("training.train_iters=2", "training.test_iters=1", "data.datasets.test={type: random}")
    for _ in range(2):
        assert train(loaded(*settings)) == 0
    assert Path("run/metrics.jsonl").read_text().count('"evaluator": "test"') == 1
    assert train(loaded("training.train_iters=3", *settings[1:])) == 0
    assert Path("run/metrics.jsonl").read_text().count('"evaluator": "test"') == 2


def test_leftovers_of_a_kill_are_swept_away() -> None:
    left_over = Path("run/checkpoint/3.tmp")
    left_over.mkdir(parents=True)
    (left_over / "half").write_text("x")
    assert train(loaded("training.train_iters=1")) == 0
    assert sorted(p.name for p in Path("run/checkpoint").iterdir()) == ["1"]


def test_shutdown_leaves_after_its_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(loaded("training.checkpoint.offset=0", "training.shutdown={interval: 4}")) == 0
    assert "shutdown after iteration 4" in capsys.readouterr().out
    assert max(int(p.name) for p in Path("run/checkpoint").iterdir()) == 4
    assert train(loaded("training.checkpoint.offset=0")) == 0
    assert max(int(p.name) for p in Path("run/checkpoint").iterdir()) == 12


def test_a_shape_that_changed_is_refused_even_with_force() -> None:
    assert train(loaded("training.train_iters=1")) == 0
    with pytest.raises(UserError, match=r"architecture\.ffn_hidden_size: was 16, is now 24"):
        train(loaded("model.base_model.transformer.ffn_hidden_size=24"), force=True)


def test_pretrained_weights_are_needed_once() -> None:
    import shutil

    assert (
        train(loaded("training={train_iters: 1, export: {interval: 1, format: llama, data_type: fp32}}")) == 0
    )
    shutil.move("run/export/llama/1", "pretrained")
    model = CONFIG[CONFIG.index("model:") : CONFIG.index("run:")]
    Path("train.yaml").write_text(CONFIG.replace(model, "pretrained: {path: pretrained}\n"))
    settings = ("run.experiment_dir=second", "optimizer.learning_rate={base: 0.0, warmup_iterations: 0}")
    assert train(loaded("training.train_iters=1", *settings)) == 0
    first, second = (Checkpoint(Path(f"{name}/checkpoint/1")) for name in ("run", "second"))
    for name in first.names():  # learning rate 0: the weights that came in
        assert torch.equal(first.load(name), second.load(name))
    shutil.rmtree("pretrained")
    assert train(loaded("training.train_iters=2", *settings)) == 0
    with pytest.raises(UserError, match="pretrained does not exist"):
        train(loaded("training.train_iters=2", "run.experiment_dir=third"))


def test_seconds_of_the_phases_add_up_to_the_run() -> None:
    evaluators = "training.evaluators={held_out: {interval: 4, evaluator: {iterations: 2}}}"
    export = "training.export={interval: 6, format: llama}"
    assert train(loaded("training.logs.interval=4", evaluators, export)) == 0
    records = [r for r in lines("run/metrics.jsonl") if "evaluator" not in r]
    events = lines("run/events.jsonl")
    assert [r["iteration"] for r in records] == [4, 8, 12]
    for record in records:
        assert list(record["seconds"]) == list(PHASES)
        assert all(record["seconds"][phase] > 0 for phase in ("data", "forward", "backward", "optimizer"))
    happened = [[phase for phase in PHASES[4:7] if r["seconds"][phase] > 0] for r in records]
    # What is done after a log line belongs to the next: checkpoints 1 3 | 5 7 | 9 11 | 12, exports 6 | 12.
    assert happened == [["checkpoint"], ["checkpoint", "evaluation", "export"], ["checkpoint", "evaluation"]]
    assert (events[0]["event"], events[-1]["event"]) == ("started", "finished")
    assert all(events[-1]["seconds"][phase] > 0 for phase in PHASES[4:7])
    total = sum(sum(r["seconds"].values()) for r in [*records, events[-1]])
    assert total == pytest.approx(events[-1]["time"] - events[0]["time"], abs=0.05)


def test_what_happens_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, {2})
    assert train(loaded("training.train_iters=3")) == 0
    saved = [e for e in lines("run/events.jsonl") if e["event"] == "saved"]
    assert [e["iteration"] for e in saved] == [1, 3]
    parameters = json.loads(Path("run/config.json").read_text())["parameters"]
    # Weights and two moments in fp32, and what describes them.
    assert all(e["bytes"] > 12 * parameters and e["seconds"] > 0 for e in saved)
    for manifest in Path("run/checkpoint/3").glob("manifest.json"):
        manifest.unlink()
    poison(monkeypatch, {1, 2})
    with pytest.raises(RunFailed):
        train(loaded("training.train_iters=5", "training.max_skipped_steps=2"))
    events = [(e["event"], e["iteration"]) for e in lines("run/events.jsonl")]
    # What was begun after iteration 1 is reported when it is over.
    events.remove(("saved", 1))
    assert events == [
        ("started", 0), ("skipped", 2), ("saved", 3), ("finished", 3),
        ("checkpoint_damaged", 3), ("resumed", 1), ("skipped", 2), ("skipped", 3), ("failed", 3),
    ]  # fmt: skip
    assert "2 steps in a row were skipped" in lines("run/events.jsonl")[-1]["text"]


def test_the_folder_says_what_runs_in_it() -> None:
    assert train(loaded("training.train_iters=1")) == 0
    assert train(loaded("training.train_iters=2")) == 0
    description = json.loads(Path("run/config.json").read_text())
    # Embedding; q and o; k and v of one group; feed-forward; norms.
    assert description["parameters"] == 32 * 8 + 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16 + 3 * 8
    assert description["tokens_per_iteration"] == 64
    assert (description["processes"], description["layout"]) == (1, "1 process")
    starts = [e for e in lines("run/events.jsonl") if e["event"] in ("started", "resumed")]
    assert [(e["event"], e["processes"], e["layout"]) for e in starts] == [
        ("started", 1, "1 process"),
        ("resumed", 1, "1 process"),
    ]
    assert description["device"] == "cpu"
    assert description["torch_version"] == torch.__version__
    assert description["config"]["training"]["train_iters"] == 2
    assert description["architecture"]["ffn_hidden_size"] == 16
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_at_any_moment_beside_the_steps_saves(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    beside = run_module._side_work

    def interrupted(run: Any, *args: Any, **kwargs: Any) -> None:
        signalled = run.progress.iteration == 3
        if signalled and moment == "before":
            run.stop.heard = signal.SIGTERM
        beside(run, *args, **kwargs)
        if signalled:
            run.stop.heard = signal.SIGTERM

    monkeypatch.setattr(run_module, "_side_work", interrupted)
    assert train(loaded("training.export={interval: 1, format: llama}")) == 128 + signal.SIGTERM
    assert Checkpoint(Path("run/checkpoint/3")).iteration == 3
    assert Path("run/export/llama/3").exists() is (moment == "after")


EVALUATOR = "training.evaluators={held_out: {interval: 4, evaluator: {iterations: 2}}}"


def evaluated(*overrides: str) -> float:
    """The evaluator's loss on initial weights."""
    folder = f"evaluated-{len(list(Path().glob('evaluated-*')))}"
    assert train(loaded(EVALUATOR, "training.train_iters=0", f"run.experiment_dir={folder}", *overrides)) == 0
    return next(r["loss"] for r in lines(f"{folder}/metrics.jsonl") if "evaluator" in r)


def test_evaluators_leave_the_z_loss_out_and_keep_the_scale_of_the_logits() -> None:
    plain = evaluated()
    assert evaluated("model.base_model.logit_z_loss=0.1") == plain
    assert evaluated("model.base_model.logits_scale_factor=8") > plain + 0.5


def test_the_scale_of_the_logits_is_the_models_own() -> None:
    run = new_run("model.base_model.logits_scale_factor=8")
    hidden = torch.randn(3, 8)
    plain = hidden @ run.model.output_weight.T
    torch.testing.assert_close(run.model.logits(hidden), 8 * plain)
    with pytest.raises(UserError, match="format llama has no factor on the logits"):
        loaded("model.base_model.logits_scale_factor=8", "training.export={interval: 4, format: llama}")


def test_the_mean_over_a_log_interval_is_that_of_a_run_never_stopped() -> None:
    keys = ("training.logs={interval: 5, tensorboard: no}", "training.checkpoint.interval=1")
    assert train(loaded(*keys)) == 0
    whole = {r["iteration"]: r["loss_mean"] for r in lines("run/metrics.jsonl")}
    assert train(loaded("run.experiment_dir=every")) == 0
    every = [r["loss"] for r in lines("every/metrics.jsonl")]
    assert whole[5] == pytest.approx(sum(every[:5]) / 5, rel=1e-12)

    stops = "training.shutdown={interval: 3}"  # after 3, 6 and 9, each within a log interval
    for _ in range(4):
        assert train(loaded(*keys, stops, "run.experiment_dir=parts")) == 0
    assert {r["iteration"]: r["loss_mean"] for r in lines("parts/metrics.jsonl")} == whole


def test_data_that_cannot_be_read_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelyard.data.stream import DataStream, Share

    batch = DataStream.batch

    def broken(stream: DataStream, index: int, share: Share) -> Any:
        if index == 6:
            raise UserError("store: document 7 has token 99")
        return batch(stream, index, share)

    monkeypatch.setattr(DataStream, "batch", broken)
    with pytest.raises(UserError, match="document 7 has token 99"):
        train(loaded("training.checkpoint.interval=null"))
    assert Checkpoint(Path("run/checkpoint/6")).iteration == 6


def test_an_export_stays_until_its_successor_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("training.export={interval: 4, format: llama, on_error: continue}")
    Path("run").mkdir()
    run.events.open(Path("run/events.jsonl"))
    run.progress.iteration = 4
    run.export(replace=True)
    before = Path("run/export/llama/4/model.safetensors").read_bytes()
    monkeypatch.setattr("modelyard.train.export.export_weights", _full)
    run.export(replace=True)
    assert Path("run/export/llama/4/model.safetensors").read_bytes() == before
    assert lines("run/events.jsonl")[-1]["event"] == "save_failed"


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_computes_with_the_kernels_that_its_config_names(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(kernels, "choose", chosen.append)
    new_run()
    monkeypatch.setattr(kernels, "obstacle", lambda: None)
    new_run("training.kernels=triton")
    assert chosen == ["torch", "triton"]
    monkeypatch.setattr(kernels, "obstacle", lambda: "a CUDA device, and there is none")
    with pytest.raises(UserError, match=r"^training\.kernels: triton needs a CUDA device, and there is none"):
        new_run("training.kernels=triton")
    assert chosen == ["torch", "triton"]
