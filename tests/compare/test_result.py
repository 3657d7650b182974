import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.compare.result import Comparison, MeasuredRow, load_comparisons, pareto_front, save_all
from foreword.errors import DataError
from tests.compare.cases import comparison, paired, row

POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


def dominates(a, b):
    return a[0] <= b[0] and a[1] >= b[1] and a != b


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points):
    numbered = list(enumerate(points))
    front = pareto_front(numbered, lambda item: item[1][0], lambda item: item[1][1])
    places = {place for place, _ in front}
    for place, point in numbered:
        beaten = any(dominates(other, point) for other in points)
        assert (place in places) is not beaten
        if beaten:  # by one that stands on the front itself
            assert any(dominates(points[chosen], point) for chosen in places)
    assert [place for place, _ in front] == sorted(places)


def test_the_front_keeps_equals_and_drops_the_dearer():
    items = [(10, 0.5), (10, 0.5), (11, 0.5), (10, 0.4), (1, 0.1)]
    assert pareto_front(items, lambda item: item[0], lambda item: item[1]) == [(10, 0.5), (10, 0.5), (1, 0.1)]


def made():
    rows = [
        row("hard_text", 0.1, 28),
        row("kv", 0.6, 6000, kept={"step": 3, "by": "dev_loss", "value": 0.2}),
        row("lora", 0.6, 9000),
        row("prompt", None, None, error={"type": "TrainingDiverged", "message": "loss nan", "hint": ""}),
    ]
    tests = [paired("hard_text", "kv", "best", -0.5, "worse"), paired("lora", "kv", "best", 0.0, "no difference")]
    return comparison(rows, tests)


def test_json_and_back():
    whole = made()
    assert Comparison.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_the_json_is_the_shared_schema():
    data = made().to_json()
    assert {"base", "task", "rows", "budget", "versions", "date"} <= data.keys()
    shared = {"method", "score", "interval", "metric", "bytes_per_task", "training_s", "training_peak_bytes"}
    assert all(shared | {"latency_ms", "throughput_tokens_per_s"} <= part.keys() for part in data["rows"])
    assert data["rows"][1]["interval"] == [pytest.approx(0.55), pytest.approx(0.65)]


def test_one_or_several_in_a_file(tmp_path):
    made().save(tmp_path / "one.json")
    assert load_comparisons(tmp_path / "one.json") == [made()]
    save_all([made(), made()], tmp_path / "two.json", {"what": "a bake-off"})
    assert load_comparisons(tmp_path / "two.json") == [made(), made()]
    assert json.loads((tmp_path / "two.json").read_text())["what"] == "a bake-off"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tasks": [{}]}', '{"tasks": 3}', '{"rows": [{"methud": 1}]}', "3"])
def test_a_file_that_holds_no_comparison_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        load_comparisons(tmp_path / "x.json")
    with pytest.raises(DataError, match="cannot read"):
        load_comparisons(tmp_path / "gone.json")


def test_best_is_the_highest_score_then_the_fewest_bytes():
    whole = made()
    assert whole.best is not None and whole.best.method == "kv"
    assert [one.method for one in whole.judged] == ["kv", "lora", "hard_text"]
    assert [one.method for one in whole.level_with_best()] == ["kv", "lora"]
    assert comparison([row("kv", None, None)]).best is None


def test_a_row_has_dashes_for_what_was_not_measured():
    assert MeasuredRow.from_json(MeasuredRow(method="kv").to_json()) == MeasuredRow(method="kv")
