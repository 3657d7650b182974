"""Checks of what the loss is computed from: logits and labels of one batch, beside the text they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.doctor.finding import Finding
from foreword.doctor.probe_training import ProbeFailed, check, loss_of, skipped
from foreword.doctor.subjects import TrainingRun
from foreword.doctor.training_state import seeded

IGNORED = -100
LEAST_MATCH = 0.98
"""Share of the learned labels that must be the text's own tokens for a shift to be read from them: one of them, the
end of an answer, may stand behind the text."""
SAME_LOSS = 2e-5
"""Relative difference within which a loss is taken for the one computed here; wider for logits in 16 bits."""
SAME_LOSS_COARSE = 1e-2


@check("logits width", "labels", "logits")
def check_logits_width(run: TrainingRun) -> Finding:
    """Cut the logits of the P vectors before labels are compared with them, or give those places labels of -100.

    A loss that gets more logits than labels may cut them itself: then its value is that of some cut, and `check_labels`
    tells whether it is the right one.
    """
    assert run.labels is not None
    found, slots = _logits(run).shape[1], run.labels.shape[1]
    extra, cut = found - slots, ""
    if extra and (lags := _shifts_in_loss(run)):
        cut = f"; the loss cuts them, and shifts by {lags[0]}"
    ok = extra == 0 or bool(cut)
    fault = "" if ok else "logits-uncut" if extra == run.num_vectors else "labels-misaligned"
    return Finding(
        check="logits width",
        ok=ok,
        measured=f"logits at {found} places, labels at {slots}: {extra} more logits with P = {run.num_vectors}{cut}",
        expected="as many places with logits as with labels",
        fix="Cut the first P logits, or put P labels of -100 in front.",
        fault=fault,
        numbers={"logits": found, "labels": slots, "num_vectors": run.num_vectors},
    )


@check("labels", "labels", "input_ids")
def check_labels(run: TrainingRun) -> Finding:
    """Give the P places of vectors labels of -100, and let the logits of each text token predict the token behind it.

    The shift is measured twice over: from the labels, how far they lie from the text, and from the loss, how far labels
    and logits are shifted against each other in it. Together they must come to one token.
    """
    assert run.labels is not None and run.input_ids is not None
    labels, ids, num = run.labels, run.input_ids, run.num_vectors
    slots, width = labels.shape[1], ids.shape[1]
    numbers: dict[str, float] = {"labels": slots, "text": width, "num_vectors": num}
    expected = f"{width} labels, or {num} of -100 and {width}; each learned where the token before it is read"
    if slots not in (width, width + num):
        measured = f"{slots} labels for a text of {width} tokens behind {num} vectors"
        return _misaligned(measured, expected, numbers)
    front, text = labels[:, : slots - width], labels[:, slots - width :]
    over = int((front != IGNORED).sum())
    if over:
        measured = f"{over} of {front.numel()} labels over the vectors' places are not {IGNORED}"
        return _misaligned(measured, expected, numbers | {"over_vectors": over})
    learned = text != IGNORED
    if not bool(learned.any()):
        return _misaligned(f"all {labels.numel()} labels are {IGNORED}: nothing is learned", expected, numbers)
    matches = {shift: _match(text, ids, learned, shift) for shift in _shifts(num)}
    best = max(matches.values())
    if best < LEAST_MATCH:
        why = f"the labels are not tokens of the text (at best {best:.0%} match), so no shift can be read from them"
        return skipped("labels", why)
    near = [shift for shift, match in matches.items() if match == best]
    in_loss = _shifts_in_loss(run)
    pairs = [(shift, lag) for shift in near for lag in in_loss or (0, 1)]
    total, (shift, lag) = min((abs(shift + lag - 1), (shift, lag)) for shift, lag in pairs)
    how = "as the loss shows" if in_loss else "by either convention, the loss was not seen"
    measured = (
        f"{int(learned.sum())} of {labels.numel()} labels are learned; they lie {shift} ahead of the text, the loss "
        f"shifts logits by {lag} more ({how}): a token predicts the one {shift + lag} behind it"
    )
    numbers |= {"learned": int(learned.sum()), "labels_ahead": shift, "loss_shift": lag, "match": best}
    if total:
        return _misaligned(measured, expected, numbers)
    return Finding(check="labels", ok=True, measured=measured, expected=expected, numbers=numbers)


def _misaligned(measured: str, expected: str, numbers: Mapping[str, float]) -> Finding:
    fix = (
        "Put P labels of -100 in front, one label per text token behind them, and shift once: in the data or the loss."
    )
    return Finding(
        check="labels",
        ok=False,
        measured=measured,
        expected=expected,
        fix=fix,
        fault="labels-misaligned",
        numbers=numbers,
    )


def _shifts(num_vectors: int) -> list[int]:
    """Shifts that are looked for: the two right ones first, then near ones, then those by the vectors' number."""
    near = [0, 1, -1, 2, -2, 3, -3]
    far = [sign * num_vectors + one for sign in (1, -1) for one in (0, 1, -1)]
    return list(dict.fromkeys([*near, *far]))


def _match(labels: Tensor, ids: Tensor, learned: Tensor, shift: int) -> float:
    """Share of the learned labels, of those that have a text token `shift` places on, that are this token."""
    width = ids.shape[1]
    first, last = max(0, -shift), min(width, width - shift)
    if last - first < 1:
        return 0.0
    there = learned[:, first:last]
    count = int(there.sum())
    if count < max(1, int(learned.sum()) - learned.shape[0] * max(1, abs(shift))):
        return 0.0
    same = (labels[:, first:last] == ids[:, first + shift : last + shift]) & there
    return int(same.sum()) / count if count else 0.0


def _logits(run: TrainingRun) -> Tensor:
    assert run.logits is not None
    with torch.no_grad(), seeded(0):
        try:
            return run.logits()
        except Exception as error:
            raise ProbeFailed(f"the logits cannot be computed ({type(error).__name__})") from error


def _shifts_in_loss(run: TrainingRun) -> tuple[int, ...]:
    """Return by how many places labels are shifted against the text's logits in the loss: all that give its value.

    Logits and labels that differ in width are aligned at their ends, as they are once the vectors' logits are cut.
    """
    if run.logits is None:
        return ()
    assert run.labels is not None
    try:
        wanted = float(loss_of(run).detach())
    except ProbeFailed:
        return ()
    logits, labels = _logits(run), run.labels
    extra = logits.shape[1] - labels.shape[1]
    within = SAME_LOSS if logits.dtype in (torch.float32, torch.float64) else SAME_LOSS_COARSE
    found = []
    for shift in _shifts(run.num_vectors):
        for cut_front, cut_behind in dict.fromkeys([(0, 0), (max(0, extra), 0), (0, max(0, extra))]):
            value = _cross_entropy(logits, labels, shift - extra, cut_front, logits.shape[1] - cut_behind)
            if value is not None and math.isclose(value, wanted, rel_tol=within):
                found.append(shift)
                break
    return tuple(found)


def _cross_entropy(logits: Tensor, labels: Tensor, ahead: int, first: int, last: int) -> float | None:
    """Return the mean loss of label i + `ahead` by logits i, i from `first` to `last`; None where none is learned."""
    first, last = max(first, -ahead), min(last, labels.shape[1] - ahead)
    if last - first < 1:
        return None
    targets = labels[:, first + ahead : last + ahead].to(logits.device)
    if not bool((targets != IGNORED).any()):
        return None
    part = logits[:, first:last].flatten(0, 1).float()
    return float(F.cross_entropy(part, targets.flatten(), ignore_index=IGNORED))
