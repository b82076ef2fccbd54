"""A run from its start to its export: checks, session, steps, checkpoints, stages."""
