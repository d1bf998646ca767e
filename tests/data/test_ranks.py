"""What goes wrong between processes that prepare together is found and said, and the data is right."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from modelyard.config.prepare import PrepareConfig
from modelyard.data import assemble, ranks, sources, stores
from modelyard.data.prepare import prepare
from modelyard.errors import UserError

from .ranks_in_turn import a_source, as_rank, part_folder, together
from .test_prepare import checksums, config, make
from .test_prepare_resume import RECORDS, everything

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "order"])
def test_a_damaged_part_is_made_again(tmp_path, write_jsonl, tokenizer_folder, monkeypatch, harm):
    monkeypatch.setattr(sources, "PART_CHUNKS", 2)
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    prepare(as_rank(cfg, 1, 2), report=lambda _: None, terminal=False)
    file = next(part_folder(tmp_path).glob("00003.*.part"))
    data = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(data[:-1])
    elif harm == "order":
        first = 40 + int.from_bytes(data[:8], "little")
        assert len(data) == first + 40 + int.from_bytes(data[first : first + 8], "little")
        file.write_bytes(data[first:] + data[:first])
    else:
        data[-1] ^= 1
        file.write_bytes(data)
    lines: list[str] = []
    prepare(as_rank(cfg, 0, 2), report=lines.append, terminal=False)
    said = {
        "cut": f"{file} has {len(data) - 1:,} bytes where its manifest says {len(data):,}",
        "changed": f"{file}: chunk 1 differs from its checksum",
        "order": f"{file} differs from its checksum",
        "gone": f"{file} cannot be read (No such file or directory)",
    }[harm]
    assert f"note: {said}; part 4 is made here" in lines
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_rank_0_does_what_a_lost_rank_does_not(tmp_path, write_jsonl, tokenizer_folder):
    cfg = everything(tmp_path, write_jsonl(RECORDS[:60]), tokenizer_folder)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    lines: list[str] = []
    prepare(as_rank(cfg, 0, 2, timeout=0.1), report=lines.append, terminal=False)
    assert lines[0].startswith("waiting for rank 1: ")
    assert "note: nothing has been heard of rank 1 for 0 seconds; part 2 is made here" in lines
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["jsonl", "jsonls", "zst", "parquet", "line"])
@pytest.mark.parametrize("bad", [70, 149])
def test_a_bad_record_is_named_as_by_one_process(tmp_path, tokenizer_folder, kind, bad):
    if kind == "line":
        dataset = a_source(tmp_path, kind)
        (tmp_path / "source" / "1.txt").write_bytes(b"some text\n" * bad + b"\xff\n" + b"some text\n" * 150)
    else:
        dataset = a_source(tmp_path, kind, bad=bad)
    cfg = config(tmp_path, tmp_path / "source", tokenizer_folder, dataset=dataset)
    with pytest.raises(UserError) as alone:
        make(cfg)
    assert "record " in str(alone.value)
    said = set()
    for rank in (2, 1, 0):
        try:
            prepare(as_rank(cfg, rank, 3, timeout=0.1), report=lambda _: None, terminal=False)
        except UserError as error:
            said.add(str(error))
    who = [message for message in said if message.startswith("rank ")]
    assert said - set(who) <= {str(alone.value)}
    assert {message.partition(": ")[2] for message in who} <= {str(alone.value)}
    assert said
    # The source has to change, so nothing of it stands in the way.
    shutil.rmtree(tmp_path / "source")
    cfg = config(tmp_path, tmp_path / "source", tokenizer_folder, dataset=a_source(tmp_path, "jsonl"))
    together(cfg, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def status(folder: Path, rank: int, world_size: int, **more: Any) -> None:
    """A rank at work, by its file."""
    facts = {
        "rank": rank,
        "world_size": world_size,
        "state": "working",
        "problem": None,
        "beat": 1,
        "token": "t",
    }
    facts |= {"host": "harbour", "machine": ranks._machine(), "pid": os.getppid()}
    facts["started"] = ranks._started(os.getppid())
    (folder / f"rank-{rank}.json").write_text(json.dumps(facts | more))
    (folder / "division.json").write_text(json.dumps({"world_size": world_size}))


def begun_by(tmp_path: Path, cfg: PrepareConfig, rank: int, world_size: int) -> Path:
    """The folder of parts after a rank has done its share."""
    prepare(as_rank(cfg, rank, world_size), report=lambda _: None, terminal=False)
    return part_folder(tmp_path)


def test_another_number_of_processes_is_refused_while_they_are_at_work(
    tmp_path, write_jsonl, tokenizer_folder, monkeypatch
):
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    folder = begun_by(tmp_path, cfg, 1, 2)
    status(folder, 0, 2)
    before = checksums(folder)
    with pytest.raises(
        UserError,
        match=rf"WORLD_SIZE is 3 here, and 2 for rank 0 \(process {os.getppid()} on harbour\), which is at work",
    ):
        prepare(as_rank(cfg, 1, 3), report=lambda _: None, terminal=False)
    with pytest.raises(
        UserError, match=r"rank 0 \(process \d+ on harbour\) is at work on the same output_path already"
    ):
        prepare(as_rank(cfg, 0, 2), report=lambda _: None, terminal=False)
    assert checksums(folder) == before
    # A process of that number that is none of ours: it has been started at another time.
    status(folder, 0, 2, started="1")
    assert together(cfg, 3)
    # One that goes on when others are started with another number finds out.
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.0)
    cfg = cfg.model_copy(update={"output_path": tmp_path / "other"})
    real = ranks.Attendance.enter

    def enter(self: ranks.Attendance) -> None:
        real(self)
        (self.folder / "division.json").write_text(json.dumps({"world_size": 4}))

    monkeypatch.setattr(ranks.Attendance, "enter", enter)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2 here, and a process that was started later says 4"):
        prepare(as_rank(cfg, 1, 2), report=lambda _: None, terminal=False)


def test_a_rank_of_another_machine_is_watched_for_signs_of_life(
    tmp_path, write_jsonl, tokenizer_folder, monkeypatch
):
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    folder = begun_by(tmp_path, cfg, 1, 2)
    status(folder, 1, 2, machine="another", pid=1)
    lines: list[str] = []
    prepare(as_rank(cfg, 1, 2), report=lines.append, terminal=False)
    assert lines[0] == "rank 1: looking whether rank 1 (process 1 on harbour) is still at work, for 0 seconds"
    status(folder, 1, 2, machine="another", pid=1)
    monkeypatch.setattr(ranks.time, "sleep", lambda _: status(folder, 1, 2, machine="another", pid=1, beat=2))
    with pytest.raises(
        UserError, match=r"rank 1 \(process 1 on harbour\) is at work on the same output_path already"
    ):
        prepare(as_rank(cfg, 1, 2), report=lines.append, terminal=False)


def test_the_same_rank_started_again_makes_the_first_leave(
    tmp_path, write_jsonl, tokenizer_folder, monkeypatch
):
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.0)
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    real = ranks.Attendance.enter

    def enter(self: ranks.Attendance) -> None:
        real(self)
        status(self.folder, 1, 2)

    monkeypatch.setattr(ranks.Attendance, "enter", enter)
    with pytest.raises(
        UserError, match=r"rank 1 \(process \d+ on harbour\) has been started, so that this one leaves"
    ):
        prepare(as_rank(cfg, 1, 2), report=lambda _: None, terminal=False)


def test_another_rank_failed(tmp_path, write_jsonl, tokenizer_folder, monkeypatch):
    """Rank 0 says what, and keeps what it has."""
    monkeypatch.setattr(assemble, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(stores, "SAVE_SECONDS", 0.0)
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    real = ranks.Attendance.enter

    def enter(self: ranks.Attendance) -> None:
        real(self)
        status(self.folder, 1, 2, state="failed", problem="no space left")

    monkeypatch.setattr(ranks.Attendance, "enter", enter)
    with pytest.raises(UserError, match=r"^rank 1: no space left$"):
        prepare(as_rank(cfg, 0, 2), report=lambda _: None, terminal=False)
    assert (tmp_path / "out.tmp" / "unfinished.json").exists()
    monkeypatch.setattr(ranks.Attendance, "enter", real)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    together(cfg, 2)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_parts_of_something_else_are_not_mixed_in(tmp_path, write_jsonl, tokenizer_folder):
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    folder = begun_by(tmp_path, cfg, 1, 2)
    other = cfg.model_copy(update={"seed": 7})
    before = checksums(folder)
    for world_size, rank in ((2, 1), (2, 0), (1, 0)):
        with pytest.raises(
            UserError,
            match=rf"{folder} holds unfinished work on something else \(config\.seed: 784569 → 7\): set that back .*"
            r"or start over \(--overwrite\)\. Processes that prepare together must find the same files",
        ):
            prepare(as_rank(other, rank, world_size), report=lambda _: None, terminal=False)
    assert checksums(folder) == before
    make(other.model_copy(update={"output_path": tmp_path / "whole"}))
    for rank in (1, 0):
        prepare(as_rank(other, rank, 2), report=lambda _: None, terminal=False, overwrite=True)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")
    assert not (tmp_path / "out.parts").exists()


def test_a_rank_that_comes_when_all_is_done(tmp_path, write_jsonl, tokenizer_folder):
    """With --overwrite, too: it must not start over what the others have just made."""
    cfg = everything(tmp_path, write_jsonl(RECORDS[:60]), tokenizer_folder)
    together(cfg, 2)
    before = checksums(tmp_path / "out")
    for overwrite in (False, True):
        lines: list[str] = []
        prepare(as_rank(cfg, 1, 2), report=lines.append, terminal=False, overwrite=overwrite)
        assert lines == [
            f"rank 1: {tmp_path / 'out'} is already there, made from the same data with the same config"
        ]
    assert checksums(tmp_path / "out") == before
    assert not (tmp_path / "out.parts").exists()


def test_torchruns_machines_leave_together(tmp_path, write_jsonl, tokenizer_folder, monkeypatch):
    """Where there are several of them, a rank stays until rank 0 has put all together."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.0)
    cfg = everything(tmp_path, write_jsonl(RECORDS[:60]), tokenizer_folder)
    slept = 0

    def sleep(_: float) -> None:
        nonlocal slept
        slept += 1
        assert (tmp_path / "out.parts").exists()
        if slept == 3:
            prepare(as_rank(cfg, 0, 2), report=lambda _: None, terminal=False)

    lines: list[str] = []
    monkeypatch.setattr(ranks.time, "sleep", sleep)
    prepare(as_rank(cfg, 1, 2), report=lines.append, terminal=False)
    assert slept == 3
    assert (tmp_path / "out").exists()
    assert [line.split(",")[0].split(":")[1] for line in lines] == [" its share is done"]


