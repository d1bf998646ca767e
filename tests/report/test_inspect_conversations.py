"""`modelyard inspect` of conversations as a user calls it: kinds, lanes, answers, in the terminal, as JSON and as a page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from modelyard.chat.segments import Kind
from modelyard.cli import main
from modelyard.data.store import TokenStore
from modelyard.data.tokenizer import Tokenizer, load_tokenizer
from modelyard.report.inspect_kinds import answers_text
from modelyard.report.inspect_lanes import Kinds
from tests.report.inspecting import Run, byte, config, make_store, memmap, values_of

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
TALK = [
    {"role": "system", "content": "sail"},
    {"role": "user", "content": "how wide?"},
    {"role": "assistant", "content": "42 times"},
    {"role": "user", "content": "the sea"},
    {"role": "assistant", "content": "over", "weight": 0},
]
CALLS = [
    {"role": "user", "content": "how wide?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "42 times"},
]


@pytest.fixture
def talks(chat_tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """A store `out/data` of two conversations in Llama's format, the second with a tool; the tokenizer."""
    monkeypatch.chdir(tmp_path)
    records = [{"messages": TALK}, {"messages": CALLS, "tools": TOOLS}, {"messages": CALLS[:1]}]
    Path("talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("prepare.yaml").write_text(
        "output_path: out\ndataset: {path: talks.jsonl, conversations: {unusable: drop, date: 1 May 1789}}\n"
        f"tokenizer: {{path: {chat_tokenizers['llama3']}}}\n"
    )
    assert main(["prepare", "prepare.yaml"]) == 0
    return load_tokenizer(chat_tokenizers["llama3"])


def rows_of(store: dict[str, Any]) -> dict[tuple[str, str | None], tuple[int, int]]:
    return {(row["kind"], row["role"]): (row["tokens"], row["trained_tokens"]) for row in store["kinds"]}


