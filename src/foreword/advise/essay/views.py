"""Every method in one view: tuning few parameters as learning a soft prompt, and which part of the model it steers."""

from __future__ import annotations

from foreword.advise.decide import Decision
from foreword.advise.methods import METHODS
from foreword.report import Bullets, Section, Text


def views(decision: Decision) -> Section:
    """Return the section that describes each method as steering a part of the model."""
    intro = (
        f"The {len(METHODS)} methods look unlike each other and are close kin. Each puts something before or beside "
        "the frozen computation that is not in the user's text, and training chooses what; they differ in where it "
        "enters, and in how much of what follows can answer to it. Read in this order, from words to weights, a "
        "method can say whatever those before it can and costs more to keep. A prefix is a second attention over "
        "learned keys and values, an adapter adds the same kind of direction with a gate of its own, LoRA changes the "
        "maps that make queries, keys and values out of the text."
    )
    items = tuple(f"**{method.title}.** {method.steers}" for method in METHODS.values())
    sources = sorted({source for method in METHODS.values() for source in method.sources})
    return Section(
        "The methods as ways to learn a soft prompt",
        (Text(intro), Bullets(items), Text(f"Sources: {'; '.join(sources)}.")),
    )
