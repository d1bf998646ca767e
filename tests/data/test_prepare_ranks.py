"""Several processes prepare together: the same bytes as one, however many there are and whatever happens to them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from modelyard.cli import main
from modelyard.config.prepare import PrepareConfig, PrepareDatasetConfig
from modelyard.data import assemble, bytestream, ranks, sources, stores
from modelyard.data import parts as parts_module
from modelyard.data.documents import tokenize_chunk
from modelyard.data.parts import Division, divide, part_chunks
from modelyard.data.prepare import prepare
from modelyard.data.sources import open_source
from modelyard.errors import UserError

from .test_prepare import TEXTS, checksums, config, make
from .test_prepare_resume import RECORDS, everything

RANKS = Path(__file__).with_name("rank_processes.py")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(sources, "PART_CHUNKS", 1)
    monkeypatch.setattr(sources, "CUT_COMPRESSED", 4)
    monkeypatch.setattr(bytestream, "BLOCK", 200)
    monkeypatch.setattr(assemble, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ranks, "WATCH_SECONDS", 0.2)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no machine is lost here, and each takes 10 ms
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def as_rank(cfg: PrepareConfig, rank: int, world_size: int, **options: Any) -> PrepareConfig:
    return cfg.model_copy(
        update={
            "distributed": cfg.distributed.model_copy(
                update={"rank": rank, "world_size": world_size, "timeout": 60.0} | options
            )
        }
    )


def together(cfg: PrepareConfig, world_size: int) -> list[str]:
    """All ranks one after the other, rank 0 last; returns what they say."""
    lines: list[str] = []
    for rank in reversed(range(world_size)):
        prepare(as_rank(cfg, rank, world_size), report=lines.append, terminal=False)
    return lines


# what a part is


def test_parts_depend_on_the_source_alone():
    assert Division(100, 30).count == 4
    assert [Division(100, 30).part(place) for place in (0, 29, 30, 99, 100)] == [0, 0, 1, 3, 3]
    assert Division(90, 30).part(90) == 2  # an empty file at the end
    assert Division(0, 30).count == 1
    assert Division(0, 30).part(0) == 0


def a_source(tmp_path: Path, kind: str, *, bad: int = -1) -> dict[str, Any]:
    """A `dataset` section: about 30 KB in one file or many, with records of all lengths; number `bad` has no text."""
    folder = tmp_path / "source"
    folder.mkdir()
    texts = [" ".join(TEXTS[i : i + 1 + i % 9]) for i in range(150)]
    records: list[dict[str, Any]] = [
        {"text": text, "url": f"page/{i}", "spans": [[0, i % 3]]} for i, text in enumerate(texts)
    ]
    if bad >= 0:
        records[bad]["text"] = None
    if kind == "code":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.py").write_text(text + "\n")
        (folder / "150.py").write_text("")
        return {"path": str(folder), "extensions": [".py"]}
    if kind in ("line", "paragraph", "document"):
        for number in range(3):
            (folder / f"{number}.txt").write_text("\n\n".join(texts[50 * number : 50 * number + 50]) + "\n")
        return {"path": str(folder), "sample_by": kind}
    files = 5 if kind.endswith("s") else 1
    for number in range(files):
        some = records[number::files]
        if kind.startswith("parquet"):
            pq.write_table(pa.Table.from_pylist(some), folder / f"{number}.parquet", row_group_size=20)
            continue
        data = "".join(json.dumps(record) + "\n" for record in some).encode()
        if kind.startswith("zst"):
            noise = random.Random(number)  # so that some of it is left
            lines = [json.dumps(r | {"noise": noise.randbytes(60).hex()}) + "\n" for r in some]
            frames = ["".join(lines[i : i + 5]).encode() for i in range(0, len(lines), 5)]
            (folder / f"{number}.jsonl.zst").write_bytes(b"".join(map(zstandard.compress, frames)))
        else:
            (folder / f"{number}.jsonl").write_bytes(data.removesuffix(b"\n"))
    return {
        "path": str(folder),
        "loss_masking_spans": "spans",
        "columns": ["url"],
        "special_tokens": "text",
    }


KINDS = ["jsonl", "jsonls", "zst", "zsts", "parquet", "parquets", "line", "paragraph", "document", "code"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_chunk_is_of_one_part_in_order(tmp_path, monkeypatch, kind):
    source = open_source(PrepareDatasetConfig.model_validate(a_source(tmp_path, kind)), [])
    division = divide(source)
    alone = list(source.chunks())
    everyone = list(part_chunks(source, division, dict.fromkeys(range(division.count), 0)))
    assert [chunk for _, chunk in everyone if chunk is not None] == alone
    assert [part for part, chunk in everyone if chunk is None] == list(range(division.count))
    assert sum(chunk.weight for chunk in alone) <= source.total
    assert [source.count(chunk) for chunk in alone] == [len(source.read(chunk)) for chunk in alone]
    for world_size in (2, 3, 7):
        for rank in range(world_size):
            own = dict.fromkeys(range(rank, division.count, world_size), 0)
            assert list(part_chunks(source, division, own)) == [item for item in everyone if item[0] in own]
    last = division.count - 1
    some = [chunk for part, chunk in everyone if part == last]
    assert [chunk for _, chunk in part_chunks(source, division, {last: 2})] == (some[2:-1] or []) + [None]


def test_files_of_others_are_not_opened(tmp_path, monkeypatch):
    """Of many files; a compressed one of many is not cut, a large one is."""
    many = open_source(PrepareDatasetConfig.model_validate(a_source(tmp_path, "zsts")), [])
    opened: list[str] = []
    real = sources.ByteStream

    def noted(path, compression):
        opened.append(path.name)
        return real(path, compression)

    monkeypatch.setattr(sources, "ByteStream", noted)
    division = divide(many)
    owners: dict[str, int] = {}
    for part in range(division.count):
        opened.clear()
        list(part_chunks(many, division, {part: 0}))
        assert len(opened) == len(set(opened) - set(owners))
        owners |= dict.fromkeys(opened, part)
    assert set(owners) == {f"{i}.jsonl.zst" for i in range(5)}
    shutil.rmtree(tmp_path / "source")
    one = open_source(PrepareDatasetConfig.model_validate(a_source(tmp_path, "zst")), [])
    division = divide(one)
    parts = [
        part for part, chunk in part_chunks(one, division, dict.fromkeys(range(division.count), 0)) if chunk
    ]
    assert len(set(parts)) > 2


def test_what_cuts_a_gzip_file_is_part_of_what_parts_are_made_from(write_jsonl):
    path = write_jsonl(RECORDS, "texts.jsonl.gz")
    source = open_source(PrepareDatasetConfig(path=str(path)), [])
    assert "zlib" in source.cutting()["gzip"]
    for name in ("texts.jsonl", "texts.jsonl.zst"):
        assert open_source(PrepareDatasetConfig(path=str(write_jsonl(RECORDS, name))), []).cutting() == {}


def test_a_huge_source_has_a_bounded_number_of_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "MOST_PARTS", 4)
    source = open_source(PrepareDatasetConfig.model_validate(a_source(tmp_path, "jsonl")), [])
    assert source.total > 8 * 1000
    assert divide(source).count == 4


# the same bytes


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_for_any_number_of_processes(tmp_path, tokenizer_folder, monkeypatch, kind):
    dataset = a_source(tmp_path, kind)
    cfg = config(
        tmp_path,
        tmp_path / "source",
        tokenizer_folder,
        dataset=dataset,
        splits={"a": 0.7, "b": 0.3},
        tokens_per_shard=900,
    )
    made = []
    for world_size in (1, 2, 3, 5):
        output = tmp_path / str(world_size)
        lines = together(cfg.model_copy(update={"output_path": output}), world_size)
        made.append(checksums(output))
        assert len([line for line in lines if "its share is done" in line]) == world_size - 1
        assert not any("note: " in line for line in lines)
    assert made[1:] == made[:1] * 3
    names = {Path(name).name for name in made[0]}
    assert {"tokens_00001.bin", "lengths.bin", "offsets.bin", "manifest.json", "prepare.json"} <= names
    assert ("loss_mask_00000.bin" in names) == ("spans" in str(dataset))
    assert ("columns.parquet" in names) == ("spans" in str(dataset) or kind == "code")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "5", "source"]


def test_more_processes_than_parts(tmp_path, write_jsonl, tokenizer_folder):
    cfg = everything(tmp_path, write_jsonl(RECORDS[:40]), tokenizer_folder)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    count = divide(open_source(cfg.dataset, [])).count
    assert 2 < count < 9
    lines = together(cfg, 9)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")
    idle = [line for line in lines if f"nothing to do: the source is of {count} parts, " in line]
    assert [line.split(":")[0] for line in idle] == [f"rank {rank}" for rank in range(8, count - 1, -1)]


# killed


def kill(cfg: PrepareConfig, *how: int) -> list[dict[str, Any]]:
    text = json.dumps(cfg.model_dump(mode="json", exclude_unset=True))
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.data.rank_processes", text, *map(str, how)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_kills(tmp_path: Path, cfg: PrepareConfig, *how: int) -> list[str]:
    """Returns what the starts that were not killed said."""
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    whole = checksums(tmp_path / "whole")
    outcomes = kill(cfg, *how)
    killed, after = outcomes[0:-1:2], outcomes[1::2]
    assert len(killed) > 3
    assert all(outcome["killed"] for outcome in killed)
    for outcome in (*after, outcomes[-1]):
        assert set(outcome["statuses"].values()) == {0}, outcome
        assert checksums(tmp_path / "out" / str(outcome["n"])) == whole
        assert not any("note: " in line for line in outcome["lines"]), outcome
    names = {str(outcome["n"]) for outcome in outcomes}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    return [line for outcome in after for line in outcome["lines"]]


@pytest.mark.parametrize(("victim", "step"), [(0, 53), (1, 4)])
def test_killed_before_durable_operations(tmp_path, write_jsonl, tokenizer_folder, victim, step):
    """Any of a rank's, the others at any moment; then gone on with by more, fewer, as many, or one."""
    cfg = everything(tmp_path, write_jsonl(RECORDS[:40]), tokenizer_folder)
    lines = check_kills(tmp_path, cfg, victim, 2, 3, 2, 1, 2, 2, step)
    assert any(line.startswith("rank 1: going on where an earlier start was stopped: ") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "step"), [(0, 5), (1, 1), (2, 1)])