def test_figures_of_conversations(run: Run, talks: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    status, values = values_of(run, "out")
    (store,) = values["stores"]
    length = {
        text: len(talks.encode(text))
        for text in ("sail", "how wide?", "42 times", "the sea", "over", "\n\n", "assistant", '"42"')
    }
    call = len(talks.encode('{"name": "f", "parameters": {}}'))
    trained = 2 * (length["42 times"] + 1) + call + 1
    assert status == 0
    assert (store["documents"], store["answers"], store["answers_ended"], store["loss_lane"]) == (
        2,
        3,
        3,
        "sft",
    )
    assert store["trained_share"] == pytest.approx(trained / store["tokens"])
    assert store["chat"]["family"] == "llama3"
    rows = rows_of(store)
    assert rows["begin", None] == (2, 0)
    # Two special tokens around the role's name, and an empty line.
    assert rows["header", "assistant"] == (4 * (2 + length["assistant"] + length["\n\n"]), 0)
    assert rows["content", "assistant"] == (2 * length["42 times"] + length["over"], 2 * length["42 times"])
    assert rows["tool call", "assistant"] == (call, call)
    assert rows["tool result", "tool"] == (length['"42"'], 0)
    assert rows["terminator", "assistant"] == (4, 3)
    assert rows["terminator", "user"] == (3, 0)
    assert sum(count for count, _ in rows.values()) == store["tokens"]
    assert sum(row["share"] for row in store["kinds"]) == pytest.approx(1)
    assert values["warnings"] == []


def test_what_a_store_of_conversations_says_of_itself(
    run: Run, talks: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    _, out = run("out", "--documents", 0)
    facts = dict(re.findall(r"^  (\w+(?: \w+)*) {2,}(.*)$", out, re.MULTILINE))
    assert facts["chat format"].startswith("llama3, date 1 May 1789, knowledge_date December 2023")
    assert "by the loss lane sft (batch.loss_lane): what the assistant says" in facts["trained on"]
    assert facts["answers"].startswith("3, of ")  # of `prepare`; that of the store is before it
    assert "answers      3 are trained on, 100% of them end in a trained terminator" in out
    assert facts["conversations"] == "format auto, family auto, date 1 May 1789, unusable drop"
    assert facts["not as found"] == "1 conversations left out that cannot be used"
    assert "loss mask" not in out
    assert "{" not in facts["dataset"]
    assert re.search(r"^content +assistant +\d+ +[\d.]+% +\d+ +[\d.]+%$", out, re.MULTILINE)


def test_a_conversation_without_colour(
    run: Run, talks: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for every stretch; read back, it is the document with its kinds and what is trained on."""
    capsys.readouterr()
    _, out = run("out", "--document", 0, "--ids")
    assert out.count("* where it is trained on") == 1
    lines = out[out.index("── document 0") : out.index("nothing wrong")].splitlines()[1:]
    ids, kinds = [], []
    mark, names = " ", ""
    for line in filter(str.strip, lines):
        assert line[0] in " *"
        if line[2:26].strip():
            mark, names = line[0], " ".join(line[2:26].split())
        assert line[0] == mark
        found = [int(number) for group in re.findall(r"⟨([\d+]+)⟩", line) for number in group.split("+")]
        ids += found
        kinds += [(names, mark)] * len(found)
    assert ids == TokenStore("out/data").document(0).tolist()
    of_text = {
        names: talks.decode([i for i, (n, m) in zip(ids, kinds) if n == names and m == "*"])
        for names, _ in kinds
    }
    assert {names: text for names, text in of_text.items() if text} == {
        "content assistant": "42 times",
        "terminator assistant": "<|eot_id|>",
    }
    unmarked = talks.decode([i for i, (n, m) in zip(ids, kinds) if n == "content assistant" and m == " "])
    assert unmarked == "over"  # weight 0


def test_a_conversation_in_colour(
    run: Run, talks: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    _, out = run("out", "--document", 1)
    shown = out[out.index("── document 1") :]
    styles: dict[str, set[str]] = {}
    for style, text in re.findall(r"\x1b\[([\d;]+)m([^\x1b]+)\x1b\[0m", shown):
        styles.setdefault(text, set()).add(style)
    # Sixteen colours and an underline: 31 is red, 4 underlined.
    of_ends = [style.split(";") for style in styles["<|eot_id|>"]]
    assert all("31" in style for style in of_ends)
    assert {"4" in style for style in of_ends} == {True, False}
    colours = {number for of_text in styles.values() for style in of_text for number in style.split(";")}
    assert {"90", "36", "32", "35", "33", "31"} <= colours
    assert "⟦" not in shown
    assert "trained on" in out


def test_kinds_on_the_page(run: Run, talks: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("out", "--document", 1, "--html", "p.html")[0] == 0
    page = Path("p.html").read_text()
    ids = {name: talks.backend.token_to_id(name) for name in ("<|eot_id|>", "<|begin_of_text|>")}

    def spans(title: str) -> list[str]:
        return re.findall(rf'<b class="([^"]*)" data-i="[^"]*" title="{re.escape(title)}">', page)

    begin, end = ids["<|begin_of_text|>"], ids["<|eot_id|>"]
    assert spans(f"begin · no target · {begin}") == ["k k0 s"]
    trained = spans(f"terminator · assistant · trained on · {end}")
    assert len(trained) == 2
    assert all(set(kind.split()) - {"o"} == {"k", "k5", "y", "s"} for kind in trained)
    assert len(spans(f"terminator · tool · no target · {end}")) == 1
    assert (
        len(re.findall(r'title="tool call · assistant · trained on', page))
        == rows_of(values_of(run, "out")[1]["stores"][0])["tool call", "assistant"][0]
    )
    assert 'class="k k2 a y' in page
    assert page.count('class="legend"') == 1
    assert "underlined:" in page


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PRESS = """<!DOCTYPE html><iframe width="390" height="900" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const page = frames[0].document;
  page.querySelector('b[title^="tool call"]').click();
  document.documentElement.dataset.said = page.getElementById("what").textContent;
  document.documentElement.dataset.wide = page.documentElement.scrollWidth;
  document.documentElement.dataset.error = page.getElementById("page-error").textContent;
}});
</script>"""


def test_the_page_says_what_a_token_is_when_it_is_tapped(
    run: Run, talks: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if BROWSER is None:
        pytest.skip("needs chromium on PATH to open a page, which is not here")
    from html import escape

    capsys.readouterr()
    run("out", "--document", 1, "--html", "p.html")
    Path("frame.html").write_text(PRESS.format(page=escape(Path("p.html").read_text())))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --virtual-time-budget=2000 --dump-dom"
    done = subprocess.run(
        [str(BROWSER), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    answers = dict(re.findall(r' data-(said|wide|error)="([^"]*)"', done.stdout))
    assert answers["error"] == ""
    assert re.fullmatch(r".+ · tool call · assistant · trained on · \d+", answers["said"])
    assert int(answers["wide"]) <= 390  # nothing but tables has to be moved sideways on a phone


# Faults

HEAD, ASKS = byte(Kind.HEADER, "assistant"), byte(Kind.CONTENT, "user")
SAYS, ENDS = byte(Kind.CONTENT, "assistant"), byte(Kind.TERMINATOR, "assistant")
UNTRAINED = byte(Kind.CONTENT, "assistant", trained=False)
GOOD = [ASKS, HEAD, SAYS, ENDS]


@pytest.mark.parametrize(
    ("kinds", "fault"),
    [
        ([GOOD, [ASKS, HEAD, UNTRAINED, UNTRAINED]], "1 of 2 documents have nothing to train on by the loss lane sft (the first is document 1 of s)"),
        ([GOOD, [ASKS, HEAD, SAYS, SAYS]], "1 of 2 documents have answers (1 in all) that do not end in a trained terminator (the first is document 1 of s)"),
        ([GOOD, [ASKS, HEAD, SAYS, byte(Kind.TERMINATOR, "assistant", trained=False)]], "1 of 2 documents have answers (1 in all)"),
        ([[ASKS, HEAD, ENDS, 255], GOOD], "1 tokens are of a kind that there is not: the lane 'kind' is damaged"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_conversations(
    run: Run, tmp_path: Path, kinds: list[list[int]], fault: str
) -> None:
    make_store(tmp_path / "s", None, [[0, 5, 6, 1], [0, 7, 8, 1]], kinds=kinds)
    status, out = run("s")
    assert status == 1
    assert f"fault: s: {fault}" in out
    assert "── document 0" in out
    assert run("s", "--html", "p.html")[0] == 1
    make_store(tmp_path / "t", None, [[0, 5, 6, 1], [0, 7, 8, 1]], kinds=[GOOD, GOOD])
    assert run("t")[0] == 0


def test_almost_all_is_not_all() -> None:
    assert answers_text(Kinds("sft", answers=40_001, ended=40_000)) == (
        "40,001 are trained on, 99.99% of them end in a trained terminator"
    )
    assert answers_text(Kinds("sft")) == "none is trained on"


def test_nothing_is_read_where_nothing_may_be(run: Run, tmp_path: Path) -> None:
    make_store(tmp_path / "s", None, [[0, 5, 6, 1]] * 3, kinds=[GOOD] * 3)
    status, out = run("s", "--scan-limit", 0)
    assert (status, "no tokens were read" in out, "tokens by kind" in out) == (0, True, False)
    config(tmp_path, training=memmap("s"))
    status, values = values_of(run, "train.yaml", "batch.use_loss_masking_spans=no", "--scan-limit", "0")
    assert (status, values["datasets"]["training"][0]["kinds"]) == (0, [])


# Configs


def batch_of(run: Run, tmp_path: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Rows of 8 of two documents of 6 and 5 tokens and, in another store, text of 4."""
    kinds = [[ASKS, HEAD, SAYS, ENDS, SAYS, ENDS], [ASKS, HEAD, HEAD, SAYS, ENDS]]
    if not (tmp_path / "s").exists():
        make_store(tmp_path / "s", None, [[0, 11, 12, 13, 14, 1], [0, 21, 22, 23, 1]], kinds=kinds)
        make_store(tmp_path / "plain", None, [[0, 31, 32, 1]] * 4)
        config(tmp_path, training=memmap("s"))
    words = ("batch.use_loss_masking_spans=auto", *words)
    status, values = values_of(run, "train.yaml", *words)
    return status, values, run("train.yaml", *words)[1]


