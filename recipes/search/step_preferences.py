"""Preferences between the steps of a search: MCTS-DPO (Xie et al. 2024, arXiv 2405.00451) and its relatives.

    Q(s) = mean value of the leaves below step s;   at each fork w = argmax Q, l = argmin Q, D = h(w) - h(l)

    smoothed   -(1 - a) log sigma(beta D) - a log sigma(-beta D),   a = 1 / (N(w) / N(l) + 1)      MCTS-DPO
    dpo        -log sigma(beta D)                                                            Agent Q, ReARTeR, SVPO
    orpo       -mean log pi(w) - lambda log sigma(log odds(w) - log odds(l))                       COS(M+O)S

h = log pi - log pi_ref of the step given what came before it. N counts the leaves below a step. `value_share` mixes the
search's Q with a critic's, which learns from the same tree: Q = share Q_search + (1 - share) Q_critic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from recipes.preference._pairs import without_reference
from recipes.search._steps import Steps, limits_of
from rlhf_dist.algorithms import bradley_terry, dpo, loss
from rlhf_dist.algorithms.contract import ModelOutput, Rows
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected, log_sigmoid
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, RewardModel
from rlhf_dist.transforms import tree_nodes, tree_pairs

if TYPE_CHECKING:
    from torch import Tensor

STEPS = "a step is a fixed number of tokens, UCT with every child valued; sums in place of the paper's task"
PAPERS = {
    "step_preferences": Paper(
        title="MCTS + iterative preference learning (MCTS-DPO)",
        year=2024,
        arxiv="2405.00451",
        rows=(181,),
        needs=("TREE", "JUDGE", "VER", "PAIR", "PREF", "SNAP"),
        status="outline",
        assumed=f"{STEPS}; leaves below a step for visits; half of a value is the policy's own judgement",
    ),
    "agent_q": Paper(
        title="Agent Q",
        year=2024,
        arxiv="2408.07199",
        rows=(169,),
        status="outline",
        needs=("TREE", "TURN", "JUDGE", "PAIR", "PREF", "MIX"),
        settings={"algorithm.kind": "dpo", "algorithm.least_gap": 0.1},
        assumed=f"{STEPS}; the critique is mixed in at leaves, by one half; least gap 0.1; no pairs of earlier trees",
    ),
    "svpo": Paper(
        title="SVPO: step-level value preference optimisation",
        year=2024,
        arxiv="2406.10858",
        rows=(182,),
        status="outline",
        needs=("TREE", "PAIR", "PREF", "CO", "AUX"),
        settings={"algorithm.kind": "dpo", "algorithm.value_loss": "ranked", "algorithm.judge": 0.0},
        assumed=f"{STEPS}; both terms of the value's loss weigh 1; the value model is a role of its own",
    ),
    "rearter": Paper(
        title="ReARTeR",
        year=2025,
        arxiv="2501.07861",
        rows=(183,),
        status="outline",
        needs=("TREE", "TURN", "RM", "JUDGE", "RMT", "PREF"),
        settings={"algorithm.kind": "dpo", "algorithm.value_share": 0.5, "algorithm.value_loss": "regression"},
        assumed=f"{STEPS}; the process reward model learns from the trees; no retrieval, explanation, look-ahead",
    ),
    "cosmos": Paper(
        title="COS(M+O)S",
        year=2025,
        arxiv="2501.17104",
        rows=(184,),
        status="outline",
        needs=("TREE", "RMT", "PAIR", "PREF"),
        settings={"algorithm.kind": "orpo", "algorithm.value_share": 0.5, "algorithm.value_loss": "regression"},
        assumed=f"{STEPS}; curiosity less incoherence is whatever the value model was trained on; lambda 0.1",
    ),
}


@dataclass(frozen=True, kw_only=True)
class StepPreferences:
    """Settings of preferences between steps."""

    trees: int = 1
    """Trees of each prompt."""
    simulations: int = 16
    """Of a tree's search."""
    expand: int = 4
    """Steps that a simulation adds."""
    depth: int = 4
    """Most steps of a response."""
    step_tokens: int = 64
    """Tokens of a step."""
    explore: float = 1.0
    """UCT's constant."""
    judge: float = 0.5
    """Weight of the policy's own judgement in the value of a state."""
    question: str = "\nHow likely is it that this leads to the right answer, from 0 to 10? "
    """What it is asked."""
    kind: Literal["smoothed", "dpo", "orpo"] = "smoothed"
    """The loss on a pair of steps."""
    beta: float = 0.1
    """Scale of log-ratios; lambda of orpo."""
    least_gap: float = 0.0
    """Values that are not further apart make no pair."""
    value_share: float = 1.0
    """Of the search in a step's value; the rest is the critic's."""
    value_loss: Literal["none", "regression", "ranked"] = "none"
    """How the critic learns: not, (V - Q)^2, or that and -log sigma(V(w) - V(l))."""
    iteration: int = 100
    """Steps after which the policy becomes the reference."""
    seconds: float = 600.0
    """Longest that a tree may take."""


@loss(reads=("label", "ref_log_probs", "leaves"), average="groups")
def visit_smoothed(model: ModelOutput, rows: Rows, beta: float = 0.1) -> tuple[Tensor, dict[str, Tensor]]:
    """`smoothed` of the module's table."""
    won, lost = chosen_and_rejected(rows.sum_tokens(model.log_probs - rows["ref_log_probs"]), rows)
    better, worse = chosen_and_rejected(rows["leaves"], rows)
    flipped, margin = 1 / (better / worse + 1), beta * (won - lost)
    value = -(1 - flipped) * log_sigmoid(margin) - flipped * log_sigmoid(-margin)
    return value, {"preference_loss": value.detach(), "margin": margin.detach(), "smoothing": flipped}


@loss(reads=("rewards",), outputs=("scores",), average="rows")
def step_regression(model: ModelOutput, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    """(V - Q)^2 of a step."""
    value = (model.scores - rows["rewards"]) ** 2
    return value, {"value_error": value.detach()}


@recipe
def step_preferences(
    prompts: Prompts, actor: Actor, reference: Reference, critic: RewardModel, cfg: StepPreferences
) -> None:
    """Preference optimisation on the steps of a tree search."""
    searched = Steps(
        search="mcts",
        leaves=cfg.simulations * cfg.expand,
        simulations=cfg.simulations,
        expand=cfg.expand,
        depth=cfg.depth,
        step_tokens=cfg.step_tokens,
        explore=cfg.explore,
        judge=cfg.judge,
        question=cfg.question,
    )
    tree = actor.run_episodes(prompts, environment=searched, n=cfg.trees, limits=limits_of(searched, cfg.seconds))
    if cfg.value_share < 1:
        tree = critic.compute_reward(tree, out={"rewards": "criticised"})
        pairs = tree_pairs(tree, least_gap=cfg.least_gap, value="criticised", share=cfg.value_share)
    else:
        pairs = tree_pairs(tree, least_gap=cfg.least_gap)
    if cfg.value_loss != "none":
        terms = [(tree_nodes(tree, most_steps=cfg.depth), step_regression())]
        critic.update_reward_model([*terms, (pairs, bradley_terry())] if cfg.value_loss == "ranked" else terms)
    if cfg.kind == "orpo":
        actor.update_actor(pairs, loss=without_reference("orpo", cfg.beta))
        return
    pairs = reference.compute_ref_log_prob(pairs)
    actor.update_actor(pairs, loss=dpo(cfg.beta) if cfg.kind == "dpo" else visit_smoothed(cfg.beta))
    reference.copy_from(actor, every=cfg.iteration)
