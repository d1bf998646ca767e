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
    from modelyard.launch.command import Asked, Node

# Words that the guides put between the verb and the config: `train gpt --config X`, `prepare gpt_memmap --config X`.
GUIDE_WORDS = ("gpt", "gpt_memmap")

_PROCESSES = ("--gpus-per-node", "--processes-per-node")
MEANT: dict[str, tuple[str, ...]] = {
    "--gpus": ("--gpus-per-node", "--nproc"),
    "--nproc": _PROCESSES,
    "--nproc-per-node": ("--nproc", *_PROCESSES),
    "--nproc_per_node": ("--nproc", *_PROCESSES),
    "--ntasks-per-node": _PROCESSES,
    "--cpus-per-task": ("--cpus",),
    "--nnodes": ("--nodes",),
    "--nodes": ("--nnodes",),
}
"""Options of other verbs and programs, and those of ours that say the same; a verb has some of them."""

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
        hint = self._hint(unknown.split("=")[0]) if unknown.startswith("-") else ""
        raise UserError(f"{self.prog}: {message}{hint} ({self.prog} --help lists them)")

    def _hint(self, name: str) -> str:
        if meant := [option for option in MEANT.get(name, ()) if option in self._option_string_actions]:
            return f"; did you mean {' or '.join(map(repr, meant))}?"
        return did_you_mean(name, self._option_string_actions)


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


def elastic_arguments(parser: argparse.ArgumentParser) -> None:
    """`--nproc`, and what goes with it on several nodes and for restarts."""
    nproc_argument(parser)
    parser.add_argument(
        "--max-restarts",
        type=count,
        metavar="K",
        help="start all processes again, up to K times, after one was killed or crashed (default: 0)",
    )
    parser.add_argument(
        "--nnodes",
        type=_nnodes,
        metavar="N|MIN:MAX",
        help="this machine is one of so many nodes; with MIN:MAX the run goes on with those that are there",
    )
    parser.add_argument(
        "--rdzv-endpoint",
        type=_endpoint,
        metavar="HOST:PORT",
        help="where the nodes meet, the same on each: one of them, which lives as long as the run, and a free port",
    )
    parser.add_argument(
        "--rdzv-id", metavar="ID", help="the job's name at that endpoint (default: run.experiment_dir)"
    )
    parser.add_argument(
        "--rdzv-conf",
        type=_rdzv_conf,
        metavar="KEY=NUMBER,...",
        help=f"patience of the meeting, as torchrun has it: {', '.join(MEETING)}",
    )


def _nproc(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number from 1 on nor auto")
    return text if text == "auto" else int(text)


def _nnodes(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition(":")
    most = most if ":" in text else fewest
    if not (fewest.isdecimal() and most.isdecimal() and 1 <= int(fewest) <= int(most)):
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither a whole number of nodes from 1 on nor two as MIN:MAX, the smaller first"
        )
    return int(fewest), int(most)


def _endpoint(text: str) -> str:
    from modelyard.launch.meeting import endpoint_of

    try:
        endpoint_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


MEETING = (
    "join_timeout",
    "last_call_timeout",
    "keep_alive_interval",
    "keep_alive_max_attempt",
    "close_timeout",
    "read_timeout",
)
"""What `--rdzv-conf` takes."""


def _rdzv_conf(text: str) -> dict[str, int]:
    found = {}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        if key not in MEETING:
            raise argparse.ArgumentTypeError(
                f"'{key}' is none of {', '.join(MEETING)}{did_you_mean(key, MEETING)}"
            )
        if not (equals and value.isdecimal() and int(value)):
            raise argparse.ArgumentTypeError(f"'{pair}' is not {key}=NUMBER, a whole number from 1 on")
        found[key] = int(value)
    return found


def asked(options: argparse.Namespace) -> Asked:
    """What the options of `elastic_arguments` say."""
    from modelyard.launch.command import Asked

    return Asked(
        nproc=options.nproc,
        nnodes=options.nnodes,
        endpoint=options.rdzv_endpoint,
        run_id=options.rdzv_id,
        restarts=options.max_restarts,
        conf=options.rdzv_conf,
    )


def laid_out(options: argparse.Namespace) -> tuple[Loaded, Node | None]:
    """The config, possible on the processes there are or are to be started; and what is to be started, if anything."""
    from modelyard.launch.command import laid_out

    return laid_out(lambda: load(options, "train"), asked(options))


def start(node: Node, verb: str, options: argparse.Namespace, *flags: str) -> int:
    """The same command, in the processes of a node."""
    from modelyard.launch.torchrun import launch

    files = [word for file in options.config for word in ("--config", file)]
    return launch(node, "modelyard", [verb, *options.words, *files, *flags])


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
