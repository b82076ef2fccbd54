"""`@loss`: a function's settings make a loss that travels, and mistakes are named with the recipe's line."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest
import torch

from rlhf_dist.algorithms import FunctionLoss, Loss, ModelOutput, loss, nll, ppo_clip
from rlhf_dist.dataflow import host_op
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.roles import Actor, Critic, Prompts, Reward
from tests.algorithms.rows import make_rows


@loss(
    reads=lambda settings: ("advantages", "weight") if settings["weighted"] else ("advantages",),
    average=lambda settings: settings["average"],
)
def plain(model, rows, scale: float = 1.0, *, weighted: bool = False, average: str = "tokens"):  # type: ignore[no-untyped-def]
    """-scale * A * log pi."""
    return -scale * rows["advantages"] * model.log_probs, {}


@loss(average="thirds")  # type: ignore[arg-type]
def of_thirds(model, rows):  # type: ignore[no-untyped-def]
    return model.log_probs, {}


@loss(outputs=("values",), average="tokens")
def of_values(model, rows):  # type: ignore[no-untyped-def]
    return model.values, {}


def test_settings_make_a_loss_that_declares_by_them() -> None:
    made = plain(2.0, weighted=True)
    assert isinstance(made, Loss) and isinstance(made, FunctionLoss)
    assert (made.name, made.reads, made.outputs, made.average) == (
        "plain",
        ("advantages", "weight"),
        ("log_probs",),
        "tokens",
    )
    assert plain().reads == ("advantages",) and plain(average="rows").average == "rows"
    assert repr(made) == "plain(scale=2.0, weighted=True)" and repr(ppo_clip(0.2)) == "ppo_clip()"
    assert made == plain(2.0, weighted=True) != plain(3.0)


def test_it_computes_and_says_what_the_model_did_not_give() -> None:
    rows = make_rows([2], [0], torch.ones(2), {"advantages": torch.tensor([1.0, -2.0])})
    value, _ = plain(2.0)(ModelOutput(log_probs=torch.tensor([-0.5, -1.0])), rows)
    assert value.tolist() == [1.0, -4.0]  # -2 * 1 * -0.5, -2 * -2 * -1
    with pytest.raises(ValueError, match="the loss plain needs log_probs of the model, and got none"):
        plain()(ModelOutput(), rows)


THEIRS = """
from rlhf_dist.algorithms import loss

@loss(outputs=(), average="rows")
def mine(model, rows, k=1):
    return k, {}
"""


def test_a_library_s_loss_travels_by_name_and_a_user_s_by_value(tmp_path: Path) -> None:
    assert len(pickle.dumps(ppo_clip(0.1))) < 700, "by name"
    assert pickle.loads(pickle.dumps(nll(average="rows"))) == nll(average="rows")
    by_value = tmp_path / "loss.pkl"
    (tmp_path / "theirs.py").write_text(THEIRS)
    sys.path.insert(0, str(tmp_path))
    try:
        import theirs  # type: ignore[import-not-found]

        cloudpickle.register_pickle_by_value(theirs)
        by_value.write_bytes(cloudpickle.dumps(theirs.mine(k=7)))
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("theirs", None)
    (tmp_path / "theirs.py").unlink()
    code = f"import pickle; made = pickle.load(open({str(by_value)!r}, 'rb')); print(made(made, None)[0], made.average)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split() == ["7", "rows"]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: plain, r"loss=plain, which is not called; write loss=plain\(\)"),
        (lambda: plain(scael=1), "the loss plain has no setting 'scael'.*did you mean 'scale'"),
        (lambda: plain(1.0, 2.0), "the loss plain: too many positional arguments; its settings are scale"),
        (lambda: ppo_clip(clip=3), r"clip must be in \(0, 1\]"),
        (of_thirds, "of_thirds averages over 'thirds'; it can be tokens, rows"),
        (of_values, "update_actor cannot give of_values the output 'values'.*its model gives log_probs, entropy"),
        (lambda: 3, "update_actor needs a loss"),
    ],
)
def test_what_is_no_loss_is_refused_with_the_line(make, error: str) -> None:  # type: ignore[no-untyped-def]
    @recipe
    def wrong(prompts: Prompts, actor: Actor, reward: Reward) -> None:
        batch = reward.compute_reward(actor.generate_sequences(prompts))
        actor.update_actor(batch, loss=make())

    with pytest.raises(GraphError, match=rf"test_loss_function.py:\d+: .*{error}"):
        trace(wrong)


def test_a_text_in_place_of_a_tuple_of_names_is_refused() -> None:
    with pytest.raises(ValueError, match=r"@loss\(reads=...\) takes a tuple of names, got the text 'advantages'"):
        loss(reads=("advantages"), average="tokens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"@host_op\(writes=...\) takes a tuple of names, got the text 'a'"):
        host_op(reads=(), writes="a")  # type: ignore[arg-type]


def test_a_critic_gives_values() -> None:
    @recipe
    def right(prompts: Prompts, actor: Actor, critic: Critic) -> None:
        batch = actor.generate_sequences(prompts)
        critic.update_critic(batch, loss=of_values())

    assert trace(right)["critic.update_critic"].kwargs["loss"] == of_values()