# which rank this is


@pytest.mark.parametrize(
    ("environment", "given", "message"),
    [
        ({"WORLD_SIZE": "2"}, {}, "the environment has WORLD_SIZE=2 and no RANK"),
        ({"RANK": "3"}, {}, "the environment has RANK=3 and no WORLD_SIZE"),
        (
            {"WORLD_SIZE": "2", "RANK": "2"},
            {},
            "the environment has RANK=2, where a whole number from 0 to 1",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            {"world_size": 3},
            "world_size: 3, but the environment has WORLD_SIZE=2",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            {"world_size": 2, "rank": 1},
            "distributed.rank: 1, but the environment has RANK=0",
        ),
        ({}, {"world_size": 2}, "2 processes, and nothing says which of them this is"),
    ],
)
def test_ranks_that_cannot_be(monkeypatch, environment, given, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    document = {
        "output_path": "o",
        "dataset": {"path": "p"},
        "tokenizer": {"path": "t"},
        "distributed": given,
    }
    with pytest.raises(UserError) as caught:
        ranks.own_rank(PrepareConfig.model_validate(document))
    assert message in str(caught.value)


def test_ranks_share_the_cores_of_a_machine(monkeypatch):
    monkeypatch.setattr(ranks, "available_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks.cores_of_rank(ranks.Rank(1, 4)) == 8
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert ranks.cores_of_rank(ranks.Rank(1, 4)) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "9")
    assert ranks.cores_of_rank(ranks.Rank(1, 9)) == 1
