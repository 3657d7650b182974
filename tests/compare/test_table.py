import pytest

from foreword.compare.table import by_bytes, by_latency, findings, overview, report, show_bytes
from foreword.report import Scatter, Table
from tests.compare.cases import comparison, paired, row

LEVEL = comparison(
    [
        row("hard_text", 0.10, 28, 5.0),
        row("prompt", 0.58, 9_000, 6.0, lr=1.0),
        row("kv", 0.60, 60_000, 6.0, lr=0.1),
        row("lora", 0.61, 650_000, 9.0, lr=0.002),
    ],
    [
        paired("hard_text", "lora", "best", -0.51, "worse"),
        paired("prompt", "lora", "best", -0.03, "no difference"),
        paired("kv", "lora", "best", -0.01, "no difference"),
        paired("prompt", "hard_text", "hard_text", 0.48, "better"),
        paired("kv", "hard_text", "hard_text", 0.50, "better"),
        paired("lora", "hard_text", "hard_text", 0.51, "better"),
    ],
)


def test_the_words_follow_the_tests():
    assert findings(LEVEL) == [
        "LoRA scores highest: exact_match 0.610 [0.560, 0.660] on 100 test rows.",
        "kv and prompt cannot be told from it on these rows.",
        "Worse than it: text (-0.510, p 0.001).",
        "Among those level with the best, prompt takes the fewest bytes per task (9 KB).",
        "Against the text alone, better: prompt (+0.480, p 0.001), kv (+0.500, p 0.001) and LoRA (+0.510, p 0.001).",
        "Nothing is both smaller and better than text (28 B, 0.100), prompt (9 KB, 0.580), kv (60 KB, 0.600)"
        " and LoRA (650 KB, 0.610).",
    ]


def test_a_clear_best_has_nobody_level_with_it():
    alone = comparison(
        [row("hard_text", 0.1, 28), row("kv", 0.9, 60_000)], [paired("hard_text", "kv", "best", -0.8, "worse")]
    )
    words = " ".join(findings(alone))
    assert "cannot be told" not in words and "fewest bytes" not in words


def test_the_text_can_be_the_best():
    found = comparison(
        [row("hard_text", 0.6, 28), row("kv", 0.5, 60_000)], [paired("kv", "hard_text", "best", -0.1, "worse")]
    )
    assert findings(found)[0].startswith("text scores highest")
    assert findings(found)[-1] == "Nothing is both smaller and better than text (28 B, 0.600)."
    table = report(found).sections[1].blocks[0]
    assert table.rows[0][3:5] == ("the best", None)
    assert table.rows[1][4] == "worse: -0.100 [-0.200, +0.000], p 0.001"


def test_nothing_learned_and_nothing_judged_are_said():
    zero = comparison([row("hard_text", 0.0), row("kv", 0.0)], [paired("kv", "hard_text", "best", 0, "no difference")])
    assert findings(zero)[0] == "No method scores above 0 on 100 test rows."
    error = {"type": "TrainingDiverged", "message": "loss nan at step 2", "hint": "Lower lr."}
    failed = comparison([row("kv", None, None, None, error=error)])
    assert findings(failed) == ["No method could be judged.", "kv failed: loss nan at step 2"]
    assert report(failed).sections


def test_the_pictures_hold_every_judged_row_and_mark_the_front():
    picture = by_bytes(LEVEL)
    assert picture.x_log and {point.label for point in picture.points} == {"text", "prompt", "kv", "LoRA"}
    assert all(point.on_front for point in picture.points)
    assert all(point.low < point.y < point.high for point in picture.points)
    slow = by_latency(LEVEL)
    assert not slow.x_log
    assert {point.label for point in slow.points if point.on_front} == {"text", "kv", "LoRA"}  # prompt: kv is as fast
    empty_text = comparison([row("hard_text", 0.2, 0)])
    assert by_bytes(empty_text).points[0].x == 1  # a logarithm needs something
    untimed = comparison([row("hard_text", 0.2), row("kv", 0.4, latency=None)])
    assert [point.label for point in by_latency(untimed).points] == ["text"]


def test_a_report_says_how_it_was_measured():
    made = report(LEVEL)
    assert [section.title for section in made.sections] == [
        "What it says", "Quality", "Cost", "Pareto pictures", "How it was measured"
    ]  # fmt: skip
    conditions = " ".join(made.sections[-1].blocks[0].items)
    for part in (
        "3 steps of 4 rows out of 32", "seed 0", "rank 8 on all-linear", "prompt 1, kv 0.1 and LoRA 0.002",
        "some processor, 1 of 2 cores", "torch 2", "2026-01-01", "by hand", "one after the other",
    ):  # fmt: skip
        assert part in conditions
    assert made.data == LEVEL.to_json()


def test_an_overview_marks_what_is_level_with_the_best():
    made = overview([LEVEL, LEVEL])
    scores = made.sections[0].blocks[0]
    assert isinstance(scores, Table) and scores.columns[3:] == ("text", "prompt", "kv", "LoRA")
    strong = [cell.startswith("**") for cell in scores.rows[0][3:]]
    assert strong == [False, True, True, True]
    assert [section.title for section in made.sections] == ["Scores", "Cost", "colour", "colour", "How it was measured"]
    assert isinstance(made.sections[2].blocks[-1], Scatter)
    assert len(made.data["tasks"]) == 2


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, None),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (15_360, "15.4 KB"),
        (6.5e8, "650 MB"),
        (2e13, "2e+04 GB"),
    ],
)
def test_bytes_are_shown_in_decimal_units(count, text):
    assert show_bytes(count) == text
