import dataclasses
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from foreword.compare.lora import ADAPTER, LoraEngine, add_lora, encode_whole, load_lora, train_lora
from foreword.compare.plan import Lora, Settings, make_plan
from foreword.core.template import TaskTemplate
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from foreword.eval.tasks import sample_rows
from foreword.train.data import BatchOrder
from foreword.train.loop import fit
from foreword.train.loss import mean_losses
from foreword.train.state import RunState
from tests.bundled import BASE, bundled
from tests.compare.cases import FEW, small_task
from tests.tiny import tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def randomised(base, seed=0, scale=0.05, **lora):
    """A base with updates that do something: B starts at zero."""
    adapted = add_lora(base, Lora(**lora), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return adapted


def lora_run(folder, overrides=(), **task):
    return make_plan(small_task(folder, **task), bundled(), Settings(), [*FEW, *overrides]).run("lora")


def by_hand(run, rows, order, steps, rank=8):
    """LoRA as a PEFT user trains it: own rendering, padding, HF's loss, AdamW, warm-up of one step, linear to zero."""
    tokenizer = bundled().tokenizer
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    torch.manual_seed(run.config.seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    peft_model = get_peft_model(model, config)
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        ids, labels = [], []
        for place in order[step]:
            text = f"<|begin|><|user|>{rows[place].input}<|end|><|assistant|>"
            prompt = tokenizer(text, add_special_tokens=False).input_ids
            target = tokenizer(f"{rows[place].target}<|end|>", add_special_tokens=False).input_ids
            ids.append(prompt + target)
            labels.append([-100] * len(prompt) + target)
        longest = max(map(len, ids))
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
        padded = [row + [0] * (longest - len(row)) for row in ids]
        targets = [row + [-100] * (longest - len(row)) for row in labels]
        loss = peft_model(
            input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask), labels=torch.tensor(targets)
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = run.lr * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, parameters


def test_training_is_what_a_peft_user_gets_by_hand(tmp_path):
    run = lora_run(tmp_path, ["train.steps=4"])
    rows = run.task.rows("train")
    soft = RunState(bundled(), make_plan(small_task(tmp_path), bundled(), Settings(), FEW).run("kv"))
    order = [soft.order.batch(step) for step in range(4)]  # the order that the soft methods see
    losses, parameters = by_hand(run, rows, order, 4)
    result = train_lora(bundled(), run, Lora(), tmp_path / "lora")
    assert result.status == "done"
    assert [entry["loss"] for entry in result.history] == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]
    assert result.best["step"] == 4  # else another step's weights are compared
    saved = load_file(tmp_path / "lora" / ADAPTER)
    mine = load_lora(bundled(), tmp_path / "lora").parameters
    assert len(saved) == len(mine) == len(parameters)
    for ours, theirs in zip(mine, parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-5)


def test_rows_are_those_of_the_soft_methods_in_their_order(tmp_path):
    plan = make_plan(small_task(tmp_path), bundled(), Settings(), FEW)
    soft, run = RunState(bundled(), plan.run("kv")), plan.run("lora")
    whole = encode_whole(bundled(), run, run.task.rows("train"))
    bos = bundled().tokenizer.bos_token_id  # what the soft methods have in their block beside the vectors
    assert [row.ids for row in whole] == [[bos, *row.ids] for row in soft.train]
    assert [row.num_targets for row in whole] == [row.num_targets for row in soft.train]


def test_hard_text_of_the_template_stays(tmp_path):
    run = lora_run(tmp_path, template="{soft:4} Say it.\n{input}{soft:2}")
    row = run.task.rows("train")[0]
    text = bundled().tokenizer.decode(encode_whole(bundled(), run, [row])[0].ids)
    assert text == f"<|begin|><|user|> Say it.\n{row.input}<|end|><|assistant|>{row.target}<|end|>"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "bloom"])
