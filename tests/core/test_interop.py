"""Contract 8: export ∘ import = identity, and imported PEFT vectors give PEFT's own logits (unpadded)."""

import copy
import json
import pickle
from pathlib import Path

import numpy
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from foreword.core.artefact import Artefact, ArtefactHeader, load_artefact, save_artefact
from foreword.core.block import Block
from foreword.core.compile import compile, uncompiled_logits
from foreword.core.forward import forward
from foreword.core.interop import export_peft, import_cartridge_pt, import_npy, import_peft, import_peft_multitask
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt
from foreword.core.template import TaskTemplate
from foreword.errors import ArtefactCorrupt, ArtefactError, ConfigError, IncompatibleModel
from tests.bundled import bundled
from tests.tiny import tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT calls it
    pytest.mark.filterwarnings("ignore:unclosed file .*adapter_config.json:ResourceWarning"),  # PEFT leaves it open
]
NAMES = ["llama", "qwen3", "gpt2", "opt", "bloom", "gemma3", "mistral", "llama-head-dim", "mistral-window"]
NUM = 5
KINDS = ("keys", "values")
ROW = [5, 6, 7, 31, 8, 9, 11]
CONFIGS = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM, encoder_hidden_size=16),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM),
    "PREFIX_TUNING projected": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=NUM, prefix_projection=True, encoder_hidden_size=16
    ),
    "CARTRIDGE": lambda: peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM, num_frozen_tokens=2),
    "CPT": lambda: peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5, 6, 7]),
}


def peft_model(base, config, seed=0):
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(std=0.5)
    return model


def peft_logits(model, row=ROW, **extra):
    with torch.no_grad():
        return model(input_ids=torch.tensor([row]), **extra).logits[0, -len(row) :]


def our_logits(base, artefact, row=ROW):
    return forward(base, [row], compile(base, artefact))[0]


def assert_same(found, expected, base, row=ROW):
    scale = expected.std()
    assert (found - expected).abs().max() <= 2e-5 * scale
    assert (forward(base, [row])[0] - expected).abs().max() > 1e-2 * scale  # the vectors do something


def header(base, method, block, **extra):
    fields = {"method": method, "task": "t", "block": block, "base": base.fingerprint, "spec": base.spec}
    return ArtefactHeader(**fields | extra)


def artefact_of(base, method, block, folder, dtype=torch.float32, **extra):
    generator = torch.Generator().manual_seed(3)
    head = header(base, method, block, **extra)
    tensors = {k: torch.randn(s, generator=generator).to(dtype) for k, s in head.tensor_shapes().items()}
    return save_artefact(folder / "a.safetensors", head, tensors)


def equal_tensors(one: Artefact, other: Artefact):
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name])


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("name", NAMES)
def test_imported_vectors_give_pefts_logits(name, kind, tmp_path):
    base = tiny(name)
    model = peft_model(base, CONFIGS[kind]())
    model.save_pretrained(tmp_path / "triage")
    artefact = import_peft(tmp_path / "triage", base)
    assert_same(our_logits(base, artefact), peft_logits(model), base)
    assert artefact.header.block == Block((NUM,))
    assert artefact.header.task == "triage"
    assert artefact.header.base == base.fingerprint
    assert artefact.header.created
    assert artefact.header.training["imported_from"]["peft_type"] == kind


