"""The page in a real browser: it draws, without an error, the numbers that the run has, and answers the user."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelyard.report import run_page as module
from modelyard.report.page import html_page
from modelyard.report.run import read_run
from tests.report.fake import START, event, record, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# What the tests ask of the page after it is drawn; the answers come back in an attribute of the document.
ASK = """
const answers = {};
const plot = (title) => view.plots.find((p) => p.title === title);
const loss = plot("Loss");
const values = (p) => p.lines.map((line) => [line.label, line.value.textContent]);
const texts = (p, kind) => [...p.svg.querySelectorAll(kind)].map((node) => node.textContent);
const pointer = (p, type, x) => p.svg.dispatchEvent(new PointerEvent(type, {
  clientX: p.svg.getBoundingClientRect().left + x, pointerId: 1, pointerType: "mouse", button: 0, bubbles: true }));
if (loss) loss.svg.setPointerCapture = () => {};  // there is no such pointer here
const key = (p, key) => p.svg.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const press = (text) => [...document.querySelectorAll("button")].find((b) => b.textContent.includes(text)).click();
%s
document.documentElement.dataset.answers = JSON.stringify(answers);
"""

FRAME = """<!DOCTYPE html><iframe width="{width}" height="9000" style="border: 0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  document.documentElement.dataset.framed = frames[0].document.documentElement.outerHTML;
}});
</script>"""


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, str]]:
    """Open the page of runs, run a script on it, and give (answers, the document as it then is)."""
    if BROWSER is None:
        pytest.skip("needs chromium on PATH to open a page, which is not here")

    def asked(folders: list[Path], script: str, width: int = 1280) -> tuple[Any, str]:
        def with_questions(title: str, body: str, **parts: Any) -> str:
            parts["script"] += ASK % script
            return html_page(title, body, **parts)

        monkeypatch.setattr(module, "html_page", with_questions)
        page = module.run_page([read_run(folder) for folder in folders])
        # A window is at least 500 pixels wide; a frame in it can be as narrow as a phone.
        path = tmp_path / "frame.html"
        path.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8", errors="replace")
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --window-size=1400,2400 --virtual-time-budget=2000 --dump-dom"
        )
        done = subprocess.run(
            [str(BROWSER), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        framed = re.search(r'data-framed="([^"]*)"', done.stdout)
        assert framed is not None, done.stderr
        document = html.unescape(framed[1])
        error = re.search(r'id="page-error"[^>]*>(.*?)</div>', document, re.DOTALL)
        assert error is not None
        assert error[1] == ""
        assert 'data-ready="1"' in document
        answers = re.search(r'data-answers="([^"]*)"', document)
        assert answers is not None
        return json.loads(html.unescape(answers[1])), document

    return asked


def evaluation(iteration: int, loss: float) -> dict[str, Any]:
    when = START + 2 * iteration + (380 if iteration > 60 else 0)
    return {"iteration": iteration, "evaluator": "held out", "loss": loss, "targets": 9, "time": when}


def run_of(folder: Path, **changes: Any) -> Path:
    """Ten records of iterations 10 to 100, the fifth without a finite loss, two evaluations, a resume at 60."""
    records = [
        record(k, **({"loss": None, "loss_mean": None} if k == 50 else changes)) for k in range(10, 101, 10)
    ]
    text = "a <script>document.title = 'taken'</script> b"
    story = {
        "iteration": 100,
        "evaluator": "stories",
        "samples": [{"prompt": "p", "text": text}],
        "time": START,
    }
    events = [
        event("started", 0, 0.0),
        event("saved", 60, 120.0, "saved 60"),
        event("resumed", 60, 500.0, "resuming"),
    ]
    records = [one if one["iteration"] <= 60 else {**one, "time": one["time"] + 380} for one in records]
    return write_run(
        folder,
        [*records, evaluation(50, 6.25), evaluation(100, 5.75), story],
        events=events,
        config={"training": {"train_iters": 100}},
    )


def test_scores_by_kind_are_drawn(tmp_path: Path, ask: Callable[..., tuple[Any, str]]) -> None:
    kinds = {"content": {"loss": 1.5, "accuracy": 0.5}, "terminator": {"loss": 0.25, "accuracy": 0.875}}
    folder = write_run(
        tmp_path / "run", [record(10), {**evaluation(10, 1.25), "accuracy": 0.625, "kinds": kinds}]
    )
    answers, _ = ask([folder], "for (const p of view.plots.slice(1, 3)) answers[p.title] = values(p);")
    assert answers == {
        "Loss of what the assistant says, by kind": [
            ["held out: content", "1.5"],
            ["held out: terminator", "0.25"],
        ],
        "Accuracy": [["held out", "62.5%"], ["held out: content", "50%"], ["held out: terminator", "87.5%"]],
    }


def test_one_run_is_drawn_and_answers(tmp_path: Path, ask: Callable[..., tuple[Any, str]]) -> None:
    answers, document = ask(
        [run_of(tmp_path / "run")],
        """
