"""`foreword serve`: one frozen base and its tasks behind OpenAI's endpoints."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

from foreword.cli.options import Base, Device, Dtype, Home
from foreword.errors import ConfigError

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
LogFormat = Annotated[
    Literal["text", "json"], typer.Option("--log-format", help="Log lines as text, or as JSON objects.")
]
RequireKeys = Annotated[
    bool,
    typer.Option("--require-keys", envvar="FOREWORD_REQUIRE_KEYS", help="Answer nobody without an API key."),
]
Open = Annotated[
    bool, typer.Option("--open", help="Serve without keys on an address that other machines reach; this is meant.")
]
SpecialTokens = Annotated[
    bool,
    typer.Option("--allow-special-tokens", help="Take special tokens, written out, in clients' texts as tokens."),
]
Notice = Annotated[
    float,
    typer.Option("--notice", min=0, help="Seconds after SIGTERM in which /ready says no and requests are still taken."),
]
VLLM = Annotated[
    list[str] | None,
    typer.Option("--vllm", help="URL of a vLLM server that runs the base; repeatable.", show_default=False),
]
VLLMMode = Annotated[
    Literal["plugin", "embeddings"],
    typer.Option("--vllm-mode", help="Versions by name through the plug-in, or prompts as embeddings."),
]
Replica = Annotated[
    list[str] | None,
    typer.Option("--replica", help="URL of another foreword server of this base; repeatable.", show_default=False),
]
MaxInflight = Annotated[
    int, typer.Option("--max-inflight", min=1, help="Requests at one --vllm or --replica at once; more get 503.")
]
FirstToken = Annotated[
    float, typer.Option("--first-token-timeout", min=1, help="Seconds for an engine's first token, its queue included.")
]
ENGINE_OPTIONS = ("kv_memory", "prefix_memory", "max_batch", "max_queue", "device")
"""Of the engine in this process."""
REPLICA_OPTIONS = ("max_inflight", "first_token_timeout")
"""Of engines elsewhere."""
MaxBody = Annotated[str, typer.Option("--max-body", help="Largest request body; larger ones are refused with 413.")]


def register(app: typer.Typer) -> None:
    """Add `serve` to `app`."""
    app.command("serve")(serve)


def serve(
    context: typer.Context,
    base: Base,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Port = 8000,
    home: Home = None,
    base_name: BaseName = None,
    vllm: VLLM = None,
    vllm_mode: VLLMMode = "plugin",
    replica: Replica = None,
    max_inflight: MaxInflight = 256,
    first_token_timeout: FirstToken = 120.0,
    kv_memory: Annotated[str, typer.Option("--kv-memory", help="Memory for requests' keys and values.")] = "1GiB",
    prefix_memory: PrefixMemory = "1GiB",
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Answers in generation at once.")] = 64,
    max_queue: MaxQueue = 256,
    max_body: MaxBody = "4MiB",
    preload: Preload = None,
    drain: Annotated[int, typer.Option("--drain", min=0, help="Seconds for running answers after SIGTERM.")] = 30,
    notice: Notice = 0.0,
    require_keys: RequireKeys = False,
    is_open: Open = False,
    allow_special_tokens: SpecialTokens = False,
    log_format: LogFormat = "text",
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON when ready.")] = False,
) -> None:
    """Serve a base and its tasks: /v1/completions, /v1/chat/completions, /v1/models, /health, /metrics.

    A request's model is a task (triage), an alias (triage@canary), a version (triage@7), or the base's own name.

    The engine is in this process, or elsewhere: --vllm or --replica. The key that engines elsewhere ask for is taken
    from FOREWORD_REPLICA_KEY.

    Example: foreword serve --base models/base --preload triage
    """
    from foreword.engine.kvpool import parse_bytes
    from foreword.serve.run import own_name, serve_base
    from foreword.serve.watch.logs import configure

    name = base_name or own_name(base)
    urls = [*(vllm or ()), *(replica or ())]
    compiles = bool(vllm) and vllm_mode == "plugin"
    _refuse_without_effect(context, is_vllm=bool(vllm), is_remote=bool(replica), compiles=compiles)

    def tell(url: str) -> None:
        if as_json:
            typer.echo(json.dumps({"event": "ready", "url": url, "base": name, "preloaded": preload or []}))
        else:
            typer.echo(f"foreword serves {name} and its tasks at {url}/v1; Ctrl+C ends it")

    configure(log_format)
    common: dict[str, Any] = {
        "host": host,
        "port": port,
        "home": home,
        "base_name": name,
        "dtype": dtype,
        "preload": preload or (),
        "max_body_bytes": parse_bytes(max_body),
        "drain_s": drain,
        "notice_s": notice,
        "require_keys": require_keys,
        "is_open": is_open,
        "allow_special_tokens": allow_special_tokens,
        "on_ready": tell,
    }
    if urls:
        from foreword.serve.run_replicas import serve_replicas

        mode = vllm_mode if vllm else "remote"
        serve_replicas(base, urls, mode, max_inflight=max_inflight, first_token_s=first_token_timeout, **common)
    else:
        serve_base(
            base,
            device=device,
            kv_memory=kv_memory,
            max_batch=max_batch,
            max_queue=max_queue,
            max_resident_bytes=parse_bytes(prefix_memory),
            **common,
        )


def _refuse_without_effect(context: typer.Context, *, is_vllm: bool, is_remote: bool, compiles: bool) -> None:
    """Raise ConfigError where an option is given that would change nothing."""
    if is_vllm and is_remote:
        raise ConfigError("--vllm and --replica are given", hint="Give one kind; each may be repeated.")
    is_elsewhere = is_vllm or is_remote
    moot = [(name, "is for the engine in this process") for name in ENGINE_OPTIONS if is_elsewhere]
    moot += [(name, "is for engines elsewhere, --vllm or --replica") for name in REPLICA_OPTIONS if not is_elsewhere]
    if not is_vllm:
        moot.append(("vllm_mode", "is for --vllm"))
    if is_elsewhere and not compiles:
        moot.append(("dtype", "is for the engine in this process and the plug-in"))
    for name, why in moot:
        source = context.get_parameter_source(name)
        if source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT"):
            raise ConfigError(f"--{name.replace('_', '-')} {why}; it would have no effect here", hint="Leave it out.")
