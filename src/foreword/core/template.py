"""Task templates: hard text and soft slots around the input, rendered the same way for training and serving.

A template is text with `{input}` and slots such as `{soft:20}`. Everything constant left of the input, slots included,
is the block that compiles; slots right of the input take the embeddings path. In a chat, slots that lead the template
stand right behind BOS and before the first turn, so that any turns a client sends follow them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreword.core.block import Block
from foreword.errors import BadRequest, ConfigError

SLOT = re.compile(r"\{soft:(\d+)\}")
FIELD = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")
MARK_LEFT, MARK_RIGHT = "\ue0f0", "\ue0f1"
MARK = re.compile(f"{MARK_LEFT}(\\d+){MARK_RIGHT}")
PROBES = ("A b", "7,3", " so", "\nx", "(1) É", '"q"', "<t>", "zz")

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Rendered:
    """Token ids that follow the block, and the soft slots among them as (offset, first row of `after`, count)."""

    ids: list[int]
    slots: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TaskTemplate:
    """How a row of a task becomes tokens."""

    text: str = "{soft:20}{input}"
    chat: bool = False
    system: str | None = None
    """Text and slots of a system turn of the task's own; a client's system message follows as its own turn."""

    def __post_init__(self) -> None:
        inputs = 0
        for name, text in (("template", self.text), ("system", self.system or "")):
            for field in FIELD.findall(text):
                if field == "{input}" and name == "template":
                    inputs += 1
                elif field not in ("{{", "}}") and not SLOT.fullmatch(field):
                    raise ConfigError(
                        f"{name} {text!r} holds {field!r}",
                        hint="Allowed are {input}, soft slots such as {soft:20}, and {{ or }} for a literal brace.",
                    )
        if inputs != 1:
            raise ConfigError(
                f"template {self.text!r} holds {{input}} {inputs} times", hint="Put {input} in exactly once."
            )
        if self.system and not self.chat:
            raise ConfigError("system is for chat templates", hint="Set chat = true, or put the text in the template.")

    @property
    def num_left(self) -> int:
        """Vectors in the block, left of the input."""
        return _count(self.system or "") + _count(self.text.partition("{input}")[0])

    @property
    def num_after(self) -> int:
        """Vectors right of the input."""
        return _count(self.text.partition("{input}")[2])

    def resized(self, num_vectors: int) -> TaskTemplate:
        """Return the template with its one slot, or the lacking one put in front, made `num_vectors` long.

        Raises ConfigError where the template has several slots: their lengths are then its own affair.
        """
        slots = SLOT.findall(self.text + (self.system or ""))
        if len(slots) > 1:
            raise ConfigError(f"template {self.text!r} has {len(slots)} soft slots", hint="Set their lengths there.")
        new = f"{{soft:{num_vectors}}}"
        if not slots:
            return dataclasses.replace(self, text=new + self.text)
        system = SLOT.sub(new, self.system) if self.system else self.system
        return dataclasses.replace(self, text=SLOT.sub(new, self.text), system=system)

    def hard(self) -> TaskTemplate:
        """Return the template without its soft slots: the hard text alone."""
        return TaskTemplate(SLOT.sub("", self.text), self.chat, SLOT.sub("", self.system) if self.system else None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskTemplate:
        """Build the template from `to_json`'s dict."""
        return cls(text=data["text"], chat=data["chat"], system=data["system"])

    def block(self, tokenizer: Any) -> Block:
        """Return the constant block: BOS, hard text and slots that stand left of every input.

        Found by rendering probes: everything up to the last slot left of the input, and the tokens after it that all
        probes share.
        """
        return Block.of(self._block_pieces(tokenizer)[0])

    def render(self, tokenizer: Any, text: str) -> Rendered:
        """Return the tokens that follow the block for one input text."""
        return self._after_block(tokenizer, self._marked(tokenizer, [{"role": "user", "content": text}]))

    def render_messages(self, tokenizer: Any, messages: Sequence[Message]) -> Rendered:
        """Return the tokens that follow the block for a conversation; hard text goes around the first user message.

        Raises BadRequest where the conversation cannot follow the block.
        """
        if not self.chat:
            raise BadRequest(
                "this task has no chat template", hint="Use /v1/completions, or set chat = true and train."
            )
        return self._after_block(tokenizer, self._marked(tokenizer, messages))

    def sha256(self, tokenizer: Any) -> str:
        """Return a hash of the rendering: of the block and of a probe's tokens."""
        block, rendered = self.block(tokenizer), self.render(tokenizer, PROBES[0])
        return hashlib.sha256(repr((block.to_json(), rendered.ids, rendered.slots)).encode()).hexdigest()

    def _marked(self, tokenizer: Any, messages: Sequence[Message]) -> str:
        """Render to text with a mark `<left>count<right>` for each slot, BOS text removed."""
        for message in messages:
            if MARK_LEFT in str(message.get("content", "")):
                raise BadRequest(f"the text holds the private character U+{ord(MARK_LEFT):04X}", hint="Remove it.")
        template = _mark(self.text)
        if not self.chat:
            text = _unbrace(template).replace(MARK_LEFT + MARK_RIGHT, str(messages[0]["content"]))
            return _without_bos(tokenizer, text)
        lead = re.match(f"(?:{MARK_LEFT}\\d+{MARK_RIGHT})*", template)
        leading = lead.group() if lead else ""
        turns = [dict(message) for message in messages]
        user = next((turn for turn in turns if turn["role"] == "user"), None)
        if user is not None:
            body = _unbrace(template[len(leading) :])
            user["content"] = body.replace(MARK_LEFT + MARK_RIGHT, str(user["content"]))
        if self.system:
            turns.insert(0, {"role": "system", "content": _unbrace(_mark(self.system))})
        return leading + render_chat(tokenizer, turns)

    def _block_pieces(self, tokenizer: Any) -> tuple[list[tuple[int, ...] | int], str, tuple[int, ...], int]:
        """Return the block's segments, the marked text up to its last slot, the shared ids behind, their characters."""
        key = (self, id(tokenizer))
        if key not in _BLOCKS:
            probes = [self._marked(tokenizer, [{"role": "user", "content": probe}]) for probe in PROBES]
            head = _up_to_last_mark(probes[0], self.num_left)
            rests = [probe[len(head) :] for probe in probes]
            if self.chat:
                rests += self._other_openings(tokenizer, head)
            segments: list[tuple[int, ...] | int] = [(tokenizer.bos_token_id,)] if uses_bos(tokenizer) else []
            segments += [
                int(piece) if place % 2 else tuple(_tokenize(tokenizer, piece))
                for place, piece in enumerate(MARK.split(head))
            ]
            shared, characters = _shared_start(tokenizer, [MARK.split(rest)[0] for rest in rests])
            _BLOCKS[key] = ([*segments, shared], head, shared, characters)
        return _BLOCKS[key]

    def _other_openings(self, tokenizer: Any, head: str) -> list[str]:
        """Return what stands behind `head` when a client opens with a system or assistant message, where it can."""
        others = []
        for role in ("system", "assistant"):
            turns = [{"role": role, "content": "zz"}, {"role": "user", "content": PROBES[0]}]
            try:
                marked = self._marked(tokenizer, turns)
            except BadRequest:
                continue
            if marked.startswith(head):
                others.append(marked[len(head) :])
        return others

    def _after_block(self, tokenizer: Any, marked: str) -> Rendered:
        _, head, shared, characters = self._block_pieces(tokenizer)
        if not marked.startswith(head):
            raise BadRequest(
                "the conversation cannot follow this task's block, which holds the start of the first user turn",
                hint="Send the user message first, without a system message of your own.",
            )
        pieces = MARK.split(marked[len(head) :])
        ids = _tokenize(tokenizer, pieces[0])
        if tuple(ids[: len(shared)]) == shared:
            ids = ids[len(shared) :]
        else:  # the input's first characters melt with the hard text: cut where the block ends
            ids = _tokenize(tokenizer, pieces[0][characters:])
        slots, row = [], 0
        for count, text in zip(pieces[1::2], pieces[2::2], strict=True):
            slots.append((len(ids), row, int(count)))
            ids += [0] * int(count) + _tokenize(tokenizer, text)
            row += int(count)
        return Rendered(ids, tuple(slots))


