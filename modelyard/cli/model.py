"""The verbs around what was trained: generate, chat, convert, merge, average, report."""

from __future__ import annotations

import argparse
import math
from fractions import Fraction
from pathlib import Path

from modelyard.cli.arguments import Verb, dtype_name


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="Hugging Face folder, checkpoint, experiment folder or adapter",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="may be given several times; an empty one starts from nothing",
    )
    parser.add_argument(
        "--prompt-file",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a whole file as a prompt",
    )
    _sampling_arguments(parser, max_new_tokens=128)
    parser.add_argument("--json", action="store_true", help="one line a prompt: prompt, text, token_ids")


def _sampling_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """How text is drawn, and from what: for every verb in which a model writes."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=f"default: {max_new_tokens}"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="0 always takes the likeliest (default: 1)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the smallest set that holds P (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--dtype", type=dtype_name, metavar="TYPE", help="fp32, bf16, fp16, fp64 (default: the weights' own)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the one beside the model")
    _base_argument(parser)


def _base_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="what an adapter adapts (default: the folder that it names)"
    )


def _generate(options: argparse.Namespace) -> int:
    from modelyard.generate.command import generate_command

    return generate_command(options)


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="Hugging Face folder, checkpoint, experiment folder or adapter",
    )
    parser.add_argument(
        "--message",
        action="append",
        default=[],
        metavar="TEXT",
        help="say this and show the answer, then leave; may be given several times, in their order",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: what the format says)")
    parser.add_argument(
        "--tools",
        type=Path,
        metavar="FILE",
        help="definitions of tools as a JSON list, or a Python file whose functions are the tools",
    )
    parser.add_argument(
        "--run-python",
        action="store_true",
        help="run what the model calls of a Python file of tools, in a process with limits (default: you are asked for results)",
    )
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="chat format: llama3, qwen2.5, chatml, vicuna, template (default: that of the model)",
    )
    _sampling_arguments(parser, max_new_tokens=512)
    parser.add_argument(
        "--show-tokens", action="store_true", help="show the ids that the model reads each time"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one line a turn: message, answer, calls, messages, text, token_ids, stopped",
    )


def _chat(options: argparse.Namespace) -> int:
    from modelyard.generate.chat_command import chat_command

    return chat_command(options)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="checkpoint, experiment folder, Hugging Face folder or adapter",
    )
    parser.add_argument(
        "destination", type=Path, metavar="DESTINATION", help="folder to write; must not exist"
    )
    from modelyard.config.huggingface import FAMILIES

    parser.add_argument(
        "--format",
        choices=(*FAMILIES, "peft"),
        help="family (default: as the source), or peft: of an adapter nothing but itself, as PEFT reads it",
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        metavar="TYPE",
        help="fp32, bf16, fp16 (default: bf16; a Hugging Face folder's own)",
    )
    _put_beside_arguments(parser)


def _put_beside_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer to put beside (default: the source's)"
    )
    _base_argument(parser)


def _convert(options: argparse.Namespace) -> int:
    from modelyard.train.export import convert

    return convert(
        options.source,
        options.destination,
        family=options.format,
        dtype=options.dtype,
        tokenizer_folder=options.tokenizer,
        base=options.base,
    )


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    from modelyard.config.huggingface import FAMILIES

    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="PEFT folder, checkpoint or experiment folder"
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="folder to write; must not exist"
    )
    parser.add_argument(
        "--onto",
        choices=("original", "dequantized"),
        help="of an adapter that was trained on a quantised base: merge it into the base as it lies in its folder, or as the "
        "adapter knew it",
    )
    parser.add_argument("--format", choices=tuple(FAMILIES), help="family (default: that of the base)")
    parser.add_argument(
        "--dtype", type=dtype_name, metavar="TYPE", help="fp32, bf16, fp16, fp64 (default: the base's own)"
    )
    _put_beside_arguments(parser)


def _merge(options: argparse.Namespace) -> int:
    from modelyard.train.merge import merge

    return merge(
        options.adapter,
        options.to,
        base=options.base,
        onto=options.onto,
        family=options.format,
        dtype=options.dtype,
        tokenizer_folder=options.tokenizer,
    )


def _average_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="+",
        type=Path,
        metavar="MODEL",
        help="checkpoint, experiment folder (its newest checkpoint) or Hugging Face folder, all of one shape",
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="checkpoint to write; must not exist"
    )
    parser.add_argument(
        "--weights",
        type=_weights,
        metavar="W,W,…",
        help="how much each model counts, in their order; their sum is of no matter (default: all alike)",
    )
    parser.add_argument(
        "--last",
        type=_whole,
        metavar="N",
        help="the newest N checkpoints of the one experiment that is named, oldest first",
    )


def _weights(text: str) -> list[Fraction]:
    weights = []
    for word in text.split(","):
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise argparse.ArgumentTypeError(f"'{word}' is not a number from 0 on")
        weights.append(Fraction(str(number)))  # as it was written: 0.1 is 1/10
    return weights


def _whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 on")
    return int(text)


def _average(options: argparse.Namespace) -> int:
    from modelyard.train.average import average

    return average(options.models, options.to, weights=options.weights, last=options.last)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (its run.experiment_dir)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="page to write (default: RUN/report.html; report.html for several runs)",
    )


def _report(options: argparse.Namespace) -> int:
    from modelyard.report.command import report

    return report(options.runs, options.output)


VERBS: dict[str, Verb] = {
    "generate": Verb(
        "Continue prompts with a model.",
        """examples:
  modelyard generate runs/a --prompt 'def fibonacci(n):' --temperature 0
  modelyard generate Llama-3.1-8B --prompt-file question.txt --top-p 0.9 --json""",
        _generate_arguments,
        _generate,
    ),
    "chat": Verb(
        "Talk with a model in the terminal, in the format that it was taught.",
        """\
