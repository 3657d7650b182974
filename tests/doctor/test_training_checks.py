"""Checks of training runs: each planted fault is named, its neighbours are not, and nothing is left changed."""

import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foreword.doctor import diagnose as doctor
from foreword.doctor.checks.training import CHECKS
from foreword.doctor.faults import FAULTS
from foreword.doctor.training_state import put_back
from foreword.doctor.training_subjects import from_fit, from_peft_training
from foreword.train.loss import step_gradients
from foreword.train.run import Run
from foreword.train.state import RunState
from tests.bundled import bundled, write_task
from tests.doctor.hand_loop import B, Cached, Loop, P, Prompted, T, batch, labels_of
from tests.tiny import SIX


def diagnose(subject):
    """Diagnose, and see to it that no check failed by itself."""
    diagnosis = doctor.diagnose(subject)
    broken = [finding.measured for finding in diagnosis.findings if "its probe failed" in finding.measured]
    assert not broken, broken
    return diagnosis


def found(subject):
    diagnosis = diagnose(subject)
    first = diagnosis.first
    return None if first is None else first.fault or first.check


def all_bits(loop):
    """Everything of a loop that a check could have changed."""
    tensors = [*loop.model.state_dict(keep_vars=True).values()]
    state = [value for part in loop.optimizer.state.values() for value in part.values()]
    kept = [tensor.detach().clone() for tensor in [*tensors, *state]]
    grads = [None if t.grad is None else t.grad.clone() for t in tensors]
    flags = [t.requires_grad for t in tensors]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in loop.optimizer.param_groups]
    modes = [module.training for module in loop.model.modules()]
    generators = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    return kept, grads, flags, groups, modes, generators, loop.taken


def assert_same(before, after):
    for one, two in zip(before[0], after[0], strict=True):
        assert torch.equal(one, two)
    for one, two in zip(before[1], after[1], strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    assert before[2:5] == after[2:5] and before[6] == after[6]
    assert before[5][:2] == after[5][:2] and torch.equal(before[5][2], after[5][2])


# Healthy


@pytest.mark.parametrize("name", SIX)
def test_healthy_prompts_have_no_finding(name):
    loop = Loop(Prompted(name))
    diagnosis = diagnose(loop.subject(vocabulary=None))
    assert diagnosis.ok, diagnosis.first
    assert sum(not finding.skipped for finding in diagnosis.findings) >= 9


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_healthy_keys_and_values_have_no_finding(name):
    diagnosis = diagnose(Loop(Cached(name)).train(12).subject())
    assert diagnosis.ok, diagnosis.first


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_healthy_in_mid_run_with_other_optimizers(optimizer):
    lr = {"SGD": 0.3, "Adafactor": 0.02}.get(optimizer.__name__, 3e-3)
    diagnosis = diagnose(Loop(lr=lr, optimizer=optimizer).train(15).subject())
    assert diagnosis.ok, diagnosis.first


def test_healthy_at_both_ends_of_a_schedule():
    """A warm-up that begins at 0 and a decay that ends there are no learning rates that are too small."""
    loop = Loop()
    schedule = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: max(0.0, min(step / 4, (30 - step) / 26)))
    step = loop.step

    def scheduled():
        loss = step()
        schedule.step()
        return loss

    loop.step = scheduled
    assert found(loop.subject()) is None
    loop.train(30)
    assert found(loop.subject(history=())) is None


@pytest.mark.parametrize("method", ["prompt", *(pytest.param(m, marks=pytest.mark.slow) for m in ("prefix", "kv"))])
def test_forewords_own_trainer_has_no_finding(tmp_path, method):
    base, run = bundled(), Run.from_toml(write_task(tmp_path), method=method, steps=24, batch_size=4, warmup_steps=8)
    state = RunState(base, run)
    for step in range(13):
        if step in ((0, 5, 12) if method != "prompt" else (5,)):
            before = state.tuner.encoder.theta.detach().clone(), state.step, list(state.history)
            diagnosis = diagnose(from_fit(base, state, step_gradients))
            assert diagnosis.ok, (step, diagnosis.first)
            assert torch.equal(before[0], state.tuner.encoder.theta) and before[1:] == (state.step, state.history)
        (loss,) = step_gradients(base, [state.step_batch()])
        state.update(loss, 1)


