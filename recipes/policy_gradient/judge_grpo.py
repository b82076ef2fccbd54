"""GRPO on what a judge says: of each response, of pairs of them in both orders, or of the whole group at once.

    pointwise   a score for each response, the mean of several votes (Agnihotri and Pandey 2025, arXiv 2506.05748)
    pairwise    how often a response wins against others of its group (Think-RM, 2505.16265)
    listwise    one answer with a score for every response of the group (RewardAnything, 2506.03637)

Responses without a verdict are left out of their group, and counted.
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.parsers import Choice, Number, Numbers
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Judge, Prompts, Reference, RemoteJudge
from rlhf_dist.transforms import both_orders, grpo_advantage, list_scores, listed, verdict_means, win_rates

POINTWISE = """\
Grade the response to the prompt from 0 (useless) to 10 (could not be better).

Prompt: {prompt}

Response: {response}

Say in a sentence what is good and bad. Then write on a line of its own "Score:" and the number."""

PAIRWISE = """\
Which of two responses to a prompt is better?

Prompt: {prompt}

Response 1: {response_a}

Response 2: {response_b}

Compare them in a sentence or two. Then write on a line of its own "Score: 1", "Score: 2" or "Score: tie"."""

LISTWISE = """\
Grade every response to the prompt from 0 (useless) to 10 (could not be better).

Prompt: {prompt}

{listing}

Compare them in a few sentences. Then write on a line of its own "Score:" and the numbers, in order, with commas."""


PAPERS = {
    "judge_grpo": Paper(
        title="Online RFT with a plug-and-play judge",
        year=2025,
        arxiv="2506.05748",
        rows=(14,),
        status="outline",
        needs=("JUDGE", "ROLL", "CRIT", "RMT"),
        assumed="GRPO in place of PPO; the rubric is the usual question; the judge's adapter is part of its model",
    ),
    "pairwise": Paper(
        title="Think-RM: verdicts on pairs of a group",
        year=2025,
        arxiv="2505.16265",
        rows=(123,),
        status="outline",
        needs=("JUDGE", "PAIRJ", "SFT", "ADV", "ROLL"),
        settings={"algorithm.mode": "pairwise"},
        assumed="the estimator is the share of wins; the judge is given, its own training is not here",
    ),
    "listwise": Paper(
        title="RewardAnything: one call scores the whole group",
        year=2025,
        arxiv="2506.03637",
        rows=(122,),
        status="outline",
        needs=("JUDGE", "CO", "ADV", "ROLL"),
        settings={"algorithm.mode": "listwise"},
        assumed="the judge is given, its own training by GRPO is not here; no principle in the question",
    ),
}


@dataclass(frozen=True, kw_only=True)
class JudgeGRPO:
    """Settings of GRPO with a judge."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    mode: Literal["pointwise", "pairwise", "listwise"] = "pointwise"
    """What the judge is asked about at one time."""
    votes: int = 1
    """Answers of the judge to each question."""
    rounds: int = 1
    """Responses of its group that each one is compared with, pairwise: samples_per_prompt // 2 for all."""
    question: str = ""
    """What the judge is asked, with the same fields; empty for this file's own words."""
    marker: str = "Score:"
    """What stands before the verdict in its answer."""
    remote: bool = False
    """Ask the endpoint of the role `remote` (remote.url, remote.served_model) in place of the model of `judge`."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    kl_coef: float = 0.0
    """Weight of the KL estimate (k3) in the loss; 0 for none, and then no reference is held."""


@recipe
def judge_grpo(
    prompts: Prompts, actor: Actor, reference: Reference, judge: Judge, remote: RemoteJudge, cfg: JudgeGRPO
) -> None:
    """GRPO without a reward function."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    if cfg.mode == "pointwise":
        asked, question, parser, scored = batch, POINTWISE, Number(cfg.marker, low=0, high=10), verdict_means
    elif cfg.mode == "pairwise":
        choice = Choice({"1": 1.0, "2": 0.0, "tie": 0.5}, after=cfg.marker)
        asked, question, parser, scored = both_orders(batch, rounds=cfg.rounds), PAIRWISE, choice, win_rates
    else:
        asked, question, parser, scored = listed(batch), LISTWISE, Numbers(cfg.marker), list_scores
    template = Template(cfg.question or question)
    ask = remote.ask if cfg.remote else judge.generate_sequences
    verdicts = ask(asked, template=template, parser=parser, n=cfg.votes)
    batch, _ = scored(batch, verdicts, column=next(iter(parser.columns))).where("judged")
    if cfg.kl_coef:
        batch = reference.compute_ref_log_prob(batch)
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(cfg.clip, kl_coef=cfg.kl_coef, on_policy=True))
