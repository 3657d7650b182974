"""Checks of files: each planted fault is named first, sound files have no finding, and nothing in a file is run."""

import copy
import dataclasses
import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from foreword.core.artefact import METADATA_KEY, ArtefactHeader, load_artefact, save_artefact
from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.conformance import make_probes
from foreword.core.init import initial_vectors
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV
from foreword.core.template import TaskTemplate
from foreword.doctor.checks.artefact import check_artefact
from foreword.doctor.checks.rollout import Rollout, rollout_steps
from foreword.doctor.diagnose import bisect
from foreword.doctor.faults import FAULTS
from foreword.doctor.rotation import rotations, turned
from foreword.doctor.subjects import Evaluation
from tests.bundled import bundled
from tests.tiny import NAMES, SIX, tiny

P = 5
ROWS = [[3 + (7 * row + 5 * place) % 90 for place in range(4 + row % 3)] for row in range(8)]


def save(path, base, method="kv", change=None, probes=True, num=P, seed=0, template=None, header=None):
    """Write a sound artefact; `change` alters the tensors after the probes were made, `header` its fields."""
    block = template.block(base.tokenizer) if template else Block((num,))
    vectors = initial_vectors(base, method, block, "vocab", seed=seed)
    tensors = {name: tensor.clone() for name, tensor in vectors.tensors().items()}
    made = ArtefactHeader(method=method, task="t", block=block, base=base.fingerprint, spec=base.spec)
    if template:
        rendering = {**template.to_json(), "sha256": template.sha256(base.tokenizer)}
        made = dataclasses.replace(made, template=rendering)
    if probes:
        made = dataclasses.replace(made, conformance=make_probes(base, compile(base, vectors), ROWS))
    save_artefact(path, dataclasses.replace(made, **(header or {})), change(tensors) if change else tensors)
    return path


def first(findings):
    assert all(finding.fault in ("", *FAULTS) for finding in findings)
    assert all(finding.ok for finding in findings if finding.skipped)
    for finding in findings:
        json.dumps(finding.to_json(), allow_nan=False)
    wrong = next((finding for finding in findings if not finding.ok), None)
    return None if wrong is None else wrong.fault or wrong.check


# Sound files


@pytest.mark.parametrize("name", NAMES)
def test_sound_artefacts_have_no_finding(tmp_path, name):
    method = {0: "prompt", 1: "prefix", 2: "kv"}[NAMES.index(name) % 3]
    findings = check_artefact(save(tmp_path / "a.safetensors", tiny(name), method), tiny(name))
    assert first(findings) is None, findings
    assert {finding.check for finding in findings} >= {"file", "shapes", "vectors", "base", "conformance"}


@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
def test_sound_in_every_dtype_and_on_the_bundled_base(tmp_path, method):
    template = TaskTemplate("{soft:5}Sort: {input}", chat=True)
    path = save(tmp_path / "a.safetensors", bundled(), method, template=template)
    for base in (bundled(), bundled("bfloat16"), bundled("float16"), None):
        assert first(check_artefact(path, base)) is None
    assert first(check_artefact(save(tmp_path / "one.safetensors", bundled(), method, num=1), bundled())) is None


def test_vectors_with_all_norms_grown_by_training_are_sound(tmp_path):
    def grown(tensors):
        return {name: tensor * 8 for name, tensor in tensors.items()}

    for method in ("prompt", "kv"):
        path = save(tmp_path / f"{method}.safetensors", tiny("llama"), method, grown, probes=False)
        assert first(check_artefact(path, tiny("llama"))) is None


# Files


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_pickles_are_listed_and_not_run(tmp_path):
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps(Evil()))
    torch.save({"prompt": torch.zeros(2, 3)}, tmp_path / "vectors.pt")
    with zipfile.ZipFile(tmp_path / "zipped.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    (tmp_path / "empty.bin").write_bytes(b"")
    for path in tmp_path.iterdir():
        (finding,) = check_artefact(path, None)
        assert finding.fault == "unsafe-file" and not finding.ok
    (finding,) = check_artefact(tmp_path / "plain.safetensors", None)
    assert "builtins.exec" in finding.measured
    (finding,) = check_artefact(tmp_path / "zipped.bin", None)
    assert "builtins.exec" in finding.measured
    (finding,) = check_artefact(tmp_path / "vectors.pt", None)
    assert "asks for" not in finding.measured


def rewritten(path, change):
    """Write the file again with its header's JSON and tensors changed, past all checks."""
    table = load_file(path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"][METADATA_KEY])
    tensors, metadata = change(table, metadata)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(metadata)})
    return path


