"""`modelyard chat`: a conversation at the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modelyard.chat.conversation import (
    Call,
    Conversation,
    ConversationError,
    Message,
    as_message,
    as_record,
    read_conversation,
)
from modelyard.chat.families import Family, Llama3
from modelyard.chat.format import family_from, written_settings
from modelyard.chat.parsing import call_begins
from modelyard.chat.schema import call_problem
from modelyard.chat.template import Template
from modelyard.data.tokenizer import Tokenizer, load_tokenizer, replace_surrogates
from modelyard.errors import UserError, did_you_mean, missing_path
from modelyard.generate.chat import Answer, ChatModel
from modelyard.generate.command import load_model, sampling_options
from modelyard.generate.sample import SamplingOptions
from modelyard.generate.sandbox import Functions, protection, read_functions, run_code, run_function
from modelyard.generate.text import Piece

ROUNDS = 8
"""How often in one turn the model may call tools before the user is asked again."""
CODE = "code_interpreter"


def chat_command(options: argparse.Namespace) -> int:
    """Answer the messages of the command line, or talk until the user leaves. Returns the exit status."""
    sampling = sampling_options(options)
    tools, functions = _read_tools(options.tools)
    decoder, folder = load_model(
        options.model, tokenizer=options.tokenizer, dtype=options.dtype, base=options.base
    )
    tokenizer = load_tokenizer(folder)
    model = ChatModel(decoder, tokenizer, _family(tokenizer, options.family))
    if options.run_python and functions is None and not isinstance(model.family, Llama3):
        raise UserError(
            "--run-python has nothing to run: name a Python file of functions with --tools FILE.py (only in the format llama3 do "
            "models write code without that)"
        )
    terminal = Terminal(asks=not options.message)
    talk = Talk(
        model,
        sampling,
        tools,
        terminal,
        functions=functions,
        run_python=options.run_python,
        show_tokens=options.show_tokens,
        as_json=options.json,
    )
    if options.system is not None:
        talk.say_system(options.system)
    try:  # a format that has no place for tools says so now
        model.prompt_ids(Conversation((*talk.messages, Message("user", "")), tools))
    except ConversationError as error:
        raise UserError(str(error)) from None
    named = "its template" if isinstance(model.family, Template) else model.family.name
    terminal.note(f"chat format: {named}; what ends an answer: {' '.join(model.stops) or 'nothing'}")
    if tools:
        terminal.note(f"tools: {', '.join(_name(tool) for tool in tools)}")
    if options.run_python:
        terminal.note(protection())
    elif tools and terminal.asks:
        terminal.note("nothing is run: you are asked for the result of each call")
    if options.message:
        for message in options.message:
            talk.turn(message)
        return 0
    return _converse(talk, terminal)


class Terminal:
    """Lines that are read, where there is somebody to type them with a prompt; notes go to standard error."""

    def __init__(self, *, asks: bool = True):
        self.asks = asks
        """Whether there is anybody, or a file, to ask."""
        self._typed = asks and sys.stdin.isatty()
        if self._typed:
            try:
                import readline  # noqa: F401  # arrows and history, for `input`
            except ImportError:
                pass

    def read(self, prompt: str) -> str:
        """A line. Raises EOFError at the end, KeyboardInterrupt for Ctrl-C."""
        return replace_surrogates(input(prompt if self._typed else ""))

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@dataclass
class Talk:
    """One conversation: its history, and what happens in a turn."""

    model: ChatModel
    sampling: SamplingOptions
    tools: tuple[Any, ...]
    terminal: Terminal
    functions: Functions | None = None
    run_python: bool = False
    show_tokens: bool = False
    as_json: bool = False
    messages: list[Message] = field(default_factory=list)
    answered: int = 0
    """Answers so far, those taken back too: each is drawn with a seed of its own."""
    prompt_ids: list[int] = field(default_factory=list)
    """What the model read before its last answer."""

    @property
    def conversation(self) -> Conversation:
        return Conversation(tuple(self.messages), self.tools)

    def say_system(self, text: str) -> None:
        """Set the system message; an empty one takes it away."""
        rest = self.messages[1:] if self.messages and self.messages[0].role == "system" else self.messages
        self.messages = [*([Message("system", text)] if text else []), *rest]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages[:1] if message.role == "system"]

    def undo(self) -> bool:
        """Take the last turn back: the user's last message and what came of it; False where there is none."""
        places = [place for place, message in enumerate(self.messages) if message.role == "user"]
        if places:
            del self.messages[places[-1] :]
        return bool(places)

    def turn(self, text: str) -> None:
        """Say something, show what the model answers, calls of tools and their results included.

        Raises UserError where that cannot be; the history is as before then.
        """
        before = list(self.messages)
        self.messages.append(Message("user", text))
        try:
            answer = self._answers()
        except (ConversationError, UserError) as error:
            self.messages = before
            raise UserError(str(error)) from None
        except (EOFError, KeyboardInterrupt):
            self.messages = before
            self.terminal.note("\n(the message is taken back)")
            raise
        if self.as_json:
            self._show_json(text, answer, self.messages[len(before) :])

    def _answers(self) -> Answer:
        for _ in range(ROUNDS):
            answer = self._answer()
            self.messages.append(answer.message)
            results: list[Message] = []
            for call in answer.message.calls:
                result = self._result(call)
                if result is None:
                    return answer
                results.append(Message("tool", result))
            if not results:
                return answer
            self.messages += results
        self.terminal.note(f"({ROUNDS} rounds of calls: say something, and it goes on)")
        return answer

    def _answer(self) -> Answer:
        self.prompt_ids = self.model.prompt_ids(self.conversation)
        if self.show_tokens and not self.as_json:
            ids = " ".join(map(str, self.prompt_ids))
            self.terminal.note(f"{len(self.prompt_ids):,} tokens: {ids}")
        sampling = replace(self.sampling, seed=self.sampling.seed + self.answered)
        self.answered += 1
        screen, made, interrupted = _Screen(silent=self.as_json), list[Piece](), False
        try:
            for piece in self.model.stream(self.conversation, sampling):
                made.append(piece)
                screen.add(piece.text)
        except KeyboardInterrupt:
            if not (made and self.terminal.asks):
                raise
            interrupted = True
        answer = self.model.finish(made)
        screen.end(answer)
        if interrupted:
            self.terminal.note("(stopped)")
        elif not answer.stopped and not self.as_json:
            last = ", the model's last position" if len(made) < sampling.max_new_tokens else ""
            self.terminal.note(f"(cut off after {len(made):,} tokens{last})")
        if not self.as_json:
            for call in answer.message.calls:
                print(f"[call] {call.name} {_written(call)}", flush=True)
                if problem := self.problem(call):
                    print(f"[not as its definition says] {problem}", flush=True)
        return answer

    def problem(self, call: Call) -> str | None:
        """Why a call does not fit the tools that there are."""
        return None if call.name == CODE and self._runs(call) else call_problem(call, self.tools)

    def _runs(self, call: Call) -> bool:
        if not self.run_python or isinstance(call.arguments, str):
            return False
        return call.name == CODE or (self.functions is not None and call.name in self.functions.names)

    def _result(self, call: Call) -> Any:
        """What came of a call: run if that is wanted, else the user is asked; None where nobody can be."""
        if self._runs(call):
            problem = self.problem(call)
            if problem is not None:
                found: Any = {"error": problem}
            elif self.functions is not None and call.name in self.functions.names:
                found = run_function(self.functions, call.name, dict(call.arguments))
            else:
                found = run_code(str(call.arguments.get("code", "")))
            if not self.as_json:
                print(f"[result] {found if isinstance(found, str) else _json(found)}", flush=True)
            return found
        if not self.terminal.asks:
            return None
        typed = self.terminal.read(f"result of {call.name}> ")
        try:
            value = json.loads(typed)
        except ValueError:
            return typed
        return value if isinstance(value, dict | list) else typed

    def _show_json(self, text: str, answer: Answer, added: list[Message]) -> None:
        calls = [
            {"name": call.name, "arguments": call.arguments, "problem": self.problem(call)}
            for message in added
            for call in message.calls
        ]
        shown = {
            "message": text,
            "answer": answer.message.content,
            "calls": calls,
            "messages": [as_message(message) for message in added],
            "text": answer.text,
            "token_ids": answer.token_ids,
            "stopped": answer.stopped,
        }
        if self.show_tokens:
            shown["prompt_ids"] = self.prompt_ids
        print(_json(shown), flush=True)


