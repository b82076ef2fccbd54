"""XPO: exploratory preference optimisation (Xie et al. 2024, arXiv 2405.21046).

    y ~ pi, y~ ~ pi_ref, labelled by reward          L = L_DPO(pair) + alpha log pi(y~ | x)

The last term is optimism: it pushes probability away from what the reference would say anyway.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import keep_best_and_worst, mark_rows

PAPERS = {
    "xpo": Paper(
        title="XPO",
        year=2024,
        arxiv="2405.21046",
        rows=(72,),
        needs=("ROLL", "JUDGE", "PAIR", "PREF", "REF", "SNAP"),
        assumed="a reward labels the pair; alpha as in TRL",
    )
}


@dataclass(frozen=True, kw_only=True)
class XPO:
    """Settings of XPO."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    alpha: float = 1e-5
    """Weight of the optimism (TRL's default)."""


@loss(reads=("label", "ref_log_probs", "of_reference"), average="groups")
def optimistic_dpo(model, rows, beta: float = 0.1, alpha: float = 1e-5):
    """DPO on the pair, and log pi of the reference's response."""
    log_prob = rows.sum_tokens(model.log_probs)
    chosen, rejected = chosen_and_rejected(beta * (log_prob - rows.sum_tokens(rows["ref_log_probs"])), rows)
    optimism = rows.sum_groups(rows["of_reference"] * log_prob)
    preference = (rejected - chosen).logaddexp(0.0 * chosen)  # -log sigma(chosen - rejected)
    metrics = {"preference_loss": preference, "optimism": optimism, "margin": chosen - rejected}
    return preference + alpha * optimism, {name: value.detach() for name, value in metrics.items()}


@recipe
def xpo(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: XPO) -> None:
    """Pairs of the policy's own and the reference's response."""
    own = mark_rows(actor.generate_sequences(prompts), column="of_reference", number=0)
    theirs = mark_rows(reference.generate_sequences(prompts), column="of_reference", number=1)
    pairs = keep_best_and_worst(reward.compute_reward(own.concat(theirs)))
    pairs = reference.compute_ref_log_prob(pairs)
    actor.update_actor(pairs, loss=optimistic_dpo(cfg.beta, cfg.alpha))