_BLOCKS: dict[tuple[TaskTemplate, int], tuple[list[tuple[int, ...] | int], str, tuple[int, ...], int]] = {}


def render_chat(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Render messages through the base's chat template, with the opening of the answer; BOS text is removed.

    Raises ConfigError where the base has no chat template, BadRequest where its template refuses the messages.
    """
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the base's tokenizer has no chat template", hint="Set chat = false in the task.")
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise BadRequest(f"the base's chat template refuses the roles {roles}: {error}") from error
    return _without_bos(tokenizer, text)


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Return token ids of a plain text for the base itself, with exactly one BOS where the base uses one."""
    bos = [tokenizer.bos_token_id] if uses_bos(tokenizer) else []
    return bos + _tokenize(tokenizer, _without_bos(tokenizer, text))


def encode_target(tokenizer: Any, target: str, stop_ids: frozenset[int]) -> list[int]:
    """Return the token ids of an answer, closed by the token that ends a turn (or the sequence)."""
    return [*_tokenize(tokenizer, target), end_id(tokenizer, stop_ids)]


def end_id(tokenizer: Any, stop_ids: frozenset[int]) -> int:
    """Return the id that closes an answer: what the chat template puts behind it, else end of sequence."""
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "zz"}]
        closed = tokenizer.apply_chat_template(turns, tokenize=False)
        for token in _tokenize(tokenizer, closed[closed.rindex("zz") + 2 :]):
            if token in stop_ids:
                return int(token)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the base's tokenizer has no end-of-sequence token", hint="Set eos_token in its files.")
    return int(tokenizer.eos_token_id)


