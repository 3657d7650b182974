"""The teacher's distributions: computed once, kept, trusted only when whole; 0 away from itself."""

import dataclasses

import pytest
import torch

from foreword.core.template import TaskTemplate
from foreword.distil import teacher as module
from foreword.distil.divergence import mean_divergences
from foreword.distil.prefixes import literal_prefix
from foreword.distil.teacher import teacher_targets
from foreword.train.data import Example
from foreword.train.loss import mean_losses
from tests.bundled import bundled

TEMPLATE = TaskTemplate("{soft:4}{input}", chat=True)
ROWS = [Example([4, 100 + index, 200, 2, 5, 300, 301 + index, 2], 3) for index in range(70)]


def block(base, ids=(1, 3, 700, 800, 900, 2)):
    return literal_prefix(base, ids, TEMPLATE, name="full", max_new_tokens=8)


def counted(monkeypatch):
    calls = []
    compute = module._compute

    def count(base, prefix, rows, k):
        calls.append(len(rows))
        return compute(base, prefix, rows, k)

    monkeypatch.setattr(module, "_compute", count)
    return calls


def test_the_teacher_is_no_distance_from_itself():
    base = bundled()
    full = block(base)
    rows = [
        dataclasses.replace(row, teacher=own)
        for row, own in zip(ROWS, teacher_targets(base, full, ROWS, 20), strict=True)
    ]
    assert mean_losses(base, [(full, rows)])[0] == pytest.approx(0, abs=1e-6)
    found = mean_divergences(base, ROWS, [full] * 70, {"self": [full] * 70, "none": [block(base, (1,))] * 70})
    assert found["self"] == pytest.approx(0, abs=1e-6)
    assert found["none"] > 0.01


def test_the_true_divergence_is_at_least_the_bucketed_one():
    base = bundled()
    full, none = block(base), block(base, (1,))
    targets = teacher_targets(base, full, ROWS[:5], 3)
    rows = [dataclasses.replace(row, teacher=own) for row, own in zip(ROWS, targets, strict=False)]
    true = mean_divergences(base, ROWS[:5], [full] * 5, {"none": [none] * 5})["none"]
    assert 0 < mean_losses(base, [(none, rows)])[0] <= true + 1e-6


def test_what_was_computed_is_read(tmp_path, monkeypatch):
    base, calls = bundled(), counted(monkeypatch)
    first = teacher_targets(base, block(base), ROWS, 20, tmp_path)
    assert calls == [64, 6]
    again = teacher_targets(base, block(base), ROWS, 20, tmp_path)
    assert calls == [64, 6]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.log_probs, other.log_probs)


def test_new_rows_alone_are_computed(tmp_path, monkeypatch):
    base, calls = bundled(), counted(monkeypatch)
    teacher_targets(base, block(base), ROWS[:64], 20, tmp_path)
    teacher_targets(base, block(base), ROWS, 20, tmp_path)
    assert calls == [64, 6]


@pytest.mark.parametrize("change", ["context", "k", "rows", "places"])
def test_nothing_else_is_mistaken_for_it(tmp_path, monkeypatch, change):
    base, calls = bundled(), counted(monkeypatch)
    rows = ROWS[:4]
    teacher_targets(base, block(base), rows, 20, tmp_path)
    prefix = block(base, (1, 3, 700, 801, 900, 2)) if change == "context" else block(base)
    if change == "rows":
        rows = ROWS[1:5]
    if change == "places":
        rows = [dataclasses.replace(row, spans=((1, 8),)) for row in rows]
    teacher_targets(base, prefix, rows, 10 if change == "k" else 20, tmp_path)
    assert calls == [4, 4]


@pytest.mark.parametrize("fault", ["cut", "flipped", "foreign"])
def test_a_broken_file_is_computed_again(tmp_path, monkeypatch, fault):
    base, calls = bundled(), counted(monkeypatch)
    first = teacher_targets(base, block(base), ROWS[:4], 20, tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if fault == "flipped":
        data[-3] ^= 0x40
    path.write_bytes({"cut": data[:-9], "flipped": data, "foreign": b"{}"}[fault])
    with pytest.warns(UserWarning, match=f"{path.name} is broken"):
        again = teacher_targets(base, block(base), ROWS[:4], 20, tmp_path)
    assert calls == [4, 4]
    assert all(torch.equal(one.log_probs, other.log_probs) for one, other in zip(first, again, strict=True))
    teacher_targets(base, block(base), ROWS[:4], 20, tmp_path)
    assert calls == [4, 4], "the new file is whole"