class _Screen:
    """Shows an answer as it comes; what looks like a call is held back until it is known to be one."""

    def __init__(self, *, silent: bool):
        self._silent, self._text, self._shown = silent, "", 0

    def add(self, text: str) -> None:
        self._text += text
        self._show(call_begins(self._text))

    def end(self, answer: Answer) -> None:
        """The rest, unless it is calls."""
        if not answer.message.calls:
            self._show(len(self._text))
        shown = self._text[: self._shown]
        if shown.strip() and not shown.endswith("\n") and not self._silent:
            print(flush=True)

    def _show(self, end: int) -> None:
        if end > self._shown and not self._silent:
            piece = self._text[self._shown : end]
            print(piece if self._text[: self._shown].strip() else piece.lstrip(), end="", flush=True)
        self._shown = max(self._shown, end)


HELP = """\
/system TEXT   say another system message from here on; none without TEXT
/undo          take the last message and its answer back
/reset         forget everything but the system message
/save FILE     add the conversation to FILE as a line of JSON, as `modelyard prepare` reads it
/help          this
/quit          leave, as Ctrl-D does
Ctrl-C stops an answer."""


def _converse(talk: Talk, terminal: Terminal) -> int:
    """Read lines to the end: commands and messages."""
    while True:
        try:
            line = terminal.read("> ")
            if line.startswith("/"):
                word, _, rest = line.partition(" ")
                if word == "/quit":
                    return 0
                _command(talk, terminal, word, rest.strip())
            elif line.strip():
                talk.turn(line)
        except EOFError:
            if sys.stdin.isatty():
                print()
            return 0
        except KeyboardInterrupt:
            terminal.note("(Ctrl-D or /quit leaves)")
        except UserError as error:
            terminal.note(f"error: {error}")


