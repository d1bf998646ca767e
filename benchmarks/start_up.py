"""How long does a start take, and how does it grow with the data?

Two tables. The first: time to the first batch (opened, ordered, packed, read; after imports) and the process's peak memory
on synthetic token stores of 1, 10 and 100 million documents, each in fresh processes, with the store's index in the system's
cache and without, and what a store of 10⁹ documents would take: an extrapolation along the line through the two largest
measured ones, not a measurement. The second: `modelyard --help` and `modelyard validate` of an 8B config against
`python -c "import torch"`, in turn. Writes `benchmarks/results/start_up.json`.

    python benchmarks/start_up.py [--documents 1000000 10000000 100000000] [--rounds 3] [--folder DIR]

The stores (2 GB for 100 million documents) are written to a temporary folder under --folder and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import write_result
from modelyard.data.store import StoreWriter

ROOT = Path(__file__).resolve().parent.parent
SHORTEST, LONGEST = 2, 14
"""Tokens of a document: so few that the index weighs most."""
VOCABULARY = 32_000
ROWS, SEQUENCE = 8, 2048
FIRST_BATCH_TARGET, MEMORY_TARGET = 2.0, 500e6

FIRST_BATCH = """
import json, sys, time
from pathlib import Path
import torch
from modelyard.config.batch import BatchConfig
from modelyard.config.data import MemmapDataset, SamplingConfig
from modelyard.data.batch import assemble
from modelyard.data.stream import DataStream

