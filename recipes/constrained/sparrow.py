"""Sparrow (Glaese et al. 2022, arXiv 2209.14375): what is preferred, and rules that a response must not break.

    r(y) = r_pref(y) - w sum_i s(rule_i(y)) - c |y|               rule_i: a classifier that reads rule i and the talk
    A2C:  L = -(R - V(s_t)) log pi(y_t)

Rules are texts. One classifier reads each of them before the prompt, so that a new rule needs no new model; it is
trained as a binary reward model on rows of (rule, talk, broken or not). With `self_play` the policy also asks: half of
the prompts are what it says when it is to speak for the user.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import policy_gradient, value_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.parsers import Pattern
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Critic, Prompts, RewardModel
from rlhf_dist.transforms import gae

QUESTION = r"(?s)(?P<question>.*\S.*)"
"""Whatever is not empty."""
ASSUMED = "the weights, the rules (three of 23) and all wordings; evidence, where there is any, stands in the prompt"
NEEDS = ("RMT", "MRM", "ROLL", "CRIT", "SAMP", "TURN")
PAPERS = {
    "sparrow": Paper(
        title="Sparrow: targeted rule judgements",
        year=2022,
        arxiv="2209.14375",
        rows=(7,),
        status="outline",
        needs=NEEDS,
        assumed=ASSUMED,
    ),
    "self_play": Paper(
        title="Sparrow with prompts by self-play",
        year=2022,
        arxiv="2209.14375",
        rows=(7,),
        status="outline",
        needs=NEEDS,
        settings={"algorithm.self_play": True},
        assumed=ASSUMED,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sparrow:
    """Settings of Sparrow."""

    rules: tuple[str, ...] = (
        "Do not pretend to have a body or be able to move in a body.",
        "Do not use stereotypes or make any other harmful generalising statements about groups of people.",
        "Do not build a relationship to the user.",
    )
    """What must not be broken."""
    rule_weight: float = 1.0
    """w, of the sum of the chances that they are."""
    length_price: float = 0.0
    """c, taken off for each token of the response."""
    rule_prompt: str = "Rule: {rule}\n\n{prompt}"
    """What the classifier reads before the response, of {rule} and {prompt}."""
    self_play: bool = False
    """Ask for the user's next question, and answer that too."""
    user_turn: str = "{prompt}\n\nSomething else that a user might ask:"
    """What the policy goes on from to ask."""
    samples_per_prompt: int = 1
    """Responses to each prompt."""
    value_clip: float = 0.0
    """A new value may move this far from the old one; 0 for any distance."""


@host_op(reads=("prompt_ids",), writes=("rule",))
def under_rule(batch: Batch, *, rule: str) -> Batch:
    """The rule beside each row."""
    return Batch({"rule": Column.strings([rule] * batch.num_rows)}, batch.num_rows)


@host_op(
    reads=lambda settings: ("rewards", "response_mask", *(f"broken_{k}" for k in range(settings["rules"]))),
    writes=("rewards",),
)
def judged(batch: Batch, *, rules: int, weight: float, price: float) -> HostResult:
    """r of the module; a classifier's number is the log-odds that its rule is broken."""
    odds = np.stack([batch[f"broken_{k}"].values.astype(np.float64) for k in range(rules)])
    broken = (1 + np.tanh(odds / 2)) / 2
    rewards = batch["rewards"].values - weight * broken.sum(0) - price * batch["response_mask"].lengths
    rows = float(batch.num_rows)
    metrics = {"preferred": Mean(float(batch["rewards"].values.sum()), rows)}
    metrics |= {f"rule_{k}_broken": Mean(float(one.sum()), rows) for k, one in enumerate(broken)}
    columns = Batch({"rewards": Column(rewards.astype(np.float32))}, batch.num_rows)
    return HostResult(columns=columns, metrics=metrics if batch.num_rows else {})


@recipe
def sparrow(
    prompts: Prompts, actor: Actor, critic: Critic, preference: RewardModel, classifier: RewardModel, cfg: Sparrow
) -> None:
    """A2C on preferences less broken rules."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    if cfg.self_play:
        said = actor.generate_sequences(prompts, template=Template(cfg.user_turn), parser=Pattern(QUESTION))
        asked, _ = said.where("parsed")
        batch = batch.concat(actor.generate_sequences(asked, template=Template("{question}"), n=cfg.samples_per_prompt))
    batch = preference.compute_reward(batch)
    for number, rule in enumerate(cfg.rules):
        ruled = actor.encode(under_rule(batch, rule=rule), template=Template(cfg.rule_prompt))
        ruled = classifier.compute_reward(ruled, out=f"broken_{number}")
        batch = batch.with_columns_of(ruled, **{f"broken_{number}": f"broken_{number}"})
    batch = judged(batch, rules=len(cfg.rules), weight=cfg.rule_weight, price=cfg.length_price)
    batch = gae(critic.compute_values(batch), gamma=1.0, lam=1.0)
    critic.update_critic(batch, loss=value_clip(cfg.value_clip))
    actor.update_actor(batch, loss=policy_gradient())
