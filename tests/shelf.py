"""What recipes of the shelf need to be composed, whatever their sources and roles."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_dist.recipe_files import list_recipes, load_recipe
from rlhf_dist.roles import Reward, base_of


@cache
def of_each_shape() -> list[str]:
    """One recipe of each shape, the first by name: of those with as many sources of each kind and roles of each base.

    What only depends on these is tried on them; tests/recipes runs every recipe.
    """
    found: dict[Any, str] = {}
    for name in sorted(list_recipes()):
        loaded = load_recipe(name)
        roles = Counter(base_of(kind) for kind in loaded.roles.values())
        found.setdefault((frozenset(Counter(kinds_of_sources(name).values()).items()), frozenset(roles.items())), name)
    return sorted(found.values())


def kinds_of_sources(recipe: str) -> dict[str, str]:
    """Source -> kind of its rows."""
    return {name: getattr(kind, "rows_kind", "prompts") for name, kind in load_recipe(recipe).sources.items()}


def sources_of(recipe: str) -> list[str]:
    """Settings that give all sources but the first prompts a file: data.train cannot be rows of several kinds."""
    kinds = kinds_of_sources(recipe)
    first = next((name for name, kind in kinds.items() if kind == "prompts"), next(iter(kinds)))
    return [f"data.sources.{name}.path=/d" for name in kinds if name != first]


def rows_of(recipe: str, folder: Path) -> list[str]:
    """Settings that give every source the file of its kind in `folder`: prompts.jsonl, examples.jsonl, ..."""
    kinds = kinds_of_sources(recipe)
    return [f"data.sources.{name}.path={folder / kind}.jsonl" for name, kind in kinds.items()]


def rules_of(recipe: str) -> list[str]:
    """Settings that make every reward a rule."""
    roles = load_recipe(recipe).roles.items()
    return [f"{role}.function=rlhf_dist.rewards:exact_match" for role, kind in roles if base_of(kind) is Reward]


def questions_of(recipe: str) -> list[str]:
    """Settings that ask a judge of a few hundred tokens less than it takes, where the recipe's own question is long."""
    short = {
        "self_rewarding": ("algorithm.question='{prompt} {response}'", "actor.rollout.max_prompt_tokens=256"),
        "domain_features": ("algorithm.question='{prompt} {response_ids}'",),
    }
    return list(short.get(recipe, ()))
