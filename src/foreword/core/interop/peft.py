"""PEFT directories (`adapter_config.json` and `adapter_model.safetensors`), read and written without PEFT.

PEFT keeps every prompt method as one tensor: prompt rows [P, D], or keys and values flattened to [P, 2·L·Hkv·Dh], the
view [P, 2L, Hkv, Dh] with a layer's keys at 2l and its values at 2l+1. Its vectors stand before all text, BOS included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreword.core.artefact import Artefact, ArtefactHeader, write_atomically
from foreword.core.compile import compile
from foreword.core.interop.imported import (
    check_number,
    check_shape,
    is_plain,
    make_artefact,
    read_json,
    read_pickle,
    read_safetensors,
    uniform_heads,
)
from foreword.core.model import FrozenModel
from foreword.core.spec import Method
from foreword.core.template import TaskTemplate
from foreword.errors import ArtefactCorrupt, ArtefactError, ConfigError, IncompatibleModel

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROWS = "prompt_embeddings"
MULTITASK = "MULTITASK_PROMPT_TUNING"
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "CPT", MULTITASK)
PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


@dataclass(frozen=True)
class _Directory:
    """A PEFT directory that was read and checked against a base, as far as its kind allows."""

    kind: str
    config: Mapping[str, Any]
    file: Path
    tensors: Mapping[str, Tensor]

    @property
    def source(self) -> dict[str, Any]:
        """What the artefact's header keeps of it."""
        kept = ("base_model_name_or_path", "revision", "peft_version", "prefix_projection", "num_frozen_tokens")
        known = {name: self.config[name] for name in kept if self.config.get(name) is not None}
        return {"format": "peft", "peft_type": self.kind, **known}


def import_peft(
    path: str | Path,
    base: FrozenModel,
    *,
    template: TaskTemplate | None = None,
    task: str | None = None,
    task_index: int | None = None,
    out: str | Path | None = None,
) -> Artefact:
    """Import a PEFT directory: PROMPT_TUNING, P_TUNING, CPT (`prompt`), PREFIX_TUNING, CARTRIDGE (`kv`), or one task
    of MULTITASK_PROMPT_TUNING (`prompt`, with `task_index`).

    Behind the artefact's block the base gives PEFT's own logits for an unpadded text (tests/core/test_interop.py). The
    vectors stand before BOS, and the tokenizer's usual specials follow; a `template` that opens with its slot says what
    hard text follows besides. `task` defaults to the directory's name. Raises IncompatibleModel where a shape or a
    figure of the configuration is not the base's, or the directory is no causal prompt; ArtefactCorrupt where a file is
    broken or a pickle asks for more than tensors; ArtefactError where one is missing.
    """
    path = Path(path)
    folder = _read_directory(path, base)
    if folder.kind == MULTITASK:
        products = _multitask_products(folder, base)
        if task_index is None or not 0 <= task_index < len(products):
            raise ConfigError(
                f"{path} holds {len(products)} tasks, task_index is {task_index}",
                hint=f"Give task_index=0 to {len(products) - 1}, or import all with import_peft_multitask.",
            )
        tensors = {"prompt": products[task_index]}
        name, source = task or f"{path.resolve().name}-{task_index}", folder.source | {"task_index": task_index}
    elif task_index is not None:
        raise ConfigError(f"{path} is {folder.kind}, of one task; task_index is {task_index}", hint="Leave it out.")
    else:
        tensors = {"prompt": folder.tensors[ROWS]} if folder.kind in PROMPTS else _split_rows(folder, base)
        name, source = task or path.resolve().name, folder.source
    method: Method = "prompt" if folder.kind in PROMPTS else "kv"
    return make_artefact(base, method, tensors, file=folder.file, source=source, template=template, task=name, out=out)


