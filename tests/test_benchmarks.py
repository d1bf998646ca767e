"""The benchmark scripts, at toy sizes: they run, and what they compare is the same."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.contenders import Case, Contender, build

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


def test_gpu_script_needs_torch_alone(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        "for name in ('pydantic', 'transformers', 'datasets', 'yaml', 'safetensors', 'tokenizers', 'rich'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = ['gpu.py', '--cpu', '--part', '0', '--folder', {str(tmp_path)!r}]\n"
        "runpy.run_path('benchmarks/gpu.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("18 passed, 0 failed")
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    failed = {name: row["failed"] for name, row in found["cells"].items() if "failed" in row}
    assert set(failed.values()) == {"transformers is not installed"}
    assert len(found["cells"]) == 10
    assert len(failed) == 2


@pytest.mark.parametrize("name", ["speed.md", "performance.md"])
def test_pages_show_the_results_that_are_there(name: str) -> None:
    from benchmarks.tables import BEGIN, DOCS, END, page

    written = (DOCS / name).read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written.strip() == page(name).strip()


@pytest.mark.parametrize("documents", [1, 3])
def test_contenders_compute_the_same(documents: int) -> None:
    case = Case("modelyard", vocabulary=300, rows=2, sequence=24, documents=documents, hidden=64, layers=2)
    steps = {name: build(dataclasses.replace(case, contender=name)) for name in ("modelyard", "transformers")}
    for _ in range(2):
        found = {name: step() for name, step in steps.items()}
        assert found["modelyard"] == pytest.approx(found["transformers"], rel=1e-4)


def test_documents_of_a_case_fill_its_rows() -> None:
    assert Case("", sequence=24, documents=3).lengths() == [4, 8, 12]
    alone = Case("", rows=1, sequence=24, documents=3).batch()
    assert alone.input_ids.min() >= 0  # the labels' -100 are not the inputs'
    batch = Case("", rows=2, sequence=24, documents=3).batch()
    assert batch.cu_seqlens.tolist() == [[0, 4, 12, 24]] * 2
    assert batch.num_targets == 2 * 21
    assert batch.positions[0, :6].tolist() == [0, 1, 2, 3, 0, 1]


def test_a_contender_answers_from_its_own_process() -> None:
    contender = Contender(Case("modelyard", vocabulary=300, rows=1, sequence=16, hidden=64, layers=1))
    try:
        first = contender.ask("warm up")
        second = contender.ask("step")
        assert second["loss"] < first["loss"]
        assert contender.ask("memory")["peak_bytes"] > 0
    finally:
        contender.close()


def test_fine_tuning_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of our half on packed conversations, against transformers on each conversation alone, tokens and answers as
    its own chat template finds them."""
    from benchmarks import sft

    monkeypatch.setattr(sft, "SHARED", tmp_path / "absent")
    case = sft.Case("32k", rows=2, sequence=512, hidden=64, layers=2, vocabulary=600, talks=150, threads=1)
    result = sft.measure(case, tmp_path, [], 2, sys.executable, compiled=False)
    row = result["rows"]["modelyard"]
    assert row["difference"] == 0
    assert row["tokens_per_second"] > row["trained_per_second"] > 0
    assert row["peak_bytes"] > 2**26

    schedule = json.loads((tmp_path / "schedule.json").read_text())
    assert max(map(len, schedule["steps"][0])) > 1  # several in a row
    losses, norm = transformers_steps(tmp_path, schedule["steps"][:1], schedule)
    assert row["loss"][0] == pytest.approx(losses[0], rel=1e-5)
    assert row["grad_norm"][0] == pytest.approx(norm, rel=1e-4)