@pytest.mark.slow
def test_forewords_encoders_have_no_finding(tmp_path):
    base = bundled()
    for encoder in ("mlp", "residual"):
        run = Run.from_toml(write_task(tmp_path), encoder=encoder, steps=24, batch_size=4, warmup_steps=8)
        diagnosis = diagnose(from_fit(base, RunState(base, run), step_gradients))
        assert diagnosis.ok, (encoder, diagnosis.first)


# Everything is put back


def test_a_diagnosis_leaves_everything_as_it_was():
    loop = Loop(lr=1e-2).train(3)
    loop.model.base.train()
    loop.loss(batch(1)).backward()
    before = all_bits(loop)
    diagnose(loop.subject())
    assert_same(before, all_bits(loop))


def test_everything_is_put_back_after_an_error():
    loop = Loop().train(2)
    before = all_bits(loop)
    run = loop.subject()
    with pytest.raises(RuntimeError, match="in mid-step"), put_back(run):
        loop.model.base.requires_grad_(True).train()
        for parameter in loop.model.parameters():
            parameter.data.add_(1.0)
        loop.step()
        loop.optimizer.param_groups[0]["lr"] = 7.0
        loop.optimizer.param_groups[0]["new"] = 7.0
        loop.model.rows.data = loop.model.rows.data.double()
        torch.rand(3), random.random(), np.random.rand()
        raise RuntimeError("in mid-step")
    assert_same(before, all_bits(loop))


def test_a_step_that_fails_changes_nothing_and_is_told():
    loop = Loop().train(2)
    before = all_bits(loop)

    def failing():
        loop.model.rows.data.add_(1.0)
        raise ValueError("no more data")

    diagnosis = diagnose(loop.subject(step=failing))
    assert_same(before, all_bits(loop))
    assert diagnosis.ok
    skipped = [finding for finding in diagnosis.findings if finding.skipped and "no more data" in finding.measured]
    assert skipped


def test_the_next_steps_are_those_of_a_run_that_was_not_examined():
    one, two = Loop().train(2), Loop().train(2)
    diagnose(one.subject())
    for loop in (one, two):
        loop.train(3)
    assert torch.equal(one.model.rows, two.model.rows)


# Faults


def misplaced(ids, num):
    labels = torch.full((len(ids), num + T), -100)
    labels[:, num + T - 3 : num + T - 1] = ids[:, -2:]
    return labels


def counted(ids, num):
    labels = labels_of(ids, num)
    labels[:, :num] = 0
    return labels


def cut_in_the_loss(logits, labels):
    return F.cross_entropy(logits[:, P:-1].flatten(0, 1), labels[:, 1:].flatten())


def cut_behind(logits, labels):
    return F.cross_entropy(logits[:, : T - 1].flatten(0, 1), labels[:, 1:].flatten())


