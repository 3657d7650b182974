"""Faults planted in running servers: a real gateway, a real engine, over HTTP."""
