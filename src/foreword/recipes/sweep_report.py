"""A sweep as a report: ranking, curves of all runs, the best two compared, the lines to paste."""

from __future__ import annotations

from foreword.recipes.memory import show_bytes
from foreword.recipes.space import setting_toml, show_setting
from foreword.recipes.sweep_result import Ranked, SweepResult
from foreword.report import Bullets, Code, Lines, Report, Section, Table, Text
from foreword.report.parts import Block, Cell
from foreword.train.curves import loss_figure

MEASURES = {
    "dev_loss": "dev loss in nats per target token, lower is better",
    "dev_metric": "the task's metric on dev rows, higher is better",
}


def sweep_report(result: SweepResult, *, curves: bool = True) -> Report:
    """Return the report of a finished sweep; without `curves` it fits a terminal."""
    sections = (
        Section("Best setting", _best(result)),
        Section("Ranking", (_ranking(result),)),
        *((Section("Curves", _curves(result)),) if curves else ()),
        Section("How it went", (_how(result),)),
    )
    return Report(f"Sweep of {result.task}", sections, result.to_json())


def _best(result: SweepResult) -> tuple[Block, ...]:
    best, blocks = result.best, list[Block]()
    if best.value is None:
        blocks.append(Text("**No setting** was ever judged: all diverged before their first evaluation."))
        return tuple(blocks)
    blocks.append(
        Text(f"**{best.name}** with `{show_setting(best.setting)}`: {best.value:.4f} ({MEASURES[result.measure]}).")
    )
    blocks.append(Code(setting_toml(best.setting)))
    if result.artefact is not None:
        blocks.append(Text(f"Its vectors: `{result.artefact}`"))
    if result.reports:
        rows = tuple((r.prefix, r.metric, r.score, *r.interval, r.num_rows, r.decoding) for r in result.reports)
        columns = ("run", "metric", "score", "95 % from", "to", "dev rows", "decoding")
        blocks.append(Table(columns, rows, "the best two settings answer the same dev rows"))
    if result.paired is not None:
        blocks.append(Text(_paired(result)))
    return tuple(blocks)


def _paired(result: SweepResult) -> str:
    paired = result.paired
    assert paired is not None
    low, high = paired.interval
    test = "" if paired.p_value is None else f", McNemar's p = {paired.p_value:.2g}"
    said = {
        "better": "the best is better than the second",
        "worse": "the second answers better, though its dev measure is worse",
        "no difference": "no difference is shown: take the cheaper one",
    }[paired.verdict]
    return (
        f"Paired on {paired.num_rows} dev rows: {paired.difference:+.4f} [{low:+.4f}, {high:+.4f}]{test}: {said}. "
        "Both were chosen on these rows, so judge the one you take on test rows."
    )


def _ranking(result: SweepResult) -> Table:
    keys = list(dict.fromkeys(key for ranked in result.ranking for key in ranked.setting))
    spread = any(ranked.spread for ranked in result.ranking)
    columns = ("run", *keys, result.measure, *(("least", "largest") if spread else ()), "steps", "status")
    rows = tuple(_row(ranked, keys, spread) for ranked in result.ranking)
    return Table(columns, rows, MEASURES[result.measure])


def _row(ranked: Ranked, keys: list[str], spread: bool) -> tuple[Cell, ...]:
    between = (ranked.spread or (None, None)) if spread else ()
    setting = (_cell(ranked.setting.get(key)) for key in keys)
    return (ranked.name, *setting, ranked.value, *between, ranked.steps, ranked.status)


def _cell(value: object) -> Cell:
    return value if isinstance(value, str | int | float) and not isinstance(value, bool) else str(value)


def _curves(result: SweepResult) -> tuple[Block, ...]:
    series = {}
    for ranked in result.ranking:
        for run in ranked.results:
            points = tuple((float(r["step"]), float(r[result.measure])) for r in run.history if result.measure in r)
            if points:
                series[f"{run.name} {show_setting(ranked.setting)}"] = points
    losses = {
        f"{run.name} {show_setting(ranked.setting)}": _smooth([float(row["loss"]) for row in run.history])
        for ranked in result.ranking
        for run in ranked.results
        if run.history
    }
    return (
        Lines("Dev rows", "step", MEASURES[result.measure].split(",")[0], series),
        loss_figure("Training loss, mean over ten steps", losses),
    )


def _smooth(losses: list[float], width: int = 10) -> tuple[tuple[float, float], ...]:
    parts = [losses[first : first + width] for first in range(0, len(losses), width)]
    return tuple((float(place * width + len(part)), sum(part) / len(part)) for place, part in enumerate(parts))


def _how(result: SweepResult) -> Bullets:
    options, memory = result.options, result.memory
    rungs = ", ".join(f"{rung:g}" for rung in options.rungs)
    halved = (
        f"at {rungs} of the steps the better {options.keep:.0%} went on" if rungs else "no setting was stopped early"
    )
    need = f"{memory.need.num_runs} runs at a time, {show_bytes(memory.need.total)} over the base by the plan"
    return Bullets(
        (
            f"{len(result.ranking)} settings, {options.seeds} seed{'' if options.seeds == 1 else 's'} each; {halved}; "
            f"{result.steps_saved:.0%} of all steps were not needed",
            f"passes: {memory.passes}; {need}",
            "runs that ended by themselves have the vectors that they would get alone; stopped ones keep their best",
        )
    )
