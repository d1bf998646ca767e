"""Chat formats as jinja templates, for the programs that serve a model: they write the text that it was trained on.

A tokenizer that comes with a template of the same text keeps it; these are for those that have none (base models), or another.
"""

from __future__ import annotations

import re

from modelyard.chat.families import (
    LLAMA_SYSTEM_TOOLS,
    LLAMA_TOOLS,
    ChatML,
    Family,
    Llama3,
    Vicuna,
    as_json,
    hermes_tools,
)
from modelyard.chat.template import Template


def chat_template(family: Family) -> str | None:
    """The jinja template of a format, as transformers renders it (`messages`, `tools`, `add_generation_prompt`); None for a
    tokenizer's own, which is one already, unless it is given a system message to begin with. `<|…|>` values of the format's settings are in it."""
    if isinstance(family, Llama3):
        return _llama3(family)
    if isinstance(family, ChatML):
        return _chatml(family)
    if isinstance(family, Vicuna):
        return _vicuna(family)
    if isinstance(family, Template) and family.default_system is not None:
        return _filled(_SAYS_FIRST, {"SYSTEM": _quoted(family.default_system)}) + family.source
    return None


_SAYS_FIRST = """\
{%- if not messages or messages[0].role not in ('system', 'developer') -%}
    {%- set messages = [{'role': 'system', 'content': SYSTEM}] + messages -%}
{%- endif -%}
"""


def _quoted(text: str) -> str:
    """A jinja string literal."""
    return as_json(text)


_FIRST = """\
{%- set said = messages %}
{%- set system = SYSTEM %}
{%- if messages[0].role in ('system', 'developer') %}
    {%- set system = messages[0].content%TRIM% %}
    {%- set said = messages[1:] %}
{%- endif %}
"""

_LLAMA3 = """\
{%- macro header(role) -%}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}
{%- endmacro %}
{%- macro listed() -%}
    {%- for tool in tools -%}
        {{- (tool | tojson(indent=4)) + '\\n\\n' -}}
    {%- endfor -%}
{%- endmacro %}
{{- '<|begin_of_text|>' + header('system') }}
{%- if tools or KNOWS %}
    {{- 'Environment: ipython\\n' }}
{%- endif %}
{{- BEFORE }}
{%- if tools and not IN_USER %}
    {{- SYSTEM_TOOLS + listed() }}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- if tools and IN_USER and (not said or said[0].role != 'user') %}
    {{- raise_exception('tools are told in the first message after the system message, which must be the user message') }}
{%- endif %}
{%- for message in said %}
    {%- if message.role in ('tool', 'ipython', 'function') %}
        {{- header('ipython') + (message.content | tojson) + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {{- header('assistant') }}
        {%- if message.tool_calls | length > 1 %}
            {{- '<|python_tag|>[' }}
            {%- for call in message.tool_calls %}
                {{- '{"name": ' + (call.function.name | tojson) + ', "parameters": ' }}
                {{- (call.function.arguments | tojson) + '}' + ('' if loop.last else ', ') }}
            {%- endfor %}
            {{- ']' }}
        {%- else %}
            {%- set call = message.tool_calls[0].function %}
            {%- if call.name in BUILTIN %}
                {{- '<|python_tag|>' + call.name + '.call(' }}
                {%- for name, value in call.arguments.items() %}
                    {{- name + '="' ~ value ~ '"' + ('' if loop.last else ', ') }}
                {%- endfor %}
                {{- ')' }}
            {%- else %}
                {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
            {%- endif %}
        {%- endif %}
        {{- END }}
    {%- else %}
        {{- header('user' if message.role == 'user' else message.role) }}
        {%- if loop.first and tools and IN_USER %}
            {{- TOOLS + listed() }}
        {%- endif %}
        {{- (message.content | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
"""


def _llama3(family: Llama3) -> str:
    known = [name for name in family.builtin_tools or () if name != "code_interpreter"]
    before = f"Tools: {', '.join(known)}\n\n" if family.builtin_tools is not None else ""
    before += f"Cutting Knowledge Date: {family.knowledge_date}\nToday Date: {family.date}\n\n"
    values = {
        "KNOWS": "true" if family.builtin_tools is not None else "false",
        "IN_USER": "true" if family.tools_in_user_message else "false",
        "BUILTIN": as_json(list(family.builtin_tools or ())),
        "BEFORE": _quoted(before),
        "SYSTEM_TOOLS": _quoted(LLAMA_SYSTEM_TOOLS),
        "TOOLS": _quoted(LLAMA_TOOLS),
        "END": _quoted("<|eot_id|>" if family.builtin_tools is None else "<|eom_id|>"),
    }
    return _filled(
        _FIRST.replace("%TRIM%", " | trim") + _LLAMA3, {"SYSTEM": _quoted(family.default_system)} | values
    )


_CHATML = """\
{%- if tools %}
    {%- if not HERMES %}
        {{- raise_exception('plain ChatML has no place for tools') }}
    {%- endif %}
    {%- set system = system or '' %}
{%- endif %}
{%- if system is not none %}
    {{- '<|im_start|>system\\n' + system }}
    {%- if tools %}
        {{- BEFORE_TOOLS }}
        {%- for tool in tools %}
            {{- '\\n' + (tool | tojson) }}
        {%- endfor %}
        {{- AFTER_TOOLS }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in said %}
    {%- if message.role in ('tool', 'ipython', 'function') %}
        {%- if loop.first or loop.previtem.role != message.role %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content if message.content is string else message.content | tojson }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != message.role %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def _chatml(family: ChatML) -> str:
    before, after = hermes_tools(("\0",)).split('\n"\\u0000"') if family.hermes else ("", "")
    values = {
        "HERMES": "true" if family.hermes else "false",
        "BEFORE_TOOLS": _quoted(before),
        "AFTER_TOOLS": _quoted(after),
    }
    system = "none" if family.default_system is None else _quoted(family.default_system)
    return _filled(_FIRST.replace("%TRIM%", "") + _CHATML, {"SYSTEM": system} | values)


_VICUNA = """\
{{- system + ' ' }}
{%- for message in said %}
    {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
        {{- raise_exception('user and assistant take turns, and the user begins') }}
    {%- endif %}
    {{- 'USER: ' + message.content + ' ' if message.role == 'user' else 'ASSISTANT: ' + message.content + END }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""


def _vicuna(family: Vicuna) -> str:
    values = {"SYSTEM": _quoted(family.default_system), "END": _quoted(family.end)}
    return _filled(_FIRST.replace("%TRIM%", "") + _VICUNA, values)


def _filled(text: str, values: dict[str, str]) -> str:
    """The template with its settings in place of their names, which are words in capitals."""
    return re.sub(rf"\b({'|'.join(values)})\b", lambda found: values[found[1]], text)
