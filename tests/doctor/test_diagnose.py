"""Diagnosis, its report, the bisection, and the two classic cases as they stand in examples/."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from foreword.doctor.checks.implementation import CHECKS
from foreword.doctor.diagnose import Diagnosis, Step, bisect, diagnose, run_checks
from foreword.doctor.faults import FAULTS
from foreword.doctor.finding import Finding
from foreword.errors import BackendFailed
from foreword.report import render
from tests.doctor.planted import cached, made
from tests.tiny import tiny

EXAMPLES = Path(__file__).parents[2] / "examples/doctor"
GOOD = Finding(check="good", ok=True, measured="0.1")
BAD = Finding(check="bad", ok=False, measured="KL 3.7", expected="at most 0.1", fix="Cut it.", fault="logits-uncut")
AWAY = Finding(check="away", ok=True, skipped=True, measured="not made: it needs a server")


def test_the_first_finding_that_does_not_hold_is_the_cause():
    second = Finding(check="later", ok=False, measured="x", fault="numerics")
    diagnosis = Diagnosis(findings=(GOOD, AWAY, BAD, second, BAD), subject="a thing")
    assert diagnosis.first is BAD
    assert not diagnosis.ok
    assert diagnosis.faults == ("logits-uncut", "numerics")
    told = json.loads(json.dumps(diagnosis.to_json()))
    assert told["first"]["measured"] == "KL 3.7"
    assert told["faults"] == ["logits-uncut", "numerics"]
    assert Diagnosis(findings=(GOOD, AWAY)).ok


def test_the_report_shows_cause_proof_and_cure_and_what_was_not_made():
    text = render(Diagnosis(findings=(GOOD, AWAY, BAD), subject="a thing").report(), "markdown")
    for part in ("Diagnosis of a thing", "logits-uncut", "KL 3.7", "at most 0.1", "Cut it.", "needs a server"):
        assert part in text
    assert text.index("KL 3.7") < text.index("0.1 |") if "0.1 |" in text else True
    healthy = render(Diagnosis(findings=(GOOD, AWAY)).report(), "text")
    assert "1 checks were made, and all hold. 1 could not be made" in " ".join(healthy.split())


def test_a_diagnosis_of_a_system_is_json_and_markdown():
    base = tiny("llama")
    diagnosis = diagnose(cached(base, made(base, "kv"), start=0))
    assert json.loads(json.dumps(diagnosis.to_json()))["first"]["fault"] == "positions-unshifted"
    assert "kv with 5 vectors on llama" in render(diagnosis.report(), "markdown")


def test_a_check_that_raises_becomes_a_finding_and_the_others_go_on():
    def check_this_thing(subject):
        raise KeyError("no such")

    def check_refused(subject):
        raise BackendFailed("the server is gone", hint="Start it.")

    found = list(run_checks([check_this_thing, check_refused, lambda subject: GOOD], None))
    assert [finding.skipped for finding in found] == [True, True, False]
    assert found[0].check == "this-thing"
    assert "KeyError" in found[0].measured
    assert found[1].measured == "not made: its probe failed with the server is gone"


def test_only_known_subjects_are_examined():
    with pytest.raises(TypeError, match="examines Implementation, TrainingRun, Evaluation, not str"):
        diagnose("a path")


def test_every_check_has_advice_and_names_known_faults():
    source = "".join(
        (Path(__file__).parents[2] / f"src/foreword/doctor/checks/{name}.py").read_text()
        for name in ("implementation_form", "implementation_effect", "implementation_use")
    )
    named = set(re.findall(r'"([a-z]+(?:-[a-z]+)+|numerics|nondeterminism)"', source))
    promised = {
        "mask-blind", "positions-unshifted", "padding-between", "right-padded-generation", "logits-uncut",
        "outputs-kept", "layers-tied", "embeddings-only", "checkpointing-drops-prefix", "wrong-shape",
        "keys-misrotated", "window-eviction", "layers-dropped", "injected-again", "nondeterminism", "base-trainable",
        "not-finite", "numerics",
    }  # fmt: skip
    assert promised <= named
    assert promised <= FAULTS.keys()
    for check in CHECKS:
        assert len(check.__doc__.strip().splitlines()) > 1, check.__name__


def test_bisection_stops_at_the_first_step_that_differs():
    ran = []

    def step(name, *findings):
        return Step(name=name, run=lambda: ran.append(name) or findings)

    diagnosis = bisect([step("digests", GOOD), step("trace", GOOD, BAD, AWAY), step("decoding", GOOD)], "a rollout")
    assert ran == ["digests", "trace"]
    assert diagnosis.first is BAD
    assert [finding.check for finding in diagnosis.findings] == ["digests", "bad", "good", "away"]
    assert diagnosis.findings[0].measured == "cleared: good: 0.1"
    assert diagnosis.subject == "a rollout"


def test_bisection_goes_on_over_what_cannot_be_made():
    def fails():
        raise BackendFailed("no answer")

    diagnosis = bisect([Step(name="server", run=fails), Step(name="away", run=lambda: [AWAY]),
                        Step(name="none", run=list), Step(name="last", run=lambda: [BAD])])  # fmt: skip
    assert [finding.skipped for finding in diagnosis.findings] == [True, True, True, False]
    assert "the step failed with no answer" in diagnosis.findings[0].measured
    assert "it needs a server" in diagnosis.findings[1].measured
    assert diagnosis.first is BAD


def run_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("prompt_called_prefix", [("embeddings-only",), ()]),
        ("slow_and_worse", [("outputs-kept", "layers-tied"), ("layers-tied",), ()]),
    ],
)
def test_the_classic_cases_run_as_their_walk_through_tells(name, faults, capsys):
    found = run_example(name)
    assert [diagnosis.faults for diagnosis in found] == faults
    assert [diagnosis.first and diagnosis.first.fault for diagnosis in found] == [(f or (None,))[0] for f in faults]
    printed = capsys.readouterr().out
    page = (EXAMPLES / name / "README.md").read_text()
    quoted = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    assert quoted
    for block in quoted:
        for line in block.strip().splitlines():
            if line.startswith(("Measured", "sequence-lengths", "sites", "layers-distinct", "conformance ")):
                assert _comparable(line) in _comparable(printed), line


def _comparable(text):
    """Return the text with one space between words and figures of rounding alone, below 1e-9, made equal."""
    return re.sub(r"[\d.]+e-[1-9]\d\b", "0", " ".join(text.split()))