@pytest.mark.parametrize(
    ("lane", "targets", "kinds"),
    [
        ("sft", {6: 4, 5: 2}, {"content assistant": 2, "terminator assistant": 2}),
        # two answers that touch
        ("last_answer", {6: 2, 5: 2}, {"content assistant": 1, "terminator assistant": 1}),
        ("all", {6: 5, 5: 4}, {"header assistant": 1, "content assistant": 2, "terminator assistant": 2}),
    ],
)
def test_a_batch_of_conversations(
    run: Run, tmp_path: Path, lane: str, targets: dict[int, int], kinds: dict[str, int]
) -> None:
    status, values, out = batch_of(run, tmp_path, f"batch.loss_lane={lane}")
    assert status == 0
    (facts,) = values["datasets"]["training"]
    rows = values["batch"]["rows"]
    assert sorted(row["targets"] for row in rows) == sorted(targets.values())
    (row,) = (row for row in rows if row["padding"] == 2)
    assert row["targets_by_kind"] == kinds
    assert facts["trained_share"] == pytest.approx(sum(targets.values()) / 14)
    assert facts["fill"] == 11 / 16
    assert facts["loss_lane"] == lane
    assert f"(batch.loss_lane: {lane})" in " ".join(out.split())
    assert "No dataset has a loss mask" not in out
    assert "* terminator   assistant  ⟨1⟩" in out
    assert ("* header       assistant  ⟨11⟩" if lane == "all" else "  header       assistant  ⟨11⟩") in out


