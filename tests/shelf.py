"""What every recipe of the shelf needs to be composed, whatever its sources."""

from __future__ import annotations

from rlhf_dist.recipe_files import load_recipe


def sources_of(recipe: str) -> list[str]:
    """Settings that give all sources but the first prompts a file: data.train cannot be rows of several kinds."""
    kinds = {name: getattr(kind, "rows_kind", "prompts") for name, kind in load_recipe(recipe).sources.items()}
    first = next((name for name, kind in kinds.items() if kind == "prompts"), next(iter(kinds)))
    return [f"data.sources.{name}.path=/d" for name in kinds if name != first]
