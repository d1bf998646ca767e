"""Files that grow on a disk that is full for a while. The limit on a file's size stands in for the disk: it cuts a write too."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelyard.train.appending import AppendedFile

Limit = Callable[[int], None]


@pytest.fixture
def limit() -> Iterator[Limit]:
    """A function that sets the size that a file may have, in bytes; -1 for none."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_what_cannot_be_written_waits_and_is_never_torn(tmp_path: Path, limit: Limit) -> None:
    said: list[str] = []
    file = AppendedFile(tmp_path / "a.jsonl", said.append)
    file.write("first\n")
    limit(10)
    file.write("second\n")  # 4 of its 7 bytes fit
    assert (tmp_path / "a.jsonl").read_text() == "first\n"
    file.write("third\n")
    assert said == [
        f"warning: {tmp_path / 'a.jsonl'} cannot be written (File too large); what belongs there waits for room"
    ]
    limit(-1)
    file.write("fourth\n")
    file.close()
    assert (tmp_path / "a.jsonl").read_text() == "first\nsecond\nthird\nfourth\n"
    assert said[1:] == [f"{tmp_path / 'a.jsonl'} is written again, nothing of it is lost"]


def test_what_still_waits_at_the_end_is_counted(tmp_path: Path, limit: Limit) -> None:
    said: list[str] = []
    file = AppendedFile(tmp_path / "a.jsonl", said.append)
    limit(0)
    file.write("one\n")
    file.write(b"two\n")
    file.close()
    limit(-1)  # before the test ends: pytest's own report may go to a larger file
    assert said[-1] == f"warning: the last 2 records of {tmp_path / 'a.jsonl'} are lost (File too large)"


def test_a_complaint_may_go_to_the_file_itself(tmp_path: Path, limit: Limit) -> None:
    file = AppendedFile(tmp_path / "log.txt", lambda text: file.write(text + "\n"))
    limit(0)
    file.write("one\n")
    limit(-1)
    file.write("two\n")
    file.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[:7] for line in lines] == ["one", "warning", "two", str(tmp_path)[:7]]


def test_a_folder_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "deep" / "a", print)
    assert not (tmp_path / "deep").exists()
    file.write(b"\x00")
    file.close()
    assert (tmp_path / "deep" / "a").read_bytes() == b"\x00"
