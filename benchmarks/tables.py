"""The tables of docs/speed.md and docs/performance.md, from what the benchmarks wrote to `benchmarks/results/`.

    python benchmarks/tables.py            print them
    python benchmarks/tables.py --write    put them into those pages

A benchmark that has no results is left out, and the page says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- tables: written by benchmarks/tables.py --write -->", "<!-- end of the tables -->"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def train_step(found: dict[str, Any]) -> str:
    ratios, absolute = [], []
    for name, result in found["results"].items():
        case, floor = result["case"], result["floor"]
        tokens = case["rows"] * case["sequence"]
        products = floor["blocks' products"] + floor["head's products"]
        whole = products + floor["attention"] + floor["optimizer"]
        seen = set()
        for peer, against in result["peers"].items():
            rows = against["rows"]
            ours = min(row["seconds"] for who, row in rows.items() if who.startswith("modelyard"))
            ratios.append(
                [
                    name,
                    peer,
                    f"**{against['speed']:.2f}**",
                    f"{against['speed_eager']:.2f}",
                    f"{against['memory']:.2f}",
                    f"{ours / whole:.2f}",
                    f"{ours / products:.2f}",
                ]
            )
            for who, row in rows.items():
                if who in seen:
                    continue
                seen.add(who)
                absolute.append(
                    [
                        name,
                        who,
                        f"{tokens / row['seconds']:,.0f}",
                        f"{row['seconds']:.3f}",
                        mib(row["peak_bytes"]),
                        f"{row['loss']:.4f}",
                        f"{row['grad_norm']:.3f}",
                    ]
                )
    first = table(
        (
            "case",
            "against",
            "times as fast",
            "eager to eager",
            "of its memory",
            "our time / floor",
            "our time / products alone",
        ),
        ratios,
    )
    second = table(("case", "program", "tokens/s", "s a step", "peak MiB", "loss", "gradient norm"), absolute)
    return f"{first}\n\n<details><summary>Every program's own figures</summary>\n\n{second}\n\n</details>"


def sft(found: dict[str, Any]) -> str:
    ratios, absolute = [], []
    for name, result in found["results"].items():
        rows = result["rows"]
        if "speed" in result:
            ratios.append(
                [
                    name,
                    result["theirs"],
                    f"**{result['speed']:.2f}**",
                    f"{eager:.2f}" if (eager := result["speed_eager"]) else "",
                    f"{result['memory']:.2f}",
                    f"{result['memory_of_fastest']:.2f}",
                ]
            )
        for who, row in rows.items():
            if "tokens_per_second" not in row:
                absolute.append([name, who, row["failed"], *[""] * 6])
                continue
            trained = row["trained_per_second"]
            absolute.append(
                [
                    name,
                    who if trained else f"{who} (mixes conversations)",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{trained:,.0f}" if trained else "",
                    mib(row["peak_bytes"]),
                    str(row["rounds"]),
                    f"{row['loss'][0]:.4f}",
                    f"{row['grad_norm'][0]:.3f}",
                    f"{row['difference']:.0e}" if trained else "",
                ]
            )
    first = table(
        (
            "case",
            "TRL's fastest",
            "times as fast",
            "eager to eager",
            "of its least memory",
            "of its fastest's memory",
        ),
        ratios,
    )
    second = table(
        (
            "case",
            "program",
            "tokens/s",
            "trained tokens/s",
            "peak MiB",
            "steps",
            "loss",
            "gradient norm",
            "furthest from ours",
        ),
        absolute,
    )
    versions = next(iter(found["results"].values()))["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "torch")
    return (
        f"{first}\n\nAgainst {named}.\n\n<details><summary>Every program's own figures</summary>\n\n{second}\n\n"
        "</details>"
    )


def prepare(found: dict[str, Any]) -> str:
    return table(
        (
            "tokenizer",
            "processes",
            "prepare, tokens/s",
            "`datasets.map`",
            "tokenizer alone",
            "÷ map",
            "÷ alone",
        ),
        (
            [
                run["tokenizer"],
                str(run["workers"]),
                f"{run['tokens_per_second']['ours']:,.0f}",
                f"{max(v for k, v in run['tokens_per_second'].items() if k.startswith('map')):,.0f}",
                f"{run['tokens_per_second']['raw']:,.0f}",
                f"**{run['times_datasets_map']:.2f}**",
                f"{run['of_raw_tokenizer']:.2f}",
            ]
            for run in found["runs"]
        ),
    )


def start_up(found: dict[str, Any]) -> str:
    stores = table(
        ("documents", "rows", "index", "first batch, ms", "peak MiB"),
        (
            [
                f"{row['documents']:,}{' (extrapolated)' if row.get('extrapolated') else ''}",
                row["rows"],
                row["index"],
                f"{row['first_batch_seconds'] * 1e3:,.0f}",
                mib(row["peak_bytes"]),
            ]
            for row in found["stores"]
        ),
    )
    commands = table(
        ("command", "seconds", "of `import torch`"),
        (
            [f"`{name}`", f"{row['seconds']:.2f}", f"{row['of_import_torch']:.2f}"]
            for name, row in found["commands"].items()
        ),
    )
    return f"{stores}\n\n{commands}"


def checkpoint(found: dict[str, Any]) -> str:
    megabytes = found["bytes"] / 1e6
    waited_for = table(
        ("", "seconds", "MB/s", "the disk alone, MB/s", "share of it"),
        (
            [
                f"{name} {megabytes:,.0f} MB",
                f"{found[name]:.2f}",
                f"{megabytes / found[name]:,.0f}",
                f"{megabytes / found[plain]:,.0f}",
                f"{found[plain] / found[name]:.2f}",
            ]
            for name, plain in (("save", "plain write"), ("load", "plain read"))
        ),
    )
    beside = table(
        ("a save beside the training", "training waits, s", "durable after, s"),
        (
            [words, f"{found[f'{name}: training waits']:.2f}", f"{found[f'{name}: durable after']:.2f}"]
            for name, words in (
                ("ours", "ours, with checksums, manifest and rename"),
                ("async_save", "torch's dcp.async_save, without"),
            )
        ),
    )
    return f"{waited_for}\n\n{beside}"


def finetune(found: dict[str, Any]) -> str:
    ratios, absolute, floors = [], [], []
    for name, result in found["results"].items():
        for method, measured in result["methods"].items():
            rows, least = measured["rows"], measured["floor"]
            ours = rows[measured["ours"]]
            for layout, against in measured["against"].items():
                ratios.append(
                    [
                        f"{name}, {method}",
                        f"{layout}: {against['form']}",
                        f"**{against['speed']:.2f}**",
                        f"{against['speed_eager']:.2f}",
                        f"**{against['memory']:.2f}**",
                        f"{against['least_memory']:.2f}",
                        f"{against['memory_whole']:.2f}",
                    ]
                )
            seconds = [least[part] for part in FLOOR_PARTS]
            floors.append(
                [
                    f"{name}, {method}",
                    *(f"{part:.3f}" for part in (*seconds, sum(seconds))),
                    f"{least['tokens'] / ours['tokens_per_second']:.3f}",
                    f"**{measured['of_floor']:.2f}**",
                    f"{measured['eager_of_floor']:.2f}",
                ]
            )
            for who, row in rows.items():
                if "failed" in row:
                    absolute.append([f"{name}, {method}", who, row["failed"], *[""] * 6])
                    continue
                absolute.append(
                    [
                        f"{name}, {method}",
                        who,
                        f"{row['tokens_per_second']:,.0f}",
                        f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}",
                        mib(row["memory_bytes"]),
                        mib(row["peak_bytes"]),
                        f"{row['loss'][0]:.4f}",
                        f"{row['grad_norm'][0]:.4f}",
                        f"{row['difference']:.0e}",
                    ]
                )
    first = table(
        (
            "case",
            "against TRL, its fastest",
            "times as fast (target 1.00)",
            "eager to eager",
            "of its memory (target 0.60)",
            "least to least",
            "whole processes",
        ),
        ratios,
    )
    second = table(
        ("case", *FLOOR_PARTS, "the floor, s", "ours, s", "ours / floor (target 1.10)", "eager / floor"),
        floors,
    )
    third = table(
        (
            "case",
            "program",
            "tokens/s",
            "s a step",
            "MiB above imports",
            "peak MiB",
            "loss",
            "gradient norm",
            "furthest from ours",
        ),
        absolute,
    )
    versions = next(iter(found["results"].values()))["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "torch")
    return (
        f"{first}\n\nAgainst {named}.\n\n{second}\n\n<details><summary>Every program's own figures</summary>\n\n"
        f"{third}\n\n</details>"
    )


FLOOR_PARTS = ("blocks' products", "adapter's products", "head's products", "attention", "optimizer")


def finetune_gpu(found: dict[str, Any]) -> str:
    speeds = table(
        (
            "case",
            "program",
            "tokens/s",
            "MFU",
            "peak GiB",
            "loss",
            "gradient norm",
            "times TRL's speed",
            "of its memory",
        ),
        [
            _gpu_row(name, who, row, rows)
            for name, rows in found["speed"].items()
            for who, row in rows.items()
        ],
    )
    lengths = table(
        ("case", "program", "longest document, tokens", "tokens/s at that length"),
        [
            [name, who, f"{row['longest']:,}", f"{row.get('tokens_per_second', 0):,.0f}"]
            for name, rows in found["longest"].items()
            for who, row in rows.items()
        ],
    )
    named = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    against = f"Against {named}." if "trl" in found["versions"] else "TRL was not installed there."
    return f"{speeds}\n\n{lengths}\n\n{against}"


def _gpu_row(name: str, who: str, row: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [name, who, row["failed"], *[""] * 6]
    ours, ratios = rows["modelyard"], ["", ""]
    if who != "modelyard" and "failed" not in ours:
        ratios = [
            f"{ours['tokens_per_second'] / row['tokens_per_second']:.2f}",
            f"{ours['peak_bytes'] / row['peak_bytes']:.2f}",
        ]
    return [
        name,
        who,
        f"{row['tokens_per_second']:,.0f}",
        f"{row['mfu_causal']:.1%}" if "mfu_causal" in row else "",
        f"{row['peak_bytes'] / 2**30:.1f}",
        f"{row['loss']:.3f}",
        f"{row['grad_norm']:.3f}",
        *ratios,
    ]


Section = tuple[str, Callable[[dict[str, Any]], str]]
PAGES: dict[str, dict[str, Section]] = {
    "speed.md": {
        "train_step": ("A training step", train_step),
        "sft": ("Fine-tuning", sft),
        "prepare": ("Preparing data", prepare),
        "start_up": ("Starting", start_up),
        "checkpoint": ("Checkpoints", checkpoint),
    },
    "performance.md": {
        "finetune": ("On a CPU", finetune),
        "finetune_gpu": ("On a GPU", finetune_gpu),
    },
}
"""By page of docs/, the results that it shows, in order."""


def page(name: str) -> str:
    """All sections of a page, each with the machine and the date of its figures."""
    parts = []
    for result, (title, make) in PAGES[name].items():
        path = RESULTS / f"{result}.json"
        if not path.exists():
            parts.append(f"## {title}\n\nNo results: run `python benchmarks/{result}.py`.")
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        parts.append(
            f"## {title}\n\n`python benchmarks/{result}.py`, {found['date']}, {found['device']}, torch "
            f"{found['torch']}:\n\n{make(found)}"
        )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put them into the pages of docs/")
    write = parser.parse_args().write
    for name in PAGES:
        if not write:
            print(page(name))
            continue
        path = DOCS / name
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        path.write_text(f"{before}{BEGIN}\n{page(name)}\n{END}{after}", encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
