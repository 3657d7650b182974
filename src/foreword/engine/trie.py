"""A closed set of answers as a trie over token ids. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from foreword.errors import BadRequest


@dataclass(slots=True, eq=False)
class TrieNode:
    """A place in the trie: what may follow, and which answer is complete here."""

    children: dict[int, TrieNode] = field(default_factory=dict)
    answer: str | None = None
    """Set on leaves, which lie behind an end token."""
    depth: int = 0
    """Tokens from the root, the end token included."""


def build_trie(answers: Sequence[str], rows: Sequence[Sequence[int]]) -> TrieNode:
    """Return the root of a trie over `rows`, the token ids of each answer with the end token last.

    The end token tells an answer from another that goes on behind it. Raises BadRequest where an answer has the end
    token inside.
    """
    root = TrieNode()
    for answer, row in zip(answers, rows, strict=True):
        if row[-1] in row[:-1]:
            raise BadRequest(f"choices holds {answer!r}, which has the end token inside", hint="Leave it out.")
        node = root
        for token in row:
            node = node.children.setdefault(token, TrieNode(depth=node.depth + 1))
        if node.answer is None:
            node.answer = answer
    return root


def forced_tokens(node: TrieNode) -> tuple[list[int], TrieNode]:
    """Return the tokens that must follow `node`, the end token included, and the node behind them."""
    tokens: list[int] = []
    while len(node.children) == 1:
        ((token, node),) = node.children.items()
        tokens.append(token)
    return tokens, node


def longest_answer(node: TrieNode) -> int:
    """Return the tokens of the longest answer, the end token included."""
    deepest, stack = 0, [node]
    while stack:
        current = stack.pop()
        deepest = max(deepest, current.depth)
        stack.extend(current.children.values())
    return deepest
