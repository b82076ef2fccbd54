"""Rule rewards, and how a reward function named in the config is found. Libraries are imported on first use."""

from rlhf_dist.rewards.exact_match import exact_match
from rlhf_dist.rewards.load import load_function
from rlhf_dist.rewards.math_verify import math_verify
from rlhf_dist.rewards.reasoning_gym import reasoning_gym, reasoning_gym_solved
from rlhf_dist.rewards.rule import RewardFunctionError, RuleReward, rule_rewards, score_rows

__all__ = [
    "RewardFunctionError",
    "RuleReward",
    "exact_match",
    "load_function",
    "math_verify",
    "reasoning_gym",
    "reasoning_gym_solved",
    "rule_rewards",
    "score_rows",
]
