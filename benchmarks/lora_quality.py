"""Does LoRA reach what training every weight reaches? On real instructions, over ranks, each at its best learning rate.

    python benchmarks/lora_quality.py [--folder DIR] [--base-iterations 400] [--iterations 96] [--write-docs]

Wants the instruction data that tests look for beside the repository. A model of 3.4 M parameters is trained from nothing on conversations of
four sets; what comes of it is then fine-tuned on a fifth, grade-school mathematics, that it has not seen: every weight, and adapters
on every matrix of the blocks ("LoRA Without Regret", Thinking Machines Lab 2025: all matrices, ten times the learning
rate, alpha 32, a rank that has room for the data). Rates are looked for with every weight and with rank 16. What counts is the loss on held-out answers.

Writes benchmarks/results/lora_quality.json, one report page of the best runs, and with `--write-docs` the table of docs/adapters.md.
Half an hour on two cores. A run that is there already is not made again.
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
BASE_SETS = ("gpteacher_codegen", "gpteacher_roleplay", "rasbt_instruction")
TOOL_SETS = ("seal_tools",)
TASK = "gsm8k_train"
FULL_RATES = (3e-4, 1e-3, 3e-3)
RANK, OTHER_RANKS = 16, (1, 64)

MODEL = """
model:
  base_model:
    vocab_size: 4096
    tie_word_embeddings: yes
    transformer: {num_layers: 6, hidden_size: 192, num_attention_heads: 4, head_groups: 2, ffn_hidden_size: 512, gated: yes,
      activation_type: silu, add_linear_biases: no, normalization: {type: rms_norm}, rotary: {type: default}}
"""
TRAIN = """
training:
  train_iters: ITERATIONS
  logs: {interval: 10, tensorboard: no}
  checkpoint: {interval: ITERATIONS}
  export: {format: llama, interval: ITERATIONS, data_type: float32}
  evaluators: {held_out: {interval: EVERY, at_start: yes, evaluator: {type: loss, dataset_name: validation}}}
batch: {sequence_length: 512, micro_batch_size: 4, batch_size: ROWS, cross_document_attention: no, overlong: drop}
data:
  datasets:
    training: {type: file, path: DATA/fast_llm_config_training.yaml}
    validation: {type: file, path: DATA/fast_llm_config_validation.yaml}
optimizer:
  weight_decay: 0.0
  beta_2: 0.95
  learning_rate: {base: RATE, minimum: 0.0, decay_style: cosine, warmup_iterations: 10, decay_iterations: ITERATIONS}
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


def prepare(folder: Path) -> None:
    """Conversations of both stages, and a tokenizer with the tokens of a chat."""
    if (folder / "task" / "fast_llm_config_training.yaml").exists():
        return
    for stage, sets in (("base", (*BASE_SETS, *TOOL_SETS)), ("task", (TASK,))):
        raw = folder / f"{stage}-raw"
        raw.mkdir(parents=True, exist_ok=True)
        for name in sets:
            source = SHARED / ("tools" if name in TOOL_SETS else "instruct") / f"{name}.jsonl.gz"
            (raw / f"{name}.jsonl").write_bytes(gzip.decompress(source.read_bytes()))
        (folder / f"prepare-{stage}.yaml").write_text(
            f"output_path: {stage}\n"
            f"dataset: {{path: {stage}-raw, conversations: {{unusable: drop}}}}\n"
            "tokenizer: {path: tokenizer}\n"
            "splits: {training: 0.95, validation: 0.05}\n",
            encoding="utf-8",
        )
    program(
        folder,
        "tokenizer",
        "train",
        "prepare-base.yaml",
        "--vocab-size",
        "4096",
        "--output",
        "tokenizer",
        "--chat",
        "qwen2.5",
    )
    for stage in ("base", "task"):
        program(folder, "prepare", f"prepare-{stage}.yaml")


def train(
    folder: Path, name: str, data: str, rate: float, iterations: int, rows: int, *overrides: str
) -> list[dict[str, Any]]:
    """Train `name` unless it is there; the records of its evaluator."""
    metrics = folder / "runs" / name / "metrics.jsonl"
    if not (folder / "runs" / name / "export").exists():
        text = TRAIN + (MODEL if data == "base" else "pretrained: {format: llama, path: BASE}\n")
        for word, value in {
            "ITERATIONS": iterations, "EVERY": max(iterations // 12, 1), "ROWS": rows, "DATA": data, "RATE": rate,
            "RUN": f"runs/{name}", "BASE": _export(folder / "runs" / "base"),
        }.items():  # fmt: skip
            text = text.replace(word, str(value))
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        program(folder, "train", f"{name}.yaml", *overrides)
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record.get("evaluator") == "held_out"]


def _export(run: Path) -> str:
    found = sorted((run / "export" / "llama").glob("*"))
    return str(found[-1].resolve()) if found else "none"


def measure(folder: Path, base_iterations: int, iterations: int) -> dict[str, Any]:
    prepare(folder)
    train(folder, "base", "base", 3e-3, base_iterations, 16)
    peft = "model.base_model.transformer.peft"
    found: list[dict[str, Any]] = []

    def tune(kind: str, rates: Sequence[float], *keys: str) -> float:
        """Fine-tune with each of the rates; the best of them."""
        ends = {}
        for rate in rates:
            overrides = [f"{peft}.{key}" for key in keys]
            records = train(folder, f"{kind}-{rate:g}", "task", rate, iterations, 8, *overrides)
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
    rate = tune(f"lora-{RANK}", [10 * rate for rate in FULL_RATES], *adapter, f"rank={RANK}")
    for rank in OTHER_RANKS:
        tune(f"lora-{rank}", [rate], *adapter, f"rank={rank}")
    tune(f"qlora-{RANK}", [rate], *adapter, f"rank={RANK}", "quantization=nf4")
    tune(f"two-{RANK}", [rate], "type=lora", "alpha=32", f"rank={RANK}")
    return {"base_iterations": base_iterations, "iterations": iterations, "runs": found}


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
    parser.add_argument("--base-iterations", type=int, default=400)
    parser.add_argument("--iterations", type=int, default=96)
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    if not (SHARED / "instruct").is_dir():
        raise SystemExit(f"the instruction data is not there: {SHARED}")
    options.folder.mkdir(parents=True, exist_ok=True)
    found = measure(options.folder.resolve(), options.base_iterations, options.iterations)
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
