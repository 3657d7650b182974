"""Where trained vectors live, and what a prefix-tuned layer reads, with the shapes of the base at hand."""

from __future__ import annotations

from foreword.advise.decide import Decision
from foreword.advise.essay.words import amount, capital, noun, number, quantity
from foreword.advise.methods import METHODS
from foreword.report import Block, Code, Section, Table, Text


def where_vectors_live(decision: Decision) -> Section:
    """Return the section on where trainable vectors live and how they are applied at inference."""
    base, best = decision.constraints.base, decision.best
    count = decision.standing("prompt").effects.load.num_vectors
    deep = decision.standing("prefix").effects.load.num_vectors
    blocks: list[Block] = []
    if best is not None:
        blocks.append(Text(f"**{capital(noun(best.name))}**, the method recommended. {METHODS[best.name].where}"))
    blocks.append(
        Text(
            "The three forms of soft prompt differ in where their vectors enter, and in nothing else: the base is "
            "frozen in all of them, and a task's file can be taken away without a trace. **Prompt tuning** trains "
            f"{count} rows of {base.hidden_size:,} numbers, and writes them in front of the token embeddings once, "
            "before layer 1; everything above is what the frozen layers make of them. **Prefix tuning** trains such "
            f"rows for each of the {base.num_layers} layers, and writes a layer's own rows in front of what the layer "
            "below hands up. **The KV form** goes one step further inside: it trains what such rows would leave "
            "behind, the keys and values that the text attends to."
        )
    )
    blocks.append(_forms(decision))
    blocks.append(
        Text(
            "At inference the first two need not be computed again for every request. Behind a constant beginning, a "
            "causal model's vectors act on the text through nothing but their keys and values, so one forward pass "
            "per version turns either into the KV form, exactly up to rounding. From then on a sequence simply starts "
            f"with {_positions(count, deep)} already filled, and requests of all tasks share one batch. What remains "
            "different is the file that is kept, what the platform must allow, and how far the vectors reach."
        )
    )
    return Section("Where the vectors live, and how they are applied", tuple(blocks))


def layer_input(decision: Decision) -> Section:
    """Return the section on the input of a prefix-tuned layer, `[p^l ; h^{l-1}]`, with this base's shapes."""
    base, text = decision.constraints.base, decision.constraints.tasks.input_tokens
    vectors = decision.standing("prefix").effects.load.num_vectors
    rows, width, layers = vectors + text, base.hidden_size, base.num_layers
    lines = [
        f"input of layer l    H^l = [ p^l_0 … p^l_{vectors - 1} ; h^(l-1)_0 … h^(l-1)_{text - 1} ]",
        f"                          {vectors} x {width} trained   {text} x {width} from the layer below",
        f"                          {rows} x {width} in all",
        f"output of layer l   h^l = Layer_l(H^l)[-{text}:]",
        f"                          {text} x {width} kept, the first {vectors} rows dropped",
        f"next layer          H^(l+1) = [ p^(l+1) ; h^l ]        {rows} x {width} again",
    ]
    trained = layers * vectors * width
    grown = text + layers * vectors
    blocks: list[Block] = [
        Text(
            f"Take an input of {text} tokens and P = {vectors}. Layer l of {base.name} then reads {rows} rows of "
            f"{width:,} numbers: {vectors} that belong to this layer and this task, and {text} that the layer below "
            "produced. With h^0 for the token embeddings and l from 1 to "
            f"{layers}:"
        ),
        Code("\n".join(lines)),
        Text(
            f"Only the rows p^1 … p^{layers} train: {layers} · {vectors} · {width} = {trained:,} numbers. The rows h "
            "are computed by frozen weights; gradients pass through them on their way to the prefixes of the layers "
            f"below and change nothing. Of a layer's output the last {text} rows are kept. The first {vectors} are "
            f"dropped, since the next layer brings its own: every layer sees {rows} rows, no more. An implementation "
            f"that forgets to drop them grows by {vectors} rows a layer, to {grown:,} rows in layer {layers}, and one "
            "that writes its rows before layer 1 only is prompt tuning under another name."
        ),
        Text(_contrast(decision, vectors)),
    ]
    if keys_values := _keys_values(decision, vectors):
        blocks.append(Text(keys_values))
    return Section("What a prefix-tuned layer reads: `[p^l ; h^(l-1)]`", tuple(blocks))


