"""Several objectives at a time: constraints, multipliers, gates."""
