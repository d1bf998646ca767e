"""What the planner's formulas are made of can be had where there is nothing but Python."""

from __future__ import annotations

import subprocess
import sys


def test_the_formulas_need_no_pydantic() -> None:
    """The GPU script holds them against what it measures, where only torch is installed; they do not need that either."""
    program = (
        "import sys\n"
        "for name in ('pydantic', 'yaml', 'torch'): sys.modules[name] = None\n"
        "from modelyard.config.architecture import Architecture\n"
        "from modelyard.config.layout import Layout\n"
        "from modelyard.plan import duration, memory, parts\n"
        "from modelyard.plan.workload import Workload\n"
        "work = Workload(Architecture(96, 16, 4, 4, 2, 4, 24), Layout(), 2, 2, 8)\n"
        "print(memory.memory_of(work).peak > 0, sum(part.all_flops for part in parts.parts_of(work)) > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True True\n", done.stderr
