"""What a user can get wrong, and what the program says: each mistake is made on purpose in a small real project.

    python benchmarks/bad_input.py [--only WORD] [--write-docs]

Prints a table of the mistakes and the real lines; exit status 1 when one was answered by anything else than its line
and exit status, or when something was written or lost. `--write-docs` puts the table into docs/bad-input.md.
tests/system/test_bad_input.py makes the same mistakes, one test each.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import re
import resource
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it can be started as a file

from benchmarks.bad_input_cases import MISTAKES, Mistake  # noqa: E402

PREPARE = """\
output_path: data
dataset: {path: texts.jsonl}
tokenizer: {path: tokenizer}
splits: {training: 0.7, validation: 0.3}
tokenize_workers: 1
loading_workers: 1
seed: 3
"""
TRAIN = """\
training:
  train_iters: 4
  logs: {interval: 1, tensorboard: no}
  evaluators:
    validation:
      interval: 4
      evaluator: {type: loss, iterations: 1, dataset_name: validation}
  checkpoint: {interval: 2, keep: 3}
  export: {format: llama, interval: 4, data_type: float32}
batch: {sequence_length: 32, micro_batch_size: 2, batch_size: 4, cross_document_attention: no}
data:
  datasets:
    training: {type: file, path: data/fast_llm_config_training.yaml}
    validation: {type: file, path: data/fast_llm_config_validation.yaml}
optimizer:
  learning_rate: {base: 3e-3}
model:
  base_model:
    vocab_size: 320
    tie_word_embeddings: no
    transformer:
      num_layers: 2
      hidden_size: 32
      num_attention_heads: 4
      head_groups: 2
      ffn_hidden_size: 64
      gated: yes
      add_linear_biases: no
      normalization: {type: rms_norm}
      rotary: {type: default}
run: {experiment_dir: run}
"""
CONTINUE = """\
training: {train_iters: 2, logs: {interval: 1, tensorboard: no}}
batch: {sequence_length: 32, batch_size: 2}
data:
  datasets:
    training: {type: file, path: data/fast_llm_config_training.yaml}
pretrained: {path: model, format: llama}
run: {experiment_dir: continued}
"""


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Outcome:
    status: int | str
    """Exit status, or the traceback."""
    lines: list[str]
    """What it said on standard error."""
    changed: list[str]
    """Files that appeared, went or changed."""


def program(*words: str) -> tuple[int, str, str]:
    """The program's `main` in this process: exit status, standard output, standard error."""
    from modelyard.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    return status, out.getvalue(), err.getvalue()


def build_project(folder: Path) -> Path:
    """A project that works: texts, tokenizers, token stores, a run of four iterations, a Hugging Face folder."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    sources = [*sorted((library / "json").glob("*.py")), *sorted((library / "email").glob("*.py"))]
    pieces = [part for source in sources for part in source.read_text(encoding="utf-8").split("\n\n") if part]
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": piece}) + "\n" for piece in pieces[:500])
    (folder / "prepare.yaml").write_text(PREPARE)
    (folder / "train.yaml").write_text(TRAIN)
    (folder / "continue.yaml").write_text(CONTINUE)
    with inside(folder):
        for words in (
            ("tokenizer", "train", "prepare.yaml", "--vocab-size", "320"),
            ("tokenizer", "train", "prepare.yaml", "--vocab-size", "300", "--output", "other-tokenizer"),
            ("prepare", "prepare.yaml"),
            ("train", "train.yaml"),
        ):
            status, out, err = program(*words)
            assert status == 0, (words, out, err)
        shutil.copytree("run/export/llama/4", "model")
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def make(mistake: Mistake, project: Path, folder: Path) -> Outcome:
    """Make a mistake in a copy of the project, and see what comes of it."""
    shutil.copytree(project, folder, symlinks=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with inside(folder), contextlib.ExitStack() as stack:
        words = mistake.provoke(stack)
        before = snapshot(folder)
        try:
            status: int | str
            status, _, err = program(*words)
        except BaseException:
            import traceback

            status, err = traceback.format_exc(), ""
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        after = snapshot(folder)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return Outcome(status, err.replace(f"{folder}/", "").splitlines(), names)


def lost(mistake: Mistake, outcome: Outcome, folder: Path) -> str | None:
    """What is wrong with the answer to a mistake, None where it is as it should be."""
    if outcome.status != mistake.status:
        return f"exit status {outcome.status}, not {mistake.status}"
    said = "\n".join(outcome.lines)
    if missing := [words for words in mistake.says if words not in said]:
        return f"does not say {missing}: {said}"
    if mistake.status and any(not line.startswith("error: ") for line in outcome.lines):
        return f"more than its lines: {said}"
    if mistake.status == 2 and outcome.changed:
        return f"changed {outcome.changed}"
    if (folder / "run").is_dir():
        with inside(folder):
            return mistake.afterwards() if mistake.afterwards else None
    return None


def table(rows: list[tuple[Mistake, Outcome]]) -> str:
    """The table of docs/bad-input.md."""
    lines = []
    group = None
    for mistake, outcome in rows:
        if mistake.group != group:
            group = mistake.group
            lines += [
                "",
                f"## {group}",
                "",
                "| the mistake | what the program says | test |",
                "|---|---|---|",
            ]
        said = "<br>".join(map(_code, outcome.lines)) or "nothing: it is no mistake"
        lines.append(f"| {mistake.what} | {said} | `{mistake.name}` |")
    return "\n".join(lines) + "\n"


def _code(line: str) -> str:
    text = line.removeprefix("error: ").replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


HEAD = """\
# What can be got wrong, and what is said

Written by `python benchmarks/bad_input.py --write-docs`, which makes every mistake below in a small project and copies
what the program says on standard error. Each line begins with `error: ` there, which is left out here. The exit status
is 2 and nothing is written, changed or lost, unless it says otherwise. Every row is a test:
`tests/system/test_bad_input.py::test_mistake[NAME]`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="mistakes whose name has this word")
    parser.add_argument("--write-docs", action="store_true", help="write docs/bad-input.md")
    options = parser.parse_args()
    chosen = [mistake for mistake in MISTAKES if options.only in mistake.name]
    failures = 0
    rows = []
    with tempfile.TemporaryDirectory() as place:
        project = build_project(Path(place) / "project")
        for mistake in chosen:
            folder = Path(place) / "copies" / mistake.name
            outcome = make(mistake, project, folder)
            problem = lost(mistake, outcome, folder)
            rows.append((mistake, outcome))
            print(f"{'LOST' if problem else 'ok':4} {mistake.name}: {mistake.what}")
            for line in outcome.lines:
                print(f"       {line}")
            if problem:
                failures += 1
                print(f"  !!   {problem}")
            shutil.rmtree(folder)
    print(f"\n{len(chosen)} mistakes, {len(chosen) - failures} answered as they should be, {failures} not")
    if options.write_docs and not options.only:
        text = HEAD + table(rows)
        assert not re.search(r"/tmp/|/home/|/root/", text), "a path of this machine is in the table"
        (ROOT / "docs" / "bad-input.md").write_text(text, encoding="utf-8")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
