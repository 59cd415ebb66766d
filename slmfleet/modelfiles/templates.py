"""How a model writes a tool call, guessed from its chat template. A guess: no template says it outright."""

from __future__ import annotations

# The first mark that a template contains decides: (mark, format). Special marks come before common ones.
_MARKS = (
    ("<|python_tag|>", "llama3"),
    ("[TOOL_CALLS]", "mistral"),
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("<|tool_calls_section_begin|>", "kimi"),
    ("<|channel|>", "harmony"),
    ("<function=", "function-tags"),
    ("<|tool_call|>", "phi4"),
    ("functools[", "functools"),
    (">>>", "functionary"),
    ("<start_function_call>", "gemma"),
    ("<tool_call>", "hermes"),
)


def tool_format(template: str) -> str:
    """Name of the format; "json" for a template that lists tools without a known mark, "" for one without tools."""
    if "tools" not in template and "tool_call" not in template:
        return ""
    return next((name for mark, name in _MARKS if mark in template), "json")
