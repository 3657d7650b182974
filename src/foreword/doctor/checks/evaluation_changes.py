"""Checks of a change between then and now: is it more than noise, and is it the version that changed?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foreword.doctor.finding import Finding
from foreword.doctor.probe_training import skipped
from foreword.doctor.subjects import Evaluation
from foreword.errors import ForewordError
from foreword.eval.metrics import bootstrap, get_metric, percentile_interval
from foreword.eval.paired import compare_reports
from foreword.eval.report import EvalReport
from foreword.eval.run import NUM_RESAMPLES, right_answers

FLIPS = 2
"""Returns of an alias to a version that it had left, from which promotions count as flipping."""
NEUTRAL: Mapping[str, Any] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "stop": (),
    "logit_bias": {},
}
"""What leaving a parameter out means."""


def check_change(evaluation: Evaluation) -> Finding:
    """Gate promotions on the paired interval: judge old and new on the same rows, and several seeds where it matters.

    McNemar's test, or the paired bootstrap's interval where rows are not right or wrong, beside what is said of the
    change; and how often the alias went back to a version that it had left.
    """
    returns = _returns(evaluation.promotions)
    numbers: dict[str, Any] = {"returns": returns}
    if evaluation.old is None or evaluation.new is None:
        return skipped("change", "reports of the old and of the new version on the same rows")
    try:
        result = compare_reports(evaluation.new, evaluation.old)
    except ForewordError as error:
        return skipped("change", error.message)
    numbers |= {"difference": result.difference, "interval": list(result.interval), "p_value": result.p_value}
    noise = result.verdict == "no difference"
    claimed = evaluation.claimed_change
    wrong = noise and (claimed is not None or returns >= FLIPS)
    told = f"said to be {claimed}" if claimed else "nothing is said of it"
    moves = f"; the alias went back {returns} times" if evaluation.promotions else ""
    opposed = claimed is not None and not noise and claimed != result.verdict
    return Finding(
        check="change",
        ok=not (wrong or opposed),
        measured=f"{result.summary().replace(chr(10), '; ')}; {told}{moves}",
        expected="an interval without 0 where a difference is claimed or acted on",
        fix="Keep the version; gate on the interval, and judge more rows before the next move.",
        fault="metric-noise" if wrong else "",
        numbers=numbers,
    )


def check_traffic(evaluation: Evaluation) -> Finding:
    """Draw a new baseline from the requests of now: where base, old and new all fall, the requests changed.

    Each system's score on requests of then and of now, the difference with its interval by two independent bootstraps.
    """
    systems = [name for name in ("base", "old", "new") if {(name, "then"), (name, "now")} <= evaluation.traffic.keys()]
    if "old" not in systems or len(systems) < 2:
        return skipped("traffic", "the old version and another system (base or new), each on requests of then and now")
    changes = {}
    for name in systems:
        then, now = (evaluation.traffic[(name, time)] for time in ("then", "now"))  # type: ignore[index]
        try:
            changes[name] = _unpaired(then, now)
        except ForewordError as error:
            return skipped("traffic", error.message)
    fell = [name for name, (_, _, high) in changes.items() if high < 0.0]
    shifted = len(fell) == len(systems)
    measured = "; ".join(f"{name} {mean:+.3f} [{low:+.3f}, {high:+.3f}]" for name, (mean, low, high) in changes.items())
    return Finding(
        check="traffic",
        ok=not shifted,
        measured=f"from then to now: {measured}",
        expected="at least one system as good on the requests of now; else it is the requests that changed",
        fix="Take a new baseline on the requests of now, and train on some of them. Rolling back will not help.",
        fault="traffic-shift" if shifted else "",
        numbers={name: {"difference": mean, "interval": [low, high]} for name, (mean, low, high) in changes.items()},
    )


def check_decoding(evaluation: Evaluation) -> Finding:
    """Store the sampling parameters with the version, and compare effective ones, not those that a client sent.

    Parameters of then and now, what was left out set to what that means; and greedy answers to the same inputs under
    the parameters of then, which tell whether anything else changed besides.
    """
    if evaluation.decoding_then is None or evaluation.decoding_now is None:
        return skipped("decoding", "the effective sampling parameters of then and of now")
    then, now = (_effective(found) for found in (evaluation.decoding_then, evaluation.decoding_now))
    differ = {
        name: (then.get(name), now.get(name)) for name in sorted({*then, *now}) if then.get(name) != now.get(name)
    }
    pairs = list(zip(evaluation.greedy_then, evaluation.greedy_now, strict=False))
    same = sum(a == b for a, b in pairs)
    shown = "; ".join(f"{name} was {before!r}, is {after!r}" for name, (before, after) in differ.items())
    replay = f"; under the parameters of then {same} of {len(pairs)} greedy answers are the same" if pairs else ""
    return Finding(
        check="decoding",
        ok=not differ,
        measured=(shown or f"{len(then)} parameters are the same") + replay,
        expected="the parameters that the version was judged with",
        fix="Set them back, and keep them with the version.",
        fault="decoding-drift" if differ else "",
        numbers={"differ": {name: [_plain(a), _plain(b)] for name, (a, b) in differ.items()}, "greedy_same": same},
    )


def _returns(promotions: Any) -> int:
    """How often the alias went back to a version that it had left."""
    moves = [name for place, name in enumerate(promotions) if place == 0 or promotions[place - 1] != name]
    return sum(name in moves[:place] for place, name in enumerate(moves))


def _unpaired(then: EvalReport, now: EvalReport) -> tuple[float, float, float]:
    """Return now - then and its 95 % interval; the rows are others, so both are resampled by themselves."""
    drawn = []
    for seed, report in enumerate((then, now)):
        metric = get_metric(report.metric)
        counts = metric.count([row.output for row in report.rows], right_answers(metric.name, report.rows))
        drawn.append(bootstrap(metric, counts, NUM_RESAMPLES, seed))
    low, high = percentile_interval(drawn[1] - drawn[0])
    return now.score - then.score, low, high


def _effective(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with neutral values left out, lists as tuples; greedy decoding knows no top_p and no seed."""
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(value, str) and name == "stop":
            value = (value,)
        if value is None or value == NEUTRAL.get(name, object()) or (name == "top_k" and value == -1):
            continue
        found[name] = value
    if "temperature" not in found:
        found = {name: value for name, value in found.items() if name not in ("top_p", "top_k", "min_p", "seed")}
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
