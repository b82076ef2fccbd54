"""APO: accelerated preference optimisation (He et al. 2024, arXiv 2410.06293): Nesterov's step after each iterate.

    theta^_{t+1}: DPO on pairs of pi_t, towards pi_t        theta_{t+1} = theta^_{t+1} + alpha (theta^_{t+1} - theta^_t)

For softmax policies that is pi_{t+1} ~ pi^_{t+1} (pi^_{t+1} / pi^_t)^alpha; for networks we extrapolate weights.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import dpo
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import keep_best_and_worst

PAPERS = {
    "accelerated": Paper(
        title="APO: accelerated preference optimisation",
        year=2024,
        arxiv="2410.06293",
        rows=(74,),
        status="outline",
        needs=("PREF", "PAIR", "SNAP", "ROLL"),
        assumed="the form in weights, alpha 0.3; an iteration is a step",
    )
}


@dataclass(frozen=True, kw_only=True)
class Accelerated:
    """Settings of accelerated preference optimisation."""

    samples_per_prompt: int = 5
    """Responses to each prompt; the best and the worst make the pair."""
    beta: float = 0.1
    """Strength of the pull towards the previous iterate."""
    alpha: float = 0.3
    """How far the step is extrapolated; 0 is iterative DPO."""


@recipe
def accelerated(
    prompts: Prompts, actor: Actor, reference: Reference, before: Reference, reward: Reward, cfg: Accelerated
) -> None:
    """Iterative DPO with momentum. `before` holds theta^_t, which begins as the initial model."""
    reference.copy_from(actor)
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    pairs = reference.compute_ref_log_prob(keep_best_and_worst(batch))
    actor.update_actor(pairs, loss=dpo(cfg.beta))
    # reference := the iterate; actor := (1 + alpha) iterate - alpha before; before := the iterate
    reference.copy_from(actor)
    actor.merge_from([(reference, 1 + cfg.alpha), (before, -cfg.alpha)])
    before.copy_from(reference)
