"""The tour: four small tasks trained together on the bundled base, judged, published, served, promoted, rolled back.

Everything happens in one folder, with a registry of its own and a real server process on a free port.
"""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.errors import BackendFailed

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.eval.report import EvalReport
    from foreword.registry.store import Registry
    from foreword.train.loop import Progress
    from foreword.train.run import Run, RunResult

HERE = Path(__file__).parent
BASE = HERE / "base-3m"
TASKS = ("triage", "clause", "handbook", "order_slots")
METHODS = ("prompt", "kv")
STEPS = {"prompt": 160, "kv": 160}
START_S = 120.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the final table."""

    task: str
    method: str
    num_bytes: int
    """Of the vectors; 0 for the hard text."""
    version: str
    metric: str
    baseline: float
    score: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer over HTTP."""

    model: str
    served: str
    """The version in the response header."""
    text: str


@dataclass(frozen=True, slots=True)
class Tour:
    """What the tour found."""

    rows: tuple[Row, ...]
    answers: tuple[Answer, ...]
    switched: tuple[Answer, ...]
    """The same request to `triage` before promotion, after it, after the rollback."""
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        import dataclasses

        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]


def take_tour(
    folder: Path,
    *,
    say: Callable[[str], None] = print,
    on_progress: Callable[[Progress], None] | None = None,
    steps: int | None = None,
    test_rows: int | None = None,
) -> Tour:
    """Run the tour in `folder`, which must not hold an earlier one. `steps` and `test_rows` shorten it."""
    from transformers.utils import logging

    from foreword.core.model import load_base
    from foreword.registry.store import Registry
    from foreword.train.loop import fit

    clock = _Clock()
    logging.disable_progress_bar()  # the bundled base loads in a moment
    base = load_base(str(BASE))
    runs = [_run(task, method, steps) for task in TASKS for method in METHODS]
    say(f"base-3m, {base.spec.num_parameters:,} frozen parameters; {len(TASKS)} tasks, a prompt and a prefix for each")
    say("1. train all of them in one pass")
    results = fit(base, runs, out=folder / "runs", on_progress=on_progress)
    clock.lap("train")
    say("2. judge on test rows, most with phrasings that training never saw, beside the hard text alone")
    reports = _judge(base, runs, results, test_rows)
    clock.lap("judge")
    say("3. publish: version 1 of each task is its prompt, version 2 its prefix; `prod` is version 1")
    with Registry.open(folder / "registry") as registry:
        versions = _publish(registry, runs, results, reports)
        clock.lap("publish")
        say("4. serve them by name and ask all of them, and the plain base, at once")
        with serving(folder / "registry") as url:
            answers = ask_together(url, _questions())
            say("5. promote triage from version 1 to 2 while the server runs, then roll back")
            switched = _switch(registry, url)
    clock.lap("serve")
    rows = [
        Row(
            task=run.task.name,
            method=run.config.method,
            num_bytes=versions[run.name].num_bytes,
            version=versions[run.name].reference,
            metric=report.metric,
            baseline=baseline.score,
            score=report.score,
            interval=report.interval,
        )
        for run, (report, baseline) in zip(runs, reports, strict=True)
    ]
    return Tour(tuple(rows), tuple(answers), tuple(switched), clock.laps)


def _run(task: str, method: str, steps: int | None) -> Run:
    from foreword.train.run import Run

    return Run.from_toml(HERE / "tasks" / task / f"{task}.toml", method=method, steps=steps or STEPS[method])


def _judge(
    base: FrozenModel, runs: Sequence[Run], results: Sequence[RunResult], limit: int | None
) -> list[tuple[EvalReport, EvalReport]]:
    """Return each run's report and its task's hard-text baseline, both constrained to the labels where there are."""
    from foreword.core.artefact import load_artefact
    from foreword.core.compile import compile
    from foreword.engine.engine import Engine
    from foreword.eval.run import evaluate

    engine = Engine(base, kv_memory="256MiB")
    baselines: dict[str, EvalReport] = {}
    reports = []
    for run, result in zip(runs, results, strict=True):
        assert result.artefact is not None
        engine.add_prefix(run.name, compile(base, load_artefact(result.artefact)))
        name = run.task.name
        if name not in baselines:
            baselines[name] = evaluate(engine, run.task, prefix=None, limit=limit)
        reports.append((evaluate(engine, run.task, prefix=run.name, limit=limit), baselines[name]))
    return reports


def _publish(
    registry: Registry,
    runs: Sequence[Run],
    results: Sequence[RunResult],
    reports: Sequence[tuple[EvalReport, EvalReport]],
) -> dict[str, Any]:
    versions = {}
    for run, result, (report, _) in zip(runs, results, reports, strict=True):
        assert result.artefact is not None
        first = run.config.method == METHODS[0]
        why = f"{report.metric} {report.score:.3f} on test"
        versions[run.name] = registry.publish(
            result.artefact, alias="prod" if first else None, who="demo", why=why, evaluation=report.to_json()
        )
    return versions


@contextmanager
def serving(home: Path) -> Iterator[str]:
    """Start `foreword serve` on a free port in a process of its own; yield its URL; stop it at the end."""
    command = [sys.executable, "-m", "foreword", "serve", "--base", str(BASE), "--port", "0", "--json"]
    log = home.parent / "server.log"
    command += ["--home", str(home)]
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                raise BackendFailed(f"the server did not start, exit code {server.wait()}", hint=f"See {log}.")
            yield json.loads(line)["url"]
        finally:
            server.terminate()
            server.wait(START_S)


def ask(url: str, model: str, text: str) -> Answer:
    """Send one chat request; the base itself answers at most 12 tokens."""
    import httpx

    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
    if model == BASE.name:
        body["max_tokens"] = 12
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=START_S)
    response.raise_for_status()
    text = response.json()["choices"][0]["message"]["content"]
    return Answer(model, response.headers.get("x-foreword-version", model), text)


def ask_together(url: str, questions: Sequence[tuple[str, str]]) -> list[Answer]:
    """Send all requests at once, so that they share batches in the engine."""
    with concurrent.futures.ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(lambda question: ask(url, *question), questions))


def _questions() -> list[tuple[str, str]]:
    """Return one test input for every task and version, and one for the plain base."""
    firsts = {}
    for task in TASKS:
        line = (HERE / "tasks" / task / "test.jsonl").read_text().splitlines()[0]
        firsts[task] = json.loads(line)["input"]
    asked = [(model, firsts[task]) for task in TASKS for model in (task, f"{task}@2")]
    return [*asked, (BASE.name, firsts["triage"])]


def _switch(registry: Registry, url: str) -> list[Answer]:
    """Ask `triage` before its promotion to version 2, after it, and after the rollback."""
    text = _questions()[0][1]
    answers = [ask(url, "triage", text)]
    registry.promote("triage@2", who="demo", why="to show a promotion")
    answers.append(_ask_until(url, text, "triage@2"))
    registry.rollback("triage", who="demo", why="to show that it is one command")
    answers.append(_ask_until(url, text, "triage@1"))
    return answers


def _ask_until(url: str, text: str, version: str, patience_s: float = 10.0) -> Answer:
    """Ask until the server has taken up an alias move, which it does within a second."""
    deadline = time.monotonic() + patience_s
    while True:
        answer = ask(url, "triage", text)
        if answer.served == version:
            return answer
        if time.monotonic() > deadline:
            raise BackendFailed(f"the server answers with {answer.served}, the registry says {version}")
        time.sleep(0.1)


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 1)
        self._last = now
