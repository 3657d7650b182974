"""Judge the methods on the same test rows by the same decoding, and test them against each other row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foreword.compare.lora import LoraEngine, load_lora
from foreword.compare.plan import BASELINES, Plan, digest
from foreword.compare.result import Paired
from foreword.compare.training import Trained
from foreword.core.artefact import file_sha256, load_artefact, write_atomically
from foreword.core.compile import compile
from foreword.core.model import FrozenModel
from foreword.engine.engine import Engine
from foreword.eval.baselines import Phrasing, choose_shots, evaluate_baseline
from foreword.eval.paired import compare_reports
from foreword.eval.report import EvalReport
from foreword.eval.run import evaluate

JUDGED, REPORT = "judged.json", "report.json"
ALPHA = 0.05


class Stage:
    """The base with everything on it that answers: one engine for text and vectors, one for LoRA."""

    def __init__(self, base: FrozenModel, plan: Plan) -> None:
        self.base, self.plan = base, plan
        self.engine = Engine(base)
        self.lora: LoraEngine | None = None

    def add(self, trained: Trained, folder: Path) -> None:
        """Make a trained method ready to answer."""
        assert trained.file is not None
        if trained.method == "lora":
            template = self.plan.run("lora").template
            self.lora = LoraEngine(load_lora(self.base, (folder / trained.file).parent), "lora", template)
        else:
            self.engine.add_prefix(trained.method, compile(self.base, load_artefact(folder / trained.file)))


def judge_method(stage: Stage, method: str, folder: Path, trained: Trained | None) -> EvalReport:
    """Return the method's report on the test rows, from `folder` where the same was judged before."""
    plan, settings = stage.plan, stage.plan.settings
    identity = {
        "method": method,
        "task": plan.task.config.to_json() | {"train": "", "dev": "", "test": ""},
        "test": plan.task.data_sha256("test"),
        "shots": plan.task.data_sha256("train") if method == "few_shot" else "",
        "num_shots": settings.num_shots if method == "few_shot" else 0,
        "rows_limit": settings.rows_limit,
        "decoding": settings.decoding,
        "seed": plan.train.seed,
        "base": stage.base.fingerprint.to_json(),
        "file": file_sha256(folder / trained.file) if trained and trained.file else "",
    }
    if _read_identity(folder) == digest(identity):
        return EvalReport.load(folder / REPORT)
    options: dict[str, Any] = {
        "split": "test",
        "limit": settings.rows_limit,
        "decoding": settings.decoding,
        "seed": plan.train.seed,
        "out": folder / REPORT,
    }
    if method in BASELINES:
        shots = settings.num_shots
        report = evaluate_baseline(stage.engine, plan.task, method, num_shots=shots, **options)  # type: ignore[arg-type]
    elif method == "lora":
        assert stage.lora is not None
        report = evaluate(stage.lora, plan.task, prefix="lora", **options)
    else:
        report = evaluate(stage.engine, plan.task, prefix=method, **options)
    write_atomically(folder / JUDGED, json.dumps({"identity": digest(identity)}).encode())
    return report


def text_bytes(plan: Plan, method: str) -> int:
    """Return the UTF-8 bytes of what a text method keeps for the task: instruction, and for few_shot its examples."""
    phrasing = Phrasing.of(plan.task)
    around = phrasing.before + phrasing.after
    texts = [phrasing.once, phrasing.system or "", around]
    if method == "few_shot":
        for shot in choose_shots(plan.task, plan.settings.num_shots, plan.train.seed):
            texts += [around, phrasing.lead, shot.input, shot.target]
    return sum(len(text.encode()) for text in texts)


def paired_tests(reports: Mapping[str, EvalReport], seed: int) -> tuple[Paired, ...]:
    """Test every method against the best one and against the hard text, on the same rows.

    The best is the one with the highest score, so its own luck is on its side; 5 % are shared evenly among the tests
    of a kind (Bonferroni). Where the hard text is the best, the two kinds are one.
    """
    if not reports:
        return ()
    best = max(reports, key=lambda method: reports[method].score)
    found = []
    for role, against in (("best", best), ("hard_text", "hard_text")):
        others = [method for method in reports if method != against]
        if against not in reports or not others or (role == "hard_text" and best == "hard_text"):
            continue
        alpha = ALPHA / len(others)
        for method in others:
            result = compare_reports(reports[method], reports[against], seed=seed, alpha=alpha)
            found.append(
                Paired(
                    method=method,
                    against=against,
                    role=role,
                    difference=result.difference,
                    interval=result.interval,
                    p_value=result.p_value,
                    only_method=result.only_a,
                    only_against=result.only_b,
                    alpha=alpha,
                    verdict=result.verdict,
                )
            )
    return tuple(found)


def _read_identity(folder: Path) -> str | None:
    try:
        identity: str = json.loads((folder / JUDGED).read_bytes())["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return identity if (folder / REPORT).exists() else None
