"""Answers to conversations during training: what is asked, what is kept of it, and that every layout answers alike."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.conversation import read_conversation
from modelyard.chat.families import QWEN
from modelyard.chat.segments import text_of
from modelyard.config.loader import load_config
from modelyard.errors import UserError
from modelyard.parallel.world import connected
from modelyard.report.run import read_run
from modelyard.report.run_page import run_page
from modelyard.train.console import Console
from modelyard.train.evaluate import evaluate
from modelyard.train.run import train
from modelyard.train.state import Run
from tests.generate.chat_models import VOCABULARY, says, write_tokenizer
from tests.parallel.processes import run_distributed
from tests.train.helpers import lines, loaded, new_run

TOOL = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
HERE = (
    f"model.base_model.vocab_size={VOCABULARY}",
    "data.tokenizer.path=tokenizer",
    "training.compile=no",
    "training.train_iters=4",
    "model.base_model.max_position_embeddings=1024",
)


@pytest.fixture(autouse=True)
def tokenizer(tiny: Path) -> Path:
    folder = tiny / "tokenizer"
    write_tokenizer(folder)
    (folder / "modelyard_chat.json").write_text('{"family": "qwen2.5"}')
    return folder


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def write(name: str, *records: Any) -> str:
    text = "\n".join(record if isinstance(record, str) else json.dumps(record) for record in records)
    if name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(text.encode()))
    else:
        Path(name).write_text(text)
    return f"path: {name}"


def chat(settings: str, *, interval: int = 2, at_start: bool = False) -> str:
    start = ", at_start: yes" if at_start else ""
    return f"training.evaluators.talk={{interval: {interval}{start}, evaluator: {{type: chat, {settings}}}}}"


def answers(folder: str = "run") -> list[dict[str, Any]]:
    return [record for record in lines(f"{folder}/metrics.jsonl") if record.get("evaluator") == "talk"]


def test_what_is_asked_and_what_is_kept(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"role": "system", "content": "Brief."}, user("Rain in Ulm?")]
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}],
    }
    settings = write(
        "talks.jsonl.gz",
        {"messages": [*asked, call, user("not asked")], "tools": [TOOL]},
        "",
        {"conversations": [{"from": "human", "value": "a\nb"}, {"from": "gpt", "value": "c"}, {"from": "human", "value": "d"}]},
        {"messages": [user("x"), assistant("y")], "tools": [TOOL]},
        {"instruction": "never asked", "output": "it is beyond the limit"},
    )  # fmt: skip
    said = (f"{CALL}<|im_end|>", "<|im_start|>on and on", CALL.replace("city", "town") + "<|im_end|>")
    read = says(monkeypatch, tokenizer, *said)
    assert train(loaded(*HERE, chat(f"{settings}, limit: 3, max_new_tokens: 100", interval=4))) == 0
    (record,) = answers()
    talks = (
        read_conversation(asked, [TOOL]),
        read_conversation([user("a\nb")]),
        read_conversation([user("x")], [TOOL]),
    )
    assert read == [text_of(QWEN.render(talk, answer=True)) for talk in talks]
    assert (record["iteration"], record["stopped"], record["calls"], record["valid_calls"]) == (
        4,
        2 / 3,
        2,
        0.5,
    )
    problem = record["samples"][2]["calls"][0]["problem"]
    assert "town" in problem
    called = {"name": "weather", "arguments": {"city": "Ulm"}}
    assert record["samples"] == [
        {
            "prompt": "system: Brief.\nuser: Rain in Ulm?",
            "text": CALL,
            "messages": asked,
            "answer": CALL,
            "calls": [{**called, "problem": None}],
            "reference": f"{CALL}<|im_end|>\n",
            "stopped": True,
        },
        {
            "prompt": "user: a\nb",
            "text": "<|im_start|>on and on […]",
            "messages": [user("a\nb")],
            "answer": "<|im_start|>on and on",
            "calls": [],
            "reference": "c<|im_end|>\n",
            "stopped": False,
        },
        {
            "prompt": "user: x",
            "text": f"{CALL.replace('city', 'town')}\n[{problem}]",
            "messages": [user("x")],
            "answer": CALL.replace("city", "town"),
            "calls": [{"name": "weather", "arguments": {"town": "Ulm"}, "problem": problem}],
            "reference": "y<|im_end|>\n",
            "stopped": True,
        },
    ]
    said_of_it = capsys.readouterr().out
    assert (
        "evaluator talk at iteration 4: 2 of 3 answers ended by themselves, 2 call tools, 1 of them as these are defined\n"
        in said_of_it
    )
    assert "talk at iteration 4: 'user: a\\nb' → '<|im_start|>on and on […]'\n" in said_of_it


def test_conversations_in_the_config(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = "{role: tool, content: {t: 7}}"
    talks = f"[[{{role: user, content: hi}}], [{{role: user, content: a}}, {{role: assistant, content: b}}, {result}]]"
    read = says(monkeypatch, tokenizer, "Yes.<|im_end|>", "No.")
    assert train(loaded(*HERE, chat(f"conversations: {talks}", interval=4))) == 0
    (record,) = answers()
    assert [sample["reference"] for sample in record["samples"]] == [None, None]
    assert record["samples"][1]["prompt"] == 'user: a\nassistant: b\ntool: {"t": 7}'
    assert "calls" not in record  # there are no tools
    assert record["stopped"] == 0.5
    assert read[1].endswith('<tool_response>\n{"t": 7}\n</tool_response><|im_end|>\n<|im_start|>assistant\n')


def test_before_the_first_iteration_and_never_again(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = says(monkeypatch, tokenizer, *["x"] * 20)
    settings = chat("conversations: [[{role: user, content: hi}]]", at_start=True)
    assert train(loaded(*HERE, settings)) == 0
    assert [record["iteration"] for record in answers()] == [0, 2, 4]
    assert train(loaded(*HERE, settings, "training.train_iters=6")) == 0
    assert [record["iteration"] for record in answers()] == [0, 2, 4, 6]
    assert len(read) == 4
    # Stopped before there was a checkpoint: it begins again, but this is known.
    shutil.rmtree("run/checkpoint")
    assert train(loaded(*HERE, settings), force=True) == 0
    assert [record["iteration"] for record in answers()] == [0, 2, 4]
    assert len(read) == 6
    # Only there, where it has no interval.
    alone = settings.replace("interval: 2", "interval: null")
    assert train(loaded(*HERE, alone, "run.experiment_dir=other")) == 0
    assert [record["iteration"] for record in answers("other")] == [0]


def test_an_evaluator_that_does_not_ask_for_it_does_not_run_at_the_start(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, tokenizer, *["x"] * 3)
    assert train(loaded(*HERE, chat("conversations: [[{role: user, content: hi}]]"))) == 0
    assert [record["iteration"] for record in answers()] == [2, 4]


EXACT = (
    *HERE,
    "model.distributed.training_dtype=float64",
    "model.base_model.transformer.num_layers=2",
    "model.base_model.transformer.head_groups=2",
    chat(
        "conversations: [[{role: user, content: hi}], [{role: user, content: ho}]], max_new_tokens: 6, temperature: 0.2"
    ),
)


def evaluated(*overrides: str) -> Any:
    """The record of the first weights, and that the evaluator left the model ready for a step."""
    config = loaded(*EXACT, *overrides)
    assert config.architecture is not None
    with connected(backend="gloo", timeout=30, traces=Path("unused")) as world:
        run = Run(
            config.train, config.architecture, force=False, console=Console(speaks=world.is_main), world=world
        )
        record = run.evaluators.run("talk", config.train.training.evaluators["talk"], run.parallel, 0)
        loss = next(run.steps())[0].loss
    return record, round(loss, 9)


@pytest.mark.parametrize(
    "layout",
    [
        ("model.multi_stage.zero_stage=3",),
        ("model.distributed={tensor_parallel: 2, sequence_tensor_parallel: yes}",),
        ("model.distributed.pipeline_parallel=2", "batch.micro_batch_size=2"),
        ("model.distributed.sequence_data_parallel=2",),
    ],
    ids=["ZeRO 3", "tensor", "pipeline", "context"],
)
def test_every_layout_answers_alike(layout: tuple[str, ...]) -> None:
    record, loss = evaluated()
    assert record["samples"][0]["answer"] != record["samples"][1]["answer"]
    assert run_distributed(evaluated, 2, *layout) == [(record, loss)] * 2


def test_evaluate_answers_as_training_did(capsys: pytest.CaptureFixture[str]) -> None:
    settings = chat("conversations: [[{role: user, content: hi}]], max_new_tokens: 12", interval=4)
    assert train(loaded(*HERE, settings)) == 0
    capsys.readouterr()
    assert evaluate(load_config(["train.yaml"], [*HERE, settings]), checkpoint=None, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    (trained,) = answers()
    assert {**trained, "time": None} == {**found, "time": None}
    assert len(found["samples"][0]["answer"]) > 0


def test_the_page_shows_them(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = write("talks.jsonl", {"messages": [user("<Rain>?"), assistant("y")], "tools": [TOOL]})
    says(monkeypatch, tokenizer, f"{CALL}<|im_end|>", "on &", f"{CALL}<|im_end|>")
    assert train(loaded(*HERE, chat(settings, at_start=True))) == 0
    run = read_run(Path("run"))
    columns = run.answers["talk"]
    assert columns["iteration"].tolist() == [0, 2, 4]
    assert columns["stopped"].tolist() == [1, 0, 1]
    assert columns["valid_calls"].tolist()[::2] == [1, 1]
    page = run_page([run])
    assert 'talk: <code class="prompt">user: &lt;Rain&gt;?</code>' in page
    assert "<pre>on &amp; […]</pre>" in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    drawn = data["runs"][0]["answers"]
    assert (drawn["talk: stopped"]["i"], drawn["talk: stopped"]["v"]) == ([0, 2, 4], [1, 0, 1])
    assert (drawn["talk: valid calls"]["i"], drawn["talk: valid calls"]["v"]) == ([0, 4], [1, 1])


def test_what_cannot_be_asked_is_said_before_anything_is_trained(tokenizer: Path) -> None:
    good = {"messages": [user("x"), assistant("y")]}
    for records, problem in (
        (["{"], "talks.jsonl, line 1: it is no JSON"),
        ([good, "[1]"], "talks.jsonl, line 2: it is no JSON object"),
        ([good, "", {"messages": [user("x")]}], "talks.jsonl, line 3: it has no message of the assistant"),
        ([{"messages": [assistant("x")]}], "talks.jsonl, line 1: there is nothing before the answer"),
        ([{"what": 1}], "talks.jsonl, line 1: its columns (what) are those of no format"),
        ([{"messages": [user("x" * 1000), assistant("y")]}], "talks.jsonl, line 1: the conversation has 1,"),
        ([], "evaluator talk: talks.jsonl has no conversations"),
    ):
        settings = write("talks.jsonl", *records)
        with pytest.raises(UserError) as caught:
            new_run(*HERE, chat(settings))
        assert caught.value.problems[0].startswith(problem)
    with pytest.raises(UserError, match=r"conversations, number 2: message 1: role is 'me'"):
        new_run(*HERE, chat("conversations: [[{role: user, content: x}], [{role: me}]]"))
    (tokenizer / "modelyard_chat.json").write_text('{"family": "vicuna"}')
    with pytest.raises(UserError, match=r"line 1: Vicuna's format has no place for tools"):
        new_run(*HERE, chat(write("talks.jsonl", {**good, "tools": [TOOL]})))
    with pytest.raises(UserError, match="a chat evaluator needs a tokenizer"):
        new_run("training.train_iters=4", chat("conversations: [[{role: user, content: x}]]"))
    assert not Path("run").exists()


def test_keys() -> None:
    def problems(settings: str) -> list[str]:
        try:
            found = load_config(["train.yaml"], [*HERE, settings])
        except UserError as error:
            return error.problems
        return [line for line in found.warnings if "held_out" not in line]

    where = "override 6: training.evaluators.talk.evaluator"
    talks = "conversations: [[{role: user, content: x}]]"
    assert problems(chat(talks)) == []
    for settings, problem in (
        ("limit: 3", "give either path or conversations"),
        (f"{talks}, path: x.jsonl", "give either path or conversations"),
        (f"{talks}, limit: 3", "limit: only with path; all of conversations are answered"),
    ):
        assert problems(chat(settings)) == [f"{where}: {problem}"]
    (line,) = problems(chat("path: nothing.jsonl"))
    assert line.startswith(f"{where}.path: nothing.jsonl does not exist")
    # The evaluator's keys beside its interval.
    flat = load_config(
        ["train.yaml"],
        [
            *HERE,
            "training.evaluators.talk={interval: 2, at_start: yes, type: chat, limit: null, path: train.yaml}",
        ],
    )
    entry = flat.train.training.evaluators["talk"]
    assert (entry.at_start, entry.evaluator.type, entry.evaluator.limit) == (True, "chat", None)  # type: ignore[union-attr]