def import_peft_multitask(
    path: str | Path,
    base: FrozenModel,
    *,
    template: TaskTemplate | None = None,
    tasks: Sequence[str] = (),
    out: str | Path | None = None,
) -> list[Artefact]:
    """Import every task of a MULTITASK_PROMPT_TUNING directory, each as a soft prompt of its own.

    Task t's vectors are `prompt * (cols[t] @ rows[t])`. `tasks` names them, in the order of their ids (default: the
    directory's name and the id); with a folder `out`, each is written to `<out>/<task>.safetensors`. Raises as
    `import_peft` does, and ConfigError where the number of names differs.
    Source: Wang et al. 2023, arXiv:2303.02861.
    """
    path = Path(path)
    folder = _read_directory(path, base)
    if folder.kind != MULTITASK:
        raise ConfigError(f"{path} is {folder.kind}, not {MULTITASK}", hint="Use import_peft.")
    products = _multitask_products(folder, base)
    names = list(tasks) or [f"{path.resolve().name}-{index}" for index in range(len(products))]
    if len(names) != len(products) or len(set(names)) != len(names):
        raise ConfigError(f"{path} holds {len(products)} tasks, {len(set(names))} distinct names were given")
    return [
        make_artefact(
            base,
            "prompt",
            {"prompt": rows},
            file=folder.file,
            source=folder.source | {"task_index": index},
            template=template,
            task=name,
            out=None if out is None else Path(out, f"{name}.safetensors"),
        )
        for index, (name, rows) in enumerate(zip(names, products, strict=True))
    ]


def export_peft(
    artefact: Artefact, path: str | Path, *, base: FrozenModel | None = None, base_model_name: str = ""
) -> Path:
    """Write a directory that `PeftModel.from_pretrained` loads, and return it.

    A prompt whose vectors lead its block becomes PROMPT_TUNING and a `kv` likewise PREFIX_TUNING, bit for bit. Anything
    else (a hidden-state prefix, literal tokens left of the vectors) needs `base`: its whole block, literal tokens
    included, is compiled and written as PREFIX_TUNING, which is exact. The directory's README.md says what text must
    follow, since PEFT has no field for it. Raises ArtefactError where that needs a base or cannot be said in PEFT
    (soft slots behind the input), IncompatibleModel where `base` is not the artefact's or its layers differ in shape.
    """
    path, header = Path(path), artefact.header
    if header.soft_after:
        raise ArtefactError(
            f"task {header.task!r} has {header.soft_after} vectors behind the input; PEFT knows vectors in front only",
            hint="Serve it with foreword, or train it with slots left of {input}.",
        )
    block, num = header.block, header.block.num_soft
    leads = block.soft_positions() == list(range(num))
    if header.method == "prompt" and leads:
        rows, folded = artefact.tensors["prompt"], False
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": num, "token_dim": header.spec.embed_size}
        config |= {"prompt_tuning_init": "RANDOM", "num_layers": header.spec.num_layers}
    else:
        if header.method == "kv" and leads and (base is None or block.num_positions == num):
            keys = [artefact.tensors[f"key.{layer}"] for layer in range(header.spec.num_layers)]
            values = [artefact.tensors[f"value.{layer}"] for layer in range(header.spec.num_layers)]
            folded = False
        elif base is None:
            raise ArtefactError(
                f"task {header.task!r} ({header.method}, block {block.to_json()}) has no form in PEFT as it stands",
                hint="Give base=, the frozen model: the block is then compiled and written as PREFIX_TUNING.",
            )
        else:
            compiled = compile(base, artefact)
            keys, values, folded = list(compiled.keys), list(compiled.values), True
        rows, config = _flat_rows(header, keys, values)
    if not base_model_name and base is not None:
        base_model_name = str(getattr(base.model.config, "_name_or_path", "") or "")
    _write_directory(path, rows, config, base_model_name, _readme(artefact, folded, base_model_name))
    return path


