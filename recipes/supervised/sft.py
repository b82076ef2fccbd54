"""Supervised fine-tuning: maximum likelihood of given responses. No rollout at all.

`divergence` takes another f-divergence of the data (a point at each token) to the policy than the KL:

    kl          -log pi(y_t)
    hellinger   2 (1 - sqrt(pi(y_t)))              tokens that are far off count less
    pearson     1 / pi(y_t) - 1                    and here more

All have the gradient of the KL where pi(y_t) = 1.
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import loss, nll
from rlhf_dist.algorithms.kl import LOG_RATIO_LIMIT
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Examples

BRIDGE = {"year": 2025, "arxiv": "2507.00018", "rows": (62,), "status": "outline", "needs": ("SFT", "REF", "PREF")}
DERIVED = "the divergences are derived here, for a point of data at each token; the paper's own form was not looked up"
PAPERS = {
    "sft": Paper(title="Supervised fine-tuning", year=2018, needs=("SFT",)),
    "small_steps": Paper(
        title="SFT as implicit-reward learning: a small learning rate",
        **BRIDGE,
        settings={"actor.optimizer.lr": 1e-6},
        assumed="the rate 1e-6; DPO after it is the recipe dpo",
    ),
    "hellinger": Paper(
        title="SFT as implicit-reward learning: squared Hellinger",
        **BRIDGE,
        settings={"algorithm.divergence": "hellinger"},
        assumed=DERIVED,
    ),
    "pearson": Paper(
        title="SFT as implicit-reward learning: Pearson's chi squared",
        **BRIDGE,
        settings={"algorithm.divergence": "pearson"},
        assumed=DERIVED,
    ),
    "janus": Paper(
        title="Janus: values in system messages",
        year=2024,
        arxiv="2405.17977",
        rows=(69,),
        needs=("SFT", "PREF"),
        assumed=(
            "each row's messages begin with a system message of its own; DPO and ORPO on such rows are their recipes"
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Settings of supervised fine-tuning."""

    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""
    average: Literal["tokens", "rows", "rows_with_tokens", "groups"] = "tokens"
    """What the likelihood is averaged over: all tokens of the step, or responses."""
    divergence: Literal["kl", "hellinger", "pearson"] = "kl"
    """From the data to the policy; those but kl are averaged over tokens."""


@loss(average="tokens")
def divergence_loss(model, rows, kind: Literal["hellinger", "pearson"] = "hellinger"):
    """A loss of the module's table, of each token."""
    log_probs = model.log_probs
    if kind == "hellinger":
        value = 2 * (1 - (log_probs / 2).exp())
    else:
        value = (-log_probs).clamp(max=LOG_RATIO_LIMIT).expm1()
    return value, {"nll": -log_probs.detach()}


@recipe
def sft(examples: Examples, actor: Actor, cfg: SFT) -> None:
    """Supervised fine-tuning on given responses."""
    loss_of = nll(average=cfg.average) if cfg.divergence == "kl" else divergence_loss(cfg.divergence)
    actor.update_actor(examples, loss=loss_of, mini_batches=cfg.mini_batches)
