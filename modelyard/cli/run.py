"""The verbs around a config of a run: train, validate, evaluate, schema, migrate."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from modelyard.cli.arguments import (
    OVERRIDES,
    Verb,
    asked,
    config_arguments,
    elastic_arguments,
    files_and_overrides,
    laid_out,
    load,
    nproc_argument,
    start,
)
from modelyard.errors import UserError


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    elastic_arguments(parser)
    parser.add_argument(
        "-v", "--validate", action="store_true", help="only check the config, as `modelyard validate` does"
    )
    parser.add_argument(
        "--force", action="store_true", help="go on although the config changed what was trained so far"
    )


def _train(options: argparse.Namespace) -> int:
    if options.validate:
        return _validate(options)
    loaded, node = laid_out(options)
    if node is not None:
        return start(node, "train", options, *["--force"] * options.force)
    from modelyard.train.run import train

    return train(loaded, force=options.force)


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    nproc_argument(parser, "show the layout on N processes")


def _validate(options: argparse.Namespace) -> int:
    from modelyard.launch.command import Asked, processes_asked
    from modelyard.plan.summary import summarise

    words = asked(options) if "nnodes" in options else Asked(options.nproc)  # `train --validate` has them all
    processes = processes_asked(words) or (1 if words.nproc == "auto" else None)
    processes = None if processes is None else processes * words.most_nodes
    loaded = load(options, None, keep_problems=True)
    for notice in [*loaded.notices, *loaded.remarks]:
        print(f"note: {notice}")
    text, problems, warnings = summarise(loaded, processes)
    print(text)
    for warning in warnings:
        print(f"warning: {warning}")
    if problems:
        raise UserError(*problems)
    print(
        "valid" if not warnings else f"valid, with {len(warnings)} warning{'s' if len(warnings) > 1 else ''}"
    )
    return 0


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="devices in all (default: as few as the layout can be on)"
    )
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="a100, h100, h200, b200 and others that an unknown name lists, or this-machine (default: h100)",
    )
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="default: as usual for the hardware")
    parser.add_argument(
        "--network",
        metavar="RATE",
        help="what each GPU sends to other nodes, one direction: 50GB/s, 400Gb/s (default: as usual for the hardware)",
    )
    parser.add_argument(
        "--document-length",
        type=int,
        metavar="N",
        help="mean length in tokens of documents that do not see each other (default: as long as a row, the most work)",
    )
    parser.add_argument(
        "--storage", metavar="RATE", help="what a node writes to the disk of checkpoints (default: 2GB/s)"
    )
    parser.add_argument(
        "--search", action="store_true", help="rank the layouts that fit; the config's own is left aside"
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="build the model and run a step, without the hardware and without memory",
    )
    parser.add_argument(
        "--rank",
        type=int,
        action="append",
        metavar="N",
        help="with --trace: which (default: some of each pipeline stage)",
    )
    parser.add_argument("--measure", action="store_true", help="with --gpu this-machine: measure it again")
    parser.add_argument("--json", action="store_true", help="as one JSON record: bytes, seconds, FLOP/s")


def _plan(options: argparse.Namespace) -> int:
    from modelyard.plan.command import plan_command

    return plan_command(options, load(options, "train"))


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", choices=("train", "prepare"), default="train", help="which config (default: train)"
    )


def _schema(options: argparse.Namespace) -> int:
    import json

    from modelyard.config.schema import json_schema

    print(json.dumps(json_schema(options.kind), indent=2))
    return 0


def _migrate_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write it there, not to the screen; must not exist"
    )


def _migrate(options: argparse.Namespace) -> int:
    from modelyard.config.migrate import migrate
    from modelyard.files import replace_text

    files, overrides = files_and_overrides(options)
    if options.output is not None and os.path.lexists(options.output):
        raise UserError(f"{options.output} exists; name another file, or remove it")
    migrated = migrate(files, overrides)
    if migrated.problems:
        if options.output is None:
            print(migrated.text, end="")
        raise UserError(*migrated.problems)
    if options.output is None:
        print(migrated.text, end="")
    else:
        replace_text(options.output, migrated.text)
    return 0


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    elastic_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="which, or an adapter (default: the newest of run.experiment_dir)",
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="what an adapter adapts (default: the folder that it names)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line an evaluator")


def _evaluate(options: argparse.Namespace) -> int:
    loaded, node = laid_out(options)
    if node is not None:
        named = {"--checkpoint": options.checkpoint, "--base": options.base}
        words = [word for option, path in named.items() if path is not None for word in (option, str(path))]
        return start(node, "evaluate", options, *words, *["--json"] * options.json)
    from modelyard.train.evaluate import evaluate

    return evaluate(loaded, checkpoint=options.checkpoint, as_json=options.json, base=options.base)


VERBS: dict[str, Verb] = {
    "train": Verb(
        "Train as the config says, or go on where the experiment stopped.",
        f"""{OVERRIDES}
