"""Does a model learn in fp8 what it learns in bf16? The same model, seed and batches, 1,000 steps on real text.

    python benchmarks/fp8_parity.py [--steps 1000] [--jobs 2] [--write-docs]

The text is the source of Python's own standard library, as bytes: every installation has it. Trained are bf16, fp8 tensorwise
and fp8 rowwise, and, so that a difference has something to be measured by, fp32. All by the program's own step and optimizer. On a CPU the products in fp8 are emulated: the same rounding, sums in fp32.

Prints and writes to benchmarks/results/fp8_parity.json, and with `--write-docs` to docs/fp8.md: the mean of the last 100 losses,
its distance from bf16's, the largest distance anywhere between means of 100 steps, and the loss on files that were not trained
on, computed in bf16 as whoever takes the model would. Twelve minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.common import put_into, write_result  # noqa: E402
from modelyard.config.architecture import Architecture, Rotary  # noqa: E402
from modelyard.data.batch import Batch  # noqa: E402
from modelyard.model.decoder import Decoder  # noqa: E402
from modelyard.model.init import InitStd, initialize  # noqa: E402
from modelyard.parallel.apply import parallelize  # noqa: E402
from modelyard.parallel.mesh import alone  # noqa: E402
from modelyard.train.optimizer import Optimizer  # noqa: E402
from modelyard.train.step import LossOptions, head_loss, train_step  # noqa: E402

DOCS = ROOT / "docs" / "fp8.md"
SHAPE = Architecture(
    vocab_size=256,
    hidden_size=128,
    num_layers=5,
    num_attention_heads=4,
    head_groups=2,
    head_size=32,
    ffn_hidden_size=384,
    tie_word_embeddings=False,
    norm_epsilon=1e-5,
    activation="silu",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    rotary=Rotary(),
    window_size=None,
    max_position_embeddings=128,
)
ROWS, LENGTH = 4, 128
RATE, WARMUP, WINDOW = 2e-3, 50, 100
RUNS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8 tensorwise": {"fp8": "tensorwise"},
    "fp8 rowwise": {"fp8": "rowwise"},
    "fp32": {"dtype": torch.float32},
}


def text(*, held_out: bool) -> Tensor:
    """The bytes of the standard library's modules [bytes], every twentieth of them held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    kept = [path for number, path in enumerate(files) if (number % 20 == 0) == held_out]
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in kept)), dtype=torch.uint8)


def batch_of(data: Tensor, step: int) -> Batch:
    """The rows of one step, drawn by its number."""
    draw = random.Random(f"rows of step {step}")
    starts = [draw.randrange(len(data) - LENGTH - 1) for _ in range(ROWS)]
    rows = torch.stack([data[start : start + LENGTH + 1] for start in starts]).long()
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    return Batch(rows[:, :-1], rows[:, 1:], positions, torch.tensor([[0, LENGTH]] * ROWS, dtype=torch.int32))


def rate_at(step: int, steps: int) -> float:
    """Linear up, linear down to a tenth."""
    return RATE * min((step + 1) / WARMUP, 1 - 0.9 * step / steps)


def train(name: str, steps: int, *, fp8: Any = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """One run: its losses, gradient norms, seconds, and loss on what was held out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    std = InitStd.for_architecture(SHAPE)
    run = parallelize(
        SHAPE,
        alone(device),
        compute_dtype=dtype,
        recompute="none",
        compile=device.type == "cuda",
        sequence_length=LENGTH,
        fill=lambda model, write: initialize(model, 0, std, write=write),
        fp8=fp8,
    )
    run.weights.publish()
    optimizer = Optimizer(run.weights.master, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    data, losses, norms, skipped = text(held_out=False), [], [], 0
    begin = time.perf_counter()
    for step in range(steps):
        result = train_step(
            run.model,
            run.weights,
            optimizer,
            batch_of(data, step),
            learning_rate=rate_at(step, steps),
            micro_batch_size=ROWS,
            max_norm=1.0,
            loss_options=LossOptions(),
            device=device,
        )
        losses.append(round(result.loss, 5))
        norms.append(result.grad_norm)
        skipped += result.skipped is not None
        if step % 100 == 99:
            print(f"{name}: {step + 1} steps, loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    seconds = time.perf_counter() - begin
    return {
        "losses": losses,
        "held_out": held_out_loss(run.models[0], device),
        "mean_gradient_norm": sum(norms[-WINDOW:]) / len(norms[-WINDOW:]),
        "skipped": skipped,
        "seconds": round(seconds, 1),
    }


@torch.no_grad()
def held_out_loss(model: Decoder, device: torch.device, batches: int = 40) -> float:
    """Mean loss over rows of the files that were not trained on, in nats a byte."""
    data, total = text(held_out=True), 0.0
    for step in range(batches):
        batch = batch_of(data, step).to(device)
        hidden = model(batch.input_ids, batch.positions, batch.cu_seqlens)
        total += float(head_loss(model, hidden, batch.labels, LossOptions()))
    return total / (batches * ROWS * LENGTH)


def window_means(losses: list[float]) -> Tensor:
    """The mean of every `WINDOW` consecutive losses."""
    window = min(WINDOW, len(losses))
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(1)


def judged(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The runs with their distances from bf16's, and of their losses the means of 10."""
    means = {name: window_means(run["losses"]) for name, run in runs.items()}
    found = {}
    for name, run in runs.items():
        gap = means[name] - means["bf16"]
        found[name] = {
            "last_100": round(float(means[name][-1]), 5),
            "from_bf16": round(float(gap[-1]), 5),
            "largest_gap_of_100": round(float(gap.abs().max()), 5),
            **{key: value for key, value in run.items() if key != "losses"},
            "losses_by_10": torch.tensor(run["losses"]).unfold(0, 10, 10).mean(1).tolist(),
        }
    return found


def table(found: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| run | last 100 losses, mean | from bf16 | largest gap of 100-step means | held-out loss, in bf16 | gradient norm |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, run in found["runs"].items():
        gap, largest = f"{run['from_bf16']:+.4f}", f"{run['largest_gap_of_100']:.4f}"
        words = ("", "") if name == "bf16" else (gap, largest)
        lines.append(
            f"| {name} | {run['last_100']:.4f} | {words[0]} | {words[1]} | {run['held_out']:.4f} "
            f"| {run['mean_gradient_norm']:.3f} |"
        )
    steps, parameters = found["steps"], found["parameters"]
    lines.append(
        f"\n{parameters:,} parameters, {steps:,} steps of {ROWS} x {LENGTH} bytes, Python {found['python_library']}'s standard "
        f"library, AdamW, rate {RATE:g}; nats a byte. Products in fp8: {found['products']}. No step was skipped."
        if not any(run["skipped"] for run in found["runs"].values())
        else "\n**Steps were skipped**, see benchmarks/results/fp8_parity.json."
    )
    return "\n".join(lines)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=1000, help="default 1000")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each, default 2")
    parser.add_argument("--write-docs", action="store_true", help="the table in docs/fp8.md")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        running = {name: pool.submit(train, name, options.steps, **how) for name, how in RUNS.items()}
        runs = {name: future.result() for name, future in running.items()}
    found = {
        "steps": options.steps,
        "parameters": SHAPE.parameter_count(),
        "python_library": platform.python_version(),
        "products": "torch._scaled_mm" if torch.cuda.is_available() else "emulated on a CPU",
        "runs": judged(runs),
    }
    print(table(found))
    if options.steps >= 1000:
        print(f"written to {write_result('fp8_parity', found)}")
        if options.write_docs:
            put_into(DOCS, "fp8_parity", table(found))


if __name__ == "__main__":
    main()
