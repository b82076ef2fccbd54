"""Rewards for tests of recipes; a module without imports, since rules run in processes that load it anew."""


def odd_length(response: str) -> float:
    """Met by about half of what a random model says."""
    return float(len(response) % 2)


def fails_on_even_length(response: str) -> float:
    """Raises for the other half."""
    if len(response) % 2 == 0:
        raise ValueError("an even length")
    return float("1" in response)
