"""Online DPO on a judge's preferences, OAIF (Guo et al. 2024, arXiv 2402.04792): two responses, asked in both orders.

    P(y > y') = (P("1" | y, y') + 1 - P("1" | y', y)) / 2          a mean over votes in either order, ties a half

A pair that both orders leave at a tie, or that has no verdict in one of them, teaches nothing and is counted.
"""

from dataclasses import dataclass

from recipes.online_preference._compared import compared
from rlhf_dist.algorithms import dpo
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Judge, Prompts, Reference
from rlhf_dist.transforms import keep_best_and_worst

QUESTION = """\
A good response is helpful, correct and to the point. Which of two responses to a prompt is better?

Prompt: {prompt}

Response 1: {response_a}

Response 2: {response_b}

Compare them in a sentence or two. Then write on a line of its own "Better: 1", "Better: 2" or "Better: tie"."""


PAPERS = {
    "oaif": Paper(
        title="Online AI feedback (OAIF)",
        year=2024,
        arxiv="2402.04792",
        needs=("ROLL", "JUDGE", "PAIR", "PREF", "REF"),
        assumed="the wording of the question",
    )
}


@dataclass(frozen=True, kw_only=True)
class OAIF:
    """Settings of online DPO with a judge."""

    votes: int = 1
    """Verdicts on each pair in each order."""
    question: str = QUESTION
    """What the judge is asked about {prompt}, {response_a} and {response_b}."""
    marker: str = "Better:"
    """What stands before 1, 2 or tie in its answer."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""


@recipe
def oaif(prompts: Prompts, actor: Actor, reference: Reference, judge: Judge, cfg: OAIF) -> None:
    """DPO on pairs that a frozen language model has an opinion of."""
    batch = actor.generate_sequences(prompts, n=2)
    judged, _ = compared(batch, judge, cfg.question, cfg.marker, votes=cfg.votes).where("judged")
    pairs = reference.compute_ref_log_prob(keep_best_and_worst(judged))
    actor.update_actor(pairs, loss=dpo(cfg.beta))
