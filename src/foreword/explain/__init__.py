"""What a soft prompt or prefix does: the signals that are faithful, and how faithful nearest tokens are."""
