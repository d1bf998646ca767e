"""What verbs have in common: how one is described, the options that several take, and how a config is read."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from modelyard.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from modelyard.config.loader import Loaded

# Words that the guides put between the verb and the config: `train gpt --config X`, `prepare gpt_memmap --config X`.
GUIDE_WORDS = ("gpt", "gpt_memmap")

OVERRIDES = """\
Several files are merged, later ones win; KEY=VALUE overrides win over files. Order on the line does not matter."""


@dataclass(frozen=True)
class Verb:
    summary: str
    details: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Answers a wrong option as a wrong key is answered: one line, with the nearest name."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        hint = (
            did_you_mean(unknown.split("=")[0], self._option_string_actions)
            if unknown.startswith("-")
            else ""
        )
        raise UserError(f"{self.prog}: {message}{hint} ({self.prog} --help lists them)")


def one_line(text: str) -> str:
    """A message with what steers a terminal written out: keys and values of a config may hold anything."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)


def config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG|KEY=VALUE", help="YAML files and dotted overrides"
    )
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="CONFIG", help="a YAML file (as in the guides)"
    )


def load(options: argparse.Namespace, kind: str | None, *, keep_problems: bool = False) -> Loaded:
    """The config from the words and options of the command line; raises UserError, or keeps what can be kept."""
    from modelyard.config.loader import load_config

    files, overrides = files_and_overrides(options)
    return load_config(files, overrides, kind=kind, keep_problems=keep_problems)


def files_and_overrides(options: argparse.Namespace) -> tuple[list[Path], list[str]]:
    words = list(options.words)
    if words and words[0] in GUIDE_WORDS and not os.path.exists(words[0]):
        words.pop(0)
    overrides = [word for word in words if "=" in word and not os.path.exists(word)]
    files = [Path(word) for word in [*options.config, *(word for word in words if word not in overrides)]]
    for word in files:
        if (
            re.fullmatch(r"[a-z_]+(\.\w+)+", str(word))
            and word.suffix not in (".yaml", ".yml")
            and not os.path.exists(word)
        ):
            raise UserError(f"'{word}' is no file; to set a key write {word}=VALUE")
    if not files:
        raise UserError(f"no config given: name a YAML file, as in `{options.example}`")
    return files, overrides


def nproc_argument(parser: argparse.ArgumentParser, what: str = "start N processes on this machine") -> None:
    parser.add_argument(
        "--nproc",
        type=_nproc,
        metavar="N|auto",
        help=f"{what}; auto: one for each GPU, else one (default: none is started; torchrun may have)",
    )


def _nproc(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number from 1 on nor auto")
    return text if text == "auto" else int(text)


def laid_out(options: argparse.Namespace) -> tuple[Loaded, int | None]:
    """The config, possible on the processes there are or are to be started; and how many of the latter, if any."""
    from modelyard.launch.command import laid_out

    return laid_out(lambda: load(options, "train"), options.nproc)


def start(processes: int, verb: str, options: argparse.Namespace, *flags: str) -> int:
    """The same command, in so many processes."""
    from modelyard.launch.torchrun import launch

    files = [word for file in options.config for word in ("--config", file)]
    return launch(processes, "modelyard", [verb, *options.words, *files, *flags])


def count(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if number < 0 or number != int(number):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 on")
    return int(number)


def dtype_name(text: str) -> str:
    names = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if text not in (*names, *names.values()):
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(names)}")
    return names.get(text, text)
