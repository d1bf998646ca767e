"""A stopped `prepare` goes on where it was: the same bytes as one that was never stopped, whenever and however often."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelyard.config.prepare import PrepareConfig
from modelyard.data import assemble as assemble_module
from modelyard.data import output as output_module
from modelyard.data import prepare as prepare_module
from modelyard.data import ranks as ranks_module
from modelyard.data import sources
from modelyard.data import stores as stores_module
from modelyard.data.documents import tokenize_chunk
from modelyard.data.output import STATE
from modelyard.data.prepare import prepare
from modelyard.errors import UserError
from modelyard.files import replace_text

from .test_prepare import TEXTS, checksums, config, make

KILLING = Path(__file__).with_name("killing.py")
RECORDS = [{"text": text, "url": f"page/{i}", "spans": [[0, i % 3]]} for i, text in enumerate(TEXTS)]


class Stopped(KeyboardInterrupt):
    """Ctrl-C at a moment of our choice."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(stores_module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(ranks_module, "available_cores", lambda: 2)


def everything(tmp_path: Path, source: Path, tokenizer: Path, **options: Any) -> PrepareConfig:
    """Two splits, several shards, a lane and columns."""
    dataset = {"loss_masking_spans": "spans", "columns": ["url"], "special_tokens": "text"}
    return config(
        tmp_path,
        source,
        tokenizer,
        dataset=dataset,
        splits={"a": 0.7, "b": 0.3},
        tokens_per_shard=900,
        **options,
    )


def write_source(tmp_path: Path, write_jsonl, name: str) -> Path:
    if not name.endswith(".parquet"):
        return write_jsonl(RECORDS, name)
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / name, row_group_size=100)
    return tmp_path / name


