"""Rows that are made, not read: reasoning-gym data sets, and functions of a user's own."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_dist.config import SourceConfig
from rlhf_dist.data.fields import near
from rlhf_dist.data.files import Placed
from rlhf_dist.rewards.load import load_function
from rlhf_dist.rewards.reasoning_gym import answer_json


def generate(config: SourceConfig, seed: int) -> Iterator[Placed]:
    """`config.size` rows. Generators draw from generator_args.seed, else from `seed`.

    Raises ValueError for an unknown generator, and arguments it refuses.
    """
    assert config.generator is not None, "only called for generators"
    if ":" not in config.generator:
        yield from _reasoning_gym(config, seed)
        return
    try:
        function = load_function(config.generator)
    except ValueError:
        raise
    except Exception as error:  # the user's file is executed
        raise ValueError(f"generator {config.generator!r}: {type(error).__name__}: {error}") from error
    for index in range(config.size):
        place = f"{config.generator}, row {index}"
        try:
            row = function(index, **config.generator_args)
        except TypeError as error:
            raise ValueError(
                f"generator {config.generator!r} must be a function (index, **generator_args) -> dict; called with "
                f"generator_args {config.generator_args} it raised: {error}"
            ) from error
        except Exception as error:  # it is the user's
            raise ValueError(f"{place}: the generator raised {type(error).__name__}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place} must be a dict with named fields, got {str(row)[:80]!r}")
        yield Placed(place, row)


def _reasoning_gym(config: SourceConfig, seed: int) -> Iterator[Placed]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    assert config.generator is not None, "only called for generators"
    name, arguments = config.generator, {"seed": seed, **config.generator_args, "size": config.size}
    if name not in DATASETS:
        raise ValueError(
            f"no reasoning-gym data set {name!r}{near(name, list(DATASETS))} (a function of your own is file.py:name)"
        )
    try:
        entries = reasoning_gym.create_dataset(name, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"reasoning-gym's {name!r} refuses generator_args {config.generator_args}: {error}") from error
    for index in range(config.size):
        entry = entries[index]
        row = {"prompt": entry["question"], "response": entry["answer"], "answer": answer_json(name, entry)}
        yield Placed(f"{name}, row {index}", row)
