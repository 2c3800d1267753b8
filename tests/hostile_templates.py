"""Chat templates that try to waste time or memory, or to get out; run as a program, it renders each in a thread.

The process may use 700 MB of address space beyond what it starts with, so a template that takes more fails with
MemoryError. Prints one JSON object: name → [outcome, processor seconds].
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time

_SET = "{% set ns = namespace(x='ab', y='ab', l=[1], m=[1], n=3, d={'a': 1}) %}{% for i in range(60) %}"
_BIG = "{% set a = 'x' * 4000000 %}{% set b = 'x' * 4000000 %}"

LOOPS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "plain loops": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "filtered loops": "{% set r = range(99999) %}{% for i in r %}{% for j in r if j and 0 %}{% endfor %}{% endfor %}",
    "comparisons": "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% if i == j %}{% endif %}"
    "{% endfor %}{% endfor %}",
    "loop tests": "{% for i in range(9999) if false %}x{% endfor %}" * 900 + "{{ x.y.z }}",
    "endless recursion": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "doubling recursion": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "slow tests": "{% set l = ('a' * 60000)|list %}{{ l|select('in', 'b' * 4000000)|list|length }}" * 9,
    "lazy chains": "{{ range(99999)|map('string')|map('upper')|map('lower')|map('title')|list|length }}" * 40,
    "static text": "{% for i in range(99999) %}" + "y" * 40000 + "{% endfor %}",
    "captured text": "{% set x %}{% for i in range(99999) %}" + "y" * 40000 + "{% endfor %}{% endset %}",
    "macro text": "{% macro m() %}" + "y" * 40000 + "{% endmacro %}"
    "{% for i in range(9999) %}{% set x = m() %}{% endfor %}",
    "call blocks": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 40 + "x" * 1000 + "{% endcall %}" * 40,
}  # fmt: skip
SIZES = {
    "repeat": "{{ 'a' * 10**9 }}",
    "repeat left": "{{ 10**9 * 'a' }}",
    "repeat list": "{{ [1] * 10**9 }}",
    "power": "{{ 2**10**8 }}",
    "power right": "{{ 2**(10**8) }}",
    "power negative": "{{ (-2)**(10**7) }}",
    "squares": _SET + "{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "doubling": _SET + "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "doubling ~": _SET + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "doubling block": _SET + "{% set v %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = v %}{% endfor %}{{ ns.x }}",
    "shared lists": _SET + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "shared tuples": _SET + "{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ ns.l }}",
    "shared compared": _SET + "{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}{% endfor %}"
    "{{ ns.l == ns.m }}",
    "shared as JSON": _SET + "{% set ns.d = {'a': ns.d, 'b': ns.d} %}{% endfor %}{{ ns.d|tojson }}",
    "shared by dict": _SET + "{% set ns.d = dict(a=ns.d, b=ns.d) %}{% endfor %}{{ ns.d|string }}",
    "shared views": _SET + "{% set v = ns.d.items() %}{% set ns.d = {'a': v, 'b': v} %}{% endfor %}{{ ns.d }}",
    "shared cyclers": _SET + "{% set ns.l = cycler(ns.l, ns.l).items %}{% endfor %}{{ ns.l }}",
    "varargs": "{% macro m(n) %}{% if n %}{{ m(n-1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "join method": "{{ ('a' * 1000000).join(['b'] * 1000) }}",
    "join filter": "{{ range(9999)|join('a' * 100000) }}",
    "joined copies": "{{ (['b' * 1000000] * 1000000)|join('x') }}",
    "replace method": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "replace nothing": "{{ ('a' * 1000000).replace('', 'b' * 1000000) }}",
    "filter block": "{% filter replace('a', 'b' * 1000000) %}{% for i in range(9999) %}a{% endfor %}{% endfilter %}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format escaped": "{{ '{{{0:{1}}}}'.format('a', 10**9) }}",
    "format_map": "{{ '{a:{b}}'.format_map({'a': 1, 'b': 10**9}) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent filter": "{{ '%1000000000d'|format(1) }}",
    "percent precision": "{{ '%.1000000000f' % 1.5 }}",
    "percent repeated": "{{ ('%999d' * 1000000) % 1 }}",
    "center": "{{ 'a'.center(10**9) }}",
    "center filter": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "to_bytes": "{{ (5).to_bytes(10**9, 'big') }}",
    "indent": "{{ 'a\\nb'|indent(10**9) }}",
    "tojson indent": "{{ [1]|tojson(indent=10**9) }}",
    "tojson separators": "{{ range(999)|list|tojson(separators=('a' * 1000000, 'b')) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice filter": "{{ [1]|slice(10**9)|list }}",
    "wordwrap": "{{ 'a b'|wordwrap(1, wrapstring='x' * 10**9) }}",
    "sum of lists": "{{ ([[1] * 100] * 600)|sum(start=[]) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "strftime": "{{ strftime_now('%1000000000Y') }}",
    "upper copies": "{{ (['a' * 1000000] * 4)|map('upper')|list|length }}" * 200,
    "slices": "{% set a = 'x' * 4000000 %}{% set b = [" + ",".join(["a[1:]"] * 5000) + "] %}",
    "concatenation": _BIG + "{{ " + "~".join("a" * 9000) + " }}",
    "variables": _BIG + "".join(f"{{% set v{i} = a|upper %}}" for i in range(1500)),
    "split": "{{ ('a' * 4000000).split('a')|length }}",
    "strip": "{{ ('b' * 2000000).strip('a' * 2000000 ~ 'b') }}",
    "trim filter": "{{ ('b' * 2000000)|trim('a' * 2000000 ~ 'b') }}",
    "rsplit by name": "{{ ('a' * 2000000).rsplit(sep='b' ~ 'a' * 1000000) }}",
    "rfind": "{{ ('a' * 2000000).rfind('b' ~ 'a' * 1000000) }}",
    "safe": "{{ ('a'|safe) * 10**9 }}",
}  # fmt: skip
ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "item": "{{ messages['__class__']['__mro__'] }}",
    "format field": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "format of safe": "{{ ('{0.__class__.__mro__}'|safe).format(1) }}",
    "format through map": "{{ ['{0.__class__.__mro__}']|map('format', 1)|list }}{{ x.y.z }}",
    "globals": "{{ raise_exception.__globals__.x }}",
    "function code": "{{ raise_exception.__code__.co_consts }}",
    "generator frame": "{{ (messages|map('string')).gi_frame.f_globals }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "map attribute": "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "sort attribute": "{{ messages|sort(attribute='__class__.__mro__')|list }}{{ x.y.z }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'a': 1}) }}",
    "unbound update": "{{ dict.update(messages[0], {'a': 1}) }}",
    "encode": "{{ 'x'.encode('utf-8') }}",
    "self": "{{ self.__init__.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "from import": "{% from 'os' import path %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
}
SOURCES = {
    "long source": "x" * 50000,
    "parentheses": "{{ " + "(" * 15000 + "1" + ")" * 15000 + " }}",
    "signs": "{{ " + "-" * 40000 + "1 }}",
    "sums": "{{ 1" + "+1" * 20000 + " }}",
    "dots": "{{ a" + ".a" * 20000 + " }}",
    "nested loops": "{% for i in range(9) %}" * 500 + "{% endfor %}" * 500,
    "nested conditions": "{% if 1 %}" * 1000 + "x" + "{% endif %}" * 1000,
    "unclosed": "{% if %}",
    "unknown tag": "{% nothing %}",
    "unknown filter": "{{ 1|nothing }}",
    "undefined": "{{ x.y.z }}",
    "refusal": "{{ raise_exception('no') }}",
    "deep list": "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x }}",
}
ALL = {**LOOPS, **SIZES, **ESCAPES, **SOURCES}


def _outcome(source: str) -> list[str | float]:
    from millis.tokenizer.template import Template
    from millis.types import TemplateError

    start = time.thread_time()
    try:
        outcome = "rendered " + Template(source).render({"messages": [{"role": "user", "content": "hi"}]})[:80]
    except TemplateError as error:
        outcome = f"TemplateError: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    return [outcome, time.thread_time() - start]


def _main() -> None:
    _outcome("{{ messages }}")  # imports first, so that the limit is for the templates
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
    found: dict[str, list[str | float]] = {}
    for name, source in ALL.items():
        thread = threading.Thread(target=lambda n=name, s=source: found.update({n: _outcome(s)}))
        thread.start()
        thread.join()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main()
