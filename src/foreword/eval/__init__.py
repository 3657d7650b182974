"""Judging: metrics, label scoring, baselines and paired comparisons."""
