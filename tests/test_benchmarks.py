"""The benchmark scripts, at toy sizes: they run, and what they compare is the same."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contenders import Case, Contender, build

ROOT = Path(__file__).resolve().parent.parent


def test_gpu_script_needs_torch_alone() -> None:
    program = (
        "import runpy, sys\n"
        "for name in ('pydantic', 'transformers', 'datasets', 'yaml', 'safetensors', 'tokenizers', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['gpu.py', '--cpu']\n"
        "runpy.run_path('benchmarks/gpu.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "8 passed, 0 failed"


def test_speed_page_shows_the_results_that_are_there() -> None:
    from benchmarks.tables import BEGIN, END, PAGE, page

    written = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written.strip() == page().strip()


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.sft_programs import checksum

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    talks = [json.loads(line)["messages"] for line in (folder / "talks.jsonl").open()]
    losses = []
    for rows in steps:
        model.zero_grad()
        total, count = torch.zeros(()), 0
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
            logits = model(ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            count += int((labels[1:] != -100).sum())
        (total / count).backward()
        losses.append(float(total.detach() / count))
    return losses, float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))


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
