"""The benchmark scripts, at toy sizes: they run, and what they compare is the same."""

from __future__ import annotations

import dataclasses
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
