"""Vectors, templates, compiling and the artefact file: everything that a base and its vectors are."""
