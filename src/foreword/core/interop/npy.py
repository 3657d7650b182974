"""google-research/prompt-tuning: one `.npy` per prompt, [P, D]."""

from __future__ import annotations

import tokenize
from pathlib import Path

import numpy
import torch

from foreword.core.artefact import Artefact
from foreword.core.interop.imported import check_shape, make_artefact, refuse_unreadable
from foreword.core.model import FrozenModel
from foreword.core.template import TaskTemplate
from foreword.errors import ArtefactCorrupt

FLOATS = ("float16", "float32", "float64")
READ_ERRORS = (OSError, ValueError, TypeError, EOFError, SyntaxError, tokenize.TokenError, OverflowError, MemoryError)
"""What numpy.load raises on files that are no array; it reads the header as a Python literal."""


def import_npy(
    path: str | Path,
    base: FrozenModel,
    *,
    template: TaskTemplate | None = None,
    task: str | None = None,
    out: str | Path | None = None,
) -> Artefact:
    """Import a soft prompt [P, D] from a NumPy array file (float16, float32, or float64, which is rounded to float32).

    The vectors stand before BOS unless a `template` says what text follows them; `task` defaults to the file's name.
    Raises ArtefactCorrupt on anything but one such array (pickled objects are not read), IncompatibleModel where D
    is not the base's. The published prompts are T5's and fit no causal base.
    Source: github.com/google-research/prompt-tuning.
    """
    path = Path(path)
    try:
        array = numpy.load(path, mmap_mode="r", allow_pickle=False)  # mapped: shape is judged before memory is taken
    except FileNotFoundError as error:
        refuse_unreadable(path, error)
    except READ_ERRORS as error:
        raise ArtefactCorrupt(f"{path}: not a .npy array ({error})", hint="Arrays of plain floats are read.") from error
    if not isinstance(array, numpy.ndarray):
        array.close()
        raise ArtefactCorrupt(f"{path}: an archive of arrays", hint="Give one .npy file.")
    if array.dtype.name not in FLOATS:
        raise ArtefactCorrupt(f"{path}: dtype {array.dtype.name} where {', '.join(FLOATS)} are read")
    if array.ndim != 2 or not len(array):
        raise ArtefactCorrupt(f"{path}: shape {list(array.shape)} where [P, D] is read")
    check_shape(path, "prompt", array.shape, (len(array), base.spec.embed_size))
    source = {"format": "npy", "stored_dtype": array.dtype.name}
    tensors = {"prompt": torch.from_numpy(numpy.array(array, dtype=numpy.float32))}
    task = task or path.stem
    return make_artefact(base, "prompt", tensors, file=path, source=source, template=template, task=task, out=out)
