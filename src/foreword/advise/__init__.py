"""Choosing a method from constraints."""
