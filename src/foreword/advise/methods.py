"""The methods that are weighed, in words: what each steers, where it lives, what serving it needs.

Parameter-efficient tuning is told here in one view, that of learning a soft prompt: every method adds something that is
not in the text, and they differ in which part of the layer it enters. He et al. 2022 (arXiv:2110.04366) show the common
form of prefixes, adapters and LoRA; Petrov et al. 2024 (arXiv:2310.19698) what a prefix cannot do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

Surface = Literal["text", "input_embeddings", "kv_import", "lora", "layer_code", "weights"]
"""What a platform must allow to change."""
SURFACES: tuple[Surface, ...] = ("text", "input_embeddings", "kv_import", "lora", "layer_code", "weights")
"""From the least change to the most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to adapt a frozen base to a task."""

    name: str
    title: str
    steers: str
    """Which part of the model it steers, and how, in the view of PEFT as soft-prompt learning."""
    where: str
    """Where its trainable vectors or parameters live, and how they are applied at inference."""
    surface: Surface
    """The least change that a platform must allow to serve it."""
    components: tuple[str, ...]
    """What must be added or changed to serve it."""
    composes: bool
    """Whether requests of different tasks share one batch on one copy of the base."""
    trains: bool
    """Whether gradients are needed."""
    strengths: tuple[str, ...]
    limits: tuple[str, ...]
    sources: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self)


_LESTER = "Lester et al. 2021, arXiv:2104.08691"
_LI = "Li and Liang 2021, arXiv:2101.00190"
_XIAO = "Xiao and Zhu 2025, arXiv:2501.09223, chapter 3"
_PETROV = "Petrov et al. 2024, arXiv:2310.19698"
_HE = "He et al. 2022, arXiv:2110.04366"

_ALL = (
    Method(
        name="hard_text",
        title="Hard text prompt",
        steers="The same block in front of the text as a soft prompt, but each of its rows must be the embedding of "
        "a word: a search over the vocabulary instead of over the whole embedding space.",
        where="No trained numbers: an instruction in the template. At inference its tokens run through the model, "
        "once per request or once per cache.",
        surface="text",
        components=("prompt template",),
        composes=True,
        trains=False,
        strengths=(
            "anyone can read, review and change it, within minutes",
            "works on every base and every hosted API, and survives a change of base",
            "needs no training data",
        ),
        limits=(
            "what no wording expresses it cannot steer",
            "positions for every instruction: context and decode reads grow with its length",
            "wording is brittle, and its gain must be measured like any other",
        ),
        sources=(_XIAO,),
    ),
    Method(
        name="few_shot",
        title="Few-shot demonstrations",
        steers="A long hard block: attention reads the task off solved examples. The rows are real text, so nothing "
        "is learned outside the forward pass.",
        where="No trained numbers: chosen examples in the template. Their keys and values fill the cache of each "
        "sequence, or of each task where blocks are shared.",
        surface="text",
        components=("prompt template", "a store of examples, and a rule that picks them"),
        composes=True,
        trains=False,
        strengths=(
            "a few examples suffice",
            "readable, and changed within minutes",
            "often a strong baseline on large bases",
        ),
        limits=(
            "context, cache memory and prefill of thousands of tokens per request",
            "order and choice of examples move the score",
            "examples are shown to the model on every request: mind what they contain",
        ),
        sources=("Brown et al. 2020, arXiv:2005.14165",),
    ),
    Method(
        name="prompt",
        title="Prompt tuning",
        steers="The input of layer 1 alone: P free rows before the text. Every later layer is steered only through "
        "what the frozen layers make of those rows.",
        where="A matrix [P, D] in the space of the token embeddings. At inference its rows are written before the "
        "embeddings of the text and run through all layers with it.",
        surface="input_embeddings",
        components=("a gateway that embeds the text and puts the rows before it", "prompt_embeds in the engine"),
        composes=True,
        trains=True,
        strengths=(
            "the smallest file: P·D numbers per task",
            "no layer, cache or weight of the server changes",
            "comes close to full tuning on large bases",
        ),
        limits=(
            "the fewest numbers to learn with: weak on small bases, tagging and new skills",
            "embeddings travel on the wire unless the server holds them by name",
            "the rows look like no words: their nearest tokens are no explanation",
        ),
        sources=(_LESTER, _XIAO, "Khashabi et al. 2022, arXiv:2112.08348"),
    ),
    Method(
        name="prefix",
        title="Prefix tuning, hidden-state form",
        steers="The input of every layer: layer l reads [p^l ; h^(l-1)], and of its output only the rows of the text "
        "are kept. The prefix acts in each attention as a second set of keys and values, made by the layer's "
        "own projections.",
        where="A tensor [L, P, D], one block per layer. At inference either hooks write p^l into each layer's "
        "input, or it is compiled once to keys and values, which is exact, and imported.",
        surface="kv_import",
        components=(
            "compilation to keys and values, once per version",
            "a connector that writes blocks into the engine's cache",
        ),
        composes=True,
        trains=True,
        strengths=(
            "steers every layer, not only what layer 1 hands on",
            "compiles exactly: a request costs what a kv prefix costs",
            "cannot leave what the layer's projections can make, which steadies training",
        ),
        limits=(
            "under grouped queries its file is larger than the keys and values that it compiles to",
            "an implementation without compilation touches the code of every layer",
            "the norm before a layer removes the vectors' length: weight decay on them means nothing",
        ),
        sources=(_LI, _XIAO),
    ),
    Method(
        name="kv",
        title="Prefix tuning, key/value form",
        steers="A parallel attention in every layer over learned keys and values: head by head the output becomes (1 "
        "- a)·(attention to the text) + a·(a learned value), a the mass that the keys draw.",
        where="Keys and values [L, 2, Hkv, P, Dh]. At inference they lie in the cache as P positions that were "
        "computed before.",
        surface="kv_import",
        components=("a connector that writes blocks into the engine's cache",),
        composes=True,
        trains=True,
        strengths=(
            "the most freedom per position: keys and values that no token produces",
            "no prefill of its own, nothing on the wire but a name",
            "training pays for the text's positions alone",
        ),
        limits=(
            "cannot change how text tokens attend to each other within a layer",
            "random starts train badly: begin from the keys and values of a real instruction",
            "leaves layers with a sliding window after W tokens; not to be had under MLA or in state layers",
        ),
        sources=(_LI, "Liu et al. 2022, P-tuning v2, arXiv:2110.07602", _PETROV),
    ),
    Method(
        name="compiled_prompt",
        title="Compiled prompt",
        steers="What prompt tuning steers, the input of layer 1; only the serving differs: the keys and values that "
        "its rows leave in each layer are computed once and imported.",
        where="The file is the prompt's [P, D]; the server holds [L, 2, Hkv, P, Dh] per version and puts them into "
        "the cache as positions computed before.",
        surface="kv_import",
        components=(
            "compilation to keys and values, once per version",
            "a connector that writes blocks into the engine's cache",
        ),
        composes=True,
        trains=True,
        strengths=(
            "exact: the same answers as the prompt, without its prefill and without embeddings on the wire",
            "the smallest file, and the request cost of a kv prefix",
        ),
        limits=(
            "needs causal attention and a constant left context",
            "learns with a prompt's P·D numbers, fewer than a kv prefix has",
            "must be compiled again when the base, its precision or its quantisation changes",
        ),
        sources=(_LESTER, _XIAO),
    ),
    Method(
        name="cartridge",
        title="Cartridge (compressed context)",
        steers="The same parallel attention as a kv prefix, learned to answer as the model answers with a long text "
        "in its context.",
        where="Keys and values [L, 2, Hkv, P, Dh] of one context, with P in the hundreds or thousands. At inference "
        "they lie in the cache where the text would lie.",
        surface="kv_import",
        components=(
            "a connector that writes blocks into the engine's cache",
            "self-study: generation of questions and answers about the context, and distillation",
        ),
        composes=True,
        trains=True,
        strengths=(
            "a fraction of the context's cache, reads and prefill",
            "no labelled rows: the teacher is the same base with the text in view",
        ),
        limits=(
            "pays only where one stable text is read by many requests",
            "a changed text needs new training",
            "cartridges trained apart do not work side by side",
        ),
        sources=("Eyuboglu et al. 2025, arXiv:2506.06266",),
    ),
    Method(
        name="lora",
        title="LoRA",
        steers="The projections themselves, W + B·A of rank r: a learned change of how every token is turned into "
        "queries, keys, values and features. It can change how text tokens attend to each other, which a "
        "prefix cannot.",
        where="Two thin matrices per linear map, r·(in + out) numbers. At inference they are applied beside the "
        "frozen map, per request in a mixed batch, or are merged into the weights of one task's replica.",
        surface="lora",
        components=("an engine with LoRA kernels", "memory and slots for resident adapters"),
        composes=True,
        trains=True,
        strengths=(
            "learns new skills and attention patterns, and uses many rows well",
            "no positions, so no context and no cache",
            "tools and engines know it",
        ),
        limits=(
            "far larger files than vectors",
            "work on every token of every request; each task in a batch is read in every step",
            "keys and values of shared text differ between tasks, so caches are not shared across them",
        ),
        sources=("Hu et al. 2021, arXiv:2106.09685", "Chen et al. 2023, Punica, arXiv:2310.18547"),
    ),
    Method(
        name="adapter",
        title="Bottleneck adapters",
        steers="The output of each sublayer: a bias computed from it by a small network, x + U·s(V·x), s an "
        "activation. Where a prefix adds a direction weighted by attention, an adapter adds one weighted by a "
        "learned gate on each token.",
        where="Two maps through a width of m behind attention and feed-forward of every layer. At inference each "
        "token passes them one after the other.",
        surface="layer_code",
        components=("the code of every layer", "kernels for batches that mix tasks", "memory for resident adapters"),
        composes=False,
        trains=True,
        strengths=("well studied, and stable to train", "no positions, so no context and no cache"),
        limits=(
            "sits in the path of every token: latency that cannot be merged away",
            "stock serving engines do not run it",
        ),
        sources=("Houlsby et al. 2019, arXiv:1902.00751", _HE),
    ),
    Method(
        name="ia3",
        title="(IA)³",
        steers="Keys, values and inner feed-forward features, each rescaled by a learned factor: what the layer "
        "already computes is turned up or down, nothing is added.",
        where="Three vectors per layer, 2·Hkv·Dh + F numbers. At inference element-wise products, or merged into "
        "the weights of one task's replica.",
        surface="layer_code",
        components=("the code of every layer", "element-wise products per request for batches that mix tasks"),
        composes=False,
        trains=True,
        strengths=("small files", "made for few rows", "no positions, so no context and no cache"),
        limits=(
            "can only rescale what is there",
            "stock serving engines do not run it",
            "keys and values of shared text differ between tasks, so caches are not shared across them",
        ),
        sources=("Liu et al. 2022, arXiv:2205.05638",),
    ),
    Method(
        name="full",
        title="Full fine-tuning",
        steers="Everything: each weight moves, and no frozen model is left that tasks could share.",
        where="All N parameters. At inference each task is a model of its own.",
        surface="weights",
        components=("a model and its replicas per task", "a pipeline that builds and rolls out checkpoints"),
        composes=False,
        trains=True,
        strengths=("the highest ceiling with many rows", "no work added per request"),
        limits=(
            "a copy of the base per task, in storage and in accelerator memory",
            "tasks share no batch and no cache",
            "forgets what the rows do not show, and each change is a rollout",
        ),
        sources=(_XIAO, "Biderman et al. 2024, arXiv:2405.09673"),
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
"""By name, from the least change to the most."""
