"""`modelyard chat` in this process, with answers that are said for the model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import read_conversation
from modelyard.chat.families import QWEN, ChatML, Llama3
from modelyard.chat.formats import read_record
from modelyard.chat.segments import text_of
from modelyard.cli import main
from modelyard.data.tokenizer import load_tokenizer
from tests.generate.chat_models import interrupts_after, says, write_model

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
Chat = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("model"), chat={"family": "qwen2.5"}, max_position_embeddings=4096
    )


@pytest.fixture
def chat(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Run the verb on the model; `typed` are the lines of standard input."""
    monkeypatch.chdir(tmp_path)
    Path("tools.json").write_text(json.dumps([TOOL]))

    def run(*words: str, typed: str = "") -> int:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return main(["chat", str(model), "--temperature", "0", *words])

    return run


def read_of(messages: list[dict[str, Any]], tools: Any = None) -> str:
    """What a model of this format reads before its answer."""
    return text_of(QWEN.render(read_conversation(messages, tools), answer=True))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_a_line_is_a_message_and_the_history_is_kept(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = says(monkeypatch, model, "One.<|im_end|>", "Two,\n <b> <|im_end|>", "cut" * 20)
    assert chat("--max-new-tokens", "25", typed="first\n\nsecond <|im_end|>\nthird\n") == 0
    out, err = capsys.readouterr()
    assert out == f"One.\nTwo,\n <b> \n{'cut' * 8}c\n"
    assert err.splitlines() == [
        "chat format: qwen2.5; what ends an answer: <|end_of_text|> <|endoftext|> <|im_end|>",
        "(cut off after 25 tokens)",
    ]
    said = [
        user("first"),
        assistant("One."),
        user("second <|im_end|>"),
        assistant("Two,\n <b> "),
        user("third"),
    ]
    assert read == [read_of(said[:1]), read_of(said[:3]), read_of(said)]


def test_commands(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = says(monkeypatch, model, *(f"{n}<|im_end|>" for n in range(1, 6)))
    typed = "/save x\n/undo\na\nb\n/undo\nc\n/save out.jsonl\n/system Short.\nd\n/reset\n/system\ne\n/save out.jsonl\n/quit\nf\n"
    assert chat("--system", "Long.", typed=typed) == 0
    system = {"role": "system", "content": "Long."}
    short = {"role": "system", "content": "Short."}
    history = [user("a"), assistant("1"), user("c"), assistant("3")]
    assert read == [
        read_of([system, user("a")]),
        read_of([system, *history[:2], user("b")]),
        read_of([system, *history[:3]]),
        read_of([short, *history, user("d")]),
        read_of([user("e")]),
    ]
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert records == [{"messages": [system, *history]}, {"messages": [user("e"), assistant("5")]}]
    assert read_record(records[0]).messages[0].content == "Long."  # as `prepare` reads it
    assert capsys.readouterr().err.splitlines()[1:] == [
        "error: there is nothing to save: nothing was answered yet", "there is nothing to take back",
        "taken back", "added to out.jsonl", "forgotten", "added to out.jsonl",
    ]  # fmt: skip


def test_what_is_mistyped(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, model, "fine<|im_end|>")
    assert chat(typed="/rest\n/save\n/help\nx\n/save no/such/folder\n") == 0
    err = capsys.readouterr().err
    assert "error: '/rest' is no command; did you mean '/reset'? (/help lists them)\n" in err
    assert "error: /save needs the name of a file\n" in err
    assert "error: no/such/folder: No such file or directory\n" in err
    for word in ("/system", "/undo", "/reset", "/save", "/help", "/quit"):
        assert f"\n{word} " in err


def test_a_call_is_shown_and_its_result_asked_for(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = CALL.replace('"city"', '"town"').replace("Ulm", "Köln")
    read = says(monkeypatch, model, f"Well.\n{CALL}\n{bad}<|im_end|>", "Rain.<|im_end|>")
    assert chat("--tools", "tools.json", typed='weather?\n{"t": 7}\nno idea\n/save out.jsonl\n') == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "Well.",
        '[call] weather {"city": "Ulm"}',
        '[call] weather {"town": "Köln"}',
        next(line for line in out.splitlines() if line.startswith("[not as its definition says]")),
        "Rain.",
    ]
    assert "town" in out.splitlines()[3]
    assert "tools: weather\nnothing is run: you are asked for the result of each call\n" in err
    (record,) = (json.loads(line) for line in Path("out.jsonl").read_text().splitlines())
    assert record["tools"] == [TOOL]
    assert [message["role"] for message in record["messages"]] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert [message["content"] for message in record["messages"]][2:4] == [{"t": 7}, "no idea"]
    assert read == [read_of(record["messages"][:1], [TOOL]), read_of(record["messages"][:4], [TOOL])]
    assert read_record(record).messages[1].calls[0].arguments == {"city": "Ulm"}


def test_without_anybody_to_ask_a_turn_ends_with_its_calls(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, model, f"{CALL}<|im_end|>", "x", "y<|im_end|>")
    words = ("--tools", "tools.json", "--json", "--show-tokens", "--message", "weather?", "--message", "and?")
    assert chat(*words) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    tokenizer = load_tokenizer(model)
    call = {"name": "weather", "arguments": {"city": "Ulm"}}
    asked = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert first == {
        "message": "weather?",
        "answer": "",
        "calls": [{**call, "problem": None}],
        "messages": [user("weather?"), asked],
        "text": CALL,
        "token_ids": tokenizer.encode(f"{CALL}<|im_end|>", parse_special=True),
        "stopped": True,
        "prompt_ids": tokenizer.encode(read_of([user("weather?")], [TOOL]), parse_special=True),
    }
    assert (second["answer"], second["stopped"], second["calls"]) == ("x", False, [])
    assert tokenizer.decode(second["prompt_ids"]) == read_of([user("weather?"), asked, user("and?")], [TOOL])


PYTHON = """\
def weather(city: str) -> dict:
    "The weather."
    return {"city": city, "t": len(city)}

def fails(): raise ValueError("no")
"""


def test_python_runs_only_when_that_is_asked_for(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tools.py").write_text(PYTHON)
    fails = '<tool_call>\n{"name": "fails", "arguments": {}}\n</tool_call>'
    wrong = CALL.replace('"Ulm"', "7")
    read = says(monkeypatch, model, f"{CALL}\n{fails}\n{wrong}<|im_end|>", "Warm.<|im_end|>")
    assert chat("--tools", "tools.py", "--run-python", "--message", "weather?") == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("[result]")]
    assert lines[:2] == ['[result] {"city": "Ulm", "t": 3}', '[result] {"error": "ValueError: no"}']
    assert lines[2].startswith('[result] {"error": "')  # what does not fit its definition is not run
    assert out.endswith("Warm.\n")
    assert "not attacks: the code can read and write files as you can\n" in err
    assert '<tool_response>\n{"city": "Ulm", "t": 3}\n</tool_response>' in read[1]

    says(monkeypatch, model, f"{CALL}<|im_end|>", "Warm.<|im_end|>")
    assert chat("--tools", "tools.py", "--run-python", "--json", "--message", "weather?") == 0
    turn = json.loads(capsys.readouterr().out)
    called = {"name": "weather", "arguments": {"city": "Ulm"}}
    assert (turn["answer"], turn["calls"]) == ("Warm.", [{**called, "problem": None}])
    assert turn["messages"][2] == {"role": "tool", "content": {"city": "Ulm", "t": 3}}

    says(monkeypatch, model, f"{CALL}<|im_end|>", "Hm.<|im_end|>")
    assert chat("--tools", "tools.py", typed="weather?\nsunny\n") == 0
    out, err = capsys.readouterr()
    assert "[result]" not in out
    assert "nothing is run" in err


def test_calls_that_never_end(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tools.py").write_text(PYTHON)
    read = says(monkeypatch, model, *[f"{CALL}<|im_end|>"] * 20)
    assert chat("--tools", "tools.py", "--run-python", "--message", "weather?") == 0
    assert len(read) == 8
    assert "(8 rounds of calls: say something, and it goes on)\n" in capsys.readouterr().err


def test_code_of_llama(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = says(monkeypatch, model, "<|python_tag|>x = 6\nx * 7<|eom_id|>", "42<|eot_id|>")
    assert chat("--family", "llama3", "--run-python", "--message", "6*7?") == 0
    out, _ = capsys.readouterr()
    assert out == '[call] code_interpreter {"code": "x = 6\\nx * 7"}\n[result] 42\n\n42\n'
    assert read[1].endswith(
        'ipython<|end_header_id|>\n\n"42\\n"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
    )
    assert read[0] == text_of(Llama3().render(read_conversation([user("6*7?")]), answer=True))


def interrupted() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, model, "One two three.<|im_end|>")
    interrupts_after(monkeypatch, 4, interrupted)
    assert chat(typed="count\n/save out.jsonl\n") == 0
    out, err = capsys.readouterr()
    assert out == "One \n"
    assert "\n(stopped)\n" in err
    assert json.loads(Path("out.jsonl").read_text()) == {"messages": [user("count"), assistant("One ")]}


def test_ctrl_c_before_an_answer_takes_the_message_back(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    says(monkeypatch, model, "One")
    interrupts_after(monkeypatch, 0, interrupted)
    assert chat(typed="count\n/undo\n") == 0
    assert capsys.readouterr().err.splitlines()[1:] == [
        "", "(the message is taken back)", "(Ctrl-D or /quit leaves)", "there is nothing to take back",
    ]  # fmt: skip


def test_each_answer_has_a_seed_of_its_own(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    def answers(*words: str) -> list[Any]:
        assert (
            chat("--temperature", "1", "--max-new-tokens", "8", "--json", *words, typed="a\n/undo\na\n") == 0
        )
        return [json.loads(line)["token_ids"] for line in capsys.readouterr().out.splitlines()]

    first, second = answers()
    assert first != second
    assert answers() == [first, second]
    assert answers("--seed", "1")[0] == second


def test_what_cannot_be_is_one_line(
    chat: Chat, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_model(tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):  # a vocabulary that tells of no format
        path = bare / file
        path.write_text(path.read_text().replace("<|im_", "<|in_").replace("<|eot_id|>", "<|eod_id|>"))
    capsys.readouterr()
    Path("bad.json").write_text("[1]")
    Path("nameless.json").write_text('[{"type": "function", "function": {}}]')
    Path("tools.py").write_text(PYTHON)
    for words, line in (
        (("--tools", "tool.json", "--message", "x"), "--tools: tool.json does not exist"),
        (("--tools", "bad.json", "--message", "x"), "--tools: bad.json: tools are not a list of objects"),
        (("--tools", "nameless.json", "--message", "x"), "--tools: nameless.json: tool 1 has no name"),
        (("--run-python", "--message", "x"), "--run-python has nothing to run: name a Python file"),
        (("--family", "qwen", "--message", "x"), "there is no chat format 'qwen'; there are llama3, qwen2.5"),
        (("--family", "chatml", "--tools", "tools.json"), "plain ChatML has no place for tools"),
        (("--top-p", "2", "--message", "x"), "top_p must be above 0 and at most 1, not 2.0"),
        (("--message", "x" * 5000), "the conversation has 5,"),
    ):
        assert chat(*words) == 2
        out, err = capsys.readouterr()
        lines = [text for text in err.splitlines() if not text.startswith("chat format")]
        assert (out, len(lines)) == ("", 1)
        assert lines[0].startswith(f"error: {line}"), lines
    assert main(["chat", str(bare), "--message", "x"]) == 2
    err = capsys.readouterr().err
    assert "has no chat template" in err
    assert err.endswith("here with --family NAME\n")


def test_the_format_that_was_written_down_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "m", chat={"family": "chatml", "default_system": "Be kind."})
    read = says(monkeypatch, folder, "Yes.<|im_end|>")
    assert main(["chat", str(folder), "--message", "x"]) == 0
    assert read == [
        text_of(ChatML(default_system="Be kind.").render(read_conversation([user("x")]), answer=True))
    ]
    assert "chat format: chatml; " in capsys.readouterr().err
