"""T-REG: token rewards regularise DPO (Zhou et al. 2024, arXiv 2412.02685).

    r_t = s(log pi(y_t | better prompt) - log pi(y_t | worse prompt)) - 1/2
    L = L_DPO - alpha sum_t r_t (log pi(y_t) - log pi_ref(y_t))           over both responses of a pair

The model gives the token rewards itself: a token that it finds likelier when it is asked for a good answer than for a
bad one is good. `base=simpo` takes SimPO for DPO.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.algorithms import dpo, loss, simpo
from rlhf_dist.algorithms.ragged import FloatArray
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Preferences, Reference

ASSUMED = "alpha 0.1; the wording of both prompts; the reference, not the policy, gives the token rewards"
NEEDS = ("PREF", "ALT", "TOK", "AUX")
PAPERS = {
    "t_reg": Paper(
        title="T-REG with DPO",
        year=2024,
        arxiv="2412.02685",
        rows=(61,),
        status="outline",
        needs=NEEDS,
        assumed=ASSUMED,
    ),
    "simpo": Paper(
        title="T-REG with SimPO",
        year=2024,
        arxiv="2412.02685",
        rows=(61,),
        status="outline",
        needs=NEEDS,
        settings={"algorithm.base": "simpo", "algorithm.beta": 2.0},
        assumed=f"{ASSUMED}; SimPO's beta 2 and margin 0.5",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TReg:
    """Settings of T-REG."""

    base: Literal["dpo", "simpo"] = "dpo"
    """The loss on a pair."""
    beta: float = 0.1
    """Its beta."""
    gap: float = 0.5
    """SimPO's margin."""
    token_coef: float = 0.1
    """alpha, weight of the token regulariser."""
    better: str = "Give an answer that is helpful, honest and harmless. {prompt}"
    """The prompt that asks for a good answer."""
    worse: str = "Give an answer that is useless, false or harmful. {prompt}"
    """The prompt that asks for a bad one."""


@host_op(reads=("better_log_probs", "worse_log_probs"), writes=("token_rewards",))
def contrast(batch: Batch) -> HostResult:
    """r_t of the module's formula, in (-1/2, 1/2)."""
    better, worse = batch["better_log_probs"], batch["worse_log_probs"]
    gap: FloatArray = np.tanh((better.values.astype(np.float64) - worse.values) / 2) / 2
    metrics = {"token_reward_size": Mean(float(np.abs(gap).sum()), float(len(gap)))} if len(gap) else {}
    return HostResult(
        columns=Batch({"token_rewards": Column(gap.astype(np.float32), better.offsets)}, batch.num_rows),
        metrics=metrics,
    )


@loss(reads=("token_rewards", "ref_log_probs"), average="groups")
def token_regulariser(model, rows):
    """-sum_t r_t log pi/pi_ref, of both responses."""
    per_token = rows["token_rewards"] * (model.log_probs - rows["ref_log_probs"])
    value = -rows.sum_groups(rows.sum_tokens(per_token))
    return value, {"token_regulariser": value.detach()}


@recipe
def t_reg(pairs: Preferences, actor: Actor, reference: Reference, cfg: TReg) -> None:
    """Pairs, and tokens that the model itself finds good."""
    for side, question in (("better", cfg.better), ("worse", cfg.worse)):
        asked = actor.encode(pairs, template=Template(question))
        asked = reference.compute_ref_log_prob(asked, out=f"{side}_log_probs")
        pairs = pairs.with_columns_of(asked, **{f"{side}_log_probs": f"{side}_log_probs"})
    pairs = reference.compute_ref_log_prob(contrast(pairs))
    base = dpo(cfg.beta) if cfg.base == "dpo" else simpo(cfg.beta, cfg.gap)
    actor.update_actor([(pairs, base), (pairs, token_regulariser(), cfg.token_coef)])
