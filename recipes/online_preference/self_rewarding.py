"""Self-rewarding language models (Yuan et al. 2024, arXiv 2401.10020): the policy judges its own responses.

Each response gets the mean of several scores from 0 to 5, by the paper's additive prompt; the best and the worst of a
prompt make a pair for DPO, whose reference is the policy of the iteration before. Prompts come from the data: the paper
has the policy write new ones, too. Steps of an iteration are not given and are assumed.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import dpo
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.parsers import Number
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Prompts, Reference
from rlhf_dist.transforms import keep_best_and_worst, verdict_means

ADDITIVE = """\
Review the user's question and the corresponding response using the additive 5-point scoring system described below. \
Points are accumulated based on the satisfaction of each criterion:
- Add 1 point if the response is relevant and provides some information related to the user's inquiry, even if it is \
incomplete or contains some irrelevant content.
- Add another point if the response addresses a substantial portion of the user's question, but does not completely \
resolve the query or provide a direct answer.
- Award a third point if the response answers the basic elements of the user's question in a useful way, regardless of \
whether it seems to have been written by an AI Assistant or if it has elements typically found in blogs or search \
results.
- Grant a fourth point if the response is clearly written from an AI Assistant's perspective, addressing the user's \
question directly and comprehensively, and is well-organized and helpful, even if there is slight room for improvement \
in clarity, conciseness or focus.
- Bestow a fifth point for a response that is impeccably tailored to the user's question by an AI Assistant, without \
extraneous information, reflecting expert knowledge, and demonstrating a high-quality, engaging, and insightful answer.

User: {prompt}

<response>{response}</response>

After examining the user's instruction and the response:
- Briefly justify your total score, up to 100 words.
- Conclude with the score using the format: "Score: <total points>"

Remember to assess from the AI Assistant perspective, utilizing web search knowledge as necessary. To evaluate the \
response in alignment with this additive scoring model, we'll systematically attribute points based on the outlined \
criteria."""


PAPERS = {
    "self_rewarding": Paper(
        title="Self-rewarding language models",
        year=2024,
        arxiv="2401.10020",
        rows=(81,),
        status="outline",
        needs=("ROLL", "JUDGE", "PAIR", "PREF", "SNAP", "SAMP", "SFT"),
        assumed="steps of an iteration; prompts come from the data, where the policy writes new ones",
    )
}


@dataclass(frozen=True, kw_only=True)
class SelfRewarding:
    """Settings of self-rewarding."""

    samples_per_prompt: int = 4
    """Responses to each prompt."""
    votes: int = 3
    """Scores of each response, which are averaged."""
    question: str = ADDITIVE
    """What the policy is asked about {prompt} and {response}."""
    marker: str = "Score:"
    """What stands before the score in its answer."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""
    iteration: int = 100
    """Steps after which the policy becomes the reference."""


@recipe
def self_rewarding(prompts: Prompts, actor: Actor, reference: Reference, cfg: SelfRewarding) -> None:
    """DPO on what the policy itself thinks best and worst."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    score = Number(cfg.marker, low=0, high=5)
    verdicts = actor.generate_sequences(batch, template=Template(cfg.question), parser=score, n=cfg.votes)
    judged, _ = verdict_means(batch, verdicts).where("judged")
    pairs = reference.compute_ref_log_prob(keep_best_and_worst(judged))
    actor.update_actor(pairs, loss=dpo(cfg.beta))
    reference.copy_from(actor, every=cfg.iteration)
