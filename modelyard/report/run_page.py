"""The page of one or several runs: what is text and table is written here, the plots by the script on the page."""

from __future__ import annotations

from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml

from modelyard.report import units
from modelyard.report.page import html_page
from modelyard.report.run import PHASES, Run, names
from modelyard.report.series import BUCKETS, PHASE_BARS, all_events, page_data
from modelyard.report.summary import differences, figures, phase_seconds, rows

SAMPLE_COLUMNS = 24
"""Iterations whose samples a page shows; of more, evenly spread ones, first and last among them."""
SAMPLE_LENGTH = 2000
"""Characters of a sample that a page shows."""
EVENTS_LISTED = 500
"""Events of one run that its table lists: the newest."""

SCRIPTS = ("numbers.js", "plots.js", "run.js")
_HERE = Path(__file__).parent


def run_page(runs: list[Run]) -> str:
    """The whole page as HTML."""
    called = names([run.folder for run in runs])
    several = len(runs) > 1
    title = (
        f"Run {called[0]}"
        if not several
        else f"{len(runs)} runs" + (f": {', '.join(called)}" if len(runs) <= 4 else "")
    )
    drawn: list[dict[str, Any]] = [
        {"name": name, "letter": letter(index), **page_data(run)}
        for index, (name, run) in enumerate(zip(called, runs))
    ]
    sections = [
        f"<header><h1>{escape(title)}</h1></header>",
        _remarks(runs, called),
        _summary(runs, called),
        _plots(any(run["thinned"] for run in drawn)),
        _phase_table(runs, called),
        _samples(runs, called),
        _events(runs, called),
        _config(runs, called),
    ]
    return html_page(
        title,
        "\n".join(section for section in sections if section),
        styles=(_HERE / "run.css").read_text(encoding="utf-8"),
        script="\n".join((_HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        data={"runs": drawn, "phases": PHASES},
    )


def letter(index: int) -> str:
    """A, B, … Z, AA, …: how plots and tables name a run."""
    found = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        found = chr(65 + rest) + found
    return found


def _key(index: int, called: list[str]) -> str:
    """A run's name as headings have it: with its letter in the colour of its lines, where there are several."""
    name = escape(called[index])
    if len(called) == 1:
        return name
    return f"{_badge(index)} {name}"


def _badge(index: int) -> str:
    return f'<span class="letter run-{index % 8 + 1}">{letter(index)}</span>'


def _remarks(runs: list[Run], called: list[str]) -> str:
    """What is missing, in one box; what is missing in several runs is said once."""
    said: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        for remark in run.remarks:
            said.setdefault(remark, []).append(index)
    if not said:
        return ""
    lines = "".join(
        f"<li>{' '.join(_badge(index) for index in where) + ' ' if len(runs) > 1 else ''}{escape(remark)}</li>"
        for remark, where in said.items()
    )
    return f'<ul class="notice remarks" aria-label="What is missing">{lines}</ul>'


def _summary(runs: list[Run], called: list[str]) -> str:
    table = rows([figures(run) for run in runs])
    if len(runs) == 1:
        # One run has no columns to compare: figures side by side take less room and read faster.
        cells = "".join(
            f"<div><dt>{escape(label)}</dt><dd>{escape(values[0])}</dd></div>" for label, values in table
        )
        return f'<section aria-label="Summary"><dl class="figures panel" id="summary">{cells}</dl></section>'
    head = "".join(f'<th scope="col">{_key(index, called)}</th>' for index in range(len(runs)))
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(value)}</td>" for value in values)
        + "</tr>"
        for label, values in table
    )
    return (
        '<section aria-label="Summary"><div class="panel scroll"><table id="summary"><thead><tr><td></td>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _plots(thinned: bool) -> str:
    note = (
        f"<p class='muted'>Long series are thinned: of each of {BUCKETS:,} stretches a plot keeps the lowest and the highest "
        "value, and the first that is not finite, so every spike is there; nothing is averaged, but for the smoothed "
        f"lines, which start from the stretches' means. Time per phase is summed to at most {PHASE_BARS} bars.</p>"
        if thinned
        else ""
    )
    return f"""\
<section aria-labelledby="plots-title">
<h2 id="plots-title">Plots</h2>
<div id="toolbar" class="toolbar" role="group" aria-label="All plots"></div>
<div id="plots" class="plots"></div>
<p class="muted" id="plot-help">Drag across a plot to zoom all of them, double-click to see everything again. With the
keyboard: focus a plot, <kbd>←</kbd> <kbd>→</kbd> move the line (with <kbd>Shift</kbd> ten points), <kbd>Home</kbd>
<kbd>End</kbd>, <kbd>+</kbd> <kbd>−</kbd> zoom around it, <kbd>Esc</kbd> shows everything.</p>
{note}
<div id="spoken" class="unseen" aria-live="polite"></div>
</section>"""


def _phase_table(runs: list[Run], called: list[str]) -> str:
    totals = [phase_seconds(run) for run in runs]
    if not any(totals):
        return ""
    head = "".join(
        f'<th scope="col" colspan="2" class="number">{_key(index, called) if len(runs) > 1 else "Total and share"}</th>'
        for index in range(len(runs))
    )
    lines = []
    for phase in (*PHASES, "all"):
        cells = []
        for total in totals:
            whole = sum(total.values()) if total else 0.0
            seconds = None if not total else whole if phase == "all" else total[phase]
            cells.append(
                f'<td class="number">{units.duration(seconds)}</td>'
                f'<td class="number">{units.share(seconds / whole if seconds is not None and whole else None)}</td>'
            )
        label = {"data": "getting batches"}.get(phase, phase)
        lines.append(f'<tr><th scope="row">{label}</th>{"".join(cells)}</tr>')
    return f"""\
<section aria-labelledby="phases-title">
<h2 id="phases-title">Time per phase, the whole run</h2>
<div class="panel scroll"><table id="phases"><thead><tr><td></td>{head}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></div>
<p class="muted below">Wall-clock time of all sessions, pauses left out. A session that was killed wrote nothing after its last
record: that time is missing, and of steps that were taken twice only the second is here. Forward includes the gradients that
the fused cross-entropy makes on the way.</p>
</section>"""


# Samples


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `range(count)`, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)})


