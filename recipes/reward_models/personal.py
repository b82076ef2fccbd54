"""Reward models of several tastes, on the last states of a frozen language model: small networks beside it.

    pal      r(x, y, u) = -|f(e) - sum_k softmax(w_u)_k p_k|^2     K ideal points, of which a user mixes (2406.08469)
    vpl      z ~ q(z | the user's pairs),  r(x, y, z)              -log sigma(gap) + b KL(q | N(0, 1)) (2408.10075)
    dmoerm   r(x, y, task) = m(g_1(e), ..., g_K(e))                a task's experts, and an MLP over them (2403.01197)

e is the last state at the end of prompt and response; all learn from pairs by Bradley-Terry. Rows have a `user` (pal,
vpl), or a `task` and a `capability` (dmoerm: the expert that a label is about). dmoerm learns in three phases of so
many steps: a task as a whole, its experts, which are added to that, and the MLP over them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from recipes.reward_models.consistency import last_directions
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean
from rlhf_dist.roles import LanguageModel, Preferences, State, state_op
from rlhf_dist.small_networks import fit, layers, restored, tensor

FROZEN = "the trunk is frozen and its last state is scaled to length 1; "
PAPERS = {
    "personal": Paper(
        title="PAL: a mixture of ideal points",
        year=2024,
        arxiv="2406.08469",
        rows=(114,),
        needs=("RMT", "HID"),
        assumed=FROZEN + "K 4, 16 dimensions, f linear; the logistic loss; learned, and no response is scored",
    ),
    "vpl": Paper(
        title="VPL: variational preference learning",
        year=2024,
        arxiv="2408.10075",
        rows=(113,),
        status="outline",
        needs=("RMT", "HID", "ALT"),
        settings={"algorithm.kind": "vpl"},
        assumed=FROZEN + "a user's pairs of the batch are the context; b 0.1; rewards are not scaled per user, and no "
        "response is scored",
    ),
    "dmoerm": Paper(
        title="DMoERM: experts of tasks and of capabilities",
        year=2024,
        arxiv="2403.01197",
        rows=(105,),
        status="outline",
        needs=("RMT", "MRM", "BRANCH", "HID"),
        settings={"algorithm.kind": "dmoerm"},
        assumed=FROZEN
        + "experts are maps of rank 4 on the last state in place of adapters of every layer; the task is "
        "the row's own, not a router's; no response is scored",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Personal:
    """Settings of reward models of several tastes."""

    kind: Literal["pal", "vpl", "dmoerm"] = "pal"
    """Whose tastes differ, and how."""
    people: int = 64
    """Of pal and dmoerm: users or tasks; a row's number is taken modulo it."""
    points: int = 4
    """K: ideal points, or experts of a task."""
    width: int = 16
    """Dimensions of ideal points, of z, and of hidden layers."""
    phase_steps: int = 1000
    """Of dmoerm: steps of its first phase, and of its second; then it is the third."""
    kl_coef: float = 0.1
    """Of vpl: b."""
    lr: float = 1e-3
    """Learning rate of the networks."""


class Personally(Preferences):
    """Pairs that say whose they are and what they are about."""

    fields = {"user": "int64", "task": "int64", "capability": "int64"}


@host_op(reads=("hidden",), writes=("embedding",))
def embedded(batch: Batch) -> Batch:
    """[B, H] the last state of each row, of length 1."""
    return Batch({"embedding": Column(last_directions(batch).astype(np.float32))}, batch.num_rows)


