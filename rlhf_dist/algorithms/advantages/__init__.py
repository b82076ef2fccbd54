"""Advantages: numpy in, numpy out. Per-token arrays are flat and ragged: values [N], offsets [B + 1]."""

from rlhf_dist.algorithms.advantages.baselines import all_equal, group_relative, leave_one_out, versus_baseline
from rlhf_dist.algorithms.advantages.gae import gae
from rlhf_dist.algorithms.advantages.whiten import whiten

__all__ = ["all_equal", "gae", "group_relative", "leave_one_out", "versus_baseline", "whiten"]
