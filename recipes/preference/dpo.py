"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290). A pair is two labelled rows of a group."""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import dpo as dpo_loss
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences, Reference


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Settings of DPO."""

    beta: float = 0.1
    """Strength of the pull towards the reference."""
    label_smoothing: float = 0.0
    """Share of labels assumed to be wrong, in [0, 0.5)."""
    smoothing: Literal["conservative", "robust"] = "conservative"
    """What is done about them: cDPO, or robust DPO's unbiased loss."""
    length_normalised: bool = False
    """Mean instead of sum of the log-ratios over a response's tokens."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


@recipe
def dpo(pairs: Preferences, actor: Actor, reference: Reference, cfg: DPO) -> None:
    """DPO on given pairs."""
    pairs = reference.compute_ref_log_prob(pairs)
    loss = dpo_loss(
        cfg.beta,
        label_smoothing=cfg.label_smoothing,
        smoothing=cfg.smoothing,
        length_normalised=cfg.length_normalised,
    )
    actor.update_actor(pairs, loss=loss, mini_batches=cfg.mini_batches)
