"""Measurements of other people's models: numbers only, no judgement; whatever is examined is left as it was."""
