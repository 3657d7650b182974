"""`migrate`: every task follows an updated base in one pass, from its own vectors where they fit."""

import dataclasses
import os
import signal

import pytest
import torch

from foreword.core.artefact import load_artefact
from foreword.core.model import FrozenModel
from foreword.errors import ConfigError, DataError, IncompatibleModel, NotFound
from foreword.eval.run import evaluate
from foreword.recipes.judging import engine_with
from foreword.recipes.migrate import make_run, measure_for, migrate, shape_difference
from foreword.recipes.origin import open_origin
from foreword.registry.store import Registry
from foreword.train.loop import TrainingInterrupted
from tests.bundled import write_task
from tests.recipes import cases
from tests.recipes.cases import publish_trained, small, state
from tests.tiny import CONFIGS


def updated(seed: int = 7, **shapes) -> FrozenModel:
    """The small base after an update: weights moved by 2 %, or other shapes."""
    from transformers import AutoModelForCausalLM

    config = CONFIGS["llama"]()
    config.vocab_size = 4096
    for name, value in shapes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if not shapes:
        model.load_state_dict(small().model.state_dict())
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter)) if parameter.ndim > 1 else None
    return FrozenModel(model, cases.tokenizer())


@pytest.fixture
def registry(tmp_path):
    publish_trained(tmp_path, methods=("kv",)).close()
    with publish_trained(tmp_path, methods=("prompt", "prefix"), task="shade", template="{soft:3}{input}") as registry:
        yield registry


def test_all_tasks_follow_from_their_own_vectors(registry, tmp_path):
    new = updated()
    found = migrate(registry, new, out=tmp_path / "out", old_base=small(), eval_rows=6)
    assert [each.current for each in found] == ["colour@1", "shade@1"]
    for each in found:
        assert each.outcome == "migrated" and each.start == "its vectors" and each.untrained is not None
        assert each.paired.num_rows == 6 and each.old_score == each.paired.score_b and not each.is_stored
        old = load_artefact(registry.path(registry.resolve(each.current)))
        made = load_artefact(each.artefact)
        assert made.header.parent == old.sha256 and made.header.base == new.fingerprint
        assert made.header.training["steps"] == old.header.training["steps"]
        moved = torch.cat([(made.tensors[k] - old.tensors[k]).flatten() for k in old.tensors]).norm()
        assert 0 < moved < 0.5 * torch.cat([t.flatten() for t in old.tensors.values()]).norm()
        assert registry.aliases(old.header.task) == {"candidate": each.version.number, "prod": 1}
        assert each.version.evaluation["paired"]["against"] == old.sha256
    again = migrate(registry, small(), out=tmp_path / "again")
    assert {each.outcome for each in again} == {"on this base already"} and not (tmp_path / "again").exists()


def test_joint_is_alone(registry, tmp_path):
    """Contract 5: a migrated task gets the vectors that it gets when it migrates by itself."""
    new = updated()
    together = migrate(registry, new, out=tmp_path / "joint", eval_rows=3, publish=False)
    for each in together:
        task = each.current.partition("@")[0]
        (alone,) = migrate(registry, new, out=tmp_path / task, tasks=[task], eval_rows=3, publish=False)
        a, b = (load_artefact(m.artefact).tensors for m in (each, alone))
        start = load_artefact(registry.path(registry.resolve(each.current))).tensors
        apart = torch.cat([(a[key] - b[key]).flatten() for key in a]).norm()
        way = torch.cat([(a[key] - start[key]).flatten() for key in a]).norm()
        assert way > 0 and apart <= 2e-3 * way


@pytest.mark.parametrize(
    ("shapes", "colour", "shade"),
    [
        ({"num_hidden_layers": 2}, ("num_layers", 3, 2), None),
        ({"hidden_size": 32, "head_dim": 16}, None, ("embed_size", 64, 32)),
        ({"head_dim": 32}, ("layer 0 head_dim", 16, 32), None),
        ({"num_key_value_heads": 4}, ("layer 0 num_kv_heads", 2, 4), None),
    ],
)
def test_other_shapes_name_the_field(registry, shapes, colour, shade):
    spec = updated(**shapes).spec
    for task, expected in (("colour", colour), ("shade", shade)):
        origin = open_origin(registry, registry.resolve(task))
        assert shape_difference(origin, spec) == expected
    prefix = open_origin(registry, registry.resolve("shade@2"))
    assert (shape_difference(prefix, spec) is None) == (("head_dim" in shapes and len(shapes) == 1) or
                                                        "num_key_value_heads" in shapes)  # fmt: skip