def _command(talk: Talk, terminal: Terminal, word: str, rest: str) -> None:
    if word == "/system":
        talk.say_system(rest)
    elif word == "/undo":
        terminal.note("taken back" if talk.undo() else "there is nothing to take back")
    elif word == "/reset":
        talk.reset()
        terminal.note("forgotten")
    elif word == "/save":
        terminal.note(_save(talk.conversation, rest))
    elif word == "/help":
        terminal.note(HELP)
    else:
        words = ("/system", "/undo", "/reset", "/save", "/help", "/quit")
        raise UserError(f"'{word}' is no command{did_you_mean(word, words)} (/help lists them)")


def _save(conversation: Conversation, name: str) -> str:
    if not name:
        raise UserError("/save needs the name of a file")
    if not any(message.role == "assistant" for message in conversation.messages):
        raise UserError("there is nothing to save: nothing was answered yet")
    try:
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(_json(as_record(conversation)) + "\n")
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    return f"added to {name}"


def _family(tokenizer: Tokenizer, name: str | None) -> Family:
    """The chat format that was asked for, or that of the model."""
    if name is not None:
        return family_from({"family": name}, tokenizer)
    try:
        return family_from(written_settings(tokenizer.folder), tokenizer)
    except UserError as error:
        raise UserError(f"{error}; here with --family NAME") from None


def _read_tools(path: Path | None) -> tuple[tuple[Any, ...], Functions | None]:
    """The definitions in a file, and the functions where it is Python."""
    if path is None:
        return (), None
    if path.suffix == ".py":
        functions = read_functions(path)
        return functions.tools, functions
    if not path.is_file():
        raise UserError(f"--tools: {missing_path(path)}")
    try:
        text = path.read_text(encoding="utf-8")
        tools = read_conversation([{"role": "user", "content": ""}], text).tools
    except ConversationError as error:
        raise UserError(f"--tools: {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--tools: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, tool in enumerate(tools, 1):
        if not _name(tool):
            raise UserError(f"--tools: {path}: tool {number} has no name")
    return tools, None


def _name(tool: Any) -> str:
    inner = tool.get("function", tool)
    return str(inner.get("name") or "") if isinstance(inner, dict) else ""


def _written(call: Call) -> str:
    return call.arguments if isinstance(call.arguments, str) else _json(call.arguments)


def _json(value: Any) -> str:
    return replace_surrogates(json.dumps(value, ensure_ascii=False))
