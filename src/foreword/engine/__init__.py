"""The embedded engine: continuous batching over any mix of prefixes."""
