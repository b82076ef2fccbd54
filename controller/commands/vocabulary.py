"""`rlhf-dist recipes`, `roles`, `columns`, `ops`: what there is to write a recipe with. Loads no torch, ray or vllm."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence

from controller.commands.registry import Command, Commands, users_mistakes

FORMATS = ("text", "json")
RECIPE_FORMATS = (*FORMATS, "markdown")


def register(commands: Commands) -> None:
    """`recipes`, `roles`, `columns` and `ops`."""
    recipes = commands.add(
        "recipes", _of(recipes_command), "list the recipes there are, by family, and what each needs",
        "recipes", "recipes mine.py --search preference", "recipes --family preference", "recipes --format json",
    )  # fmt: skip
    recipes.add_argument("files", metavar="FILE", nargs="*", help="files of your own to list, too")
    recipes.add_argument("--search", metavar="TEXT", help="only those with this in their name, text, roles or data")
    recipes.add_argument("--family", metavar="NAME", help="only those of this family, such as preference")
    recipes.add_argument("--needs", metavar="CODE", help="only those that need this capability, such as PREF")
    recipes.add_argument("--missing", action="store_true", help="the catalogue's numbers that no recipe covers")
    roles = commands.add(
        "roles", _of(roles_command), "list kinds of roles, their ops and columns", "roles --format json"
    )
    columns = commands.add(
        "columns",
        _of(columns_command),
        "list columns; of a recipe: who writes and reads them",
        "columns",
        "columns ppo",
    )
    columns.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe's name, or path/to/file.py[:name]")
    columns.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. algorithm.kl_coef=0")
    recipes.add_argument("--format", choices=RECIPE_FORMATS, default="text")
    for parser in (roles, columns):
        parser.add_argument("--format", choices=FORMATS, default="text")
    commands.add("ops", _of(ops_command), "list role ops, host ops and losses that recipes are made of", "ops")


def _of(command: Command) -> Command:
    def within(arguments: argparse.Namespace) -> int:
        with users_mistakes():
            return command(arguments)

    return within


def recipes_command(arguments: argparse.Namespace) -> int:
    """The shelf and the files given. Raises ValueError for a file that cannot be loaded or has no recipe, and for a
    family or capability that there is not."""
    from rlhf_dist.catalogue import CODES
    from rlhf_dist.recipe_files import list_families, load_recipes
    from rlhf_dist.typed import ConfigError, unknown
    from rlhf_dist.vocabulary_facts import missing_rows, recipe_facts, shelf_facts

    if arguments.missing:
        missing = missing_rows()
        print(json.dumps(missing) if arguments.format == "json" else " ".join(map(str, missing)))
        return 0
    holds = list_families()
    for value, known, what in ((arguments.family, holds, "family"), (arguments.needs, CODES, "capability")):
        if value is not None and value not in known:
            raise ConfigError(f"{unknown(value, known, what)}; there is {', '.join(sorted(known))}")
    if arguments.format == "markdown":
        from controller.commands.recipes_page import recipes_page

        print(recipes_page(), end="")
        return 0
    found = [*shelf_facts(), *(recipe_facts(one) for spec in arguments.files for one in load_recipes(spec))]
    wanted = (arguments.search or "").lower()
    found = [
        one
        for one in found
        if wanted in json.dumps(one, ensure_ascii=False).lower()
        and arguments.family in (None, one["family"])
        and (arguments.needs is None or arguments.needs in one.get("needs", ()))
    ]
    if arguments.format == "json":
        print(json.dumps(found, indent=2))
        return 0
    rows = [
        (
            f"  {one['name']}",
            f"{one.get('status') or ''}",
            " ".join(one["sources"].values()),
            " ".join(one["roles"]),
            (one.get("title") or one["doc"]) if "/" in one["name"] else one["doc"],
        )
        for one in found
    ]
    lines = _table(rows)
    if not found:
        print("no recipe is like that; `rlhf-dist recipes` lists all", file=sys.stderr)
    for family in sorted({one["family"] for one in found}, key=lambda name: (name is None, name)):
        print(f"{family}: {holds[family]}" if family in holds else "yours")
        print("\n".join(line for line, one in zip(lines, found, strict=True) if one["family"] == family))
    return 0


def roles_command(arguments: argparse.Namespace) -> int:
    """Every kind of role."""
    from rlhf_dist.vocabulary_facts import role_facts

    if arguments.format == "json":
        print(json.dumps(role_facts(), indent=2))
        return 0
    for kind in role_facts():
        print(f"{kind['kind']}  {kind['doc']}")
        for op in kind["ops"]:
            settings = ", ".join(name if value is None else f"{name}={value}" for name, value in op["settings"].items())
            print(f"  {op['name']}({settings})\n{_wrapped(op['doc'], '')}")
            reads = [*op["reads"], *(["what its loss reads"] if op["reads_of_loss"] else [])]
            reads += [f"{name} if there" for name in op["optional"]]
            print(_wrapped(f"reads   {', '.join(reads)}"))
            print(_wrapped(f"writes  {', '.join(op['writes']) or 'no column'}"))
        for op in kind["weight_ops"]:
            settings = "".join(
                f", {name}" if value is None else f", {name}={value}" for name, value in op["settings"].items()
            )
            print(f"  {op['name']}(...{settings})\n{_wrapped(op['doc'], '')}")
            print(_wrapped(f"weights {op['weights_read']} -> {op['weights_written']}"))
    return 0


def columns_command(arguments: argparse.Namespace) -> int:
    """Columns of the vocabulary, or of a recipe. Raises ValueError for a recipe that cannot be traced."""
    from rlhf_dist.compose import compose_dataflow
    from rlhf_dist.vocabulary_facts import column_facts

    of = arguments.recipe
    found = column_facts(None if of is None else compose_dataflow(of, arguments.overrides))
    if arguments.format == "json":
        print(json.dumps(found, indent=2))
        return 0
    width = max(len(one["name"]) for one in found)
    for one in found:
        known = f"{one['shape']:<7} {one['dtype']:<8} {one['meaning']}" if one["shape"] else "(user-defined)"
        print(f"{one['name']:<{width}}  {known}")
        if of is not None:
            print(f"{'':<{width}}  {', '.join(one['written_by'])} -> {', '.join(one['read_by']) or 'nobody'}")
    return 0


def ops_command(arguments: argparse.Namespace) -> int:
    """Role ops, host ops and losses."""
    from rlhf_dist.vocabulary import describe_ops

    print(describe_ops())
    return 0


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column), default=0) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _wrapped(text: str, hanging: str = " " * 8) -> str:
    return textwrap.indent(textwrap.fill(text, 108, subsequent_indent=hanging), "      ")
