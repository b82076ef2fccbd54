"""A kit for tests of one's own recipes, losses and environments, for pytest or any other runner.

    from rlhf_dist.testing import check_environment, check_loss, check_recipe

    def test_my_recipe(): check_recipe("mine.py")           traced, run both ways, compared: about ten seconds
    def test_my_loss():   check_loss(MyLoss(bonus=0.1))     the same gradient however a batch is cut: milliseconds
    def test_my_game():   check_environment(Mine(), rows)   played twice on a tiny model, token for token: a second

What does not hold is raised as CheckFailed, one line with values. No Ray, no vLLM and no GPU are needed. The kit stands
on all else: only `rlhf-dist new model` imports anything of it.
"""

from rlhf_dist.testing.environments import check_environment
from rlhf_dist.testing.failed import CheckFailed
from rlhf_dist.testing.losses import check_loss
from rlhf_dist.testing.recipes import check_recipe

__all__ = ["CheckFailed", "check_environment", "check_loss", "check_recipe"]
