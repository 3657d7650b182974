"""An explanation as a report: the verdict in words first, then each signal with its picture and its limits."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence

from foreword.explain.attention import Attention
from foreword.explain.effects import Losses, OneByOne, OutputEffect
from foreword.explain.estimate import Estimate
from foreword.explain.explanation import Explanation
from foreword.explain.norms import NormComparison, Norms
from foreword.explain.reach import Reach
from foreword.explain.tokens import Faithfulness, NearToken, Reading
from foreword.report import Block, Bullets, Cell, HeatMap, Lines, Point, Report, Scatter, Section, Table, Text

MAX_POINTS = 16
"""Points of a curve; longer ones are cut into as many stretches."""


def report(explanation: Explanation) -> Report:
    """Return the report; its `data` are `explanation.to_json()`."""
    return Report(
        title=f"What the vectors of {explanation.name} do",
        sections=tuple(_sections(explanation)),
        data=explanation.to_json(),
    )


def _sections(found: Explanation) -> Iterator[Section]:
    yield Section("Verdict", (Text(f"**{_capital(found.verdict.sentence)}.**"), Bullets(tuple(_summary(found)))))
    if found.losses is not None:
        yield Section("Loss with and without the vectors", _losses(found.losses, found.faithfulness))
    if found.attention is not None:
        yield Section("Prefix mass", _attention(found.attention))
    if found.one_by_one is not None:
        yield Section("Vector by vector", _one_by_one(found.one_by_one, found.losses, found.attention))
    yield Section("Along the answer", _outputs(found.outputs))
    yield Section("Reach into the text", _reach(found.reach, found.method))
    yield Section("Norms", _norms(found.norms))
    if found.reading is not None:
        yield Section("Nearest tokens", _tokens(found.reading, found.faithfulness, found.method))
    yield Section("How it was measured", _how(found))


def _summary(found: Explanation) -> Iterator[str]:
    if found.losses is not None:
        yield (
            f"Loss per answer token: {_number(found.losses.trained)} nats with the vectors, "
            f"{_number(found.losses.without)} without, {_number(found.losses.control)} behind random vectors."
        )
    yield f"KL(with ‖ without) per output token: {_number(found.outputs.mean)} nats."
    if found.attention is not None:
        layers = found.attention.layers
        most = max(range(len(layers)), key=lambda layer: layers[layer].mean)
        yield (
            f"Prefix mass: {100 * found.attention.mean:.1f} % of attention falls on the vectors, "
            f"most in layer {most} ({100 * layers[most].mean:.1f} %)."
        )
    if found.one_by_one is not None:
        singles = found.one_by_one
        yield (
            f"Of {len(singles.effects)} vectors {singles.count('helps')} help, {singles.count('harms')} harm, of "
            f"{singles.count('unclear')} it cannot be told on these rows."
        )
    if found.reading is not None:
        yield _reading_sentence(found.faithfulness)
    yield _reach_sentence(found.reach)
    yield from found.missing


def _losses(losses: Losses, faithfulness: Faithfulness | None) -> tuple[Block, ...]:
    named: list[tuple[str, Estimate]] = [
        ("trained vectors", losses.trained),
        ("no vectors", losses.without),
        ("random vectors of the same norms", losses.control),
    ]
    if faithfulness is not None:
        named += [("nearest tokens in their place", faithfulness.discrete)]
        named += [("random tokens in their place", faithfulness.random)]
    return (
        Table(
            ("in front of the text", "nats per answer token", "95 % from", "to"),
            tuple((name, each.value, each.low, each.high) for name, each in named),
        ),
        Text(
            f"Without the vectors the loss is higher by {_number(losses.gain)}; behind random vectors of the same "
            f"norms by {_number(losses.gain_over_control)}. The differences are paired by row."
        ),
    )


def _attention(attention: Attention) -> tuple[Block, ...]:
    layers = attention.layers
    width = max(len(layer.heads) for layer in layers)
    names = tuple(str(layer) for layer in range(len(layers)))
    has_sink = any(layer.sink > 1e-3 for layer in layers)
    columns = ("layer", "mean", "5 % below", "95 % below", "spread over tokens", "at the answer", "literal tokens")
    rows: list[tuple[Cell, ...]] = []
    for name, layer in zip(names, layers, strict=True):
        spread = sum(layer.spreads) / len(layer.spreads)
        row = (name, layer.mean, layer.low, layer.high, spread, layer.at_answers, layer.literal)
        rows.append((*row, layer.sink) if has_sink else row)
    chosen = sorted({0, len(layers) // 2, len(layers) - 1})
    places = range(len(layers[0].by_place))
    curves = {f"layer {layer}": _thinned(list(zip(places, layers[layer].by_place, strict=True))) for layer in chosen}
    means = [sum(layer.by_place[place] for layer in layers) / len(layers) for place in places]
    return (
        Text(
            "The share of a head's attention that falls on the vectors. At 0 they have no effect in that head; at 1 "
            "the text is ignored there. It says where the vectors are read, not whether that is of use. Measured over "
            f"{attention.num_tokens:,} tokens of {attention.num_rows} rows."
        ),
        HeatMap(
            "Mean prefix mass",
            tuple(str(head) for head in range(width)),
            names,
            tuple((*layer.heads, *[None] * (width - len(layer.heads))) for layer in layers),
            x_title="head",
            y_title="layer",
            low=0.0,
            high=1.0,
        ),
        Table((*columns, "sink") if has_sink else columns, tuple(rows), caption="Over all heads and text tokens"),
        Lines(
            "Prefix mass by place in the text",
            "text token, 0 is the first behind the block",
            "share on the vectors",
            {"all layers": _thinned(list(zip(places, means, strict=True))), **curves},
        ),
    )


def _one_by_one(singles: OneByOne, losses: Losses | None, attention: Attention | None) -> tuple[Block, ...]:
    effects = singles.effects
    masses = attention.by_vector if attention is not None else ()
    rows: list[tuple[Cell, ...]] = []
    for effect in effects:
        change = effect.loss_change
        mass = masses[effect.index] if effect.index < len(masses) else None
        place = "behind the text" if effect.position is None else str(effect.position)
        rows.append((str(effect.index), place, change.value, change.low, change.high, mass, effect.verdict))
    blocks: list[Block] = [
        Text(
            "Each vector is taken out by closing its position to all that stands behind it; no other moves. Above zero "
            "the loss rises without it: it helps. The verdict allows for all vectors being tried at once (5 % over all "
            "of them together), the interval is that of the one vector."
        ),
        Scatter(
            "Loss without each vector, less loss with all",
            "vector",
            "nats per answer token",
            tuple(
                Point(str(e.index), float(e.index), e.loss_change.value, low=e.loss_change.low, high=e.loss_change.high)
                for e in effects
            ),
        ),
        Table(
            ("vector", "position", "loss change", "95 % from", "to", "attention on it", "verdict"),
            tuple(rows),
        ),
    ]
    if losses is not None and len(effects) > 1:
        total = sum(effect.loss_change.value for effect in effects)
        blocks.append(
            Text(
                f"One by one they cost {total:.3g} nats in sum, all at once {losses.gain.value:.3g}: "
                + _redundancy(total, losses.gain.value)
            )
        )
    if singles.pruned:
        names = ", ".join(map(str, singles.pruned))
        blocks.append(
            Text(
                f"Candidates for pruning: {names}. With all of them out the loss changes by "
                f"{_number(singles.pruned_loss_change)} on these same rows; judge a pruned prompt on others."
            )
        )
    return tuple(blocks)


def _redundancy(total: float, gain: float) -> str:
    if gain > 0 and total < 0.5 * gain:
        return "they stand in for one another, so a small change does not mean that a vector carries nothing."
    if gain > 0 and total > 1.5 * gain:
        return "they work together, and lack of any one breaks what the others do."
    return "their effects about add up."


def _outputs(outputs: OutputEffect) -> tuple[Block, ...]:
    curve = tuple((float(place), each.value) for place, (each, _) in enumerate(outputs.by_position))
    rows = tuple(
        (str(place), each.value, each.low, each.high, rows) for place, (each, rows) in enumerate(outputs.by_position)
    )
    table = Table(("output token", "KL in nats", "95 % from", "to", "rows"), rows)
    text = Text(
        "KL(with ‖ without) of the next token where the answer stands, the answer so far being given. A curve that "
        f"falls to zero is a prompt that fades. {_fading(outputs)}"
    )
    if len(curve) < 3:
        return (text, table)
    return (text, Lines("KL by output token", "output token", "nats", {"KL(with ‖ without)": curve}), table)


def _fading(outputs: OutputEffect) -> str:
    places = [each.value for each, rows in outputs.by_position if rows > 1] or [outputs.by_position[0][0].value]
    if len(places) < 2:
        return "Answers are too short here to see it."
    first, last = places[0], places[-1]
    change = f"from {first:.3g} nats at the first token to {last:.3g} at number {len(places) - 1}"
    return f"Here it goes {change}."


def _reach_sentence(reach: Reach) -> str:
    if reach.last_index is None:
        if all(window is None for window in reach.windows):
            return "Reach: without a limit, every layer attends to all that stands before."
        full = sum(window is None for window in reach.windows)
        return f"Reach: without a limit, {full} of {len(reach.windows)} layers attend to all that stands before."
    if reach.last_index < 0:
        return "Reach: none, the windows end before the text begins."
    return f"Reach: up to text token {reach.last_index} and no further, since every layer has a window."


def _reach(reach: Reach, method: str) -> tuple[Block, ...]:
    blocks: list[Block] = [Text(_reach_sentence(reach))]
    if reach.last_index is not None:
        windows = ", ".join(str(window) for window in reach.windows)
        blocks.append(
            Text(
                f"Windows by layer: {windows}. Each layer hands on what it has seen W - 1 tokens further, so the last "
                "token reached is the vector's own place plus the sum of these. What a client writes behind it is "
                f"answered as by the bare base, whatever the {method} says."
            )
        )
    if reach.unmeasured:
        blocks.append(Text(f"Not measured to its end: {reach.unmeasured}."))
    kind = "texts repeated to that length" if reach.made_longer else "the rows"
    points = _thinned(reach.by_index)
    if reach.last_index is not None and not reach.unmeasured and reach.last_index >= 0:
        inside = [kl for index, kl in reach.by_index if index <= reach.last_index]
        beyond = [kl for index, kl in reach.by_index if index > reach.last_index]
        blocks.append(
            Text(
                f"Measured on {kind}: KL {max(inside[-8:], default=0.0):.2g} nats among the last 8 tokens within "
                f"reach, {max(beyond, default=0.0):.2g} on the {len(beyond)} beyond it."
            )
        )
    if len(points) > 2:
        title = "KL(with ‖ without) by place in the text"
        blocks.append(Lines(title, f"text token, {reach.num_rows} rows", "nats", {"mean": points}))
    return tuple(blocks)


def _norms(norms: Norms) -> tuple[Block, ...]:
    own = [each for each in norms.comparisons if each.layer is None]
    blocks: list[Block] = []
    for each in own:
        blocks.append(
            Text(
                f"The vectors' norms are {each.least:.3g} to {each.largest:.3g}, median {each.median:.3g}; a token's "
                f"embedding has {each.reference:.3g} (median). {_above(each)}"
            )
        )
    rows = tuple(
        (str(e.layer), e.kind, e.median, e.least, e.largest, e.reference, e.ratio, e.percentile)
        for e in sorted((e for e in norms.comparisons if e.layer is not None), key=lambda e: (e.layer or 0, e.kind))
    )
    columns = ("layer", "what", "median", "least", "largest", "real text", "ratio", "percentile in text")
    caption = "Norms of the vectors in each layer, against those of real text in the same place"
    if rows:
        blocks.append(Table(columns, rows, caption=caption))
    blocks.append(
        Text(
            "A norm alone tells little: most families normalise each layer's input, after which only the direction "
            "is left. Keys of unusual length matter, since they make attention sharp; values, since they are added."
        )
    )
    return tuple(blocks)


def _above(each: NormComparison) -> str:
    if each.percentile >= 99.5:
        return "They are longer than nearly every token's."
    if each.percentile <= 0.5:
        return "They are shorter than nearly every token's."
    return f"Their median is longer than {each.percentile:.0f} % of all tokens'."


def _reading_sentence(faithfulness: Faithfulness | None) -> str:
    if faithfulness is None:
        return "Nearest tokens: not tested against the loss, so they explain nothing yet."
    if faithfulness.verdict == "too few rows":
        return "Nearest tokens: on so few rows it cannot be told whether they explain anything."
    if faithfulness.score is None:
        return "Nearest tokens: there is no gain that they could explain."
    score, control = faithfulness.score, faithfulness.random_score
    kept = f"they keep {_percent(score)} of the gain, random tokens {_percent(control)}"
    if faithfulness.verdict == "faithful":
        return f"Nearest tokens: written out as text {kept}; here they account for what the vectors do."
    return f"Nearest tokens are **not an explanation** of these vectors: written out as text {kept}."


def _tokens(reading: Reading, faithfulness: Faithfulness | None, method: str) -> tuple[Block, ...]:
    num = max(len(near) for near in reading.near)
    columns = ("vector", *(name for place in range(num) for name in (f"token {place + 1}", f"cosine {place + 1}")))
    rows = tuple(
        (str(index), *(cell for token in near for cell in (_token(token), token.cosine)))
        for index, near in enumerate(reading.near)
    )
    where = "the token embeddings" if method == "prompt" else "what tokens are at the entrance of layer 0"
    blocks: list[Block] = [
        Text(_reading_sentence(faithfulness)),
        Text(
            f"Compared by cosine with {where}. For scale: a token of the vocabulary has its nearest neighbour at "
            f"{reading.neighbour_cosine:.2f} (median)."
        ),
        Table(columns, rows),
    ]
    if method == "prefix":
        blocks.insert(
            1, Text("Only layer 0 lies in a space of tokens; the rows of all other layers have no such reading.")
        )
    return tuple(blocks)


def _how(found: Explanation) -> tuple[Block, ...]:
    sha = f", artefact {found.sha256[:12]}" if found.sha256 else ""
    return (
        Bullets(
            (
                f"{found.num_vectors} vectors of method {found.method} in a block of {found.num_positions} positions, "
                f"on {found.base} in {found.dtype}{sha}.",
                f"Rows: {found.source}; {found.num_answer_tokens:,} answer tokens.",
                "Intervals are 95 % by the bootstrap over rows, with the same resamples for all that is compared; with "
                "fewer than 5 rows none is given.",
                "Without the vectors means: their positions closed, everything else where it stands.",
                "The random vectors and tokens are three draws each, their losses averaged.",
            )
        ),
    )


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[tuple[float, float], ...]:
    """Return at most MAX_POINTS points, each the mean of a stretch of neighbours."""
    count = min(MAX_POINTS, len(points))
    edges = [len(points) * place // count for place in range(count + 1)] if count else []
    return tuple(
        (
            sum(x for x, _ in points[low:high]) / (high - low),
            sum(y for _, y in points[low:high]) / (high - low),
        )
        for low, high in itertools.pairwise(edges)
    )


def _token(token: NearToken) -> str:
    """Return a token as it can stand in a report: quoted, its marks and control characters harmless."""
    if token.text is None:
        return f"id {token.token_id}"
    return json.dumps(token.text, ensure_ascii=False).replace("`", "'").replace("*", "∗")


def _number(estimate: Estimate | None) -> str:
    return "unknown" if estimate is None else str(estimate)


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return "unknown"
    low, high = estimate.low, estimate.high
    interval = "" if low is None or high is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{100 * estimate.value:.0f} %{interval}"


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