A line is a message; /help lists what else may be said. Ctrl-C stops an answer, Ctrl-D ends.
examples:
  modelyard chat runs/sft
  modelyard chat runs/sft/export/llama/1000 --system 'Answer in one sentence.' --temperature 0.6 --top-p 0.9
  modelyard chat runs/sft --tools tools.json --message 'What is the weather in Rome?' --json""",
        _chat_arguments,
        _chat,
    ),
    "convert": Verb(
        "Write a folder that transformers loads.",
        """\
An adapter is merged into its base, or, with --format peft, written as PEFT reads it.
examples:
  modelyard convert runs/a/checkpoint/1000 my-model --format llama
  modelyard convert runs/lora my-adapter --format peft""",
        _convert_arguments,
        _convert,
    ),
    "merge": Verb(
        "Merge an adapter into its base, as a folder that transformers loads.",
        """\
Computed in fp32, rounded once. The folder is opened again and its logits are compared with those of base and adapter, a
block in memory at a time; where they differ nothing is written.
examples:
  modelyard merge runs/lora --to my-model
  modelyard merge my-adapter --to my-model --base models/Llama-3.1-8B --dtype fp32
  modelyard merge runs/qlora/checkpoint/1000 --to my-model --onto original""",
        _merge_arguments,
        _merge,
    ),
    "average": Verb(
        "Average the weights of checkpoints or models into a new checkpoint.",
        """\
The result has weights alone: generate, convert, evaluate --checkpoint, inspect and pretrained.path take it.
examples:
  modelyard average runs/a --last 5 --to runs/a-averaged
  modelyard average runs/sft-1 runs/sft-2 models/sft-3 --weights 1,1,2 --to sft""",
        _average_arguments,
        _average,
    ),
    "report": Verb(
        "Write runs, finished or not, as one HTML page: plots, samples, events, configuration.",
        """\
Several runs lie over one another. The page is one file and loads nothing from anywhere.
examples:
  modelyard report runs/a
  modelyard report runs/a runs/b --output compared.html""",
        _report_arguments,
        _report,
    ),
}