def uses_bos(tokenizer: Any) -> bool:
    """Return whether sequences of this base start with BOS: its tokenizer adds it, or its chat template does."""
    if tokenizer.bos_token_id is None:
        return False
    if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        return True
    if not getattr(tokenizer, "chat_template", None):
        return False
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    return bool(rendered.startswith(tokenizer.bos_token))


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []


def _without_bos(tokenizer: Any, text: str) -> str:
    return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text


def _count(text: str) -> int:
    return sum(int(count) for count in SLOT.findall(text))


def _mark(text: str) -> str:
    """Replace slots by marks and {input} by an empty mark."""
    marked = SLOT.sub(lambda match: f"{MARK_LEFT}{match.group(1)}{MARK_RIGHT}" if int(match.group(1)) else "", text)
    return marked.replace("{input}", MARK_LEFT + MARK_RIGHT)


def _unbrace(text: str) -> str:
    return text.replace("{{", "{").replace("}}", "}")


def _up_to_last_mark(marked: str, num_soft: int) -> str:
    """Return the text up to the end of the mark that completes `num_soft` vectors."""
    end, seen = 0, 0
    for match in MARK.finditer(marked):
        if seen < num_soft:
            seen, end = seen + int(match.group(1)), match.end()
    return marked[:end]


def _shared_start(tokenizer: Any, texts: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """Return the token ids that all texts start with, and the characters they cover."""
    rows = [_tokenize(tokenizer, text) for text in texts]
    count = 0
    while all(len(row) > count and row[count] == rows[0][count] for row in rows):
        count += 1
    if not count:
        return (), 0
    offsets = tokenizer(texts[0], add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return tuple(rows[0][:count]), int(offsets[count - 1][1])
