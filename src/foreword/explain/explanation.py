"""`explain`: every signal that tells what vectors do, measured on real rows, with a verdict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from foreword.core.artefact import Artefact
from foreword.core.compile import check_base
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix, SoftKV, Vectors
from foreword.errors import IncompatibleModel
from foreword.explain.ablate import (
    Form,
    as_prefix,
    block_of,
    count_vectors,
    divergences,
    form_without,
    greedy_answers,
)
from foreword.explain.attention import Attention, measure_attention
from foreword.explain.effects import (
    Losses,
    OneByOne,
    OutputEffect,
    Verdict,
    effect_on_outputs,
    judge,
    leave_one_out,
    row_losses,
    summarise_losses,
)
from foreword.explain.estimate import Resamples
from foreword.explain.examples import Example, Sample, with_answers
from foreword.explain.norms import Norms, measure_norms
from foreword.explain.reach import Reach, measure_reach
from foreword.explain.tokens import Faithfulness, Reading, measure_faithfulness, read_tokens

GREEDY_TOKENS = 16
"""Longest answer that the base itself gives where rows have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What vectors do, in numbers. A part that is None was not measured; `missing` says why."""

    name: str
    method: str
    num_vectors: int
    num_positions: int
    """Of the block: vectors and literal tokens."""
    base: str
    dtype: str
    sha256: str
    source: str
    """The rows."""
    num_rows: int
    num_answer_tokens: int
    verdict: Verdict
    outputs: OutputEffect
    reach: Reach
    norms: Norms
    attention: Attention | None
    losses: Losses | None
    one_by_one: OneByOne | None
    reading: Reading | None
    faithfulness: Faithfulness | None
    missing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self)


def explain(
    base: FrozenModel,
    source: Artefact | Vectors,
    sample: Sample,
    *,
    name: str = "",
    one_by_one: bool = True,
    nearest: int = 3,
    seed: int = 0,
    allow_mismatch: bool = False,
) -> Explanation:
    """Measure what vectors do on a sample of rows (`gather`).

    Costs about P + 10 forwards over the rows, where `one_by_one` is false 10. `nearest` tokens are named per vector;
    `seed` is that of the bootstrap. The base is left as it was. Raises IncompatibleModel where the vectors belong to
    another base (unless `allow_mismatch`).
    """
    if isinstance(source, Artefact) and not allow_mismatch:
        check_base(base, source)
    vectors = source.vectors if isinstance(source, Artefact) else source
    full = form_without(base, vectors)
    none = form_without(base, vectors, range(count_vectors(vectors)))
    missing: list[str] = []
    examples = _answered(base, full, sample, missing)
    kl = divergences(base, full, none, examples)
    outputs = effect_on_outputs(kl, examples, seed)
    reading = read_tokens(base, vectors, nearest)
    if reading is None:
        missing.append("Keys and values lie in no token's space: there are no nearest tokens, and no such reading.")
    losses, singles, faithfulness = None, None, None
    if sample.has_targets:
        losses, singles, faithfulness = _loss_signals(base, vectors, examples, reading, one_by_one, seed)
        if losses.gain.low is None:
            missing.append(f"{len(examples)} rows are too few for intervals.")
    attention = _attention(base, as_prefix(full, block_of(vectors), vectors.method), examples, missing)
    dtype = str(base.dtype).removeprefix("torch.")
    return Explanation(
        name=name or (source.header.task if isinstance(source, Artefact) else vectors.method),
        method=vectors.method,
        num_vectors=count_vectors(vectors),
        num_positions=block_of(vectors).num_positions,
        base=base.spec.model_type,
        dtype=dtype,
        sha256=source.sha256 if isinstance(source, Artefact) else "",
        source=sample.source,
        num_rows=len(examples),
        num_answer_tokens=sum(example.num_answer for example in examples),
        verdict=judge(dtype, outputs, losses),
        outputs=outputs,
        reach=measure_reach(base, vectors, examples, kl),
        norms=measure_norms(base, vectors, full, examples),
        attention=attention,
        losses=losses,
        one_by_one=singles,
        reading=reading,
        faithfulness=faithfulness,
        missing=tuple(missing),
    )


def _answered(base: FrozenModel, full: Form, sample: Sample, missing: list[str]) -> list[Example]:
    """Return the sample's examples, with the base's own answers where the data have none."""
    if sample.has_targets:
        return list(sample.examples)
    missing.append(
        "The rows have no targets: loss, leave-one-out and faithfulness need them (give --task or --rows). "
        f"Outputs are the base's own greedy answers of up to {GREEDY_TOKENS} tokens."
    )
    return with_answers(sample.examples, greedy_answers(base, full, sample.examples, GREEDY_TOKENS))


def _loss_signals(
    base: FrozenModel, vectors: Vectors, examples: list[Example], reading: Reading | None, one_by_one: bool, seed: int
) -> tuple[Losses, OneByOne | None, Faithfulness | None]:
    """Return what needs targets: the losses, each vector's worth, and how faithful nearest tokens are."""
    draws = Resamples([example.num_answer for example in examples], seed)
    sums = row_losses(base, vectors, examples)
    singles = leave_one_out(base, vectors, examples, sums["trained"], draws) if one_by_one else None
    faithfulness = None
    if reading is not None and not isinstance(vectors, SoftKV):
        faithfulness = measure_faithfulness(base, vectors, reading, examples, sums, draws)
    return summarise_losses(sums, draws), singles, faithfulness


def _attention(base: FrozenModel, prefix: KVPrefix, examples: list[Example], missing: list[str]) -> Attention | None:
    """Return the prefix mass, or None with the reason among what is missing."""
    if prefix.block is not None and not prefix.block.num_soft:
        missing.append("All vectors stand behind the text: there is no prefix, hence no prefix mass.")
        return None
    try:
        return measure_attention(base, prefix, examples)
    except IncompatibleModel as error:
        missing.append(f"No prefix mass: {error.message}.")
        return None
