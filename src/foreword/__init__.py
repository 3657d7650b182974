"""foreword: one frozen language model, many tasks, by soft prompts and prefixes.

Public names are loaded on first use, so that `import foreword` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Artefact": "foreword.core.artefact",
    "load_artefact": "foreword.core.artefact",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'foreword' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
