"""Beams of partial responses, scored as they grow: DeAL (Huang et al. 2024, arXiv 2402.06147). Nothing learns.

    every state is followed by `expand` steps of `step_tokens` tokens; of a prompt's states the `width` best stay

    look_ahead > 0    a state is scored with a greedy continuation of so many tokens, which is thrown away     DeAL
    look_ahead 0      a state is scored as it is, by a reward model of steps                           BPP-Search
    pick=resample     states are drawn with probability softmax(V / beta), which turns samples of the policy p
                      into samples of p(s) exp(V(s) / beta)                              value augmented sampling

Responses that ended are set aside with their score, and compete at last: the best by score, or by a judge that compares
them in pairs, in both orders (`final=pairs`). The reward is a role: a rule, a reward model, a value model of
step_values or vas.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.parsers import Choice
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Judge, Opponent, Prompts, Reward
from rlhf_dist.transforms import best_of_group, both_orders, win_rates

PAPERS = {
    "guided_decoding": Paper(
        title="DeAL: decoding-time alignment",
        year=2024,
        arxiv="2402.06147",
        rows=(193,),
        needs=("ROLL", "RM", "TREE"),
        assumed="candidates are drawn in steps of several tokens; a response that ended has no look-ahead",
    ),
    "bpp_search": Paper(
        title="BPP-Search",
        year=2024,
        arxiv="2411.17404",
        rows=(197,),
        status="outline",
        needs=("TREE", "RMT", "PAIRJ"),
        settings={"algorithm.look_ahead": 0, "algorithm.final": "pairs"},
        assumed="a generative judge in place of the trained preference model; steps of a fixed number of tokens",
    ),
    "value_augmented": Paper(
        title="Value augmented sampling, its decoding",
        year=2024,
        arxiv="2405.06639",
        rows=(194,),
        status="outline",
        needs=("CRIT", "ROLL", "RM", "TREE"),
        settings={
            **{"algorithm.look_ahead": 0, "algorithm.pick": "resample", "algorithm.width": 1},
            **{"algorithm.step_tokens": 1, "algorithm.steps": 256},
        },
        assumed="`expand` samples of the next token in place of its top k, 256 of them; the value model is vas's",
    ),
}
QUESTION = """\
Which response to the prompt is better?

Prompt: {prompt}

Response 1: {response_a}

Response 2: {response_b}

Say "Better: 1" or "Better: 2"."""


@dataclass(frozen=True, kw_only=True)
class GuidedDecoding:
    """Settings of guided decoding."""

    steps: int = 8
    """Rounds: a response has at most so many steps."""
    step_tokens: int = 32
    """Tokens of a step."""
    expand: int = 4
    """Steps from each state."""
    width: int = 2
    """States of each prompt that stay."""
    look_ahead: int = 32
    """Tokens of the greedy continuation that a state is scored with; 0 for none."""
    pick: Literal["best", "resample"] = "best"
    """How states are chosen."""
    beta: float = 0.1
    """Of resample: temperature of values."""
    final: Literal["score", "pairs"] = "score"
    """What decides between whole responses."""
    question: str = QUESTION
    """Of pairs: what the judge is asked."""
    marker: str = "Better:"
    """What stands before its verdict."""


@host_op(reads=("prompt",), writes=("so_far",))
def nothing_yet(batch: Batch) -> Batch:
    """An empty response."""
    return Batch({"so_far": Column.strings([""] * batch.num_rows)}, batch.num_rows)


@host_op(reads=("so_far", "response", "finished"), writes=("so_far", "ended"))
def one_step_more(batch: Batch) -> Batch:
    """The step's text behind what was there, and whether the response has ended with it."""
    texts = [before + step for before, step in zip(batch["so_far"].rows(), batch["response"].rows(), strict=True)]
    ended = batch["finished"].values.astype(np.float32)
    return Batch({"so_far": Column.strings(texts), "ended": Column(ended)}, batch.num_rows)


@host_op(reads=lambda s: ("so_far", "ended", *(("response",) if s["ahead"] else ())), writes=("response",))
def whole_text(batch: Batch, *, ahead: bool) -> Batch:
    """The whole response as its text, with the look-ahead where it goes on."""
    texts = batch["so_far"].rows()
    if ahead:
        more = zip(texts, batch["response"].rows(), batch["ended"].values, strict=True)
        texts = [text if ended else text + step for text, step, ended in more]
    return Batch({"response": Column.strings(texts)}, batch.num_rows)


@host_op(reads=("prompt_ids", "response_ids"), writes=("prompt_ids",))
def as_state(batch: Batch) -> Batch:
    """The step behind the prompt, where the next one goes on."""
    pairs = zip(batch["prompt_ids"].rows(), batch["response_ids"].rows(), strict=True)
    return Batch({"prompt_ids": Column.ragged([np.concatenate(pair) for pair in pairs], "int32")}, batch.num_rows)


@host_op(reads=("rewards", "group_id"), rows="drop", scope="batch")
def chosen_states(
    batch: Batch, *, width: int, pick: Literal["best", "resample"], beta: float, rng: np.random.Generator
) -> HostResult:
    """`width` states of each group: the best (the first of equal ones), or drawn by exp(value / beta), each once."""
    kept = list[int]()
    for rows in batch.group():
        values = batch["rewards"].values[rows].astype(np.float64)
        if pick == "resample":  # the largest of values with Gumbel noise: draws without replacement
            values = values / beta + rng.gumbel(size=len(rows))
        kept += rows[np.argsort(-values, kind="stable")[:width]].tolist()
    keep = np.sort(np.array(kept, dtype=np.int64))
    value = Mean(float(batch["rewards"].values[keep].sum()), float(len(keep)))
    return HostResult(columns=Batch({}, len(keep)), keep=keep, metrics={"state_value": value})


@recipe
def guided_decoding(prompts: Prompts, policy: Opponent, reward: Reward, judge: Judge, cfg: GuidedDecoding) -> None:
    """Search with a reward over the steps of a frozen policy."""
    states, whole = nothing_yet(prompts), []
    for _ in range(cfg.steps):
        states = one_step_more(policy.generate_sequences(states, n=cfg.expand, max_tokens=cfg.step_tokens))
        if cfg.look_ahead:
            states = policy.generate_sequences(states, greedy=True, max_tokens=cfg.look_ahead, prefix="response_ids")
        states = reward.compute_reward(whole_text(states, ahead=cfg.look_ahead > 0))
        if not cfg.look_ahead:
            states = as_state(states)
        states = whole_text(states, ahead=False)
        ended, states = chosen_states(states, width=cfg.width, pick=cfg.pick, beta=cfg.beta).where("ended")
        whole.append(ended)
    found = states.concat(*whole)
    if cfg.final == "pairs":
        choice = Choice({"1": 1.0, "2": 0.0}, after=cfg.marker)
        asked = both_orders(found, rounds=cfg.width)
        verdicts = judge.generate_sequences(asked, template=Template(cfg.question), parser=choice)
        found, _ = win_rates(found, verdicts, column="choice", into="rewards").where("judged")
    best_of_group(found)
