"""A subject from a user's own code: `package.module:function`, called without arguments. Imports no torch."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from foreword.doctor.diagnose import ROOMS
from foreword.errors import ConfigError, ForewordError, did_you_mean

RETURN_ONE = f"Return one of {', '.join(ROOMS)} (foreword.doctor.subjects)."


def load_subject(reference: str, folder: str | Path | None = None) -> Any:
    """Import and call `package.module:function`; return the `Implementation`, `TrainingRun` or `Evaluation` it gives.

    The module is looked for in `folder` first, by default the working folder. Raises ConfigError where there is no such
    module or function, where either raises, and where something else is returned.
    """
    module_name, colon, name = reference.partition(":")
    if not (colon and name and all(part.isidentifier() for part in (*module_name.split("."), *name.split(".")))):
        raise ConfigError(f"{reference!r} names no function", hint="Write it as package.module:function.")
    function = _find(_import(module_name, Path(folder or Path.cwd())), module_name, name)
    try:
        subject = function()
    except Exception as error:
        said = error.message if isinstance(error, ForewordError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"{reference} raised {said}", hint="It is called without arguments.") from error
    if type(subject).__name__ not in ROOMS:
        raise ConfigError(
            f"{reference} returned {type(subject).__name__}, which is nothing to examine", hint=RETURN_ONE
        )
    return subject


def _import(name: str, folder: Path) -> Any:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            near = [path.stem for path in folder.glob("*.py")]
            hint = did_you_mean(name, near) or f"It is looked for in {folder} and where Python finds modules."
            raise ConfigError(f"no module {name!r} ({error.name} is not there)", hint=hint) from None
        raise ConfigError(f"{name} needs the module {error.name!r}, which is not installed") from error
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(f"importing {name} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(folder))


def _find(module: Any, module_name: str, name: str) -> Any:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ConfigError(f"{module_name} has no function {name!r}", hint=did_you_mean(name, own))
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{module_name}:{name} is a {type(found).__name__}, not a function", hint=RETURN_ONE)
    return found
