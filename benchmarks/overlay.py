"""The same training by the command line on 1, 2 and 4 processes in different layouts: do the curves lie on each other?

    python benchmarks/overlay.py [--folder DIR] [--iterations 200] [--write-docs]

Takes the quickstart's config, made smaller, on the Python files of this interpreter's `asyncio`; trains it once for each
of `LAYOUTS` with `modelyard train --nproc N`, in fp32, and writes one page with all curves by `modelyard report`. Prints,
and writes to benchmarks/results/overlay.json, how far each curve is from the one process's; with `--write-docs` also to
docs/layouts.md. Exit status 1 where a curve leaves it by more than a thousandth of the loss. Three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
QUICKSTART = ROOT / "examples" / "quickstart"
DOCS = ROOT / "docs" / "layouts.md"
NAME = "overlay"
ALLOWED = 1e-3
"""Of the loss. In fp32 runs drift apart: sums in another order, and Adam turns noise into steps."""

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "ZeRO 3 on 2": (2, ["model.multi_stage.zero_stage=3"]),
    "tensor 2": (
        2,
        ["model.distributed.tensor_parallel=2", "model.distributed.sequence_tensor_parallel=yes"],
    ),
    "contexts 2": (2, ["model.distributed.sequence_data_parallel=2"]),
    "pipeline 2 x ZeRO 2": (
        4,
        ["model.distributed.pipeline_parallel=2", "model.multi_stage.zero_stage=2"],
    ),
    "pipeline 2 (zero bubble) x tensor 2": (
        4,
        [
            "model.distributed.pipeline_parallel=2",
            "model.distributed.pipeline_schedule=zero_bubble",
            "model.distributed.tensor_parallel=2",
        ],
    ),
}
"""Name → processes and overrides."""
SMALL = [
    "batch.sequence_length=128",
    "batch.batch_size=8",
    "batch.micro_batch_size=2",
    "model.base_model.vocab_size=1024",
    "model.base_model.transformer.hidden_size=96",
    "model.base_model.transformer.num_attention_heads=4",
    "model.base_model.transformer.head_groups=2",
    "model.base_model.transformer.ffn_hidden_size=256",
    "training.logs.interval=5",
    "training.evaluators={}",
    "training.checkpoint.interval=null",
    "training.export.interval=null",
    "training.compile=no",
]


def modelyard(folder: Path, *words: object) -> None:
    """A command as a user types it, in `folder`. Raises SystemExit with what it said where it fails."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "modelyard", *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"modelyard {' '.join(map(str, words))}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def losses(run: Path) -> dict[int, float]:
    """Iteration → loss, as the run logged it."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {record["iteration"]: record["loss"] for record in records if "evaluator" not in record}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| layout | processes | first loss | last loss | furthest from one process |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        far = f"{row['furthest']:.1e}" if row["furthest"] else "0"
        lines.append(
            f"| {row['layout']} | {row['processes']} | {row['first']:.4f} | {row['last']:.4f} | {far} |"
        )
    return "\n".join(lines)


def train_all(folder: Path, iterations: int) -> list[dict[str, Any]]:
    # One package of the library is enough text for so few iterations.
    text = Path(sysconfig.get_path("stdlib")) / "asyncio"
    source = [QUICKSTART / "prepare.yaml", f"dataset.path={text}"]
    if not (folder / "quickstart" / "data").exists():
        modelyard(folder, "tokenizer", "train", *source, "--vocab-size", 1024)
        modelyard(folder, "prepare", *source)
    rows: list[dict[str, Any]] = []
    truth: dict[int, float] = {}
    for name, (processes, overrides) in LAYOUTS.items():
        begin = time.perf_counter()
        run = folder / name
        words = [
            *SMALL,
            f"training.train_iters={iterations}",
            f"optimizer.learning_rate.decay_iterations={iterations}",
            f"run.experiment_dir={name}",
            *overrides,
        ]
        modelyard(folder, "train", QUICKSTART / "train.yaml", *words, "--nproc", processes)
        curve = losses(run)
        truth = truth or curve
        if curve.keys() != truth.keys():
            raise SystemExit(f"{name} logged iterations {sorted(curve)}, one process {sorted(truth)}")
        furthest = max(abs(curve[step] - truth[step]) / truth[step] for step in truth)
        first, last = curve[min(curve)], curve[max(curve)]
        row = {
            "layout": name,
            "processes": processes,
            "first": first,
            "last": last,
            "furthest": furthest,
            "seconds": round(time.perf_counter() - begin, 1),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where runs and the page go (default: thrown away)")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/layouts.md")
    arguments = parser.parse_args()

    from benchmarks.common import put_into, write_result

    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows = train_all(folder, arguments.iterations)
        modelyard(folder, "report", *LAYOUTS, "--output", "overlay.html")
    print(table(rows))
    if arguments.folder:
        print(f"the curves: {folder / 'overlay.html'}")
    print(f"wrote {write_result(NAME, {'iterations': arguments.iterations, 'rows': rows})}")
    if arguments.write_docs:
        put_into(DOCS, NAME, table(rows))
        print(f"wrote {DOCS}")
    sys.exit(1 if any(row["furthest"] > ALLOWED for row in rows) else 0)


if __name__ == "__main__":
    main()
