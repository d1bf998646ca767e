"""Turn a public set of tool calls into JSON lines of OpenAI messages with tools, and say what came out.

    python examples/tools/convert.py seal_tools.jsonl.gz calls.jsonl
    python examples/tools/convert.py nestful.jsonl.gz calls.jsonl --definitions nestful_spec.json.gz --nested expression
    python examples/tools/convert.py glaive.jsonl calls.jsonl --valid-only --questions instructions.jsonl

`modelyard prepare` reads the sets as they come (docs/tool-data.md); this is for looking at what it reads, for
leaving out calls that do not fit their definitions, and for mixing in questions that need no tool (--questions).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from modelyard.chat.conversation import as_record
from modelyard.chat.formats import FORMATS, Reading
from modelyard.chat.tool_data.convert import KINDS, Counts, distinct_tools, read_file, with_tools
from modelyard.errors import UserError
from modelyard.files import replace_text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="JSON lines or a JSON list; plain, .gz or .zst")
    parser.add_argument("output", type=Path, help="JSON lines to write")
    parser.add_argument(
        "--format", choices=FORMATS, help="how the records are (default: told by their columns)"
    )
    parser.add_argument("--definitions", type=Path, help="definitions of tools in a file of their own")
    parser.add_argument(
        "--nested", choices=("turns", "expression"), default="turns", help="calls inside calls"
    )
    parser.add_argument("--text-beside-calls", choices=("keep", "drop"), default="keep")
    parser.add_argument(
        "--valid-only", action="store_true", help="leave out what has a call that does not fit"
    )
    parser.add_argument(
        "--questions", type=Path, help="answered questions, to which tools of the set are given"
    )
    options = parser.parse_args()

    reading = Reading(options.nested, options.definitions, options.text_beside_calls)
    counts = Counts()
    try:
        found = list(
            read_file(options.source, options.format, reading, counts, valid_only=options.valid_only)
        )
        of_the_set = len(found)
        if options.questions:
            questions = itertools.islice(
                read_file(options.questions), of_the_set
            )  # no more of them than of the set
            found += with_tools(questions, distinct_tools(found))
        if found:
            lines = (json.dumps(as_record(one), ensure_ascii=False) for one in found)
            replace_text(options.output, "".join(line + "\n" for line in lines))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    show(counts)
    if not found:
        print(f"{options.source} has no conversation of use; nothing is written", file=sys.stderr)
        return 2
    more = (
        f", {len(found) - of_the_set} of them questions answered without tools" if options.questions else ""
    )
    print(f"{options.output}: {len(found)} conversations{more}")
    return 0


def show(counts: Counts) -> None:
    """What became of the file, as a table."""
    rows: list[tuple[str, object]] = [("records", counts.records), ("conversations", counts.conversations)]
    rows += [(f"  {kind}", counts.kinds[kind]) for kind in KINDS if counts.kinds[kind]]
    rows += [("refused", counts.refused.total()), ("calls", counts.calls)]
    if checked := counts.calls - counts.unchecked:
        rows += [("  that fit their definitions", f"{counts.valid / checked:.2%}")]
        rows += [(f"  {reason}", number) for reason, number in counts.problems.most_common()]
    elif counts.calls:
        rows += [("  that fit their definitions", "unknown: the set has none")]
    if counts.left_out:
        rows += [("left out for a call", counts.left_out)]
    for name, value in rows:
        print(f"{name:<30}{value!s:>10}")
    for reason, number in counts.refused.most_common():
        print(f"refused {number:>5}  {reason}")


if __name__ == "__main__":
    sys.exit(main())
