import json
from pathlib import Path
from typing import Any

import pytest

from modelyard.train.console import Console
from modelyard.train.events import EventLog


def test_events_wait_for_their_file_and_are_never_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "started"}\n')
    events = EventLog(Console())
    events.add("checkpoint_damaged", 6, "checkpoint 6 is damaged")
    heard: list[dict[str, Any]] = []
    events.open(path)
    events.listeners.append(heard.append)
    events.add("saved", 9, "saved 9", say=False, seconds=1.5, bytes=10)
    events.close()
    before, damaged, saved = map(json.loads, path.read_text().splitlines())
    assert before == {"event": "started"}
    assert (damaged["iteration"], damaged["event"], damaged["text"]) == (
        6,
        "checkpoint_damaged",
        "checkpoint 6 is damaged",
    )
    assert heard == [saved]
    assert saved.pop("time") > 1.7e9
    assert saved == {"iteration": 9, "event": "saved", "text": "saved 9", "seconds": 1.5, "bytes": 10}
    assert capsys.readouterr().out == "checkpoint 6 is damaged\n"
