"""Host ops that recipes use between roles: advantages, whitening, pairs and filters. Nothing here imports torch."""

from rlhf_dist.transforms.children import group_by_parent, mean_of_children
from rlhf_dist.transforms.cut_responses import mask_cut_responses, penalise_cut_responses
from rlhf_dist.transforms.gae import gae
from rlhf_dist.transforms.grpo_advantage import grpo_advantage
from rlhf_dist.transforms.judging import both_orders, list_scores, listed, verdict_means, win_rates
from rlhf_dist.transforms.lagrangian_advantage import lagrangian_advantage
from rlhf_dist.transforms.mark_rows import mark_rows
from rlhf_dist.transforms.remax_advantage import remax_advantage
from rlhf_dist.transforms.rloo_advantage import rloo_advantage
from rlhf_dist.transforms.select_rows import best_of_group, drop_equal_groups, drop_missing, keep_best_and_worst
from rlhf_dist.transforms.shape_rewards import (
    clip_rewards,
    combine_rewards,
    penalise_overlong,
    rewards_against_reference,
    whiten_rewards,
    whiten_rewards_by_prompt,
)
from rlhf_dist.transforms.spans import span_rewards
from rlhf_dist.transforms.spoken_by import spoken_by
from rlhf_dist.transforms.tree_advantage import tree_advantage
from rlhf_dist.transforms.tree_steps import tree_nodes, tree_pairs
from rlhf_dist.transforms.tries import tries
from rlhf_dist.transforms.whiten import whiten

__all__ = [
    "best_of_group",
    "both_orders",
    "clip_rewards",
    "combine_rewards",
    "drop_equal_groups",
    "drop_missing",
    "gae",
    "group_by_parent",
    "grpo_advantage",
    "keep_best_and_worst",
    "lagrangian_advantage",
    "list_scores",
    "listed",
    "mark_rows",
    "mask_cut_responses",
    "mean_of_children",
    "penalise_cut_responses",
    "penalise_overlong",
    "remax_advantage",
    "rewards_against_reference",
    "rloo_advantage",
    "spoken_by",
    "tree_advantage",
    "tree_nodes",
    "tree_pairs",
    "tries",
    "span_rewards",
    "verdict_means",
    "whiten",
    "whiten_rewards",
    "whiten_rewards_by_prompt",
    "win_rates",
]
