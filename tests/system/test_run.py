"""The main job as a user does it: prepare → train → kill → resume → evaluate → export → generate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.system.conftest import environment, modelyard


def records(project: Path, run: str = "run") -> list[dict]:
    return [json.loads(line) for line in (project / run / "metrics.jsonl").read_text().splitlines()]


def losses(project: Path, run: str = "run") -> dict[tuple, float]:
    """Every logged loss by (iteration, evaluator or None)."""
    return {(r["iteration"], r.get("evaluator")): r["loss"] for r in records(project, run)}


@pytest.fixture(scope="session")
def whole_run(prepared: Path) -> Path:
    """The run that nobody stops: the truth for all the others."""
    done = modelyard("train", "train.yaml", cwd=prepared)
    assert done.status == 0, done.out + done.err
    return prepared


def test_training_writes_what_it_says(whole_run: Path) -> None:
    lines = [r for r in records(whole_run) if "evaluator" not in r]
    assert [r["iteration"] for r in lines] == list(range(1, 13))
    needed = {"iteration", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert all(needed <= r.keys() for r in lines)
    assert [r["tokens"] for r in lines] == [128 * i for i in range(1, 13)]
    # Step 1 of a warm-up of 2 to 3e-3; the cosine ends at the minimum.
    assert lines[0]["learning_rate"] == pytest.approx(1.5e-3)
    assert lines[-1]["learning_rate"] == pytest.approx(3e-4)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    evaluations = [(r["iteration"], r["evaluator"]) for r in records(whole_run) if "evaluator" in r]
    assert evaluations == [(4, "validation"), (8, "validation"), (12, "validation")]
    assert sorted(p.name for p in (whole_run / "run" / "checkpoint").iterdir()) == ["12", "9"]
    assert sorted(p.name for p in (whole_run / "run" / "export" / "llama").iterdir()) == ["12", "6"]


def test_export_loads_in_transformers_and_greedy_text_is_equal(whole_run: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = whole_run / "run" / "export" / "llama" / "12"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    prompt = "import json"
    start = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    out = model.generate(torch.tensor([start]), max_new_tokens=12, do_sample=False)[0, len(start) :].tolist()

    done = modelyard(
        "generate",
        folder,
        "--prompt",
        prompt,
        "--max-new-tokens",
        12,
        "--temperature",
        0,
        "--json",
        cwd=whole_run,
    )
    assert done.status == 0, done.err
    (line,) = done.out.splitlines()
    ours = json.loads(line)
    assert ours["prompt"] == prompt
    eos = model.generation_config.eos_token_id
    assert ours["token_ids"] == [token for token in out if token != eos]


def test_evaluate_repeats_the_loss_of_training(whole_run: Path) -> None:
    done = modelyard("evaluate", "train.yaml", "--json", cwd=whole_run)
    assert done.status == 0, done.err
    (line,) = done.out.splitlines()
    assert json.loads(line)["loss"] == losses(whole_run)[12, "validation"]


def checkpoint_bytes(folder: Path) -> dict[str, np.ndarray]:
    from modelyard.train.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    return {name: checkpoint.load(name).numpy() for name in checkpoint.names()}


def assert_same_run(project: Path, truth: Path) -> None:
    assert losses(project) == losses(truth)
    ours, theirs = (checkpoint_bytes(p / "run" / "checkpoint" / "12") for p in (project, truth))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name])


def test_stopping_and_extending_gives_the_same_run(project: Path, whole_run: Path) -> None:
    """Five iterations (no checkpoint on the interval), then the rest: more iterations need no word."""
    assert modelyard("train", "train.yaml", "training.train_iters=5", cwd=project).status == 0
    done = modelyard(
        "train", "train.yaml", "training.checkpoint.keep=3", "batch.micro_batch_size=2", cwd=project
    )
    assert done.status == 0, done.err
    assert "resuming from" in done.out
    kept = losses(project)
    del kept[5, "validation"]  # The evaluation at what was the end then.
    truth = losses(whole_run)
    assert kept == truth


@pytest.mark.parametrize("moment", ["step", "save"])
def test_kill_9_and_resume_is_bit_identical(project: Path, whole_run: Path, moment: str) -> None:
    slow = (
        ""
        if moment == "step"
        else "import modelyard.files as f; s = f.sha256; f.sha256 = lambda p: (time.sleep(1), s(p))[1]\n"
    )
    program = (
        "import sys, time\n" + slow + "from modelyard.cli import main\n"
        "raise SystemExit(main(['train', 'train.yaml', 'training.checkpoint.interval=3']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    if moment == "step":
        for line in process.stdout:
            if line.startswith("iteration 7/"):
                break
    else:
        unfinished = project / "run" / "checkpoint" / "3.tmp" / ".metadata"
        deadline = time.monotonic() + 60
        while not unfinished.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    if moment == "save":
        assert not (project / "run" / "checkpoint" / "3").exists()

    done = modelyard("train", "train.yaml", cwd=project)
    assert done.status == 0, done.err
    assert_same_run(project, whole_run)


def test_sigterm_saves_and_leaves_and_the_run_goes_on(project: Path, whole_run: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "modelyard", "train", "train.yaml"],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("iteration 4/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: saving" in rest
    assert "the same command goes on from there" in rest
    assert modelyard("train", "train.yaml", cwd=project).status == 0
    assert_same_run(project, whole_run)


def test_a_change_of_what_was_trained_is_refused_with_the_difference(project: Path) -> None:
    assert modelyard("train", "train.yaml", "training.train_iters=3", cwd=project).status == 0
    done = modelyard(
        "train",
        "train.yaml",
        "optimizer.weight_decay=0.2",
        "optimizer.learning_rate.warmup_iterations=5",
        cwd=project,
    )
    assert done.status == 2
    assert "optimizer.weight_decay: was 0.1, is now 0.2" in done.err
    assert "optimizer.learning_rate: at step 1 of the 3 already taken it was 0.0015" in done.err
    assert "--force" in done.err
    forced = modelyard(
        "train", "train.yaml", "optimizer.weight_decay=0.2", "training.train_iters=4", "--force", cwd=project
    )
    assert forced.status == 0, forced.err
    assert "forced: optimizer.weight_decay: was 0.1, is now 0.2" in forced.out


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(project: Path, whole_run: Path) -> None:
    assert modelyard("train", "train.yaml", "training.train_iters=6", cwd=project).status == 0
    data = next((project / "run" / "checkpoint" / "6").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    done = modelyard("train", "train.yaml", cwd=project)
    assert done.status == 0, done.err
    assert "checkpoint/6 is damaged" in done.out
    assert "resuming from run/checkpoint/3" in done.out
    truth, ours = losses(whole_run), losses(project)
    assert {key: ours[key] for key in truth} == truth


def test_misspelt_key_missing_file_and_small_vocabulary_answer_in_one_line(project: Path) -> None:
    for words, expected in (
        (("train", "train.yaml", "trainig.train_iters=3"), "did you mean 'training'"),
        (("train", "nowhere.yaml"), "nowhere.yaml does not exist"),
        (("train", "train.yaml", "model.base_model.vocab_size=100"), "vocab"),
    ):
        done = modelyard(*words, cwd=project)
        assert done.status == 2, done.out + done.err
        assert expected in done.err
        assert len(done.err.strip().splitlines()) == 1, done.err
        assert not (project / "run" / "checkpoint").exists()


def test_a_run_that_diverges_stops_with_a_clear_line_and_keeps_its_checkpoint(project: Path) -> None:
    done = modelyard(
        "train",
        "train.yaml",
        "optimizer.learning_rate={base: 1e36}",
        "training.checkpoint.interval=1",
        "training.max_skipped_steps=3",
        cwd=project,
    )
    assert done.status == 1
    (line,) = done.err.strip().splitlines()
    assert line.startswith("error: 3 steps in a row were skipped")
    assert "the step is skipped, weights untouched (3 in a row, the run stops at 3)" in done.out
    kept = sorted(int(p.name) for p in (project / "run" / "checkpoint").iterdir())
    assert kept, done.out
    # What the run kept can be gone on from: the counters of skipped steps included.
    from modelyard.train.checkpoint import Checkpoint

    progress = Checkpoint(project / "run" / "checkpoint" / str(kept[-1])).state["progress"]
    assert progress["iteration"] == kept[-1]
    assert progress["skipped_steps"] == progress["skipped_in_a_row"] <= 2


def test_guides_files_validate_as_printed(tmp_path: Path, shared: Path) -> None:
    """Each file of the guides through the program; the parts merged with their train file."""
    configs = shared / "configs"
    for names, expected in (
        (["llama-3.1-8b-train", "llama-3.1-8b-architecture-part"], "8,030,261,248"),
        (["qwen-2.5-7b-train", "qwen-2.5-7b-architecture-part"], "7,615,616,512"),
        (
            ["llama-3.1-8b-train", "llama-3.1-8b-pretrained-part"],
            "unknown until fast-llm-tutorial/pretrained_model",
        ),
        (
            ["qwen-2.5-7b-train", "qwen-2.5-7b-pretrained-part"],
            "unknown until fast-llm-tutorial/pretrained_model",
        ),
        (["llama-3.1-8b-continue"], "unknown until fast-llm-tutorial/pretrained-model"),
        (["llama-3.1-8b-sft"], "unknown until sft-tutorial/Llama-3.1-8B"),
        (["sft-prepare"], "loss_masking_spans: spans"),
    ):
        done = modelyard("validate", *(configs / f"{name}.yaml" for name in names), cwd=tmp_path)
        assert done.status == 0, (names, done.err)
        assert expected in done.out, names
    alone = modelyard("validate", configs / "llama-3.1-8b-train.yaml", cwd=tmp_path)
    assert alone.status == 2
    assert "no architecture is given" in alone.err
    assert list(tmp_path.iterdir()) == []
