"""Two responses of the policy's own, regressed on the gap of their rewards: REBEL (Gao et al. 2024, arXiv 2404.16767).

    L = ((1/eta) [log pi/pi_t(y) - log pi/pi_t(y')] - [r(y) - r(y')])^2          y, y' ~ pi_t

No critic, no clip, no label: how much better counts, too. The other losses on the same pairs: `_sample_pairs.py`.
"""

from dataclasses import dataclass
from typing import Literal

from recipes.online_preference._sample_pairs import (
    WITH_REFERENCE,
    first_two,
    sample_pair_loss,
    wide_pairs,
    win_regression,
    wins_in_group,
)
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import keep_best_and_worst

PAPERS = {
    "sample_pairs": Paper(
        title="REBEL",
        year=2024,
        arxiv="2404.16767",
        rows=(26,),
        needs=("ROLL", "RM", "PAIR", "SNAP", "PREF"),
        assumed="eta 1",
    ),
    "copg": Paper(
        title="CoPG: contrastive policy gradient",
        year=2024,
        arxiv="2406.19185",
        rows=(28,),
        needs=("ROLL", "RM", "PAIR", "PREF", "MIX"),
        settings={"algorithm.kind": "copg"},
        assumed="beta 0.1; the responses are the policy's own",
    ),
    "p3o": Paper(
        title="P3O: pairwise PPO",
        year=2023,
        arxiv="2310.00212",
        rows=(27,),
        status="outline",
        needs=("ROLL", "RM", "PAIR", "ADV"),
        settings={"algorithm.kind": "p3o", "algorithm.epochs": 2},
        assumed="the joint ratio is that of the two responses' ratios; clip 0.2, beta 0.1",
    ),
    "inpo": Paper(
        title="INPO",
        year=2024,
        arxiv="2407.00617",
        rows=(94,),
        needs=("ROLL", "PAIRJ", "PAIR", "PREF", "REF", "SNAP"),
        settings={
            "algorithm.kind": "inpo",
            "algorithm.eta": 0.0075,
            "algorithm.samples_per_prompt": 8,
        },
        assumed=(
            "eta and tau / eta from memory of the code; rewards decide the tournament, whose winner is then the best"
        ),
    ),
    "dno": Paper(
        title="DNO: direct Nash optimisation",
        year=2024,
        arxiv="2404.03715",
        rows=(95,),
        needs=("ROLL", "PAIRJ", "PAIR", "PREF", "SNAP", "XLM", "FILT"),
        settings={
            "algorithm.kind": "dno",
            "algorithm.eta": 0.1,
            "algorithm.samples_per_prompt": 5,
        },
        assumed="eta 0.1; rewards decide who beats whom; no answers of a teacher among the pairs",
    ),
    "sppo": Paper(
        title="SPPO: self-play preference optimisation",
        year=2024,
        arxiv="2405.00675",
        needs=("ROLL", "PAIRJ", "SNAP"),
        settings={"algorithm.kind": "sppo", "algorithm.eta": 1e3, "algorithm.samples_per_prompt": 5},
        assumed="rewards decide who beats whom",
    ),
}


@dataclass(frozen=True, kw_only=True)
class SamplePairs:
    """Settings of losses on pairs of samples."""

    kind: Literal["rebel", "copg", "p3o", "inpo", "dno", "sppo"] = "rebel"
    """The loss."""
    samples_per_prompt: int = 2
    """Responses to each prompt; rebel, copg and p3o take the first two, inpo and dno the best and the worst."""
    eta: float = 1.0
    """Step size of rebel, inpo, dno and sppo."""
    beta: float = 0.1
    """Price of log pi/pi_ref in the reward of copg and p3o."""
    clip: float = 0.2
    """Of p3o: the ratio's."""
    reference_share: float = 1 / 3
    """Of inpo: tau / eta."""
    least_margin: float = 0.0
    """Of dno: pairs whose rewards are closer are left out."""
    epochs: int = 1
    """Passes over the pairs."""


@recipe
def sample_pairs(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: SamplePairs) -> None:
    """REBEL, or another loss, on pairs of samples."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    if cfg.kind in ("dno", "sppo"):
        batch = wins_in_group(batch)
    if cfg.kind in ("inpo", "dno"):
        batch = wide_pairs(keep_best_and_worst(batch), least=cfg.least_margin)
    elif cfg.kind != "sppo":
        batch = first_two(batch)
    batch = actor.compute_log_prob(batch)
    if cfg.kind in WITH_REFERENCE:
        batch = reference.compute_ref_log_prob(batch)
    shape = {"eta": cfg.eta, "beta": cfg.beta, "clip": cfg.clip, "reference_share": cfg.reference_share}
    loss = win_regression(cfg.eta) if cfg.kind == "sppo" else sample_pair_loss(cfg.kind, **shape)
    actor.update_actor(batch, loss=loss, epochs=cfg.epochs)
