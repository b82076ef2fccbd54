"""Episodes of several turns: tools, games."""
