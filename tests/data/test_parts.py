"""A source is cut into parts that do not depend on who makes them."""

from __future__ import annotations

import shutil

import pytest

from modelyard.config.prepare import PrepareDatasetConfig
from modelyard.data import parts as parts_module
from modelyard.data import sources
from modelyard.data.parts import Division, divide, part_chunks
from modelyard.data.sources import open_source

from .ranks_in_turn import KINDS, a_source
from .test_prepare_resume import RECORDS

pytestmark = pytest.mark.usefixtures("small_parts")


def test_parts_depend_on_the_source_alone():
    assert Division(100, 30).count == 4
    assert [Division(100, 30).part(place) for place in (0, 29, 30, 99, 100)] == [0, 0, 1, 3, 3]
    assert Division(90, 30).part(90) == 2  # an empty file at the end
    assert Division(0, 30).count == 1
    assert Division(0, 30).part(0) == 0


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
