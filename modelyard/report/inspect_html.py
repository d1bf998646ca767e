"""An inspection as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from modelyard.report.inspect_blocks import (
    Block,
    Cell,
    Facts,
    Heading,
    Histogram,
    Inspection,
    Note,
    Table,
    Tokens,
    clean,
)
from modelyard.report.inspect_kinds import is_assistants, kind_name, role_name
from modelyard.report.page import html_page

_STYLES = """
h1 { margin-bottom: 12px; }
main > h3 { margin: 22px 0 8px; }
.notice.bad { background: var(--bad-ground); border-color: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: center; margin: 0 -4px 12px; padding: 6px 4px;
  position: sticky; top: 0; background: var(--ground); }
.facts { display: grid; grid-template-columns: fit-content(45%) minmax(0, 1fr); gap: 3px 18px; margin: 0; }
.facts dt { color: var(--muted); overflow-wrap: anywhere; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.bars { display: grid; grid-template-columns: max-content minmax(60px, 1fr) max-content; gap: 2px 10px; align-items: center;
  font-variant-numeric: tabular-nums; font-size: 13px; max-width: 720px; }
.bars .label { text-align: right; color: var(--muted); }
.bars i { display: block; height: 13px; background: var(--series-1); border-radius: 2px; min-width: 1px; }
.bars i.over { background: var(--series-2); }
.block, .doc { margin: 0 0 12px; }
.doc h3 { color: var(--muted); font-weight: 550; overflow-wrap: anywhere; }
.text { font: 13px/1.75 var(--code-font); white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.text b, .legend b { font-weight: 400; border-radius: 2px; padding: 1px 0; }
b.t { background: color-mix(in srgb, var(--series-3) 17%, transparent); }
b.t.o { background: color-mix(in srgb, var(--series-3) 34%, transparent); }
b.m { color: var(--muted); background: color-mix(in srgb, var(--series-8) 9%, transparent); }
b.m.o { background: color-mix(in srgb, var(--series-8) 19%, transparent); }
b.p { color: var(--muted); background: repeating-linear-gradient(45deg, transparent 0 5px, var(--grid) 5px 8px); }
b.r { color: var(--muted); font-style: italic; }
b.s { font-weight: 650; color: var(--series-4); outline: 1px solid color-mix(in srgb, var(--series-4) 45%, transparent);
  outline-offset: -1px; }
b.s.m { opacity: .75; }
b.k { --of: var(--series-8); background: color-mix(in srgb, var(--of) 12%, transparent); }
b.k.o { background: color-mix(in srgb, var(--of) 24%, transparent); }
b.k.y { background: color-mix(in srgb, var(--of) 26%, transparent); box-shadow: inset 0 -2px var(--of); }
b.k.y.o { background: color-mix(in srgb, var(--of) 42%, transparent); }
b.k0, b.k1, b.k6 { color: var(--muted); }
b.k2 { --of: var(--series-1); }
b.k2.a { --of: var(--series-3); }
b.k3 { --of: var(--series-4); font-style: italic; }
b.k4 { --of: var(--series-5); font-style: italic; }
b.k5 { --of: var(--series-2); }
b.k.s { color: var(--muted); outline: none; font-weight: 650; }
b.k3.s, b.k5.s { color: var(--of); }
#what { flex-basis: 100%; font: 13px/1.4 var(--code-font); color: var(--muted); min-height: 1.4em; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  .legend:has(#what) { position: static; }
  #what.on { position: fixed; z-index: 1; bottom: 0; left: 0; right: 0; padding: 8px 16px; color: var(--ink);
    background: var(--surface); border-top: 1px solid var(--line); }
}
.ids b[data-i]::after { content: attr(data-i); font-size: 9px; vertical-align: sub; color: var(--muted); padding: 0 2px; }
"""

_SCRIPT = """
document.getElementById("ids")?.addEventListener("click", (event) => {
  const on = document.body.classList.toggle("ids");
  event.currentTarget.setAttribute("aria-pressed", on);
});
// The same as the pointer's hint, where there is no pointer.
document.querySelector("main").addEventListener("click", (event) => {
  const place = document.getElementById("what");
  if (place && event.target.matches(".text b[title]")) {
    place.textContent = `${event.target.textContent} · ${event.target.title}`;
    place.className = "on";
  }
});
"""

_LEGEND = """\
<div class="legend"><span><b class="t">trained</b><b class="t o"> token</b></span>
<span><b class="m">not a</b><b class="m o"> target</b></span><span><b class="t s">special</b></span>
%s"""
_LEGEND_OF_KINDS = """\
<div class="legend"><span><b class="k k1 o">begin, header</b></span>
<span><b class="k k2">user</b><b class="k k2 o"> and system</b></span><span><b class="k k2 a o">assistant</b></span>
<span><b class="k k3">tool</b><b class="k k3 o"> call</b></span><span><b class="k k4">tool</b><b class="k k4 o"> result</b></span>
<span><b class="k k5 o s">terminator</b></span><span><b class="k k6 o">separator</b></span>
<span><b class="k k2 a y">underlined:</b><b class="k k2 a y o"> trained on</b></span>
%s"""
_LEGEND_END = """\
<span class="muted">· space &nbsp; ⇥ tab &nbsp; ⏎ line break</span>
<button id="ids" type="button" aria-pressed="false">Token ids</button>%s</div>"""
_READOUT = '<span id="what" aria-live="polite">Point at a token, or tap it: what it is, who says it, its number.</span>'

_LETTERS = {"trained": "t", "masked": "m", "padding": "p", "remark": "r"}


def page_of(inspection: Inspection) -> str:
    """The whole page; everything that comes from data is escaped."""
    parts = [f"<h1>{_text(inspection.title)}</h1>"]
    for line in inspection.faults:
        parts.append(f'<p class="notice bad"><strong>Fault:</strong> {_text(line)}</p>')
    for line in inspection.warnings:
        parts.append(f'<p class="notice"><strong>Warning:</strong> {_text(line)}</p>')
    if not inspection.faults and not inspection.warnings:
        parts.append('<p class="muted">Nothing wrong was found.</p>')
    legend_at = _section_of_tokens(inspection.blocks)
    for number, block in enumerate(inspection.blocks):
        parts.append(_block(block))
        if number == legend_at:
            parts.append(_legend(inspection.blocks))
    return html_page(clean(inspection.title), "\n".join(parts), styles=_STYLES, script=_SCRIPT)


def _legend(blocks: Sequence[Block]) -> str:
    """What the tokens look like: those of conversations, the others, or both."""
    cells = [cell for block in blocks if isinstance(block, Tokens) for cell in block.cells]
    of_kinds = any(cell.said is not None for cell in cells)
    if not of_kinds:
        return _LEGEND % (_LEGEND_END % "")
    others = any(cell.said is None and cell.kind in ("trained", "masked") for cell in cells)
    first = f"{_LEGEND % ''}</div>" if others else ""
    return first + _LEGEND_OF_KINDS % (_LEGEND_END % _READOUT)


def _section_of_tokens(blocks: Sequence[Block]) -> int | None:
    """Where the section begins that has the first tokens."""
    first = next((number for number, block in enumerate(blocks) if isinstance(block, Tokens)), 0)
    headings = [n for n, block in enumerate(blocks[:first]) if isinstance(block, Heading) and not block.part]
    return headings[-1] if headings else None


def _text(text: str) -> str:
    return escape(clean(text))


def _block(block: Block) -> str:
    match block:
        case Heading():
            tag = "h3" if block.part else "h2"
            return f"<{tag}>{_text(block.text)}</{tag}>"
        case Note():
            return f'<p class="muted">{_text(block.text)}</p>'
        case Facts():
            rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in block.rows)
            return f'<dl class="facts panel block">{rows}</dl>'
        case Table():
            return _table(block)
        case Histogram():
            return _histogram(block)
        case Tokens():
            text = "".join(_cell(cell, number % 2 == 1) for number, cell in enumerate(block.cells))
            return f'<div class="doc panel"><h3>{_text(block.title)}</h3><div class="text">{text}</div></div>'


def _table(block: Table) -> str:
    def cell(tag: str, number: int, text: str) -> str:
        kind = "" if number in block.words else ' class="number"'
        return f"<{tag}{kind}>{_text(text)}</{tag}>"

    head = "".join(cell("th", number, name) for number, name in enumerate(block.columns))
    rows = "".join(
        f"<tr>{''.join(cell('td', number, text) for number, text in enumerate(row))}</tr>"
        for row in block.rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="panel block"><div class="scroll">{table}</div></div>'


def _histogram(block: Histogram) -> str:
    most = max((count for _, count, _ in block.bars), default=0)
    bars = []
    for label, count, marked in block.bars:
        width = f"{100 * count / max(most, 1):.2f}%" if count else "0;min-width:0"
        kind = ' class="over"' if marked else ""
        bars.append(
            f'<span class="label">{_text(label)}</span><i{kind} style="width:{width}"></i><span>{count:,}</span>'
        )
    remark = (
        f'<p class="muted">Orange: {_text(block.remark)}.</p>'
        if any(marked and count for _, count, marked in block.bars)
        else ""
    )
    title = f"<h3>{_text(block.title)}</h3>"
    return f'<div class="panel block">{title}<div class="bars">{"".join(bars)}</div>{remark}</div>'


def _cell(cell: Cell, odd: bool) -> str:
    ids = "+".join(map(str, cell.ids))
    title = ids
    if cell.said is None:
        kind = _LETTERS[cell.kind]
    else:
        trained = cell.kind == "trained"
        kind = f"k k{cell.said & 7}" + (" a" if is_assistants(cell.said) else "") + (" y" if trained else "")
        what = [kind_name(cell.said), role_name(cell.said), "trained on" if trained else "no target", ids]
        title = " · ".join(filter(None, what))
    kind += (" o" if odd else "") + (" s" if cell.special else "")
    number = f' data-i="{ids}" title="{title}"' if ids else ""
    # The line break stands behind the element, so that an id stays on its token's line.
    shown = cell.text.rstrip("\n")
    return f'<b class="{kind}"{number}>{escape(shown)}</b>{cell.text[len(shown) :]}'