@pytest.mark.parametrize("kind", ["P_TUNING", "PREFIX_TUNING projected", "CARTRIDGE", "CPT"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_kinds_give_pefts_logits(name, kind, tmp_path):
    base = tiny(name)
    model = peft_model(base, CONFIGS[kind]())
    model.save_pretrained(tmp_path)
    assert_same(our_logits(base, import_peft(tmp_path, base)), peft_logits(model), base)


@pytest.mark.parametrize("name", ["qwen3", "bloom"])
def test_every_task_of_a_multitask_prompt_gives_pefts_logits(name, tmp_path):
    base = tiny(name)
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=NUM, num_tasks=3, num_ranks=2, prompt_tuning_init="RANDOM"
    )
    model = peft_model(base, config)
    model.save_pretrained(tmp_path / "m")
    artefacts = import_peft_multitask(tmp_path / "m", base, tasks=["a", "b", "c"], out=tmp_path / "out")
    assert [artefact.header.task for artefact in artefacts] == ["a", "b", "c"]
    for index, artefact in enumerate(artefacts):
        with torch.no_grad():
            expected = peft_logits(model, task_ids=torch.tensor([index]))
        assert_same(our_logits(base, artefact), expected, base)
        equal_tensors(artefact, import_peft(tmp_path / "m", base, task_index=index))
        equal_tensors(artefact, load_artefact(tmp_path / "out" / f"{artefact.header.task}.safetensors"))
    with pytest.raises(ConfigError, match=r"holds 3 tasks, task_index is None(.|\n)*import_peft_multitask"):
        import_peft(tmp_path / "m", base)
    with pytest.raises(ConfigError, match="holds 3 tasks, task_index is 3"):
        import_peft(tmp_path / "m", base, task_index=3)
    with pytest.raises(ConfigError, match="holds 3 tasks, 2 distinct names"):
        import_peft_multitask(tmp_path / "m", base, tasks=["a", "b"])


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_export_of_an_import_is_the_same_file(kind, tmp_path):
    base = tiny("qwen3")
    peft_model(base, CONFIGS[kind]()).save_pretrained(tmp_path / "in")
    artefact = import_peft(tmp_path / "in", base, out=tmp_path / "t.safetensors")
    export_peft(artefact, tmp_path / "out")
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("in", "out"))
    assert torch.equal(before["prompt_embeddings"], after["prompt_embeddings"])
    equal_tensors(artefact, import_peft(tmp_path / "out", base))
    equal_tensors(artefact, load_artefact(tmp_path / "t.safetensors"))
    assert artefact.sha256 == load_artefact(tmp_path / "t.safetensors").sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["prompt", "kv"])
def test_import_of_an_export_is_the_same_vectors(method, dtype, tmp_path):
    base = tiny("llama")
    artefact = artefact_of(base, method, Block((NUM,)), tmp_path, dtype)
    equal_tensors(artefact, import_peft(export_peft(artefact, tmp_path / "out"), base))


@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_an_export_and_gives_our_logits(name, method, tmp_path):
    base = tiny(name)
    artefact = artefact_of(base, method, Block((NUM,)), tmp_path)
    export_peft(artefact, tmp_path / "out", base=base if method == "prefix" else None)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "out").eval()
    assert_same(our_logits(base, artefact), peft_logits(model), base)


@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
def test_a_block_with_literal_tokens_is_folded_whole(method, tmp_path):
    base = tiny("qwen3")
    artefact = artefact_of(base, method, Block(((1, 7), 3, (9, 4))), tmp_path)
    with pytest.raises(ArtefactError, match=r"\[\[1, 7\], 3, \[9, 4\]\](.|\n)*Give base="):
        export_peft(artefact, tmp_path / "out")
    export_peft(artefact, tmp_path / "out", base=base, base_model_name="org/base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["num_virtual_tokens"] == 7
    assert config["base_model_name_or_path"] == "org/base"
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "out").eval()
    assert_same(our_logits(base, artefact), peft_logits(model), base)
    assert "without the tokenizer's special tokens" in (tmp_path / "out" / "README.md").read_text()
    if method != "kv":
        expected = uncompiled_logits(base, torch.tensor([ROW]), artefact.vectors)[0]
        assert_same(peft_logits(model), expected, base)


def test_literal_tokens_behind_the_vectors_are_told_in_the_readme(tmp_path):
    base = tiny("llama")
    artefact = artefact_of(base, "prompt", Block((3, (1, 9))), tmp_path)
    export_peft(artefact, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "out").eval()
    assert_same(our_logits(base, artefact), peft_logits(model, [1, 9, *ROW])[2:], base)
    assert "[1, 9], then the input" in (tmp_path / "out" / "README.md").read_text()


