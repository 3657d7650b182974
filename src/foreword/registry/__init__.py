"""Versions of every task's artefact, and the aliases that say which of them is served."""
