"""Which version answers a name: aliases, canaries, shadows, and what is loaded."""