def test_export_refuses_what_peft_cannot_say(tmp_path):
    base, other = tiny("llama"), tiny("llama", seed=1)
    behind = artefact_of(base, "prompt", Block((3,)), tmp_path, soft_after=2)
    with pytest.raises(ArtefactError, match="2 vectors behind the input"):
        export_peft(behind, tmp_path / "out", base=base)
    prefix = artefact_of(base, "prefix", Block((3,)), tmp_path)
    with pytest.raises(ArtefactError, match="Give base="):
        export_peft(prefix, tmp_path / "out")
    with pytest.raises(IncompatibleModel, match="weights_sha256"):
        export_peft(prefix, tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


def test_a_bfloat16_base_gives_pefts_logits(tmp_path):
    base = tiny("llama", "bfloat16")
    model = peft_model(base, CONFIGS["PREFIX_TUNING"]())
    model.save_pretrained(tmp_path)
    ours, theirs = our_logits(base, import_peft(tmp_path, base)), peft_logits(model)
    assert (ours.float() - theirs.float()).abs().max() <= 6e-2 * theirs.float().std()


def test_a_template_says_what_text_follows_the_vectors(tmp_path):
    base = bundled()
    peft_model(base, CONFIGS["PROMPT_TUNING"]()).save_pretrained(tmp_path)
    template = TaskTemplate(text=f"{{soft:{NUM}}}{{input}}", chat=True)
    artefact = import_peft(tmp_path, base, template=template)
    tokenizer = base.tokenizer
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello there"}], add_generation_prompt=True, return_dict=False
    )
    block = artefact.header.block
    assert block.segments[0] == NUM
    assert block.literal_ids()[NUM:] + template.render(tokenizer, "hello there").ids == whole
    for text in ("Say {soft:5}{input}", "{soft:4}{input}", "{soft:5}{input}{soft:1}", "{soft:3} and {soft:2}{input}"):
        with pytest.raises(ConfigError, match=r"the file has 5(.|\n)*Open the template with \{soft:5\}"):
            import_peft(tmp_path, base, template=TaskTemplate(text=text))
    with pytest.raises(ConfigError, match="tokenizer"):
        import_peft(saved(tmp_path / "tiny"), tiny("llama"), template=template)


def saved(folder, kind="PROMPT_TUNING", name="llama", **changes):
    """Write a PEFT directory without PEFT, with changed configuration fields; return it."""
    base = tiny(name)
    method, block = ("kv" if kind == "PREFIX_TUNING" else "prompt"), Block((NUM,))
    folder.mkdir(parents=True, exist_ok=True)
    export_peft(artefact_of(base, method, block, folder), folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


BAD_CONFIGS = [
    ({"peft_type": "LORA"}, "'LORA' is no soft prompt"),
    ({"peft_type": None}, "None is no soft prompt"),
    ({"task_type": "SEQ_2_SEQ_LM"}, "SEQ_2_SEQ_LM"),
    ({"num_transformer_submodules": 2}, "num_transformer_submodules 2"),
    ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
    ({"modules_to_save": ["score"]}, "score"),
    ({"num_layers": 7}, "num_layers is 7 in the file, 3 in this base"),
    ({"token_dim": 48}, "token_dim is 48 in the file, 64 in this base"),
    ({"num_virtual_tokens": 9}, "5 vectors where adapter_config.json says 9"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused(changes, message, tmp_path):
    with pytest.raises(ArtefactError, match=message):
        import_peft(saved(tmp_path, **changes), tiny("llama"))


def test_shapes_that_do_not_fit_the_base_name_both(tmp_path):
    small = saved(tmp_path / "prefix", "PREFIX_TUNING", token_dim=None, num_attention_heads=None)
    with pytest.raises(IncompatibleModel, match=r"\[5, 192\], this base needs \[5, 384\]"):
        import_peft(small, tiny("qwen3"))
    heads = saved(tmp_path / "heads", "PREFIX_TUNING")
    with pytest.raises(IncompatibleModel, match=r"heads.* is 2 in the file, 4 in this base"):
        import_peft(heads, tiny("gpt2"))
    layers = saved(tmp_path / "layers", "PREFIX_TUNING", num_layers=None)
    save_file({"prompt_embeddings": torch.zeros(5, 128)}, layers / "adapter_model.safetensors")
    with pytest.raises(IncompatibleModel, match=r"\[5, 128\], this base needs \[5, 192\]"):
        import_peft(layers, tiny("llama"))
    long = saved(tmp_path / "long", num_virtual_tokens=None)
    save_file({"prompt_embeddings": torch.zeros(256, 64)}, long / "adapter_model.safetensors")
    with pytest.raises(IncompatibleModel, match="256 positions"):
        import_peft(long, tiny("llama"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "'prompt_embeddings' is missing"),
        (
            {"prompt_embeddings": torch.zeros(5, 64), "transform.0.weight": torch.zeros(2)},
            "'transform.0.weight' is for",
        ),
        ({"prompt_embeddings": torch.zeros(5, 64, dtype=torch.int64)}, "not a dense floating point"),
        ({"prompt_embeddings": torch.full((5, 64), float("nan"))}, "NaN or Inf"),
        ({"prompt_embeddings": torch.zeros(320)}, r"shape \[320\]"),
    ],
)
def test_tensors_that_are_no_prompt_are_refused(tensors, message, tmp_path):
    folder = saved(tmp_path)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ArtefactCorrupt, match=message):
        import_peft(folder, tiny("llama"))


def test_missing_and_broken_files_are_named(tmp_path):
    base = tiny("llama")
    with pytest.raises(ArtefactError, match=r"has no adapter_config.json"):
        import_peft(tmp_path / "nowhere", base)
    saved(tmp_path / "all" / "triage")
    with pytest.raises(ArtefactError, match="lie in triage"):
        import_peft(tmp_path / "all", base)
    folder = saved(tmp_path / "cut")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-3])
    with pytest.raises(ArtefactCorrupt, match=r"adapter_model\.safetensors"):
        import_peft(folder, base)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        import_peft(folder, base)
    for text in ("{", "[1]", "[" * 100_000):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ArtefactCorrupt, match=r"adapter_config\.json"):
            import_peft(folder, base)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.data())
