"""A template that does not end, or says too much, is an error within seconds, in any thread; others are as before."""

from __future__ import annotations

import threading
import time

import jinja2
import pytest

from rlhf_dist.data import template_limits
from rlhf_dist.data.template import render

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "silent loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(90) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "adding": "{% set ns = namespace(x='ab') %}{% for i in range(90) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "times": "{{ 'a' * 10000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "width": "{{ '%9999999999d' % 1 }}",
    "padding": "{{ 'a'.ljust(10000000000) }}",
    "centre": "{{ 'a' | center(10000000000) }}",
    "format": "{{ '%9999999999d' | format(1) }}",
    "format, width": "{{ '%*d' | format(9999999999, 1) }}",
    "str.format": "{{ '{:9999999999}'.format(1) }}",
    "str.format, width": "{{ '{:{}}'.format(1, '>9999999999') }}",
    "str.format, often": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "batch": "{{ [1] | batch(10000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(10000000000) | list }}",
    "wordwrap": "{{ ('a ' * 100000) | wordwrap(1, wrapstring='b' * 100000) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "str.replace": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "indent": "{{ ('\\n' * 100000) | indent(100000) }}",
    "join": "{{ ('a' * 100000) | join('b' * 100000) }}",
}


@pytest.mark.parametrize("name", list(ENDLESS))
def test_a_template_without_end_is_an_error_within_seconds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    started = time.monotonic()
    errors: list[Exception] = []

    def ask() -> None:  # a worker's thread, where no signal arrives
        try:
            render(ENDLESS[name], CHAT, generation_prompt=False)
        except jinja2.TemplateError as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(20)
    assert [type(error) for error in errors] == [template_limits.TemplateTooLong]
    assert time.monotonic() - started < 15


def test_loops_and_texts_are_what_they_were() -> None:
    template = (
        "{% for m in messages %}{{ loop.index0 }}/{{ loop.length }} {{ m.role ~ ':' ~ 1 }} {{ m.content + '!' }}"
        "{% if not loop.last %}, {{ loop.nextitem.role }} {% endif %}{% endfor %}"
        "{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v * 2 }}{% else %}none{% endfor %}"
        "{% for x in messages | selectattr('role', 'equalto', 'user') %}{{ x.content | replace('H', 'h') }}{% endfor %}"
        "{{ ['x', 'y'] | join('-') }}{{ 'c' | center(3) }}{{ '%03d' % 7 }}{{ 2 ** 5 }}{{ [1] + [2] }}"
    )
    template += (
        "{{ '%d %s' | format(99999999999, 'a') }}{{ '{:>5} {a}'.format(99999999999, a=1) }}{{ 'ab c' | wordwrap(2) }}"
        "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}{{ 'a\\nb' | indent(2, true) }}"
        "{{ ('a' * 100000 + 'b').replace('b', 'c' * 1000) | length }}"
        "{{ messages | map(attribute='role') | join(', ') }}"
    )
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    expected = environment.from_string(template).render(messages=CHAT)
    assert render(template, CHAT, generation_prompt=False)[0] == expected


def test_a_template_has_no_texts_of_nothing() -> None:
    with pytest.raises(jinja2.TemplateError, match="'lipsum' is undefined"):
        render("{{ lipsum(n=100) }}", CHAT, generation_prompt=False)
