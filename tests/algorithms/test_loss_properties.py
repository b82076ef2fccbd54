"""What holds for every loss: it travels, and its sum does not depend on how rows are cut into micro-batches."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.algorithms import (
    Loss,
    ModelOutput,
    bradley_terry,
    dpo,
    ipo,
    nll,
    policy_gradient,
    ppo_clip,
    simpo,
    value_clip,
)
from tests.algorithms.rows import make_rows

LOSSES: list[Loss] = [
    ppo_clip(),
    ppo_clip(0.1, clip_high=0.3, dual_clip=2.0, kl_coef=0.1, entropy_coef=0.01),
    ppo_clip(ratio="sequence", average="rows", kl_coef=0.2, kl_estimator="k2"),
    ppo_clip(average="rows", row_divisor=7.0),
    ppo_clip(correction="sequence", correction_cap=1.5),
    ppo_clip(on_policy=True, correction="masked"),
    ppo_clip(on_policy=True, correction="geometric"),
    ppo_clip(average="groups", kl_coef=0.1, kl_estimator="abs", kl_cap=0.5, advantage_clip=0.7),
    ppo_clip(average="rows_with_tokens", old="sampled", ratio="sequence_token"),
    policy_gradient(average="groups", advantage_clip=0.5),
    value_clip(0.2, coef=1.0, average="rows_with_tokens"),
    value_clip(0.2, average="groups"),
    nll(weighted=True, average="groups"),
    dpo(0.3, label_smoothing=0.1, smoothing="robust", length_normalised=True),
    ipo(0.2, length_normalised=True),
    policy_gradient(entropy_coef=0.1),
    policy_gradient(correction="token"),
    policy_gradient(average="rows", row_divisor=1.0),
    value_clip(0.2),
    value_clip(0.0),
    nll(),
    nll(weighted=True, average="rows"),
    dpo(0.3, label_smoothing=0.1),
    ipo(0.2),
    simpo(),
    bradley_terry(use_margin=True, centre_coef=0.01),
]
IDS = [f"{index}-{type(loss).__name__}" for index, loss in enumerate(LOSSES)]
PER_ROW = ("weight", "label", "margin", "scores")


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_every_loss_is_a_picklable_frozen_value(loss: Loss) -> None:
    assert isinstance(loss, Loss)
    assert pickle.loads(pickle.dumps(loss)) == loss
    with pytest.raises(AttributeError):
        loss.average = "rows"  # type: ignore[misc]


def data(lengths: list[int], seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """Columns, model outputs and mask for pairs of rows (row 2k chosen, 2k + 1 rejected)."""
    generator = torch.Generator().manual_seed(seed)
    rows, total = len(lengths), sum(lengths)

    def draw(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    names = ("old_log_probs", "rollout_log_probs", "advantages", "ref_log_probs", "returns", "values")
    columns = {name: draw(total) for name in names}
    columns |= {"weight": draw(rows), "margin": draw(rows)}
    columns["label"] = torch.tensor([1, -1] * (rows // 2), dtype=torch.int8)
    outputs = {name: draw(total) for name in ("log_probs", "entropy", "values")} | {"scores": draw(rows)}
    return columns, outputs, (draw(total) > -1).to(torch.float64)


def summed(
    loss: Loss,
    lengths: list[int],
    columns: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
    mask: torch.Tensor,
    first: int,
    last: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the loss and its metrics over rows [first, last), as an engine sums them."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    begin, end = int(starts[first]), int(starts[last])
    cut = {name: x[first:last] if name in PER_ROW else x[begin:end] for name, x in columns.items()}
    groups = [row // 2 for row in range(first, last)]
    rows = make_rows(lengths[first:last], groups, mask[begin:end], {name: cut[name] for name in loss.reads})
    model = ModelOutput(
        **{name: outputs[name][first:last] if name in PER_ROW else outputs[name][begin:end] for name in loss.outputs}
    )
    value, metrics = loss(model, rows)
    sizes = {"tokens": end - begin, "groups": len(set(groups))}
    assert value.shape == (sizes.get(loss.average, last - first),)
    if loss.average == "rows_with_tokens":
        assert not value[rows.sum_tokens(rows.mask) == 0].any(), "what is not counted must not weigh"
    assert all(metric.shape == value.shape and not metric.requires_grad for metric in metrics.values())
    weight = rows.mask if loss.average == "tokens" else torch.ones_like(value)
    return (value * weight).sum(), {name: (metric * weight).sum() for name, metric in metrics.items()}


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=6).map(lambda x: [*x, *x]),
    cuts=st.sets(st.integers(1, 5)),
    seed=st.integers(0, 2**16),
)
def test_the_sum_of_a_loss_and_its_gradient_do_not_depend_on_micro_batches(
    loss: Loss, lengths: list[int], cuts: set[int], seed: int
) -> None:
    columns, outputs, mask = data(lengths, seed)
    leaves = {name: value.requires_grad_() for name, value in outputs.items() if name in loss.outputs}
    whole, whole_metrics = summed(loss, lengths, columns, outputs, mask, 0, len(lengths))
    whole_grad = torch.autograd.grad(whole, list(leaves.values()))

    edges = sorted({0, len(lengths), *(2 * cut for cut in cuts if 2 * cut < len(lengths))})
    parts = [
        summed(loss, lengths, columns, outputs, mask, first, last)
        for first, last in zip(edges[:-1], edges[1:], strict=True)
    ]
    total = torch.stack([part for part, _ in parts]).sum()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, list(leaves.values())), whole_grad)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(torch.stack([metrics[name] for _, metrics in parts]).sum(), value)


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_a_micro_batch_without_rows_has_loss_zero(loss: Loss) -> None:
    columns, outputs, mask = data([], 0)
    value, _ = summed(loss, [], columns, outputs, mask, 0, 0)
    assert value == 0


def test_recipes_can_name_losses_transforms_and_rewards_without_torch_or_ray() -> None:
    code = (
        "import sys, rlhf_dist.transforms, rlhf_dist.algorithms, rlhf_dist.rewards, rlhf_dist.data\n"
        "heavy = {'torch', 'ray', 'vllm', 'pyarrow', 'transformers', 'reasoning_gym', 'math_verify', 'sympy'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