class Networks(State):
    """The networks of one kind."""

    def initial(self, cfg: Personal) -> dict[str, Any]:
        return {}

    @state_op(reads=("embedding", "user", "task", "capability", "label", "group_id"))
    def learn(
        self, values: dict[str, Any], batch: Batch, *, settings: dict[str, Any], rng: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Mean]]:
        """A step on the pairs of the batch; `accuracy` is of before it."""
        pairs = [
            (rows[batch["label"].values[rows] > 0][0], rows[batch["label"].values[rows] < 0][0])
            for rows in batch.group()
        ]
        if not pairs:
            return values, {}
        won, lost = np.array(pairs).T
        given = {name: batch[name].values[won] for name in ("user", "task", "capability")}
        better, worse = (tensor(batch["embedding"].values[rows]) for rows in (won, lost))
        settings = {**settings, "phase": 1 + min(2, int(values.get("steps", 0)) // settings["phase_steps"])}
        noise = tensor(rng.standard_normal((len(pairs), settings["width"])))
        build = lambda: NETWORKS[settings["kind"]](better.shape[1], settings)  # noqa: E731
        gap = restored(values, build).gap(better, worse, given, noise)[0]
        new, metrics = fit(
            values, build, lambda net: preference(*net.gap(better, worse, given, noise)), lr=settings["lr"]
        )
        return new, {**metrics, "accuracy": Mean(float((gap > 0).sum()), float(len(pairs)))}


def preference(gap: Any, price: Any) -> Any:
    """Mean of -log sigma(gap) + price."""
    from torch.nn.functional import logsigmoid

    return (price - logsigmoid(gap)).mean()


def ideal_points(width: int, settings: dict[str, Any]) -> Any:
    """PAL's network: f, the points, and each user's weights."""
    import torch
    from torch import nn

    class IdealPoints(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(width, settings["width"])
            self.points = nn.Parameter(torch.randn(settings["points"], settings["width"]))
            self.weights = nn.Parameter(torch.zeros(settings["people"], settings["points"]))

        def reward(self, embedding: Any, user: Any) -> Any:
            mine = self.weights[torch.as_tensor(user % settings["people"])].softmax(-1) @ self.points
            return -((self.f(embedding) - mine) ** 2).sum(-1)

        def gap(self, better: Any, worse: Any, given: dict[str, Any], noise: Any) -> tuple[Any, Any]:
            found = self.reward(better, given["user"]) - self.reward(worse, given["user"])
            return found, torch.zeros_like(found)

    return IdealPoints()


def latent_user(width: int, settings: dict[str, Any]) -> Any:
    """VPL's networks: the encoder of a user's pairs, and the reward of a response and a user."""
    import torch
    from torch import nn

    class LatentUser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = layers(2 * width, settings["width"], 2 * settings["width"])
            self.reward = layers(width + settings["width"], settings["width"], 1)

        def posterior(self, better: Any, worse: Any, user: Any) -> tuple[Any, Any]:
            """Mean and log-variance of each pair's user, from all pairs of that user."""
            _, who = np.unique(user, return_inverse=True)
            at = torch.as_tensor(who)
            said = self.encoder(torch.cat([better, worse], -1))
            total = said.new_zeros(int(at.max()) + 1, said.shape[1]).index_add(0, at, said)
            count = torch.bincount(at).to(said.dtype)[:, None]
            return (total / count)[at].chunk(2, -1)

        def gap(self, better: Any, worse: Any, given: dict[str, Any], noise: Any) -> tuple[Any, Any]:
            mean, log_variance = self.posterior(better, worse, given["user"])
            _, first, who = np.unique(given["user"], return_index=True, return_inverse=True)
            z = mean + (log_variance / 2).exp() * noise[first[who]]  # one draw a user
            kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(-1)
            found = (self.reward(torch.cat([better, z], -1)) - self.reward(torch.cat([worse, z], -1)))[:, 0]
            return found, settings["kl_coef"] * kl

    return LatentUser()


def experts(width: int, settings: dict[str, Any]) -> Any:
    """DMoERM's networks: of each task one for the whole, K experts of low rank, and an MLP over these."""
    import torch
    from torch import nn

    rank, people, many = 4, settings["people"], settings["points"]

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = nn.Parameter(torch.zeros(people, width))
            self.down = nn.Parameter(torch.randn(people, many, rank, width) * width**-0.5)
            self.up = nn.Parameter(torch.randn(people, many, rank) * rank**-0.5)
            self.over = layers(many, settings["width"], 1)

        def gap(self, better: Any, worse: Any, given: dict[str, Any], noise: Any) -> tuple[Any, Any]:
            task = torch.as_tensor(given["task"] % people)
            if settings["phase"] == 1:
                found = (self.whole[task] * (better - worse)).sum(-1)
                return found, torch.zeros_like(found)
            said = [torch.einsum("nkrw,nw,nkr->nk", self.down[task], e, self.up[task]) for e in (better, worse)]
            if settings["phase"] == 2:
                about = torch.as_tensor(given["capability"] % many)[:, None]
                found = said[0] - said[1] + ((self.whole[task] * (better - worse)).sum(-1))[:, None].detach()
                found = found.gather(1, about)[:, 0]
            else:
                found = (self.over(said[0].detach()) - self.over(said[1].detach()))[:, 0]
            return found, torch.zeros_like(found)

    return Experts()


NETWORKS = {"pal": ideal_points, "vpl": latent_user, "dmoerm": experts}


@recipe
def personal(pairs: Personally, encoder: LanguageModel, networks: Networks, cfg: Personal) -> None:
    """Small networks on embedded pairs."""
    settings = {
        **{"kind": cfg.kind, "people": cfg.people, "points": cfg.points, "width": cfg.width},
        **{"phase_steps": cfg.phase_steps, "kl_coef": cfg.kl_coef, "lr": cfg.lr},
    }
    networks.learn(embedded(encoder.compute_hidden(pairs)), settings=settings)
