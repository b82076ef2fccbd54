"""SELM: self-exploring language models (Zhang et al. 2024, arXiv 2405.19332): DPO that is drawn to high rewards.

    L = L_DPO(y_w, y_l) + alpha beta (log pi(y_r) - log pi_ref(y_r))          y_w, y_l ~ pi, y_r ~ pi_ref

As in XPO, what the reference would say anyway loses probability; here the pair is the policy's own and a third response
carries the optimism.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import dpo, loss
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import keep_best_and_worst

PAPERS = {
    "selm": Paper(
        title="SELM",
        year=2024,
        arxiv="2405.19332",
        rows=(73,),
        needs=("ROLL", "RM", "PAIR", "PREF", "REF", "SNAP"),
        assumed="alpha 0.0001; the reference stays the initial model",
    )
}


@dataclass(frozen=True, kw_only=True)
class SELM:
    """Settings of SELM."""

    samples_per_prompt: int = 4
    """Responses to each prompt; the best and the worst make the pair."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""
    alpha: float = 1e-4
    """Weight of the optimism, in units of beta."""


@loss(reads=("ref_log_probs",), average="rows")
def implicit_reward(model, rows):
    """log pi/pi_ref of a response."""
    ratio = rows.sum_tokens(model.log_probs - rows["ref_log_probs"])
    return ratio, {"optimism": ratio.detach()}


@recipe
def selm(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: SELM) -> None:
    """DPO on own pairs, and optimism on the reference's responses."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    pairs = reference.compute_ref_log_prob(keep_best_and_worst(batch))
    theirs = reference.compute_ref_log_prob(reference.generate_sequences(prompts))
    actor.update_actor([(pairs, dpo(cfg.beta)), (theirs, implicit_reward(), cfg.alpha * cfg.beta)])
