"""UltraFeedback (Cui et al. 2023, arXiv 2310.01377): responses of several models, graded in four aspects by a judge.

    score(y) = mean of four grades from 1 to 5, each with a critique of its own
    UltraRM    -log sigma(r(w) - r(l)),  w and l the best and the worst of a prompt's responses
    UltraCM    -log pi(critique | question about x and y)         a model that learns to write the critiques

Best-of-n and PPO with UltraRM are recipes of their own (rejection, ppo). The critique model has the judge's tokenizer.
"""

from dataclasses import dataclass

from rlhf_dist.algorithms import bradley_terry, nll
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.parsers import Number
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Judge, Opponent, Prompts, RewardModel
from rlhf_dist.transforms import combine_rewards, keep_best_and_worst, verdict_means

ASPECTS = {
    "following": "how well it follows the instruction",
    "truthful": "whether it is true, without errors and inventions",
    "honest": "whether it says how sure it is, and is as sure as it should be",
    "helpful": "how much it helps whoever asks",
}
QUESTION = """\
Review a response in one aspect: ASPECT.

Prompt: {prompt}

Response: {response}

Say in a few sentences what is good and bad. Then write on a line of its own "Score:" and a number from 1 to 5."""
PAPERS = {
    "ultrafeedback": Paper(
        title="UltraFeedback",
        year=2023,
        arxiv="2310.01377",
        rows=(118,),
        needs=("JUDGE", "FILT", "RMT", "PREF", "SFT"),
        assumed="two models answer; our own words of the four questions; best and worst in place of all pairs",
    )
}


@dataclass(frozen=True, kw_only=True)
class UltraFeedback:
    """Settings of learning from graded responses."""

    samples_per_model: int = 2
    """Responses of each of the two models to each prompt."""
    question: str = QUESTION
    """What the judge is asked about {prompt} and {response}; ASPECT stands for the aspect's words."""
    marker: str = "Score:"
    """What stands before the grade in its answer."""
    critic: bool = True
    """Train a critique model, too."""


@recipe
def ultrafeedback(
    prompts: Prompts,
    first: Opponent,
    second: Opponent,
    judge: Judge,
    learner: RewardModel,
    critic: Actor,
    cfg: UltraFeedback,
) -> None:
    """A reward model on graded responses, and a model of the critiques."""
    batch = first.generate_sequences(prompts, n=cfg.samples_per_model)
    batch = batch.concat(second.generate_sequences(prompts, n=cfg.samples_per_model))
    said, grade = [], Number(cfg.marker, low=1, high=5)
    for aspect, words in ASPECTS.items():
        template = Template(cfg.question.replace("ASPECT", words))
        verdicts = judge.generate_sequences(batch, template=template, parser=grade)
        batch = verdict_means(batch, verdicts, into=aspect)
        said.append(verdicts)
    pairs = keep_best_and_worst(combine_rewards(batch, scores=tuple(ASPECTS), how="mean"))
    learner.update_reward_model(pairs, loss=bradley_terry())
    if cfg.critic:
        critiques, _ = said[0].concat(*said[1:]).where("parsed")
        critic.update_actor(critiques, loss=nll())
