"""Rule rewards, how a function named in the config is found and called, and the process it is called in.

Libraries are imported on first use.
"""

from rlhf_dist.rewards.code import CodeTests, code_solved, code_tests
from rlhf_dist.rewards.exact_match import exact_match
from rlhf_dist.rewards.load import load_function, load_reward
from rlhf_dist.rewards.math_verify import math_verify
from rlhf_dist.rewards.reasoning_gym import reasoning_gym, reasoning_gym_solved
from rlhf_dist.rewards.rule import RewardFunctionError, rule_rewards
from rlhf_dist.rewards.share_of_digits import share_of_digits
from rlhf_dist.rewards.signature import adapt
from rlhf_dist.rewards.text import has_format, in_length, json_match, regex_match, valid_json
from rlhf_dist.rewards.weighted import weighted

__all__ = [
    "CodeTests",
    "RewardFunctionError",
    "adapt",
    "code_solved",
    "code_tests",
    "exact_match",
    "has_format",
    "in_length",
    "json_match",
    "load_function",
    "load_reward",
    "math_verify",
    "reasoning_gym",
    "reasoning_gym_solved",
    "regex_match",
    "rule_rewards",
    "share_of_digits",
    "valid_json",
    "weighted",
]
