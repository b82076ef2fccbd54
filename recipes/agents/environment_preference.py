"""Pairs by a reward model that has learnt from an environment's feedback, for a policy of two levels (EPO, Zhao et al.
2024, arXiv 2408.16090).

    turn 1   subgoal ~ pi(. | x)             turn 2   action ~ pi(. | x, subgoal)          feedback f of the environment
    reward model   -log s(r(best) - r(worst)) over each group, by f
    policy         DPO on each group's best and worst by r

The reward model can label rows that the environment was not asked about; here it labels those of the step.
"""

from dataclasses import dataclass

from recipes.agents._episodes import likeness
from rlhf_dist.algorithms import bradley_terry, dpo
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.roles import Actor, Prompts, Reference, RewardModel
from rlhf_dist.transforms import keep_best_and_worst

PAPERS = {
    "environment_preference": Paper(
        title="EPO: environment preference optimisation",
        year=2024,
        arxiv="2408.16090",
        rows=(171,),
        status="outline",
        needs=("TURN", "RMT", "PAIR", "PREF"),
        assumed="one policy for both levels, in two turns; likeness to the answer for its environment; beta 0.1",
    )
}


@dataclass(frozen=True, kw_only=True)
class TwoLevels(Environment):
    """A subgoal, then an action, `rounds` times; feedback on the last action."""

    rounds: int
    turn_tokens: int

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        for _ in range(self.rounds):
            await chat.generate(max_tokens=self.turn_tokens)
            chat.say(" so: ")
            action = await chat.generate(max_tokens=self.turn_tokens)
            feedback = likeness(action.text, row.answer)
            chat.reward(feedback / self.rounds)
            if feedback == 1:
                return
            chat.say(" next: ")


@dataclass(frozen=True, kw_only=True)
class EnvironmentPreference:
    """Settings of preferences from an environment."""

    samples_per_prompt: int = 8
    """Episodes of each prompt."""
    rounds: int = 2
    """Subgoals of an episode."""
    turn_tokens: int = 64
    """Most tokens of a subgoal, and of an action."""
    seconds: float = 120.0
    """Longest that an episode may take."""
    beta: float = 0.1
    """Pull towards the reference."""


@recipe
def environment_preference(
    prompts: Prompts, actor: Actor, reference: Reference, reward: RewardModel, cfg: EnvironmentPreference
) -> None:
    """A reward model of the feedback, and DPO by it."""
    environment = TwoLevels(rounds=cfg.rounds, turn_tokens=cfg.turn_tokens)
    limits = EpisodeLimits(turns=2 * cfg.rounds, seconds=cfg.seconds)
    batch = actor.run_episodes(prompts, environment=environment, n=cfg.samples_per_prompt, limits=limits)
    reward.update_reward_model(keep_best_and_worst(batch), loss=bradley_terry())
    pairs = keep_best_and_worst(reward.compute_reward(batch))
    actor.update_actor(reference.compute_ref_log_prob(pairs), loss=dpo(cfg.beta))
