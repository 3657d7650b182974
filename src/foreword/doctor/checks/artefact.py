"""Checks of an artefact: is it whole, does it belong to this base, does it act there as it was trained?

Also of a PEFT directory (checks/artefact_peft.py). Nothing in a file is run, and nothing of the base is changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.core.artefact import Artefact
from foreword.doctor.checks.artefact_file import open_artefact
from foreword.doctor.finding import Finding
from foreword.errors import ForewordError

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel

BASE_FIELDS = {
    "model_type": "other-base",
    "shapes_sha256": "other-base",
    "quantisation": "numerics",
    "weights_sha256": "other-base",
    "tokenizer_sha256": "tokenizer-changed",
    "chat_template_sha256": "template-drift",
}
"""What it means when a field of the base's fingerprint differs, by the field."""


def check_artefact(path: Path, base: Any, *, dtype: str = "auto", device: str = "cpu") -> list[Finding]:
    """Check that an artefact is whole and, given its base, that it belongs to it and acts as it was trained.

    `path` is an artefact or a PEFT directory, `base` a folder, a hub id, a loaded FrozenModel or None. From the file
    alone come: is it safe to open, are its vectors finite, of a fair size, and not the same in every layer. On a base:
    shapes, the base's identity, its tokenizer and template, rendering, and the conformance probes.
    """
    path = Path(path)
    if path.is_dir():
        from foreword.doctor.checks.artefact_peft import check_peft_directory

        return check_peft_directory(path, _load(base, dtype, device))
    artefact, file = open_artefact(path)
    if artefact is None:
        return [file]
    from foreword.doctor.checks.artefact_vectors import check_layers_differ, check_sizes, parts_of

    frozen = _load(base, dtype, device)
    parts = parts_of(artefact.tensors)
    if frozen is None:
        return [file, check_sizes(parts), check_layers_differ(parts)]
    shapes = check_shapes(artefact, frozen)
    sizes = check_sizes(parts, frozen if shapes.ok else None)
    found = [file, shapes, sizes, check_layers_differ(parts), check_base(artefact, frozen)]
    return [*found, check_rendering(artefact, frozen), *_on_base(artefact, frozen)]


def check_shapes(artefact: Artefact, base: FrozenModel) -> Finding:
    """Read the number of key/value heads and the head size from the base's configuration, not from its hidden size.

    Stored shapes beside the base's own, where the base is the one it was trained for; else the base is what is wrong.
    """
    spec, mine = artefact.header.spec, base.spec
    known = artefact.header.base.shapes_sha256
    pairs = [("embedding width", spec.embed_size, mine.embed_size), ("layers", spec.num_layers, mine.num_layers)]
    for index, (there, here) in enumerate(zip(spec.layers, mine.layers, strict=False)):
        pairs += [
            (f"layer {index} key/value heads", there.num_kv_heads, here.num_kv_heads),
            (f"layer {index} head size of keys", there.head_dim, here.head_dim),
            (f"layer {index} head size of values", there.value_dim, here.value_dim),
        ]
    odd = [(name, there, here) for name, there, here in pairs if there != here]
    measured = "; ".join(f"{name}: {there} in the file, {here} in the base" for name, there, here in odd[:3])
    same_base = not known or known == base.fingerprint.shapes_sha256
    return Finding(
        check="shapes",
        ok=not odd,
        measured=measured or f"{len(pairs)} sizes agree with the base's",
        expected="the base's own numbers of layers, key/value heads and head sizes",
        fix="Train for this base's shapes, read from its configuration." if same_base else "Use the base it is for.",
        fault="" if not odd else "wrong-shape" if same_base else "other-base",
        numbers={"differ": [list(item) for item in odd]},
    )


def check_base(artefact: Artefact, base: FrozenModel) -> Finding:
    """Serve vectors on the base, tokenizer and chat template they were trained with, or train them again.

    The fingerprint kept in the file beside that of the base: model type, shapes, quantisation, a sample of the weights,
    tokenizer and chat template, each by its hash.
    """
    from foreword.core.compile import check_base as compare

    difference = artefact.header.base.first_difference(base.fingerprint)
    expected = "the base, tokenizer and chat template it was trained for"
    if difference is None:
        return Finding(check="base", ok=True, measured=expected, expected=expected)
    field, there, here = difference
    measured, fix = f"{field} is {there[:16]} in the file, {here[:16]} here", ""
    try:
        compare(base, artefact)
    except ForewordError as error:
        measured, fix = error.message, error.hint
    return Finding(
        check="base",
        ok=False,
        measured=measured,
        expected=expected,
        fix=fix,
        fault=BASE_FIELDS[field],
        numbers={"field": field, "file": there, "base": here},
    )