def same_place(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def next_token(ids, num):
    """Labels that are shifted in the data: right together with a loss that does not shift."""
    labels = torch.full((len(ids), num + T), -100)
    labels[:, -3:-1] = ids[:, -2:]
    return labels


@pytest.mark.parametrize(
    ("fault", "settings"),
    [
        ("labels-misaligned", {"make_labels": misplaced}),
        ("labels-misaligned", {"make_labels": counted}),
        ("labels-misaligned", {"loss": same_place}),
        ("labels-misaligned", {"make_labels": lambda ids, num: labels_of(ids, 0), "loss": cut_behind}),
        (None, {"make_labels": lambda ids, num: labels_of(ids, 0), "loss": cut_in_the_loss}),
        (None, {"make_labels": next_token, "loss": same_place}),
    ],
)
def test_labels(fault, settings):
    assert found(Loop(**settings).subject()) == fault


def test_logits_uncut_is_told_from_labels():
    def wide(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    loop = Loop(make_labels=lambda ids, num: labels_of(ids, 0), loss=wide)
    assert found(loop.subject()) == "logits-uncut"


def test_labels_that_learn_nothing():
    loop = Loop(make_labels=lambda ids, num: torch.full((len(ids), num + T), -100))
    diagnosis = diagnose(loop.subject())
    assert diagnosis.first.fault == "labels-misaligned" and "nothing is learned" in diagnosis.first.measured


def test_base_trainable_by_each_of_its_signs():
    model = Prompted()
    norm = model.base.model.norm.weight.requires_grad_(True)
    diagnosis = diagnose(Loop(model, trained=[model.rows, norm]).subject())
    assert diagnosis.first.fault == "base-trainable" and "model.norm.weight" in diagnosis.first.measured
    assert diagnosis.first.numbers["moved"] == 1
    leaking = Prompted()
    leaking.base.requires_grad_(True)
    assert found(Loop(leaking).subject()) == "base-trainable"
    loop = Loop()  # moved behind the optimizer's back: no gradient, no census shows it
    step = loop.step

    def touching():
        loop.model.base.lm_head.weight.data[3, 3] += 1e-3
        return step()

    diagnosis = diagnose(loop.subject(step=touching))
    assert diagnosis.first.fault == "base-trainable" and diagnosis.first.numbers["receive_gradients"] == 0


def test_rows_frozen_and_rows_that_rest_on_purpose():
    model = Prompted()
    model.mask = torch.tensor([1.0, 1, 0, 1, 1])[:, None]
    loop = Loop(model)
    diagnosis = diagnose(loop.subject())
    assert diagnosis.first.fault == "rows-frozen" and diagnosis.first.numbers["still"] == [2]
    assert found(loop.subject(frozen_rows=(2,))) is None
    loop = Loop()  # gradients arrive, the update is undone
    first = loop.model.rows.detach()[0].clone()
    step = loop.step

    def undone():
        loss = step()
        loop.model.rows.data[0] = first
        return loss

    assert found(loop.subject(step=undone)) == "rows-frozen"


def test_a_tensor_left_out_of_the_optimizer():
    model = Prompted()
    other = torch.nn.Parameter(torch.zeros(P, 3))
    diagnosis = diagnose(Loop(model).subject(vectors={"rows": model.rows, "other": other}, initial=None))
    assert diagnosis.first.fault == "rows-frozen" and "other" in diagnosis.first.measured


def test_checkpointing_that_drops_the_prefix():
    model = Cached()
    model.drops_in_training = True
    model.base.train()
    assert found(Loop(model).subject()) == "checkpointing-drops-prefix"
    model.base.eval()
    assert found(Loop(model).subject()) is None


def test_transformers_checkpointing_without_the_cache_is_found_by_its_error():
    """Its layers drop the cache in training, and the mask, which knows the prefix, no longer fits."""
    model = Cached()
    switch = getattr(model.base, "activation_checkpointing_enable", None) or model.base.gradient_checkpointing_enable
    switch()
    model.base.train()
    diagnosis = diagnose(Loop(model).subject())
    assert diagnosis.first.fault == "checkpointing-drops-prefix"
    assert "size of tensor" in diagnosis.first.measured


def test_vectors_without_any_effect_are_no_fault_of_checkpointing():
    model = Cached()
    model.forward = lambda ids: model.base(input_ids=ids).logits + 0.0 * model.rows.sum()
    diagnosis = diagnose(Loop(model).subject())
    assert not diagnosis.ok and diagnosis.first.fault == ""
    assert "does not depend on the vectors" in diagnosis.first.fix


def test_updates_swallowed_is_told_from_a_small_rate_and_from_sound_bfloat16():
    small = float(Prompted().rows.detach().square().mean().sqrt())
    loop = Loop(Prompted(dtype=torch.bfloat16), lr=1e-3 * small)
    diagnosis = diagnose(loop.subject())
    assert diagnosis.first.fault == "updates-swallowed" and diagnosis.first.numbers["unchanged"] > 0.5
    assert found(Loop(Prompted(dtype=torch.bfloat16), lr=0.05 * small).subject()) is None
    assert found(Loop(Prompted(), lr=1e-3 * small).subject()) is None


@pytest.mark.parametrize("held", [0, 20])
@pytest.mark.parametrize("times", [1e-4, 1e3])
def test_learning_rate(times, held):
    diagnosis = diagnose(Loop(lr=3e-3 * times).train(held).subject(history=()))
    assert diagnosis.first is not None and diagnosis.first.fault == "learning-rate", diagnosis.first
    assert all(finding.ok or finding.fault == "learning-rate" for finding in diagnosis.findings)


def test_a_history_that_diverged():
    history = [{"step": n, "train_loss": 4.0 + 0.3 * n} for n in range(20)]
    assert found(Loop().subject(history=history)) == "learning-rate"
    poisoned = Loop()
    poisoned.model.rows.data[1, 1] = torch.nan
    assert found(poisoned.subject(history=[*history, {"step": 20, "train_loss": float("nan")}])) == "learning-rate"
    assert found(poisoned.subject()) == "not-finite"


def test_enormous_vectors():
    loop = Loop(lr=3.0)
    loop.model.rows.data.mul_(1e5)
    assert found(loop.subject()) == "not-finite"


def test_random_start():
    loop = Loop(Prompted(start="random"), lr=0.03)
    assert found(loop.subject()) == "random-init"
    assert found(loop.train(5).subject()) == "random-init"
    seeds = {seed: [{"step": n, "train_loss": 2.0 + 0.01 * seed} for n in range(5)] for seed in range(4)}
    sound = Loop().subject(initial=None, vocabulary=None, seeds=seeds)
    assert found(sound) is None
    apart = {seed: [{"step": n, "train_loss": 1.0 + seed} for n in range(5)] for seed in range(4)}
    assert found(dataclasses.replace(sound, seeds=apart)) == "random-init"


def test_overfit():
    rows = [(3.0, 3.0), (2.0, 2.2), (1.0, 2.0), (0.3, 2.6), (0.1, 3.1)]
    history = [{"step": n, "train_loss": a, "dev_loss": b} for n, (a, b) in enumerate(rows)]
    assert found(Loop().subject(history=history)) == "overfit"
    level = [{**row, "dev_loss": min(row["dev_loss"], 2.05)} for row in history]
    assert found(Loop().subject(history=level)) is None


def distilled(tail, steps=150):
    """Train the logits of one position towards a teacher's top 3 of 12, with the tail bucket or without."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.log_softmax(torch.randn(6, 12, generator=generator), -1)
    student = torch.zeros(6, 12, requires_grad=True)
    kept = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, teacher.topk(3).indices, True)
    optimizer = torch.optim.Adam([student], lr=0.1)

    def loss():
        logprobs = torch.log_softmax(student, -1)
        shares = teacher.exp() * kept
        value = -(shares * logprobs).sum(1)
        if tail:
            value = value - (1 - shares.sum(1)) * torch.log1p(-(logprobs.exp() * kept).sum(1).clamp(max=1 - 1e-6))
        return value.mean()

    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return teacher.masked_fill(~kept, -torch.inf), lambda: torch.log_softmax(student.detach(), -1), loss


@pytest.mark.parametrize("steps", [0, 150])
def test_tail_dropped(steps):
    check = next(check for check in CHECKS if check.__name__ == "check_tail")
    for tail in (True, False):
        teacher, student, loss = distilled(tail, steps)
        finding = check(Loop().subject(teacher_logprobs=teacher, student_logprobs=student, loss=loss))
        assert (finding.fault == "tail-dropped") is not tail, finding


def test_a_wrong_gradient_is_found_and_has_no_other_name():
    model = Prompted()
    model.wrong_slope = 0.4
    diagnosis = diagnose(Loop(model).subject())
    assert not diagnosis.ok and diagnosis.first.check == "gradients"


def test_findings_are_complete_and_json_ready():
    import json

    for finding in diagnose(Loop().train(4).subject()).findings:
        json.dumps(finding.to_json(), allow_nan=False)
        assert finding.skipped or (finding.expected and finding.measured)
        assert finding.fault == "" or finding.fault in FAULTS
    assert all(check.__doc__ for check in CHECKS)


# PEFT


def peft_model(kind):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from tests.tiny import CONFIGS

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    made = peft.get_peft_model(model, kind(peft))
    return made


def peft_batch():
    ids = batch(3)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_peft_training(kind):
    def config(peft):
        if kind == "prompt":
            return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)

    model = peft_model(config)
    vectors = model.prompt_encoder["default"].embedding.weight
    assert found(from_peft_training(model, torch.optim.AdamW([vectors], lr=1e-2), peft_batch())) == "random-init"
    run = from_peft_training(model, torch.optim.AdamW([vectors], lr=1e-2), peft_batch())
    real = run.reference["prompt_embeddings"] if kind == "prefix" else run.vocabulary
    with torch.no_grad():
        vectors.copy_(real[7 : 7 + P])
    run = from_peft_training(model, torch.optim.AdamW([vectors], lr=1e-3), peft_batch())
    diagnosis = diagnose(run)
    assert diagnosis.ok, diagnosis.first
    assert run.labels.shape == (B, T + P if kind == "prompt" else T)
    model.get_base_model().requires_grad_(True)
    trainable = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert found(from_peft_training(model, trainable, peft_batch())) == "base-trainable"
