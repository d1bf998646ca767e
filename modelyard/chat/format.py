"""Which chat format: from a config, from a tokenizer's folder, from what training wrote down beside it.

What conversations were written in travels with the tokenizer as `modelyard_chat.json`, so that chatting with a trained model
gives it the tokens that it was trained on. A folder without that file has its chat template: the family that writes the same
text takes its place, because it knows more (several calls at once, exact kinds), else the template is used as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from modelyard.chat.conversation import Call, Conversation, ConversationError, Message
from modelyard.chat.families import FAMILIES, QWEN, ChatML, Family, Llama3, Vicuna
from modelyard.chat.segments import text_of
from modelyard.chat.shipped import chat_template
from modelyard.chat.template import Template, template_of
from modelyard.data.tokenizer import Tokenizer, load_tokenizer
from modelyard.errors import UserError
from modelyard.files import CHAT_FILE

RENDERER = 1
"""Raised when a chat format writes other text or other kinds than before: what was prepared then is prepared again."""
NAMES = (*FAMILIES, "template")


def family_from(settings: Mapping[str, Any], tokenizer: Tokenizer) -> Family:
    """The chat format that settings mean for a tokenizer.

    Args:
        settings: `family` (a name, `template`, or `auto`, the default: what training wrote down, else found) and any of what that family can be told: `default_system`,
            `date`, `knowledge_date`, `tools_in_user_message`, `builtin_tools`. None stands for the family's own.

    Raises:
        UserError: no such family, the tokenizer lacks its tokens, or it has nothing of the kind.
    """
    given = {key: value for key, value in settings.items() if key != "family" and value is not None}
    name = settings.get("family") or "auto"
    if name == "auto" and (written := written_settings(tokenizer.folder)):
        name = written.pop("family")
        given = {key: value for key, value in written.items() if value is not None} | given
    family = _detected(tokenizer) if name == "auto" else _named(name, tokenizer)
    known = {field.name for field in fields(family)}  # type: ignore[arg-type]  # all of them are dataclasses
    if unknown := [key for key in given if key not in known]:
        raise UserError(f"the chat format {family.name} has no {unknown[0]}")
    if isinstance(family, Template) and isinstance(given.get("date"), str):
        try:
            given["date"] = datetime.fromisoformat(given["date"])
        except ValueError:
            raise UserError(f"date '{given['date']}' is not written YYYY-MM-DD") from None
    if given.get("builtin_tools") is not None:
        given["builtin_tools"] = tuple(given["builtin_tools"])
    family = replace(family, **given)  # type: ignore[type-var]
    _check_tokens(family, tokenizer)
    return family


def settings_of(family: Family) -> dict[str, Any]:
    """What `family_from` needs to make the same family for the same tokenizer: JSON values."""
    if isinstance(family, Template):
        return {
            "family": "template",
            "date": family.date.date().isoformat(),
            "default_system": family.default_system,
        }
    values = asdict(family)  # type: ignore[call-overload]
    if isinstance(family, ChatML):
        del values["hermes"]
    return {"family": values.pop("name"), **values}


def chat_family(folder: Path) -> Family:
    """The chat format of the model whose tokenizer is in `folder`. Raises UserError where it has none."""
    tokenizer = load_tokenizer(folder)
    return family_from({}, tokenizer)


def written_settings(folder: Path) -> dict[str, Any]:
    """What training wrote down beside the tokenizer; nothing where it was not trained here."""
    file = folder / CHAT_FILE
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return {key: value for key, value in document.items() if key != "stops"}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is no JSON object ({error})") from None


def chat_files(family: Family, tokenizer: Tokenizer) -> dict[str, bytes]:
    """What goes beside a tokenizer whose model is trained on conversations: `modelyard_chat.json`, and for other programs a chat
    template of the same text, unless the tokenizer's own is one."""
    settings = {**settings_of(family), "stops": [stop for stop in family.stops if tokenizer.has_token(stop)]}
    files = {CHAT_FILE: (json.dumps(settings, indent=1) + "\n").encode()}
    own, source = _own_template(tokenizer), chat_template(family)
    if source is not None and (own is None or not _alike(family, own)):
        files["chat_template.jinja"] = source.encode()
    return files


def _named(name: str, tokenizer: Tokenizer) -> Family:
    if name == "template":
        return template_of(tokenizer.folder)
    if name not in FAMILIES:
        raise UserError(f"there is no chat format '{name}'; there are {', '.join(NAMES)}")
    if name == "vicuna" and not tokenizer.has_token(Vicuna.end) and tokenizer.eos is not None:
        return Vicuna(end=tokenizer.eos.text)
    if name == QWEN.name and (template := _own_template(tokenizer)) is not None:
        return _like_qwen(template)
    return FAMILIES[name]


def _detected(tokenizer: Tokenizer) -> Family:
    template = _own_template(tokenizer)
    if template is None:
        if tokenizer.has_token("<|start_header_id|>") and tokenizer.has_token("<|eot_id|>"):
            return Llama3()
        if tokenizer.has_token("<|im_start|>") and tokenizer.has_token("<|im_end|>"):
            return QWEN if tokenizer.has_token("<tool_call>") else FAMILIES["chatml"]
        raise UserError(
            f"{tokenizer.folder} has no chat template, so there is no telling how conversations are written: name a chat "
            f"format, family: {' | '.join(FAMILIES)}"
        )
    qwen = _like_qwen(template)
    candidates = (Llama3(), qwen, replace(qwen, name="chatml", hermes=False))
    return next((family for family in candidates if _alike(family, template)), template)


def _own_template(tokenizer: Tokenizer) -> Template | None:
    try:
        return template_of(tokenizer.folder)
    except UserError:
        return None


def _like_qwen(template: Template) -> ChatML:
    """Qwen's format with the sentence that this template says where there is no system message: versions differ in it."""
    try:
        text = template.text([Message("user", "?")])
    except ConversationError:
        return QWEN
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", text, re.DOTALL)
    return replace(QWEN, default_system=found[1] if found else None)


_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}
_TALK = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"))
_PROBES = (
    Conversation(_TALK),
    Conversation((Message("system", "zero"), *_TALK, Message("assistant", "four"))),
    Conversation(
        (
            Message("user", "one"),
            Message("assistant", calls=(Call("f", {"x": "y"}),)),
            Message("tool", "z"),
            Message("assistant", "two"),
        ),
        (_TOOL,),
    ),
)


def _alike(family: Family, template: Template) -> bool:
    """Whether they write the same, in every probe that the family can write."""
    for probe in _PROBES:
        try:
            own = text_of(family.render(probe))
        except ConversationError:
            continue
        try:
            theirs = template.text(probe.messages, probe.tools)
        except ConversationError:
            return False
        if own != theirs:
            return False
    return True


def _check_tokens(family: Family, tokenizer: Tokenizer) -> None:
    """Raise UserError where the vocabulary lacks a token that every conversation of the format has."""
    if isinstance(family, Vicuna) and not tokenizer.has_token(family.end):
        raise UserError(
            f"{tokenizer.folder} has no token '{family.end}', which ends answers in the format vicuna"
        )
    try:
        segments = family.render(Conversation(_TALK[:2]))
    except ConversationError as error:
        raise UserError(str(error)) from None
    for segment in segments:
        if segment.special and not tokenizer.has_token(segment.text):
            what = "its chat template" if isinstance(family, Template) else f"the chat format {family.name}"
            raise UserError(f"{tokenizer.folder} has no token '{segment.text}', which {what} is made of")
