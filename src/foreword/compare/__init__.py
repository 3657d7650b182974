"""The bake-off: every method trained under one budget, judged on the same rows, measured side by side."""
