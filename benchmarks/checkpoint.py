"""How long does a checkpoint keep training waiting, and how near is that to the disk's own speed?

Saves and loads a whole checkpoint (weights and AdamW's two moments in fp32, as `modelyard train` does, checksums
included) and writes and reads as many bytes of one plain file on the same disk, in turn; the median of the rounds
counts. Written data is on the disk when its time ends (fsync); reads come from the disk (the pages are dropped before).

Then the same beside the training, as `training.checkpoint.asynchronous` does it: how long training waits (for the copy in
memory), and how long until the checkpoint is durable; against torch's own `dcp.async_save` of the same tensors, which
makes no checksums, no manifest and no rename.

    python benchmarks/checkpoint.py [--parameters 130] [--rounds 3] [--folder DIR]

Writes `benchmarks/results/checkpoint.json`; leaves nothing else behind.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import write_result
from modelyard.config.architecture import Architecture
from modelyard.parallel.world import World
from modelyard.train.checkpoint import Checkpoint, save_checkpoint
from modelyard.train.saving import HostCopies, Saver

PIECE = 16 * 2**20


def parameters_of(millions: int) -> dict[str, torch.Tensor]:
    """Parameters of a Llama-like model of about that size, hidden 1024, with random values."""
    layer = Architecture(32_000, 1024, 1, 16, 4, 64, 2752)
    layers = max(1, round((millions * 1e6 - 2 * 32_000 * 1024) / 11e6))
    shape = Architecture(**{**vars(layer), "num_layers": layers})
    return {name: torch.randn(size) for name, size in shape.parameter_shapes().items()}


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def drop_pages(folder: Path) -> None:
    """Let the next read of these files come from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_plain(path: Path, data: memoryview) -> None:
    with path.open("wb", buffering=0) as file:
        for begin in range(0, len(data), PIECE):
            file.write(data[begin : begin + PIECE])
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    buffer = bytearray(PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


Tensors = dict[str, torch.Tensor]
COPIES = HostCopies()
"""Of a run there is one; the first time it has to get its memory."""


def saved_beside(
    place: Path, weights: Tensors, moments: Tensors, state: dict[str, Any]
) -> tuple[float, float]:
    """Seconds until training goes on, and until the checkpoint is durable."""
    saver = Saver(World(), asynchronous=True)
    begin = time.perf_counter()
    parameters, copied = COPIES.of(weights), COPIES.of(moments)

    def write(world: World) -> None:
        save_checkpoint(place, parameters=parameters, moments=copied, state=state, config={}, world=world)

    saver.start(write, wait=False)
    waited = time.perf_counter() - begin
    saver.finish()
    return waited, time.perf_counter() - begin


def torch_saves_beside(
    place: Path, weights: Tensors, moments: Tensors, _state: dict[str, Any]
) -> tuple[float, float]:
    """The same of torch's own asynchronous save."""
    if not dist.is_initialized():
        store = dist.FileStore(tempfile.mktemp(), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    begin = time.perf_counter()
    future = dcp.async_save({**weights, **moments}, checkpoint_id=place)
    waited = time.perf_counter() - begin
    future.result()
    return waited, time.perf_counter() - begin


def measure(folder: Path, millions: int, rounds: int) -> dict[str, float]:
    """Medians in seconds: save, load, plain write, plain read; and the checkpoint's size in bytes."""
    weights = parameters_of(millions)
    moments = {
        f"{name}.{moment}": torch.rand_like(p)
        for name, p in weights.items()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    tensors = {f"model.{name}": p for name, p in weights.items()}
    tensors |= {f"optimizer.{name}": moment for name, moment in moments.items()}
    state = {"progress": {"iteration": 1}, "architecture": {}}
    place, plain = folder / "1", folder / "plain"
    plain.mkdir()
    times: dict[str, list[float]] = {"save": [], "plain write": [], "load": [], "plain read": []}
    for _ in range(rounds):
        save = seconds(
            lambda: save_checkpoint(place, parameters=weights, moments=moments, state=state, config={})
        )
        size = sum(path.stat().st_size for path in place.iterdir())
        data = memoryview(torch.randint(256, (size,), dtype=torch.uint8).numpy()).cast("B")
        times["save"].append(save)
        times["plain write"].append(seconds(lambda data=data: write_plain(plain / "file", data)))
        drop_pages(place)
        drop_pages(plain)
        times["load"].append(seconds(lambda: Checkpoint(place).load_into(tensors)))
        times["plain read"].append(seconds(lambda: read_plain(plain / "file")))
        shutil.rmtree(place)
        for name, save_beside in (("ours", saved_beside), ("async_save", torch_saves_beside)):
            waited, whole = save_beside(place, weights, moments, state)
            times.setdefault(f"{name}: training waits", []).append(waited)
            times.setdefault(f"{name}: durable after", []).append(whole)
            shutil.rmtree(place)
    return {name: statistics.median(values) for name, values in times.items()} | {"bytes": float(size)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=130, metavar="MILLIONS", help="default: 130")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: here)")
    options = parser.parse_args()
    needed = 3 * options.parameters * 12e6
    free = shutil.disk_usage(options.folder).free
    if free < needed:
        parser.error(
            f"{needed / 1e9:.1f} GB are needed in {options.folder.resolve()}, {free / 1e9:.1f} are free"
        )
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        found = measure(folder, options.parameters, options.rounds)
    finally:
        shutil.rmtree(folder)
    megabytes = found["bytes"] / 1e6
    print(f"checkpoint of {megabytes:,.0f} MB, {torch.get_num_threads()} threads")
    print(f"{'':<12} {'seconds':>8} {'MB/s':>8} {'disk alone':>11} {'ratio':>6}")
    for name, plain in (("save", "plain write"), ("load", "plain read")):
        print(f"{name:<12} {found[name]:>8.2f} {megabytes / found[name]:>8,.0f} {megabytes / found[plain]:>11,.0f} "
              f"{found[plain] / found[name]:>6.2f}")  # fmt: skip
    print(f"training waits {found['save']:.2f} s for a save that it waits for; beside the training:")
    print(f"{'':<12} {'waits':>8} {'durable after':>14}")
    for name in ("ours", "async_save"):
        print(f"{name:<12} {found[f'{name}: training waits']:>8.2f} {found[f'{name}: durable after']:>14.2f}")
    print(f"wrote {write_result('checkpoint', {'parameters': options.parameters, **found})}")


if __name__ == "__main__":
    main()