def test_killed_anywhere(tmp_path, write_jsonl, tokenizer_folder, victim, step):
    cfg = everything(tmp_path, write_jsonl(RECORDS[:40]), tokenizer_folder)
    check_kills(tmp_path, cfg, victim, 3, 2, 3, 1, 3, 3, 3, 4, step)


def test_a_part_goes_on_at_the_chunk_where_it_was_killed(
    tmp_path, write_jsonl, tokenizer_folder, monkeypatch
):
    """What another rank of another number had begun; a chunk that was half written does not count."""
    monkeypatch.setattr(sources, "PART_CHUNKS", 6)
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    begun: list[int] = []

    def stopping(job, chunk):
        if len(begun) == 9:
            raise KeyboardInterrupt
        begun.append(chunk.begin)
        return tokenize_chunk(job, chunk)

    monkeypatch.setattr(assemble, "tokenize_chunk", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(as_rank(cfg, 1, 2), report=lambda _: None, terminal=False)
    (folder,) = (tmp_path / "out.parts").iterdir()
    assert sorted(path.name[:5] for path in folder.glob("*.part")) == ["00001", "00003"]
    (unfinished,) = folder.glob("00003.*.part")
    with unfinished.open("ab") as file:
        file.write(b"\xff" * 64)
    done = list(begun)

    def counted(job, chunk):
        begun.append(chunk.begin)
        return tokenize_chunk(job, chunk)

    monkeypatch.setattr(assemble, "tokenize_chunk", counted)
    together(cfg, 3)
    assert len(begun) == len(set(begun))
    assert set(done) < set(begun)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")


def test_one_process_takes_what_several_have_made_and_the_other_way_round(
    tmp_path, write_jsonl, tokenizer_folder, monkeypatch
):
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    make(cfg.model_copy(update={"output_path": tmp_path / "whole"}))
    begun: list[int] = []
    stop = 8

    def counted(job, chunk):
        if len(begun) == stop:
            raise KeyboardInterrupt
        begun.append(chunk.begin)
        return tokenize_chunk(job, chunk)

    monkeypatch.setattr(assemble, "tokenize_chunk", counted)
    monkeypatch.setattr(stores, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        make(cfg)
    assert json.loads((tmp_path / "out.tmp" / "unfinished.json").read_text())["part"] == 7
    stop = -1
    prepare(as_rank(cfg, 1, 2), report=lambda _: None, terminal=False)
    numbers = {int(path.stem) for path in part_folder(tmp_path).glob("0*.json")}
    assert numbers == set(range(7, divide(open_source(cfg.dataset, [])).count, 2))  # those before are stored
    make(cfg)
    assert len(begun) == len(set(begun)) + 1  # part 7 was begun in the stores, and is rank 1's of two
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")
    assert not (tmp_path / "out.parts").exists()


def test_parts_stay_until_they_are_stored_for_good(tmp_path, write_jsonl, tokenizer_folder, monkeypatch):
    """A kill before the stores are synced must not cost the work of others."""
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    prepare(as_rank(cfg, 1, 2), report=lambda _: None, terminal=False)
    made = {path.name for path in part_folder(tmp_path).glob("0*")}
    last = divide(open_source(cfg.dataset, [])).count - 1
    begun: list[int] = []

    def stopping(job, chunk):
        begun.append(chunk.position)
        if chunk.position // 1000 >= last - 1:
            raise KeyboardInterrupt
        return tokenize_chunk(job, chunk)

    monkeypatch.setattr(assemble, "tokenize_chunk", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(as_rank(cfg, 0, 2), report=lambda _: None, terminal=False)
    assert len(begun) > 3
    assert {path.name for path in part_folder(tmp_path).glob("0*")} == made
    monkeypatch.setattr(stores, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        prepare(as_rank(cfg, 0, 2), report=lambda _: None, terminal=False)
    # Each chunk was saved: of what is stored nothing is left but, perhaps, the part after the last save.
    assert len({path.name for path in part_folder(tmp_path).glob("0*")}) <= 4


def test_rank_0_counts_what_all_have_made(tmp_path, write_jsonl, tokenizer_folder, monkeypatch):
    monkeypatch.setattr("modelyard.data.progress.LINE_SECONDS", 0.0)
    cfg = everything(tmp_path, write_jsonl(RECORDS), tokenizer_folder)
    real = assemble.tokenize_chunk
    waiting = True

    def others_first(job, chunk):
        nonlocal waiting
        if waiting:  # rank 1 makes its share while rank 0 is at its first chunk
            waiting = False
            prepare(as_rank(cfg, 1, 2), report=lines.append, terminal=False)
        return real(job, chunk)

    monkeypatch.setattr(assemble, "tokenize_chunk", others_first)
    lines: list[str] = []
    prepare(as_rank(cfg, 0, 2), report=lines.append, terminal=False)
    own = [line for line in lines if line.startswith("prepare ")]
    other = [line for line in lines if line.startswith("rank 1: prepare ")]
    half, whole = (int(lines[-1].split("|")[1].split()[0]) for lines in (other, own))
    assert 100 < half < 200
    assert whole == 300
    assert own[-1].startswith("prepare 100% | 300 documents | ")
    assert int(own[0].split("|")[1].split()[0]) > half


# what goes wrong


def part_folder(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "out.parts").iterdir()
    return folder


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


@pytest.mark.parametrize("bad", [-1, pytest.param(290, marks=pytest.mark.slow)])
def test_torchrun_as_the_guides_have_it(tmp_path, tokenizer_folder, bad):
    """Two ranks by the real torchrun; a record that only rank 1 meets ends both."""
    source = tmp_path / "texts.jsonl"
    with source.open("w") as file:  # of two parts, though there is little text
        for i, text in enumerate(TEXTS):
            file.write(json.dumps({"text": None if i == bad else text, "more": "-" * 30_000}) + "\n")
    config = tmp_path / "prepare.yaml"
    dataset = {"path": str(source)}
    tokenizer = {"path": str(tokenizer_folder)}
    config.write_text(
        json.dumps({"output_path": str(tmp_path / "out"), "dataset": dataset, "tokenizer": tokenizer})
    )
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", "2", "--no_python"]
    program = [sys.executable, "-m", "modelyard", "prepare", "gpt_memmap", "--config", str(config)]
    done = subprocess.run(
        [sys.executable, *torchrun, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *program],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if bad >= 0:
        assert done.returncode != 0
        assert f"error: rank 1: {source}: record {bad + 1}: field 'text' is null" in done.stderr
        assert not (tmp_path / "out").exists()
        return
    assert done.returncode == 0, done.stderr
    assert "rank 1: its share is done: " in done.stdout
    assert "prepared 300 documents, " in done.stdout
    assert main(["prepare", str(config), f"output_path={tmp_path / 'whole'}"]) == 0
    assert checksums(tmp_path / "out") == checksums(tmp_path / "whole")
