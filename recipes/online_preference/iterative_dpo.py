"""Online iterative DPO: pairs from the policy's own responses, every step.

Xiong et al. 2023, arXiv 2312.11456; as RLHF Workflow has it, Dong et al. 2024, arXiv 2405.07863.
"""

from dataclasses import dataclass
from typing import Literal

from recipes.preference._pairs import with_reference
from rlhf_dist.algorithms import dpo, ipo
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import keep_best_and_worst

PAPERS = {
    "iterative_dpo": Paper(
        title="RLHF Workflow: online iterative DPO",
        year=2024,
        arxiv="2405.07863",
        rows=(3,),
        needs=("ROLL", "RM", "PAIR", "PREF", "RMT", "EVAL"),
        assumed="an iteration is a step; SFT and the reward model are stages before it (sft, reward_model)",
    ),
    "dpo_vp": Paper(
        title="Iterative DPO for reasoning, pairs by a verifier (DPO-VP)",
        year=2025,
        arxiv="2503.12854",
        rows=(83,),
        needs=("ROLL", "VER", "PAIR", "PREF", "RMT", "SNAP", "CO"),
        settings={"reward.function": "rlhf_dist.rewards:math_verify"},
        assumed="the verifier labels; the paper's second form, a reward model that learns too, is not here",
    ),
    "online_ipo": Paper(
        title="Online IPO: the online side of the online-offline gap",
        year=2024,
        arxiv="2405.08448",
        rows=(85,),
        status="study",
        needs=("ROLL", "RM", "PREF", "EVAL"),
        settings={"algorithm.kind": "ipo", "algorithm.samples_per_prompt": 2},
    ),
    "slic": Paper(
        title="Online SLiC",
        year=2024,
        arxiv="2402.04792",
        needs=("ROLL", "RM", "PAIR", "PREF", "REF"),
        settings={"algorithm.kind": "hinge", "algorithm.samples_per_prompt": 2},
    ),
}


@dataclass(frozen=True, kw_only=True)
class IterativeDPO:
    """Settings of online iterative DPO."""

    samples_per_prompt: int = 8
    """Responses to each prompt; the best and the worst make the pair."""
    kind: Literal["dpo", "ipo", "hinge"] = "dpo"
    """The loss on a pair."""
    beta: float = 0.1
    """Strength of the pull towards the reference (tau of ipo)."""
    length_price: float = 0.0
    """Taken off a response's reward for each token, before pairs are made."""


@host_op(reads=("rewards", "response_mask"), writes=("rewards",))
def less_for_length(batch: Batch, *, price: float) -> Batch:
    """Rewards less `price` for each token of the response."""
    lengths = batch["response_mask"].lengths
    return Batch({"rewards": Column((batch["rewards"].values - price * lengths).astype("float32"))})


@recipe
def iterative_dpo(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: IterativeDPO) -> None:
    """DPO on the best and the worst of each group of responses; prompts whose rewards are all equal drop out."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = reward.compute_reward(batch)
    if cfg.length_price:
        batch = less_for_length(batch, price=cfg.length_price)
    pairs = keep_best_and_worst(batch)
    pairs = reference.compute_ref_log_prob(pairs)
    losses = {"dpo": dpo(cfg.beta), "ipo": ipo(cfg.beta), "hinge": with_reference("hinge", cfg.beta)}
    actor.update_actor(pairs, loss=losses[cfg.kind])
