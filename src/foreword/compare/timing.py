"""Latency and throughput of the methods, measured by turns in one process, so that a machine's moods hit all alike.

Every request makes the same number of tokens, those of the median right answer, whatever the method would have said.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from foreword.compare.judging import Stage
from foreword.compare.plan import BASELINES
from foreword.core.compile import compile
from foreword.core.prompt import SoftPrompt
from foreword.core.template import encode_target
from foreword.engine.engine import Engine
from foreword.engine.request import Chunk, Request
from foreword.errors import BackendFailed
from foreword.eval.baselines import baseline_requests
from foreword.eval.tasks import Row, sample_rows

MIXED_ROUNDS = 3
CACHED = " cached"
"""Behind a text method's name: with its constant start kept as keys and values."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is timed: a method's requests, and the engine that answers them."""

    name: str
    engine: Engine
    requests: Sequence[Request]
    positions: float
    """Positions before the first answer token, median."""


@dataclass(slots=True)
class Times:
    """Measured so far; milliseconds, and tokens per second. Filled by `measure`."""

    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    positions: float = 0.0
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return medians and their parts, JSON-ready."""
        return {
            "first_token_ms": statistics.median(self.first) if self.first else None,
            "latency_ms": statistics.median(self.whole) if self.whole else None,
            "throughput_tokens_per_s": statistics.median(self.rates) if self.rates else None,
            "prompt_positions": self.positions,
            "error": self.error,
        }


