"""What recipes, kinds of roles and columns are, as plain values: for `--format json`, editors and scripts.

Read from the declarations themselves; nothing is started, and torch is not imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_dist.catalogue import ROWS, Paper
from rlhf_dist.dataflow.graph import Dataflow
from rlhf_dist.dataflow.op_settings import defaults
from rlhf_dist.dataflow.recipe import Recipe
from rlhf_dist.recipe_files import family_of, list_recipes, list_stage_files, load_papers, load_recipes
from rlhf_dist.roles import KINDS, Columns, ops_of
from rlhf_dist.schema import COLUMNS
from rlhf_dist.weights import weight_ops_of


class _AnyLoss:
    """Stands for the loss of an update: it reads nothing of its own."""

    reads: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """`family`: of one of ours, else None. `doc`: first line of the file's docstring, or of the function's where the
    file has none. `sources` and `roles`: parameter -> kind of rows (prompts, examples, preferences) and kind of role.
    """
    module = inspect.getmodule(recipe.function)
    doc = (module and module.__doc__) or recipe.function.__doc__ or ""
    return {
        "name": recipe.name,
        "family": family_of(recipe.file),
        "file": str(recipe.file),
        "doc": doc.strip().partition("\n")[0],
        "sources": {name: getattr(kind, "rows_kind", "prompts") for name, kind in recipe.sources.items()},
        "roles": {name: kind.__name__ for name, kind in recipe.roles.items()},
        "states": {name: kind.__name__ for name, kind in recipe.states.items()},
    }


def shelf_facts() -> list[dict[str, Any]]:
    """All that can be launched by name: our recipes, their variants, our files of stages. As `recipe_facts`, and of the
    paper: `title`, `year`, `arxiv`, `catalogue` (numbers of its rows), `status`, `needs`, `assumed`, `settings`."""
    papers = load_papers()
    found = []
    for spec in list_recipes():
        for recipe in load_recipes(spec):
            own = spec if recipe.name == spec else recipe.name
            facts = recipe_facts(recipe)
            found.append({**facts, **_paper_facts(papers[own][0] if own in papers else None)})
            variants = {name: paper for name, (paper, _) in papers.items() if name.startswith(f"{own}/")}
            found += [{**facts, "name": name, **_paper_facts(paper)} for name, paper in variants.items()]
    for name, file in list_stage_files().items():
        found.append(
            {
                "name": name,
                "family": file.parent.name,
                "file": str(file),
                "doc": _first_comment(file),
                "sources": {},
                "roles": {},
                "states": {},
                **_paper_facts(papers[name][0] if name in papers else None),
            }
        )
    return found


def missing_rows() -> list[int]:
    """Numbers of the catalogue that no recipe covers yet."""
    covered = {row for paper, _ in load_papers().values() for row in paper.rows}
    return [row for row in ROWS if row not in covered]


def _paper_facts(paper: Paper | None) -> dict[str, Any]:
    if paper is None:
        return {"title": None, "year": None, "arxiv": None, "catalogue": [], "status": None, "needs": [], "assumed": ""}
    return {
        "title": paper.title,
        "year": paper.year,
        "arxiv": paper.arxiv,
        "catalogue": list(paper.rows),
        "status": paper.status,
        "needs": list(paper.needs),
        "assumed": paper.assumed,
        "settings": dict(paper.settings),
    }


def _first_comment(file: Path) -> str:
    return file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def role_facts() -> list[dict[str, Any]]:
    """Every kind of role with its ops: settings, and what each reads, writes and does to rows and weights.

    `optional`: columns it reads where the batch has them. `reads_of_loss`: it reads what its loss reads, too.
    `weight_ops`: what a recipe may do with its weights; whose each reads and writes.
    """
    return [
        {
            "kind": interface.__name__,
            "doc": _one_line(interface),
            "ops": [
                {
                    "name": name,
                    "doc": _one_line(getattr(interface, name)),
                    "settings": _settings(getattr(interface, name)),
                    **_reads(spec.reads, defaults(getattr(interface, name))),
                    "optional": list(spec.optional),
                    "writes": list(spec.columns(spec.writes, defaults(getattr(interface, name)))),
                    "rows": spec.rows,
                    "weights_read": spec.weights_read,
                    "weights_written": spec.weights_written,
                }
                for name, spec in ops_of(interface).items()
            ],
            "weight_ops": [
                {
                    "name": name,
                    "doc": _one_line(getattr(interface, name)),
                    "settings": _settings(getattr(interface, name)),
                    "weights_read": spec.reads,
                    "weights_written": spec.writes,
                }
                for name, spec in weight_ops_of(interface).items()
            ],
        }
        for interface in KINDS
    ]


def column_facts(dataflow: Dataflow | None = None) -> list[dict[str, Any]]:
    """Columns with shape, dtype and meaning; with a graph its own only, and the nodes that write and read each.

    A column of the user's own has None for what the vocabulary does not know.
    """
    if dataflow is None:
        return [_column(name) for name in COLUMNS]
    written: dict[str, list[str]] = {}
    read: dict[str, list[str]] = {}
    for node in dataflow:
        for name in node.writes:
            written.setdefault(name, []).append(node.name)
        for name in dict.fromkeys(origin.column for batch in node.inputs for origin in batch.columns.values()):
            read.setdefault(name, []).append(node.name)
    return [{**_column(name), "written_by": written.get(name, []), "read_by": read.get(name, [])} for name in written]


def _column(name: str) -> dict[str, Any]:
    spec = COLUMNS.get(name)
    known: Mapping[str, Any] = vars(spec) if spec else {"shape": None, "dtype": None, "meaning": None}
    return {"name": name, **known}


def _reads(columns: Columns, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a call with default settings; where it needs a loss, what it reads whatever the loss."""
    try:
        return {"reads": list(columns(settings) if callable(columns) else columns), "reads_of_loss": False}
    except KeyError:
        assert callable(columns), "a tuple needs no setting"
        return {"reads": list(columns({**settings, "loss": _AnyLoss})), "reads_of_loss": True}


def _settings(function: Any) -> dict[str, Any]:
    """Setting -> default; None for one that must be given."""
    keywords: Iterable[inspect.Parameter] = inspect.signature(function).parameters.values()
    return {
        one.name: None if one.default is one.empty else one.default for one in keywords if one.kind is one.KEYWORD_ONLY
    }


def _one_line(documented: Any) -> str:
    return " ".join((inspect.getdoc(documented) or "").split())
