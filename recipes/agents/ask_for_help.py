"""When to ask for help under a budget, found by dynamic programming and learnt by imitation (self-regulation, Min et
al. 2025, arXiv 2502.04576).

    s_t   a process reward model's score of turn t without help;   h the score of a turn with help
    V(t, c) = max(s_t + V(t + 1, c),  h + V(t + 1, c - 1)),   V(T, .) = 0,   c <= C interventions are left
    label   ask where the second is larger, on the best path from V(0, C)
    helper  SFT on (what was said before turn t, label)

The labels need no search at run time: the helper reads a conversation and says whether it is time to ask.
"""

import json
from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import nll
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.metrics import Mean
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Critic, LanguageModel, Opponent, Prompts

PAPERS = {
    "ask_for_help": Paper(
        title="Self-regulation and requesting interventions",
        year=2025,
        arxiv="2502.04576",
        rows=(180,),
        status="outline",
        needs=("TURN", "RM", "XLM", "SFT"),
        assumed="scores of turns add up; a turn with help scores 1; the process reward model is given",
    )
}


def interventions(scores: np.ndarray, helped: float, budget: int) -> list[bool]:
    """[T] turns in which to ask, by the table V of the file's beginning; not to ask where both are as good."""
    turns = len(scores)
    table = np.zeros((turns + 1, budget + 1))
    for turn in range(turns - 1, -1, -1):
        for left in range(budget + 1):
            alone = scores[turn] + table[turn + 1, left]
            table[turn, left] = max(alone, helped + table[turn + 1, left - 1]) if left else alone
    asks, left = list[bool](), budget
    for turn in range(turns):
        ask = left > 0 and helped + table[turn + 1, left - 1] > scores[turn] + table[turn + 1, left]
        asks.append(bool(ask))
        left -= ask
    return asks


@dataclass(frozen=True, kw_only=True)
class Steps(Environment):
    """Turns of the agent on its own, whose worth a model says."""

    rewards = False
    turns: int
    turn_tokens: int

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        for _ in range(self.turns):
            await chat.generate(max_tokens=self.turn_tokens)
            chat.say("\nnext: ")


@host_op(
    reads=("turn", "values", "transcript"),
    writes=("state", "decision"),
    rows="derive",
    copies=lambda settings: settings["most"],
    scope="rows",
)
def labels(batch: Batch, *, helped: float, budget: int, ask: str, go_on: str, most: int) -> HostResult:
    """A row for each of the first `most` turns of an episode: what was there before it, and what to do. The score of a
    turn is the model's value at its last token."""
    offsets = batch["turn"].offsets
    assert offsets is not None, "one number a token"
    states, decisions, parents = list[str](), list[str](), list[int]()
    for row, text in enumerate(batch["transcript"].rows()):
        turn = batch["turn"].values[offsets[row] : offsets[row + 1]]
        values = batch["values"].values[offsets[row] : offsets[row + 1]]
        ends = [np.flatnonzero(turn == one)[-1] for one in range(int(turn.max(initial=-1)) + 1)]
        asks = interventions(values[ends].astype(np.float64), helped, budget)[:most]
        said = ""
        for piece in json.loads(text):
            if piece["who"] == "model" and piece["turn"] < len(asks):
                states.append(said)
                decisions.append(ask if asks[piece["turn"]] else go_on)
                parents.append(row)
            said += piece["text"]
    asked = float(sum(one == ask for one in decisions))
    return HostResult(
        columns=Batch({"state": Column.strings(states), "decision": Column.strings(decisions)}, len(states)),
        parent=np.array(parents, np.int64),
        metrics={"asked": Mean(asked, float(len(decisions)))},
    )


@dataclass(frozen=True, kw_only=True)
class AskForHelp:
    """Settings of learning when to ask."""

    budget: int = 1
    """C: interventions in an episode, at most."""
    helped: float = 1.0
    """h: score of a turn with help."""
    turns: int = 4
    """Turns of an episode."""
    turn_tokens: int = 64
    """Most tokens of a turn."""
    samples_per_prompt: int = 4
    """Episodes of each prompt."""
    ask: str = "ask"
    """How the helper says that help is needed."""
    go_on: str = "go on"
    """How it says that it is not."""
    question: str = "{state}\nask or go on: "
    """What the helper is asked, with `state`."""
    seconds: float = 120.0
    """Longest that an episode may take."""


@recipe
def ask_for_help(prompts: Prompts, agent: Opponent, scorer: Critic, helper: LanguageModel, cfg: AskForHelp) -> None:
    """Label turns of a frozen agent, and teach the helper the labels."""
    batch = agent.run_episodes(
        prompts,
        environment=Steps(turns=cfg.turns, turn_tokens=cfg.turn_tokens),
        n=cfg.samples_per_prompt,
        limits=EpisodeLimits(turns=cfg.turns, seconds=cfg.seconds),
    )
    batch = scorer.compute_values(batch)
    rows = labels(batch, helped=cfg.helped, budget=cfg.budget, ask=cfg.ask, go_on=cfg.go_on, most=cfg.turns)
    rows = helper.encode(rows, template=Template(cfg.question), response="decision")
    helper.update(rows, loss=nll())
