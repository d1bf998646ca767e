"""What do the guides' two training configs take on 8 and on 32 H100? As they stand, and in the layout that the search finds.

    python benchmarks/plan_guides.py [--write-docs]

Writes benchmarks/results/plan_guides.json, and with `--write-docs` the table of docs/planner.md. Nothing is measured: these are
predictions. A few seconds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import put_into, write_result  # noqa: E402
from modelyard.config.disk import size  # noqa: E402
from modelyard.config.loader import load_config  # noqa: E402
from modelyard.plan.duration import duration_of  # noqa: E402
from modelyard.plan.hardware import cluster_of, load_hardware  # noqa: E402
from modelyard.plan.memory import most_of_all  # noqa: E402
from modelyard.plan.room import room_of  # noqa: E402
from modelyard.plan.search import Found, in_short, search  # noqa: E402
from modelyard.plan.workload import workload_of  # noqa: E402

NAME = "plan_guides"
DOCS = ROOT / "docs" / "planner.md"
CONFIGS = ("train-llama-3.1-8b", "train-qwen-2.5-7b")


def rows_of(name: str, gpus: int) -> list[dict[str, Any]]:
    """The config as it stands, and the best layout of the search, as lines of the table."""
    loaded = load_config([ROOT / "examples" / f"{name}.yaml"])
    config, architecture = loaded.train, loaded.architecture
    assert architecture is not None
    cluster = cluster_of(load_hardware("h100"), gpus)
    workload = workload_of(config, architecture, gpus, on_gpu=True)
    _, memory = most_of_all(workload)
    own = Found(config, workload, duration_of(workload, cluster), memory, room_of(memory, cluster.hardware))
    found, looked_at = search(config, architecture, workload, cluster, best=1)
    lines = [("as it stands", own), (f"best of {looked_at:,}", found[0])]
    return [
        {
            "config": f"examples/{name}.yaml",
            "gpus": gpus,
            "which": which,
            "layout": in_short(one),
            "needed": size(one.room.needed),
            "fits": one.room.fits,
            "step_seconds": one.duration.step,
            "tokens_per_second_per_gpu": one.duration.tokens_per_second,
            "mfu_causal": one.duration.mfu_causal,
            "mfu_full": one.duration.mfu_full,
            "days": one.duration.days(config.training.train_iters),
            "gpu_hours": one.duration.gpu_hours(config.training.train_iters),
        }
        for which, one in lines
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| config | H100 | | layout | memory needed | a step | tokens/s a GPU | MFU causal, full | days | GPU-hours |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    before = None
    for row in rows:
        key = row["config"], row["gpus"]
        first = (f"`{row['config']}`", str(row["gpus"])) if key != before else ("", "")
        before = key
        fits = "" if row["fits"] else " (does not fit)"
        lines.append(
            f"| {first[0]} | {first[1]} | {row['which']} | {row['layout']} | {row['needed']}{fits} | "
            f"{row['step_seconds']:.2f} s | {row['tokens_per_second_per_gpu']:,.0f} | {row['mfu_causal']:.1%}, "
            f"{row['mfu_full']:.1%} | {row['days']:.1f} | {row['gpu_hours']:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/planner.md")
    arguments = parser.parse_args()
    rows = [row for name in CONFIGS for gpus in (8, 32) for row in rows_of(name, gpus)]
    print(table(rows))
    print(f"wrote {write_result(NAME, {'rows': rows})}")
    if arguments.write_docs:
        put_into(DOCS, NAME, table(rows))
        print(f"wrote {DOCS}")


if __name__ == "__main__":
    main()
