"""The command line: parse, one library call, print. One file per group of commands; heavy imports stay inside them."""

from __future__ import annotations

import os
import sys

import typer

from foreword.cli import (
    access_commands,
    advise_command,
    compare_command,
    demo_command,
    distil_command,
    doctor_command,
    ensemble_command,
    eval_command,
    explain_command,
    files_command,
    migrate_command,
    prune_command,
    registry_commands,
    serve_command,
    similar_command,
    sweep_command,
    top_command,
    traffic_commands,
    train_command,
    tweak_command,
    vllm_commands,
)
from foreword.errors import ConfigError, ForewordError

app = typer.Typer(
    name="foreword",
    help="One frozen language model, many tasks: train, judge, version and serve soft prompts and prefixes.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (
    demo_command,
    advise_command,
    train_command,
    sweep_command,
    distil_command,
    tweak_command,
    migrate_command,
    similar_command,
    ensemble_command,
    prune_command,
    eval_command,
    compare_command,
    explain_command,
    doctor_command,
    registry_commands,
    access_commands,
    traffic_commands,
    serve_command,
    top_command,
    vllm_commands,
    files_command,
):
    group.register(app)


@app.callback()
def refuse_copies(context: typer.Context) -> None:
    """Refuse a command that a launcher started several times, each to do all of the work; `train` shares its own."""
    count = os.environ.get("WORLD_SIZE", "1")
    if "LOCAL_RANK" in os.environ and count != "1" and context.invoked_subcommand != "train":
        raise ConfigError(
            f"foreword {context.invoked_subcommand} runs in one process, a launcher started {count}",
            hint="Call it without `accelerate launch` or torchrun: only `foreword train` shares its work.",
        )


def main() -> None:
    """Run the command line; a ForewordError becomes its message, its hint and its exit code."""
    try:
        app()
    except ForewordError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