def _contrast(decision: Decision, deep: int) -> str:
    base, text = decision.constraints.base, decision.constraints.tasks.input_tokens
    count = decision.standing("prompt").effects.load.num_vectors
    return (
        f"Prompt tuning has the same first line and no second one. Layer 1 reads [p ; h^0], {count + text} rows, and "
        f"all {count + text} rows of its output go on: from layer 2 on, what stands at the first {count} places is "
        f"computed by the base from p. So {count * base.hidden_size:,} numbers have to steer {base.num_layers} layers, "
        f"where a prefix sets {deep * base.hidden_size:,} numbers in each."
    )


def _keys_values(decision: Decision, vectors: int) -> str:
    base = decision.constraints.base
    heads, size = base.num_kv_heads, base.head_dim
    if len(base.kv_layers) < base.num_layers or heads is None or size is None:
        other = base.num_layers - len(base.kv_layers)
        if other == 0:
            return ""
        return (
            f"On {base.name} {other} of {base.num_layers} layers hold no keys and values of their own. There a prefix "
            "cannot be stored in the KV form, and the layer's rows act through what the layer keeps instead."
        )
    per_layer = 2 * heads * size
    total = base.num_layers * vectors * per_layer
    ratio = per_layer / base.hidden_size
    if ratio < 1:
        verdict = (
            f"less than the {base.hidden_size:,} of the row itself, because {base.num_heads} query heads share {heads} "
            f"key and value heads: the KV form takes {ratio:.2g} of the hidden-state form's bytes"
        )
    elif ratio > 1:
        verdict = f"more than the {base.hidden_size:,} of the row itself: the KV form takes {ratio:.2g} times its bytes"
    else:
        verdict = "as many as the row itself has"
    return (
        "Because the prefix's own outputs are dropped, p^l acts through two products alone, the keys W_K p^l and the "
        f"values W_V p^l, taken after the layer's norm. Per vector and layer these are 2 · {heads} · {size} = "
        f"{per_layer:,} numbers, {verdict}. For P = {vectors} they are {total:,} numbers, {amount(2 * total)} at two "
        "bytes each; that is what the engine's cache holds for the task, however it was trained. The KV form trains "
        "them directly: it may set keys and values that no row p^l could produce, and nothing is computed at its "
        "positions."
    )


def _forms(decision: Decision) -> Table:
    base = decision.constraints.base
    rows: list[tuple[str, ...]] = []
    heads = base.num_kv_heads if base.num_kv_heads is not None else "Hkv"
    size = base.head_dim if base.head_dim is not None else "Dh"
    for method in ("prompt", "prefix", "kv"):
        standing = decision.standing(method)
        count = standing.effects.load.num_vectors
        shape = {
            "prompt": f"{count} x {base.hidden_size}",
            "prefix": f"{base.num_layers} x {count} x {base.hidden_size}",
            "kv": f"{base.num_layers} x 2 x {heads} x {count} x {size}",
        }[method]
        enters = {
            "prompt": "before layer 1, in front of the token embeddings",
            "prefix": "before every layer, in front of the hidden states",
            "kv": "inside every layer's attention, in front of its keys and values",
        }[method]
        rows.append(
            (
                noun(method),
                shape,
                f"{number(standing, 'trained_parameters'):,.0f}",
                quantity(standing, "bytes_per_task"),
                enters,
            )
        )
    return Table(("form", "trained", "numbers", "per task", "enters"), tuple(rows))


def _positions(count: int, deep: int) -> str:
    return f"{count} positions" if count == deep else f"{count} (or {deep}) positions"
