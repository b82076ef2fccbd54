"""A reward of few features (Nath et al. 2024, arXiv 2402.15473): what experts look for, put together from few pairs.

    phi(x, y) in R^7: how well y covers aspects, is faithful, covers opinions, is concise, relevant, makes nothing up,
                      and is good language, as a language model grades it
    r = f(phi), a small network:  -log sigma(r(w) - r(l)) on few pairs        PPO on r

With a handful of features some hundred pairs are enough (the paper: 940), where a reward model of text needs many.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.policy_gradient._critic import WithCritic, learn_with_critic
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.missing import MISSING
from rlhf_dist.parsers import Numbers
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Critic, Judge, Preferences, Prompts, Reference, State, state_op
from rlhf_dist.small_networks import answers, fit, layers, tensor

FEATURES = 7
QUESTION = """\
Task: {prompt}

Answer: {response_ids}

Grade the answer from 0 to 10 in seven respects: it covers all aspects; it is faithful to the opinions; it covers all
opinions; it is concise; it is relevant; it makes nothing up; its language is good. Write on a line of its own "Scores:"
and the seven numbers, in order, with commas."""
PAPERS = {
    "domain_features": Paper(
        title="Domain knowledge in a reward model of few features",
        year=2024,
        arxiv="2402.15473",
        rows=(116,),
        needs=("RMT", "RM", "ROLL", "CRIT"),
        assumed="one question for all seven features, in our own words; 16 hidden units; the network goes on learning "
        "while the policy does",
    )
}


@dataclass(frozen=True, kw_only=True)
class DomainFeatures(WithCritic):
    """Settings of PPO on a reward of features."""

    question: str = QUESTION
    """What the judge is asked about {prompt} and {response_ids}."""
    marker: str = "Scores:"
    """What stands before the seven numbers."""
    highest: float = 10.0
    """Grades go from 0 to this; with another one a row has no features."""
    hidden: int = 16
    """Units of the network's hidden layer."""
    lr: float = 1e-2
    """Learning rate of the network."""
    network_steps: int = 4
    """Its optimizer steps on each batch of pairs."""


class Features(State):
    """The network over the features."""

    def initial(self, cfg: DomainFeatures) -> dict[str, Any]:
        return {}

    @state_op(reads=("numbers", "label", "group_id"))
    def learn(
        self, values: dict[str, Any], batch: Batch, *, highest: float, hidden: int, lr: float, steps: int
    ) -> tuple[dict[str, Any], dict[str, Mean]]:
        """Bradley-Terry on pairs of which both have all features."""
        known, found = graded(batch, highest)
        label, pairs = batch["label"].values, list[tuple[int, int]]()
        for rows in batch.group():
            if len(rows) == 2 and known[rows].all():
                pairs.append((int(rows[label[rows] > 0][0]), int(rows[label[rows] < 0][0])))
        ungraded = {"pairs_without_features": Mean(float(len(batch.group()) - len(pairs)), 0)}
        if not pairs:
            return values, ungraded
        won, lost = (tensor(found[list(rows)]) for rows in zip(*pairs, strict=True))

        def loss(network: Any) -> Any:
            from torch.nn.functional import logsigmoid

            return -logsigmoid(network(won) - network(lost)).mean()

        new, metrics = fit(values, lambda: layers(FEATURES, hidden, 1), loss, lr=lr, steps=steps)
        return new, {**metrics, **ungraded}

    @state_op(reads=("numbers",), writes=("rewards",))
    def score(
        self, values: dict[str, Any], batch: Batch, *, highest: float, hidden: int
    ) -> tuple[dict[str, Any], HostResult]:
        """The network's reward; missing for a row without all features."""
        known, found = graded(batch, highest)
        said = answers(values, lambda: layers(FEATURES, hidden, 1), lambda network: network(tensor(found))[:, 0])
        rewards = np.where(known, said.values, MISSING).astype(np.float32)
        metrics = {"without_features": Mean(float((~known).sum()), float(batch.num_rows))}
        return values, HostResult(columns=Batch({"rewards": Column(rewards)}, batch.num_rows), metrics=metrics)


def graded(batch: Batch, highest: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """[B] which rows have all features, each in its scale, and [B, 7] the features, 0 to 1; 0 where there are none."""
    numbers = batch["numbers"]
    known = numbers.lengths == FEATURES
    found = np.zeros((batch.num_rows, FEATURES), np.float32)
    for row in np.flatnonzero(known):
        grades = numbers.row(int(row)) / highest
        known[row] = ((grades >= 0) & (grades <= 1)).all()
        found[row] = grades * known[row]
    return known, found


@recipe
def domain_features(
    prompts: Prompts,
    pairs: Preferences,
    actor: Actor,
    critic: Critic,
    reference: Reference,
    judge: Judge,
    features: Features,
    cfg: DomainFeatures,
) -> None:
    """A network over seven grades, and PPO on what it says."""
    ask: dict[str, Any] = {"template": Template(cfg.question), "parser": Numbers(cfg.marker)}
    shape = {"highest": cfg.highest, "hidden": cfg.hidden}
    features.learn(judge.generate_sequences(pairs, **ask), **shape, lr=cfg.lr, steps=cfg.network_steps)
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    grades = judge.generate_sequences(batch, **ask)
    batch = batch.join(features.score(grades, **shape), on="child", rewards="rewards")
    learn_with_critic(batch, actor, critic, reference, cfg)
