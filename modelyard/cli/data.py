"""The verbs around data: prepare, tokenizer train, inspect (checkpoints, too)."""

from __future__ import annotations

import argparse
from pathlib import Path

from modelyard.cli.arguments import OVERRIDES, Verb, config_arguments, count, load
from modelyard.errors import UserError


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is in output_path; start over")


def _prepare(options: argparse.Namespace) -> int:
    from modelyard.data.prepare import run_prepare
    from modelyard.data.ranks import own_rank
    from modelyard.parallel.rank import wait_for_the_main_process

    try:
        loaded = load(options, "prepare")
        number = own_rank(loaded.prepare).number
    except UserError:
        wait_for_the_main_process()  # all have read the same
        raise
    for notice in loaded.notices if not number else ():
        print(f"note: {notice}")
    try:
        return run_prepare(loaded.prepare, overwrite=options.overwrite)
    except UserError as error:
        name = f"rank {number}: " if number else ""
        raise UserError(*(f"{name}{problem}" for problem in loaded.located(error.problems))) from None


def _tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser)
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="tokens, special ones included"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to write (default: the config's tokenizer.path)"
    )
    parser.add_argument(
        "--chat",
        metavar="FORMAT",
        help="with the special tokens of a chat format: llama3, qwen2.5, chatml or vicuna",
    )


def _tokenizer_train(options: argparse.Namespace) -> int:
    from modelyard.data.tokenizer_training import run_tokenizer_train

    loaded = load(options, "prepare")
    return run_tokenizer_train(
        loaded.prepare, output=options.output, vocab_size=options.vocab_size, chat=options.chat
    )


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="STORE|CHECKPOINT|CONFIG|KEY=VALUE",
        help="a folder, or YAML files and dotted overrides",
    )
    parser.add_argument("-c", "--config", action="append", default=[], metavar="CONFIG", help="a YAML file")
    add = parser.add_argument
    add("--html", type=Path, metavar="FILE", help="write a page to share; here only what is wrong is said")
    add("--json", action="store_true", help="one JSON object in place of the text")
    add("--tokens", type=count, default=300, metavar="N", help="shown of each document (default: 300)")
    add("--ids", action="store_true", help="show token ids too")
    add("--documents", type=count, default=3, metavar="N", help="of a store: how many to show (default: 3)")
    add("--document", type=int, metavar="I", help="of a store: show this one, counted from 0")
    add("--seed", type=count, default=0, metavar="N", help="of a store: draws the documents (default: 0)")
    add("--iteration", type=count, default=0, metavar="N", help="of a config: which batch (default: 0)")
    add("--rows", type=count, default=4, metavar="N", help="of a config: rows to show (default: 4)")
    add("--tensors", action="store_true", help="of a checkpoint: list every tensor")
    add("--verify", action="store_true", help="compare all checksums, whatever the size")
    add(
        "--scan-limit",
        type=count,
        default=1_000_000_000,
        metavar="N",
        help="tokens of each dataset that are read (default: 1e9); 0 reads no tokens, and no values of a checkpoint",
    )


def _inspect(options: argparse.Namespace) -> int:
    from modelyard.report.inspect import inspect_command
    from modelyard.report.inspect_data import Options

    words = [*options.config, *options.words]
    if not words:
        raise UserError(f"nothing to inspect: name a store, checkpoint or config, as in `{options.example}`")
    chosen = Options(
        documents=options.documents,
        document=options.document,
        tokens=max(2, options.tokens),
        ids=options.ids,
        seed=options.seed,
        rows=options.rows,
        iteration=options.iteration,
        scan_limit=options.scan_limit,
        all_tensors=options.tensors,
        verify=options.verify,
    )
    return inspect_command(
        words,
        chosen,
        lambda: load(options, None, keep_problems=True),
        html=options.html,
        as_json=options.json,
    )


VERBS: dict[str, Verb] = {
    "prepare": Verb(
        "Turn text into a token store.",
        f"""{OVERRIDES}
examples:
  modelyard prepare examples/prepare-text.yaml
  modelyard prepare examples/prepare-code.yaml output_path=/data/code tokenize_workers=16
on two machines with a shared folder (docs/data-preparation.md):
  torchrun --nnodes 2 --nproc_per_node 1 ... --no_python modelyard prepare examples/prepare-text.yaml""",
        _prepare_arguments,
        _prepare,
    ),
    "tokenizer train": Verb(
        "Train a byte-level BPE tokenizer on the sources of a prepare config.",
        "example:\n  modelyard tokenizer train examples/prepare-code.yaml --vocab-size 4096 --output tokenizer",
        _tokenizer_arguments,
        _tokenizer_train,
    ),
    "inspect": Verb(
        "Show documents, batches and checkpoints as they are, and what is wrong with them.",
        """Documents and batches are shown token by token: coloured what is trained on, dimmed (⟦in brackets⟧ without colour) what
is masked. The exit status is 1 where something is wrong: nothing to train on, tokens beyond the vocabulary,
begin-of-sequence twice, weights that are no numbers, damaged files.
examples:
  modelyard inspect train.yaml
  modelyard inspect train.yaml --iteration 1000 --html batch.html
  modelyard inspect data/training --documents 5
  modelyard inspect runs/a --tensors""",
        _inspect_arguments,
        _inspect,
    ),
}