def memory(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024

path, rows, sequence, vocabulary, truncate = json.loads(sys.argv[1])
before = memory("VmRSS")
start = time.perf_counter()
stream = DataStream(
    MemmapDataset(type="memmap", path=path),
    name="training",
    sampling=SamplingConfig(),
    batch=BatchConfig(sequence_length=sequence, batch_size=rows, truncate_documents=truncate),
    vocab_size=vocabulary,
)
opened = time.perf_counter()
batch = stream.batch(0)
end = time.perf_counter()
print(json.dumps({"open": opened - start, "seconds": end - start, "peak": memory("VmHWM"), "imports": before,
                  "trained": batch.num_targets}))
"""

CONFIG_8B = """
model: {preset: llama-3.1-8b, distributed: {training_dtype: bf16}}
training: {train_iters: 1000, logs: {interval: 10}, checkpoint: {interval: 100}}
batch: {sequence_length: 8192, batch_size: 64, micro_batch_size: 1}
data: {datasets: {training: {type: random}}}
optimizer: {learning_rate: {base: 3.0e-4, minimum: 3.0e-5, decay_style: cosine, decay_iterations: 1000, warmup_iterations: 20}}
run: {experiment_dir: run}
"""


def build_store(path: Path, documents: int) -> None:
    random = np.random.default_rng(documents)
    with StoreWriter(path, vocab_size=VOCABULARY) as writer:
        for begin in range(0, documents, 1_000_000):
            lengths = random.integers(SHORTEST, LONGEST + 1, min(1_000_000, documents - begin))
            writer.extend(lengths, random.integers(0, VOCABULARY, lengths.sum(), dtype=np.uint16))


def forget(store: Path) -> None:
    """Drop the store's files from the system's cache (they are on the disk: the writer waited for that)."""
    for file in store.glob("*.bin"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remember(store: Path) -> None:
    for name in ("lengths.bin", "offsets.bin"):
        with (store / name).open("rb") as file:
            while file.read(1 << 24):
                pass


def first_batch(store: Path, *, truncate: bool, cached: bool) -> dict[str, Any]:
    forget(store)
    if cached:
        remember(store)
    argument = json.dumps([str(store), ROWS, SEQUENCE, VOCABULARY, truncate])
    return json.loads(_python("-c", FIRST_BATCH, argument))


def _python(*arguments: str, cwd: Path | None = None) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)[:80]} failed ({done.returncode}): {done.stdout}{done.stderr}")
    return done.stdout


def measure_stores(counts: list[int], rounds: int, folder: Path) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for documents in sorted(counts):
        store = folder / f"store-{documents}"
        size = documents * (4 + 8 / 256 + (SHORTEST + LONGEST))
        free = shutil.disk_usage(folder).free
        if size * 1.1 > free:
            print(
                f"{documents:,} documents left out: {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free"
            )
            continue
        started = time.perf_counter()
        build_store(store, documents)
        print(f"wrote {documents:,} documents, {size / 1e9:.2f} GB, in {time.perf_counter() - started:.0f} s")
        try:
            for truncate in (True, False):
                for cached in (True, False):
                    runs = [first_batch(store, truncate=truncate, cached=cached) for _ in range(rounds)]
                    results.append(
                        {
                            "documents": documents,
                            "rows": "cut" if truncate else "packed",
                            "index": "cached" if cached else "on disk",
                            "first_batch_seconds": statistics.median(run["seconds"] for run in runs),
                            "open_seconds": statistics.median(run["open"] for run in runs),
                            "peak_bytes": max(run["peak"] for run in runs),
                            "after_imports_bytes": statistics.median(run["imports"] for run in runs),
                            "targets": runs[0]["trained"],
                        }
                    )
        finally:
            shutil.rmtree(store)
    return results


def extrapolate(results: list[dict[str, Any]], documents: int) -> list[dict[str, Any]]:
    """For each kind, the line through its two largest stores, read off at `documents`."""
    kinds = list(dict.fromkeys((result["rows"], result["index"]) for result in results))
    found = []
    for rows, index in kinds:
        points = [result for result in results if (result["rows"], result["index"]) == (rows, index)][-2:]
        if len(points) < 2:
            continue
        small, large = points
        reach = (documents - large["documents"]) / (large["documents"] - small["documents"])
        values = {
            key: large[key] + max(0.0, large[key] - small[key]) * reach
            for key in ("first_batch_seconds", "peak_bytes")
        }
        found.append({"documents": documents, "rows": rows, "index": index, "extrapolated": True, **values})
    return found


def print_stores(results: list[dict[str, Any]]) -> None:
    print(
        f"\n{'documents':>15} {'rows':>7} {'index':>8} {'first batch':>12} {'peak memory':>12} {'after imports':>14}"
    )
    for result in results:
        more = f"{result['after_imports_bytes'] / 1e6:11.0f} MB" if "targets" in result else "  extrapolated"
        print(
            f"{result['documents']:15,} {result['rows']:>7} {result['index']:>8} "
            f"{result['first_batch_seconds']:10.3f} s {result['peak_bytes'] / 1e6:9.0f} MB {more}"
        )
    measured = [result for result in results if "targets" in result and result["index"] == "cached"]
    slowest = max(result["first_batch_seconds"] for result in measured)
    largest = max(result["peak_bytes"] for result in measured)
    print(
        f"index cached, at most: {slowest:.2f} s (target {FIRST_BATCH_TARGET:.0f} s), {largest / 1e6:.0f} MB "
        f"(target {MEMORY_TARGET / 1e6:.0f} MB)"
    )


def measure_commands(rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of each command, the median of alternating fresh processes."""
    (folder / "8b.yaml").write_text(CONFIG_8B, encoding="utf-8")
    commands = {
        'python -c "pass"': ("-c", "pass"),
        'python -c "import torch"': ("-c", "import torch"),
        "modelyard --help": ("-m", "modelyard", "--help"),
        "modelyard validate 8b.yaml": ("-m", "modelyard", "validate", "8b.yaml"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, arguments in commands.items():
            started = time.perf_counter()
            _python(*arguments, cwd=folder)
            seconds[name].append(time.perf_counter() - started)
    torch = statistics.median(seconds['python -c "import torch"'])
    print(f"\n{'command':30} {'median':>9} {'slowest':>9}   ÷ import torch")
    results = {}
    for name, values in seconds.items():
        median = statistics.median(values)
        results[name] = {"seconds": median, "slowest": max(values), "of_import_torch": median / torch}
        print(f"{name:30} {median:7.3f} s {max(values):7.3f} s   {median / torch:.2f}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="start-up-", dir=options.folder) as name:
        folder = Path(name)
        results = measure_stores(options.documents, options.rounds, folder)
        results += extrapolate(results, 1_000_000_000)
        print_stores(results)
        commands = measure_commands(max(5, options.rounds), folder)
    print(write_result("start_up", {"stores": results, "commands": commands}))


if __name__ == "__main__":
    main()
