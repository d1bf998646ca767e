"""Python that a model wants to run, in a process of its own.

What it is: another interpreter without our packages, environment or folder, with limits on processor time, memory, file
size, open files and further processes, ended after some seconds, without a network where the system lets us take it away.
It keeps mistakes from doing harm: a loop that never ends, a list that grows for ever, a full disk, a file written by accident
into the working directory. It is no wall: the code runs as the user who started the program and can read, and in small
files write, whatever that user can. For code that may be hostile use a container or a virtual machine around all of it.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from modelyard.errors import UserError, missing_path

SECONDS = 10.0
"""How long a call may take, in seconds on the clock."""
CPU_SECONDS = 5
"""Of processor time, in seconds."""
MEMORY = 512 * 2**20
"""Address space, in bytes."""
FILE_BYTES = 2**20
"""Of any file that it writes, its output included, in bytes."""
_SHOWN = 10_000
"""Characters of output that are handed on."""

# Reads {"source", "function", "arguments"} or {"code"}, writes what came of it as the last thing it does. The limits are set
# here, before anything of the model's runs, and not between fork and exec, where threads of ours could hold locks.
_RUNNER = """
import ast, contextlib, io, json, os, resource, signal, sys, traceback
def late(*_):
    raise TimeoutError("no more processor time")
asked = json.load(sys.stdin)
answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what it writes past sys.stdout is no answer
signal.signal(signal.SIGXCPU, late)
for name, (soft, hard) in asked["limits"].items():
    resource.setrlimit(getattr(resource, name), (soft, hard))
said, space = io.StringIO(), {"__name__": "__sandbox__"}
found = {}
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    try:
        if "code" in asked:
            tree = ast.parse(asked["code"])
            last = [tree.body.pop()] if tree.body and isinstance(tree.body[-1], ast.Expr) else []
            exec(compile(tree, "code", "exec"), space)
            for node in last:  # its value is shown, as at a prompt
                sys.displayhook(eval(compile(ast.Expression(node.value), "code", "eval"), space))
        else:
            exec(compile(asked["source"], "tools", "exec"), space)
            found["result"] = json.loads(json.dumps(space[asked["function"]](**asked["arguments"])))
    except BaseException as error:
        found["error"] = traceback.format_exception_only(type(error), error)[-1].strip()
found["output"] = said.getvalue()[-100_000:]
json.dump(found, answer)
answer.flush()
os._exit(0)
"""


@dataclass(frozen=True)
class Functions:
    """A Python file whose functions a model may call."""

    path: Path
    source: str
    tools: tuple[dict[str, Any], ...]
    """Their definitions, as OpenAI's interface has them."""

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.tools]


def read_functions(path: Path) -> Functions:
    """The public functions of a Python file as definitions of tools. The file is read, never run, for that.

    Raises UserError where it is no Python, or has no function.
    """
    if not path.is_file():
        raise UserError(f"--tools: {missing_path(path)}")
    try:
        source = path.read_text(encoding="utf-8")
        functions = [
            node
            for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        ]
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"--tools: {path} is no Python ({error})") from None
    if not functions:
        raise UserError(
            f"--tools: {path} has no function at its top level whose name begins with no underscore"
        )
    return Functions(path, source, tuple(_definition(path, node) for node in functions))


def _definition(path: Path, node: ast.FunctionDef) -> dict[str, Any]:
    given = node.args
    if given.posonlyargs or given.vararg or given.kwarg:
        raise UserError(
            f"--tools: {path}, line {node.lineno}: {node.name} has parameters without a name (/, *args, **kwargs)"
        )
    required = [argument.arg for argument in given.args[: len(given.args) - len(given.defaults)]]
    required += [
        argument.arg for argument, default in zip(given.kwonlyargs, given.kw_defaults) if default is None
    ]
    properties = {argument.arg: _schema(argument.annotation) for argument in (*given.args, *given.kwonlyargs)}
    return {
        "type": "function",
        "function": {
            "name": node.name,
            "description": ast.get_docstring(node) or "",
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
}


def _schema(annotation: ast.expr | None) -> dict[str, Any]:
    """The JSON schema of an annotation, as far as it says one: plain types, `list[…]`, `dict[…]`, `Literal[…]`, `… | None`."""
    match annotation:
        case ast.Name(id=name) if name in _TYPES:
            return {"type": _TYPES[name]}
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            items = _schema(inner)
            return {"type": "array", **({"items": items} if items else {})}
        case ast.Subscript(value=ast.Name(id="dict")):
            return {"type": "object"}
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            values = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return {"enum": [value.value for value in values if isinstance(value, ast.Constant)]}
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return {"anyOf": [_schema(left), _schema(right)]}
        case ast.Constant(value=None):
            return {"type": "null"}
    return {}


@cache
def _without_network() -> tuple[str, ...]:
    """The words before a command that take its network away; none where this system does not let us."""
    program = shutil.which("unshare")
    # Best with a user namespace, in which not even root may lift the limits, and one of processes, of which none outlives
    # the first.
    for words in ("-r -n -p -f --kill-child", "-r -n", "-n") if program else ():
        command = [str(program), *words.split()]
        done = subprocess.run(
            [*command, sys.executable, "-I", "-S", "-c", ""], env={}, capture_output=True, check=False
        )
        if done.returncode == 0:
            return tuple(command)
    return ()


def protection() -> str:
    """For the user: what the sandbox keeps from harm and what it does not, in a sentence or two."""
    network = "no network" if _without_network() else "THE NETWORK IS NOT CUT OFF (no `unshare -n` here)"
    return (
        f"calls run as Python in a process of their own: at most {SECONDS:g} s, {MEMORY // 2**20} MiB, files of "
        f"{FILE_BYTES // 2**20} MiB, {network}. It keeps accidents from doing harm, not attacks: the code can read and write "
        "files as you can"
    )


def run_function(functions: Functions, name: str, arguments: dict[str, Any]) -> Any:
    """What a function returned, as JSON has it; where it failed, `{"error": …}`."""
    found = _run({"source": functions.source, "function": name, "arguments": arguments})
    return found["result"] if "result" in found else {"error": found.get("error")}


def run_code(code: str) -> str:
    """What a piece of Python wrote, and the error that ended it, if one did."""
    found = _run({"code": code})
    return f"{found.get('output', '')}"[-_SHOWN:] + found.get("error", "")


def _run(asked: dict[str, Any]) -> dict[str, Any]:
    limits = {
        "RLIMIT_CPU": (CPU_SECONDS, CPU_SECONDS + 1),  # a signal that says why, then one that ends it
        "RLIMIT_AS": (MEMORY, MEMORY),
        "RLIMIT_FSIZE": (FILE_BYTES, FILE_BYTES),
        "RLIMIT_NOFILE": (64, 64),
        "RLIMIT_NPROC": (0, 0),
        "RLIMIT_CORE": (0, 0),
    }
    with tempfile.TemporaryDirectory(prefix="modelyard-") as folder, tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(
            [*_without_network(), sys.executable, "-I", "-S", "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps({**asked, "limits": limits}).encode(), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return {"error": f"it was ended after {SECONDS:g} s", "output": ""}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        answer.seek(0)
        try:
            found = json.loads(answer.read())
        except (ValueError, RecursionError):
            found = None
        # What ran may have written anything there.
        if isinstance(found, dict) and all(
            isinstance(found.get(key, ""), str) for key in ("error", "output")
        ):
            return found
        return {
            "error": "no answer came: it left by itself, or used too much memory or processor time",
            "output": "",
        }
