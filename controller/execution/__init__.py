"""The graph as it runs: which node when, which rows go where, what comes back."""
