"""Several rewards as one: a weighted sum, each of them a named score.

both = weighted(right=(1.0, math_verify), form=(0.2, has_format("<think>.*</think>.*")))

reward.function=mine.py:both      the reward, and the metrics score/right and score/form
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_dist.rewards.signature import Signature, name_of, signature_of

Term = tuple[float, Callable[..., Any]]


def weighted(**terms: Term) -> Any:
    """A reward function of one row: sum of weight * reward over name=(weight, function), with each reward by its name.

    It takes what its functions take. A function's further scores are named NAME/SCORE. Functions of lists are not
    taken, nor classes: make an instance. Raises ValueError for these, and without terms.
    """
    if not terms:
        raise ValueError("weighted needs at least one term: weighted(right=(1.0, exact_match))")
    for name, term in terms.items():
        if name == "reward":
            raise ValueError("a term cannot be called reward: that is their sum")
        if not (isinstance(term, tuple) and len(term) == 2 and isinstance(term[0], int | float)):
            raise ValueError(f"a term is (weight, function), got {name}={term!r}")
    signatures = {name: signature_of(function) for name, (_, function) in terms.items()}
    for name, signature in signatures.items():
        if signature.batched or inspect.isclass(terms[name][1]) or signature.columns or signature.rest:
            raise ValueError(
                f"{name}: {signature.name} is a class, is adapted, or takes lists or all columns; weighted takes "
                f"functions of one row"
            )
    kind = _AsyncSum if any(_is_async(function) for _, function in terms.values()) else _Sum
    return kind(terms, signatures)


class _Terms:
    def __init__(self, terms: Mapping[str, Term], signatures: Mapping[str, Signature]) -> None:
        self._terms = dict(terms)
        self._parameters = {name: signature.parameters for name, signature in signatures.items()}
        needed: dict[str, bool] = {}
        for parameters in self._parameters.values():
            for parameter, must in parameters.items():
                needed[parameter] = needed.get(parameter, False) or must
        ordered = sorted(needed, key=lambda parameter: not needed[parameter])
        keyword = inspect.Parameter.KEYWORD_ONLY
        self.__signature__ = inspect.Signature(
            [
                inspect.Parameter(parameter, keyword, default=inspect.Parameter.empty if needed[parameter] else None)
                for parameter in ordered
            ]
        )
        self.__qualname__ = f"weighted({', '.join(name_of(function) for _, function in terms.values())})"

    def _given(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return {parameter: values[parameter] for parameter in self._parameters[name] if parameter in values}

    def _summed(self, returned: Mapping[str, Any]) -> dict[str, float]:
        scores: dict[str, float] = {"reward": 0.0}
        for name, value in returned.items():
            parts = dict(value) if isinstance(value, Mapping) else {"reward": value}
            if "reward" not in parts:
                raise ValueError(f"{name} returned a dict without 'reward': {value!r}")
            scores[name] = float(parts.pop("reward"))
            scores["reward"] += self._terms[name][0] * scores[name]
            scores |= {f"{name}/{score}": float(number) for score, number in parts.items()}
        return scores


class _Sum(_Terms):
    def __call__(self, **values: Any) -> dict[str, float]:
        return self._summed(
            {name: function(**self._given(name, values)) for name, (_, function) in self._terms.items()}
        )


class _AsyncSum(_Terms):
    async def __call__(self, **values: Any) -> dict[str, float]:
        async def one(name: str, function: Callable[..., Any]) -> Any:
            returned = function(**self._given(name, values))
            return await returned if inspect.isawaitable(returned) else returned

        found = await asyncio.gather(*(one(name, function) for name, (_, function) in self._terms.items()))
        return self._summed(dict(zip(self._terms, found, strict=True)))


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
