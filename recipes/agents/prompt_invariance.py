"""PPO, and a contrastive loss that pulls the representations of one state under different prompt formats together
(prompt overfitting in RL agents, Aissi et al. 2024, arXiv 2410.19920).

    z_f(s)   the last state at the end of the prompt, state s in format f, to length 1
    L_c = -log exp(z_a(s) z_b(s) / T) / sum over the other rows of the group exp(z z' / T)
    L   = L_PPO + lambda L_c

A group of L_c are two states in two formats, so that each row has one other of its own state and two of the other.
"""

from dataclasses import dataclass

import numpy as np

from rlhf_dist.algorithms import loss, ppo_clip, value_clip
from rlhf_dist.batch import Batch, Column
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow import HostResult, host_op
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.prompt_template import Template
from rlhf_dist.roles import Actor, Critic, Prompts, Reward
from rlhf_dist.transforms import gae, whiten

PAPERS = {
    "prompt_invariance": Paper(
        title="Prompt overfitting in RL agents",
        year=2024,
        arxiv="2410.19920",
        rows=(178,),
        status="outline",
        needs=("TURN", "ROLL", "CRIT", "AUX", "ALT"),
        assumed="InfoNCE over two states in two formats; lambda 0.5, T 0.1; a state is a prompt",
    )
}


@host_op(reads=("group_id",), writes=("state", "group_id", "other_format"), scope="batch", rows="derive", copies=2)
def two_states(batch: Batch) -> HostResult:
    """Two copies of one row of each state, two states to a group, in their order; the last is left out where their
    number is odd. state: 0 or 1, which of the group's two; other_format: 1 for the second copy."""
    first = np.sort([int(rows[0]) for rows in batch.group()]).astype(np.int64)
    keep = first[: len(first) // 2 * 2]
    pairs = np.arange(len(keep)) // 2
    groups = batch["group_id"].values[keep][2 * pairs] if len(keep) else np.empty(0, np.int64)
    columns = {
        "state": Column(np.repeat(np.arange(len(keep)) % 2, 2).astype(np.float32)),
        "group_id": Column(np.repeat(groups, 2)),
        "other_format": Column(np.tile(np.array([0, 1], np.uint8), len(keep))),
    }
    return HostResult(columns=Batch(columns, 2 * len(keep)), parent=np.repeat(keep, 2))


@loss(reads=("state",), outputs=("hidden",), average="groups")
def contrast(model, rows, temperature: float = 0.1):
    """L_c, averaged over the rows of each group. The state at a prompt's end is what its first response token is
    predicted from."""
    group, state, count = rows.group_of_row, rows["state"], len(rows.group_of_row)
    first = rows.row_of_token.new_full((count,), len(rows.row_of_token))
    places = first.new_tensor(range(len(rows.row_of_token)))
    first = first.scatter_reduce(0, rows.row_of_token, places, "amin")
    there = first < len(rows.row_of_token)
    z = model.hidden[first.clamp(max=len(rows.row_of_token) - 1)]
    z = z / z.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    alike = z @ z.T / temperature
    other = (group[:, None] == group[None, :]) & there[:, None] & there[None, :]
    other = other & ~alike.new_ones(count).diag().bool()
    mine = other & (state[:, None] == state[None, :])
    known = mine.any(1)
    scores = alike.masked_fill(~other, -1e9)
    value = scores.logsumexp(1) - (alike * mine).sum(1) / mine.sum(1).clamp(min=1)
    value = value * known
    total = value.new_zeros(rows.num_groups).index_add(0, group, value)
    per_group = total / value.new_zeros(rows.num_groups).index_add(0, group, known.to(value.dtype)).clamp(min=1)
    return per_group, {"contrast": per_group.detach()}


@dataclass(frozen=True, kw_only=True)
class PromptInvariance:
    """Settings of PPO with a contrastive loss."""

    other_format: str = "Question: {prompt}\nAnswer:"
    """The other prompt format, with columns such as `prompt` as fields."""
    samples_per_prompt: int = 4
    """Responses to each prompt."""
    contrast_coef: float = 0.5
    """lambda."""
    temperature: float = 0.1
    """T."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's weight of longer returns."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch."""


@recipe
def prompt_invariance(prompts: Prompts, actor: Actor, critic: Critic, reward: Reward, cfg: PromptInvariance) -> None:
    """PPO in the prompts' own format, beside the contrast of two."""
    batch = reward.compute_reward(actor.generate_sequences(prompts, n=cfg.samples_per_prompt))
    other, one = two_states(batch).where("other_format")
    other = actor.encode(other, template=Template(cfg.other_format))
    batch = critic.compute_values(actor.compute_log_prob(batch))
    batch = whiten(gae(batch, gamma=cfg.gamma, lam=cfg.lam))
    critic.update_critic(batch, loss=value_clip(0.2), mini_batches=cfg.mini_batches)
    terms = [(batch, ppo_clip(cfg.clip)), (one.concat(other), contrast(cfg.temperature), cfg.contrast_coef)]
    actor.update_actor(terms, mini_batches=cfg.mini_batches)
