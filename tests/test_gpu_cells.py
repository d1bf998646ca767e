"""What `make gpu` measures: its cells, its results, and the budget beside it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.budget import BUILT_IN, FUSED, budget_of, page, with_measured
from benchmarks.gpu_cells import CHECKS, CHIP, FP8, LIMIT, PARTS, PEERS, Cell, layers_of, planned
from benchmarks.gpu_programs import measure
from modelyard.plan.hardware import load_hardware

ROOT = Path(__file__).resolve().parent.parent
EVERY = [cell for cells in PARTS.values() for cell in cells]
CPU = torch.device("cpu")


def test_every_part_has_its_time() -> None:
    assert len(PARTS[0]) <= 10
    for number, cells in PARTS.items():
        assert sum(cell.seconds for cell in cells) + (CHECKS + CHIP if number == 0 else CHIP) <= LIMIT
    keys = [cell.key for cell in EVERY]
    assert len(set(keys)) == len(keys)
    assert {cell.sequence for cell in EVERY} == {4096, 8192, 32768}
    assert {cell.shape for cell in EVERY} == {
        "llama-3.2-1b", "llama-3.1-8b", "qwen-2.5-7b", "dmas-1.7b", "smollm2-135m"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "millions"),
    # The models' own counts of parameters: Hugging Face, and what docs of DMaS-LLaMa-Lite's code come to.
    [("llama-3.2-1b", 1235.8), ("llama-3.1-8b", 8030.3), ("qwen-2.5-7b", 7615.6), ("dmas-1.7b", 1716.1), ("smollm2-135m", 134.5)],
)  # fmt: skip
def test_shapes_are_those_models(shape: str, millions: float) -> None:
    from benchmarks.gpu_cells import SHAPES

    assert SHAPES[shape].parameter_count() / 1e6 == pytest.approx(millions, abs=0.06)


def test_as_many_layers_as_fit() -> None:
    cell = Cell("llama-3.1-8b", "compiled", 2, 4096, layers="fit")
    layers = layers_of(cell, 139 << 30)
    assert planned(cell, layers, None)["peak_bytes"] <= 0.9 * (139 << 30)
    assert planned(cell, layers + 1, None)["peak_bytes"] > 0.9 * (139 << 30)
    with pytest.raises(ValueError, match="no layer"):
        layers_of(cell, 8 << 30)
    # Everything else of the list has room in an H200, as planned.
    for cell in EVERY:
        if cell.program not in (*PEERS, *FP8):
            assert planned(cell, layers_of(cell, 139 << 30), None)["peak_bytes"] < 0.95 * (139 << 30), (
                cell.key
            )


@pytest.mark.parametrize("documents", [1, 16])
@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen-2.5-7b"])
def test_programs_compute_the_same(shape: str, documents: int) -> None:
    pytest.importorskip("transformers")
    rows = []
    for program in ("eager", "transformers", "fp8 tensorwise compiled"):
        cell = Cell(shape, program, 2, 8192, documents=documents).rehearsed()
        row = measure(cell, 2, CPU, end=0.0)
        assert "failed" not in row, row
        rows.append(row)
    ours, theirs, narrow = rows
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)
    assert ours["loss"] == pytest.approx(narrow["loss"], rel=2e-2)
    assert ours["loss"] != narrow["loss"]
    assert ours["last_loss"] < ours["loss"]


def test_a_cell_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("llama-3.1-8b", "triton compiled", 2, 4096)
    monkeypatch.setattr("modelyard.kernels.obstacle", lambda: "a CUDA device, and there is none")
    assert measure(cell, 1, CPU, 0.0) == {
        "failed": "the kernels in Triton need a CUDA device, and there is none"
    }

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr("benchmarks.gpu_programs.ours", full)
    assert measure(cell, 1, CPU, 0.0)["failed"] == "out of memory: CUDA out of memory. Tried"


def test_results_are_added_to_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that was stopped measures what is left; what had no time is tried again, what cannot be is not."""
    options = argparse.Namespace(cpu=False, fresh=False, again=False, folder=str(tmp_path), processes=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    cells = [Cell("toy", "eager", rows, 64) for rows in (1, 2, 3)]
    asked = []

    def answer(self: gpu.Part, task: str, seconds: float) -> dict[str, Any]:
        asked.append(task)
        if task.startswith("cell:toy, 2"):
            return {"failed": "out of memory: no"}
        if task.startswith("cell:toy, 3"):
            return {"failed": gpu.TOO_LONG}
        return {
            "tokens_per_second": 1.0,
            "peak_bytes": 1,
            "loss": 1.0,
            "grad_norm": 1.0,
            "layers": 2,
            "planned": {},
        }

    monkeypatch.setattr(gpu.Part, "ask", answer)
    for _ in range(2):
        gpu.Part(options, CPU).cells(cells)
    assert asked == [f"cell:{cell.key}" for cell in (*cells, cells[2])]
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("h200-")
    text = gpu.table(json.loads(path.read_text()))
    assert "out of memory: no" in text
    assert gpu.file_of("NVIDIA H200", tmp_path, fresh=False) == path
    assert gpu.file_of("NVIDIA A100-SXM4-80GB", tmp_path, fresh=False).name.startswith("a100-")


def test_another_result_is_told() -> None:
    row = {"model": "m", "program": "eager", "layers": 2, "loss": 2.0, "grad_norm": 1.0}
    rows = {"a": row}
    assert gpu.disagreement({**row, "loss": 2.03}, rows) is None
    assert gpu.disagreement({**row, "loss": 2.1}, rows) == "another loss: 2.1000, not 2.0000"
    assert gpu.disagreement({**row, "grad_norm": 1.05, "program": FP8[0]}, rows) is None
    assert gpu.disagreement({**row, "grad_norm": 1.05}, rows) == "another grad_norm: 1.0500, not 1.0000"
    assert gpu.disagreement({**row, "loss": 9.0, "layers": 3}, rows) is None


# --- the budget -----------------------------------------------------------------------------------------------------


def test_budget_by_hand() -> None:
    """Four layers of Llama-3.1-8B on two rows of 4,096 tokens."""
    rows = budget_of(BUILT_IN["llama-3.1-8b, 4 layers"], load_hardware("h200"))
    tokens, layers = 8192, 4
    feed_forward = 6 * tokens * 3 * 4096 * 14336 * layers
    assert rows["feed-forward"]["flops"] == feed_forward
    assert rows["feed-forward"]["floor_ms"] == pytest.approx(1e3 * feed_forward / 788e12)
    projections = 6 * tokens * 4096 * (2 * 4096 + 2 * 1024) * layers
    assert rows["projections"]["flops"] == projections
    parameters = BUILT_IN["llama-3.1-8b, 4 layers"].architecture.parameter_count()
    assert (
        rows["optimizer"]["bytes"] == 28 * parameters
    )  # master, gradient and two moments read, all but one written
    assert rows["optimizer"]["floor_ms"] == pytest.approx(1e3 * 28 * parameters / 4.3e12)
    assert FUSED in rows
    measured = with_measured(rows, {("head", "forward"): 0.05, ("new", "backward"): 0.001})
    assert measured["head"]["measured_ms"] == 50
    assert measured["new"]["floor_ms"] == 0


def test_budget_of_a_config_measured(tmp_path: Path) -> None:
    """The profiler's time is found in the parts that the model has, and little of it in none."""
    from benchmarks.budget_measured import measured_step

    for name, compiled in (("eager", False), ("compiled", True)):
        import dataclasses

        workload = dataclasses.replace(BUILT_IN["toy"], compiled=compiled, dtype="bfloat16")
        found = measured_step(workload, 1, backend="aot_eager")
        parts = {part for part, _ in found.parts}
        expected = {
            "projections", "feed-forward", "attention", "head", "loss", "embedding", "optimizer", "publish",
            "gradient accumulation", "gradient norm and scale",
            *((FUSED,) if compiled else ("norms", "rotary", "activation", "residual")),
        }  # fmt: skip
        assert expected <= parts, name
        # What torch does for itself (`step`: Python between operations) is not an operation of the model.
        unattributed = {op: s for op, s in found.unattributed.items() if op.startswith("aten::")}
        assert sum(unattributed.values()) < 0.1 * found.profiled, unattributed
        both = (
            "projections",
            "feed-forward",
            "attention",
            *((FUSED,) if compiled else ("norms", "rotary", "activation")),
        )
        for part in both:
            assert found.parts[part, "forward"] > 0
            assert found.parts[part, "backward"] > 0
        assert not any(phase == "recompute" for _, phase in found.parts)


def test_operations_belong_to_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what only one part does, forward and backward."""
    from benchmarks import budget_measured as measured

    kept: list[Any] = []
    monkeypatch.setattr(measured, "attribute", lambda events, *rest, **how: kept.append(events) or ({}, {}))
    measured.measured_step(BUILT_IN["toy"], 1)
    makers = measured._makers(list(kept[0]))
    only = {
        "aten::silu": "activation",
        "aten::silu_backward": "activation",
        "aten::embedding_dense_backward": "embedding",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
        "_RMSNormBackward": "norms",
        "_RotateBackward": "rotary",
        "aten::_fused_adamw_": "optimizer",
    }
    seen = set()
    for event in kept[0]:
        part, phase = measured._owner(event, makers)
        if event.name in only:
            assert part == only[event.name], event.name
            seen.add(event.name)
        if event.name == "aten::mm" and phase == "backward":
            assert part in ("projections", "feed-forward")
    assert seen == set(only)


def test_budget_on_the_command_line() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "benchmarks/budget.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = run("examples/train-tiny.yaml", "batch.batch_size=16", "--json")
    (case,) = json.loads(done.stdout).values()
    assert case["flops"] == pytest.approx(67e12 * 0.728)  # fp32, of which nobody measured a ceiling
    assert run("nothing.yaml").returncode == 2
    assert "--measure" in run("toy", "--measure").stderr


def test_page_shows_the_budget() -> None:
    results = ROOT / "benchmarks" / "results" / "budget.json"
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    begin = text.index("-->", text.index("<!-- budget: ")) + 3
    written = text[begin : text.index("<!-- end of budget -->")]
    assert written.strip() == page(json.loads(results.read_text(encoding="utf-8"))).strip()
