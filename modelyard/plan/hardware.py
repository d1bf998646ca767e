"""What a GPU has, by its data sheet, and what of that a training step reaches: numbers with their sources. No torch.

A GPU is a file in `hardware/`; what programs reach of its peaks is in `attainable.yaml`, by generation and for all alike. A machine
that was measured (`modelyard.plan.machine`) is the same kind of thing with its own rates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from modelyard.errors import UserError, did_you_mean
from modelyard.plan.rates import Datasheet, Rates

FOLDER = Path(__file__).parent / "hardware"
ATTAINABLE = Path(__file__).parent / "attainable.yaml"
THIS_MACHINE = "this-machine"
"""The name of the machine that the program runs on."""

_RATE = re.compile(
    r"\s*(?P<number>\d+(\.\d*)?([eE][+-]?\d+)?)\s*(?P<prefix>[kKMGT]?)(?P<unit>[bB])(it)?(/s|ps)\s*"
)
_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d*)?)\s*(?P<prefix>[kKMGT]?)(?P<binary>i?)B\s*")
_PREFIXES = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class Hardware:
    """One kind of device, and how it is tied to others of its kind."""

    name: str
    title: str
    memory: int
    """Bytes that programs can have of its memory."""
    peaks: Mapping[str, float]
    """Dense FLOP/s by dtype: `float32`, `tf32`, `bfloat16`, `float16`, `float8`; what it has not is absent."""
    bandwidth: float
    """Of its memory, bytes/s, by the data sheet."""
    link: float
    """Bytes/s that a device sends to others of its node, one direction."""
    network: float
    """Bytes/s that a device sends to other nodes, one direction: its own share of the node's network."""
    gpus_per_node: int
    processors: int
    """Streaming multiprocessors, or cores."""
    rates: Rates = field(compare=False)
    """What programs reach of all this."""
    is_gpu: bool = True
    overlaps: bool = True
    """Whether it computes as fast while it communicates."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Figure → where it is from."""
    torch_name: str = ""
    """What torch's name of the device has in it."""

    def peak(self, dtype: str) -> float | None:
        """Dense FLOP/s of matrix products in this dtype (fp32 as it is, without tf32); None where there are none."""
        return self.peaks.get(dtype)


@dataclass(frozen=True)
class Cluster:
    """So many devices of one kind."""

    hardware: Hardware
    gpus: int
    gpus_per_node: int
    network: float
    """Bytes/s that a device sends to other nodes, one direction."""

    @property
    def nodes(self) -> int:
        """Nodes that are needed, the last perhaps not full."""
        return -(-self.gpus // self.gpus_per_node)


def cluster_of(
    hardware: Hardware, gpus: int, *, gpus_per_node: int | None = None, network: float | None = None
) -> Cluster:
    """`gpus` devices; what is None is as usual for them."""
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: at least 1 is needed")
    if gpus_per_node is not None and gpus_per_node < 1:
        raise UserError(f"--gpus-per-node {gpus_per_node}: at least 1 is needed")
    return Cluster(hardware, gpus, gpus_per_node or hardware.gpus_per_node, network or hardware.network)


def hardware_names() -> list[str]:
    """Those that there are files for, by name."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@lru_cache
def load_hardware(name: str) -> Hardware:
    """The hardware of this name (`h100`). Raises UserError where there is none, with those that there are."""
    names = hardware_names()
    key = name.strip().lower().replace("_", "-")
    if key not in names:
        known = ", ".join([*names, THIS_MACHINE])
        hint = did_you_mean(key, [*names, THIS_MACHINE])
        raise UserError(f"--gpu {name}: there is no hardware of this name (there is: {known}){hint}")
    import yaml  # the formulas are there without it

    values = yaml.safe_load((FOLDER / f"{key}.yaml").read_text(encoding="utf-8"))
    peaks = {dtype: float(figure["value"]) for dtype, figure in values["peak"].items()}
    bandwidth, processors = parse_rate(values["bandwidth"]["value"]), int(values["processors"]["value"])
    reached, reasons = attainable(values["generation"])
    hardware = Hardware(
        key,
        values["title"],
        memory=parse_size(values["memory"]["value"]),
        peaks=peaks,
        bandwidth=bandwidth,
        link=parse_rate(values["link"]["value"]),
        network=parse_rate(values["network"]["value"]),
        gpus_per_node=int(values["gpus_per_node"]["value"]),
        processors=processors,
        rates=Datasheet(
            peaks,
            bandwidth,
            processors,
            matmul_share=reached["matmul"],
            attention_share=reached["attention"],
            copied=reached["bandwidth"],
            link=reached["link"],
            network=reached["network"],
            together=reached["together"],
            launch=reached["launch"],
            dispatch=reached["dispatch"],
            base_latency=reached["latency.base"],
            link_latency=reached["latency.link"],
            network_latency=reached["latency.network"],
        ),
        sources={**_sources(values), **{f"attainable {name}": reason for name, reason in reasons.items()}},
        torch_name=values["torch_name"],
    )
    return hardware


def _sources(values: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, figure in values.items():
        if isinstance(figure, dict) and "source" in figure:
            found[name] = figure["source"]
        elif isinstance(figure, dict):
            found |= {f"{name} {part}": value["source"] for part, value in figure.items()}
    return found


def attainable(generation: str) -> tuple[dict[str, float], dict[str, str]]:
    """What a generation of GPUs reaches: figures and their sources, by name (`matmul`, `latency.base`)."""
    import yaml

    figures: dict[str, float] = {}
    sources: dict[str, str] = {}
    for name, entry in yaml.safe_load(ATTAINABLE.read_text(encoding="utf-8")).items():
        if "value" in entry:
            found = {name: entry}
        elif generation in entry:
            found = {name: entry[generation]}
        else:
            found = {f"{name}.{part}": figure for part, figure in entry.items()}
        for key, figure in found.items():
            figures[key], sources[key] = float(figure["value"]), figure["source"]
    return figures, sources


# --- what people write --------------------------------------------------------------------------------------------


def parse_rate(text: str, what: str = "") -> float:
    """Bytes/s of `50GB/s`, `400Gb/s`, `400Gbit/s` or `400Gbps` (B bytes, b bits; G is 10^9).

    `what` names the value in the error (`--network`). Raises UserError where it is no such rate, or none at all.
    """
    found = _RATE.fullmatch(str(text))
    rate = 0.0
    if found is not None:
        rate = float(found["number"]) * 1000.0 ** _PREFIXES[found["prefix"]]
        rate /= 8 if found["unit"] == "b" else 1
    if rate <= 0:
        raise UserError(
            f"{what} {text}: not a rate of data; write bytes as 50GB/s, or bits as 400Gb/s or 400Gbps".strip()
        )
    return rate


def parse_size(text: str, what: str = "") -> int:
    """Bytes of `80GB` (10^9) or `79GiB` (2^30). Raises UserError where it is no such size, or none at all."""
    found = _SIZE.fullmatch(str(text))
    size = 0
    if found is not None:
        size = round(
            float(found["number"]) * (1024 if found["binary"] else 1000) ** _PREFIXES[found["prefix"]]
        )
    if size <= 0:
        raise UserError(f"{what} {text}: not a size; write 80GB, or 79GiB".strip())
    return size
