"""CycleAlign (Hong et al. 2023, arXiv 2310.16271): a judge and a policy rank the same responses, and learn where they
agree.

    white box   the policy's own ranking, by mean log pi(y_t)
    black box   a judge's, which reads demonstrations first
    agreed      the longest list of responses that both have in one order: the policy learns it by the ranking loss of
                PRO, and the best-agreed list of a step is the judge's demonstration in the next one

Both get better in turn: the judge by demonstrations of what the policy knows, the policy by what the judge confirms.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.online_preference.cream import kendall
from recipes.preference._lists import list_loss
from rlhf_dist.algorithms.ragged import sum_rows
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.parsers import Numbers
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Judge, Prompts, State, state_op
from rlhf_dist.transforms import list_scores, listed

QUESTION = """\
Grade every response to the prompt from 0 (useless) to 10 (could not be better).

{demonstrations}Prompt: {prompt}

{listing}

Compare them in a few sentences. Then write on a line of its own "Score:" and the numbers, in order, with commas."""
PAPERS = {
    "cyclealign": Paper(
        title="CycleAlign",
        year=2023,
        arxiv="2310.16271",
        rows=(68,),
        needs=("ROLL", "XLM", "JUDGE", "PREF"),
        assumed="PRO's loss, its likelihood weighed 0.05; one demonstration, of the step before; the wording",
    )
}


@dataclass(frozen=True, kw_only=True)
class CycleAlign:
    """Settings of CycleAlign."""

    samples_per_prompt: int = 4
    """Responses to each prompt: the list."""
    question: str = QUESTION
    """What the judge is asked about {prompt} and {listing}, behind {demonstrations}."""
    marker: str = "Score:"
    """What stands before the numbers in its answer."""
    nll_coef: float = 0.05
    """Weight of the best response's likelihood."""


class Demonstrations(State):
    """The best-agreed list of the step before, as text."""

    def initial(self, cfg: CycleAlign) -> dict[str, Any]:
        return {"text": ""}

    @state_op(reads=("prompt",), writes=("demonstrations",))
    def shown(self, values: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], HostResult]:
        """The text for every row."""
        column = Column.strings([values["text"]] * batch.num_rows)
        return values, HostResult(columns=Batch({"demonstrations": column}, batch.num_rows))

    @state_op(reads=("prompt", "response", "rewards", "group_id"))
    def remember(self, values: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], dict[str, Mean]]:
        """The longest list of the step, the first of several; the old one stays where there is none."""
        groups = batch.group()
        if not groups:
            return values, {}
        longest = max(groups, key=len)
        order = longest[np.argsort(-batch["rewards"].values[longest], kind="stable")]
        said = "\n".join(f"{place}. {batch['response'].row(int(row))}" for place, row in enumerate(order, start=1))
        text = f"Prompt: {batch['prompt'].row(int(order[0]))}\nFrom the best response to the worst:\n{said}\n\n"
        return {"text": text}, {"demonstration_length": Mean(float(len(order)))}


@host_op(reads=("old_log_probs", "response_mask", "rewards", "group_id"), rows="drop", scope="groups", least_group=2)
def agreed(batch: Batch) -> HostResult:
    """Of each group the longest list that the judge's scores and the policy's mean log-probs order alike, strictly.
    Groups without two such rows are dropped. `ranking_agreement`: Kendall's tau of both."""
    mask, scores = batch["response_mask"], batch["rewards"].values
    counted = mask.values > 0
    lengths = sum_rows(counted, mask.offsets).clip(min=1)
    mean = sum_rows(batch["old_log_probs"].values * counted, mask.offsets) / lengths
    keep, taus = list[int](), list[float]()
    for rows in batch.group():
        taus += [kendall(scores[rows], mean[rows])] if len(rows) > 1 else []
        chain = longest_rise(scores[rows], mean[rows])
        keep += rows[chain].tolist() if len(chain) > 1 else []
    metrics = {"agreed_rows": Mean(float(len(keep)), float(batch.num_rows))} if batch.num_rows else {}
    metrics |= {"ranking_agreement": Mean(sum(taus), float(len(taus)))} if taus else {}
    kept = np.sort(np.array(keep, np.int64))
    return HostResult(columns=Batch({}, len(kept)), keep=kept, metrics=metrics)


def longest_rise(one: np.ndarray, other: np.ndarray) -> list[int]:
    """Places of the longest list along which both rise; the first found of several."""
    order = np.argsort(one, kind="stable")
    chains: list[list[int]] = []
    for place in order:
        before = [chain for chain in chains if one[chain[-1]] < one[place] and other[chain[-1]] < other[place]]
        chains.append([*max(before, key=len, default=[]), int(place)])
    return max(chains, key=len, default=[])


@recipe
def cyclealign(prompts: Prompts, actor: Actor, judge: Judge, demonstrations: Demonstrations, cfg: CycleAlign) -> None:
    """A ranking loss on what judge and policy agree on."""
    batch = actor.compute_log_prob(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    asked = demonstrations.shown(listed(batch))
    verdicts = judge.generate_sequences(asked, template=Template(cfg.question), parser=Numbers(cfg.marker))
    judged, _ = list_scores(batch, verdicts).where("judged")
    lists = agreed(judged)
    actor.update_actor(lists, loss=list_loss("pro", nll_coef=cfg.nll_coef))
    demonstrations.remember(lists)