examples:
  modelyard train examples/train-tiny.yaml
  modelyard train base.yaml training.train_iters=50 model.base_model.transformer.num_layers=4
  modelyard train base.yaml --nproc 8 --max-restarts 5
  modelyard train base.yaml --nproc 8 --nnodes 2:4 --rdzv-endpoint node1:29500 --max-restarts 5      (the same on each node)
  torchrun --nproc_per_node=8 --no_python modelyard train gpt --config base.yaml      (the guides' words)""",
        _train_arguments,
        _train,
    ),
    "validate": Verb(
        "Everything that can be known of a config before starting: shape, sizes, schedule, problems.",
        f"""{OVERRIDES}
Data or weights that are not there yet are warnings (exit status 0); a config that cannot run exits with 2.
examples:
  modelyard validate train.yaml
  modelyard validate llama-3.1-8b-train.yaml llama-3.1-8b-architecture-part.yaml
  modelyard validate train.yaml model.distributed.tensor_parallel=2 --nproc 8""",
        _validate_arguments,
        _validate,
    ),
    "plan": Verb(
        "Whether a config fits, how fast it is and what it costs, on hardware that need not be here.",
        f"""{OVERRIDES}
A plan that does not fit names the least that would, and exits with 2. How far plans are from what was measured: docs/planner.md.
examples:
  modelyard plan train.yaml --gpus 32 --gpu h100
  modelyard plan train.yaml --gpus 16384 --gpu h100 --gpus-per-node 8 --network 50GB/s model.distributed.tensor_parallel=8
  modelyard plan train.yaml --gpus 64 --gpu h200 --search                (the ten best layouts, and YAML to paste)
  modelyard plan train.yaml --gpus 64 --trace                            (the step itself, on tensors without memory)
  modelyard plan examples/train-tiny.yaml --gpu this-machine""",
        _plan_arguments,
        _plan,
    ),
    "evaluate": Verb(
        "Run the config's evaluators on its newest checkpoint, or on a named one.",
        """\
examples:
  modelyard evaluate train.yaml
  modelyard evaluate train.yaml --checkpoint runs/a/checkpoint/1000
  modelyard evaluate train.yaml --nproc 8 --json""",
        _evaluate_arguments,
        _evaluate,
    ),
    "migrate": Verb(
        "Write a config of an older or newer dialect in today's spelling, its defaults written out.",
        f"""{OVERRIDES}
The files become one. What it says is checked against the original; what cannot be translated is listed (exit status 2).
examples:
  modelyard migrate old.yaml
  modelyard migrate train.yaml model.yaml batch.batch_size=256 --output today.yaml""",
        _migrate_arguments,
        _migrate,
    ),
    "schema": Verb(
        "Print the JSON schema of a config, for editors that complete and check YAML.",
        "example:\n  modelyard schema --kind train > train.schema.json",
        _schema_arguments,
        _schema,
    ),
}