def test_where_shapes_differ_the_recipe_starts_anew(registry, tmp_path):
    found = migrate(registry, updated(num_hidden_layers=2), out=tmp_path / "out", tasks=["colour"], eval_rows=3)
    assert found[0].start == "its recipe's init: num_layers 3 there, 2 here"
    assert found[0].untrained is None and found[0].report is not None and found[0].version is not None


def test_the_stored_evaluation_is_the_yardstick_where_the_old_base_is_gone(tmp_path):
    with publish_trained(tmp_path) as registry:
        artefact = load_artefact(registry.path(registry.resolve("colour")))
        origin = open_origin(registry, registry.resolve("colour"))
        engine = engine_with(small(), {"x": artefact})
        report = evaluate(engine, origin.task, prefix="x", split="dev", limit=5, seed=3)
        again = tmp_path / "again.safetensors"
        from foreword.core.artefact import save_artefact

        save_artefact(again, dataclasses.replace(artefact.header, created="later"), artefact.tensors)
        version = registry.publish(again, evaluation=report.to_json(), alias="prod")
        measure = measure_for(open_origin(registry, version), 200)
        assert (measure.split, measure.limit, measure.seed) == ("dev", 5, 3)
        assert measure.stored_score == report.score and measure.decoding == report.decoding
        (found,) = migrate(registry, updated(), out=tmp_path / "out")
        assert found.is_stored and found.old_score == report.score and found.paired is None
        assert found.report.data_sha256 == report.data_sha256  # so the registry's gate compares the two
        (tmp_path / "data" / "colour.dev.jsonl").write_text('{"input": "x", "target": "warm"}\n')
        assert measure_for(open_origin(registry, version), 200).stored_score is None


def test_a_signal_leaves_the_registry_alone_and_resume_goes_on(registry, tmp_path):
    before, new = state(registry), updated()

    def stop(progress):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted) as caught:
        migrate(registry, new, out=tmp_path / "out", tasks=["colour"], eval_rows=3, on_progress=stop)
    assert state(registry) == before and "--resume" in caught.value.hint
    with pytest.raises(ConfigError, match="is not empty"):
        migrate(registry, new, out=tmp_path / "out", tasks=["colour"])
    again = [
        migrate(registry, new, out=tmp_path / "out", tasks=["colour"], eval_rows=3, resume=True) for _ in range(2)
    ]  # the second time nothing is left to train: it is judged and published once more
    whole = migrate(registry, new, out=tmp_path / "whole", tasks=["colour"], eval_rows=3, publish=False)
    a, b, c = (load_artefact(found[0].artefact).tensors for found in (*again, whole))
    assert all(torch.equal(a[key], b[key]) and torch.equal(a[key], c[key]) for key in a)
    assert len(registry.versions("colour")) == 2


def test_runs_keep_the_recipe(registry):
    origin = open_origin(registry, registry.resolve("colour"))
    run = make_run(updated(), origin, 9, 0.5)
    assert run.config.steps == 9 and run.config.lr == pytest.approx(0.5 * cases.FAST["lr"])
    assert run.start is not None and run.template.text == "{soft:4}{input}"
    encoded = dataclasses.replace(origin, recipe=dataclasses.replace(origin.recipe, encoder="residual", lr=0.02))
    assert make_run(updated(), encoded, None, 0.5).config.lr == 0.02


def test_wrong_input_is_refused_before_any_training(registry, tmp_path):
    before = state(registry)

    def wrong(error, match, base=None, **given):
        def load():
            raise AssertionError("the base was loaded before the refusal")

        with pytest.raises(error, match=match) as caught:
            migrate(registry, base or load, out=tmp_path / "out", **given)
        assert state(registry) == before and not (tmp_path / "out").exists()
        return caught.value

    wrong(NotFound, "no task 'color'", tasks=["color"])
    other = write_task(tmp_path / "other", "elsewhere")
    assert "shade" in wrong(ConfigError, "of the task 'elsewhere', which is not migrated", task_files=[other]).hint
    wrong(IncompatibleModel, "another base", base=updated(), old_base=small(seed=3))
    (tmp_path / "data" / "shade.dev.jsonl").unlink()
    error = wrong(DataError, "shade@1: its dev rows are gone")
    assert "--task" in error.hint and "leave shade out" in error.hint
    with Registry.open(tmp_path / "empty") as empty, pytest.raises(NotFound, match="has an alias prod"):
        migrate(empty, small(), out=tmp_path / "out")


def test_what_diverges_is_told_and_not_published(registry, tmp_path):
    found = migrate(registry, updated(), out=tmp_path / "out", tasks=["colour"], lr_factor=1e39, eval_rows=3)
    assert found[0].outcome == "diverged" and "loss" in found[0].error
    assert registry.aliases("colour") == {"prod": 1}
