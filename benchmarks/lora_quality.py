"""Does LoRA reach what training every weight reaches? On real conversations, over ranks, at the best of its learning rates.

    python benchmarks/lora_quality.py --base FOLDER [--folder DIR] [--iterations 40] [--write-docs]

FOLDER is a Hugging Face folder, tokenizer inside, of a model that has seen conversations in a chat format (an adapter can hardly
teach tokens whose embeddings were never trained): such as what docs/fine-tuning.md ends with. It is fine-tuned on dialogues with
tool calls that it has not seen (the instruction data that tests look for beside the repository): every weight, and adapters on
every matrix of the blocks ("LoRA Without Regret", Thinking Machines Lab 2025: all matrices, about ten times the learning rate,
alpha 32, a rank that has room for the data). Rates are looked for with every weight and with rank 16. What counts is the loss
on held-out answers.

Writes benchmarks/results/lora_quality.json, one report page of the best runs, and with `--write-docs` the table of docs/adapters.md.
A quarter of an hour on two cores for 5 M parameters. A run that is there already is not made again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import put_into, write_result  # noqa: E402

DOCS = ROOT / "docs" / "adapters.md"
SHARED = ROOT.parent / "shared" / "data"
TASK = "sgd_dialogues"
FULL_RATES, RATES = (1e-3, 3e-3, 6e-3), (3e-3, 1e-2, 2e-2)
RANK, OTHER_RANKS = 16, (1, 64)

TRAIN = """
training:
  train_iters: ITERATIONS
  logs: {interval: 10, tensorboard: no}
  checkpoint: {interval: ITERATIONS}
  export: {format: llama, interval: ITERATIONS, data_type: float32}
  evaluators: {held_out: {interval: EVERY, iterations: 10, at_start: yes, evaluator: {type: loss, dataset_name: validation}}}
batch: {sequence_length: 1024, micro_batch_size: 2, batch_size: 4, cross_document_attention: no, overlong: split}
data:
  datasets:
    training: {type: file, path: task/fast_llm_config_training.yaml}
    validation: {type: file, path: task/fast_llm_config_validation.yaml}
optimizer:
  weight_decay: 0.0
  beta_2: 0.95
  learning_rate: {base: RATE, minimum: 0.0, decay_style: cosine, warmup_iterations: 10, decay_iterations: ITERATIONS}
pretrained: {format: llama, path: BASE}
run: {experiment_dir: RUN}
"""


def program(folder: Path, *arguments: str) -> None:
    """Run `modelyard` in `folder`; its output goes to log.txt there."""
    command = [sys.executable, "-m", "modelyard", *arguments]
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        done = subprocess.run(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed, see {folder / 'log.txt'}")


def prepare(folder: Path, base: Path) -> None:
    """The task's conversations as tokens of the base."""
    if (folder / "task" / "fast_llm_config_training.yaml").exists():
        return
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{TASK}.jsonl").write_bytes(gzip.decompress((SHARED / "tools" / f"{TASK}.jsonl.gz").read_bytes()))
    (folder / "prepare.yaml").write_text(
        "output_path: task\n"
        "dataset: {path: raw, conversations: {unusable: drop}}\n"
        f"tokenizer: {{path: {base}}}\n"
        "splits: {training: 0.9, validation: 0.1}\n",
        encoding="utf-8",
    )
    program(folder, "prepare", "prepare.yaml")


def train(
    folder: Path, base: Path, name: str, rate: float, iterations: int, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """Train `name` unless it is there; the records of its evaluator."""
    metrics = folder / "runs" / name / "metrics.jsonl"
    if not (folder / "runs" / name / "export").exists():
        text = TRAIN
        for word, value in {
            "ITERATIONS": iterations, "EVERY": max(iterations // 8, 1), "RATE": rate, "RUN": f"runs/{name}", "BASE": base,
        }.items():  # fmt: skip
            text = text.replace(word, str(value))
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        program(folder, "train", f"{name}.yaml", *overrides)
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record.get("evaluator") == "held_out"]


def measure(folder: Path, base: Path, iterations: int) -> dict[str, Any]:
    prepare(folder, base)
    peft = "model.base_model.transformer.peft"
    found: list[dict[str, Any]] = []

    def tune(kind: str, rates: Sequence[float], *keys: str) -> float:
        """Fine-tune with each of the rates; the best of them."""
        ends = {}
        for rate in rates:
            overrides = [f"{peft}.{key}" for key in keys]
            records = train(folder, base, f"{kind}-{rate:g}", rate, iterations, overrides)
            losses = [(record["iteration"], record["loss"]) for record in records]
            found.append(
                {"kind": kind, "rate": rate, "losses": losses, "trained": _trained(folder, kind, rate)}
            )
            print(f"{kind:10} rate {rate:g}: {losses[0][1]:.4f} -> {losses[-1][1]:.4f}", flush=True)
            ends[rate] = losses[-1][1]
        return min(ends, key=ends.__getitem__)

    tune("full", FULL_RATES)
    adapter = ("type=lora", "layers=[all]", "alpha=32")
    # The best rate hardly depends on the rank: it is looked for once.
    rate = tune(f"lora-{RANK}", RATES, *adapter, f"rank={RANK}")
    for rank in OTHER_RANKS:
        tune(f"lora-{rank}", [rate], *adapter, f"rank={rank}")
    tune(f"qlora-{RANK}", [rate], *adapter, f"rank={RANK}", "quantization=nf4")
    tune(f"two-{RANK}", [rate], "type=lora", "alpha=32", f"rank={RANK}")
    return {"iterations": iterations, "runs": found}


def _trained(folder: Path, kind: str, rate: float) -> int:
    """How many numbers the run trains, from its checkpoint."""
    from modelyard.train.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder / "runs" / f"{kind}-{rate:g}")
    assert checkpoint is not None
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())


def best(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each kind the run with the lowest last loss."""
    kinds: dict[str, dict[str, Any]] = {}
    for run in found["runs"]:
        if run["kind"] not in kinds or run["losses"][-1][1] < kinds[run["kind"]]["losses"][-1][1]:
            kinds[run["kind"]] = run
    return kinds


def table(found: dict[str, Any]) -> str:
    chosen = best(found)
    full = chosen["full"]["losses"][-1][1]
    lines = [
        "| trained | numbers | best rate | held-out loss | above full |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, run in chosen.items():
        last = run["losses"][-1][1]
        which, _, rank = kind.partition("-")
        words = {"full": "every weight", "lora": "LoRA", "qlora": "QLoRA", "two": "LoRA on query and value"}[
            which
        ]
        words += f", rank {rank}" if rank else ""
        lines.append(
            f"| {words} | {run['trained']:,} | {run['rate']:g} | {last:.4f} | {last / full - 1:+.1%} |"
        )
    begin = chosen["full"]["losses"][0][1]
    lines += [
        "",
        f"Before: {begin:.4f}. {found['iterations']} steps of 4,096 tokens.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("lora-quality"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    if not (SHARED / "instruct").is_dir():
        raise SystemExit(f"the instruction data is not there: {SHARED}")
    options.folder.mkdir(parents=True, exist_ok=True)
    found = measure(options.folder.resolve(), options.base.resolve(), options.iterations)
    write_result("lora_quality", found)
    runs = [
        str(options.folder.resolve() / "runs" / f"{run['kind']}-{run['rate']:g}")
        for run in best(found).values()
    ]
    program(options.folder.resolve(), "report", *runs, "--output", "report.html")
    print(table(found))
    print(f"report: {options.folder / 'report.html'}")
    if options.write_docs:
        put_into(DOCS, "lora_quality", table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