def _read_directory(path: Path, base: FrozenModel) -> _Directory:
    if not (path / CONFIG).is_file():
        inner = sorted(folder.parent.name for folder in path.glob(f"*/{CONFIG}")) if path.is_dir() else []
        hint = f"Its adapters lie in {', '.join(inner)}: give one of these." if inner else "Give a PEFT directory."
        raise ArtefactError(f"{path} has no {CONFIG}", hint=hint)
    config = read_json(path / CONFIG)
    kind = config.get("peft_type")
    if kind not in (*PROMPTS, *PREFIXES):
        known = ", ".join((*PROMPTS, *PREFIXES))
        raise IncompatibleModel(f"{path}: peft_type {kind!r} is no soft prompt or prefix", hint=f"Known: {known}.")
    _check_config(path / CONFIG, kind, config, base)
    file = path / TENSORS if (path / TENSORS).is_file() else path / PICKLE
    if not file.is_file():
        raise ArtefactError(f"{path} has neither {TENSORS} nor {PICKLE}", hint="The vectors are missing: save again.")
    tensors = read_safetensors(file) if file.name == TENSORS else read_pickle(file)
    if not isinstance(tensors, dict):
        raise ArtefactCorrupt(f"{file}: holds a {type(tensors).__name__}, not named tensors")
    needed = {ROWS, "prefix_task_cols", "prefix_task_rows"} if kind == MULTITASK else {ROWS}
    if odd := sorted(map(str, tensors.keys() ^ needed)):
        raise ArtefactCorrupt(
            f"{file}: tensor {odd[0]!r} is {'missing' if odd[0] in needed else 'foreign'} for {kind}",
            hint="Only vectors are imported; PEFT's save_pretrained writes an encoder's output, not the encoder.",
        )
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            raise ArtefactCorrupt(f"{file}: {name!r} is not a dense floating point tensor")
    folder = _Directory(kind, config, file, tensors)
    _check_rows(folder, base)
    return folder


def _check_config(file: Path, kind: str, config: Mapping[str, Any], base: FrozenModel) -> None:
    if config.get("task_type") not in (None, "CAUSAL_LM") or config.get("num_transformer_submodules") not in (None, 1):
        raise IncompatibleModel(
            f"{file}: task_type {config.get('task_type')!r}, num_transformer_submodules "
            f"{config.get('num_transformer_submodules')!r}, where a causal language model has 'CAUSAL_LM' and 1",
            hint="Prompts of encoder-decoders and of classification heads have no place in a causal base.",
        )
    if config.get("modules_to_save"):
        raise IncompatibleModel(
            f"{file}: modules_to_save {config['modules_to_save']!r} were trained too, the base here stays frozen"
        )
    check_number(file, "num_layers", config.get("num_layers"), base.spec.num_layers)
    if kind in PREFIXES:
        heads, width = uniform_heads(base)
        check_number(file, "num_attention_heads (key/value heads)", config.get("num_attention_heads"), heads)
        check_number(file, "token_dim (key/value heads x head dimension)", config.get("token_dim"), heads * width)
    else:
        check_number(file, "token_dim", config.get("token_dim"), base.spec.embed_size)


def _check_rows(folder: _Directory, base: FrozenModel) -> None:
    rows = folder.tensors[ROWS]
    if rows.ndim != 2 or not len(rows):
        raise ArtefactCorrupt(f"{folder.file}: {ROWS!r} has shape {list(rows.shape)}, not [P, width]")
    if (declared := folder.config.get("num_virtual_tokens")) not in (None, len(rows)):
        raise ArtefactCorrupt(f"{folder.file}: {len(rows)} vectors where {CONFIG} says {declared!r}")
    width = base.spec.embed_size
    if folder.kind in PREFIXES:
        heads, dim = uniform_heads(base)
        width = 2 * base.spec.num_layers * heads * dim
    check_shape(folder.file, ROWS, rows.shape, (len(rows), width))


