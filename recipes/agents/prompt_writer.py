"""A small model writes for a large frozen one (directional stimulus prompting, Li et al. 2023, arXiv 2302.11520).

    z ~ pi(. | x),   y ~ frozen(. | x, z),   r = metric(y)          PPO on z, with a KL to the writer's start

What the writer says is put behind the prompt (a hint, a rationale), or in its place (`keep_prompt=false`: a rewritten
prompt). The frozen model answers `answers` times; the writer's reward is the mean. Both models have one tokenizer.
"""

from dataclasses import dataclass

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from recipes.policy_gradient._prompts import written_prompt
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Critic, Opponent, Prompts, Reference, Reward
from rlhf_dist.transforms import mean_of_children

PAPERS = {
    "prompt_writer": Paper(
        title="Directional stimulus prompting",
        year=2023,
        arxiv="2302.11520",
        rows=(185,),
        needs=("XLM", "ROLL", "REF", "CRIT", "SFT"),
        assumed="PPO, not NLPO; the writer's start is the recipe sft",
    ),
    "prewrite": Paper(
        title="PRewrite",
        year=2024,
        arxiv="2401.08189",
        rows=(186,),
        needs=("XLM", "ROLL", "REF", "CRIT"),
        settings={"algorithm.keep_prompt": False},
        assumed="one prompt is rewritten at a time, with its question in it",
    ),
    "guided_cot": Paper(
        title="LM-guided chain of thought",
        year=2024,
        arxiv="2404.03414",
        rows=(187,),
        status="outline",
        needs=("XLM", "ROLL", "VER", "CRIT", "SFT", "MRM"),
        assumed="the reward of the answer alone, without those of the rationale's aspects; distillation first is sft",
    ),
    "align_pro": Paper(
        title="Align-Pro",
        year=2025,
        arxiv="2501.03486",
        rows=(190,),
        status="outline",
        needs=("XLM", "ROLL", "RM", "REF", "CRIT"),
        settings={"algorithm.keep_prompt": False, "algorithm.kl_coef": 0.1},
        assumed="the weight 0.1 of the KL",
    ),
}


@dataclass(frozen=True, kw_only=True)
class PromptWriter(WithCritic):
    """Settings of a writer for a frozen model."""

    samples_per_prompt: int = 1
    """Hints for each prompt."""
    answers: int = 1
    """Answers of the frozen model to each hint."""
    keep_prompt: bool = True
    """The frozen model reads the prompt and the hint; False: the hint alone, as the prompt."""
    kl_coef: float = 0.02
    """Penalty on log pi - log pi_ref of the writer."""


@recipe
def prompt_writer(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    frozen: Opponent,
    reward: Reward,
    cfg: PromptWriter,
) -> None:
    """PPO on what makes another model right."""
    hints = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    answers = frozen.generate_sequences(written_prompt(hints, keep_prompt=cfg.keep_prompt), n=cfg.answers)
    hints = mean_of_children(hints, reward.compute_reward(answers))
    learn_with_critic(hints, actor, critic, reference, cfg)
