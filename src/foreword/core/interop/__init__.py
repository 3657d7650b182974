"""Vectors from and to other toolkits: PEFT directories, Cartridges' `.pt`, google-research prompt-tuning's `.npy`.

No such format says which weights its vectors were trained on, so every import is told the base: shapes are checked
against it, and the artefact then belongs to it. No other toolkit is imported and no pickle is trusted.
"""

from foreword.core.interop.cartridges import import_cartridge_pt
from foreword.core.interop.npy import import_npy
from foreword.core.interop.peft import export_peft, import_peft, import_peft_multitask

__all__ = ["export_peft", "import_cartridge_pt", "import_npy", "import_peft", "import_peft_multitask"]
