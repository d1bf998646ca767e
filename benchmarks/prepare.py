"""How fast are texts turned into stored tokens, against `datasets.map` with the same tokenizer?

The same .jsonl of real texts (see --texts), the same fast tokenizer, the same number of processes, in fresh processes by
turns, reading the file and saving to disk included on both sides; the ids of both are compared, all of them. `datasets.map`
runs in its better form (batched, the columns removed, several sizes of batch tried, the best one counts). Beside both the
floor: what `tokenizers.encode_batch_fast` needs alone, for the texts in memory, in as many processes, nothing read or kept.

    python benchmarks/prepare.py [--rounds 3] [--megabytes 24] [--texts FILE.jsonl.gz …] [--tokenizers FOLDER …]
    python benchmarks/prepare.py --ranks 2 4 [--megabytes 50] …

With --ranks: what does it cost to prepare in several processes (RANK and WORLD_SIZE, as torchrun starts them) instead of one?
Processor time of `prepare` once the tokenizer is loaded, without workers, rank after rank so that none waits for another: the
sum over the ranks against that of one process, and what of it is storing the parts of others, which only rank 0 does. Each
process meets the words of the language anew, which is most of the rest. The files are compared.
Writes `benchmarks/results/prepare-ranks.json`.

Without --texts: `../shared/data/text/*.jsonl.gz` where that is, else generated words. Tokenizers: a BPE of 2,048 tokens trained
on the spot, and Llama 3's and Qwen 2.5's from `../shared/data/tokenizers` where they are. Prints a table and writes
`benchmarks/results/prepare.json`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import write_result
from modelyard.data.tokenizer_training import train_tokenizer
from modelyard.data.workers import available_cores
from modelyard.files import sha256

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZES = (250, 1000)

OURS = """
import json, sys, time
from modelyard.config.prepare import PrepareConfig
from modelyard.data import prepare as module
source, tokenizer, output, workers = sys.argv[1:]
config = PrepareConfig.model_validate({
    "output_path": output, "dataset": {"path": source}, "tokenizer": {"path": tokenizer, "add_bos": False, "add_eos": False},
    "tokenize_workers": int(workers)})
start = time.perf_counter()
summary = module.prepare(config, report=lambda line: None, terminal=False)
print(json.dumps({"seconds": time.perf_counter() - start, "tokens": summary["tokens"], "path": output + "/data"}))
"""

RANK = """
import json, sys, time
from modelyard.config.prepare import PrepareConfig
from modelyard.data import assemble, prepare as module
source, tokenizer, output, rank, world_size = sys.argv[1:]
config = PrepareConfig.model_validate({
    "output_path": output, "dataset": {"path": source}, "tokenizer": {"path": tokenizer}, "tokenize_workers": 1,
    "splits": {"training": 0.9, "validation": 0.1}, "distributed": {"rank": int(rank), "world_size": int(world_size)}})
drain, stored = assemble.Assembly._drain, [0.0]
def timed(self, bar):
    start = time.process_time()
    drain(self, bar)
    stored[0] += time.process_time() - start
assemble.Assembly._drain = timed
load, loading = module._job, [0.0]
def loaded(*arguments):
    start = time.process_time()
    try:
        return load(*arguments)
    finally:
        loading[0] = time.process_time() - start
module._job = loaded
start = time.process_time()
summary = module.prepare(config, report=lambda line: None, terminal=False)
print(json.dumps({"seconds": time.process_time() - start - loading[0], "stored": stored[0], "tokens": summary["tokens"]}))
"""

THEIRS = """
import json, sys, time
import datasets
from transformers import PreTrainedTokenizerFast
datasets.disable_progress_bars()
source, tokenizer, output, workers, batch = sys.argv[1:]
fast = PreTrainedTokenizerFast(tokenizer_file=tokenizer + "/tokenizer.json", split_special_tokens=True)
def tokenize(examples):
    return {"input_ids": fast(examples["text"], add_special_tokens=False, return_attention_mask=False,
                              return_token_type_ids=False)["input_ids"]}
start = time.perf_counter()
data = datasets.load_dataset("json", data_files=source, split="train", cache_dir=output + "/cache")
made = data.map(tokenize, batched=True, batch_size=int(batch), remove_columns=data.column_names,
                num_proc=int(workers) if int(workers) > 1 else None)
