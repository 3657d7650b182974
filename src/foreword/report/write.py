"""Render a report, and write it to a file by its suffix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from foreword.errors import ConfigError, did_you_mean
from foreword.report.parts import Report

Format = Literal["text", "markdown", "html", "json"]
FORMATS: dict[str, Format] = {".txt": "text", ".md": "markdown", ".html": "html", ".json": "json"}
"""By a file's suffix."""


def render(report: Report, form: Format) -> str:
    """Return a report as text for a terminal, Markdown, a whole HTML page (figures inside), or JSON."""
    if form == "json":
        return json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"
    if form == "html":
        from foreword.report.html import to_html

        return to_html(report)
    if form == "markdown":
        from foreword.report.markdown import to_markdown

        return to_markdown(report, {})
    from foreword.report.text import to_text

    return to_text(report)


def write(report: Report, path: str | Path) -> list[Path]:
    """Write a report to `path` in the format of its suffix; return the files written.

    Markdown puts its figures beside the file, `<stem>-1.svg` and so on. Raises ConfigError for another suffix and for
    a place that cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(
            f"{path} has suffix {path.suffix!r}; a report is written as {', '.join(FORMATS)}",
            hint=did_you_mean(path.suffix, FORMATS),
        )
    form, written = FORMATS[path.suffix], {}
    if form == "markdown":
        from foreword.report.figures import to_svg
        from foreword.report.markdown import figures_of, to_markdown

        names = {place: f"{path.stem}-{place + 1}.svg" for place in range(len(figures_of(report)))}
        written = {path.with_name(names[place]): to_svg(figure) for place, figure in enumerate(figures_of(report))}
        text = to_markdown(report, names)
    else:
        text = render(report, form)
    try:
        for place, content in {**written, path: text}.items():
            place.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename}: {error.strerror}", hint="Check folder, rights and space."
        ) from error
    return [*written, path]
