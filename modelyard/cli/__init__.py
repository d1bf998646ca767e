"""The command line: one verb, one function. Each imports what it needs when it is called, so that help is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from modelyard import __version__
from modelyard.cli import data, launch, model, run
from modelyard.cli.arguments import Parser, Verb, one_line
from modelyard.errors import RunFailed, UserError, did_you_mean

VERBS: dict[str, Verb] = run.VERBS | data.VERBS | model.VERBS | launch.VERBS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 for a run that failed, 2 where the user has something to change."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _answered(words)
    except OSError:
        if not _stdout_lost("\n"):  # tried again, for without a buffer nothing is held back
            raise
        return 2
    return status or (2 if _stdout_lost() else 0)


def _stdout_lost(text: str = "") -> bool:
    """Write out `text` after what standard output holds back, and say so where that fails.

    A reader that left is no error of ours.
    """
    try:
        print(text, end="", flush=True)
    except OSError as error:
        from modelyard.files import leave_stdout

        leave_stdout()
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output: {error.strerror}", file=sys.stderr)
            return True
    return False


def _answered(words: list[str]) -> int:
    """The verb's status; what is wrong for the user to change is one line, whatever verb it is."""
    try:
        return _dispatch(words)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {one_line(problem)}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0  # the reader of a pipe (`| head`) left
    except OSError as error:
        # What the system refuses about a path that the user named. Without a name it is about something of ours.
        if error.filename is None:
            raise
        name = one_line(str(error.filename))
        name = name if len(name) <= 80 else name[:80] + "…"
        print(f"error: {name}: {error.strerror}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"modelyard {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name == "tokenizer":
        name, rest = "tokenizer train", [word for word in rest if word != "train"]
    if name not in VERBS:
        raise UserError(f"'{name}' is not a verb{did_you_mean(name, VERBS)} (modelyard --help lists them)")
    verb = VERBS[name]
    parser = Parser(
        prog=f"modelyard {name}",
        description=verb.summary,
        epilog=verb.details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_arguments(parser)
    parser.set_defaults(example=verb.details.split("example", 1)[-1].split("\n")[1].strip())
    return verb.run(parser.parse_intermixed_args(rest))


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return f"""\
modelyard {__version__}: train Llama- and Qwen-class language models end to end, from one YAML file.

usage: modelyard VERB [CONFIG ...] [KEY=VALUE ...] [options]

{verbs}

`modelyard VERB --help` has the options and examples of a verb.
start here:
  modelyard validate examples/train-llama-3.1-8b.yaml     then docs/quickstart.md, or `make quickstart`"""
