"""What calls of `generate_sequences` ask beyond a role's settings, against these and the placement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rlhf_dist.config import LanguageModelConfig, RolloutConfig
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.dataflow.row_facts import Amount
from rlhf_dist.environments import EpisodeLimits
from rlhf_dist.placement.roles import rollout_of
from rlhf_dist.prompt_template import Template
from rlhf_dist.role_kinds import generation_of
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch


def check_generation(launch: Launch, pools: Mapping[str, str]) -> None:
    """Raise ConfigError for a call that its role's generation cannot serve. pools: role, or ROLE.rollout -> pool."""
    for node, rollout in _calls(launch):
        most = node.kwargs.get("max_tokens")
        if isinstance(most, int) and most > rollout.max_response_tokens:
            key = f"{node.role}.rollout.max_response_tokens"
            raise ConfigError(
                f"{node.line}: {node.name} asks for responses of {most} tokens, and {key} is "
                f"{rollout.max_response_tokens}; set {key}={most}"
            )
        if node.kwargs.get("mixture") is not None:
            _check_mixture(launch, node, rollout, pools)
    for node in launch.dataflow:
        for role in node.kwargs.get("speakers", {}).values() if node.op == "run_episodes" else ():
            _check_one_process(node, role, pools, "plays episodes in which speaks")


def check_templates(launch: Launch) -> None:
    """Raise ConfigError for a template that leaves no room for what it writes. Needs tokenizers."""
    from rlhf_dist.data.tokenizer import TextTokenizer

    for node in launch.dataflow:
        template, config = node.kwargs.get("template"), launch.roles.get(node.role)
        if not isinstance(template, Template) or not isinstance(config, LanguageModelConfig) or config.model is None:
            continue
        model, rollout = config.model, config.rollout
        key = f"{node.role}.rollout.max_prompt_tokens"
        try:
            tokenizer = TextTokenizer(model.path, template.template_args)
            messages, answer = template.bare
            chat = tokenizer.has_chat_template if template.chat is None else template.chat
            whole = tokenizer.render(messages) if chat else "\n\n".join(one["content"] for one in messages)
        except ValueError as error:
            raise ConfigError(f"{node.line}: the template of {node.name}: {error}") from error
        (ids,) = tokenizer.encode([whole + answer], special_tokens=not chat)
        if len(ids) >= rollout.max_prompt_tokens:
            raise ConfigError(
                f"{node.line}: the template of {node.name} has {len(ids)} tokens before anything is put in, and {key} "
                f"is {rollout.max_prompt_tokens}; raise it by what {', '.join(template.columns)} may need"
            )


def check_episodes(launch: Launch, rows: Mapping[str, Amount]) -> None:
    """Raise ConfigError for more groups of episodes than are begun, for groups that ranks cannot tell by their rows,
    and for a deadline that comes too late. rows: node -> its rows."""
    for node in launch.dataflow:
        if node.op != "run_episodes":
            continue
        limits, timeout_s = node.kwargs["limits"] or EpisodeLimits(), launch.run.ray.call_timeout_s
        if limits.step_seconds is not None and limits.step_seconds >= timeout_s:
            raise ConfigError(
                f"{node.line}: {node.name} ends after EpisodeLimits.step_seconds={limits.step_seconds:g}, which must "
                f"be less than ray.call_timeout_s = {timeout_s:g}, after which the run fails; lower it, or raise that"
            )
        groups, before = node.kwargs["groups"], rows[node.inputs[0].rows]
        if groups is not None and before.rows != before.groups:
            raise ConfigError(
                f"{node.line}: {node.name} keeps the first groups={groups}, each the episodes of one row, and gets "
                f"{before.rows} rows of {before.groups} groups; play episodes of the prompts themselves"
            )
        if groups is not None and groups > before.groups:
            raise ConfigError(
                f"{node.line}: {node.name} keeps the first groups={groups} of those it begins, and there are at most "
                f"{before.groups}; raise data.prompts_per_step, or keep fewer"
            )


def _check_mixture(launch: Launch, node: Node, rollout: RolloutConfig, pools: Mapping[str, str]) -> None:
    other, _ = node.kwargs["mixture"]
    theirs = generation_of(launch, other)
    assert theirs is not None, f"{other} lends its logits, so it generates"
    for role, one in ((node.role, rollout), (other, theirs)):
        if one.engine != "transformers":
            raise ConfigError(
                f"{node.line}: {node.name} draws from a mixture of logits, which {one.engine} cannot: it draws from "
                f"one model; set {role}.rollout.engine=transformers"
            )
    _check_one_process(node, other, pools, "mixes its logits with those of")


def _check_one_process(node: Node, other: str, pools: Mapping[str, str], does: str) -> None:
    mine, its = (pools.get(rollout_of(role), pools[role]) for role in (node.role, other))
    if mine != its:
        raise ConfigError(
            f"{node.line}: {node.name}, which generates in pool {mine!r}, {does} {other!r}, which does in pool "
            f"{its!r}: both must be in one process; set 'placement.rollout={{{node.role}: {mine}, {other}: {mine}}}'"
        )


def _calls(launch: Launch) -> Iterator[tuple[Node, RolloutConfig]]:
    for node in launch.dataflow:
        asked: Any = node.kwargs
        rollout = generation_of(launch, node.role) if node.kind == "op" and node.role in launch.roles else None
        if rollout is not None and node.rows == "expand" and "template" in asked:
            yield node, rollout
