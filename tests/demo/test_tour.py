"""The demo's tour, shortened: every room once, with a real server process."""

import pytest

from foreword.demo.tour import METHODS, TASKS, take_tour


@pytest.mark.slow
def test_the_tour_goes_through_every_room(tmp_path):
    told = []
    tour = take_tour(tmp_path, say=told.append, steps=6, test_rows=8)
    assert [(row.task, row.method) for row in tour.rows] == [(task, method) for task in TASKS for method in METHODS]
    assert [row.version for row in tour.rows] == [f"{task}@{number}" for task in TASKS for number in (1, 2)]
    assert all(0 <= row.score <= 1 and row.num_bytes > 0 for row in tour.rows)
    served = [answer.served for answer in tour.answers]
    assert served == [*(f"{task}@{number}" for task in TASKS for number in (1, 2)), "base-3m"]
    assert [answer.served for answer in tour.switched] == ["triage@1", "triage@2", "triage@1"]
    assert tour.switched[0].text == tour.switched[2].text
    assert len(told) == 6 and tour.to_json()["rows"][0]["task"] == "triage"
