"""Environments: episodes of several turns, with tools. See `environment.py` for how one is written, `outcomes.py` for
how episodes end."""

from rlhf_dist.environments.environment import Branch, Chat, Environment, EpisodeLimits, Reply, Row
from rlhf_dist.environments.outcomes import InfrastructureError, PolicyError, ToolTimeout
from rlhf_dist.environments.tool_calls import JsonCalls, TextCalls, ToolCall, ToolParser

__all__ = [
    "Branch",
    "Chat",
    "Environment",
    "EpisodeLimits",
    "InfrastructureError",
    "JsonCalls",
    "PolicyError",
    "Reply",
    "Row",
    "TextCalls",
    "ToolCall",
    "ToolParser",
    "ToolTimeout",
]