def transformers_steps(
    folder: Path, steps: list[list[list[int]]], schedule: dict
) -> tuple[list[float], float]:
    """Loss of each step and the norm of the last one's gradient."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    losses = []
    for rows in steps:
        model.zero_grad()
        total, count = torch.zeros(()), 0
        for ids, labels in conversations_of(folder, rows, schedule):
            logits = model(ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            count += int((labels[1:] != -100).sum())
        (total / count).backward()
        losses.append(float(total.detach() / count))
    return losses, float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))


def conversations_of(folder: Path, rows: list[list[int]], schedule: dict) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of a step's conversations, as their own chat template makes them; asserts that ours are the same."""
    import torch
    from transformers import AutoTokenizer

    from benchmarks.sft_programs import checksum

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    talks = [json.loads(line)["messages"] for line in (folder / "talks.jsonl").open()]
    for number in (number for row in rows for number in row):
        made = tokenizer.apply_chat_template(
            talks[number],
            chat_template=(folder / "talks.jinja").read_text(),
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        ids = torch.tensor(made["input_ids"])
        labels = ids.where(torch.tensor(made["assistant_masks"]) == 1, -100)
        assert schedule["lengths"][number] == len(ids)
        assert schedule["ids"][number] == checksum(ids.tolist())
        assert schedule["labels"][number] == checksum(labels.tolist())
        yield ids, labels


def test_adapter_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our half of finetune.py with an adapter, over a plain base and one in NF4, against PEFT over transformers: loss and
    gradient norm of the first step on the same conversations, each alone."""
    from benchmarks import finetune, sft

    monkeypatch.setattr(sft, "SHARED", tmp_path / "absent")
    case = dataclasses.replace(finetune.quick_case(1), hidden=64, sequence=256)
    found = finetune.measure(case, tmp_path, ["lora", "qlora"], 1, None, compiled=False)
    schedule = json.loads((tmp_path / "schedule.json").read_text())
    for method, result in found["methods"].items():
        row = result["rows"]["modelyard"]
        assert row["memory_bytes"] == row["peak_bytes"] - row["imports_bytes"] > 0
        least = result["floor"]
        assert least["tokens"] == sum(
            schedule["lengths"][talk] for talks in schedule["steps"][1] for talk in talks
        )
        assert result["eager_of_floor"] == pytest.approx(
            least["tokens"] / sum(least[part] for part in finetune.PARTS) / row["tokens_per_second"]
        )
        loss, norm = peft_step(tmp_path, schedule, quantized=method == "qlora")
        assert row["loss"][0] == pytest.approx(loss, rel=1e-5)
        assert row["grad_norm"][0] == pytest.approx(norm, rel=1e-4)


def peft_step(folder: Path, schedule: dict, *, quantized: bool) -> tuple[float, float]:
    """Loss of the first step and the norm of its gradient; a quantized base as the reference formula has it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from modelyard.model.nf4 import dequantize, quantize

    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if quantized:
        for name, parameter in base.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.data = dequantize(quantize(parameter.data), torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    total, count = torch.zeros(()), 0
    for ids, labels in conversations_of(folder, schedule["steps"][0], schedule):
        logits = model(ids[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    (total / count).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    return float(total.detach() / count), float(torch.nn.utils.clip_grad_norm_(trained, float("inf")))


def test_longest_length_that_fits() -> None:
    """Memory of 5,000 + 7 a token, and a bit that grows with the square: within 3% of the end, in few trials."""
    from benchmarks.finetune_gpu import longest

    for limit in (100_000, 3_000_000):
        tried = []

        def memory_at(length: int, limit: int = limit, tried: list[int] = tried) -> int | None:
            tried.append(length)
            taken = 5000 + 7 * length + length * length // 1_000_000
            return taken if taken <= limit else None

        found = longest(memory_at, limit, 2048, 256)
        assert found % 256 == 0
        assert memory_at(found) is not None
        assert memory_at(max(found + 256, found + found // 33)) is None
        assert len(tried) <= 14
    assert longest(lambda length: None, 1, 2048, 256) == 0
    assert longest(lambda length: 1 if length < 3000 else None, 10, 2048, 256) == 2816


def test_gpu_script_of_fine_tuning_needs_torch_alone() -> None:
    program = (
        "import runpy, sys\n"
        "for name in ('pydantic', 'transformers', 'datasets', 'yaml', 'safetensors', 'tokenizers', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['finetune_gpu.py', '--cpu', '--no-peers']\n"
        "runpy.run_path('benchmarks/finetune_gpu.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "rehearsed"
    assert done.stdout.count("192 tokens, 4 trials") == 3


def test_a_peer_that_is_missing(tmp_path: Path) -> None:
    from benchmarks.sft import peer_versions

    assert peer_versions("false") is None
    assert peer_versions(str(tmp_path / "python")) is None


def test_how_a_peer_may_lay_out_a_step() -> None:
    from benchmarks.sft_programs import FORMS

    rows, lengths = [[0, 1, 2], [3, 4]], [5, 30, 10, 40, 15]
    assert FORMS["TRL padded"].divide(rows, lengths) == [[0, 1, 2, 3, 4]]
    assert FORMS["TRL padding-free"].divide(rows, lengths) == rows
    assert FORMS["TRL padded by length"].divide(rows, lengths) == [[3], [1], [4], [2, 0]]
    with pytest.raises(ValueError, match="5 conversations"):
        FORMS["TRL padded by length, 8"].divide(rows, lengths)


def test_generated_conversations_are_as_long_as_real_ones(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quarters of the words of questions and answers, within a third."""
    from benchmarks import sft

    real = list(sft._real(shared / "data" / "instruct"))
    generated = list(sft._generated(2000))
    for place in (0, 1):
        found = [
            statistics.quantiles([len(talk[place]["content"].split()) for talk in talks], n=4)
            for talks in (real, generated)
        ]
        assert found[1] == pytest.approx(found[0], rel=0.33)
