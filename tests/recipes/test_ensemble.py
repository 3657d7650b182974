"""`ensemble`: votes with known answers, members in one batch as alone, joint = alone, costs."""

import dataclasses

import numpy as np
import pytest
import torch

from foreword.config import TrainConfig, load_task
from foreword.core.artefact import load_artefact
from foreword.errors import ConfigError
from foreword.eval.labels import LabelScores
from foreword.eval.run import Answers, answer_scored, evaluate
from foreword.eval.tasks import Task
from foreword.recipes.ensemble import ensemble, train_members, vote
from foreword.recipes.judging import engine_with
from foreword.train.loop import fit
from foreword.train.run import Run
from tests.bundled import write_task
from tests.recipes.cases import FAST, publish_trained, small


def free(*texts):
    return Answers(list(texts), ["stop"] * len(texts), "free")


def scored(*rows):
    return answer_scored(LabelScores(("a", "b", "c"), np.array(rows), np.zeros(len(rows))))


def test_a_majority_of_texts_and_ties_to_the_first(tmp_path):
    task = Task.from_toml(write_task(tmp_path))
    votes = vote(task, [free("x", "x", "1"), free("y", "z", "2"), free("y", "x", "3")])
    assert votes["majority"].texts == ["y", "x", "1"]


def test_consensus_takes_the_answer_most_like_the_others(tmp_path):
    task = Task.from_toml(write_task(tmp_path, metric="token_f1"))
    votes = vote(task, [free("something else"), free("the red old house"), free("the red house")])
    assert votes["consensus"].texts == ["the red old house"]  # it shares most with both


def test_label_votes():
    one, two, three = [0.5, 0.45, 0.05], [0.5, 0.45, 0.05], [0.01, 0.98, 0.01]
    votes = vote(None, [scored(one), scored(two), scored(three)])
    assert votes["majority"].texts == ["a"] and votes["mean"].texts == ["b"]  # two are unsure, one is certain
    assert votes["mean"].scores.probabilities.sum(axis=1) == pytest.approx(1)
    tied = vote(None, [scored([0.6, 0.4, 0.0]), scored([0.1, 0.9, 0.0])])
    assert tied["majority"].texts == ["b"]  # a tie goes to the higher mean log-probability


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members")
    with publish_trained(folder, methods=("kv", "prompt", "prefix")) as registry:
        found = {f"colour@{n}": load_artefact(registry.path(registry.resolve(f"colour@{n}"))) for n in (1, 2, 3)}
    return Task.from_toml(folder / "data" / "colour.toml"), found


@pytest.mark.parametrize("decoding", ["labels", "free"])
def test_members_answer_in_one_batch_as_they_do_alone(members, decoding):
    task, artefacts = members
    found = ensemble(small(), task, artefacts, limit=8, decoding=decoding)
    for name, artefact in artefacts.items():
        alone = evaluate(
            engine_with(small(), {name: artefact}), task, prefix=name, split="dev", limit=8, decoding=decoding
        )
        assert [row.output for row in found.members[name].rows] == [row.output for row in alone.rows]
        assert found.members[name].score == alone.score
    assert set(found.votes) == ({"majority", "mean"} if decoding == "labels" else {"majority"})
    assert found.num_requests == pytest.approx(3 * found.member_requests)
    assert all(test.score_b == found.members[found.best_member].score for test in found.paired.values())
    assert found.prefix_bytes > 0 and found.to_json()["members"]


def test_one_member_is_no_ensemble(members):
    task, artefacts = members
    with pytest.raises(ConfigError, match="an ensemble of 1 member"):
        ensemble(small(), task, {"a": artefacts["colour@1"]})
    with pytest.raises(ConfigError, match="an ensemble of 1 member"):
        train_members(small(), task, TrainConfig(), 1, out="x")


def test_joint_is_alone(tmp_path):
    """Contract 5: members trained together get the vectors that each gets by itself."""
    config, train = load_task(write_task(tmp_path), [f"train.{k}={v}" for k, v in FAST.items()] + ["train.method='kv'"])
    task = Task(config)
    made = train_members(small(), task, train, 3, out=tmp_path / "joint")
    assert list(made) == ["colour-kv-0", "colour-kv-1", "colour-kv-2"]
    tensors = [artefact.tensors["value.1"] for artefact in made.values()]
    assert not torch.equal(tensors[0], tensors[1])  # another order of rows
    run = Run(task, dataclasses.replace(train, seed=2), "alone")
    (alone,) = fit(small(), [run], out=tmp_path / "alone")
    a, b = made["colour-kv-2"].tensors, load_artefact(alone.artefact).tensors
    apart = torch.cat([(a[key] - b[key]).flatten() for key in a]).norm()
    assert apart <= 2e-3 * torch.cat([t.flatten() for t in b.values()]).norm()
