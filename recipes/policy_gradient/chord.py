"""CHORD: experts' rows beside the policy's own, under a schedule (Zhang et al. 2025, arXiv 2508.11408).

    L = (1 - mu) L_GRPO + mu L_SFT
    mu       rises in `warmup` steps to `peak`, then falls in `decay` more as half a cosine to `valley`
    phi      each token of an expert weighs p (1 - p), p its probability under the policy: neither known nor hopeless

CHORD-phi has phi and mu 0.1 throughout; CHORD-mu has no phi, and mu falls from 0.9 to 0.05 in 200 steps. The constants
are those of its authors' code, Trinity-RFT (examples/mix_chord), where both losses are averaged over tokens, too.
"""

from dataclasses import dataclass
from math import cos, pi

from rlhf_dist.algorithms import loss, ppo_clip
from rlhf_dist.batch import Batch
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.metrics import Mean, Metrics
from rlhf_dist.roles import Actor, Examples, Prompts, Reward, State, state_op
from rlhf_dist.transforms import grpo_advantage

CHORD_OF = {"year": 2025, "arxiv": "2508.11408", "rows": (35,), "needs": ("ROLL", "VER", "MIX", "AUX", "STATE")}
PAPERS = {
    "chord": Paper(title="CHORD-phi", **CHORD_OF),
    "mu": Paper(
        title="CHORD-mu",
        **CHORD_OF,
        settings={
            **{"algorithm.weighted": False, "algorithm.peak": 0.9, "algorithm.valley": 0.05},
            "algorithm.decay": 200,
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class CHORD:
    """Settings of CHORD."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    peak: float = 0.1
    """mu after the warm-up."""
    valley: float = 0.1
    """mu at the end."""
    warmup: int = 0
    """Steps until mu is at its peak."""
    decay: int = 0
    """Steps from its peak to its valley."""
    weighted: bool = True
    """phi: weigh an expert's tokens; False: all alike."""


class Schedule(State):
    """mu of the step at hand."""

    def initial(self, cfg: CHORD) -> dict[str, float]:
        return {"step": 0.0, "mu": mu_at(0, cfg.peak, cfg.valley, cfg.warmup, cfg.decay)}

    @state_op(reads=("group_id",))
    def advance(
        self, numbers: dict[str, float], batch: Batch, *, peak: float, valley: float, warmup: int, decay: int
    ) -> tuple[dict[str, float], Metrics]:
        """To the next step."""
        step = numbers["step"] + 1
        return {"step": step, "mu": mu_at(step, peak, valley, warmup, decay)}, {"mu": Mean(numbers["mu"])}


def mu_at(step: float, peak: float, valley: float, warmup: int, decay: int) -> float:
    """mu of step 0, 1, ..."""
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / decay if step < warmup + decay else 1.0
    return valley + (peak - valley) * (1 + cos(pi * done)) / 2


@loss(average="tokens")
def expert_nll(model, rows, weighted: bool = True):
    """-log p of an expert's token, weighed by p (1 - p)."""
    p = model.log_probs.detach().exp()
    weight = p * (1 - p) if weighted else p.new_ones(p.shape)
    return -weight * model.log_probs, {"weight": weight, "nll": -model.log_probs.detach()}


@recipe
def chord(prompts: Prompts, experts: Examples, actor: Actor, reward: Reward, schedule: Schedule, cfg: CHORD) -> None:
    """GRPO and imitation in one step."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    batch = grpo_advantage(reward.compute_reward(batch))
    mu = schedule.value("mu")
    own = (batch, ppo_clip(cfg.clip, on_policy=True), 1 - mu)
    actor.update_actor([own, (experts, expert_nll(cfg.weighted), mu)])
    schedule.advance(experts, peak=cfg.peak, valley=cfg.valley, warmup=cfg.warmup, decay=cfg.decay)