answers.plots = view.plots.map((p) => p.title);
answers.last = values(loss);
answers.lines = [...loss.svg.querySelectorAll("path.line")].map((p) => (p.getAttribute("d").match(/[ML]/g) ?? []).join(""));
answers.crosses = loss.svg.querySelectorAll(".not-finite").length;
answers.marks = texts(loss, ".mark text");
answers.units = view.plots.map((p) => texts(p, "text.unit"));
answers.tokens = plot("Throughput").lines[0].value.textContent;
const phases = plot("Time per phase");
answers.bars = [...phases.svg.querySelectorAll("path[class^=phase]")].map((p) => p.getAttribute("d").split("z").length - 1);
answers.shares = phases.layers.map((layer) => phases.value(layer, [0, 1]));
phases.switches.querySelector("button").click();
answers.seconds = phases.layers.map((layer) => phases.value(layer, [0, 1]));
answers.phases = plot("Time per phase").layers.map((layer) => [layer.name, layer.value.textContent]);

setCursor(70); drawCursors();
answers.at70 = [loss.at.textContent, ...values(loss), plot("Learning rate").lines[0].value.textContent];
answers.bar70 = plot("Time per phase").at.textContent;
setCursor(50); drawCursors();
answers.at50 = values(loss)[0];

loss.svg.focus();
key(loss, "Home"); answers.home = view.cursor;
key(loss, "ArrowRight"); answers.right = view.cursor;
answers.spoken = document.getElementById("spoken").textContent;
key(loss, "+"); answers.zoomed = view.range;
key(loss, "Escape"); answers.whole = view.range;

const [a, b] = [loss.x(20), loss.x(40)];
pointer(loss, "pointerdown", a); pointer(loss, "pointermove", b);
answers.selecting = loss.svg.querySelectorAll(".selection").length;
pointer(loss, "pointerup", b);
answers.dragged = view.range.map(Math.round);
answers.linked = view.plots.every((p) => p.range.map(Math.round).join() === "20,40");
loss.svg.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
answers.reset = [view.range, loss.range];

press("tokens"); answers.tokensAxis = [texts(loss, "text.unit")[1], loss.range];
press("time"); answers.timeAxis = [texts(loss, "text.unit")[1], loss.range];
press("iterations");
loss.switches.querySelector("button").click(); answers.log = [loss.log, texts(loss, "text.unit")[0]];
loss.switches.querySelector("button").click();
loss.legend.querySelectorAll("button")[1].click(); answers.off = loss.svg.querySelectorAll("path.line").length;
press("resumes"); answers.marksLeft = texts(loss, ".mark text");
const slider = document.getElementById("smoothing");
slider.value = "0.5"; slider.dispatchEvent(new Event("input"));
answers.smooth = loss.drawn[0][2].v;
answers.title = document.title;
answers.width = [document.documentElement.scrollWidth, window.innerWidth];
""",
    )
    assert answers["plots"] == [
        "Loss",
        "Learning rate",
        "Gradient norm, before clipping",
        "Throughput",
        "Model FLOP/s",
        "Peak memory so far",
        "Waiting for data",
        "Time per phase",
    ]
    # The mean of the interval, and the loss of the iteration alone.
    assert answers["last"] == [["train", "-1.5 (raw -2)"], ["held out", "5.75"]]
    # Faint and strong line of ten points, broken at the fifth; two evaluations.
    assert answers["lines"] == ["MLLLMLLLL", "MLLLMLLLL", "ML"]
    assert answers["crosses"] == 1
    assert sorted(answers["marks"]) == ["▲", "●"]
    assert ["nats per token", "iterations"] in answers["units"]
    assert all(len(unit) == 2 and all(unit) for unit in answers["units"])
    assert ["GiB", "iterations"] in answers["units"]
    assert answers["tokens"] == "500 tokens/s"
    # Data, forward, backward, optimizer and other: ten intervals each; the phases that took no time are left out.
    assert answers["bars"] == [10] * 5
    assert answers["shares"] == pytest.approx([0.25, 0.2, 0.4, 0.1, 0.05])
    # 2 seconds of 10 iterations a record.
    assert answers["seconds"] == pytest.approx([0.05, 0.04, 0.08, 0.02, 0.01])
    assert answers["phases"][0] == ["data", "5 s (25%)"]
    assert answers["phases"][2] == ["backward", "8 s (40%)"]

    assert answers["at70"] == [
        "iteration 70 · 70 k tokens · 2 min 20 s",
        ["train", "1.5 (raw 1)"],
        ["held out", "6.25"],
        "7.000e-2",
    ]
    assert answers["bar70"] == "iterations 61 to 70: 2 s"
    assert answers["at50"] == ["train", "not finite"]
    assert (answers["home"], answers["right"]) == (10, 20)
    assert answers["spoken"].startswith("iteration 20 · 20 k tokens · 40 s, train 6.5 (raw 6), held out")
    assert answers["zoomed"] == [10, 60]
    assert answers["whole"] is None
    assert answers["selecting"] == 1
    assert answers["dragged"] == [20, 40]
    assert answers["linked"] is True
    assert answers["reset"] == [None, [0, 100]]
    assert answers["tokensAxis"] == ["tokens", [0, 100_000]]
    # 200 s at work; the pause of 380 s before the resume is none of it.
    assert answers["timeAxis"] == ["time at work [min]", [0, 200]]
    assert answers["log"] == [True, "nats per token, log scale"]
    assert answers["off"] == 2
    assert answers["marksLeft"] == ["●"]
    # By hand, with the weights' sum corrected: 7.5; (0.5 · 0.5 · 7.5 + 0.5 · 6.5) / 0.75 …
    assert answers["smooth"][:2] == pytest.approx([7.5, (0.25 * 7.5 + 0.5 * 6.5) / 0.75])
    assert answers["smooth"][4] is None
    assert answers["title"] == "Run run"
    assert "&lt;script&gt;document.title = 'taken'&lt;/script&gt;" in document
    assert answers["width"][0] <= answers["width"][1]


def test_runs_overlay_on_a_phone(tmp_path: Path, ask: Callable[..., tuple[Any, str]]) -> None:
    old = record(10)
    del old["seconds"], old["model_flops_per_second"]
    folders = [
        run_of(tmp_path / "a" / "run"),
        run_of(tmp_path / "b" / "run", loss_mean=3.25),
        write_run(tmp_path / "old", [old]),
        write_run(tmp_path / "empty", []),
    ]
    answers, _ = ask(
        folders,
        """
