"""Talking with a model in a process of its own: real weights, and the tokens that training would have."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelyard.cli import main
from modelyard.data.store import TokenStore
from tests.system.conftest import environment, modelyard

PREPARE = """\
output_path: data
dataset: {path: talk.jsonl, conversations: {family: vicuna}}
tokenizer: {path: %s}
"""


@pytest.fixture
def model(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K" / "hf"


def test_what_is_saved_is_trained_on_as_it_was_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ("--temperature", "0", "--max-new-tokens", "24", "--json", "--show-tokens")
    said += ("--message", "Once upon a time </s>", "--message", "And then?")
    done = modelyard("chat", model, "--family", "vicuna", *said, cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.err == "chat format: vicuna; what ends an answer: </s>\n"
    turns = [json.loads(line) for line in done.out.splitlines()]
    assert [len(turn["token_ids"]) for turn in turns] == [24, 24]
    messages = [message for turn in turns for message in turn["messages"]]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2

    # `prepare` makes of it a document that begins with what the model read, and writes down the format beside its tokenizer.
    monkeypatch.chdir(tmp_path)
    Path("talk.jsonl").write_text(json.dumps({"messages": messages}))
    Path("prepare.yaml").write_text(PREPARE % model)
    assert main(["prepare", "prepare.yaml"]) == 0
    document = TokenStore("data/data").document(0).tolist()
    for turn in turns:
        assert turn["prompt_ids"] == document[: len(turn["prompt_ids"])]
    capsys.readouterr()
    assert main(["chat", str(model), "--tokenizer", "data/data/tokenizer", *said]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == turns


def test_at_a_terminal(model: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "modelyard", "chat", str(model), "--family", "vicuna", "--max-new-tokens", "12"],
        cwd=tmp_path, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    said = b""

    def until(text: bytes) -> bytes:
        nonlocal said
        begin, deadline = len(said), time.monotonic() + 120
        while text not in said[begin:] and time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                said += os.read(ours, 4096)
        return said[begin:]

    try:
        assert b"what ends an answer: </s>\r\n> " in until(b"> ")
        os.write(ours, b"Once upon a time\n")
        answered = until(b"\r\n> ")
        assert b"(cut off after 12 tokens)\r\n> " in answered
        assert len(answered) > len(b"Once upon a time\r\n(cut off after 12 tokens)\r\n> ")
        os.write(ours, b"/undo\n")
        assert until(b"\r\n> ").endswith(b"taken back\r\n> ")
        os.write(ours, b"\x04")  # Ctrl-D
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