def test_damaged_files_of_any_format_are_refused_as_such(where, tmp_path):
    """Flipped and missing bytes give an ArtefactError or other numbers, never another exception."""
    base, kind = tiny("llama"), where.draw(st.sampled_from(["config", "safetensors", "bin", "pt", "npy"]))
    folder, whole = tmp_path / kind, tmp_path / f"{kind}.whole"
    names = {"config": "adapter_config.json", "safetensors": "adapter_model.safetensors", "bin": "adapter_model.bin"}
    file = folder / names.get(kind, f"x.{kind}")
    if not whole.exists():
        saved(folder)
        if kind == "bin":
            torch.save(load_file(folder / "adapter_model.safetensors"), file)
            (folder / "adapter_model.safetensors").unlink()
        elif kind == "pt":
            torch.save(cartridge(base, num=1), file)
        elif kind == "npy":
            numpy.save(file, numpy.ones((NUM, 64), dtype="float32"))
        file.rename(whole)
    data = bytearray(whole.read_bytes())
    for _ in range(where.draw(st.integers(0, 4))):
        data[where.draw(st.integers(0, min(len(data) - 1, 3000)))] ^= where.draw(st.integers(1, 255))
    file.write_bytes(data[: where.draw(st.integers(0, len(data)))] if where.draw(st.booleans()) else data)
    importer = {"pt": import_cartridge_pt, "npy": import_npy}.get(kind)
    try:
        artefact = importer(file, base) if importer else import_peft(folder, base)
    except ArtefactError:
        return
    assert {name: tuple(t.shape) for name, t in artefact.tensors.items()} == artefact.header.tensor_shapes()
    assert all(torch.isfinite(tensor).all() for tensor in artefact.tensors.values())


def test_a_float16_file_becomes_float32_without_loss(tmp_path):
    folder, base = saved(tmp_path), tiny("llama")
    rows = torch.randn(NUM, 64, generator=torch.Generator().manual_seed(0)).half()
    save_file({"prompt_embeddings": rows}, folder / "adapter_model.safetensors")
    artefact = import_peft(folder, base, task="named")
    assert artefact.header.task == "named"
    assert artefact.tensors["prompt"].dtype == torch.float32
    assert torch.equal(artefact.tensors["prompt"], rows.float())
    assert artefact.header.training["imported_from"]["dtype"] == "float16"


def test_a_pickle_of_tensors_is_read(tmp_path):
    base = tiny("llama")
    model = peft_model(base, CONFIGS["PREFIX_TUNING"]())
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    assert_same(our_logits(base, import_peft(tmp_path, base)), peft_logits(model), base)