def measure(stage: Stage, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return each method's times by name, those of cached text under `<method> cached`.

    Methods take turns request by request, in another order each round; the first round warms up. What fails is left
    out of the further rounds and says why.
    """
    settings = stage.plan.settings
    rows = sample_rows(stage.plan.task.rows("test"), max(settings.timing_rounds, settings.mixed_requests), seed=1)
    num_tokens = answer_tokens(stage)
    times: dict[str, Times] = {}
    subjects: list[Subject] = []
    for method in methods:
        try:
            found = make_subjects(stage, method, rows, num_tokens)
        except Exception as error:  # a method that cannot be timed is a dash in its row
            times[method] = Times(error=f"{type(error).__name__}: {error}")
            continue
        subjects += found
        times.update({subject.name: Times(positions=subject.positions) for subject in found})
    engines = [stage.engine, *([stage.lora.engine] if stage.lora else [])]
    for engine in engines:
        engine.start()
    _latencies(subjects, times, settings.timing_rounds)
    plain = [plain_request(stage, row, num_tokens) for row in rows]
    _throughputs(stage.engine, subjects, plain, times, settings.mixed_requests // 2, num_tokens)
    return {name: taken.to_json() for name, taken in times.items()}


def answer_tokens(stage: Stage) -> int:
    """Return the tokens of the median right answer of the test rows, its end included."""
    tokenizer, stop_ids = stage.base.tokenizer, stage.base.stop_ids
    rows = sample_rows(stage.plan.task.rows("test"), 200, seed=0)
    median = statistics.median(len(encode_target(tokenizer, row.target, stop_ids)) for row in rows)
    return max(2, min(round(median), stage.plan.task.config.max_new_tokens))


def make_subjects(stage: Stage, method: str, rows: Sequence[Row], num_tokens: int) -> list[Subject]:
    """Return a method's requests for `rows`; a text method also with its constant start as a prefix."""
    base, task, plan = stage.base, stage.plan.task, stage.plan
    exact = {"max_tokens": num_tokens, "ignore_eos": True, "stop": ()}
    if method in BASELINES:
        requests = baseline_requests(
            task, base.tokenizer, method, rows,  # type: ignore[arg-type]
            num_shots=plan.settings.num_shots, max_positions=base.spec.max_positions, seed=plan.train.seed,
        )  # fmt: skip
        requests = [dataclasses.replace(request, **exact) for request in requests]  # type: ignore[arg-type]
        positions = statistics.median(len(request.prompt_ids or ()) for request in requests)
        whole = Subject(method, stage.engine, requests, positions)
        return [whole, *_with_cached_start(stage, whole)]
    limit = task.input_limit(base.tokenizer, base.spec.max_positions, plan.run(method).template)
    fitted = [task.fit(row, base.tokenizer, limit) for row in rows]
    requests = [
        Request(
            prompt=row.input if row.messages is None else None,
            messages=row.messages,
            prefix=method,
            max_tokens=num_tokens,
            ignore_eos=True,
        )
        for row in fitted
    ]
    if method != "lora":
        return [Subject(method, stage.engine, requests, _soft_positions(stage, method, fitted))]
    assert stage.lora is not None
    requests = [stage.lora.rendered(request) for request in requests]
    positions = statistics.median(len(request.prompt_ids or ()) for request in requests)
    return [Subject(method, stage.lora.engine, requests, positions)]


def plain_request(stage: Stage, row: Row, num_tokens: int) -> Request:
    """Return the row's input as a request to the base itself: somebody else's traffic."""
    task, tokenizer = stage.plan.task, stage.base.tokenizer
    text = task.fit(dataclasses.replace(row, messages=None), tokenizer, task.config.max_input_tokens).input
    options: dict[str, Any] = {"max_tokens": num_tokens, "ignore_eos": True}
    if task.config.chat:
        return Request(messages=[{"role": "user", "content": text}], **options)
    return Request(prompt=text, **options)


def time_request(engine: Engine, request: Request) -> tuple[float, float]:
    """Return milliseconds to the first token and to the end of one request, alone on a started engine.

    Raises BackendFailed where it fails.
    """
    ended = threading.Event()
    arrivals: list[float] = []
    reasons: list[str] = []

    def on_chunk(chunk: Chunk) -> None:
        if chunk.token_ids:
            arrivals.append(time.perf_counter())
        if chunk.finish_reason is not None:
            reasons.append(chunk.finish_reason)
            ended.set()

    start = time.perf_counter()
    engine.submit(request, on_chunk)
    ended.wait()
    if reasons[0] in ("error", "abort") or not arrivals:
        raise BackendFailed(f"a timed request ended with {reasons[0]}")
    return 1000 * (arrivals[0] - start), 1000 * (arrivals[-1] - start)


def _latencies(subjects: Sequence[Subject], times: Mapping[str, Times], rounds: int) -> None:
    def turn(subject: Subject, number: int) -> None:
        request = subject.requests[number % len(subject.requests)]
        first, whole = time_request(subject.engine, request)
        if number:
            times[subject.name].first.append(first)
            times[subject.name].whole.append(whole)

    _take_turns(subjects, times, rounds, turn)


def _throughputs(
    base_engine: Engine,
    subjects: Sequence[Subject],
    plain: Sequence[Request],
    times: Mapping[str, Times],
    half: int,
    num_tokens: int,
) -> None:
    def turn(subject: Subject, number: int) -> None:
        own = [subject.requests[place % len(subject.requests)] for place in range(half)]
        others = [plain[place % len(plain)] for place in range(half)]
        start = time.perf_counter()
        if subject.engine is base_engine:
            subject.engine.generate([request for pair in zip(own, others, strict=True) for request in pair])
        else:  # other layers: two batches, one after the other
            subject.engine.generate(own)
            base_engine.generate(others)
        seconds = time.perf_counter() - start
        if number:
            times[subject.name].rates.append(2 * half * num_tokens / seconds)

    _take_turns(subjects, times, MIXED_ROUNDS, turn)


def _take_turns(
    subjects: Sequence[Subject], times: Mapping[str, Times], rounds: int, turn: Callable[[Subject, int], None]
) -> None:
    """Let every subject have its turn in every round, the order rotating; round 0 warms up."""
    left = [subject for subject in subjects if not times[subject.name].error]
    for number in range(rounds + 1):
        shift = number % max(len(left), 1)
        for subject in [*left[shift:], *left[:shift]]:
            try:
                turn(subject, number)
            except Exception as error:  # one subject's failure is its own
                times[subject.name].error = f"{type(error).__name__}: {error}"
                left = [other for other in left if other is not subject]


def _with_cached_start(stage: Stage, whole: Subject) -> list[Subject]:
    """Return the subject once more with what all its prompts start with compiled to a prefix; none where that is
    little."""
    prompts = [list(request.prompt_ids or ()) for request in whole.requests]
    shared = 0
    while all(len(prompt) > shared + 1 and prompt[shared] == prompts[0][shared] for prompt in prompts):
        shared += 1
    if shared < 2 or len(prompts) < 2:
        return []
    ids = prompts[0][:shared]
    name = whole.name + CACHED
    with torch.no_grad():
        rows = stage.base.embed(torch.tensor(ids, device=stage.base.device))
    stage.engine.add_prefix(name, compile(stage.base, SoftPrompt(rows), name=name))
    requests = [
        dataclasses.replace(request, prefix=name, prompt_ids=prompt[shared:])
        for request, prompt in zip(whole.requests, prompts, strict=True)
    ]
    return [Subject(name, whole.engine, requests, whole.positions)]


def _soft_positions(stage: Stage, method: str, rows: Sequence[Row]) -> float:
    prefix = stage.engine.prefixes[method]
    assert prefix.template is not None
    rendered = [
        prefix.template.render(stage.base.tokenizer, row.input)
        if row.messages is None
        else prefix.template.render_messages(stage.base.tokenizer, row.messages)
        for row in rows
    ]
    return prefix.num_positions + statistics.median(len(one.ids) for one in rendered)
