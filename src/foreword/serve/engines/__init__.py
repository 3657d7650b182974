"""Backends: the embedded engine, vLLM and other servers behind HTTP, and their replicas."""
