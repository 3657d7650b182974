"""`foreword compile` and `foreword vllm-args`: what a stock vLLM needs to serve a registry's tasks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from foreword.cli.options import AllowMismatch, Base, Dtype, Home, Json
from foreword.cli.output import console, print_json
from foreword.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add `compile` and `vllm-args` to `app`."""
    app.command("compile")(compile_)
    app.command("vllm-args")(vllm_args)


def compile_(
    reference: Annotated[str, typer.Argument(help="A version: triage@7, triage@canary, triage.", show_default=False)],
    base: Base,
    dtype: Dtype = "auto",
    allow_mismatch: AllowMismatch = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Compile a version to keys and values for vLLM, and store them beside it; the gateway else does it on first use.

    Example: foreword compile triage@7 --base models/base --dtype bfloat16
    """
    from foreword.core.compile_file import compile_file
    from foreword.registry.store import Registry

    with Registry.open(home) as registry, tempfile.TemporaryDirectory(prefix="foreword-") as folder:
        version = registry.resolve(reference)
        out = Path(folder) / "compiled.safetensors"
        compile_file(base, registry.path(version), out, dtype=dtype, allow_mismatch=allow_mismatch)
        blob = registry.add_compiled(out)
    if as_json:
        print_json(
            {
                "version": version.reference,
                "sha256": blob.sha256,
                "dtype": blob.dtype,
                "positions": blob.num_positions,
                "bytes": blob.num_bytes,
            }
        )
        return
    what = f"{blob.num_positions} positions, {blob.num_bytes} bytes, {blob.dtype}, {blob.sha256[:12]}"
    console().print(f"compiled {version.reference} ({what})")


def vllm_args(
    base: Annotated[str, typer.Option("--base", help="Folder of the frozen base.", show_default=False)],
    reference: Annotated[
        str | None,
        typer.Argument(metavar="[VERSION]", help="Check that this version fits, too.", show_default=False),
    ] = None,
    mode: Annotated[str, typer.Option("--mode", help="plugin, embeddings or both.")] = "plugin",
    name: Annotated[str | None, typer.Option("--name", help="Served model name; default the folder's.")] = None,
    dtype: Dtype = "auto",
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=1, help="Longest sequence, prefix included.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", min=1, help="GPUs per replica.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option("--pipeline-parallel", min=1, help="Stages per replica.")] = 1,
    host: Annotated[str, typer.Option("--host", help="Address that vLLM listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port that vLLM listens on.")] = 8001,
    cache: Annotated[
        str | None, typer.Option("--cache", help="vLLM's folder for fetched blobs of a remote store.")
    ] = None,
    host_memory: Annotated[str, typer.Option("--host-memory", help="Loaded versions per worker.")] = "4GiB",
    on_cpu: Annotated[bool, typer.Option("--cpu", help="For a vLLM built for CPUs.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Print the exact `vllm serve` command for a base and this registry; nothing is started.

    Example: foreword vllm-args triage@prod --base models/base --max-model-len 4096
    """
    from foreword.core.artefact import read_header
    from foreword.engine.kvpool import parse_bytes
    from foreword.registry.store import Registry
    from foreword.serve.engines.base_info import base_info, check_served
    from foreword.serve.vllm.args import vllm_command

    if mode not in ("plugin", "embeddings", "both"):
        raise ConfigError(f"--mode is {mode!r}", hint="Give plugin, embeddings or both.")
    with Registry.open(home) as registry:
        info = base_info(base, registry.home / "cache")
        if reference is not None:
            header = read_header(registry.path(registry.resolve(reference)))
            check_served(info, header, max_model_len=max_model_len, by_embeddings=mode == "embeddings")
        command = vllm_command(
            info,
            blobs=registry.blobs.url,
            name=name or Path(info.folder).name,
            plugin=mode != "embeddings",
            embeddings=mode != "plugin",
            dtype=dtype,
            max_model_len=max_model_len,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            host=host,
            port=port,
            cache=cache,
            host_bytes=parse_bytes(host_memory),
            on_cpu=on_cpu,
        )
    if as_json:
        print_json({"arguments": list(command.arguments), "environment": dict(command.environment)})
    else:
        typer.echo(str(command))
