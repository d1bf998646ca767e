"""`modelyard report`: the page of one or several runs."""

from __future__ import annotations

from pathlib import Path

from modelyard.report.page import write_page
from modelyard.report.run import read_run
from modelyard.report.run_page import run_page


def report(folders: list[Path], output: Path | None) -> int:
    """Write the page of the runs in `folders`; returns the exit status.

    Without `output` it is `report.html`, in the run's folder for one run and in the working directory for several.
    Raises UserError where a folder is no run, or the file to write is something else.
    """
    once = list({folder.resolve(): folder for folder in folders}.values())
    runs = [read_run(folder) for folder in once]
    if output is None:
        output = once[0] / "report.html" if len(once) == 1 else Path("report.html")
    page = run_page(runs)
    write_page(output, page)
    records = sum(len(run.training["iteration"]) for run in runs)
    what = f"{len(runs)} runs, " if len(runs) > 1 else ""
    print(
        f"wrote {output} ({what}{records:,} training records, {len(page.encode(errors='replace')) / 1e6:.1f} MB)"
    )
    for run in runs:
        for remark in run.remarks:
            print(f"note: {f'{run.folder}: ' if len(runs) > 1 else ''}{remark}")
    return 0
