"""Distillation losses against numbers worked by hand and plain PyTorch; a loss may ask for more than there is nowhere.

About a second.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from rlhf_dist.algorithms import Head, ModelOutput, OverVocabulary, distill, distill_top_k, loss
from rlhf_dist.algorithms.losses.distill import divergence
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.dataflow.trace import trace
from rlhf_dist.roles import Actor, Critic, Examples, Reference
from rlhf_dist.testing import CheckFailed, check_loss
from tests.algorithms.rows import make_rows, tokens
from workers.engines.model.distribution import (
    log_probs_at,
    over_vocabulary,
    over_vocabulary_of_logits,
    top_k,
)
from workers.engines.model.log_probs import Head as MatrixHead

P, Q = (0.5, 0.3, 0.2), (0.6, 0.3, 0.1)
"""Student and teacher: two tokens, and all others."""


def kl(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


M = tuple(0.25 * q + 0.75 * p for p, q in zip(P, Q, strict=True))
BY_HAND = {
    "forward": 0.6 * math.log(1.2) + 0.1 * math.log(0.5),
    "reverse": 0.5 * math.log(5 / 6) + 0.2 * math.log(2),
    "jsd": 0.25 * kl(Q, M) + 0.75 * kl(P, M),
}


@pytest.mark.parametrize("how", BY_HAND)
def test_top_k_with_the_rest_as_one_outcome_by_hand(how: Any) -> None:
    log_p, log_q = tokens(*map(math.log, P)), tokens(*map(math.log, Q))
    columns = {"b_log_probs": log_q[None, :2], "b_log_rest": log_q[None, 2]}
    rows = make_rows([1], [0], tokens(1), columns)
    made = distill_top_k(how, beta=0.25, prefix="b")
    assert made.reads == ("b_log_probs", "b_log_rest") and made.outputs == ("log_probs_at.b_ids",)
    value, metrics = made(ModelOutput.of({"log_probs_at.b_ids": log_p[None]}), rows)
    torch.testing.assert_close(value, tokens(BY_HAND[how]))
    torch.testing.assert_close(metrics["rest"], tokens(0.2))
    torch.testing.assert_close(metrics["teacher_rest"], tokens(0.1))


@pytest.mark.parametrize("how", BY_HAND)
def test_the_kit_knows_the_losses(how: Any) -> None:
    check_loss(distill_top_k(how, average="rows_with_tokens"))
    check_loss(distill("teacher", how, beta=0.1, average="groups"))


@pytest.mark.parametrize("wrong", [{"kl": "backward"}, {"beta": 1.0}, {"average": "batch"}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        distill_top_k(**wrong)
    with pytest.raises(ValueError, match="must be"):
        distill("teacher", **wrong)


# --- in chunks ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale, softcap, biased, temperature", [(1.0, None, False, 1.0), (2.0, 1.5, True, 0.6)])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_functions_over_the_vocabulary_have_the_values_and_gradients_of_plain_ones(
    chunk: int, scale: float, softcap: float | None, biased: bool, temperature: float
) -> None:
    torch.manual_seed(0)
    shapes = ((9, 5), (11, 5), (11,))
    hidden, weight, bias = leaves = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    teacher, ids = torch.randn(9, 11).log_softmax(-1), torch.stack([torch.randperm(11)[:3] for _ in range(9)])
    head = MatrixHead(weight, bias if biased else None, scale, softcap)

    def logits_of(states: Tensor) -> Tensor:
        raw = scale * (states @ weight.t() + (bias if biased else 0))
        return raw if softcap is None else softcap * torch.tanh(raw / softcap)

    def both(log_p: Tensor, log_q: Tensor, at: Tensor) -> Tensor:
        kls = divergence(log_p, log_q, kl="jsd", beta=0.3)
        return torch.cat([kls[:, None], log_probs_at(log_p, at)], dim=-1)

    # In float64: 1 - sum p of a small rest has few digits left in float32.
    log_p = (logits_of(hidden).double() / temperature).log_softmax(-1)
    rest = 1 - log_p.exp().gather(1, ids).sum(-1, keepdim=True)
    kls = divergence(log_p, teacher.double(), kl="jsd", beta=0.3)[:, None]
    expected = torch.cat([kls, log_p.gather(1, ids), rest.log()], dim=-1).float()
    mix = torch.randn(9, 5)
    wanted = torch.autograd.grad((expected * mix).sum(), leaves, allow_unused=True)
    asked: dict[str, Any] = {"temperature": temperature, "chunk_tokens": chunk}
    for found in (
        over_vocabulary(hidden, head, both, [teacher, ids], **asked),
        over_vocabulary_of_logits(hidden, logits_of, both, [teacher, ids], **asked),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        got = torch.autograd.grad((found * mix).sum(), leaves, allow_unused=True)
        for mine, plain in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    at, log_probs, log_rest = top_k(hidden, logits_of, 4, **asked)
    chosen, where = log_p.topk(4)
    torch.testing.assert_close((at, log_probs), (where, chosen.detach().float()))
    expected_rest = (1 - chosen.exp().sum(-1)).log().detach().float()
    torch.testing.assert_close(log_rest, expected_rest, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="k must be from 1 to 10.*got 11"):
        top_k(hidden, logits_of, 11, **asked)


def test_top_k_of_nearly_all_tokens_is_the_divergence_of_whole_distributions_and_fewer_never_more() -> None:
    log_p, log_q = torch.randn(2, 6, 8, dtype=torch.float64).log_softmax(-1)
    for how in BY_HAND:
        whole = divergence(log_p, log_q, kl=how, beta=0.5)  # type: ignore[arg-type]
        for k in (7, 3, 1):
            ids = log_q.topk(k).indices
            merged = [log_probs_at(one, ids) for one in (log_p, log_q)]
            part = divergence(*merged, kl=how, beta=0.5)  # type: ignore[arg-type]
            if k == 7:
                torch.testing.assert_close(part, whole)
            assert bool((part <= whole + 1e-12).all())


def test_a_rest_of_almost_nothing_keeps_its_digits() -> None:
    log_p = torch.tensor([[0.0, -40.0, -41.0]]).log_softmax(-1)
    rest = log_probs_at(log_p, torch.tensor([[0]]))[0, -1]
    assert float(rest) == pytest.approx(-40 + math.log1p(math.exp(-1)), rel=1e-6)


# --- what a role does not have -----------------------------------------------------------------------
class Judge(Actor, Protocol):
    heads = (Head(name="quality", outputs=3, at="last_token"),)


@loss(outputs=("heads.quality",), average="rows")
def of_quality(model, rows):  # type: ignore[no-untyped-def]
    return model.heads["quality"].sum(-1), {}


@loss(outputs=("logits",), average="rows")
def of_logits(model, rows):  # type: ignore[no-untyped-def]
    return model.logits, {}


@loss(outputs=(OverVocabulary(name="x", function=lambda log_p: log_p.sum(-1)),), average="tokens")
def of_vocabulary(model, rows):  # type: ignore[no-untyped-def]
    return model.over_vocabulary["x"], {}


@pytest.mark.parametrize(
    ("role", "made", "said"),
    [
        (
            "actor",
            of_quality,
            r"cannot give of_quality the output 'heads.quality'.*give the class of actor heads = \(Head",
        ),
        ("judge", of_logits, "of_logits asks for 'logits', which is no output.*log_probs_at.COLUMN.*heads.quality"),
        (
            "critic",
            of_vocabulary,
            "cannot give of_vocabulary the output 'over_vocabulary.x'.*gives values, scores, hidden",
        ),
        (
            "actor",
            lambda: distill("critic"),
            "distributions of 'critic', which is no role of this recipe with a language",
        ),
        ("actor", lambda: distill_top_k(), "reads column 'top_log_probs'.*does not have"),
    ],
)
def test_an_output_that_is_not_there_is_refused_with_the_line(role: str, made: Any, said: str) -> None:
    @recipe
    def wrong(batch: Examples, actor: Actor, judge: Judge, critic: Critic, teacher: Reference) -> None:
        batch = teacher.compute_hidden(batch)
        roles = {"actor": actor.update_actor, "judge": judge.update_actor, "critic": critic.update_critic}
        roles[role](batch, loss=made())

    with pytest.raises(GraphError, match=rf"test_distill.py:\d+: .*{said}"):
        trace(wrong)


def test_a_head_s_answers_are_a_column_of_its_name() -> None:
    @recipe
    def right(batch: Examples, judge: Judge, teacher: Reference) -> None:
        batch = judge.compute_heads(batch, names=("quality",))
        batch = teacher.compute_top_k(batch, k=4, prefix="t")
        judge.update_actor(batch, loss=of_quality())
        judge.update_actor(batch, loss=distill_top_k(prefix="t"))

    graph = trace(right)
    assert graph["judge.compute_heads"].writes == ("quality",)
    assert graph["teacher.compute_top_k"].writes == ("t_ids", "t_log_probs", "t_log_rest")
    assert {"t_ids", "t_log_probs", "t_log_rest"} <= set(graph["judge.update_actor#2"].inputs[0].columns)

    @recipe
    def wrong(batch: Examples, judge: Judge) -> None:
        judge.compute_heads(batch, names=("risk",))

    with pytest.raises(GraphError, match=r"asks for the head 'risk'; Judge has quality"):
        trace(wrong)


def test_the_kit_is_told_what_a_head_is() -> None:
    check_loss(of_quality(), heads=Judge.heads)
    with pytest.raises(CheckFailed, match=r"asks for heads.quality; say what that is: check_loss\(..., heads="):
        check_loss(of_quality())
    with pytest.raises(CheckFailed, match=r"asks the model for 'logits'; there is log_probs, .*heads.NAME"):
        check_loss(of_logits())


@pytest.mark.parametrize("wrong", [{"name": "two words"}, {"name": "a", "outputs": 0}, {"name": "a", "at": "end"}])
def test_heads_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="head"):
        Head(**wrong)
