"""Chat templates as transformers renders them, and what of the text the assistant says.

    {% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>
    {% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}

A `generation` block prints its content, as any text does; its beginning and end are marked with two code points that
Unicode keeps out of texts, and taken out again.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from typing import Any

from rlhf_dist.data.messages import Messages

BEGIN, END = "\ufdd0", "\ufdd1"
Span = tuple[int, int]
"""Characters [begin, end) of a text."""


def render(
    template: str, messages: Messages, *, generation_prompt: bool, tools: Any = None, **arguments: Any
) -> tuple[str, list[Span]]:
    """The messages under the template, and the spans of its `generation` blocks.

    `arguments`: special tokens by name and the template's own. Raises jinja2.TemplateError, TemplateTooLong among
    them for one that does not end within seconds (`template_limits.py`), and whatever else a
    template may raise on messages it does not take.
    """
    for message in messages:
        if isinstance(message.get("content"), str) and re.search(f"[{BEGIN}{END}]", message["content"]):
            raise ValueError("a message holds U+FDD0 or U+FDD1, which are no characters; take them out")
    from rlhf_dist.data.template_limits import bounded, joined

    given = {"messages": messages, "add_generation_prompt": generation_prompt, "tools": tools, "documents": None}
    with bounded():
        marked = joined(_compiled(template).generate(**given, **arguments))
    pieces = re.split(f"([{BEGIN}{END}])", marked)
    spans, text, begin = list[Span](), "", 0
    for piece in pieces:
        if piece == BEGIN:
            begin = len(text)
        elif piece == END:
            spans.append((begin, len(text)))
        else:
            text += piece
    return text, [span for span in spans if span[0] < span[1]]


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@functools.cache
def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates: sandboxed, with the same few extras; and bounded."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension

    from rlhf_dist.data.template_limits import BoundedEnvironment

    class GenerationBlock(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

        def marked(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
