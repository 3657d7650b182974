"""`foreword top`: a gateway's traffic in the terminal, live, once, or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from foreword.cli.options import Json
from foreword.cli.output import console, print_json
from foreword.cli.top_screen import screen
from foreword.errors import ConfigError, ServeError

if TYPE_CHECKING:
    from foreword.serve.watch.readings import Page, View, Window

TIMEOUT_S = 5.0

Url = Annotated[str, typer.Option("--url", help="Where the gateway serves.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", envvar="FOREWORD_KEY", help="API key, where /metrics needs one.", show_default=False, show_envvar=False
    ),
]


def register(app: typer.Typer) -> None:
    """Add `top` to `app`."""
    app.command("top")(top)


def top(
    url: Url = "http://127.0.0.1:8000",
    key: Key = None,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between looks.")] = 1.0,
    window: Annotated[float, typer.Option("--window", min=0.1, help="Seconds that rates are taken over.")] = 10.0,
    once: Annotated[bool, typer.Option("--once", help="Look twice, an interval apart, print, and end.")] = False,
    as_json: Json = False,
) -> None:
    """Show a gateway's traffic live: tasks, versions, tenants, canary, shadow, replicas. Ctrl+C ends it.

    With --json each look is a line of JSON. Example: foreword top --url http://127.0.0.1:8000
    """
    from foreword.serve.watch.readings import Window

    if not (once or as_json or sys.stdout.isatty()):
        raise ConfigError("the live view needs a terminal", hint="Give --once, or --json.")
    with _Source(url, key) as source:
        pages = Window(window)
        pages.add(source.page())
        if once:
            time.sleep(interval)
            pages.add(source.page())
            if (seen := pages.view()) is not None:
                _print(seen, source.url, as_json)
            return
        try:
            (_stream if as_json else _live)(source, pages, interval)
        except KeyboardInterrupt:
            return


def _print(seen: View, url: str, as_json: bool) -> None:
    if as_json:
        print_json(seen.to_json())
        return
    out = console()
    out.print(screen(seen, url, width=out.size.width), soft_wrap=False)


def _stream(source: _Source, pages: Window, interval: float) -> None:
    for _ in _ticks(interval):
        pages.add(source.page())
        if (seen := pages.view()) is not None:
            sys.stdout.write(json.dumps(seen.to_json(), allow_nan=False) + "\n")
            sys.stdout.flush()


def _live(source: _Source, pages: Window, interval: float) -> None:
    from rich.live import Live
    from rich.text import Text

    out = console()
    with Live(Text("measuring …"), console=out, screen=True, auto_refresh=False) as live:
        for _ in _ticks(interval):
            problem = ""
            try:
                pages.add(source.page())
            except ServeError as error:  # it may come back
                problem = error.message
            if (seen := pages.view()) is not None:
                width, height = out.size
                live.update(screen(seen, source.url, problem, width=width, height=height), refresh=True)


def _ticks(interval: float) -> Iterator[None]:
    """Yield every `interval` seconds, the first time after one; a tick that was missed is left out."""
    due = time.monotonic()
    while True:
        due = max(due + interval, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))
        yield


class _Source:
    """Where pages come from."""

    def __init__(self, url: str, key: str | None) -> None:
        import httpx

        self.url = url.rstrip("/").removesuffix("/metrics").removesuffix("/v1")
        headers = {"accept": "text/plain; version=0.0.4"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._has_key = bool(key)
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT_S)

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def page(self) -> Page:
        """Return the present page. Raises ServeError where there is none, with the cure."""
        import httpx

        from foreword.serve.watch.readings import parse_page

        address = f"{self.url}/metrics"
        try:
            answer = self._client.get(address)
        except httpx.InvalidURL as error:
            raise ServeError(f"{self.url!r} is no URL: {error}", hint="Give --url http://HOST:PORT.") from None
        except httpx.UnsupportedProtocol:
            raise ServeError(f"{self.url!r} is no URL of a gateway", hint="Give --url http://HOST:PORT.") from None
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            hint = "Is `foreword serve` running there? Give its address with --url."
            raise ServeError(f"no answer from {address}: {why}", hint=hint) from None
        if answer.status_code in (401, 403):
            what = "does not accept this key" if self._has_key else "needs a key"
            hint = "Give an admin key with --key or in FOREWORD_KEY; `foreword key create --admin` makes one."
            raise ServeError(f"{address} {what} ({answer.status_code})", hint=hint)
        if answer.status_code != 200:
            hint = "Give the URL of `foreword serve`, without a path."
            raise ServeError(f"{address} answers {answer.status_code}", hint=hint)
        return parse_page(answer.text, time.monotonic())
