"""DRO-V: direct reward optimisation (Richemond et al. 2024, arXiv 2405.19107): single responses with rewards.

    L = (r - V(x) - tau log pi(y|x)/pi_ref(y|x))^2 / 2          minimised in pi and in V

At the optimum of the KL-regularised objective the bracket is 0 for every response; V(x), the value of the prompt,
stands for what a pair's difference cancels in DPO. V is the critic's answer before the response's first token. Rows
of the file have `reward`.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import loss
from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Critic, Examples, Reference

PAPERS = {
    "dro": Paper(
        title="DRO-V",
        year=2024,
        arxiv="2405.19107",
        rows=(30,),
        needs=("MIX", "REF", "CRIT", "AUX"),
        assumed="tau 1; policy and value are two models with their own learning rates",
    )
}


@dataclass(frozen=True, kw_only=True)
class DRO:
    """Settings of DRO-V."""

    tau: float = 1.0
    """Strength of the pull towards the reference."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


class Rated(Examples):
    """Responses with a reward each."""

    fields = {"reward": "float32"}


@host_op(
    reads=("reward", "values", "old_log_probs", "ref_log_probs", "response_mask"), writes=("surplus", "value_target")
)
def bracket(batch: Batch, *, tau: float) -> Batch:
    """r - V(x), and r - tau log pi/pi_ref, which V is drawn to."""
    mask = batch["response_mask"]
    ratio = sum_rows((batch["old_log_probs"].values - batch["ref_log_probs"].values) * (mask.values > 0), mask.offsets)
    value = batch["values"].values[mask.offsets[:-1].clip(max=max(len(mask.values) - 1, 0))]
    surplus, target = batch["reward"].values - value, batch["reward"].values - tau * ratio
    return Batch({"surplus": Column(surplus.astype("float32")), "value_target": Column(target.astype("float32"))})


@loss(reads=("ref_log_probs", "surplus"), average="rows")
def dro_policy(model, rows, tau: float = 1.0):
    """The squared bracket in pi."""
    ratio = rows.sum_tokens(model.log_probs - rows["ref_log_probs"])
    value = (rows["surplus"] - tau * ratio) ** 2 / 2
    return value, {"log_ratio": ratio.detach(), "surplus": rows["surplus"]}


@loss(reads=("value_target",), outputs=("values",), average="rows")
def prompt_value(model, rows):
    """Half the squared distance of V(x), the value before a row's first token, from its target."""
    first = rows.row_of_token.diff(prepend=rows.row_of_token.new_full((1,), -1)) > 0
    said = model.values.where(first & (rows.mask > 0), 0.0)
    at = model.values.new_zeros(rows.num_rows).index_add(0, rows.row_of_token, said)
    counted = rows.sum_tokens(rows.mask) > 0
    value = ((at - rows["value_target"]) ** 2 / 2).where(counted, 0.0)
    return value, {"prompt_value": at.detach()}


@recipe
def dro(examples: Rated, actor: Actor, reference: Reference, critic: Critic, cfg: DRO) -> None:
    """One step of policy and value on rated responses."""
    batch = critic.compute_values(reference.compute_ref_log_prob(actor.compute_log_prob(examples)))
    batch = bracket(batch, tau=cfg.tau)
    critic.update_critic(batch, loss=prompt_value(), mini_batches=cfg.mini_batches)
    actor.update_actor(batch, loss=dro_policy(cfg.tau), mini_batches=cfg.mini_batches)
