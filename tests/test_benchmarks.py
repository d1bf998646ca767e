"""The GPU script works where there is torch and nothing else: rehearsed on the CPU at toy sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_gpu_script_needs_torch_alone() -> None:
    program = (
        "import runpy, sys\n"
        "for name in ('pydantic', 'transformers', 'datasets', 'yaml', 'safetensors', 'tokenizers', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['gpu.py', '--cpu']\n"
        "runpy.run_path('benchmarks/gpu.py', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "8 passed, 0 failed"
