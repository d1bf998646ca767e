"""Python for models: what is told of it without running it, and what a run may not do."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from modelyard.errors import UserError
from modelyard.generate import sandbox
from modelyard.generate.sandbox import read_functions, run_code, run_function

TOOLS = '''\
"""Nothing of this file runs when it is read."""
import math
from typing import Literal

open("ran", "w").close()

def area(radius: float, unit: Literal["m", "km"] = "m", *, digits: int | None = None) -> float:
    """The area of a circle.

    Exactly.
    """
    print("noise")
    return round(math.pi * radius**2, digits)

def total(values: list[int], names: dict[str, int], flag: bool, word: str, anything):
    return sum(values)

def broken(): return object()

def _hidden(): pass

class Other:
    def method(self): pass
'''


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.py").write_text(TOOLS)
    return tmp_path / "tools.py"


def test_functions_become_definitions_without_being_run(tools: Path) -> None:
    functions = read_functions(tools)
    assert functions.names == ["area", "total", "broken"]
    assert functions.tools[0] == {
        "type": "function",
        "function": {
            "name": "area",
            "description": "The area of a circle.\n\nExactly.",
            "parameters": {
                "type": "object",
                "properties": {
                    "radius": {"type": "number"},
                    "unit": {"enum": ["m", "km"]},
                    "digits": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                },
                "required": ["radius"],
            },
        },
    }
    assert functions.tools[1]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "values": {"type": "array", "items": {"type": "integer"}}, "names": {"type": "object"},
            "flag": {"type": "boolean"}, "word": {"type": "string"}, "anything": {},
        },
        "required": ["values", "names", "flag", "word", "anything"],
    }  # fmt: skip
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def f(:", r"tools\.py is no Python \(.*line 1\)"),
        ("x = 1", "has no function at its top level whose name begins with no underscore"),
        ("def f(*args): pass", r"line 1: f has parameters without a name"),
    ],
)
def test_files_that_are_no_tools(tools: Path, text: str, problem: str) -> None:
    tools.write_text(text)
    with pytest.raises(UserError, match=problem):
        read_functions(tools)
    with pytest.raises(UserError, match=r"--tools: .*tool\.py does not exist .*nearest there: .*tools\.py"):
        read_functions(tools.with_name("tool.py"))


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("area", {"radius": 2, "digits": 3}, 12.566),
        ("total", {"values": [1, 2], "names": {}, "flag": True, "word": "ü", "anything": None}, 3),
        ("area", {}, {"error": "TypeError: area() missing 1 required positional argument: 'radius'"}),
        ("broken", {}, {"error": "TypeError: Object of type object is not JSON serializable"}),
    ],
)
def test_a_call_is_what_the_function_returns(
    tools: Path, name: str, arguments: dict[str, Any], result: Any
) -> None:
    assert run_function(read_functions(tools), name, arguments) == result
    assert not Path("ran").exists()  # a folder of its own, which is gone


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("x = 2\nprint('ü😀')\nx + 1", "ü😀\n3\n"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("x = ' ' * 10**10", "MemoryError"),
        ("open('f', 'w').write('x' * 2**22)", "OSError: [Errno 27] File too large"),
        ("import modelyard", "ModuleNotFoundError: No module named 'modelyard'"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("import os; print(os.listdir(), 'SECRET' in os.environ, os.getcwd() == '/')", "[] False False\n"),
        ("import os; os.write(1, b'[1]')\nNone", ""),
        ("import resource as r; r.setrlimit(r.RLIMIT_AS, (2**40, 2**40))", "ValueError: not allowed to raise maximum limit"),
        ("import os; os._exit(0)", "no answer came: it left by itself, or used too much memory or processor time"),
    ],
)  # fmt: skip
def test_code(monkeypatch: pytest.MonkeyPatch, code: str, output: str) -> None:
    monkeypatch.setenv("SECRET", "x")
    if "setrlimit" in code and sandbox._without_network()[1:2] != ("-r",):
        pytest.skip("root may raise its limits where there are no user namespaces")
    assert run_code(code) == output


def test_what_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    assert run_code("import time; time.sleep(1000)") == "it was ended after 0.5 s"
    monkeypatch.setattr(sandbox, "SECONDS", 60.0)
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    assert run_code("while True: pass") == "TimeoutError: no more processor time"


def test_the_network_is_cut_off_or_that_it_is_not_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import socket; s = socket.socket(); s.settimeout(5); s.connect(('127.0.0.1', 9))"
    if sandbox._without_network():
        assert "no network." in sandbox.protection()
        assert run_code(code).endswith("Network is unreachable")
    monkeypatch.setattr(sandbox, "_without_network", lambda: ())
    assert "THE NETWORK IS NOT CUT OFF" in sandbox.protection()
    assert run_code(code).endswith("Connection refused")
    assert run_code("1 + 1") == "2\n"


def test_nothing_of_it_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a process that left its session."""
    if "-p" not in sandbox._without_network() and os.geteuid() == 0:
        pytest.skip("root may start processes where there are no namespaces for them")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    child = (
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True)"
    )
    run_code(f"import subprocess, sys, time\n{child}\ntime.sleep(1000)")
    deadline = time.monotonic() + 5  # they are killed by then, and gone a moment later
    while (left := processes_in(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []
    assert list(tmp_path.iterdir()) == []


def processes_in(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found += [process.name] if str(folder) in os.readlink(process / "cwd") else []
    return found
