"""docs/recipes.md, made of what recipes declare: `rlhf-dist recipes --format markdown > docs/recipes.md`."""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path
from typing import Any

PICTURES = 2
"""Of recipes of a family."""
HEAD = """# Recipes

Made by `rlhf-dist recipes --format markdown > docs/recipes.md`; a test says when it is not current.

A recipe is launched by its name (`rlhf-dist run dpo`), a row of settings on it by both (`rlhf-dist run dpo/ipo`), a
file of stages as a recipe (`rlhf-dist run tulu3`). *exact*: the formula is the paper's. *outline*: its shape is.
*study*: a comparison or measurement. What is assumed stands below a table. `rlhf-dist graph NAME` draws the graph,
`rlhf-dist config NAME` lists all settings. The recipes of a family that most papers stand in have a picture here: solid
arrows are columns, dotted ones weights. Numbers are those of the catalogue of {rows} systems and algorithms that
recipes are written from; {covered} of them are covered. Not yet: {missing}.
"""


def recipes_page() -> str:
    """The page: a section for each family, in it a table for each file."""
    from rlhf_dist.catalogue import ROWS
    from rlhf_dist.recipe_files import list_families, recipes_folder
    from rlhf_dist.vocabulary_facts import missing_rows, shelf_facts

    missing, families = missing_rows(), list_families()
    page = [HEAD.format(rows=len(ROWS), covered=len(ROWS) - len(missing), missing=_ranges(missing) or "none")]
    found = sorted(shelf_facts(), key=lambda one: (one["family"], one["file"]))
    for family, of_family in groupby(found, key=lambda one: one["family"]):
        page.append(f"\n## {family}\n\n{families[family]}\n")
        files = {file: list(of_file) for file, of_file in groupby(of_family, key=lambda one: one["file"])}
        main = sorted((file for file in files if file.endswith(".py")), key=lambda file: -len(files[file]))[:PICTURES]
        for file, entries in files.items():
            where = Path(file).relative_to(recipes_folder())
            page.append(f"\n### {where.stem}\n\n`recipes/{where}`\n\n{_quoted(Path(file))}\n{_table(entries)}")
            page.append(_picture(where.stem) if file in main else "")
    return "".join(page)


def _picture(name: str) -> str:
    """A recipe's graph under its own settings."""
    from rlhf_dist.dataflow.draw import to_mermaid
    from rlhf_dist.dataflow.trace import trace
    from rlhf_dist.recipe_files import load_recipe

    return f"\n```mermaid\n{to_mermaid(trace(load_recipe(name)))}\n```\n"


def _quoted(file: Path) -> str:
    """The docstring of a recipe, or the comment at the top of a file of stages, as it is written."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        lines = text.splitlines()
        end = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
        said = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])
    return f"```text\n{said}\n```\n"


def _table(entries: list[dict[str, Any]]) -> str:
    rows = ["\n| launch | paper | rows | status | needs | settings |\n|---|---|---|---|---|---|\n"]
    for one in entries:
        paper = f"{one['title'] or ''} {one['year'] or ''}".strip()
        paper += f", [{one['arxiv']}](https://arxiv.org/abs/{one['arxiv']})" if one["arxiv"] else ""
        settings = " ".join(f"{key}={_word(value)}" for key, value in one.get("settings", {}).items())
        cells = (f"`{one['name']}`", paper, ", ".join(map(str, one["catalogue"])), one["status"] or "")
        rows.append(f"| {' | '.join(cells)} | {' '.join(one['needs'])} | {f'`{settings}`' if settings else ''} |\n")
    notes = [f"- `{one['name']}` assumes: {one['assumed']}.\n" for one in entries if one["assumed"]]
    return "".join([*rows, "\n" if notes else "", *notes])


def _word(value: Any) -> str:
    return (
        {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
