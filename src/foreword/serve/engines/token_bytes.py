"""The bytes that one token adds to a text, for OpenAI's log-probabilities. Imports no torch."""

from __future__ import annotations

import re
from typing import Any


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Return what one token adds to a text, for byte-level and SentencePiece vocabularies; b"" for an unused id."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return b""
    if token_id in tokenizer.added_tokens_decoder:
        return str(token).encode()
    if "ByteLevel" in repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", "")):
        return bytes(_BYTES[letter] for letter in token)
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return str(token).replace("\u2581", " ").encode()


def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
