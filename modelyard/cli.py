"""The command line: one verb, one function. Each imports what it needs when it is called, so that help is quick."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from modelyard import __version__
from modelyard.errors import RunFailed, UserError, did_you_mean

if TYPE_CHECKING:
    from modelyard.config.loader import Loaded

# Words that the guides put between the verb and the config: `train gpt --config X`, `prepare gpt_memmap --config X`.
GUIDE_WORDS = ("gpt", "gpt_memmap")

OVERRIDES = """\
Several files are merged, later ones win; KEY=VALUE overrides win over files. Order on the line does not matter."""


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
            print(f"error: {_one_line(problem)}", file=sys.stderr)
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
        name = _one_line(str(error.filename))
        name = name if len(name) <= 80 else name[:80] + "…"
        print(f"error: {name}: {error.strerror}", file=sys.stderr)
        return 2


def _one_line(text: str) -> str:
    """A message with what steers a terminal written out: keys and values of a config may hold anything."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)


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
    parser = _Parser(
        prog=f"modelyard {name}",
        description=verb.summary,
        epilog=verb.details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_arguments(parser)
    parser.set_defaults(example=verb.details.split("example", 1)[-1].split("\n")[1].strip())
    return verb.run(parser.parse_intermixed_args(rest))


class _Parser(argparse.ArgumentParser):
    """Answers a wrong option as a wrong key is answered: one line, with the nearest name."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        hint = (
            did_you_mean(unknown.split("=")[0], self._option_string_actions)
            if unknown.startswith("-")
            else ""
        )
        raise UserError(f"{self.prog}: {message}{hint} ({self.prog} --help lists them)")


# Arguments that several verbs share


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG|KEY=VALUE", help="YAML files and dotted overrides"
    )
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="CONFIG", help="a YAML file (as in the guides)"
    )


def _load(options: argparse.Namespace, kind: str | None, *, keep_problems: bool = False) -> Loaded:
    """The config from the words and options of the command line; raises UserError, or keeps what can be kept."""
    from modelyard.config.loader import load_config

    files, overrides = _files_and_overrides(options)
    return load_config(files, overrides, kind=kind, keep_problems=keep_problems)


def _files_and_overrides(options: argparse.Namespace) -> tuple[list[Path], list[str]]:
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


# Several processes


def _nproc_argument(parser: argparse.ArgumentParser, what: str = "start N processes on this machine") -> None:
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


def _laid_out(options: argparse.Namespace) -> tuple[Loaded, int | None]:
    """The config, possible on the processes there are or are to be started; and how many of the latter, if any."""
    from modelyard.launch.command import laid_out

    return laid_out(lambda: _load(options, "train"), options.nproc)


def _start(processes: int, verb: str, options: argparse.Namespace, *flags: str) -> int:
    """The same command, in so many processes."""
    from modelyard.launch.torchrun import launch

    files = [word for file in options.config for word in ("--config", file)]
    return launch(processes, "modelyard", [verb, *options.words, *files, *flags])


# train


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    _nproc_argument(parser)
    parser.add_argument(
        "-v", "--validate", action="store_true", help="only check the config, as `modelyard validate` does"
    )
    parser.add_argument(
        "--force", action="store_true", help="go on although the config changed what was trained so far"
    )


def _train(options: argparse.Namespace) -> int:
    if options.validate:
        return _validate(options)
    loaded, processes = _laid_out(options)
    if processes is not None:
        return _start(processes, "train", options, *["--force"] * options.force)
    from modelyard.train.run import train

    return train(loaded, force=options.force)


# validate, schema


def _validate_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    _nproc_argument(parser, "show the layout on N processes")


def _validate(options: argparse.Namespace) -> int:
    from modelyard.launch.command import processes_asked
    from modelyard.plan.summary import summarise

    loaded = _load(options, None, keep_problems=True)
    processes = processes_asked(options.nproc) or (1 if options.nproc == "auto" else None)
    for notice in loaded.notices:
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


def _schema_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", choices=("train", "prepare"), default="train", help="which config (default: train)"
    )


def _schema(options: argparse.Namespace) -> int:
    import json

    from modelyard.config.schema import json_schema

    print(json.dumps(json_schema(options.kind), indent=2))
    return 0


# migrate


def _migrate_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write it there, not to the screen; must not exist"
    )


def _migrate(options: argparse.Namespace) -> int:
    from modelyard.config.migrate import migrate
    from modelyard.files import replace_text

    files, overrides = _files_and_overrides(options)
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


# prepare, tokenizer train


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is in output_path; start over")


def _prepare(options: argparse.Namespace) -> int:
    from modelyard.data.prepare import run_prepare

    loaded = _load(options, "prepare")
    for notice in loaded.notices:
        print(f"note: {notice}")
    try:
        return run_prepare(loaded.prepare, overwrite=options.overwrite)
    except UserError as error:
        raise UserError(*loaded.located(error.problems)) from None


def _tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument(
        "--vocab-size", type=int, required=True, metavar="N", help="tokens, special ones included"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to write (default: the config's tokenizer.path)"
    )


def _tokenizer_train(options: argparse.Namespace) -> int:
    from modelyard.data.tokenizer_training import run_tokenizer_train

    loaded = _load(options, "prepare")
    return run_tokenizer_train(loaded.prepare, output=options.output, vocab_size=options.vocab_size)


# inspect


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
    add("--tokens", type=_count, default=300, metavar="N", help="shown of each document (default: 300)")
    add("--ids", action="store_true", help="show token ids too")
    add("--documents", type=_count, default=3, metavar="N", help="of a store: how many to show (default: 3)")
    add("--document", type=int, metavar="I", help="of a store: show this one, counted from 0")
    add("--seed", type=_count, default=0, metavar="N", help="of a store: draws the documents (default: 0)")
    add("--iteration", type=_count, default=0, metavar="N", help="of a config: which batch (default: 0)")
    add("--rows", type=_count, default=4, metavar="N", help="of a config: rows to show (default: 4)")
    add("--tensors", action="store_true", help="of a checkpoint: list every tensor")
    add("--verify", action="store_true", help="compare all checksums, whatever the size")
    add(
        "--scan-limit",
        type=_count,
        default=1_000_000_000,
        metavar="N",
        help="tokens of each dataset that are read (default: 1e9); 0 reads no tokens, and no values of a checkpoint",
    )


def _count(text: str) -> int:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if number < 0 or number != int(number):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 on")
    return int(number)


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
        lambda: _load(options, None, keep_problems=True),
        html=options.html,
        as_json=options.json,
    )


# evaluate, generate, convert


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    _nproc_argument(parser)
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="which (default: the newest of run.experiment_dir)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line an evaluator")


def _evaluate(options: argparse.Namespace) -> int:
    loaded, processes = _laid_out(options)
    if processes is not None:
        checkpoint = [] if options.checkpoint is None else ["--checkpoint", str(options.checkpoint)]
        return _start(processes, "evaluate", options, *checkpoint, *["--json"] * options.json)
    from modelyard.train.evaluate import evaluate

    return evaluate(loaded, checkpoint=options.checkpoint, as_json=options.json)


def _dtype(text: str) -> str:
    names = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if text not in (*names, *names.values()):
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(names)}")
    return names.get(text, text)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face folder, checkpoint, or experiment folder"
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
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
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
        "--dtype", type=_dtype, metavar="TYPE", help="fp32, bf16, fp16, fp64 (default: the weights' own)"
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the one beside the model")
    parser.add_argument("--json", action="store_true", help="one line a prompt: prompt, text, token_ids")


def _generate(options: argparse.Namespace) -> int:
    from modelyard.generate.command import generate_command

    return generate_command(options)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="checkpoint, experiment folder or Hugging Face folder"
    )
    parser.add_argument(
        "destination", type=Path, metavar="DESTINATION", help="folder to write; must not exist"
    )
    from modelyard.config.huggingface import FAMILIES

    parser.add_argument("--format", choices=tuple(FAMILIES), help="family (default: as the source)")
    parser.add_argument(
        "--dtype",
        type=_dtype,
        metavar="TYPE",
        help="fp32, bf16, fp16 (default: bf16; a Hugging Face folder's own)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer to put beside (default: the source's)"
    )


def _convert(options: argparse.Namespace) -> int:
    from modelyard.train.export import convert

    return convert(
        options.source,
        options.destination,
        family=options.format,
        dtype=options.dtype,
        tokenizer_folder=options.tokenizer,
    )


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


@dataclass(frozen=True)
class Verb:
    summary: str
    details: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


VERBS: dict[str, Verb] = {
    "train": Verb(
        "Train as the config says, or go on where the experiment stopped.",
        f"""{OVERRIDES}
examples:
  modelyard train examples/train-tiny.yaml
  modelyard train base.yaml training.train_iters=50 model.base_model.transformer.num_layers=4
  modelyard train base.yaml --nproc 8
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
    "prepare": Verb(
        "Turn text into a token store.",
        f"""{OVERRIDES}
examples:
  modelyard prepare examples/prepare-text.yaml
  modelyard prepare examples/prepare-code.yaml output_path=/data/code tokenize_workers=16""",
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
    "evaluate": Verb(
        "Run the config's evaluators on its newest checkpoint, or on a named one.",
        "examples:\n  modelyard evaluate train.yaml\n  modelyard evaluate train.yaml --checkpoint runs/a/checkpoint/1000",
        _evaluate_arguments,
        _evaluate,
    ),
    "generate": Verb(
        "Continue prompts with a model.",
        """examples:
  modelyard generate runs/a --prompt 'def fibonacci(n):' --temperature 0
  modelyard generate Llama-3.1-8B --prompt-file question.txt --top-p 0.9 --json""",
        _generate_arguments,
        _generate,
    ),
    "convert": Verb(
        "Write a folder that transformers loads.",
        "example:\n  modelyard convert runs/a/checkpoint/1000 my-model --format llama",
        _convert_arguments,
        _convert,
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
