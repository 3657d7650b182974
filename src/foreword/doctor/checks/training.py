"""Checks of a training run: is the loss the right one, does what should train train, and nothing else, at a fair rate?

Works on anybody's trainer; see `foreword.doctor.subjects.TrainingRun`, and `foreword.doctor.training_subjects` for ways
to make one. Whatever a check moves it puts back, bit by bit (foreword.doctor.training_state).
"""

from __future__ import annotations

from collections.abc import Callable

from foreword.doctor.checks.training_gradients import (
    check_base_frozen,
    check_checkpointing,
    check_gradients,
    check_rows_train,
    check_updates_arrive,
)
from foreword.doctor.checks.training_labels import check_labels, check_logits_width
from foreword.doctor.checks.training_progress import (
    check_finite,
    check_learning_rate,
    check_overfit,
    check_start,
    check_tail,
)
from foreword.doctor.finding import Finding
from foreword.doctor.subjects import TrainingRun

CHECKS: tuple[Callable[[TrainingRun], Finding], ...] = (
    check_logits_width,
    check_labels,
    check_finite,
    check_tail,
    check_start,
    check_overfit,
    check_checkpointing,
    check_rows_train,
    check_base_frozen,
    check_updates_arrive,
    check_learning_rate,
    check_gradients,
)
"""In this order: what is wrong with the loss before what follows from it; forwards, then gradients, then steps."""
