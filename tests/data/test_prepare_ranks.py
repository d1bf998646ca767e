"""Several processes prepare together: the same bytes as one, however many there are and whoever is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelyard.cli import main
from modelyard.config.prepare import PrepareConfig
from modelyard.data import assemble, sources, stores
from modelyard.data.documents import tokenize_chunk
from modelyard.data.parts import divide
from modelyard.data.prepare import prepare
from modelyard.data.sources import open_source

from .ranks_in_turn import KINDS, a_source, as_rank, part_folder, together
from .test_prepare import TEXTS, checksums, config, make
from .test_prepare_resume import RECORDS, everything

pytestmark = pytest.mark.usefixtures("small_parts")

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
