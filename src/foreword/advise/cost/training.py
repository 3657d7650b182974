"""What training costs: forward 2·N' and gradients of activations 2·N' per token, of weights 2·N' more where they train.

Attention costs three times its forward pass, since a backward pass of it takes gradients of both factors whether or not
weights train. Nothing is counted for recomputed activations, padding, and reading data.
"""

from __future__ import annotations

from dataclasses import dataclass

from foreword.advise.bases.shapes import BaseShape
from foreword.advise.cost.attention import cross_flops, is_cut, own_flops
from foreword.advise.cost.hardware import Hardware
from foreword.advise.cost.load import Load
from foreword.advise.cost.parameters import Trained
from foreword.advise.cost.quantity import Quantity, quantity, show_number


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """FLOP of a whole training, with formula and numbers."""

    flops: float
    formula: str
    numbers: str = ""


def training_quantities(
    method: str, base: BaseShape, load: Load, hardware: Hardware, tokens: int, learned: Trained
) -> dict[str, Quantity]:
    """Return FLOP and hours of training, and the machine time of a tweak: training, evaluation, transfer."""
    dense, attention = _dense(method, base, load, tokens, learned), _attention(method, base, load, tokens)
    total, rate = dense.flops + attention.flops, hardware.flops_per_s
    shown = show_number(rate)
    hours = total / rate / 3600
    return {
        "training_dense_flops": quantity(dense.flops, "FLOP", dense.formula, dense.numbers),
        "training_attention_flops": quantity(attention.flops, "FLOP", attention.formula, attention.numbers),
        "training_flops": quantity(
            total,
            "FLOP",
            "dense + attention" if total else dense.formula,
            f"{show_number(dense.flops)} + {show_number(attention.flops)}" if total else "",
        ),
        "training_dense_hours": quantity(
            dense.flops / rate / 3600,
            "hours",
            "dense FLOP / (FLOP/s reached · 3600)" if total else dense.formula,
            f"{show_number(dense.flops)} / ({shown}·3600)" if total else "",
        ),
        "training_hours": quantity(
            hours,
            "hours",
            "FLOP / (FLOP/s reached · 3600)" if total else dense.formula,
            f"{show_number(total)} / ({shown}·3600)" if total else "",
        ),
        "tweak_hours": _tweak(method, base, load, hardware, learned, hours),
    }


def _dense(method: str, base: BaseShape, load: Load, tokens: int, learned: Trained) -> _Work:
    active, text, rows = base.num_active_parameters, load.input_tokens, load.rows
    steps, n = rows * load.epochs, show_number(base.num_active_parameters)
    if method in ("hard_text", "few_shot"):
        return _Work(flops=0, formula="0: text is written, not trained")
    if method in ("prompt", "compiled_prompt"):
        return _Work(
            flops=4 * active * (text + tokens) * steps,
            formula="4·N'·(T + P)·rows·epochs",
            numbers=f"4·{n}·({text} + {tokens})·{rows}·{load.epochs}",
        )
    if method == "prefix":
        inner = base.hidden_size * sum(layer.elements_per_token for layer in base.layers)
        return _Work(
            flops=4 * (active * text + inner * tokens) * steps,
            formula="4·(N'·T + P·D·k)·rows·epochs, k = keys and values of a token in all layers",
            numbers=f"4·({n}·{text} + {tokens}·{show_number(inner)})·{rows}·{load.epochs}",
        )
    if method == "kv":
        return _Work(
            flops=4 * active * text * steps,
            formula="4·N'·T·rows·epochs",
            numbers=f"4·{n}·{text}·{rows}·{load.epochs}",
        )
    if method == "cartridge":
        context = load.cartridge_context_tokens
        return _Work(
            flops=4 * active * text * steps + 2 * active * (context + text) * rows,
            formula="4·N'·T·rows·epochs + 2·N'·(C + T)·rows, the teacher reading C tokens of context once per row",
            numbers=f"4·{n}·{text}·{rows}·{load.epochs} + 2·{n}·({context} + {text})·{rows}",
        )
    if method == "full":
        return _Work(
            flops=6 * active * text * steps,
            formula="6·N'·T·rows·epochs",
            numbers=f"6·{n}·{text}·{rows}·{load.epochs}",
        )
    return _Work(
        flops=(4 * active + 6 * learned.count) * text * steps,
        formula="(4·N' + 6·A)·T·rows·epochs, A the trained parameters",
        numbers=f"(4·{n} + 6·{show_number(learned.count)})·{text}·{rows}·{load.epochs}",
    )


def _attention(method: str, base: BaseShape, load: Load, tokens: int) -> _Work:
    if method in ("hard_text", "few_shot"):
        return _Work(flops=0, formula="0: text is written, not trained")
    text, steps, teacher, formula = load.input_tokens, load.rows * load.epochs, 0, ""
    if method in ("prompt", "compiled_prompt"):
        row, formula = own_flops(base, text + tokens), "3·4·L·H·Dh·(T + P)·(T + P + 1)/2·rows·epochs"
    else:
        row = own_flops(base, text) + cross_flops(base, tokens, text)
        formula = f"3·4·L·H·Dh·(T·(T + 1)/2{' + P·T' if tokens else ''})·rows·epochs"
    if method == "cartridge":
        teacher = own_flops(base, load.cartridge_context_tokens + text) * load.rows
        formula += " + the teacher's forward pass over C + T"
    if is_cut(base, text + tokens) or (teacher and is_cut(base, text + load.cartridge_context_tokens)):
        formula += ", less what windows hide"
    numbers = f"3·{show_number(row)}·{load.rows}·{load.epochs}"
    numbers += f" + {show_number(teacher)}" if teacher else ""
    return _Work(flops=3 * row * steps + teacher, formula=formula, numbers=numbers)


def _tweak(
    method: str, base: BaseShape, load: Load, hardware: Hardware, learned: Trained, training_hours: float
) -> Quantity:
    """Return the machine time from changed data to a file on one serving machine."""
    prefill = load.eval_rows * 2 * base.num_active_parameters * load.input_tokens / hardware.flops_per_s
    batches = -(-load.eval_rows // load.eval_batch)
    decode = batches * load.output_tokens * base.weight_bytes / hardware.bytes_per_s
    transfer = learned.count * load.bytes_per_element / load.network_bytes_per_s
    shown = " + ".join(show_number(round(part, 6)) for part in (training_hours * 3600, prefill + decode, transfer))
    return quantity(
        training_hours + (prefill + decode + transfer) / 3600,
        "hours",
        f"(training + evaluation of {load.eval_rows} rows by {load.eval_batch} + file / network, in s) / 3600; "
        "review and promotion come on top",
        f"({shown}) / 3600",
    )