def check_rendering(artefact: Artefact, base: FrozenModel) -> Finding:
    """Pin the template and the tokenizer with the version; render prompts through the file's own template.

    The block in front of every text, and a probe text behind it, rendered now and compared with what the file keeps:
    the first token that differs is shown.
    """
    from foreword.core.template import TaskTemplate

    header = artefact.header
    if header.template is None or base.tokenizer is None:
        return Finding(check="rendering", ok=True, skipped=True, measured="no template in the file, or no tokenizer")
    try:
        template = TaskTemplate.from_json(header.template)
        block, now = template.block(base.tokenizer), template.sha256(base.tokenizer)
    except ForewordError as error:
        return _rendering(False, f"the template cannot be rendered: {error.message}", {})
    stored = str(header.template.get("sha256", ""))
    then_ids, now_ids = header.block.literal_ids(fill=-1), block.literal_ids(fill=-1)
    place = next((i for i, (a, b) in enumerate(zip(then_ids, now_ids, strict=False)) if a != b), None)
    if place is None and len(then_ids) != len(now_ids):
        place = min(len(then_ids), len(now_ids))
    if place is not None and (not stored or stored != now):
        shown = [_token(base.tokenizer, ids, place) for ids in (then_ids, now_ids)]
        measured = f"the block differs first at position {place}: {shown[0]} in the file, {shown[1]} now"
        return _rendering(False, measured, {"position": place, "file": then_ids, "now": now_ids})
    if stored and stored != now:
        measured = f"a probe text renders to other tokens behind the same block: sha256 {stored[:12]}, {now[:12]} now"
        return _rendering(False, measured, {"file": stored, "now": now})
    return _rendering(True, f"{len(now_ids)} positions of the block and a probe text are as in training", {})


def check_conformance(artefact: Artefact, base: FrozenModel) -> Finding:
    """Run the version under the numerics it was trained in, or judge it again under these.

    The probes that were kept when training ended, replayed. Where they fail, the stored keys and values are tried in
    other forms too (doctor/repairs.py): one that restores every answer proves how they were stored wrong.
    """
    from foreword.core.compile import compile
    from foreword.core.conformance import replay
    from foreword.doctor.repairs import find_repair

    header = artefact.header
    if not header.conformance:
        return Finding(check="conformance", ok=True, skipped=True, measured="the file holds no conformance probes")
    result = replay(base, compile(base, artefact, allow_mismatch=True), header.conformance)
    numbers = {"max_kl": result.max_kl, "mean_kl": result.mean_kl, "agree": result.num_agree, "dtypes": result.dtypes}
    measured, fault = result.message, ""
    fix = "This is not the computation it was trained in: compare base, dtype and versions."
    if not result.ok:
        repair = find_repair(base, artefact)
        made, here = result.dtypes
        if repair is not None:
            fault, fix = repair.fault, repair.fix
            measured += f"; it holds {repair.how}"
        elif made != here and artefact.header.base.first_difference(base.fingerprint) is None:
            fault, fix = "numerics", f"Serve it in {made}, train it in {here}, or judge it again in {here}."
    expected = "the answers of training, within the tolerance of the coarser dtype"
    return Finding(
        check="conformance", ok=result.ok, measured=measured, expected=expected, fix=fix, fault=fault, numbers=numbers
    )


def _load(base: Any, dtype: str, device: str) -> FrozenModel | None:
    if base is None:
        return None
    from foreword.core.model import load_base

    return load_base(base, dtype=dtype, device=device)  # type: ignore[arg-type]


def _on_base(artefact: Artefact, base: FrozenModel) -> list[Finding]:
    try:
        return [check_conformance(artefact, base)]
    except ForewordError as error:
        return [Finding(check="compile", ok=False, measured=error.message, fix=error.hint)]


def _rendering(ok: bool, measured: str, numbers: dict[str, Any]) -> Finding:
    return Finding(
        check="rendering",
        ok=ok,
        measured=measured,
        expected="the tokens of training",
        fix="Serve with the tokenizer and chat template of training, or train again with these.",
        fault="" if ok else "template-drift",
        numbers=numbers,
    )


def _token(tokenizer: Any, ids: list[int], place: int) -> str:
    if place >= len(ids):
        return "nothing"
    return "a vector" if ids[place] < 0 else f"{ids[place]} ({tokenizer.decode([ids[place]])!r})"
