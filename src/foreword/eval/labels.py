"""Closed sets of answers: the probability of every label, by decoding along the trie of their tokens.

P(label) is the product, over the trie's branching nodes on the label's way, of the next-token distribution renormalised
over the node's children; where there is one way on, it has probability 1. So labels of any token length compete fairly:
no length enters but where labels differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreword.core.template import end_id
from foreword.engine.request import Output, Request
from foreword.errors import BackendFailed, ConfigError

Generate = Callable[[Sequence[Request]], list[Output]]
"""Answers to requests, in their order."""
Array = NDArray[np.float64]
Members = tuple[int, ...]
"""Indices of the labels below a node of the trie; they name the node."""

MIN_MASS = 1e-4
"""A node with less is not expanded: it costs a request and cannot change which label is best."""


@dataclass(frozen=True, slots=True)
class LabelScores:
    """What a closed set of labels got, row by row."""

    labels: tuple[str, ...]
    probabilities: Array
    """[N, K]; each row sums to 1."""
    residual: Array
    """[N]; of it the mass that lay in unexpanded nodes and was spread evenly over the labels below."""

    @property
    def best(self) -> list[str]:
        """Each row's most probable label; of equals the first."""
        return [self.labels[place] for place in self.probabilities.argmax(axis=1)]


@dataclass(frozen=True, slots=True)
class LabelTrie:
    """The labels' token sequences, none of which is the start of another."""

    sequences: tuple[tuple[int, ...], ...]

    def branch(self, members: Members) -> tuple[tuple[int, ...], dict[int, Members]]:
        """Return the tokens that two or more labels share from the start, and the labels behind each next token."""
        first = self.sequences[members[0]]
        depth = 0
        while all(self.sequences[member][depth] == first[depth] for member in members):
            depth += 1
        children: dict[int, list[int]] = {}
        for member in members:
            children.setdefault(self.sequences[member][depth], []).append(member)
        return first[:depth], {token: tuple(below) for token, below in children.items()}


def build_trie(labels: Sequence[str], tokenizer: Any, *, closing_id: int | None = None, lead: str = "") -> LabelTrie:
    """Return the trie of the labels' tokens, each label tokenised behind `lead` and closed where another goes on.

    `closing_id` is the token behind an answer; None takes the tokenizer's end of turn or sequence. Raises ConfigError
    where two labels have the same tokens, or a label has none.
    """
    rows = [tuple(tokenizer(lead + label, add_special_tokens=False).input_ids) for label in labels]
    closed = []
    for place, row in enumerate(rows):
        if not row or row in rows[:place]:
            same = f"the tokens of {labels[rows.index(row)]!r}" if row else "no tokens"
            raise ConfigError(
                f"label {labels[place]!r} has {same}", hint="Choose labels that have tokens of their own."
            )
        if any(other != row and other[: len(row)] == row for other in rows):
            closing_id = end_id(tokenizer, frozenset()) if closing_id is None else closing_id
            row = (*row, closing_id)
        closed.append(row)
    return LabelTrie(tuple(closed))


def label_probabilities(
    generate: Generate,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[str],
    trie: LabelTrie,
    *,
    prefix: str | Sequence[str] | None = None,
    min_mass: float = MIN_MASS,
) -> LabelScores:
    """Return the probability of every label behind each of `prompts`, token ids that follow `prefix`'s block.

    A sequence names each row's own prefix. Works in rounds, one request per row and expanded node, all rows together; a
    task without shared first tokens takes one round. Raises BackendFailed where the engine reports no
    log-probabilities.
    """
    prefixes = [prefix] * len(prompts) if prefix is None or isinstance(prefix, str) else list(prefix)
    probabilities, residual = np.zeros((len(prompts), len(labels))), np.zeros(len(prompts))
    everything = tuple(range(len(labels)))
    nodes: dict[Members, tuple[tuple[int, ...], dict[int, Members]]] = {}
    frontier = [(row, everything, 1.0) for row in range(len(prompts))]
    while frontier:
        for _, members, _ in frontier:
            if members not in nodes:
                nodes[members] = trie.branch(members)
        asked = [_request(prompts[row], *nodes[members], prefixes[row]) for row, members, _ in frontier]
        expanded = []
        for (row, members, mass), output in zip(frontier, generate(asked), strict=True):
            children = nodes[members][1]
            for below, share in zip(children.values(), _shares(output, list(children)), strict=True):
                if len(below) > 1 and mass * share > min_mass:
                    expanded.append((row, below, mass * share))
                    continue
                probabilities[row, below] += mass * share / len(below)
                if len(below) > 1:
                    residual[row] += mass * share
        frontier = expanded
    return LabelScores(tuple(labels), probabilities, residual)


def calibration_error(confidences: Sequence[float], correct: Sequence[bool], num_bins: int = 10) -> float:
    """Return the expected calibration error: |accuracy - confidence| in bins of equal width, weighted by their rows.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    confidence, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    places = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(places, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def _request(prompt: Sequence[int], path: tuple[int, ...], children: Mapping[int, Any], prefix: str | None) -> Request:
    return Request(
        prompt_ids=[*prompt, *path],
        prefix=prefix,
        max_tokens=1,
        allowed_ids=tuple(children),
        logprobs=len(children),
        ignore_eos=True,  # the closing token is one of the children: its log-probability is wanted like any other
    )


def _shares(output: Output, tokens: Sequence[int]) -> list[float]:
    """Return the probability of each token, renormalised over them; what the engine left out shares the rest evenly."""
    steps = output.completions[0].logprobs if output.completions else ()
    if not steps:
        raise BackendFailed("the engine reported no log-probabilities", hint="Judge with decoding = free.")
    known = {**steps[0].top, steps[0].token_id: steps[0].logprob}
    found = {token: math.exp(known[token]) for token in tokens if token in known}
    missing = len(tokens) - len(found)
    rest = max(0.0, 1.0 - sum(found.values())) / missing if missing else 0.0
    shares = [found.get(token, rest) for token in tokens]
    total = sum(shares)
    if not (math.isfinite(total) and total > 0):
        raise BackendFailed(f"the engine's log-probabilities of {len(tokens)} label tokens sum to {total}")
    return [share / total for share in shares]