def _samples(runs: list[Run], called: list[str]) -> str:
    """One strip a prompt: a column an iteration, a row a run."""
    # Texts by (evaluator, how-manieth prompt, prompt), run and iteration.
    strips: dict[tuple[str, int, str], dict[int, dict[int, str]]] = {}
    for index, run in enumerate(runs):
        for record in run.samples:
            for number, (prompt, text) in enumerate(record.texts):
                strip = strips.setdefault((record.evaluator, number, prompt), {})
                strip.setdefault(index, {})[record.iteration] = text
    if not strips:
        return ""
    parts, left_out = [], False
    for (evaluator, _, prompt), by_run in strips.items():
        iterations = sorted({iteration for texts in by_run.values() for iteration in texts})
        chosen = [iterations[at] for at in spread(len(iterations), SAMPLE_COLUMNS)]
        left_out |= len(chosen) < len(iterations)
        chosen.reverse()
        head = "".join(f'<th scope="col">iteration {iteration:,}</th>' for iteration in chosen)
        lines = "".join(
            "<tr>"
            + (f'<th scope="row">{_key(index, called)}</th>' if len(runs) > 1 else "")
            + "".join(_sample(texts.get(iteration)) for iteration in chosen)
            + "</tr>"
            for index, texts in sorted(by_run.items())
        )
        corner = '<td class="corner"></td>' if len(runs) > 1 else ""
        parts.append(
            f'<div class="panel strip"><h3>{escape(evaluator)}: <code class="prompt">{_visible(prompt)}</code></h3>'
            f'<div class="scroll" tabindex="0" role="group" aria-label="Samples over time">'
            f'<table class="samples"><thead><tr>{corner}{head}</tr></thead><tbody>{lines}</tbody></table></div></div>'
        )
    note = f", {SAMPLE_COLUMNS} of them evenly spread" if left_out else ""
    return (
        f'<section aria-labelledby="samples-title"><h2 id="samples-title">Samples</h2>'
        f'<p class="muted">What the model wrote, newest on the left{note}.</p>{"".join(parts)}</section>'
    )


