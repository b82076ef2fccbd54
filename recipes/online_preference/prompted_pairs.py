"""Only-prompting self-rewarding (Xu et al. 2024, arXiv 2409.17534): pairs are made by prompts, and nobody judges.

    y_w ~ pi(. | "answer well", x),   y_l ~ pi(. | "answer badly", x)          DPO on (x, y_w, y_l)

What is learned stands behind the plain prompt. Negatives become harder: after every `every` steps the next of
`negatives` asks for them, each for an answer that is less bad. The reference is the policy of the iteration before.
"""

from dataclasses import dataclass
from typing import Any

from rlhf_dist.algorithms import dpo
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Prompts, Reference, State, state_op
from rlhf_dist.transforms import mark_rows

PAPERS = {
    "prompted_pairs": Paper(
        title="Just say what you want: only-prompting self-rewarding",
        year=2024,
        arxiv="2409.17534",
        rows=(79,),
        status="outline",
        needs=("ROLL", "ALT", "PAIR", "PREF", "SNAP"),
        assumed="all wordings and when they change; the gap is set by prompts alone, not by arithmetic on logits",
    )
}


@dataclass(frozen=True, kw_only=True)
class PromptedPairs:
    """Settings of pairs by prompting."""

    good: str = "{prompt}\n\nAnswer as helpfully, correctly and clearly as you can."
    """What is asked for the chosen response."""
    negatives: tuple[str, ...] = (
        "Answer uselessly and wrongly.",
        "Answer with several mistakes.",
        "Answer well, but with one small flaw.",
    )
    """What is asked for the rejected one, the worst first; put behind {prompt}."""
    every: int = 100
    """Steps after which the next of them is asked for, and the policy becomes the reference."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""


class Curriculum(State):
    """Which negatives are asked for."""

    def initial(self, cfg: PromptedPairs) -> dict[str, Any]:
        return {"step": 0}

    @state_op(reads=("prompt",), writes=("instruction",))
    def instruct(
        self, values: dict[str, Any], batch: Batch, *, negatives: tuple[str, ...], steps: int
    ) -> tuple[dict[str, Any], HostResult]:
        """The instruction of this step, for every prompt. steps: those that each instruction lasts."""
        level = min(values["step"] // steps, len(negatives) - 1)
        column = Column.strings([negatives[level]] * batch.num_rows)
        made = HostResult(columns=Batch({"instruction": column}), metrics={"negatives": Mean(float(level))})
        return {"step": values["step"] + 1}, made


@recipe
def prompted_pairs(
    prompts: Prompts, actor: Actor, reference: Reference, curriculum: Curriculum, cfg: PromptedPairs
) -> None:
    """DPO on what the policy says when it is asked for good and for bad answers."""
    asked = curriculum.instruct(prompts, negatives=cfg.negatives, steps=cfg.every)
    good = actor.generate_sequences(asked, template=Template(cfg.good))
    bad = actor.generate_sequences(asked, template=Template("{prompt}\n\n{instruction}"))
    good, bad = (mark_rows(one, column="label", number=sign) for one, sign in ((good, 1), (bad, -1)))
    pairs = good.concat(bad).drop("rollout_log_probs")
    pairs = pairs.join(prompts, on="parent", prompt_ids="prompt_ids", prompt="prompt")
    actor.update_actor(reference.compute_ref_log_prob(pairs), loss=dpo(cfg.beta))
    reference.copy_from(actor, every=cfg.every)
