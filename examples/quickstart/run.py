"""The quickstart: raw text → tokenizer → tokens → trained model → Hugging Face folder → text.

Runs the commands that a user would type, one after the other, on the Python source files that came with the
interpreter. Everything lands in `quickstart/`; started again, it goes on where it was.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
OUT = Path("quickstart")
PROMPT = """\
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
"""


def step(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def modelyard(*words: object, quiet: bool = False) -> str:
    """Run one modelyard command as typed; returns its output with `quiet`, else lets it print."""
    command = [sys.executable, "-m", "modelyard", *map(str, words)]
    print("$ modelyard", shlex.join(map(str, words)).replace("\n", "\\n"), flush=True)
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE if quiet else None)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout or ""


def unigram_loss(training: Path, validation: Path, vocabulary: int) -> float:
    """Cross-entropy, in nats a token, of the validation tokens under the training tokens' frequencies (add-one)."""
    from modelyard.data.store import TokenStore

    def counts(path: Path) -> np.ndarray:
        store = TokenStore(path)
        return np.bincount(store.tokens(0, store.num_tokens), minlength=vocabulary).astype(np.float64)

    train, valid = counts(training) + 1, counts(validation)
    return float(-(valid * np.log(train / train.sum())).sum() / valid.sum())


def bytes_per_token(validation: Path) -> float:
    """Bytes of text behind each token of the validation split."""
    from tokenizers import Tokenizer

    from modelyard.data.store import TokenStore

    store = TokenStore(validation)
    tokenizer = Tokenizer.from_file(str(validation / "tokenizer" / "tokenizer.json"))
    text_bytes = sum(
        len(tokenizer.decode(store.document(i).tolist()).encode()) for i in range(store.num_documents)
    )
    return text_bytes / store.num_tokens


def last_validation_loss(metrics: Path) -> float:
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [r["loss"] for r in records if r.get("evaluator") == "validation"][-1]


def main() -> int:
    begin = time.perf_counter()
    library = sysconfig.get_path("stdlib")
    source = [HERE / "prepare.yaml", f"dataset.path={library}"]

    step("1. a tokenizer from the source files")
    if not (OUT / "tokenizer" / "tokenizer.json").exists():
        modelyard("tokenizer", "train", *source, "--vocab-size", 2048)

    step("2. tokens")
    modelyard("prepare", *source)

    step("3. what the config says, before anything starts")
    modelyard("validate", HERE / "train.yaml")
    modelyard(
        "inspect", HERE / "train.yaml", "--html", OUT / "batch.html", quiet=True
    )  # the first batch, as it will be

    step("4. training")
    modelyard("train", HERE / "train.yaml")

    step("5. evaluation of the newest checkpoint")
    modelyard("evaluate", HERE / "train.yaml")
    loss, scale = (
        last_validation_loss(OUT / "run" / "metrics.jsonl"),
        bytes_per_token(OUT / "data" / "validation"),
    )
    baseline = unigram_loss(OUT / "data" / "training", OUT / "data" / "validation", 2048)
    print(
        f"validation: {loss / scale:.3f} nats a byte ({loss / scale / math.log(2):.3f} bits), {scale:.2f} bytes a token"
    )
    print(
        f"a unigram model of the same tokens: {baseline / scale:.3f} nats a byte; the model needs {loss / baseline:.0%}"
    )
    if loss > 0.75 * baseline:
        raise SystemExit("the model is hardly better than token frequencies: something is wrong")

    export = max((OUT / "run" / "export" / "llama").iterdir(), key=lambda p: int(p.name))
    step("6. the exported folder writes a function, here and in transformers")
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 96)
    modelyard("generate", export, *arguments, "--temperature", 0.6, "--top-k", 50)
    ours = json.loads(modelyard("generate", export, *arguments, "--temperature", 0, "--json", quiet=True))
    theirs = transformers_greedy(export, ours["prompt"], 96)
    print(f"transformers, greedy:\n{ours['prompt']}{theirs['text']}")
    same = theirs["token_ids"] == ours["token_ids"]
    print(f"modelyard's greedy tokens are {'the same' if same else 'DIFFERENT: please report this'}")

    step("7. the run as a page")
    modelyard("report", OUT / "run", "--output", OUT / "report.html")

    minutes = (time.perf_counter() - begin) / 60
    step(f"done in {minutes:.1f} minutes")
    print(
        f"""\
  tokenizer      {OUT / "tokenizer"}
  token store    {OUT / "data"}
  run            {OUT / "run"}  (metrics.jsonl, log.txt, tensorboard/, checkpoint/)
  Hugging Face   {export}
  pages to open  {OUT / "batch.html"} (what it was trained on), {OUT / "report.html"} (how it went)
try next:
  .venv/bin/modelyard generate {export} --prompt 'import os' --temperature 0.8
  .venv/bin/modelyard train {HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE}/train.yaml training.train_iters=960    # goes on from here
  .venv/bin/tensorboard --logdir {OUT / "run" / "tensorboard"}
  docs/          recipes: Llama 3.1 8B and Qwen 2.5 7B from scratch, continued pretraining, data preparation"""
    )
    return 0


def transformers_greedy(folder: Path, prompt: str, tokens: int) -> dict[str, object]:
    """What transformers' own `generate` makes of the same folder and prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    start = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(start, max_new_tokens=tokens, do_sample=False)
    ids = out[0, start.shape[1] :].tolist()
    return {"token_ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)}


if __name__ == "__main__":
    sys.exit(main())
