"""Mutated configs for `benchmarks/faults.py`: whatever is written, the answer is "valid" or a clear line and exit 2.

Every case goes through the program's own `main`, once as `validate` and once as `train` (which is let go up to the
moment where it would build a model), in a folder with a small real token store, so that data is opened as well. A case
is lost when it ends in a traceback, in no answer for ten seconds, in another exit status, in a line that shows our
insides, or when a file has appeared; and when `validate` calls valid what `train` then refuses.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
HANG_SECONDS = 10
MEMORY_BYTES = 6 << 30
"""Address space that a case may add; a config that asks for more must be refused, not tried."""

INSIDES = re.compile(
    r"Traceback|object has no attribute|NoneType|<class |<modelyard|pydantic|ValidationError|(Key|Type|Index|Attribute)Error"
    r"|Input should be|\[Errno|maximum recursion|set_int_max_str_digits"
)
LONGEST_LINE = 1500


@dataclass
class Case:
    """One mutated configuration: the files as bytes, the words after the verb, and how it came about."""

    number: int
    base: str
    how: list[str]
    files: dict[str, bytes]
    overrides: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        return [*self.files, *self.overrides]

    def describe(self) -> str:
        return f"case {self.number} ({self.base}): {', '.join(self.how)}"


# Where configs come from


def base_configs(shared: Path | None) -> dict[str, list[Path]]:
    """Name → files that are given together: every example, and the guides' configs where they are at hand."""
    found = {str(path.relative_to(ROOT)): [path] for path in sorted((ROOT / "examples").rglob("*.yaml"))}
    if shared is None or not (shared / "configs").is_dir():
        return found
    configs = shared / "configs"
    parts = {
        path: re.sub("-(architecture|pretrained)-part", "-train", path.stem)
        for path in configs.glob("*-part.yaml")
    }
    for path in sorted(configs.glob("*.yaml")):
        if path in parts:
            found[f"{parts[path]} + {path.stem}"] = [configs / f"{parts[path]}.yaml", path]
        elif path.stem not in parts.values():
            found[path.stem] = [path]
    return found


# What can be wrong