def _visible(text: str) -> str:
    """A prompt on one line; an empty one is named."""
    return escape(text).replace("\n", "⏎ ") if text.strip() else "an empty prompt"


def _sample(text: str | None) -> str:
    if text is None:
        return '<td class="muted">–</td>'
    shown = escape(text[:SAMPLE_LENGTH])
    if len(text) > SAMPLE_LENGTH:
        shown += f'<span class="muted"> … {len(text) - SAMPLE_LENGTH:,} more characters</span>'
    return f"<td><pre>{shown or '<span class=muted>nothing</span>'}</pre></td>"


# Events and configurations


def _events(runs: list[Run], called: list[str]) -> str:
    parts = []
    for index, run in enumerate(runs):
        events = all_events(run)
        if not events:
            continue
        counts: dict[str, int] = {}
        for event in events:
            counts[event.kind] = counts.get(event.kind, 0) + 1
        shown = events[-EVENTS_LISTED:]
        lines = "".join(
            f'<tr class="event-{escape(event.kind)}"><td class="number">{event.iteration:,}</td><td>{_clock(event.time)}</td>'
            f"<td>{escape(event.kind.replace('_', ' '))}</td><td>{escape(event.text)}</td></tr>"
            for event in reversed(shown)
        )
        summary = ", ".join(f"{count:,} {escape(kind.replace('_', ' '))}" for kind, count in counts.items())
        older = (
            f'<p class="muted">The newest {len(shown):,} of {len(events):,}.</p>'
            if len(shown) < len(events)
            else ""
        )
        parts.append(
            f'<details class="panel"{" open" if len(runs) == 1 else ""}><summary>{_key(index, called)}: {summary}</summary>{older}'
            '<div class="scroll tall" tabindex="0" role="group" aria-label="Events"><table class="events"><thead><tr>'
            '<th class="number" scope="col">Iteration</th><th scope="col">Time (UTC)</th><th scope="col">Event</th>'
            f'<th scope="col">What happened</th></tr></thead><tbody>{lines}</tbody></table></div></details>'
        )
    if not parts:
        return ""
    return (
        f'<section aria-labelledby="events-title"><h2 id="events-title">Events</h2>{"".join(parts)}</section>'
    )


def _clock(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, OSError, ValueError):
        return units.UNKNOWN


def _config(runs: list[Run], called: list[str]) -> str:
    if all(run.config is None for run in runs):
        return ""
    parts = []
    if len(runs) > 1:
        found = differences([run.config for run in runs])
        head = "".join(f'<th scope="col">{_key(index, called)}</th>' for index in range(len(runs)))
        lines = "".join(
            f'<tr><th scope="row"><code>{escape(key)}</code></th>'
            + "".join(
                f"<td>{'<span class=muted>not set</span>' if value is None else f'<code>{escape(value)}</code>'}</td>"
                for value in values
            )
            + "</tr>"
            for key, values in found
        )
        parts.append(
            '<h3>Where they differ</h3><div class="panel scroll"><table id="differences"><thead><tr><th scope="col">Key</th>'
            f"{head}</tr></thead><tbody>{lines}</tbody></table></div>"
            if found
            else "<p>The configurations are equal.</p>"
        )
    for index, run in enumerate(runs):
        if run.config is None:
            continue
        about = " · ".join(_facts(run.facts))
        parts.append(
            f'<details class="panel"><summary>{_key(index, called)}: whole configuration'
            f'<span class="muted"> {escape(about)}</span></summary>'
            f"<pre>{escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))}</pre></details>"
        )
    return f'<section aria-labelledby="config-title"><h2 id="config-title">Configuration</h2>{"".join(parts)}</section>'


def _facts(facts: dict[str, Any]) -> list[str]:
    found = [
        (f"Modelyard {facts['modelyard_version']}" if facts.get("modelyard_version") else ""),
        (f"torch {facts['torch_version']}" if facts.get("torch_version") else ""),
        (f"on {facts['device']}" if facts.get("device") else ""),
    ]
    return [text for text in found if text]
