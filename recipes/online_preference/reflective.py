"""PRS: preference-guided reflective sampling (Ye and Ng 2024, arXiv 2408.12163): a tree of two layers, not n samples.

    y_1 ... y_N/2 ~ pi(. | x),      y* = argmax r(x, p, y_i),   f ~ pi(. | x, p, y*)   what could be better
    y_N/2+1 ... y_N ~ pi(. | x, p, y*, f)

p is the preference in words, a part of the two questions that follow the first layer. What was refined is a response
to the prompt itself: all N are compared by the reward, and the policy learns from them as from any, by DPO on the best
and the worst or by likelihood of the best.
"""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import dpo, nll
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import best_of_group, keep_best_and_worst

FEEDBACK = """\
Prompt: {prompt}

Response: {response}

A response should be helpful, true and no longer than it must be. Say how this one can be better."""
REFINE = """\
Prompt: {asked}

A response: {draft}

How it can be better: {response}

A response should be helpful, true and no longer than it must be. Respond to the prompt, better than before."""
NEEDS = ("ROLL", "RM", "ALT", "TREE", "BRANCH", "PREF")
PAPERS = {
    "reflective": Paper(
        title="PRS: preference-guided reflective sampling, with DPO",
        year=2024,
        arxiv="2408.12163",
        rows=(86,),
        status="outline",
        needs=NEEDS,
        assumed="one preference for all prompts, in our own words; the first layer reads the prompt alone",
    ),
    "best": Paper(
        title="PRS, with likelihood of the best",
        year=2024,
        arxiv="2408.12163",
        rows=(86,),
        status="outline",
        needs=NEEDS,
        settings={"algorithm.learner": "nll"},
        assumed="one preference for all prompts, in our own words; the first layer reads the prompt alone",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Reflective:
    """Settings of reflective sampling."""

    samples_per_layer: int = 4
    """N/2: responses to each prompt, and as many refined ones."""
    feedback: str = FEEDBACK
    """What the policy is asked about {prompt} and {response}, with the preference in words."""
    refine: str = REFINE
    """What it is asked about {asked}, {draft} and the feedback, {response}."""
    learner: Literal["dpo", "nll"] = "dpo"
    """DPO on the best and the worst, or the likelihood of the best."""
    beta: float = 0.1
    """DPO's strength of the pull towards the reference."""


@recipe
def reflective(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: Reflective) -> None:
    """Responses, the best of them refined, and what is best of all."""
    drafts = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_layer))
    best = best_of_group(drafts)
    feedback = actor.generate_sequences(best, template=Template(cfg.feedback))
    feedback = feedback.join(best, on="parent", asked="prompt", draft="response")
    refined = actor.generate_sequences(feedback, template=Template(cfg.refine), n=cfg.samples_per_layer)
    # From here on they are responses to the prompt, which the policy did not read when it drew them.
    refined = refined.join(best, prompt_ids="prompt_ids", prompt="prompt")
    batch = drafts.concat(reward.compute_reward(refined)).drop("rollout_log_probs")
    if cfg.learner == "nll":
        actor.update_actor(best_of_group(batch), loss=nll())
    else:
        actor.update_actor(reference.compute_ref_log_prob(keep_best_and_worst(batch)), loss=dpo(cfg.beta))
