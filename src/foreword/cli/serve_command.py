"""`foreword serve`: one frozen base and its tasks behind OpenAI's endpoints."""

from __future__ import annotations

import json
import logging
from typing import Annotated

import typer

from foreword.cli.options import Base, Device, Dtype, Home

Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")]
BaseName = Annotated[
    str | None, typer.Option("--base-name", help="The base's model name; default its folder's.", show_default=False)
]
Preload = Annotated[
    list[str] | None,
    typer.Option(
        "--preload",
        help="Task or task@alias to load at the start and at each promotion; repeatable.",
        show_default=False,
    ),
]
PrefixMemory = Annotated[
    str, typer.Option("--prefix-memory", help="Memory for loaded versions; the longest idle make room.")
]
MaxQueue = Annotated[int, typer.Option("--max-queue", min=1, help="Answers that may wait; more are refused with 503.")]
MaxBody = Annotated[str, typer.Option("--max-body", help="Largest request body; larger ones are refused with 413.")]


def register(app: typer.Typer) -> None:
    """Add `serve` to `app`."""
    app.command("serve")(serve)


def serve(
    base: Base,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Port = 8000,
    home: Home = None,
    base_name: BaseName = None,
    kv_memory: Annotated[str, typer.Option("--kv-memory", help="Memory for requests' keys and values.")] = "1GiB",
    prefix_memory: PrefixMemory = "1GiB",
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Answers in generation at once.")] = 64,
    max_queue: MaxQueue = 256,
    max_body: MaxBody = "4MiB",
    preload: Preload = None,
    drain: Annotated[int, typer.Option("--drain", min=0, help="Seconds for running answers after SIGTERM.")] = 30,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON when ready.")] = False,
) -> None:
    """Serve a base and its tasks: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    A request's model is a task (triage), an alias (triage@canary), a version (triage@7), or the base's own name.

    Example: foreword serve --base models/base --preload triage
    """
    from foreword.engine.kvpool import parse_bytes
    from foreword.serve.run import own_name, serve_base

    name = base_name or own_name(base)

    def tell(url: str) -> None:
        if as_json:
            typer.echo(json.dumps({"event": "ready", "url": url, "base": name, "preloaded": preload or []}))
        else:
            typer.echo(f"foreword serves {name} and its tasks at {url}/v1; Ctrl+C ends it")

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("foreword").setLevel(logging.INFO)
    serve_base(
        base,
        host=host,
        port=port,
        home=home,
        base_name=name,
        dtype=dtype,
        device=device,
        kv_memory=kv_memory,
        max_batch=max_batch,
        max_queue=max_queue,
        preload=preload or (),
        max_resident_bytes=parse_bytes(prefix_memory),
        max_body_bytes=parse_bytes(max_body),
        drain_s=drain,
        on_ready=tell,
    )
