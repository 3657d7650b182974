"""The evaluator on the embedded engine and the bundled base, against the model's own logits."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DEMO = Path(__file__).parents[2] / "src/foreword/demo"


@pytest.fixture(scope="module")
def engine() -> Any:
    from foreword.core.compile import compile
    from foreword.core.prompt import SoftPrompt
    from foreword.engine.engine import Engine
    from tests.bundled import bundled

    base, task = bundled(), triage()
    block = task.template.block(base.tokenizer)
    assert block.num_soft == len(SOFT)
    prefix = compile(base, SoftPrompt(base.embedding.weight[SOFT].detach(), block), name="triage")
    engine = Engine(base)
    engine.add_prefix("triage", dataclasses.replace(prefix, template=task.template))
    return engine


SOFT = list(range(100, 120))
"""The prompt's vectors are these tokens' embeddings, so that ids alone give the same logits."""


def triage() -> Any:
    from foreword.eval.tasks import Task

    return Task.from_toml(DEMO / "tasks/triage/triage.toml")


def test_label_probabilities_are_the_models_own(engine: Any) -> None:
    import torch

    from foreword.core.template import encode_target
    from foreword.eval.run import evaluate

    task, base = triage(), engine.base
    report = evaluate(engine, task, prefix="triage", limit=2)
    labels = task.labels()
    left: list[int] = []
    for piece in task.template.block(base.tokenizer).segments:
        left += SOFT if isinstance(piece, int) else piece
    targets = [encode_target(base.tokenizer, label, base.stop_ids) for label in labels]
    for judged in report.rows:  # the chain over every token, the end token included
        prompt = [*left, *task.template.render(base.tokenizer, judged.input).ids]
        expected = []
        for target in targets:
            with torch.no_grad():
                logits = base.model(torch.tensor([[*prompt, *target]]), logits_to_keep=len(target) + 1).logits[0]
            chance = 1.0
            for depth, token in enumerate(target):
                others = sorted({other[depth] for other in targets if other[:depth] == target[:depth]})
                chance *= float(logits[depth][others].double().softmax(0)[others.index(token)])
            expected.append(chance)
        assert judged.probabilities is not None
        np.testing.assert_allclose([judged.probabilities[label] for label in labels], expected, atol=2e-4)
        assert sum(judged.probabilities.values()) == pytest.approx(1)


def test_free_answers_and_baselines_run_and_repeat(engine: Any, tmp_path: Path) -> None:
    from foreword.eval.baselines import evaluate_baselines
    from foreword.eval.paired import compare_reports
    from foreword.eval.run import evaluate

    task = triage()
    first, again = (evaluate(engine, task, prefix="triage", limit=2, decoding="free") for _ in range(2))
    assert [row.output for row in first.rows] == [row.output for row in again.rows]
    reports = [first, *evaluate_baselines(engine, task, limit=2, num_shots=1)]
    assert len({report.data_sha256 for report in reports}) == 1
    assert {compare_reports(a, b).num_rows for a, b in pairwise(reports)} == {2}
