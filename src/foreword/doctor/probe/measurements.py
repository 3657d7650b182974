"""All measurements of one implementation, each made once, when it is first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.conformance import TOLERANCES, Tolerance
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix, SoftKV, SoftPrefix, SoftPrompt, Vectors, vectors_from_tensors
from foreword.doctor.probe import reference
from foreword.doctor.probe.attention import AttentionCall, AttentionWatch
from foreword.doctor.probe.layers import LayerPass, find_layers, foreign_rows, layers_watched
from foreword.doctor.probe.logits import LENGTHS, ProbeFailed, divergences, generate_rows, run_rows, text_rows
from foreword.doctor.probe.seen import Seen, relative_error, summarise
from foreword.doctor.probe.state import tensors_sha256
from foreword.doctor.probe.weights import WeightDifference, weight_difference
from foreword.doctor.subjects import Implementation
from foreword.errors import ForewordError

LONG_TEXT = 64
"""Tokens of the long row: beyond what an implementation that forgets early still holds."""
MAX_LONG_TEXT = 512
FLOORS = {"float32": 1e-7, "float16": 1e-5, "bfloat16": 1e-4}
"""Divergence in nats below which nothing is judged, by dtype: above the largest that one batch shape against another
made on 21 tiny architectures and base-3m in their best case (float32 3e-11, bfloat16 3e-5)."""
SAFETY = 6.0
"""Divergence allowed, in units of what rounding every layer's input otherwise does on the same base and rows. Measured:
SDPA against eager attention makes 0.3 to 2.4 of it (base-3m, both dtypes, three methods)."""
MATCH = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}
"""Relative error up to which keys or values are the same, by dtype; measured on 21 architectures and both dtypes at
most 3e-6 and 2e-2 for the right ones, at least 0.3 for others (tests/doctor/test_probe.py)."""


class Measurements:
    """One implementation under examination; every property measures once and keeps the result."""

    def __init__(self, subject: Implementation) -> None:
        self.subject = subject
        self.base: FrozenModel = subject.base
        self.sha256_before = self._checksum()

    def __str__(self) -> str:
        spec = self.base.spec
        return f"{self.subject.declared} with {self.subject.num_vectors} vectors on {spec.model_type}"

    @property
    def roots(self) -> list[nn.Module | None]:
        """The modules that must be left as they are."""
        return [self.subject.model, self.base.model]

    @cached_property
    def tolerance(self) -> Tolerance:
        """What rounding may do on this base and these rows: measured, between a floor and the dtype's own tolerance."""
        dtype = self._dtype
        table, floor = TOLERANCES.get(dtype, TOLERANCES["bfloat16"]), FLOORS.get(dtype, FLOORS["bfloat16"])
        exact = self.plain if self.expected is None else self.expected
        shaken = reference.rounding_noise(self.base, self.rows, self.prefix)
        noise = max(float(divergences(a, b).max()) for a, b in zip(exact, shaken, strict=True))
        allowed = min(table.max_kl, max(floor, SAFETY * noise))
        # of two distributions at KL d, log-probabilities differ by about sqrt(2 d); the best of many by some times that
        tie = min(table.tie, max(1e-4, SAFETY * (2 * allowed) ** 0.5))
        return Tolerance(max_kl=allowed, mean_kl=allowed, tie=tie)

    @cached_property
    def coarse_noise(self) -> float:
        """Largest divergence that rounding to bfloat16 makes on this base and these rows, with its margin, in nats."""
        exact = self.plain if self.expected is None else self.expected
        shaken = reference.rounding_noise(self.base, self.rows, self.prefix, eps=float(torch.finfo(torch.bfloat16).eps))
        return SAFETY * max(float(divergences(a, b).max()) for a, b in zip(exact, shaken, strict=True))

    @cached_property
    def weights(self) -> WeightDifference | None:
        """How far the model's weights lie from the base's; None where they cannot be compared."""
        return weight_difference(self.subject.model, self.base.model)

    @property
    def _dtype(self) -> str:
        return str(self.base.dtype).removeprefix("torch.")

    @property
    def match(self) -> float:
        """Relative error up to which two tensors are the same."""
        return MATCH.get(self._dtype, MATCH["bfloat16"])

    def _checksum(self) -> str:
        return self.base.checksum() + ("" if self.subject.model is None else tensors_sha256(self.subject.model))

    def sha256_now(self) -> str:
        """Return a hash of all tensors of model and base; compare with `sha256_before`."""
        return self._checksum()

    # --- what is run ---

    @cached_property
    def rows(self) -> list[list[int]]:
        """Three probe rows of different length."""
        return text_rows(self.base, LENGTHS)

    @cached_property
    def long_row(self) -> list[int]:
        """A row longer than the reach of a prompt through the base's windows, as far as the base allows."""
        spec, wanted = self.base.spec, LONG_TEXT
        if self.reach is not None:
            wanted = min(max(wanted, self.reach + 8), MAX_LONG_TEXT)
        if spec.max_positions is not None:
            wanted = min(wanted, spec.max_positions - self.num_positions - 1)
        return text_rows(self.base, [max(1, wanted)], seed=1)[0]

    @cached_property
    def reach(self) -> int | None:
        """Text tokens that a block in front can influence: L·(W-1) - N where all layers have windows, else None."""
        windows = [layer.window for layer in self.base.spec.layers]
        if any(window is None for window in windows):
            return None
        return sum(window - 1 for window in windows if window is not None) - self.num_positions

    @cached_property
    def watched(self) -> tuple[list[Tensor], int, list[AttentionCall], list[LayerPass]]:
        """The first row alone, watched: logits, their width, attention calls and layer passes."""
        layers = find_layers(self.subject.model, self.base.spec.num_layers)
        with torch.no_grad(), AttentionWatch() as watch, layers_watched(layers) as passes:
            logits, width = run_rows(self.subject.forward, self.base, self.rows[:1])
        return logits, width, watch.calls, passes

    @cached_property
    def single(self) -> list[Tensor]:
        """Logits [T, V] of each probe row, run alone."""
        return [self.watched[0][0], *(self.run([row])[0] for row in self.rows[1:])]

    @property
    def width(self) -> int:
        """Logits per row, for a text of `LENGTHS[0]` tokens."""
        return self.watched[1]

    def run(self, rows: Sequence[Sequence[int]], side: str = "left") -> list[Tensor]:
        """Return logits [T, V] of rows run as one batch, under one random seed."""
        torch.manual_seed(0)
        with torch.no_grad():
            return run_rows(self.subject.forward, self.base, rows, "left" if side == "left" else "right")[0]

    @cached_property
    def generated(self) -> list[list[int]]:
        """The new tokens of each probe row, generated alone. Raises ProbeFailed where that cannot be."""
        return [generate_rows(self.subject.generate, self.base, [row])[0] for row in self.rows]

    def need_finite(self) -> None:
        """Raise ProbeFailed where logits are NaN or infinite, so that no comparison means anything."""
        if not all(bool(logits.isfinite().all()) for logits in self.single):
            raise ProbeFailed("logits that are not finite")

    # --- what it should be ---

    @cached_property
    def vectors(self) -> Vectors | None:
        """The trained vectors as one of foreword's kinds, where they are one or are named as in its files."""
        given = self.subject.vectors
        if given is None or isinstance(given, SoftPrompt | SoftKV):
            return given
        if isinstance(given, SoftPrefix):
            return SoftPrompt(given.vectors, given.block) if given.vectors.ndim == 2 else given
        names = set(given)
        layers = {f"{part}.{layer}" for part in ("key", "value") for layer in range(self.base.spec.num_layers)}
        if names == {"prefix"} and given["prefix"].ndim == 2:  # P·D numbers are a prompt, whatever their name
            return SoftPrompt(given["prefix"], Block((self.subject.num_vectors,)))
        if names in ({"prompt"}, {"prefix"}, layers):
            return vectors_from_tensors(given, Block((self.subject.num_vectors,)))
        return None

    @cached_property
    def num_positions(self) -> int:
        """N, positions that the vectors and their block's literal tokens take."""
        block = None if self.vectors is None else self.vectors.block
        return self.subject.num_vectors if block is None else block.num_positions

    @cached_property
    def compiled(self) -> KVPrefix | ForewordError | None:
        """The exact prefix that the vectors amount to, the error that says why there is none, or None without them."""
        if self.vectors is None:
            return None
        try:
            with reference.at_rest(self.base):
                return compile(self.base, self.vectors)
        except ForewordError as error:
            return error
        except (RuntimeError, ValueError, IndexError) as error:  # shapes that torch itself refuses
            return ProbeFailed(f"the vectors cannot be compiled: {error}")

    @property
    def prefix(self) -> KVPrefix | None:
        """The exact prefix, where there is one."""
        return self.compiled if isinstance(self.compiled, KVPrefix) else None

    @cached_property
    def expected(self) -> list[Tensor] | None:
        """Logits [T, V] of each probe row as the vectors should make them."""
        return None if self.prefix is None else reference.reference_logits(self.base, self.rows, self.prefix)

    @cached_property
    def plain(self) -> list[Tensor]:
        """Logits [T, V] of each probe row by the base alone."""
        return reference.reference_logits(self.base, self.rows, None)

    # --- comparisons ---

    @cached_property
    def difference(self) -> Tensor | None:
        """KL(expected || found) of every text token of the probe rows, in nats; None without a reference."""
        if self.expected is None:
            return None
        return torch.cat([divergences(want, got) for want, got in zip(self.expected, self.single, strict=True)])

    @cached_property
    def conforms(self) -> bool | None:
        """Whether the probe rows, each alone, give what the vectors should make of them; None without a reference."""
        return None if self.difference is None else bool(self.difference.max() <= self.tolerance.max_kl)

    @cached_property
    def effect(self) -> Tensor:
        """KL(with || without the vectors) of every text token of the probe rows, as found, in nats."""
        return torch.cat([divergences(got, bare) for got, bare in zip(self.single, self.plain, strict=True)])

    @cached_property
    def expected_effect(self) -> Tensor | None:
        """The same as the vectors should have it."""
        if self.expected is None:
            return None
        return torch.cat([divergences(want, bare) for want, bare in zip(self.expected, self.plain, strict=True)])

    @cached_property
    def hypothesis(self) -> reference.Hypothesis | None:
        """The computable fault whose output is nearest to what was found, within tolerance, and which agrees with what
        was seen inside; None where the output conforms or none fits."""
        if self.prefix is None or self.vectors is None or self.conforms in (True, None):
            return None
        best, least = None, self.tolerance.max_kl
        for guess in reference.hypotheses(self.base, self.vectors, self.prefix):
            if self._seen_against(guess):
                continue
            found = reference.logits_at(self.base, self.rows[0], guess.prefix, guess.start)
            worst = float(divergences(found, self.single[0]).max())
            if (best is None and worst <= least) or worst < least / 2:  # the first of several that fit alike
                best, least = guess, worst
        return best

    def _seen_against(self, guess: reference.Hypothesis) -> bool:
        """Return whether keys, values or positions that were seen inside contradict a hypothesis."""
        if guess.prefix is None:
            return any(seen.visible for seen in self.seen)
        if self.text_start is not None and self.text_start[0] != guess.start:
            return True
        for name in ("keys", "values"):
            for layer, want in enumerate(getattr(guess.prefix, name)):
                rows = self.rows_in_front(name, layer)
                if rows is not None and float((rows.float() - want.float()).norm()) > self.match * (
                    float(want.float().norm()) + float(rows.float().norm())
                ):
                    return True
        return False

    # --- what was seen inside ---

    @cached_property
    def calls(self) -> list[AttentionCall]:
        """The attention of each layer for the first row: the last L calls; [] where fewer were seen."""
        count = self.base.spec.num_layers
        calls = self.watched[2]
        return calls[-count:] if len(calls) >= count and len(calls) % count == 0 else []

    @cached_property
    def seen(self) -> list[Seen]:
        """What each layer's attention saw, by layer; [] where it could not be watched."""
        return [summarise(call, LENGTHS[0]) for call in self.calls]

    @cached_property
    def passes(self) -> list[LayerPass]:
        """What each layer read and wrote for the first row: the last L passes; [] where it could not be watched."""
        count, passes = self.base.spec.num_layers, self.watched[3]
        whole = len(passes) >= count and [p.index for p in passes[-count:]] == list(range(count))
        return passes[-count:] if whole else []

    @cached_property
    def entering(self) -> list[int]:
        """Rows or keys beside the text's own that enter at each layer from outside; [] where it cannot be watched.

        Counted are hidden rows that the layer below did not write, and keys that no row of the layer's input made.
        """
        if not self.passes or not self.seen:
            return []
        first = self.passes[0].inputs.shape[1] - LENGTHS[0]
        rows = [max(0, first), *(len(rows) for rows in foreign_rows(self.passes))]
        return [row + seen.outside for row, seen in zip(rows, self.seen, strict=True)]

    @cached_property
    def injected(self) -> list[Tensor]:
        """Hidden rows [K, D] that enter at each layer but the first, in the layers' order; [] where not watched."""
        return foreign_rows(self.passes) if self.passes else []

    @cached_property
    def value_errors(self) -> list[float | None]:
        """Relative error of each layer's values at the block's places, found against expected; None where not seen."""
        return self._errors("values")

    @cached_property
    def key_errors(self) -> list[float | None]:
        """The same of the keys."""
        return self._errors("keys")

    def rows_in_front(self, name: str, layer: int) -> Tensor | None:
        """Return the keys or values [Hkv, N, Dh] that a layer's attention has in front of the text; None if unseen."""
        if not self.calls or self.prefix is None:
            return None
        rows, count = getattr(self.calls[layer], name), self.num_positions
        seen = self.seen[layer]
        if rows is None or seen.extra < count or seen.visible > count:  # more than the block: whose rows are these?
            return None
        want = getattr(self.prefix, name)[layer]
        front: Tensor = rows[0, :, :count]
        if front.shape[0] % want.shape[0] or front.shape[1:] != want.shape[1:]:
            return None
        return front[:: front.shape[0] // want.shape[0]]

    def _errors(self, name: str) -> list[float | None]:
        if not self.calls or self.prefix is None:
            return []
        found: list[float | None] = []
        for layer, want in enumerate(getattr(self.prefix, name)):
            rows = self.rows_in_front(name, layer)
            found.append(None if rows is None else relative_error(rows, want))
        return found

    @cached_property
    def rearranged(self) -> list[int]:
        """Layers that hold the expected numbers in front of the text, in another arrangement."""
        found: list[int] = []
        for layer, error in enumerate(self.value_errors):
            rows = self.rows_in_front("values", layer)
            if rows is None or error is None or error <= self.match or self.prefix is None:
                continue
            want = self.prefix.values[layer].float().flatten().sort().values
            if relative_error(rows.float().flatten().sort().values, want) <= self.match / 10:
                found.append(layer)
        return found

    @cached_property
    def text_start(self) -> tuple[int, list[float]] | None:
        """Position at which the text starts, by the first layer's keys, and the error of every start 0..2N.

        None where keys were not seen or do not depend on position.
        """
        if not self.calls or self.calls[0].keys is None:
            return None
        found = self.calls[0].keys[0, :, -LENGTHS[0] :]
        starts = range(2 * self.num_positions + 1)  # twice P: shifted two times
        every = reference.text_keys_from(self.base, self.rows[0], starts)
        if every is None or every.shape[2:] != found.shape[1:] or found.shape[0] % every.shape[1]:
            return None
        own = found[:: found.shape[0] // every.shape[1]]
        errors = [relative_error(own, want) for want in every]
        best = min(range(len(errors)), key=lambda start: errors[start])
        apart = sorted(errors)[1] if len(errors) > 1 else 0.0
        return (best, errors) if errors[best] <= self.match and apart > 2 * errors[best] else None
