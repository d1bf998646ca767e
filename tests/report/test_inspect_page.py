"""Inspections as pages and in colour, and that none of it needs torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from modelyard.data.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.report.inspecting import BOS, EOS, Run, config, make_store, memmap, small


def test_data_cannot_act_upon_terminal_or_page(
    run: Run, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nasty = "<script>alert(1)</script>\x1b[31m&amp;\u202e[bold]x[/bold]"
    document = [BOS, *load_tokenizer(tokenizer_folder).encode(nasty), EOS]
    make_store(tmp_path / "s", tokenizer_folder, [document])
    monkeypatch.setenv("COLUMNS", "140")
    _, out = run("s")
    shown = out.replace("│", "")
    assert "<script>alert(1)</script>␛[31m&amp;\\u202e[bold]x[/bold]<|end_of_text|>" in shown
    assert "\x1b" not in out
    status, out = run("s", "--html", "page.html")
    assert (status, out) == (0, "nothing wrong was found\nwrote page.html\n")
    page = Path("page.html").read_text()
    plain = re.sub(r"</?b[^>]*>", "", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;␛[31m&amp;amp;\\u202e[bold]x[/bold]" in plain
    assert "alert(1)</script>" not in plain
    assert "\x1b" not in page


def test_kinds_on_the_page(run: Run, tmp_path: Path, tokenizer_folder: Path) -> None:
    make_store(tmp_path / "s", tokenizer_folder, [[0, 67, 67, 1], [0, 0, 5, 1]], [[1, 1, 0, 0], [1, 1, 0, 0]])
    letter = load_tokenizer(tokenizer_folder).decode([67])
    status, out = run("s", "--document", 0, "--html", "p.html")
    assert status == 1
    assert "fault: s: 1 of 2 documents begin with begin-of-sequence twice" in out
    page = Path("p.html").read_text()
    assert (
        '<b class="m s" data-i="0" title="0">&lt;|begin_of_text|&gt;</b>'
        f'<b class="m o" data-i="67" title="67">{letter}</b><b class="t" data-i="67" title="67">{letter}</b>'
        '<b class="t o s" data-i="1" title="1">&lt;|end_of_text|&gt;</b>'
    ) in page
    assert "<strong>Fault:</strong> s: 1 of 2 documents begin" in page
    Path("mine.html").write_text("mine")
    assert run("s", "--html", "mine.html")[0] == 2
    assert Path("mine.html").read_text() == "mine"


def test_colours_where_they_are_wanted(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    _, out = run("good", "--document", 1)
    assert "\x1b[" in out
    assert "⟦" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    _, out = run("good", "--document", 1)
    assert "\x1b[" not in out
    assert "⟦<|begin_of_text|>" in out


def test_stores_and_configs_are_inspected_without_torch(tmp_path: Path) -> None:
    small(tmp_path / "s")
    config(tmp_path, training=memmap("s"))
    code = (
        "import sys\nfrom modelyard.cli import main\n"
        "assert main(['inspect', 's']) == 0\nassert main(['inspect', 'train.yaml']) == 0\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.stdout.endswith("set()\n"), done.stderr


def test_a_page_over_somebody_elses_file(run: Run, good: Path) -> None:
    Path("keep.txt").write_text("mine")
    status, out = run("good", "--html", "keep.txt")
    assert (status, "name another file with --html" in out, "--output" in out) == (2, True, False)
