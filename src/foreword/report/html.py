"""A report as one HTML page that needs nothing beside it: styles and figures are inside."""

from __future__ import annotations

from functools import cache
from typing import Any

from foreword.report.marks import spans
from foreword.report.parts import Report, show_cell

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, li { max-width: 46rem; }
table { border-collapse: collapse; font-size: .9rem; } caption { text-align: left; padding: .4rem 0; font-weight: 600; }
.wide { overflow-x: auto; margin: 1rem 0; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { font: .88em/1.5 ui-monospace, monospace; background: var(--soft); border-radius: 4px; }
code { padding: .1em .3em; } pre { padding: .8rem 1rem; overflow-x: auto; }
figure { margin: 1.2rem 0; background: #fff; border-radius: 6px; } figure svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>{{ marked(report.title) }}</h1>
{% for section in report.sections %}
<section>
<h2>{{ marked(section.title) }}</h2>
{% for block in section.blocks %}{% set kind = kind_of(block) %}
{% if kind == "Text" %}<p>{{ marked(block.text) }}</p>
{% elif kind == "Bullets" %}<{{ "ol" if block.numbered else "ul" }}>
{% for item in block.items %}<li>{{ marked(item) }}</li>
{% endfor %}</{{ "ol" if block.numbered else "ul" }}>
{% elif kind == "Code" %}<pre>{{ block.text }}</pre>
{% elif kind == "Table" %}{% set numeric = block.is_number %}<div class="wide"><table>
{% if block.caption %}<caption>{{ marked(block.caption) }}</caption>
{% endif %}<thead><tr>{% for name in block.columns %}<th{% if numeric[loop.index0] %} class="number"{% endif %}>\
{{ marked(name) }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in block.rows %}<tr>{% for cell in row %}<td{% if numeric[loop.index0] %} class="number"{% endif %}>\
{{ marked(show_cell(cell)) }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% else %}<figure>{{ svg(block) }}</figure>
{% endif %}{% endfor %}</section>
{% endfor %}</body>
</html>
"""


def to_html(report: Report) -> str:
    """Return the whole page; every text of the report is escaped."""
    page: str = _template().render(report=report)
    return page


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    names: dict[str, Any] = {
        "marked": _marked,
        "kind_of": lambda block: type(block).__name__,
        "show_cell": show_cell,
        "svg": _svg,
    }
    environment.globals.update(names)
    return environment.from_string(PAGE)


def _marked(text: str) -> Any:
    from markupsafe import Markup

    tags = {"plain": Markup("{}"), "code": Markup("<code>{}</code>"), "strong": Markup("<strong>{}</strong>")}
    return Markup("").join(tags[mark].format(part) for mark, part in spans(text))


def _svg(figure: Any) -> Any:
    from markupsafe import Markup

    from foreword.report.figures import to_svg

    drawn = to_svg(figure)
    return Markup(drawn[drawn.index("<svg") :])