def test_the_last_answer_alone(run: Run, tmp_path: Path) -> None:
    chat = [ASKS, HEAD, SAYS, ENDS, ASKS, SAYS, ENDS]
    make_store(tmp_path / "s", None, [list(range(10, 17))], kinds=[chat])
    config(tmp_path, training=memmap("s"))
    _, values = values_of(run, "train.yaml", "batch.loss_lane=last_answer", "batch.use_loss_masking_spans=no")
    assert values["batch"]["rows"][0]["targets_by_kind"] == {
        "content assistant": 1,
        "terminator assistant": 1,
    }
    assert values["datasets"]["training"][0]["answers"] == 1
    assert any("see one another" in line for line in values["warnings"]) is False
    _, values = values_of(
        run, "train.yaml", "batch.cross_document_attention=yes", "batch.use_loss_masking_spans=no"
    )
    assert any("the conversations of a row see one another" in line for line in values["warnings"])


def test_what_becomes_of_conversations_that_are_too_long(run: Run, tmp_path: Path) -> None:
    short = "batch.sequence_length=4"
    status, values, out = batch_of(run, tmp_path, short)
    assert status == 1
    assert (
        "1 of 2 documents are longer than a row of sequence_length + 1 = 5 tokens: document 0 of s"
        in values["faults"][0]
    )
    assert len(values["faults"]) == 1
    # What fits is shown all the same.
    assert [row["documents"] for row in values["batch"]["rows"]] == [[1], [1]]
    assert "they stop the run (batch.overlong)" in " ".join(out.split())
    status, values, out = batch_of(run, tmp_path, short, "batch.overlong=drop")
    assert (status, values["datasets"]["training"][0]["over_long"]) == (0, "drop")
    assert any("longer than a row and left out: raise batch.sequence_length, or write batch.overlong: split" in line
               for line in values["warnings"])  # fmt: skip
    status, values, out = batch_of(run, tmp_path, short, "batch.overlong=split")
    assert (status, values["warnings"][1:]) == (0, [])  # the first says that there is no tokenizer
    assert "they are spread over several rows, nothing is lost" in " ".join(out.split())


def test_conversations_beside_texts(run: Run, tmp_path: Path) -> None:
    batch_of(run, tmp_path)
    blend = f"{{type: blended, weights: [1, 1], datasets: [{memmap('s')}, {memmap('plain')}]}}"
    config(tmp_path, training=blend)
    _, out = run(
        "train.yaml",
        "batch.use_loss_masking_spans=auto",
        "batch.truncate_documents=yes",
        "batch.overlong=drop",
    )
    said = " ".join(out.split())
    assert "documents cut where a row ends; conversations whole" in said
    assert "conversations are left out; other documents are cut into rows, nothing is lost" in said
    assert "of other documents on what the loss mask leaves, where the data has one" in said
    config(tmp_path, training=f"{{type: concatenated, datasets: [{memmap('s')}, {memmap('plain')}]}}")
    status, out = run("train.yaml", "batch.use_loss_masking_spans=no")
    assert status != 0
    assert "joins conversations (" in " ".join(out.split())


# Texts with spans


def test_pitfalls_of_spans_are_warned_of(run: Run, chat_tokenizers: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_tokenizers["llama3"])
    end, head = (tokenizer.backend.token_to_id(name) for name in ("<|eot_id|>", "<|start_header_id|>"))
    ask, answer = [head, 60, end, head], [61, 62, end]
    documents = [
        [0, *ask, *answer],
        [0, *ask, *answer, *ask[:-1]],
        [0, *ask, 61, 62, 63],
        [0, *ask, *answer, *ask[:-1]],
    ]
    masks = [[1] * 5 + [0] * 3, [1] * 5 + [0] * 3 + [1] * 3, [1] * 5 + [0] * 3, [1] * 5 + [0] * 3 + [1] * 3]
    make_store(tmp_path / "s", chat_tokenizers["llama3"], documents, masks, vocab_size=290)
    status, values = values_of(run, "s")
    (store,) = values["stores"]
    assert status == 0
    assert (store["chats"], store["chats_that_end_open"], store["chats_that_end_masked"]) == (4, 1, 2)
    warned = [line for line in values["warnings"] if "turn" in line]
    assert [line.split(" documents ")[0] for line in warned] == ["s: 1 of 4", "s: 2 of 4"]
    assert "(the first are document 1 of s, document 3 of s)" in warned[1]
    # A config that does not use the spans has nothing to say of them.
    config(tmp_path, training=memmap("s"))
    words = ("batch.sequence_length=15", "batch.cross_document_attention=yes")
    _, values = values_of(run, "train.yaml", *words)
    assert sum("turn" in line for line in values["warnings"]) == 2
    assert values["datasets"]["training"][0]["chats_that_end_masked"] == 2
    _, values = values_of(run, "train.yaml", *words, "batch.use_loss_masking_spans=no")
    assert sum("turn" in line for line in values["warnings"]) == 0
