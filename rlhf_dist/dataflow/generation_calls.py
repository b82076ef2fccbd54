"""What a call says beside rows and n: template, parser, sampling, mixture, speakers; checked while traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.state_value import StateValue
from rlhf_dist.dataflow.token_makers import makers
from rlhf_dist.parsers import columns_of
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import LanguageModel
from rlhf_dist.sampling import Sampling
from rlhf_dist.schema import COLUMNS

if TYPE_CHECKING:
    from rlhf_dist.dataflow.traced_batch import TracedBatch

SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")
"""Settings of the role's `rollout` section that a call may replace."""


def generation_settings(
    line: str, where: str, batch: TracedBatch, settings: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings as workers take them, and the roles whose generation weights the call reads besides its own.

    Adds `decode`, whose tokenizer each token column of the template belongs to, and puts a role's name in its place.
    Raises GraphError with the recipe's line for what cannot be meant.
    """
    if "environment" in settings:
        return _episode_settings(line, where, settings)
    template, parser = settings.get("template"), settings.get("parser")
    if isinstance(template, Template) or ("parser" in settings and template is not None):
        settings = {**settings, "decode": _decoders(line, where, batch, template)}
    if "parser" not in settings:  # it does not generate
        return settings, ()
    if parser is not None:
        try:
            columns_of(parser)
        except ValueError as error:
            raise GraphError(f"{line}: {where}: {error}") from error
    if settings.get("prefix") is not None:
        _check_prefix(line, where, batch, settings["prefix"])
    _check_sampling(line, where, settings)
    if settings.get("mixture") is None:
        return settings, ()
    role, share = _mixed_with(line, where, settings["mixture"])
    return {**settings, "mixture": (role, share)}, (role,)


def _decoders(line: str, where: str, batch: TracedBatch, template: Any) -> dict[str, str]:
    """Token column of the template -> role or source whose tokenizer made it."""
    if not isinstance(template, Template):
        raise GraphError(
            f"{line}: {where} got template={template!r}; it takes a Template of rlhf_dist.prompt_template, such as "
            "Template('Is this right? {response}')"
        )
    found: dict[str, str] = {}
    nodes = {node.name: node for node in batch.tracer.nodes}
    for name in template.columns:
        origin = batch.origins.get(name)
        made_by = makers(nodes, origin) if origin is not None else frozenset()
        if len(made_by) > 1:
            raise GraphError(
                f"{line}: {where} is to write {{{name}}}, token ids that {' and '.join(sorted(made_by))} made, each "
                "with a tokenizer of its own; put their texts into the template: {response}"
            )
        if made_by:
            found[name] = next(iter(made_by))
        elif name in COLUMNS and COLUMNS[name].shape != "[B]":
            raise GraphError(
                f"{line}: {where} is to write {{{name}}} into its template, which is {COLUMNS[name].shape} "
                f"({COLUMNS[name].meaning}); a field is a text, one number a row, or token ids"
            )
    return found


def _check_prefix(line: str, where: str, batch: TracedBatch, prefix: Any) -> None:
    if not isinstance(prefix, str):
        raise GraphError(
            f"{line}: {where} got prefix={prefix!r}; it is the name of a column, whose text or token ids each response "
            "goes on from"
        )
    if prefix not in batch.origins:
        return  # said as for any column that is read
    if prefix in COLUMNS and COLUMNS[prefix].dtype not in ("text", "int32"):
        raise GraphError(
            f"{line}: {where} cannot go on from {prefix!r} ({COLUMNS[prefix].meaning}); a prefix is text or token ids"
        )


def _check_sampling(line: str, where: str, settings: Mapping[str, Any]) -> None:
    if isinstance(settings["stop"], str) or not isinstance(settings["stop"], Sequence):
        raise GraphError(f"{line}: {where} needs stop, a tuple of texts, got {settings['stop']!r}; write stop=('###',)")
    known: dict[str, Any] = {}
    for key in SAMPLING:
        value = settings.get(key)
        whole = key in ("top_k", "max_tokens") and not isinstance(value, StateValue)
        known |= {} if value is None else {key: value.first if isinstance(value, StateValue) else value}
        if key in known and (isinstance(known[key], bool) or not isinstance(known[key], int if whole else int | float)):
            raise GraphError(f"{line}: {where} needs {key}, a {'whole ' if whole else ''}number, got {value!r}")
    try:
        Sampling(**known, stop=tuple(settings["stop"]))
    except ValueError as error:
        raise GraphError(f"{line}: {where}: {error}") from error


def _episode_settings(line: str, where: str, settings: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    given, rows_of = settings.get("speakers") or {}, settings.get("rows_of", ())
    own, found = where.partition(".")[0], dict[str, str]()
    for name, role in given.items() if isinstance(given, Mapping) else [(str(given), given)]:
        named = _role_of(role)
        if named is None or name == own:
            raise GraphError(
                f"{line}: {where} got speakers={given!r}; it maps names that the environment uses, {own!r} not among "
                "them, to language models of the recipe: speakers={'user': simulator}"
            )
        found[name] = named
    if isinstance(rows_of, str) or any(name not in found for name in rows_of):
        raise GraphError(f"{line}: {where} needs rows_of, a tuple of names in speakers, got {rows_of!r}")
    leaves = getattr(settings["environment"], "leaves", 1)
    if rows_of and leaves != 1:
        raise GraphError(
            f"{line}: {where} keeps rows of {', '.join(rows_of)}, and its episodes branch (leaves={leaves}); episodes "
            "in which several learn are one row for each"
        )
    _check_first_groups(line, where, settings)
    lenders = tuple(dict.fromkeys(role for role in found.values() if role != own))
    return {**settings, "speakers": found, "rows_of": tuple(rows_of)}, lenders


def _check_first_groups(line: str, where: str, settings: Mapping[str, Any]) -> None:
    groups, first = settings["groups"], settings["first"]
    if groups is not None and (not isinstance(groups, int) or isinstance(groups, bool) or groups < 1):
        raise GraphError(
            f"{line}: {where} needs groups >= 1, of which it keeps the first, or None for all, got {groups!r}"
        )
    if first not in ("turns", "time"):
        raise GraphError(f"{line}: {where} says what is first= by 'turns' or by 'time', got {first!r}")


def _role_of(given: Any) -> str | None:
    """The name of a language model of the recipe; None for anything else."""
    named = given.weight_role() if hasattr(type(given), "weight_role") else None
    return named.name if named is not None and LanguageModel in named.interface.__mro__ else None


def _mixed_with(line: str, where: str, mixture: Any) -> tuple[str, Any]:
    """(role, share) of a mixture."""
    given: Any
    given, share = mixture if isinstance(mixture, tuple) and len(mixture) == 2 else (None, None)
    named = _role_of(given)
    if named is None:
        raise GraphError(
            f"{line}: {where} got mixture={mixture!r}; it is (role, share), another language model of the recipe and "
            "its share of the logits: mixture=(reference, 0.125)"
        )
    known = share.first if isinstance(share, StateValue) else share
    if isinstance(known, bool) or not isinstance(known, int | float) or not 0 <= known <= 1:
        raise GraphError(f"{line}: {where} mixes with a share in [0, 1] of {named!r}, got {share!r}")
    if named == where.partition(".")[0]:
        raise GraphError(f"{line}: {where} mixes {named!r} with itself, which changes nothing; name another role")
    return named, share