made.save_to_disk(output + "/saved", num_proc=int(workers) if int(workers) > 1 else None)
seconds = time.perf_counter() - start
import pyarrow.compute as pc
tokens = pc.sum(pc.list_value_length(made.data.column("input_ids"))).as_py()
print(json.dumps({"seconds": seconds, "tokens": tokens, "path": output + "/saved"}))
"""

RAW = """
import json, multiprocessing, sys, time
from tokenizers import Tokenizer
source, folder, _, workers = sys.argv[1:]
workers = int(workers)
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.encode_special_tokens = True
texts = [json.loads(line)["text"] for line in open(source, encoding="utf-8")]
def count(part):
    tokens = 0
    for begin in range(0, len(part), 256):
        tokens += sum(map(len, tokenizer.encode_batch_fast(part[begin : begin + 256], add_special_tokens=False)))
    return tokens
def work(part, begin, results):
    begin.wait()
    results.put(count(part))
if workers == 1:
    start = time.perf_counter()
    tokens = count(texts)
    seconds = time.perf_counter() - start
else:
    context = multiprocessing.get_context("fork")
    begin, results = context.Barrier(workers + 1), context.Queue()
    bounds = [len(texts) * i // workers for i in range(workers + 1)]
    processes = [context.Process(target=work, args=(texts[a:b], begin, results)) for a, b in zip(bounds, bounds[1:])]
    for process in processes: process.start()
    begin.wait()
    start = time.perf_counter()
    tokens = sum(results.get() for _ in processes)
    seconds = time.perf_counter() - start
    for process in processes: process.join()
print(json.dumps({"seconds": seconds, "tokens": tokens}))
"""

SAME = """
import sys
import datasets, numpy as np
from modelyard.data.store import TokenStore
store = TokenStore(sys.argv[1])
made = datasets.load_from_disk(sys.argv[2]).with_format("numpy", columns=["input_ids"])
document = 0
for row in made:
    ids = row["input_ids"]
    if len(ids):
        assert np.array_equal(store.document(document), ids), f"document {document} differs"
        document += 1
assert document == store.num_documents, (document, store.num_documents)
print(document)
"""


def records(files: list[Path]) -> Iterator[str]:
    if not files:
        words = [
            f"{a}{b}{c}"
            for a in ("", "un", "re")
            for b in ("sail", "tide", "harbour", "mast")
            for c in ("", "s", "ing")
        ]
        source = random.Random(0)
        while True:
            yield " ".join(source.choice(words) for _ in range(source.randrange(50, 800)))
    while True:
        for file in files:
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)["text"]


def write_source(path: Path, files: list[Path], size: int) -> int:
    """Texts of about `size` bytes, at most 100,000 characters each; returns their number."""
    count = written = 0
    with path.open("w", encoding="utf-8") as file:
        for text in records(files):
            for begin in range(0, len(text), 100_000):
                line = (
                    json.dumps({"text": text[begin : begin + 100_000], "id": count}, ensure_ascii=False)
                    + "\n"
                )
                file.write(line)
                written += len(line.encode())
                count += 1
            if written >= size:
                return count
    return count


def run(code: str, source: Path, tokenizer: Path, output: Path, *more: object) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "TOKENIZERS_PARALLELISM": "false",  # the processes are the parallelism, on all sides
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", code, str(source), str(tokenizer), str(output), *map(str, more)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(source: Path, tokenizer: Path, workers: int, rounds: int, folder: Path) -> dict[str, Any]:
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {"raw": (RAW, (workers,)), "ours": (OURS, (workers,))}
    kinds |= {f"map {size}": (THEIRS, (workers, size)) for size in BATCH_SIZES}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    tokens: dict[str, int] = {}
    paths: dict[str, str] = {}
    for number in range(rounds):
        for name, (code, more) in kinds.items():
            output = folder / f"{name.replace(' ', '-')}-{workers}-{number}"
            result = run(code, source, tokenizer, output, *more)
            seconds[name].append(result["seconds"])
            tokens[name], paths[name] = result["tokens"], result.get("path", "")
    assert len(set(tokens.values())) == 1, f"not the same tokens: {tokens}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    check = [sys.executable, "-c", SAME, paths["ours"], paths[f"map {BATCH_SIZES[0]}"]]
    subprocess.run(check, env=environment, check=True, stdout=subprocess.DEVNULL)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    best_map = min(value for name, value in median.items() if name.startswith("map"))
    count = tokens["ours"]
    return {
        "tokenizer": tokenizer.name,
        "workers": workers,
        "tokens": count,
        "tokens_per_second": {name: count / value for name, value in median.items()},
        "times_datasets_map": best_map / median["ours"],
        "of_raw_tokenizer": median["raw"] / median["ours"],
        "seconds": seconds,
    }


def checksums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


def measure_ranks(
    source: Path, tokenizer: Path, world_sizes: list[int], rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """For each number of ranks the processor time of all of them, by that of one process; the first is one."""
    seconds: dict[int, list[float]] = {size: [] for size in (1, *world_sizes)}
    stored: dict[int, list[float]] = {size: [] for size in seconds}
    expected = None
    for number in range(rounds):
        for size in seconds:
            output = folder / f"{size}-{number}"
            results = [run(RANK, source, tokenizer, output, rank, size) for rank in reversed(range(size))]
            seconds[size].append(sum(result["seconds"] for result in results))
            stored[size].append(results[-1]["stored"])
            expected = expected or checksums(output)
            assert checksums(output) == expected, f"{size} ranks make other files"
            shutil.rmtree(output)
    alone = statistics.median(seconds[1])
    return [
        {
            "tokenizer": tokenizer.name,
            "ranks": size,
            "tokens": results[-1]["tokens"],
            "cpu_seconds": seconds[size],
            "by_one_process": statistics.median(seconds[size]) / alone,
            "storing_others_parts": statistics.median(stored[size]) / alone,
        }
        for size in seconds
    ]


def ranks_main(source: Path, tokenizers: list[Path], options: argparse.Namespace, folder: Path) -> None:
    print(
        f"{'tokenizer':10} {'ranks':>5} {'CPU seconds':>12} {'÷ one process':>14} {'rank 0 stores parts of others':>30}"
    )
    results = []
    for tokenizer in tokenizers:
        for result in measure_ranks(
            source, tokenizer, options.ranks, options.rounds, folder / tokenizer.name / "ranks"
        ):
            results.append(result)
            print(
                f"{result['tokenizer']:10} {result['ranks']:5} {statistics.median(result['cpu_seconds']):12.1f} "
                f"{result['by_one_process']:14.3f} {result['storing_others_parts']:30.1%}",
                flush=True,
            )
    print(write_result("prepare-ranks", {"megabytes": options.megabytes, "runs": results}))


def main() -> None:
    shared = ROOT.parent / "shared" / "data"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=24.0)
    parser.add_argument("--texts", type=Path, nargs="+", default=sorted((shared / "text").glob("*.jsonl.gz")))
    known = [shared / "tokenizers" / name for name in ("llama3", "qwen2.5")]
    parser.add_argument(
        "--tokenizers", type=Path, nargs="+", default=[path for path in known if path.is_dir()]
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="compare so many processes with one, nothing else"
    )
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="prepare-") as name:
        folder = Path(name)
        source = folder / "texts.jsonl"
        count = write_source(source, options.texts, int(options.megabytes * 1e6))
        print(f"{count:,} texts, {source.stat().st_size / 1e6:.1f} MB, {available_cores()} cores")
        small = folder / "bpe-2048"
        texts = (json.loads(line)["text"] for line in source.open(encoding="utf-8"))
        train_tokenizer(
            (text for number, text in enumerate(texts) if number % 10 == 0), small, vocab_size=2048
        )
        if options.ranks:
            ranks_main(source, [small, *options.tokenizers], options, folder)
            return
        print(
            f"{'tokenizer':10} {'workers':>7} {'prepare':>12} {'datasets.map':>13} {'raw':>12}   ÷ map   ÷ raw"
        )
        for tokenizer in [small, *options.tokenizers]:
            for workers in options.workers:
                result = measure(
                    source, tokenizer, workers, options.rounds, folder / f"{tokenizer.name}-{workers}"
                )
                results.append(result)
                speed = result["tokens_per_second"]
                best_map = max(value for kind, value in speed.items() if kind.startswith("map"))
                print(
                    f"{result['tokenizer']:10} {workers:7} {speed['ours']:12,.0f} {best_map:13,.0f} {speed['raw']:12,.0f} "
                    f"{result['times_datasets_map']:7.2f} {result['of_raw_tokenizer']:7.2f}",
                    flush=True,
                )
    print(
        write_result("prepare", {"megabytes": options.megabytes, "cores": available_cores(), "runs": results})
    )


if __name__ == "__main__":
    main()
