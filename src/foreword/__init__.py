"""foreword: one frozen language model, many tasks, by soft prompts and prefixes.

Public names are loaded on first use, so that `import foreword` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreword.core.artefact import Artefact, load_artefact
    from foreword.core.compile import compile
    from foreword.core.forward import forward
    from foreword.core.interop import (
        export_peft,
        import_cartridge_pt,
        import_npy,
        import_peft,
        import_peft_multitask,
    )
    from foreword.core.model import FrozenModel, load_base
    from foreword.core.prompt import KVPrefix, SoftKV, SoftPrefix, SoftPrompt
    from foreword.core.template import TaskTemplate
    from foreword.engine.engine import Engine
    from foreword.engine.request import Output, Request
    from foreword.errors import ForewordError
    from foreword.eval.paired import compare_reports
    from foreword.eval.report import EvalReport
    from foreword.eval.run import evaluate
    from foreword.eval.tasks import Task
    from foreword.registry.store import Registry
    from foreword.train.loop import fit
    from foreword.train.run import Run, RunResult

__version__ = "0.1.0"

_HOME = {
    "Artefact": "foreword.core.artefact",
    "Engine": "foreword.engine.engine",
    "EvalReport": "foreword.eval.report",
    "ForewordError": "foreword.errors",
    "FrozenModel": "foreword.core.model",
    "KVPrefix": "foreword.core.prompt",
    "Output": "foreword.engine.request",
    "Registry": "foreword.registry.store",
    "Request": "foreword.engine.request",
    "Run": "foreword.train.run",
    "RunResult": "foreword.train.run",
    "SoftKV": "foreword.core.prompt",
    "SoftPrefix": "foreword.core.prompt",
    "SoftPrompt": "foreword.core.prompt",
    "Task": "foreword.eval.tasks",
    "TaskTemplate": "foreword.core.template",
    "compare_reports": "foreword.eval.paired",
    "compile": "foreword.core.compile",
    "evaluate": "foreword.eval.run",
    "export_peft": "foreword.core.interop",
    "fit": "foreword.train.loop",
    "forward": "foreword.core.forward",
    "import_cartridge_pt": "foreword.core.interop",
    "import_npy": "foreword.core.interop",
    "import_peft": "foreword.core.interop",
    "import_peft_multitask": "foreword.core.interop",
    "load_artefact": "foreword.core.artefact",
    "load_base": "foreword.core.model",
}

__all__ = [
    "Artefact",
    "Engine",
    "EvalReport",
    "ForewordError",
    "FrozenModel",
    "KVPrefix",
    "Output",
    "Registry",
    "Request",
    "Run",
    "RunResult",
    "SoftKV",
    "SoftPrefix",
    "SoftPrompt",
    "Task",
    "TaskTemplate",
    "__version__",
    "compare_reports",
    "compile",
    "evaluate",
    "export_peft",
    "fit",
    "forward",
    "import_cartridge_pt",
    "import_npy",
    "import_peft",
    "import_peft_multitask",
    "load_artefact",
    "load_base",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'foreword' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
