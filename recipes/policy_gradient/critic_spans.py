"""Rewards of parts of a text that a language model has marked (DRLC, Cao et al. 2024, arXiv 2401.07382).

    r_t = c 1[t in a good part] - c 1[t in a bad part] + r(y) 1[t = T] - beta log pi/pi_ref          PPO

    drlc        the critic is another model, or the policy itself (`self_critique`); the reward of the end stays
    text2grad   the marks are all there is, +1 and -1, of a model that writes critiques (2505.22338; trained by sft)

The critic copies parts of the response; a part that is not in it, letter for letter, marks nothing, and is counted.
"""

from dataclasses import dataclass

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.parsers import Pattern
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Critic, Judge, Prompts, Reference, Reward, Speller
from rlhf_dist.transforms import span_rewards

QUESTION = """\
Prompt: {prompt}

Response: {response}

Criticise the response. Then copy the parts of it that are good, and those that are bad, word for word, with | between
two parts:

Good: ... | ...
Bad: ... | ..."""
PAPERS = {
    "critic_spans": Paper(
        title="DRLC: dense rewards from a critic",
        year=2024,
        arxiv="2401.07382",
        rows=(140,),
        needs=("JUDGE", "TOK", "ROLL", "CRIT"),
        assumed="c 0.1; our own words of the question",
    ),
    "self_critique": Paper(
        title="DRLC with a policy that criticises itself",
        year=2024,
        arxiv="2401.07382",
        rows=(140,),
        needs=("JUDGE", "TOK", "ROLL", "CRIT"),
        settings={"algorithm.self_critique": True},
        assumed="c 0.1; our own words of the question; the policy as it is now, not as it began",
    ),
    "text2grad": Paper(
        title="Text2Grad",
        year=2025,
        arxiv="2505.22338",
        rows=(141,),
        status="outline",
        needs=("JUDGE", "TOK", "RMT", "SFT", "ROLL", "CRIT"),
        settings={"algorithm.span_value": 1.0, "algorithm.outcome_coef": 0.0},
        assumed="the scale 1 of the marks; the model that writes them is given, its training is the recipe sft",
    ),
}


@dataclass(frozen=True, kw_only=True)
class CriticSpans(WithCritic):
    """Settings of PPO on marked parts."""

    span_value: float = 0.1
    """c."""
    outcome_coef: float = 1.0
    """Weight of the reward at the end; 0 for none, and then it is not asked for."""
    self_critique: bool = False
    """The policy marks its own responses."""
    question: str = QUESTION
    """What the critic is asked about {prompt} and {response}."""
    good: str = "Good:"
    """What stands before the good parts in its answer."""
    bad: str = "Bad:"
    """What stands before the bad ones, behind these."""


@host_op(reads=("response_mask",), writes=("rewards",))
def no_outcome(batch: Batch) -> Batch:
    """A reward of 0 at the end."""
    return Batch({"rewards": Column(np.zeros(batch.num_rows, np.float32))}, batch.num_rows)


@host_op(reads=("rewards",), writes=("rewards",))
def weighed(batch: Batch, *, coef: float) -> Batch:
    """coef times the reward."""
    return Batch({"rewards": Column((coef * batch["rewards"].values).astype(np.float32))}, batch.num_rows)


@recipe
def critic_spans(
    prompts: Prompts,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    judge: Judge,
    speller: Speller,
    reward: Reward,
    cfg: CriticSpans,
) -> None:
    """PPO on what a critic finds good and bad, word by word."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    marks = Pattern(f"{cfg.good}(?P<good_parts>.*?){cfg.bad}(?P<bad_parts>.*)")
    marker = actor if cfg.self_critique else judge
    said = marker.generate_sequences(batch, template=Template(cfg.question), parser=marks)
    batch = speller.spell(batch, of="actor").join(said, on="child", good_parts="good_parts", bad_parts="bad_parts")
    value = cfg.span_value
    batch = span_rewards(batch, spans={"good_parts": value, "bad_parts": -value}, separator="|")
    batch = weighed(reward.compute_reward(batch), coef=cfg.outcome_coef) if cfg.outcome_coef else no_outcome(batch)
    learn_with_critic(batch, actor, critic, reference, cfg, dense=True)
