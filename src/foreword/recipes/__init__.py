"""Ways of using `fit`: tweaks, sweeps, transfer, sharing, moves to another base."""