answers.last = values(loss);
answers.ends = texts(loss, "text.end");
answers.looks = loss.lines.map((line) => `${line.colour} ${line.dash} ${line.marker}`);
answers.single = loss.svg.querySelectorAll("path.marker[d^=M]").length;
answers.plots = view.plots.map((p) => p.title);
press("a/run");
answers.hidden = [loss.lines.map((line) => line.button.hidden), loss.svg.querySelectorAll("path.line").length];
answers.phaseHidden = plot("Time per phase, A a/run").node.hidden;
answers.width = [document.documentElement.scrollWidth, window.innerWidth];
answers.clipped = [...document.querySelectorAll(".plot button, .plot text, .toolbar button")].filter((node) => {
  const box = node.getBoundingClientRect();
  return box.width && (box.right > window.innerWidth || box.left < 0);
}).map((node) => node.textContent);
""",
        width=390,
    )
    assert answers["last"] == [
        ["A train", "-1.5 (raw -2)"],
        ["A held out", "5.75"],
        ["B train", "3.25 (raw -2)"],
        ["B held out", "5.75"],
        ["C train", "7.5 (raw 7)"],
    ]
    assert sorted(answers["ends"]) == ["A", "B", "C"]
    # No two lines look alike, and the runs differ by more than their colour.
    assert len(set(answers["looks"])) == 5
    assert [look.split()[1] for look in answers["looks"]] == ["0", "0", "1", "1", "2"]
    assert [title for title in answers["plots"] if title.startswith("Time")] == [
        "Time per phase, A a/run",
        "Time per phase, B b/run",
    ]
    assert answers["hidden"] == [[True, True, False, False, False], 5]
    assert answers["phaseHidden"] is True
    assert answers["width"] == [390, 390]
    assert answers["clipped"] == []


def test_an_empty_run_says_so(tmp_path: Path, ask: Callable[..., tuple[Any, str]]) -> None:
    answers, document = ask([write_run(tmp_path / "run", [])], "answers.plots = view.plots.length;")
    assert answers == {"plots": 0}
    assert "There are no numbers to plot yet." in document


def test_answers_to_conversations_are_drawn(tmp_path: Path, ask: Callable[..., tuple[Any, str]]) -> None:
    def talk(iteration: int, stopped: float, valid: float | None) -> dict[str, Any]:
        when, calls = START + 2 * iteration, {} if valid is None else {"valid_calls": valid}
        samples = [{"prompt": "user: hi", "text": "ho"}]
        return {
            "iteration": iteration,
            "evaluator": "talk",
            "stopped": stopped,
            **calls,
            "samples": samples,
            "time": when,
        }

    records = [talk(0, 0.25, None), record(10), talk(10, 0.5, 0.75), record(20), talk(20, 1.0, 1.0)]
    answers, document = ask(
        [write_run(tmp_path / "run", records)],
        """
const drawn = plot("Answers to conversations");
answers.last = values(drawn);
setCursor(0); drawCursors();
answers.first = values(drawn)[0];
""",
    )
    assert answers["last"] == [["talk: stopped", "100%"], ["talk: valid calls", "100%"]]
    assert answers["first"] == ["talk: stopped", "25%"]
    assert "user: hi" in document
