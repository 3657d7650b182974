"""The report of a decision, section by section."""
