"""What `foreword top` draws: totals, and tables sorted by traffic that fit the terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foreword.cli.output import plain

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from foreword.serve.watch.readings import Quantiles, TenantView, View

TOTALS = 4
"""Lines of the totals."""
WIDE = 100
"""Columns of a terminal from which on every number is shown."""
FEWEST = 2
"""Rows that a table keeps on a low screen, with the one that says how many more there are."""
SILENT_S = 5.0
GOOD, WARN, BAD, DIM = "green", "yellow", "bold red", "dim"

Cell = str | tuple[str, str]
"""A text, or a text and its style."""


@dataclass(frozen=True, slots=True)
class _Section:
    """A table before it is drawn."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    names: int = 1
    """Leading columns that are text; the others are numbers."""


def screen(seen: View, url: str, problem: str = "", *, width: int, height: int | None = None) -> RenderableType:
    """Return what is shown of a view; with a height, long tables are cut and say so."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_head(seen, url)]
    if problem:
        parts.append(Text(f"{plain(problem)}; what is shown is old", BAD, no_wrap=True, overflow="ellipsis"))
    parts += [Text(), _totals(seen)]
    if seen.errors:
        kinds = "   ".join(f"{plain(kind)} {rate(value)}/s" for kind, value in seen.errors.items())
        parts.append(Text(f"errors: {kinds}", BAD, no_wrap=True, overflow="ellipsis"))
    sections = [_tasks(seen, width >= WIDE), _routes(seen), _tenants(seen), _replicas(seen)]
    sections = [section for section in sections if section.rows]
    wanted = [len(section.rows) for section in sections]
    room = None if height is None else height - (len(parts) - 1 + TOTALS) - len(sections) - 1
    is_spaced = room is None or sum(wanted) + len(sections) + 1 <= room
    for section, limit in zip(sections, _shared(wanted, room), strict=True):
        parts += [*([Text()] if is_spaced else []), _table(section, limit)]
    parts += [*([Text()] if is_spaced else []), _residents(seen)]
    return Group(*parts)


def _shared(wanted: Sequence[int], room: int | None) -> list[int]:
    """Return how many rows each table gets: all, or as many as there is room for; the longest is cut first."""
    given = list(wanted)
    while room is not None and sum(given) > room and max(given, default=0) > FEWEST:
        longest = max(range(len(given)), key=lambda place: (given[place], place))
        given[longest] -= 1
    return given


def _head(seen: View, url: str) -> Text:
    from rich.text import Text

    engine = ("engine up", GOOD) if seen.is_engine_up else ("engine down", BAD)
    parts: list[Cell] = [("foreword top", "bold"), plain(url), plain(seen.version), engine]
    if seen.snapshot_age_s is not None and seen.snapshot_age_s > SILENT_S:
        parts.append((f"registry silent for {seconds(seen.snapshot_age_s)}", BAD))
    parts.append((f"{time.strftime('%H:%M:%S')}, over {seen.seconds:.0f} s", DIM))
    return Text("   ", no_wrap=True, overflow="ellipsis").join(_text(part) for part in parts)


def _totals(seen: View) -> Table:
    from rich.table import Table

    errors = sum(seen.errors.values())
    columns: list[list[tuple[str, Cell]]] = [
        [
            ("requests/s", (rate(seen.requests), "bold")),
            ("errors/s", (rate(errors), BAD if errors else "bold")),
            ("tok/s in", (rate(seen.prompt_tokens), "bold")),
            ("tok/s out", (rate(seen.completion_tokens), "bold")),
        ],
        [
            ("running", count(seen.running)),
            ("waiting", count(seen.waiting)),
            ("streams", count(seen.open_streams)),
            ("bad keys/s", (rate(seen.auth_failures), WARN if seen.auth_failures else "")),
        ],
        [
            ("first p50", (seconds(seen.first_token.p50), "bold")),
            ("first p95", (seconds(seen.first_token.p95), "bold")),
            ("token p50", seconds(seen.token.p50)),
            ("token p95", seconds(seen.token.p95)),
        ],
        [
            ("queue p50", seconds(seen.queue.p50)),
            ("queue p95", seconds(seen.queue.p95)),
            ("loads/s", rate(seen.loads)),
            ("load err/s", (rate(seen.load_failures), BAD if seen.load_failures else "")),
        ],
    ]
    grid = Table.grid(padding=(0, 1))
    for place in range(len(columns)):
        grid.add_column(style=DIM, no_wrap=True)
        grid.add_column(justify="right", no_wrap=True, min_width=7)
        if place < len(columns) - 1:
            grid.add_column(width=1)
    for place in range(TOTALS):
        cells = [[_text((name, DIM)), _text(value), _text("")] for name, value in (of[place] for of in columns)]
        grid.add_row(*[cell for triple in cells for cell in triple][:-1])
    return grid


def _tasks(seen: View, is_wide: bool) -> _Section:
    rows: list[list[Cell]] = []
    for task in seen.tasks:
        for place, version in enumerate(task.versions):
            style = "" if version.requests else DIM
            first, token = (task.first_token, task.token) if place == 0 else (None, None)
            texts = [
                plain(version.version),
                rate(version.requests),
                rate(version.errors),
                *([rate(version.prompt_tokens)] if is_wide else []),
                rate(version.completion_tokens),
                *_pair(first),
                *_pair(token)[: 1 + is_wide],
            ]
            cells: list[Cell] = [(text, style) for text in (plain(task.task) if place == 0 else "", *texts)]
            if version.errors:
                cells[3] = (rate(version.errors), BAD)
            rows.append(cells)
    tokens = ("tok/s in",) if is_wide else ()
    columns = ("task", "version", "req/s", "err/s", *tokens, "tok/s out", "first p50", "p95", "token p50", "p95")
    return _Section(columns if is_wide else columns[:-1], rows)


def _routes(seen: View) -> _Section:
    rows: list[list[Cell]] = []
    for canary in seen.canaries:
        total = canary.canary + canary.stable + canary.failed
        share = f"{100 * canary.canary / total:.1f} % of {rate(total)}/s" if total else ""
        failed = (f"{rate(canary.failed)}/s not loaded", BAD) if canary.failed else ""
        rows.append([plain(canary.task), "canary", share, failed])
    for shadow in seen.shadows:
        total = shadow.agreed + shadow.differed
        share = f"{100 * shadow.agreed / total:.1f} % of {rate(total)}/s agree" if total else ""
        lost = [f"{rate(value)}/s {name}" for name in ("failed", "dropped") if (value := getattr(shadow, name))]
        rows.append([plain(shadow.task), f"shadow {plain(shadow.version)}", share, (", ".join(lost), WARN)])
    return _Section(("route", "to", "traffic", ""), rows, names=4)


def _tenants(seen: View) -> _Section:
    rows: list[list[Cell]] = [
        [
            plain(tenant.tenant),
            rate(tenant.requests),
            (rate(tenant.errors), BAD if tenant.errors else ""),
            rate(tenant.tokens),
            (rate(tenant.refusals), WARN if tenant.refusals else ""),
            *(_use(tenant, name) for name in ("requests_per_minute", "tokens_per_minute", "concurrent")),
        ]
        for tenant in seen.tenants
    ]
    return _Section(("tenant", "req/s", "err/s", "tok/s", "refused/s", "req/min", "tok/min", "at once"), rows)


def _use(tenant: TenantView, limit: str) -> Cell:
    used, most = tenant.use.get(limit, 0.0), tenant.limits.get(limit)
    if most is None:
        return count(used)
    style = BAD if used >= most else WARN if used >= 0.8 * most else ""
    return f"{count(used)} of {count(most)}", style


def _replicas(seen: View) -> _Section:
    styles = {"down": BAD, "resting": BAD, "trying": WARN, "draining": WARN, "up": GOOD}
    worst = list(styles)
    rows: list[list[Cell]] = [
        [
            plain(replica.replica),
            (replica.state, styles[replica.state]),
            count(replica.inflight),
            (rate(replica.failures), BAD if replica.failures else ""),
        ]
        for replica in sorted(seen.replicas, key=lambda replica: (worst.index(replica.state), replica.replica))
    ]
    return _Section(("replica", "state", "in flight", "failures/s"), rows, names=2)


def _residents(seen: View) -> Text:
    from rich.text import Text

    line = f"{len(seen.residents)} versions loaded, {size(seen.resident_bytes)}"
    if seen.residents:
        line += ": " + ", ".join(f"{plain(name)} {size(num)}" for name, num in seen.residents.items())
    return Text(line, DIM, no_wrap=True, overflow="ellipsis")


def _table(section: _Section, limit: int) -> Table:
    """Return a table of at most `limit` rows; the last one says how many are left out."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold reverse", padding=(0, 2, 0, 0))
    for place, column in enumerate(section.columns):
        is_name = place < section.names
        table.add_column(column, justify="left" if is_name else "right", no_wrap=not is_name)
    left_out = len(section.rows) - limit
    for row in section.rows[: limit - 1] if left_out else section.rows:
        table.add_row(*(_text(cell) for cell in row))
    if left_out:
        table.add_row(_text((f"and {left_out + 1} more", DIM)))
    return table


def _text(cell: Cell) -> Text:
    from rich.text import Text

    text, style = (cell, "") if isinstance(cell, str) else cell
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _pair(found: Quantiles | None) -> tuple[str, str]:
    return (seconds(found.p50), seconds(found.p95)) if found is not None else ("", "")


def rate(value: float) -> str:
    """Return a rate with three digits: 0, 0.12, 3.4, 128, 4,312."""
    if value == 0:
        return "0"
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def count(value: float | None) -> str:
    """Return a number of things."""
    return "-" if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Return a time with its unit: 0.8 ms, 18 ms, 1.24 s."""
    if value is None:
        return "-"
    if value >= 0.9995:
        return f"{value:.2f} s"
    return f"{1000 * value:.0f} ms" if value >= 0.01 else f"{1000 * value:.1f} ms"


def size(value: float) -> str:
    """Return bytes with their unit."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
