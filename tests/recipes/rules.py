"""Rewards for tests of recipes; a module without imports, since rules run in processes that load it anew."""


def odd_length(response: str) -> float:
    """Met by about half of what a random model says."""
    return float(len(response) % 2)
