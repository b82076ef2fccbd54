"""Signals of health and spikes: what each says of made-up curves, and that it is silent where there is nothing."""

from __future__ import annotations

from typing import Any

import pytest

from controller.report.curves import POINTS, curve, find_spikes, topic_of
from controller.report.health import Numbers, Signal, signals


def said(heldout: dict[str, list[float]] | None = None, repeated: Any = (), **series: list[float]) -> dict[str, Signal]:
    named = {name.replace("__", "/"): values for name, values in series.items()}
    steps = range(max(map(len, named.values()), default=0))
    found = signals(Numbers(steps=steps, series=named, heldout=heldout or {}, repeated=repeated))
    return {signal.title: signal for signal in found}


RISING = [k / 40 for k in range(40)]


@pytest.mark.parametrize(
    ("metric", "values", "title", "state"),
    [
        ("gae__ref_kl", [0.0] * 20 + [0.1] * 20, "KL to the reference", "good"),
        ("gae__ref_kl", [0.0] * 20 + [0.5] * 20, "KL to the reference", "watch"),
        ("gae__ref_kl", [0.0] * 20 + [3.0] * 20, "KL to the reference", "bad"),
        ("gae__ref_kl", [-0.3] * 40, "KL to the reference", "bad"),
        ("actor__entropy", [3.0] * 40, "Entropy", "good"),
        ("actor__entropy", [3.0] * 20 + [0.5] * 20, "Entropy", "watch"),
        ("actor__entropy", [3.0] * 20 + [0.01] * 20, "Entropy", "bad"),
        ("actor__entropy", [1.0] * 20 + [4.0] * 20, "Entropy", "watch"),
        ("actor__clip_fraction", [0.6] * 40, "Clipped tokens", "bad"),
        ("actor__old_kl_k3", [0.1] * 40, "Size of updates", "watch"),
        ("actor__ratio", [1.0] * 39 + [9.0], "Ratio extremes", "bad"),
        ("gae__explained_variance", [0.6] * 40, "Explained variance of the critic", "good"),
        ("gae__explained_variance", [-1.0] * 40, "Explained variance of the critic", "bad"),
        ("actor__response_tokens", [100.0] * 20 + [260.0] * 20, "Length of responses", "watch"),
        ("actor__finished", [0.2] * 40, "Cut responses", "bad"),
        ("grpo_advantage__zero_variance_groups", [0.7] * 40, "Groups without a difference", "watch"),
        ("actor__rollout_mismatch", [0.2] * 40, "Sampler against trainer", "bad"),
        ("actor__grad_norm", [1.0] * 39 + [0.0], "Steps without a lesson", "watch"),
        ("nonfinite_metrics", [0.0] * 39 + [1.0], "Numbers that are none", "bad"),
    ],
)
def test_signals(metric: str, values: list[float], title: str, state: str) -> None:
    signal = said(**{metric: values})[title]
    assert signal.state == state, signal.says
    assert state == "good" or signal.help or title == "Steps without a lesson", "what may help is said"


def test_a_reward_that_rises_alone_is_suspicious() -> None:
    fine = said(reward__reward=RISING, heldout={"heldout/reward": [0.1, 0.9]})["Reward hacking?"]
    assert fine.state == "good"
    falls = said(reward__reward=RISING, heldout={"heldout/reward": [0.5, 0.2]})["Reward hacking?"]
    assert falls.state == "watch" and "heldout/reward fell from 0.5 to 0.2" in falls.says
    longer = said(reward__reward=RISING, actor__response_tokens=[20 + 4 * k for k in range(40)])["Reward hacking?"]
    assert longer.state == "watch" and "correlation" in longer.says
    same = said(reward__reward=RISING, repeated=[(10, 0.0), (30, 0.8)])["Reward hacking?"]
    assert same.state == "watch" and "at step 30 the same response was given to 80% of the prompts" in same.says
    assert "Reward hacking?" not in said(reward__reward=[0.5] * 40), "a reward that stands still says nothing"


def test_where_there_is_no_metric_there_is_no_signal() -> None:
    assert said() == {} and said(actor__loss=[1.0] * 5) == {}


def test_the_worst_comes_first() -> None:
    assert [one.state for one in said(actor__clip_fraction=[0.1] * 4, actor__rollout_mismatch=[1.0] * 4).values()] == [
        "bad", "good",
    ]  # fmt: skip


def test_spikes_are_found_and_clocks_are_not() -> None:
    values = [1.0 + 0.01 * (k % 7) for k in range(60)]
    values[45] = 3.0
    found = find_spikes(range(60), {"actor/loss": values, "time_s/gae": values, "actor/version": values})
    assert [(one.metric, one.step) for one in found] == [("actor/loss", 45)]
    assert find_spikes(range(8), {"actor/loss": [1.0] * 7 + [99.0]}) == [], "too few steps to know what is usual"


def test_long_curves_keep_their_extremes() -> None:
    values: list[float | None] = [0.0] * 50_000
    values[31_234], values[40_000] = 7.0, None
    made = curve(range(50_000), values)
    assert len(made["y"]) == len(made["x"]) <= POINTS
    assert made["x"][made["y"].index(7.0)] == 31_234


@pytest.mark.parametrize(
    ("metric", "topic"),
    [
        ("heldout/reward", "Held-out rows"),
        ("time_s/actor.update_actor", "Time by node"),
        ("actor/rollout_kl_k3", "Policy: KL, ratio, clipping, entropy"),
        ("critic/grad_norm", "Critic"),
        ("actor/grad_norm", "Loss and optimizer"),
        ("reward/reward_std", "Rewards and advantages"),
        ("actor/response_tokens", "Responses"),
        ("object_store_bytes", "Device memory"),
        ("greso/easy", "Other"),
    ],
)
def test_topics(metric: str, topic: str) -> None:
    assert topic_of(metric) == topic
