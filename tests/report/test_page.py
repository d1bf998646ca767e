"""The skeleton of every page: nothing from outside, nothing from data that becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import pytest

from modelyard.errors import UserError
from modelyard.report.page import html_page, write_page


def embedded(page: str) -> object:
    """The data of a page, as its script reads it."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_data_comes_back_whatever_text_is_in_it() -> None:
    data = {"text": "</script><script>alert(1)</script><!-- &amp; \u2028 é \ud800", "numbers": [1, 2.5, None]}
    page = html_page("title", "<p>body</p>", data=data)
    assert embedded(page) == data
    # The page's own three script elements, and no comment.
    assert len(re.findall(r"</script", page)) == 3
    assert "<!--" not in page


def test_the_title_is_text() -> None:
    assert "<title>a &lt;b&gt; &amp; c</title>" in html_page("a <b> & c", "")


def test_every_script_and_no_other_is_allowed_to_run() -> None:
    page = html_page("title", "<script>evil()</script>", script="const a = 1;", data=[1])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy[1]
    allowed = set(re.findall(r"'sha256-([^']*)'", policy[1]))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert digests[0] not in allowed  # evil()
    assert set(digests[1:]) == allowed


def test_a_page_names_nothing_outside() -> None:
    page = html_page("title", "body", styles="p { color: red }", script="const a = 1;", data={})
    assert re.findall(r"https?:|//\w+\.|@import|src=|url\(", page) == []


@pytest.mark.parametrize("script", ["'</script>'", "'</SCRIPT'", "'<!--'"])
def test_a_script_that_would_end_its_element_is_refused(script: str) -> None:
    with pytest.raises(ValueError, match="must not hold"):
        html_page("title", "", script=script)


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        html_page("title", "", data=float("nan"))


def test_pages_of_ours_and_empty_files_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    write_page(path, html_page("one", ""))
    write_page(path, html_page("two", ""))
    assert "<title>two</title>" in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]

    empty = tmp_path / "empty.html"
    empty.touch()
    write_page(empty, html_page("three", ""))
    assert "<title>three</title>" in empty.read_text()

    other = tmp_path / "thesis.html"
    other.write_text("<html>my thesis</html>")
    with pytest.raises(UserError, match=r"thesis\.html is there and is no page that modelyard wrote"):
        write_page(other, html_page("four", ""))
    assert other.read_text() == "<html>my thesis</html>"


def test_a_folder_and_a_place_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder: name a file"):
        write_page(tmp_path, html_page("title", ""))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_page(tmp_path / "file" / "page.html", html_page("title", ""))
