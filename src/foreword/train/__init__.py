"""Training: fit(model, runs)."""