def test_the_engine_over_an_adapted_base_gives_transformers_own_tokens(name):
    adapted = randomised(tiny(name), scale=0.2)
    generator = random.Random(0)
    prompts = [[generator.randrange(3, 97) for _ in range(length)] for length in (3, 9, 5, 14)]
    outputs = Engine(adapted.base).generate([Request(prompt_ids=ids, max_tokens=8) for ids in prompts])
    plain = Engine(tiny(name)).generate([Request(prompt_ids=ids, max_tokens=8) for ids in prompts])
    for ids, output in zip(prompts, outputs, strict=True):
        own = adapted.peft_model.generate(
            input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
        own = own[: own.index(2)] if 2 in own else own
        assert list(output.token_ids) == own
    assert [output.token_ids for output in outputs] != [output.token_ids for output in plain]


def test_requests_are_rendered_as_trained():
    template = TaskTemplate("{soft:4}{input}", chat=True)
    engine = LoraEngine(randomised(bundled()), "lora", template)
    tokenizer = bundled().tokenizer
    whole = tokenizer("<|begin|><|user|>hello<|end|><|assistant|>", add_special_tokens=False).input_ids
    rendered = template.hard().render(tokenizer, "hello").ids
    asked = [
        Request(prompt="hello", prefix="lora", max_tokens=3),
        Request(messages=[{"role": "user", "content": "hello"}], prefix="lora", max_tokens=3),
        Request(prompt_ids=rendered, prefix="lora", max_tokens=3),
    ]
    assert [engine.rendered(request).prompt_ids for request in asked] == [whole] * 3
    assert len({output.token_ids for output in engine.generate(asked)}) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe"])
def test_the_base_keeps_every_bit_and_no_trace(name):
    base = tiny(name)
    before, modules = base.checksum(), [type(module) for module in base.model.modules()]
    adapted = randomised(base)
    rows = [[5, 6, 7, 8]]
    Engine(adapted.base).generate([Request(prompt_ids=rows[0], max_tokens=2)])
    shared = {tensor.data_ptr() for tensor in base.model.parameters()}
    own = [p for p in adapted.base.model.parameters() if p.data_ptr() not in shared]
    assert sum(p.numel() for p in own) == sum(p.numel() for p in adapted.parameters)  # no weight is held twice
    assert base.checksum() == before
    assert [type(module) for module in base.model.modules()] == modules
    assert not any(p.requires_grad for p in base.model.parameters())


def test_fresh_updates_leave_the_base_as_it_is():
    adapted = add_lora(tiny("llama"), Lora(), 0)
    request = Request(prompt_ids=[5, 6, 7], max_tokens=6)
    assert (
        Engine(adapted.base).generate([request])[0].token_ids == Engine(tiny("llama")).generate([request])[0].token_ids
    )


def test_a_seed_gives_its_updates_and_leaves_the_generator_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, same, other = (add_lora(tiny("llama"), Lora(), seed).snapshot() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_bfloat16_base_trains_float32_updates(tmp_path):
    adapted = add_lora(tiny("llama", dtype="bfloat16"), Lora(rank=2), 0)
    assert {p.dtype for p in adapted.parameters} == {torch.float32}
    assert adapted.base.dtype == torch.bfloat16


def test_targets_choose_the_modules():
    some = add_lora(tiny("llama"), Lora(targets="q_proj,v_proj"), 0)
    assert len(some.parameters) == 2 * 2 * tiny("llama").spec.num_layers
    with pytest.raises(ValueError, match="nothing_proj"):
        add_lora(tiny("llama"), Lora(targets="nothing_proj"), 0)


def test_the_best_on_dev_is_kept_and_patience_stops(tmp_path):
    run = lora_run(tmp_path, ["train.steps=12", "train.lr=3.0", "train.method=prompt", "train.patience=1"])
    wild = dataclasses.replace(run, config=dataclasses.replace(run.config, lr=3.0, eval_every=1))
    result = train_lora(bundled(), wild, Lora(), tmp_path / "lora")
    values = [entry["dev_loss"] for entry in result.history]
    assert result.status == "early_stopped" and len(values) < 12
    assert result.best["value"] == min(values) and values[-1] > min(values)
    loaded = load_lora(bundled(), tmp_path / "lora").base
    dev = encode_whole(bundled(), wild, sample_rows(wild.task.rows("dev"), wild.config.eval_rows, seed=0))
    assert mean_losses(loaded, [(None, dev)])[0] == pytest.approx(min(values), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_it_without_a_file(tmp_path):
    run = lora_run(tmp_path, ["train.steps=8"])
    wild = dataclasses.replace(run, config=dataclasses.replace(run.config, lr=1e30))
    result = train_lora(bundled(), wild, Lora(), tmp_path / "lora")
    assert result.status == "diverged" and result.artefact is None
    assert result.error is not None and "with learning rate" in result.error.message
    assert not (tmp_path / "lora" / ADAPTER).exists()


def test_the_order_of_rows_is_that_of_the_soft_methods(tmp_path, monkeypatch):
    seen = {}
    original = BatchOrder.batch

    def spy(self, index):
        batch = original(self, index)
        seen.setdefault(id(self), []).append(batch)
        return batch

    monkeypatch.setattr(BatchOrder, "batch", spy)  # below, "er" melts with some inputs: lengths differ by row
    plan = make_plan(small_task(tmp_path, template="{soft:4}{input}{soft:3}er"), bundled(), Settings(), FEW)
    fit(bundled(), [plan.run("prompt")], out=tmp_path / "prompt")
    train_lora(bundled(), plan.run("lora"), Lora(), tmp_path / "lora")
    soft, lora = seen.values()
    assert lora == soft and len(soft) == 3 and all(len(batch) == 4 for batch in soft)