class Evil:
    """Unpickles by writing a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


def cartridge(base, num_fixed=2, num=4, seed=0, fixed="fixed", swap=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for part, count in ((fixed, num_fixed), ("trainable", num)):
        for kind in ("keys", "values"):
            rows = []
            for layer in base.spec.layers if count else ():
                width = layer.head_dim if kind == "keys" else layer.value_dim
                tensor = torch.randn(1, layer.num_kv_heads, count, width, generator=generator).to(dtype)
                rows.append(torch.nn.Parameter(tensor.transpose(1, 2).contiguous() if swap else tensor))
            data[f"{part}_{kind}"] = torch.nn.ParameterList(rows)
    return data


@pytest.mark.parametrize("write", ["new", "legacy", "plain"])
@pytest.mark.parametrize("kind", ["cartridge", "peft"])
def test_pickles_that_would_run_code_are_refused_and_not_run(kind, write, tmp_path):
    base, target = tiny("llama"), tmp_path / "written"
    folder = saved(tmp_path / "dir")
    (folder / "adapter_model.safetensors").unlink()
    file = folder / "adapter_model.bin" if kind == "peft" else tmp_path / "c.pt"
    data = {**cartridge(base), "prompt_embeddings": torch.zeros(NUM, 64), "evil": Evil(target)}
    if write == "plain":
        file.write_bytes(pickle.dumps({"prompt_embeddings": Evil(target)}))
    else:
        torch.save(data, file, _use_new_zipfile_serialization=write == "new")
    with pytest.raises(ArtefactCorrupt, match="Nothing in it was run"):
        import_peft(folder, base) if kind == "peft" else import_cartridge_pt(file, base)
    assert not target.exists()
    torch.load(file, weights_only=False) if write != "plain" else pickle.loads(file.read_bytes())
    assert target.exists()  # the file was a real threat


@pytest.mark.parametrize("fixed", ["fixed", "frozen"])
@pytest.mark.parametrize("num_fixed", [0, 2])
@pytest.mark.parametrize("swap", [False, True])
def test_cartridges_put_their_fixed_rows_first(num_fixed, fixed, swap, tmp_path):
    base = tiny("qwen3")
    data = cartridge(base, num_fixed, fixed=fixed, swap=swap)
    torch.save(data, tmp_path / "c.pt")
    artefact = import_cartridge_pt(tmp_path / "c.pt", base, out=tmp_path / "c.safetensors")
    assert artefact.header.task == "c"
    assert artefact.header.block == Block((num_fixed + 4,))
    for layer in range(base.spec.num_layers):
        for kind, name in (("keys", "key"), ("values", "value")):
            parts = [data[f"{part}_{kind}"][layer] for part in ([fixed] if num_fixed else []) + ["trainable"]]
            parts = [part.transpose(1, 2) if swap else part for part in parts]
            assert torch.equal(artefact.tensors[f"{name}.{layer}"], torch.cat(parts, dim=2)[0])
    assert torch.isfinite(our_logits(base, artefact)).all()
    equal_tensors(artefact, load_artefact(tmp_path / "c.safetensors"))


def test_a_cartridge_acts_as_its_keys_and_values_in_the_cache(tmp_path):
    from transformers import DynamicCache

    base = tiny("llama")
    data = cartridge(base)
    torch.save(data, tmp_path / "c.pt")
    cache = DynamicCache()
    for layer in range(base.spec.num_layers):
        keys, values = (torch.cat([data[f"fixed_{k}"][layer], data[f"trainable_{k}"][layer]], 2) for k in KINDS)
        cache.update(keys.detach(), values.detach(), layer)
    with torch.no_grad():
        expected = base.model(input_ids=torch.tensor([ROW]), past_key_values=cache).logits[0]
    assert_same(our_logits(base, import_cartridge_pt(tmp_path / "c.pt", base)), expected, base)


def test_broken_cartridges_are_refused(tmp_path):
    base, file = tiny("llama"), tmp_path / "c.pt"

    def importing(data, error, message):
        torch.save(data, file)
        with pytest.raises(error, match=message):
            import_cartridge_pt(file, base)

    importing([1], ArtefactCorrupt, "this has list")
    importing({"trainable_keys": []}, ArtefactCorrupt, "this has trainable_keys")
    importing({**cartridge(base), "frozen_keys": cartridge(base)["fixed_keys"]}, ArtefactCorrupt, "both fixed_keys and")
    importing({**cartridge(base), "more": 1}, ArtefactCorrupt, "foreign entry 'more'")
    importing({**cartridge(base), "trainable_keys": 3}, ArtefactCorrupt, "is a int, not a list")
    importing({**cartridge(base), "trainable_keys": ["a"] * 3}, ArtefactCorrupt, r"trainable_keys\[0\] is not a dense")
    importing(cartridge(tiny("qwen3")), IncompatibleModel, r"\[1, 2, 2, 32\], this base needs \[1, 2, P, 16\]")
    short = {name: list(entry)[:2] for name, entry in cartridge(base).items()}
    importing(short, IncompatibleModel, "layers in fixed_keys is 2 in the file, 3 in this base")
    uneven = cartridge(base) | {"trainable_values": cartridge(base, num=3)["trainable_values"]}
    importing(uneven, IncompatibleModel, r"\[2, 5, 16\], this base needs \[2, 6, 16\]")
    huge = cartridge(base)
    huge["trainable_keys"][0] = torch.nn.Parameter(torch.zeros(1, 1, 1, 1).expand(1, 2, 10**12, 16))
    importing(huge, ArtefactCorrupt, "not a dense")
    nan = cartridge(base)
    nan["fixed_keys"][1].data[0, 0, 0, 0] = float("inf")
    importing(nan, ArtefactCorrupt, "'key.1' holds NaN or Inf")
    with pytest.raises(ArtefactError, match="cannot read"):
        import_cartridge_pt(tmp_path / "none.pt", base)
    torch.save(cartridge(base), file)
    whole = file.read_bytes()
    for count in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:count])
        with pytest.raises(ArtefactCorrupt):
            import_cartridge_pt(file, base)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", ">f4"])
def test_npy_prompts_are_read(dtype, tmp_path):
    base = tiny("gpt2")
    array = numpy.random.default_rng(0).normal(size=(6, 64)).astype(dtype)
    numpy.save(tmp_path / "sst2.npy", array)
    artefact = import_npy(tmp_path / "sst2.npy", base)
    assert artefact.header.task == "sst2"
    assert numpy.array_equal(artefact.tensors["prompt"].numpy(), array.astype("float32"))
    expected = uncompiled_logits(base, torch.tensor([ROW]), SoftPrompt(artefact.tensors["prompt"]))[0]
    assert_same(our_logits(base, artefact), expected, base)


def test_npy_files_that_are_no_prompt_are_refused(tmp_path):
    base, file = tiny("gpt2"), tmp_path / "p.npy"

    def importing(error, message):
        with pytest.raises(error, match=message):
            import_npy(file, base)

    numpy.save(file, numpy.array([[Evil(tmp_path / "written")]], dtype=object), allow_pickle=True)
    importing(ArtefactCorrupt, "not a .npy array")
    file.write_bytes(pickle.dumps(Evil(tmp_path / "written")))
    importing(ArtefactCorrupt, "not a .npy array")
    assert not (tmp_path / "written").exists()
    with file.open("wb") as handle:
        numpy.savez(handle, numpy.zeros((2, 64)))
    importing(ArtefactCorrupt, "an archive")
    numpy.save(file, numpy.zeros((6, 32), dtype="float32"))
    importing(IncompatibleModel, r"\[6, 32\], this base needs \[6, 64\]")
    numpy.save(file, numpy.zeros((6, 64), dtype="int32"))
    importing(ArtefactCorrupt, "dtype int32")
    numpy.save(file, numpy.zeros((6, 64, 1), dtype="float32"))
    importing(ArtefactCorrupt, r"\[6, 64, 1\]")
    numpy.save(file, numpy.full((6, 64), numpy.nan, dtype="float32"))
    importing(ArtefactCorrupt, "NaN or Inf")
    numpy.save(file, numpy.zeros((6, 64), dtype="float32"))
    file.write_bytes(file.read_bytes()[:-4])
    importing(ArtefactCorrupt, "not a .npy array")
    with pytest.raises(ArtefactError, match="cannot read"):
        import_npy(tmp_path / "none.npy", base)


def test_forms_agree_before_export(tmp_path):
    """The three kinds of one block, exported, act as their uncompiled forms do."""
    base = tiny("opt")
    prompt = artefact_of(base, "prompt", Block((NUM,)), tmp_path)
    assert isinstance(prompt.vectors, SoftPrompt)
    prefix = artefact_of(base, "prefix", Block((NUM,)), tmp_path)
    assert isinstance(prefix.vectors, SoftPrefix)
    assert isinstance(artefact_of(base, "kv", Block((NUM,)), tmp_path).vectors, SoftKV)
    for artefact in (prompt, prefix):
        expected = uncompiled_logits(base, torch.tensor([ROW]), artefact.vectors)[0]
        assert_same(our_logits(base, artefact), expected, base)
