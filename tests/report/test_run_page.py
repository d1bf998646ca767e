"""`modelyard report` as a user calls it, and what stands on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from modelyard.cli import main
from modelyard.report.run import read_run
from modelyard.report.run_page import letter, run_page, spread
from tests.report.fake import START, event, record, write_run
from tests.report.test_page import embedded


def samples(iteration: int, *pairs: tuple[str, str]) -> dict[str, Any]:
    texts = [{"prompt": prompt, "text": text} for prompt, text in pairs]
    return {"iteration": iteration, "evaluator": "stories", "samples": texts, "time": START}


def two_runs(folder: Path) -> tuple[Path, Path]:
    """Runs of the same name; the second skipped a step."""
    config: dict[str, Any] = {
        "training": {"train_iters": 20},
        "optimizer": {"learning_rate": {"base": 0.001}},
    }
    other = {**config, "optimizer": {"learning_rate": {"base": 0.002}}}
    first = write_run(
        folder / "a" / "run", [record(10), record(20)], events=[event("started", 0, 0.0)], config=config
    )
    second = write_run(
        folder / "b" / "run",
        [record(10, loss=None), record(20, loss=5.5)],
        events=[event("started", 0, 0.0), event("skipped", 10, 19.0, "the loss is <not> finite")],
        config=other,
    )
    return first, second


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = two_runs(tmp_path)
    assert main(["report", str(folder)]) == 0
    path = folder / "report.html"
    assert capsys.readouterr().out.startswith(f"wrote {path} (2 training records, ")
    data: Any = embedded(path.read_text(encoding="utf-8"))
    assert [run["name"] for run in data["runs"]] == ["run"]
    assert data["runs"][0]["series"]["loss"]["v"] == [7, 6]
    assert data["runs"][0]["series"]["tokens_per_second"] == {
        "i": [10, 20],
        "t": [10000, 20000],
        "s": [20, 40],
        "v": [500, 500],
    }
    assert data["phases"][0] == "data"
    # Written again, it replaces its own page.
    assert main(["report", str(folder)]) == 0


def test_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(first), str(second), str(first) + "/"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data: Any = embedded(page)
    assert [(run["letter"], run["name"]) for run in data["runs"]] == [("A", "a/run"), ("B", "b/run")]
    assert data["runs"][1]["series"]["loss"]["v"] == [None, 5.5]
    table = re.search(r'<table id="differences">.*?</table>', page, re.DOTALL)
    assert table is not None
    assert re.findall(r"<code>(.*?)</code>", table[0]) == ["optimizer.learning_rate.base", "0.001", "0.002"]
    assert "the loss is &lt;not&gt; finite" in page


def test_output_is_where_it_is_told_and_never_over_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = two_runs(tmp_path)
    assert main(["report", str(folder), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").is_file()
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    assert main(["report", str(folder), "--output", str(mine)]) == 2
    assert "no page that modelyard wrote" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = two_runs(tmp_path)
    assert main(["report", str(folder), str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"{tmp_path} is not the folder of a run: it has no metrics.jsonl" in captured.err
    assert not (folder / "report.html").exists()


def test_text_of_the_model_stays_text(tmp_path: Path) -> None:
    evil = "</pre></script><script>document.title='taken'</script><img src=x onerror=alert(1)>\ud800"
    folder = write_run(tmp_path / "<b>run", [record(1), samples(1, (evil, evil), ("", ""))])
    page = run_page([read_run(folder)])
    assert "&lt;script&gt;document.title=&#x27;taken&#x27;&lt;/script&gt;" in page
    assert "<img" not in page
    assert "<b>run" not in page
    assert page.count("<script") == 3
    assert "an empty prompt" in page


def test_samples_lie_side_by_side_newest_first(tmp_path: Path) -> None:
    records = [record(1), *(samples(k, ("Once", f"text {k}"), ("Twice", "x" * 2500)) for k in (10, 20, 30))]
    page = run_page([read_run(write_run(tmp_path / "run", records))])
    strips = re.findall(r'<table class="samples">(.*?)</table>', page, re.DOTALL)
    assert len(strips) == 2
    assert re.findall(r"iteration (\d+)", strips[0]) == ["30", "20", "10"]
    assert re.findall(r"<pre>(.*?)</pre>", strips[0]) == ["text 30", "text 20", "text 10"]
    assert "500 more characters" in strips[1]


def test_many_samples_are_spread_evenly() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(101, 5) == [0, 25, 50, 75, 100]


def test_what_is_missing_is_said_once(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, [record(1)])) for name in ("one", "two")]
    page = run_page(runs)
    assert page.count("events.jsonl is not there") == 1
    assert "the configuration is not known" in page
    assert '<h2 id="config-title">' not in page


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    page = run_page([read_run(write_run(tmp_path / "run", []))])
    assert "metrics.jsonl has no training records yet." in page


def test_totals_of_the_phases(tmp_path: Path) -> None:
    page = run_page([read_run(write_run(tmp_path / "run", [record(10), record(20)]))])
    table = re.search(r'<table id="phases">(.*?)</table>', page, re.DOTALL)
    assert table is not None
    rows = re.findall(r'<th scope="row">(.*?)</th><td[^>]*>(.*?)</td><td[^>]*>(.*?)</td>', table[1])
    assert rows[0] == ("getting batches", "1 s", "25.0%")
    assert rows[2] == ("backward", "1.6 s", "40.0%")
    assert rows[-1] == ("all", "4 s", "100.0%")


def test_letters() -> None:
    assert [letter(index) for index in (0, 1, 25, 26, 27, 701, 702)] == [
        "A",
        "B",
        "Z",
        "AA",
        "AB",
        "ZZ",
        "AAA",
    ]


def test_a_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    line = json.dumps(record(0)).replace('"iteration": 0', '"iteration": %d')
    (folder / "metrics.jsonl").write_text("".join(line % k + "\n" for k in range(1, 30_001)))
    page = run_page([read_run(folder)])
    assert len(page) < 2_000_000
    assert "Long series are thinned: of each of 1,000 stretches" in page