def test_torn_and_foreign_files(tmp_path):
    whole = save(tmp_path / "a.safetensors", tiny("llama")).read_bytes()
    for name, data in {"torn": whole[:-9], "text": b"hello" * 10, "nothing": b"", "long": whole + b"x"}.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        assert first(check_artefact(path, None)) == "unsafe-file", name
    save_file({"prompt": torch.zeros(3, 4)}, tmp_path / "other.safetensors")
    assert first(check_artefact(tmp_path / "other.safetensors", None)) == "unsafe-file"
    assert first(check_artefact(tmp_path / "missing.safetensors", None)) == "file"


def test_nan_and_enormous_values(tmp_path):
    path = save(tmp_path / "nan.safetensors", tiny("llama"), "kv")

    def poison(tensors, metadata):
        tensors["value.1"][0, 2, 3] = torch.nan
        return tensors, metadata

    assert first(check_artefact(rewritten(path, poison), None)) == "not-finite"
    for method in ("prompt", "prefix", "kv"):
        huge = save(
            tmp_path / "huge.safetensors", tiny("llama"), method, lambda t: {name: x * 3e3 for name, x in t.items()}
        )
        assert first(check_artefact(huge, tiny("llama"))) == "not-finite"
    far = save(tmp_path / "far.safetensors", tiny("llama"), "prompt", lambda t: {"prompt": t["prompt"] * 1e6})
    assert first(check_artefact(far, None)) == "not-finite"
    dead = save(tmp_path / "dead.safetensors", tiny("llama"), "prompt", lambda t: {"prompt": t["prompt"] * 0})
    assert first(check_artefact(dead, None)) == "vectors"


def test_layers_tied_is_found_and_alike_layers_are_not(tmp_path):
    def tie(tensors):
        if "prefix" in tensors:
            return {"prefix": tensors["prefix"][:1].expand(3, -1, -1).contiguous()}
        return {name: tensors[f"{name.split('.')[0]}.0"].clone() for name in tensors}

    def near(tensors):
        return {"prefix": tensors["prefix"][:1] + 0.01 * tensors["prefix"]}

    base = tiny("llama")
    for method in ("prefix", "kv"):
        assert first(check_artefact(save(tmp_path / "t.safetensors", base, method, tie), base)) == "layers-tied"
        assert first(check_artefact(save(tmp_path / "t.safetensors", base, method, tie), None)) == "layers-tied"
    assert first(check_artefact(save(tmp_path / "n.safetensors", base, "prefix", near, False), base)) is None


def test_embeddings_only_in_our_own_file(tmp_path):
    path = save(tmp_path / "a.safetensors", tiny("llama"), "prompt")
    renamed = rewritten(path, lambda tensors, metadata: (tensors, metadata | {"method": "prefix"}))
    assert first(check_artefact(renamed, None)) == "embeddings-only"


def repeated_heads(tensors, metadata):
    """Keys and values for every query head, as before grouped queries."""
    metadata["spec"]["layers"] = [layer | {"num_kv_heads": 4} for layer in metadata["spec"]["layers"]]
    return {name: tensor.repeat_interleave(2, 0) for name, tensor in tensors.items()}, metadata


def test_wrong_shape_is_told_from_another_base(tmp_path):
    base = tiny("llama")
    path = save(tmp_path / "a.safetensors", base)
    assert first(check_artefact(rewritten(path, repeated_heads), base)) == "wrong-shape"
    path = save(tmp_path / "a.safetensors", base)
    unsaid = rewritten(path, lambda t, m: (repeated_heads(t, m)[0], m | {"spec": base.spec.to_json()}))
    assert first(check_artefact(unsaid, None)) == "wrong-shape"
    assert first(check_artefact(save(tmp_path / "b.safetensors", tiny("qwen3")), base)) == "other-base"


# On a base


def test_other_base_tokenizer_and_template_are_told_apart(tmp_path):
    template = TaskTemplate("{soft:5}Sort: {input}", chat=True)
    path = save(tmp_path / "a.safetensors", bundled(), "kv", template=template)
    model, tokenizer = bundled().model, bundled().tokenizer
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["<new>"])
    found = check_artefact(path, FrozenModel(model, added))
    assert first(found) == "tokenizer-changed"
    assert not [finding for finding in found if finding.fault == "other-base"]
    drifted = copy.deepcopy(tokenizer)
    drifted.chat_template = "Now: " + tokenizer.chat_template
    findings = check_artefact(path, FrozenModel(model, drifted))
    assert first(findings) == "template-drift"
    merged = copy.deepcopy(model)
    with torch.no_grad():
        merged.model.layers[1].self_attn.q_proj.weight.add_(0.01)
    assert first(check_artefact(path, FrozenModel(merged, tokenizer))) == "other-base"


