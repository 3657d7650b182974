"""A report in each of its forms: nothing lost, nothing that could run, the same file twice."""

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import ConfigError
from foreword.report import Bullets, Code, HeatMap, Lines, Point, Report, Scatter, Section, Table, Text, render, write
from foreword.report.figures import to_png, to_svg
from foreword.report.marks import spans, without_marks

HEAT = HeatMap(
    "prefix mass", ("h0", "h1"), ("layer 0", "layer 1"), ((0.0, 1.0), (0.5, None)), "head", "layer", 0.0, 1.0
)
SCATTER = Scatter(
    "front", "bytes", "score", (Point("kv $5", 10, 0.5, True, 0.4, 0.6), Point("text", 1000, 0.2)), x_log=True
)
LINES = Lines("curve", "step", "loss", {"train": ((1, 2.0), (2, 1.0))})
REPORT = Report(
    "A `title`",
    (
        Section("First", (Text("a **strong** claim in `code`, 1 < 2 & 2*3*4"), Bullets(("one", "two"), numbered=True))),
        Section("Numbers", (Table(("method", "bytes"), (("kv", 1234567), ("text|x", None)), "Costs"), Code("p = 20"))),
        Section("Figures", (HEAT, SCATTER, LINES)),
    ),
    {"bytes": 20},
)


class Tags(HTMLParser):
    """Collects what a page holds."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_text_holds_everything_readably():
    text = render(REPORT, "text")
    assert "a strong claim in code, 1 < 2 & 2*3*4" in text
    assert "1. one\n2. two" in text
    assert "kv      1234567\ntext|x        -" in text
    assert "layer 0 ··██" in text and "layer 1 ▒▒??" in text
    assert "kv $5 *" in text and "    p = 20" in text


def test_markdown_escapes_and_names_figures(tmp_path):
    written = write(REPORT, tmp_path / "r.md")
    assert [path.name for path in written] == ["r-1.svg", "r-2.svg", "r-3.svg", "r.md"]
    text = (tmp_path / "r.md").read_text()
    assert "a **strong** claim in `code`, 1 \\< 2 & 2\\*3\\*4" in text
    assert "| kv | 1234567 |\n| text\\|x | - |" in text and "| --- | ---: |" in text
    assert "![prefix mass](r-1.svg)" in text and "```\np = 20\n```" in text
    for path in written[:3]:
        assert ET.fromstring(path.read_text()).tag.endswith("svg")
    assert "layer 0" in render(REPORT, "markdown")  # without files, figures are text


def test_html_is_whole_and_escaped():
    bad = "<script>alert(1)</script>"
    blocks = (Text(bad), Bullets((bad,)), Code(bad), Table((bad,), ((bad,),), bad))
    report = Report(bad, (Section(bad, blocks), *REPORT.sections))
    page = Tags()
    page.feed(render(report, "html"))
    assert "script" not in page.tags and page.text.count(bad) == 9
    assert page.tags.count("svg") == 3 and page.tags.count("table") == 2
    assert {"strong", "code", "ol", "pre"} <= set(page.tags)


def test_json_is_data_and_text(tmp_path):
    write(REPORT, tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["data"] == {"bytes": 20}
    kinds = [block["kind"] for section in found["sections"] for block in section["blocks"]]
    assert kinds == ["text", "bullets", "table", "code", "heatmap", "scatter", "lines"]
    assert found["sections"][2]["blocks"][2]["series"] == {"train": [[1, 2.0], [2, 1.0]]}


def test_the_terminal_gets_no_control_codes():
    report = Report("\x1b[31mred", (Section("s", (Text("a\x07b"), Table(("c",), (("\x1b]0;t\x07",),)), Code("x\ty"))),))
    assert not [char for char in render(report, "text") if not char.isprintable() and char != "\n"]


def test_figures_are_the_same_twice(tmp_path):
    for figure in (HEAT, SCATTER, LINES):
        assert to_svg(figure) == to_svg(figure)
    to_png(SCATTER, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_places_and_suffixes(tmp_path):
    with pytest.raises(ConfigError, match=r"suffix '.pdf'"):
        write(REPORT, tmp_path / "r.pdf")
    with pytest.raises(ConfigError, match=r"cannot write .*none"):
        write(REPORT, tmp_path / "none" / "r.txt")
    with pytest.raises(ValueError, match="row 0 has 1 cells for 2 columns"):
        Table(("a", "b"), (("x",),))


@given(st.text(alphabet="ab`*\n "))
def test_marks_lose_only_marks(text):
    parts = list(spans(text))
    marks = {"plain": "{}", "code": "`{}`", "strong": "**{}**"}
    assert "".join(marks[mark].format(part) for mark, part in parts) == text
    assert without_marks(text) == "".join(part for _, part in parts)
