"""What a method costs on a base: every number with its formula, and the formula with this base's numbers."""