@pytest.mark.parametrize("chat", [True, False])
def test_a_task_template_that_renders_otherwise(tmp_path, chat):
    template = TaskTemplate("{soft:5}Sort: {input}", chat=chat)
    path = save(tmp_path / "a.safetensors", bundled(), "kv", template=template)

    def edit(tensors, metadata):
        metadata["template"]["text"] = "{soft:5}Sort now: {input}"
        return tensors, metadata

    findings = check_artefact(rewritten(path, edit), bundled())
    assert first(findings) == "template-drift"
    wrong = next(finding for finding in findings if not finding.ok)
    told = "behind the same block" if chat else "differs first at position"  # a chat's text begins behind the block
    assert told in wrong.measured


def test_numerics(tmp_path):
    base = bundled()

    def blurred(tensors):
        """What storage in 4 bits would leave."""
        return {
            name: (tensor / tensor.abs().max() * 3).round() / 3 * tensor.abs().max() for name, tensor in tensors.items()
        }

    path = save(tmp_path / "a.safetensors", base, "kv", blurred)
    assert first(check_artefact(path, base)) == "conformance"
    assert first(check_artefact(path, bundled("bfloat16"))) == "numerics"
    quantised = dataclasses.replace(base.fingerprint, quantisation="bitsandbytes")
    other = save(tmp_path / "b.safetensors", base, "kv", header={"base": quantised})
    assert first(check_artefact(other, base)) == "numerics"


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "cohere", "gemma3"])
def test_keys_misrotated(tmp_path, name):
    base = tiny(name)
    turns = rotations(base)
    for sign in (1, -1):

        def turn(tensors, sign=sign):
            layers = range(base.spec.num_layers)
            keys, values = (tuple(tensors[f"{kind}.{layer}"] for layer in layers) for kind in ("key", "value"))
            places = [sign * place for place in range(P)]
            return turned(SoftKV(keys, values), turns, places).tensors()

        findings = check_artefact(save(tmp_path / "a.safetensors", base, "kv", turn), base)
        assert first(findings) == "keys-misrotated", findings[-1]
        assert ("rotated twice" if sign == 1 else "without rotation") in findings[-1].measured

    def noisy(tensors):
        return {name: x + 0.5 * x.std() * torch.randn(x.shape) if "key" in name else x for name, x in tensors.items()}

    torch.manual_seed(0)
    assert first(check_artefact(save(tmp_path / "a.safetensors", base, "kv", noisy), base)) == "conformance"


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1)])
def test_a_silent_reshape(tmp_path, order):
    def reshaped(tensors):
        return {name: x.permute(order).contiguous().view(x.shape) for name, x in tensors.items()}

    for name in ("llama", "gpt2"):
        findings = check_artefact(save(tmp_path / "a.safetensors", tiny(name), "kv", reshaped), tiny(name))
        assert first(findings) == "wrong-shape", findings[-1]


def test_rotations_are_those_of_the_base():
    assert all(rotations(tiny(name)) is None for name in ("gpt2", "opt", "bloom", "falcon-alibi"))
    for name in ("llama", "qwen3", "gpt-neox", "falcon", "phi3", "cohere"):
        base, turns = tiny(name), rotations(tiny(name))
        at = {}
        for position in (2, 6):
            cache = DynamicCache()
            ids = torch.tensor([[9]])
            base.run_decoder(base.embed(ids), positions=torch.full_like(ids, position), cache=cache)
            keys, values = (tuple(getattr(layer, kind)[0] for layer in cache.layers) for kind in ("keys", "values"))
            at[position] = SoftKV(keys, values)
        for one, other, steps in ((2, 6, 4), (6, 2, -4)):
            for moved, real in zip(turned(at[one], turns, [steps]).keys, at[other].keys, strict=True):
                assert torch.allclose(moved, real, atol=1e-4), (name, steps)


# PEFT directories