def stop_at(monkeypatch, number: int) -> list[int]:
    """Let tokenising stop at chunk `number` (of this start); returns a list that the chunks' numbers are added to."""
    seen: list[int] = []

    def counted(job, chunk):
        if len(seen) == number:
            raise Stopped
        seen.append(chunk.begin)
        return tokenize_chunk(job, chunk)

    monkeypatch.setattr(assemble_module, "tokenize_chunk", counted)
    return seen


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.jsonl.gz", "texts.parquet"])
def test_goes_on_at_the_chunk_where_it_stopped(tmp_path, write_jsonl, tokenizer_folder, monkeypatch, name):
    cfg = everything(tmp_path, write_source(tmp_path, write_jsonl, name), tokenizer_folder)
    all_chunks = stop_at(monkeypatch, -1)
    make(cfg)
    whole = checksums(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    done: list[int] = []
    for stop in (2, 0, 1):
        lines: list[str] = []
        begun = stop_at(monkeypatch, stop)
        with pytest.raises(Stopped):
            prepare(cfg, report=lines.append, terminal=False)
        done += begun
        assert not (tmp_path / "out").exists()
        assert lines[-1].startswith(
            f"what is done so far is kept in {tmp_path / 'out.tmp'}: run the same again"
        )
    rest = stop_at(monkeypatch, -1)
    lines = []
    summary = prepare(cfg, report=lines.append, terminal=False)
    assert done + rest == all_chunks  # no chunk twice, none left out
    assert checksums(tmp_path / "out") == whole
    assert summary["documents"] == 300
    (there,) = [line for line in lines if line.startswith("going on where an earlier start was stopped: ")]
    assert there.endswith("tokens are there already")
    assert not (tmp_path / "out.tmp").exists()


def kill(cfg: PrepareConfig, *how: str) -> list[dict[str, Any]]:
    text = json.dumps(cfg.model_dump(mode="json", exclude_unset=True))
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(KILLING), text, *how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_before_durable_operations(tmp_path, write_jsonl, tokenizer_folder):
    """Before syncs, renames and removals of a whole run, its finishing included; 1 and 2 workers take turns."""
    cfg = everything(tmp_path, write_jsonl(RECORDS[:60]), tokenizer_folder)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    whole = checksums(tmp_path / "whole")
    outcomes = kill(cfg, "operations", "5")
    killed, after = outcomes[0:-1:2], outcomes[1::2]
    assert len(killed) > 12
    assert all(outcome["killed"] for outcome in killed)
    assert [outcome["status"] for outcome in (*after, outcomes[-1])] == [0] * (len(after) + 1)
    first_lines = {outcome["lines"][0].split(":")[0] for outcome in after}
    assert first_lines == {
        "prepared 60 documents, 798 tokens in 0",
        "going on where an earlier start was stopped",
        "an earlier start was stopped when all was written (60 documents, 798 tokens)",
    } | {line for line in first_lines if line.startswith(str(tmp_path)) and "is already there" in line}
    for outcome in killed:
        assert not outcome["there"] or outcome["series"] >= killed[-1]["series"] - 6  # the last renames
    series = {str(outcome["series"]) for outcome in outcomes}
    for number in series:
        assert checksums(tmp_path / "out" / number) == whole
    assert {path.name for path in (tmp_path / "out").iterdir()} == series


def test_killed_at_random_times(tmp_path, write_jsonl, tokenizer_folder, monkeypatch):
    """From outside, whatever it was doing; each process goes on where the one before it was killed."""
    source = write_jsonl(
        [record | {"text": " ".join(TEXTS[i : i + 20])} for i, record in enumerate(RECORDS)] * 3
    )
    monkeypatch.setattr(stores_module, "SAVE_SECONDS", 10.0)
    cfg = everything(tmp_path, source, tokenizer_folder)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    moments = random.Random(3)
    outcomes = kill(cfg, "seconds", *(f"{moments.uniform(0.05, 0.5):.3f}" for _ in range(5)))
    assert sum(outcome["killed"] for outcome in outcomes) >= 2
    assert not any(outcome["there"] for outcome in outcomes if outcome["killed"])
    assert checksums(tmp_path / "out" / "0") == checksums(tmp_path / "whole")


def stopped(cfg: PrepareConfig, monkeypatch, chunks: int) -> None:
    stop_at(monkeypatch, chunks)
    with pytest.raises(Stopped):
        make(cfg)
    monkeypatch.setattr(assemble_module, "tokenize_chunk", tokenize_chunk)


def test_something_else_does_not_go_on_and_loses_nothing(
    tmp_path, write_jsonl, tokenizer_folder, monkeypatch
):
    source = write_jsonl(RECORDS)
    cfg = everything(tmp_path, source, tokenizer_folder)
    stopped(cfg, monkeypatch, 3)
    before = checksums(tmp_path / "out.tmp")
    for other, what in (
        (cfg.model_copy(update={"seed": 7}), r"config\.seed: 784569 → 7"),
        (cfg.model_copy(update={"tokens_per_shard": 901}), r"config\.tokens_per_shard: 900 → 901"),
    ):
        with pytest.raises(UserError, match=rf"out\.tmp holds unfinished work on something else \({what}\)"):
            make(other)
    monkeypatch.setattr(prepare_module.tokenizers, "__version__", "99")
    with pytest.raises(UserError, match=r"program\.tokenizers: "):
        make(cfg)
    monkeypatch.undo()
    assert checksums(tmp_path / "out.tmp") == before
    source.write_text(source.read_text() + '{"text": "more", "url": null, "spans": []}\n')
    with pytest.raises(UserError, match=r"something else \((program|source)\."):
        make(cfg)
    assert make(cfg, overwrite=True)["documents"] == 301


def test_going_on_with_another_number_of_workers(tmp_path, write_jsonl, tokenizer_folder, monkeypatch):
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    stopped(cfg, monkeypatch, 3)
    make(cfg.model_copy(update={"tokenize_workers": 2, "saving_workers": 2}))
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_work_that_lost_bytes_is_started_over_and_says_so(
    tmp_path, write_jsonl, tokenizer_folder, monkeypatch
):
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    stopped(cfg, monkeypatch, 3)
    file = tmp_path / "out.tmp" / "a.tmp" / "lengths.bin"
    file.write_bytes(file.read_bytes()[:-1])
    lines: list[str] = []
    prepare(cfg, report=lines.append, terminal=False)
    assert lines[0].startswith(f"note: {file} has ")
    assert lines[0].endswith("were saved; starting over")
    assert not any("going on" in line for line in lines)
    stopped(cfg.model_copy(update={"output_path": tmp_path / "other"}), monkeypatch, 3)
    (tmp_path / "other.tmp" / STATE).write_text("{")
    assert make(cfg.model_copy(update={"output_path": tmp_path / "other"}))["documents"] == 300


def test_a_bad_record_leaves_nothing_to_go_on_with(tmp_path, write_jsonl, tokenizer_folder):
    """The source must change, so what was made of it is of no use."""
    cfg = everything(
        tmp_path, write_jsonl([*RECORDS, {"text": None, "url": "", "spans": []}]), tokenizer_folder
    )
    with pytest.raises(UserError, match=r"texts\.jsonl: record 301: field 'text' is null"):
        make(cfg)
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_state_file_that_cannot_be_written_loses_nothing(
    tmp_path, write_jsonl, tokenizer_folder, monkeypatch, code
):
    """At each save in turn; only at the first is there nothing yet to go on with."""
    cfg = everything(tmp_path, write_jsonl(RECORDS[:120]), tokenizer_folder)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    whole = checksums(tmp_path / "whole")
    real = os.fsync
    calls, failing = 0, 0

    def fails(path: Path, text: str) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            monkeypatch.setattr(os, "fsync", refuse)
        try:
            replace_text(path, text)
        finally:
            monkeypatch.setattr(os, "fsync", real)

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(output_module, "replace_text", fails)
    kept = []
    while True:
        calls, failing = 0, failing + 1
        try:
            make(cfg)
            break
        except UserError as error:
            (line,) = error.problems
        there = (tmp_path / "out.tmp" / STATE).exists()
        kept.append(there)
        assert (tmp_path / "out.tmp").exists() == there
        if code == errno.ENOSPC:
            assert line.startswith(f"no space left while writing {tmp_path / 'out'}")
            assert ("run the same again: it goes on where it was" in line) == there
        else:
            assert line.endswith("Input/output error")
        lines: list[str] = []
        calls = -1000
        prepare(cfg, report=lines.append, terminal=False)
        assert any("going on where an earlier start was stopped" in said for said in lines) == there
        assert checksums(tmp_path / "out") == whole
        shutil.rmtree(tmp_path / "out")
    assert len(kept) > 3
    assert kept == [False] + [True] * (len(kept) - 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(tmp_path, write_jsonl, tokenizer_folder, small_disk, monkeypatch):
    """Filled up by another when a state is to be saved; a start while it is full loses nothing either."""
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    unchecked = cfg.dataset.model_copy(update={"disable_disk_space_check": True})
    cfg = cfg.model_copy(update={"output_path": small_disk / "out", "dataset": unchecked})
    ballast, saves = small_disk / "ballast", 0

    def filled(path: Path, text: str) -> None:
        nonlocal saves
        saves += 1
        if saves == 4:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(4096)):
                    pass
        replace_text(path, text)

    monkeypatch.setattr(output_module, "replace_text", filled)
    for _ in range(3):
        with pytest.raises(UserError, match=r"no space left while writing .*goes on where it was"):
            make(cfg)
        assert (small_disk / "out.tmp" / STATE).stat().st_size > 100
    ballast.unlink()
    lines: list[str] = []
    prepare(cfg, report=lines.append, terminal=False)
    assert any("going on where an earlier start was stopped" in line for line in lines)
    assert checksums(small_disk / "out") == checksums(tmp_path / "whole")
