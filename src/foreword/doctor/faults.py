"""The catalogue of faults: what goes wrong with prompts and prefixes, by a name that findings carry.

docs/faults.md tells each one's symptom, the measurement that separates it from its neighbours, and the check that
makes it. The numbers order them as that page does.
"""

from __future__ import annotations

FAULTS: dict[str, str] = {
    "mask-blind": "the attention mask does not reach over the prefix",
    "positions-unshifted": "the text's positions are not shifted by the prefix",
    "padding-between": "padding stands between vectors and text, or positions do not see it",
    "right-padded-generation": "generation from rows padded at the right",
    "labels-misaligned": "labels over the vectors' positions are not ignored, or are shifted",
    "logits-uncut": "the logits of the vectors' positions are not cut off",
    "outputs-kept": "outputs at prefix positions are kept: every layer's sequence grows",
    "layers-tied": "the same vectors in every layer",
    "embeddings-only": "a declared prefix enters at the embeddings alone",
    "base-trainable": "the base trains, or gradients leak into it",
    "rows-frozen": "only part of the vectors trains",
    "learning-rate": "the learning rate is far too small or too large",
    "updates-swallowed": "the vectors' dtype is too coarse for their updates",
    "checkpointing-drops-prefix": "gradient checkpointing drops the prefix while training",
    "random-init": "a start drawn at random at the wrong scale: slow, and another result for each seed",
    "wrong-shape": "shapes do not follow the base's key/value heads or head size",
    "keys-misrotated": "stored keys are rotated twice, or not at all",
    "window-eviction": "the prefix leaves a sliding window",
    "layers-dropped": "some layers do not get their part of the prefix",
    "other-base": "trained for another base, or another revision of it",
    "numerics": "dtype or quantisation differs from training",
    "tokenizer-changed": "another tokenizer than in training",
    "template-drift": "prompts are rendered otherwise than in training",
    "injected-again": "vectors enter at every step or turn, or are lost at the second",
    "cache-shared": "a prefix cache is shared between tasks",
    "stale-version": "a replica or a cache serves an older version",
    "context-overflow": "the vectors are not counted in the context limit",
    "decoding-drift": "sampling, stop or bias settings differ",
    "nondeterminism": "dropout, training mode, or noise while serving",
    "teacher-forced-score": "a score by teacher forcing, or on rows seen in training",
    "overfit": "too long a prompt or too many steps for its rows",
    "side-effects": "other skills suffer",
    "tail-dropped": "distillation on the top tokens without a tail",
    "not-finite": "NaN, infinity, or vectors of enormous norm",
    "composed-untrained": "prefixes joined that were not trained to be",
    "unsafe-file": "a file that could run code, or is malformed",
    "metric-noise": "noise read as a regression",
    "traffic-shift": "the traffic changed, not the prompt",
}
"""By name, in the catalogue's order; what is wrong, in a sentence."""
