"""Where foreword keeps its data on this machine, and who uses it."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

from foreword.errors import ConfigError


def home_folder(home: str | Path | None = None) -> Path:
    """Return foreword's data folder, created if need be: `home`, else FOREWORD_HOME, else ~/.foreword.

    Raises ConfigError when it is a file, or cannot be created or written.
    """
    name = str(home) if home is not None else os.environ.get("FOREWORD_HOME", "~/.foreword")
    what = "home" if home is not None else "FOREWORD_HOME"
    if not name.strip() or "\0" in name:
        raise ConfigError(f"{what} is {name!r}, not a folder", hint="Set it to a folder, or unset it for ~/.foreword.")
    try:
        folder = Path(name).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{what} is {name!r}: {error}", hint="Give the folder's full path.") from error
    return make_folder(folder, f"folder of {what}")


def make_folder(folder: Path, what: str) -> Path:
    """Create a folder that can be written, or raise ConfigError saying why it is none; `what` names it."""
    hint = "Set FOREWORD_HOME, or --home, to a folder that you can write."
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"the {what} {folder} is a file, not a folder", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"cannot create the {what} {folder}: {error.strerror}", hint=hint) from error
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ConfigError(f"the {what} {folder} cannot be written", hint=hint)
    return folder


def user_name() -> str:
    """Return the name of the user that runs this process, or uid-N where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container whose user has no name
        return f"uid-{os.getuid()}"