def peft_directory(folder, rows, **config):
    folder.mkdir(exist_ok=True)
    known = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": len(rows)}
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    save_file({"prompt_embeddings": rows.contiguous()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", SIX)
def test_peft_directories(tmp_path, name):
    base = tiny(name)
    layer, count = base.spec.layers[0], base.spec.num_layers
    width = layer.num_kv_heads * layer.head_dim
    figures = {"num_layers": count, "token_dim": width, "num_attention_heads": layer.num_kv_heads}
    rows = torch.randn(P, 2 * count * width, generator=torch.Generator().manual_seed(0))
    for known in (base, None):
        assert first(check_artefact(peft_directory(tmp_path / "a", rows, **figures), known)) is None
    prompt = {"peft_type": "PROMPT_TUNING", "token_dim": 64, "num_layers": count}
    embeds = 0.1 * torch.randn(P, 64, generator=torch.Generator().manual_seed(0))
    assert first(check_artefact(peft_directory(tmp_path / "b", embeds, **prompt), base)) is None
    only = peft_directory(tmp_path / "c", embeds, **{**figures, "token_dim": 64})
    assert first(check_artefact(only, base)) == "embeddings-only"
    assert first(check_artefact(only, None)) == "embeddings-only"
    tied = rows[:, : 2 * width].repeat(1, count)
    assert first(check_artefact(peft_directory(tmp_path / "d", tied, **figures), base)) == "layers-tied"
    wide = torch.randn(P, 2 * count * 2 * width)
    assert first(check_artefact(peft_directory(tmp_path / "e", wide, **figures), base)) == "wrong-shape"
    deeper = torch.randn(P, 2 * (count + 1) * width)
    other = peft_directory(tmp_path / "f", deeper, **{**figures, "num_layers": count + 1})
    assert first(check_artefact(other, base)) == "other-base"
    rows[2, 3] = torch.inf
    assert first(check_artefact(peft_directory(tmp_path / "g", rows, **figures), base)) == "not-finite"


def test_peft_pickles_and_torn_directories(tmp_path):
    folder = peft_directory(tmp_path / "a", torch.randn(P, 64), peft_type="PROMPT_TUNING")
    (folder / "adapter_model.safetensors").rename(folder / "whole")
    torch.save({"prompt_embeddings": torch.zeros(P, 64)}, folder / "adapter_model.bin")
    assert first(check_artefact(folder, None)) == "unsafe-file"
    (folder / "adapter_model.safetensors").write_bytes((folder / "whole").read_bytes()[:-3])
    assert first(check_artefact(folder, None)) == "unsafe-file"
    (folder / "adapter_model.safetensors").write_bytes((folder / "whole").read_bytes())
    assert first(check_artefact(folder, None)) is None
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 9}))
    assert first(check_artefact(folder, None)) == "unsafe-file"
    (folder / "adapter_config.json").unlink()
    assert first(check_artefact(folder, None)) == "file"


# Nothing changes; bisection


def test_base_and_file_are_left_alone(tmp_path):
    base = tiny("llama")
    path = save(tmp_path / "a.safetensors", base, "kv", lambda t: {name: x * 1.5 for name, x in t.items()})
    before = base.checksum(), path.read_bytes(), sorted(tmp_path.iterdir()), torch.get_rng_state()
    check_artefact(path, base)
    after = base.checksum(), path.read_bytes(), sorted(tmp_path.iterdir()), torch.get_rng_state()
    assert before[:3] == after[:3] and torch.equal(before[3], after[3])


def test_the_bisection_stops_at_the_first_that_differs(tmp_path):
    base = tiny("llama")
    path = save(tmp_path / "a.safetensors", base)
    decoding = Evaluation(decoding_then={"temperature": 0.0}, decoding_now={"temperature": 0.9})
    sound = Rollout(artefact=path, served={"one": path}, base_now=base, base_then=base)
    assert bisect(rollout_steps(sound)).ok
    other = save(tmp_path / "b.safetensors", base, seed=1)
    stale = bisect(rollout_steps(dataclasses.replace(sound, served={"one": path, "two": other}, evaluation=decoding)))
    assert stale.first.fault == "stale-version" and "two has" in stale.first.measured and len(stale.findings) == 1
    moved = bisect(rollout_steps(dataclasses.replace(sound, base_now=tiny("llama", seed=1), evaluation=decoding)))
    assert moved.faults[0] == "other-base"
    drifted = bisect(rollout_steps(dataclasses.replace(sound, evaluation=decoding)))
    assert drifted.first.fault == "decoding-drift" and drifted.faults == ("decoding-drift",)
    assert [finding for finding in drifted.findings if finding.ok and "cleared" in finding.measured]
    nothing = bisect(rollout_steps(Rollout()))
    assert nothing.ok and all(finding.skipped for finding in nothing.findings)


def test_load_is_strict_where_doctor_only_looks(tmp_path):
    """The file that doctor finds sound is one that loads."""
    path = save(tmp_path / "a.safetensors", tiny("gpt2"), "prefix")
    assert first(check_artefact(path, None)) is None and load_artefact(path).header.method == "prefix"
