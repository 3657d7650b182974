"""Templates: blocks, rendering, BOS, slots anywhere; training and serving render by the same function."""

import pytest
from transformers import PreTrainedTokenizerFast

from foreword.core.template import TaskTemplate, encode_plain, encode_target, uses_bos
from foreword.errors import BadRequest, ConfigError
from tests.bundled import BASE

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def bundled():
    return PreTrainedTokenizerFast.from_pretrained(BASE)


@pytest.fixture(scope="module")
def without_bos():
    """A tokenizer in the manner of Qwen: no BOS at all, ChatML."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE, bos_token=None, chat_template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.bos_token = None
    return tokenizer


def whole(template, tokenizer, text):
    """All ids of a row, 0 where a vector stands."""
    return template.block(tokenizer).literal_ids() + template.render(tokenizer, text).ids


INPUTS = [
    "hello there",
    " leading space",
    "\nnewline",
    "7 numbers, 8",
    "é",
    '"quoted"',
    "x" * 300,
    "{braces} {{twice}}",
]


@pytest.mark.parametrize("text", ["{soft:20}{input}", "Classify:\n{soft:3}{input}\nLabel:", "{soft:4}Say it: {input}"])
def test_plain_templates_keep_their_slots_without_a_bos(without_bos, text):
    assert not uses_bos(without_bos)
    template = TaskTemplate(text)
    assert template.block(without_bos).num_soft == template.num_left
    for value in INPUTS:
        ids = whole(template, without_bos, value)
        hard = text.replace("{input}", value)
        for count in (20, 3, 4):
            hard = hard.replace(f"{{soft:{count}}}", "")
        assert without_bos.decode([i for i in ids if i]).replace(" ", "") == hard.replace(" ", "")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "text", ["{soft:20}{input}", "{soft:4}<|begin|>{input}", "Do {soft:2} this: {input} {soft:3}!"]
)
def test_exactly_one_bos_where_the_base_uses_one(bundled, chat, text):
    assert uses_bos(bundled)
    ids = whole(TaskTemplate(text.replace("<|begin|>", "")), bundled, "hello")
    assert ids[0] == bundled.bos_token_id and ids.count(bundled.bos_token_id) == 1
    assert encode_plain(bundled, "<|begin|>hello") == encode_plain(bundled, "hello")


def test_in_a_chat_leading_slots_stand_behind_bos_and_before_the_first_turn(bundled):
    template = TaskTemplate("{soft:5}{input}", chat=True)
    assert template.block(bundled).segments == ((bundled.bos_token_id,), 5)
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "again"},
    ]
    expected = bundled.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    rendered = template.render_messages(bundled, turns)
    assert bundled.decode(rendered.ids) == expected.removeprefix("<|begin|>")


def test_a_system_turn_of_the_tasks_own_is_part_of_the_block(bundled):
    template = TaskTemplate("{input}", chat=True, system="{soft:4} Route the e-mail.")
    block = template.block(bundled)
    assert block.num_soft == 4
    assert bundled.decode(block.literal_ids()).endswith("Route the e-mail.<|end|>")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    ids = template.render_messages(bundled, turns).ids
    assert bundled.decode(ids) == "<|system|>Be brief.<|end|><|user|>x<|end|><|assistant|>"


def test_slots_behind_the_input_take_places_in_the_row(bundled):
    template = TaskTemplate("{soft:2}{input}{soft:3}?{soft:1}", chat=True)
    rendered = template.render(bundled, "hello")
    assert [(row, count) for _, row, count in rendered.slots] == [(0, 3), (3, 1)]
    for offset, _, count in rendered.slots:
        assert rendered.ids[offset : offset + count] == [0] * count
    assert template.num_left == 2 and template.num_after == 4


def test_hard_text_behind_the_slots_is_found_to_be_constant(bundled):
    template = TaskTemplate("{soft:4} Classify the e-mail by its topic.\nE-mail: {input}")
    assert "Classify the e-mail by its topic." in bundled.decode(template.block(bundled).literal_ids())
    for value in INPUTS:
        ids = whole(template, bundled, value)
        text = bundled.decode([i for i in ids if i > 1])
        assert text == f" Classify the e-mail by its topic.\nE-mail: {value}"


def test_slots_inside_the_user_turn_refuse_a_system_message(bundled):
    template = TaskTemplate("Please {soft:2} answer: {input}", chat=True)
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]
    with pytest.raises(BadRequest, match="cannot follow this task's block"):
        template.render_messages(bundled, turns)


def test_a_chat_template_that_refuses_a_role_says_so(without_bos):
    tokenizer = without_bos
    tokenizer.chat_template = NO_SYSTEM
    try:
        template = TaskTemplate("{soft:3}{input}", chat=True)
        assert template.block(tokenizer).num_soft == 3
        with pytest.raises(BadRequest, match="refuses the roles system, user"):
            template.render_messages(tokenizer, [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}])
    finally:
        tokenizer.chat_template = CHATML


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "no slot for it"}, "0 times"),
        ({"text": "{input} and {input}"}, "2 times"),
        ({"text": "{input} {label}"}, r"holds '\{label\}'"),
        ({"text": "{input} {"}, "holds"),
        ({"text": "{soft:x}{input}"}, "holds"),
        ({"text": "{input}", "system": "hello"}, "system is for chat"),
        ({"text": "{input}", "chat": True, "system": "{input}"}, "system '{input}' holds"),
    ],
)
def test_bad_templates_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TaskTemplate(**fields)


def test_doubled_braces_are_literal(bundled):
    ids = whole(TaskTemplate('{{"a": {soft:1}}} {input}'), bundled, "{{x}}")
    assert bundled.decode([i for i in ids if i > 1]) == '{"a": } {{x}}'


def test_the_private_mark_in_a_text_is_refused(bundled):
    with pytest.raises(BadRequest, match="private character"):
        TaskTemplate("{soft:2}{input}").render(bundled, "a \ue0f0 b")


def test_resizing_a_slot():
    assert TaskTemplate("{soft:20}{input}").resized(64).text == "{soft:64}{input}"
    assert TaskTemplate("{input}").resized(8).text == "{soft:8}{input}"
    with pytest.raises(ConfigError, match="2 soft slots"):
        TaskTemplate("{soft:2}{input}{soft:3}").resized(8)


def test_targets_end_with_the_token_that_ends_a_turn(bundled):
    ids = encode_target(bundled, "billing", frozenset({2}))
    assert ids[-1] == 2 and bundled.decode(ids[:-1]) == "billing"