def _split_rows(folder: _Directory, base: FrozenModel) -> dict[str, Tensor]:
    """Return `key.{l}`, `value.{l}` [Hkv, P, Dh] of the flat rows [P, 2·L·Hkv·Dh]."""
    heads, width = uniform_heads(base)
    rows = folder.tensors[ROWS]
    split = rows.view(len(rows), 2 * base.spec.num_layers, heads, width).permute(1, 2, 0, 3)  # [2L, Hkv, P, Dh]
    layers = range(base.spec.num_layers)
    return {f"key.{layer}": split[2 * layer] for layer in layers} | {
        f"value.{layer}": split[2 * layer + 1] for layer in layers
    }


def _multitask_products(folder: _Directory, base: FrozenModel) -> list[Tensor]:
    """Return each task's vectors [P, D]."""
    prompt = folder.tensors[ROWS].float()
    cols, rows = folder.tensors["prefix_task_cols"].float(), folder.tensors["prefix_task_rows"].float()
    num, rank = (folder.config.get(name) for name in ("num_tasks", "num_ranks"))
    tasks, ranks = (cols.shape[0], cols.shape[2]) if cols.ndim == 3 else (0, 0)
    expected = (tasks, len(prompt), ranks), (tasks, ranks, base.spec.embed_size)
    if (tuple(cols.shape), tuple(rows.shape)) != expected or num not in (None, tasks) or not tasks:
        raise ArtefactCorrupt(
            f"{folder.file}: prefix_task_cols {list(cols.shape)} and prefix_task_rows {list(rows.shape)} for "
            f"{num} tasks of rank {rank} with {list(prompt.shape)} shared"
        )
    return [prompt * (col @ row) for col, row in zip(cols, rows, strict=True)]


def _flat_rows(
    header: ArtefactHeader, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Return rows [N, 2·L·Hkv·Dh] from L keys and values [Hkv, N, Dh], and their configuration."""
    shapes = {tuple(tensor.shape) for tensor in (*keys, *values)}
    if len(shapes) > 1:
        raise IncompatibleModel(
            f"keys and values of task {header.task!r} have shapes {sorted(shapes)}; PEFT has one for all layers"
        )
    heads, num, width = shapes.pop()
    pairs = [tensor for pair in zip(keys, values, strict=True) for tensor in pair]
    rows = torch.stack(pairs).permute(2, 0, 1, 3).reshape(num, -1)
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": num, "token_dim": heads * width}
    config |= {"num_attention_heads": heads, "num_layers": len(keys), "encoder_hidden_size": heads * width}
    return rows, config | {"prefix_projection": False}


def _write_directory(path: Path, rows: Tensor, config: Mapping[str, Any], base_name: str, readme: str) -> None:
    from safetensors.torch import save

    whole = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        **config,
    }
    write_atomically(path / TENSORS, save({ROWS: rows.detach().cpu().contiguous()}, metadata={"format": "pt"}))
    write_atomically(path / "README.md", readme.encode())
    write_atomically(path / CONFIG, (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode())


def _readme(artefact: Artefact, folded: bool, base_name: str) -> str:
    header = artefact.header
    after = [] if folded else header.block.literal_ids()[header.block.num_soft :]
    front = ["---", "library_name: peft", *([f"base_model: {json.dumps(base_name)}"] if base_name else []), "---"]
    lines = [*front, f"# {header.task}", f"From a foreword artefact ({header.method}), sha256 {artefact.sha256}."]
    lines += ["", "What the model must be fed, since this format has no field for it:"]
    if folded:
        lines.append(
            f"- The vectors hold the whole block {json.dumps(header.block.to_json())} (literal token ids, numbers of "
            "vectors), so feed what follows it, without the tokenizer's special tokens in front."
        )
    elif after:
        lines.append(f"- Right behind the vectors the token ids {json.dumps(after)}, then the input.")
    else:
        lines.append("- The text as the tokenizer gives it, with its usual special tokens.")
    if header.template is not None:
        lines.append(f"- The task's template: `{json.dumps(header.template, ensure_ascii=False)}`")
    return "\n".join(lines) + "\n"
