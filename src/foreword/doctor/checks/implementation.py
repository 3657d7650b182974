"""Checks of an implementation: somebody's model with vectors in it, up to a black box.

They run in the order of `CHECKS`: first what would blur every other measurement, then form (what enters where), then
effect (is it the right computation), then use (batches, generation, turns, training). So the first finding is a cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from foreword.doctor.checks.implementation_effect import (
    check_conformance,
    check_effect,
    check_positions,
    check_probes,
    check_rotation,
    check_weights,
    check_window,
)
from foreword.doctor.checks.implementation_form import (
    check_base,
    check_finite,
    check_forward,
    check_layers_distinct,
    check_layers_reached,
    check_logit_rows,
    check_sequence_lengths,
    check_shapes,
    check_sites,
)
from foreword.doctor.checks.implementation_use import (
    check_generation,
    check_generation_padding,
    check_padding,
    check_repeats,
    check_requests,
    check_training,
    check_turns,
)
from foreword.doctor.finding import Finding
from foreword.doctor.probe.measurements import Measurements
from foreword.doctor.probe.state import left_as_found
from foreword.doctor.subjects import Implementation

CHECKS: tuple[Callable[[Measurements], Finding], ...] = (
    check_shapes,
    check_forward,
    check_finite,
    check_base,
    check_repeats,
    check_requests,
    check_weights,
    check_sequence_lengths,
    check_logit_rows,
    check_effect,
    check_sites,
    check_layers_distinct,
    check_layers_reached,
    check_window,
    check_positions,
    check_rotation,
    check_conformance,
    check_probes,
    check_padding,
    check_generation_padding,
    check_generation,
    check_turns,
    check_training,
)


@contextmanager
def examined(subject: Implementation) -> Iterator[Measurements]:
    """Yield the measurements of an implementation; when done, its modules and all random states are as before."""
    with left_as_found([subject.model, subject.base.model]):
        yield Measurements(subject)
