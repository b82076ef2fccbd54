"""Recovery inside a run: who is healthy, how often it may be tried, what it costs. No I/O."""