WRONG_VALUES: tuple[Any, ...] = (
    -1, 0, 1, 3, 7, 2.5, -0.1, 1e-320, 1e308, 2**31, 2**63, 10**30, float("nan"), float("inf"), float("-inf"),
    None, True, False, "", " ", "yes please", "-", "text", "1:30", "2024-01-01", "0x1F", "1_000", "ünïcode ☃", "x" * 300,
    "a\nb", "\x07", "..", "../..", "no/such/folder", "file", "memmap", "random", "blended", "loss", "samples", "llama",
    [], {}, [1, 2, 3], ["a"], [None], [[]], {"a": 1}, {"type": "loss"}, {"type": "random"}, {"type": None}, {"": ""},
    {"0": 1}, [{"type": "random"}], {"type": "blended", "datasets": []},
    {"type": "slice", "begin": 0.9, "end": 0.1, "dataset": {"type": "random"}},
)  # fmt: skip
RAW_OVERRIDES = (
    "", "null", "~", ".nan", ".inf", "-1", "1e400", "[", "]", "{", "{a: 1}", "[1, 2]", "'", '"', "*x", "&x 1", "!!int 3",
    "!!python/object/apply:os.system [true]", "|", ">", "- 1", "a: b: c", "#", "%", "@", "`", "?", "<<", "9" * 5000,
    "\t", "yes", "no", "0777", "1__0", "--", "=", "==", "{<<: 3}", "{a: 1, a: 2}", "\x00", "🙂",
)  # fmt: skip
SHORT_WORDS = (
    "type",
    "path",
    "interval",
    "offset",
    "seed",
    "datasets",
    "base",
    "data",
    "model",
    "training",
    "dataset",
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, below in entries:
        yield (*path, key)
        yield from _paths(below, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        value = value[part]
    return value


def _misspelt(word: str, rng: random.Random) -> str:
    if len(word) < 2:
        return word + "x"
    at = rng.randrange(len(word) - 1)
    return rng.choice(
        (
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + rng.choice("abcdefghijklmnopqrstuvwxyz_-. ") + word[at + 1 :],
            word.upper(),
            word.replace("_", "-") + ("" if "_" in word else "s"),
        )
    )


def _rekeyed(section: dict[Any, Any], old: Any, new: Any) -> None:
    items = [(new if key == old else key, value) for key, value in section.items()]
    section.clear()
    section.update(items)


def mutate_tree(tree: dict[str, Any], rng: random.Random) -> str:
    """Change one thing in `tree`; returns what."""
    paths = list(_paths(tree))
    if not paths:
        return "nothing left to change"
    path = rng.choice(paths)
    parent, key = _at(tree, path[:-1]), path[-1]
    name = ".".join(map(str, path))
    inside_mapping = isinstance(parent, dict)
    kind = rng.choice(
        (
            "misspell",
            "drop",
            "move",
            "value",
            "value",
            "value",
            "wrap",
            "swap",
            "copy",
            "rename",
            "flatten",
            "add",
        )
    )
    if kind == "misspell" and inside_mapping:
        new = _misspelt(str(key), rng)
        _rekeyed(parent, key, new)
        return f"{name} misspelt as {new!r}"
    if kind == "rename" and inside_mapping:
        new = rng.choice((None, 1, 1.5, True, "", " ", "a.b", "0", "<<", "=", "~", *SHORT_WORDS))
        _rekeyed(parent, key, new)
        return f"{name} renamed {new!r}"
    if kind == "drop":
        del parent[key]
        return f"{name} dropped"
    if kind in ("move", "copy", "swap"):
        other = rng.choice(paths)
        if kind == "swap" and path[: len(other)] != other and other[: len(path)] != path:
            there = _at(tree, other[:-1])
            parent[key], there[other[-1]] = there[other[-1]], parent[key]
            return f"{name} and {'.'.join(map(str, other))} swapped"
        value = copy.deepcopy(parent[key])
        target = _at(tree, other)
        if isinstance(target, dict) and other[: len(path)] != path:
            target[str(key)] = value
            if kind == "move":
                del parent[key]
            return f"{name} {'moved' if kind == 'move' else 'copied'} into {'.'.join(map(str, other))}"
    if kind == "wrap":
        parent[key] = rng.choice(
            ([parent[key]], {str(key): parent[key]}, {"type": parent[key]}, str(parent[key]))
        )
        return f"{name} wrapped"
    if kind == "flatten" and isinstance(parent[key], dict) and inside_mapping:
        parent.update(parent.pop(key))
        return f"{name} flattened"
    if kind == "add" and isinstance(parent[key], dict):
        new = rng.choice(
            ("lr", "extra", "peft", "decoder", "micro_batch_splits", "typ", "path", "x" * 300, "a b")
        )
        parent[key][new] = copy.deepcopy(rng.choice(WRONG_VALUES))
        return f"{name}.{new} added"
    parent[key] = copy.deepcopy(rng.choice(WRONG_VALUES))
    return f"{name} = {str(parent[key])[:30]!r}"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


def mutate_text(text: str, rng: random.Random) -> tuple[bytes, str]:
    """Change one thing in a file as text or bytes; returns it and what."""
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    line = lines[at]
    where = f"line {at + 1}"

    def joined(*replacement: str) -> bytes:
        return "".join([*lines[:at], *replacement, *lines[at + 1 :]]).encode()

    cut = rng.randrange(len(text))
    choices: tuple[tuple[str, Callable[[], bytes]], ...] = (
        (f"{where} removed", lambda: joined()),
        (f"{where} doubled", lambda: joined(line, line)),
        (f"{where} indented by one", lambda: joined(" " + line)),
        (f"{where} indented by a tab", lambda: joined("\t" + line)),
        (f"{where} moved to the left", lambda: joined(line.lstrip())),
        (f"{where} without its colon", lambda: joined(line.replace(":", "", 1))),
        (f"{where} with a second colon", lambda: joined(line.rstrip("\n") + ": x\n")),
        (f"{where} as a list item", lambda: joined("- " + line)),
        (f"{where} with an open bracket", lambda: joined(line.rstrip("\n") + " [\n")),
        (f"{where} with an open quote", lambda: joined(line.rstrip("\n") + " '\n")),
        (f"{where} tagged", lambda: joined(line.replace(": ", ": !!python/name:os.system ", 1))),
        (f"{where} with an alias of nothing", lambda: joined(line.replace(": ", ": *nothing ", 1))),
        (f"{where} merges a value", lambda: joined("<<: 3\n", line)),
        (f"{where} merges itself", lambda: joined("self: &self {<<: *self}\n", line)),
        (f"{where} with an alias of itself", lambda: joined("loop: &loop [*loop]\n", line)),
        (f"{where} with a list as key", lambda: joined("? [a, b]\n: c\n", line)),
        (f"cut off at {cut}", lambda: text[:cut].encode()),
        (f"a byte of Latin-1 at {cut}", lambda: text[:cut].encode() + b"\xfc" + text[cut:].encode()),
        (f"a zero byte at {cut}", lambda: text[:cut].encode() + b"\x00" + text[cut:].encode()),
        (f"a control character at {cut}", lambda: (text[:cut] + "\x0b" + text[cut:]).encode()),
        (f"a random character at {cut}", lambda: (text[:cut] + rng.choice("{}[]:,&*!|>'\"%@`#?-\t\n~=") + text[cut:]).encode()),
        ("UTF-16", lambda: text.encode("utf-16")),
        ("a byte-order mark", lambda: text.encode("utf-8-sig")),
        ("Windows line ends", lambda: text.replace("\n", "\r\n").encode()),
        ("a second document", lambda: (text + "---\n" + text).encode()),
        ("an end mark in the middle", lambda: joined("...\n", line)),
        ("given twice", lambda: (text + text).encode()),
        ("empty", lambda: b""),
        ("comments only", lambda: b"# nothing\n"),
        ("a list", lambda: ("- " + text.replace("\n", "\n  ")).encode()),
        ("a nest of 3,000 brackets", lambda: (text + "deep: " + "[" * 3000 + "]" * 3000 + "\n").encode()),
        ("a nest of 3,000 sections", lambda: ("".join(" " * i + "k:\n" for i in range(3000))).encode()),
        ("an alias bomb", lambda: (text + BOMB).encode()),
        ("a number of 5,000 digits", lambda: (text + "training: " + "9" * 5000 + "\n").encode()),
        ("JSON", lambda: json.dumps(yaml.safe_load(text), default=str).encode()),
        ("random bytes", lambda: rng.randbytes(200)),
    )  # fmt: skip
    how, make = rng.choice(choices)
    return make(), how


def _override(tree: dict[str, Any], rng: random.Random) -> str:
    path = [str(part) for part in rng.choice(list(_paths(tree)))]
    if rng.random() < 0.3:
        at = rng.randrange(len(path))
        path[at] = _misspelt(path[at], rng)
    if rng.random() < 0.1:
        path.append(rng.choice(("0", "", "x", "type")))
    value = rng.choice(RAW_OVERRIDES) if rng.random() < 0.5 else _as_flow(rng.choice(WRONG_VALUES))
    return f"{'.'.join(path)}={value}"


def _as_flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    return text.removesuffix("...").strip()


def make_case(number: int, seed: int, bases: dict[str, list[Path]]) -> Case:
    """Case `number` of `seed`: a pure function of the two, so that a failure can be repeated."""
    rng = random.Random(f"{seed}/{number}")
    base = rng.choice(list(bases))
    texts = [path.read_text(encoding="utf-8") for path in bases[base]]
    trees = [yaml.safe_load(text) for text in texts]
    names = [f"config{index}.yaml" for index in range(len(texts))]
    files = {name: text.encode() for name, text in zip(names, texts)}
    target = rng.randrange(len(texts))
    way = rng.random()
    if way < 0.6:
        how = [mutate_tree(trees[target], rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        dumped = yaml.safe_dump(trees[target], sort_keys=False, allow_unicode=True)
        return Case(number, base, how, files | {names[target]: dumped.encode()})
    if way < 0.85:
        changed, what = mutate_text(texts[target], rng)
        return Case(number, base, [what], files | {names[target]: changed})
    overrides = [_override(trees[target], rng) for _ in range(rng.choice((1, 1, 2)))]
    return Case(number, base, [f"override {word[:60]!r}" for word in overrides], files, overrides)


# Running them

LLAMA_3_1_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "hidden_act": "silu", "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip


class Hang(BaseException):
    """No answer within `HANG_SECONDS`."""


class Started(BaseException):
    """The run would begin now."""


@dataclass
class Answer:
    status: int | str
    """Exit status, or `started`, or the traceback, or why there is none."""
    err: str = ""
    out: str = ""


def _answer(verb: str, case: Case) -> Answer:
    from modelyard.cli import main

    out, err = io.StringIO(), io.StringIO()

    def alarm(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, alarm)
    signal.alarm(HANG_SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status: int | str = main([verb, *case.words])
    except Started:
        status = "started"
    except Hang:
        status = f"no answer in {HANG_SECONDS} s: " + "".join(traceback.format_exc().splitlines(True)[-6:])
    except SystemExit as error:
        status = f"left with SystemExit({error.code})"
    except BaseException:
        status = traceback.format_exc()
    finally:
        signal.alarm(0)
    return Answer(status, err.getvalue(), out.getvalue())


def unclear(answer: Answer) -> str | None:
    """What is wrong with an answer; None for a good one."""
    if answer.status in (0, "started"):
        return None
    if answer.status != 2:
        return str(answer.status)
    lines = answer.err.splitlines()
    if not lines:
        return "exit 2 without a word"
    for line in lines:
        if not line.startswith("error: ") or len(line) <= len("error: "):
            return f"a line that is no answer: {line!r}"
        if INSIDES.search(line):
            return f"a line that shows our insides: {line[:300]!r}"
        if len(line) > LONGEST_LINE:
            return f"a line of {len(line):,} characters: {line[:100]!r}"
    return None


def _tree_of(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(root, name)
            found.add((path, os.lstat(path).st_size if name in names else 0))
    return found


def try_case(case: Case, folder: Path) -> tuple[str, str | None]:
    """(`valid` or `refused`, what was lost or None). The working directory must be `folder / "here"`."""
    for name, content in case.files.items():
        Path(name).write_bytes(content)
    before = _tree_of(folder)
    checked = _answer("validate", case)
    problem = unclear(checked)
    if problem is None and "prepare" not in case.base:
        started = _answer("train", case)
        problem = unclear(started)
        if problem is None and checked.status == 2 and started.status != 2:
            problem = f"validate refuses it, train does not: {checked.err[:300]}"
        if problem is None and checked.out.endswith("\nvalid\n") and started.status == 2:
            problem = f"validate calls it valid without a warning, train refuses it: {started.err[:300]}"
    if problem is None and (new := _tree_of(folder) - before):
        problem = f"written: {sorted(path for path, _ in new)[:3]}"
    for path, _ in _tree_of(folder) - before:
        shutil.rmtree(path) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)
    return ("valid" if checked.status == 0 else "refused"), problem


def _worker(send: int, folder: Path, cases: Iterator[Case]) -> None:
    from modelyard.train import state as state_module

    def started(*_: object, **__: object) -> None:
        raise Started

    # What comes next reads the pretrained weights, which are empty files here.
    state_module.first_weights = started  # type: ignore[assignment]
    state_module.parallelize = started  # type: ignore[assignment]
    # The guides' runs need more disk than is at hand; whether there is enough is not the question here.
    free = SimpleNamespace(total=1 << 60, used=0, free=1 << 60)
    shutil.disk_usage = lambda _: free  # type: ignore[assignment, return-value]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    os.chdir(folder / "here")
    for case in cases:
        kind, problem = try_case(case, folder)
        os.write(send, (json.dumps([case.number, kind, problem and problem[:4000]]) + "\n").encode())


def prepare_folder(folder: Path, bases: dict[str, list[Path]]) -> None:
    """A working directory in which what the configs name is there: a small store behind every name, a model's config."""
    import numpy as np

    from modelyard.data.store import StoreWriter

    here = folder / "here"
    here.mkdir(parents=True)
    tokenizer = {"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'}
    with StoreWriter(
        folder / "store", vocab_size=256, lanes={"loss_mask": "uint8"}, tokenizer_files=tokenizer
    ) as writer:
        for length in range(1, 300):
            writer.append(np.arange(length) % 256, {"loss_mask": np.zeros(length, np.uint8)})
    for files in bases.values():
        for file in files:
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
            for path in _paths(tree):
                value = _at(tree, path)
                if path[-1] != "path" or not isinstance(value, str) or Path(value).is_absolute():
                    continue
                target = here / value
                target.parent.mkdir(parents=True, exist_ok=True)
                if value.endswith(".yaml"):
                    target.write_text(f"type: memmap\npath: {folder / 'store'}\n")
                elif value.endswith(".json"):
                    target.write_text(
                        json.dumps({"datasets": [{"prefix": str(folder / "store"), "weight": 1}]})
                    )
                elif path[0] == "pretrained":
                    target.mkdir(exist_ok=True)
                    (target / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
                    (target / "model.safetensors").touch()


def run_in_process(
    seed: int, count: int, folder: Path, bases: dict[str, list[Path]]
) -> Iterator[tuple[Case, str, str | None]]:
    """(case, `valid` or `refused`, what was lost) of every case; a case that hangs or kills its process is lost too."""
    next_number = 0
    while next_number < count:
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            try:
                _worker(send, folder, (make_case(n, seed, bases) for n in range(next_number, count)))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as answers:
            while next_number < count:
                ready, _, _ = select.select([answers], [], [], 3 * HANG_SECONDS)
                line = answers.readline() if ready else ""
                if not line:
                    break
                _, kind, problem = json.loads(line)
                yield make_case(next_number, seed, bases), kind, problem
                next_number += 1
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if next_number < count:
            why = f"the process ended with {os.waitstatus_to_exitcode(status)}, or did not answer"
            yield make_case(next_number, seed, bases), "refused", why
            next_number += 1


def run_as_process(case: Case, folder: Path, verb: str) -> str | None:
    """The same case by the program as users start it; what was lost, or None."""
    here = folder / "here"
    for name, content in case.files.items():
        (here / name).write_bytes(content)
    before = _tree_of(folder)
    try:
        words = [os.fsencode(word) for word in case.words if "\x00" not in word]
        done = subprocess.run(
            [sys.executable, "-m", "modelyard", verb, *words],
            cwd=here,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "no answer in 60 s"
    problem = unclear(Answer(done.returncode, done.stderr.decode(errors="replace")))
    if problem is None and (new := _tree_of(folder) - before):
        return f"written: {sorted(path for path, _ in new)[:3]}"
    return problem
