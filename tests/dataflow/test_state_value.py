"""A state's number in a recipe: wherever a number is written, in losses too, and never asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import pytest

from rlhf_dist.algorithms import dpo, ppo_clip
from rlhf_dist.batch import Batch
from rlhf_dist.dataflow import GraphError, host_op
from rlhf_dist.dataflow.graph import Dataflow
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.state_value import resolved
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.roles import Actor, Prompts, Reference, Reward, State, state_op


class Kl(State):
    """A coefficient."""

    def initial(self, cfg: Any) -> dict[str, float]:
        return {"coef": 0.25, "target": 2.0}

    @state_op(reads=("rewards",))
    def update(self, numbers: dict[str, float], batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
        """Not called while tracing."""
        raise AssertionError


@host_op(reads=("rewards",), writes=("advantages",))
def scaled(batch: Batch, *, by: float = 1.0, steps: int = 1) -> Batch:
    """Not called while tracing."""
    raise AssertionError


class Plain:
    """A loss that is no dataclass."""

    reads: tuple[str, ...] = ("rewards",)
    outputs: tuple[str, ...] = ()
    average: str = "tokens"

    def __init__(self, weights: list[float]) -> None:
        self.weights = weights

    def __call__(self, model: Any, rows: Any) -> Any:
        raise AssertionError


@dataclass(frozen=True)
class Halved:
    """A loss that checks its settings, and works with one of its own."""

    coef: float
    half: float = field(init=False)
    reads: tuple[str, ...] = ("rewards",)
    outputs: tuple[str, ...] = ()
    average: str = "tokens"

    def __post_init__(self) -> None:
        if not 0 <= self.coef <= 1:
            raise ValueError(f"coef must be in [0, 1], got {self.coef}")
        object.__setattr__(self, "half", self.coef / 2)

    def __call__(self, model: Any, rows: Any) -> Any:
        raise AssertionError


def of(use: Any) -> Dataflow:
    def mine(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, kl: Kl) -> None:
        batch = reward.compute_reward(actor.generate_sequences(prompts))
        batch = actor.compute_log_prob(reference.compute_ref_log_prob(batch))
        use(batch, actor, kl)
        kl.update(batch)

    return trace(recipe(mine))


def settings(use: Any, node: str, **numbers: float) -> Any:
    return resolved(of(use)[node].kwargs, {"kl": {"coef": 0.25, "target": 2.0, **numbers}})


def update(loss: Any) -> Any:
    return lambda batch, actor, kl: actor.update_actor(scaled(batch), loss=loss(kl))


def test_a_number_inside_a_loss_is_filled_in_and_its_state_is_waited_for() -> None:
    use = update(lambda kl: ppo_clip(0.2, kl_coef=kl.value("coef")))
    dataflow = of(use)
    edges = {(e.source, e.target, e.weights, e.distance) for e in dataflow.edges if e.reason == "write-then-read"}
    assert ("kl.update", "actor.update_actor", "kl.state", 1) in edges
    assert "ref_log_probs" in dataflow["actor.update_actor"].reads, "what it may need at some step is read"
    loss = settings(use, "actor.update_actor", coef=0.5)["loss"]
    assert loss == ppo_clip(0.2, kl_coef=0.5)


def test_arithmetic_makes_another_number() -> None:
    def use(batch: Any, actor: Any, kl: Any) -> None:
        coef, target = kl.value("coef"), kl.value("target")
        scaled(batch, by=1 - (2 * coef + target / 4 - 3) ** 2 * -coef)

    assert settings(use, "scaled", coef=0.5)["by"] == 1 - (2 * 0.5 + 2.0 / 4 - 3) ** 2 * -0.5
    assert "kl.value('coef')" in str(of(use)["scaled"].kwargs["by"])


def test_losses_of_any_kind_are_made_again_and_check_the_number_each_time() -> None:
    plain = settings(update(lambda kl: Plain([1.0, kl.value("coef")])), "actor.update_actor", coef=0.5)["loss"]
    assert plain.weights == [1.0, 0.5]
    halved = update(lambda kl: Halved(kl.value("coef")))
    assert settings(halved, "actor.update_actor", coef=0.5)["loss"].half == 0.25
    with pytest.raises(ValueError, match=r"coef must be in \[0, 1\], got 7"):
        settings(halved, "actor.update_actor", coef=7.0)
    with pytest.raises(ValueError, match="coef must be in"):  # the number it starts with
        of(update(lambda kl: Halved(kl.value("target"))))
    held: list[Any] = []
    of(lambda batch, actor, kl: held.append(dpo(kl.value("coef"))))
    assert resolved(held, {"kl": {"coef": 0.5}}) == [dpo(0.5)]


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (
            lambda batch, actor, kl: kl.value("coef") > 1 or None,
            r"value.py:\d+: kl.value\('coef'\) > 1 needs the number",
        ),
        (lambda batch, actor, kl: scaled(batch) if kl.value("coef") else batch, "a condition on kl.value"),
        (lambda batch, actor, kl: float(kl.value("coef")), "decide in a state_op or a host op"),
        (lambda batch, actor, kl: scaled(batch, steps=kl.value("coef")), "scaled needs steps before it runs"),
        (lambda batch, actor, kl: actor.generate_sequences(batch, n=kl.value("coef")), "needs n before it runs"),
        (lambda batch, actor, kl: kl.update(batch, every=kl.value("coef")), "needs every= before it runs"),
        (lambda batch, actor, kl: 1 / (kl.value("coef") - 0.25), r"test_state_value.py:\d+: .* has no value"),
        (lambda batch, actor, kl: kl.value("coef") + "1", r"test_state_value.py:\d+: .* combined with numbers only"),
        (lambda batch, actor, kl: kl.value("coeff"), "starts without a number 'coeff'; .* did you mean 'coef'?"),
    ],
)
def test_what_cannot_wait_for_the_number_is_refused(use: Any, says: str) -> None:
    with pytest.raises(GraphError, match=says):
        of(use)


def test_a_number_that_would_travel_unfilled_is_refused_where_it_is_sent() -> None:
    held: list[Any] = []
    of(lambda batch, actor, kl: held.append(kl.value("coef")))
    number = held[0]
    with pytest.raises(GraphError, match="is sent to a worker as it is"):
        cloudpickle.dumps(lambda: number)
    assert copy.deepcopy(number) is number


def test_a_loss_that_leads_back_to_itself_is_taken() -> None:
    loss = Plain([0.5])
    loss.itself = loss  # type: ignore[attr-defined]
    assert settings(update(lambda kl: loss), "actor.update_actor")["loss"] is loss


def test_an_initial_that_fails_is_named() -> None:
    class Broken(Kl):
        def initial(self, cfg: Any) -> dict[str, float]:
            return {"coef": cfg.coef}

    def mine(prompts: Prompts, broken: Any) -> None:
        raise AssertionError("not reached")

    mine.__annotations__ |= {"prompts": Prompts, "broken": Broken}
    with pytest.raises(
        GraphError, match="Broken.initial.*'broken' its numbers at the start, raised AttributeError.*coef"
    ):
        trace(recipe(mine))
