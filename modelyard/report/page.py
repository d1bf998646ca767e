"""The skeleton that every HTML page of this program has: one file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from contextlib import suppress
from pathlib import Path

from modelyard import __version__
from modelyard.errors import UserError
from modelyard.files import disk_full_error

GENERATOR = '<meta name="generator" content="modelyard'
"""By this the program knows its own pages; it stands in their first lines."""

# First of the scripts, so that it hears of whatever goes wrong in the others.
_LISTEN = """\
window.addEventListener("error", (event) => {
  const place = document.getElementById("page-error");
  place.hidden = false;
  place.textContent += `This page could not be drawn: ${event.message} (line ${event.lineno})\\n`;
});
"""
_READY = '\ndocument.documentElement.dataset.ready = "1";\n'


def html_page(
    title: str, body: str, *, styles: str = "", script: str = "", data: object | None = None
) -> str:
    """A whole HTML page, light or dark as the reader's system has it.

    `title` is plain text. `body` is HTML: whatever in it comes from data must have gone through `html.escape`. `styles`
    follow the shared ones of page.css, which has the colours as custom properties (`var(--ink)`, `var(--series-1)`…)
    and the classes `panel`, `scroll` (around a wide table), `number`, `muted`, `notice`, `bad`, `badge`.

    `data` is anything that `json` writes; the script reads it as
    `JSON.parse(document.getElementById("data").textContent)`. Whatever text is in it, it cannot end its element or
    become markup. Raises ValueError for NaN and infinities, which are no JSON, and for a script that holds `</script`.

    After the script `document.documentElement.dataset.ready` is "1"; an error in it shows at the top of the page.
    A content security policy forbids every request and every script but these (they are named by their sha256), so
    that a mistake in escaping shows as odd text and runs nothing.
    """
    scripts = [_LISTEN, script + _READY]
    for text in scripts:
        if "</script" in text.lower() or "<!--" in text:
            raise ValueError("a script must not hold '</script' or '<!--'")
    policy = "; ".join(
        (
            "default-src 'none'",
            "script-src " + " ".join(map(_digest, scripts)),
            "style-src 'unsafe-inline'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    shared = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    embedded = (
        "" if data is None else f'<script type="application/json" id="data">{embedded_json(data)}</script>\n'
    )
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{GENERATOR} {html.escape(__version__)}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
{shared}
{styles}
</style>
</head>
<body>
<div id="page-error" role="alert" hidden></div>
<main>
{body}
</main>
<footer>Written by Modelyard {html.escape(__version__)}. This page is one file and loads nothing from anywhere.</footer>
<noscript><p class="notice">What is interactive on this page needs JavaScript.</p></noscript>
{embedded}<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


def embedded_json(data: object) -> str:
    """`data` as JSON that can stand in a script element: no `<`, so that nothing in it ends the element."""
    # ASCII throughout: a lone surrogate (half a character, which a model can write) has no UTF-8.
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(path: Path, page: str, *, option: str = "--output") -> None:
    """Write `page` to `path`, complete or not at all. Replaces an earlier page of this program, or an empty file.

    Raises UserError where `path` is something else, or cannot be written; `option` is how the user named it.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder: name a file for the page, such as {option} {path / 'page.html'}"
        )
    if path.exists() and not _is_ours(path):
        raise UserError(
            f"{path} is there and is no page that modelyard wrote: name another file with {option}"
        )
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        reason = UserError(
            f"{path} cannot be written: {error.strerror or error} ({option} names another file)"
        )
        raise (disk_full_error(error, path) or reason) from error


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            begin = file.read(1024)
        return not begin or GENERATOR.encode() in begin
    except OSError:
        return False


def _digest(script: str) -> str:
    """How a content security policy names an inline script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
