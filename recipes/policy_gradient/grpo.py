"""Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300): no critic, the group is the baseline."""

from dataclasses import dataclass
from typing import Literal

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Prompts, Reference, Reward
from rlhf_dist.transforms import grpo_advantage, mask_cut_responses

NEEDS = ("ROLL", "VER", "REF", "ADV")
RULES = {"algorithm.kl_coef": 0.0}
PAPERS = {
    "grpo": Paper(title="GRPO", year=2024, arxiv="2402.03300", needs=NEEDS),
    "dr_grpo": Paper(
        title="Dr. GRPO",
        year=2025,
        arxiv="2503.20783",
        needs=("ROLL", "VER", "ADV"),
        settings={
            **RULES,
            "algorithm.scale": False,
            "algorithm.average": "rows",
            "algorithm.row_divisor": "${actor.rollout.max_response_tokens}",
        },
    ),
    "gspo": Paper(
        title="GSPO",
        year=2025,
        arxiv="2507.18071",
        needs=("ROLL", "VER", "ADV"),
        settings={
            **RULES,
            "algorithm.ratio": "sequence",
            "algorithm.average": "rows",
            "algorithm.clip": 3e-4,
            "algorithm.clip_high": 4e-4,
            "algorithm.mini_batches": 4,
        },
    ),
    "gspo_token": Paper(
        title="GSPO-token",
        year=2025,
        arxiv="2507.18071",
        needs=("ROLL", "VER", "ADV"),
        settings={
            **RULES,
            "algorithm.ratio": "sequence_token",
            "algorithm.average": "rows",
            "algorithm.clip": 3e-4,
            "algorithm.clip_high": 4e-4,
            "algorithm.mini_batches": 4,
        },
    ),
    "clip_higher": Paper(
        title="GRPO with DAPO's clip and average",
        year=2025,
        arxiv="2503.14476",
        needs=("ROLL", "VER", "ADV"),
        settings={**RULES, "algorithm.clip_high": 0.28, "algorithm.mini_batches": 4},
    ),
    "tis": Paper(
        title="Truncated importance sampling between sampler and trainer, per token",
        year=2025,
        needs=("ROLL", "VER", "ADV"),
        settings={**RULES, "algorithm.correction": "token", "algorithm.correction_cap": 2.0},
    ),
    "sequence_tis": Paper(
        title="Truncated importance sampling between sampler and trainer, per response",
        year=2025,
        needs=("ROLL", "VER", "ADV"),
        settings={**RULES, "algorithm.correction": "sequence", "algorithm.correction_cap": 2.0},
    ),
    "mis": Paper(
        title="Masked importance sampling between sampler and trainer",
        year=2025,
        needs=("ROLL", "VER", "ADV"),
        settings={**RULES, "algorithm.correction": "masked", "algorithm.correction_cap": 2.0},
    ),
    "geometric_rejection": Paper(
        title="Rejection of responses by the geometric mean of sampler and trainer",
        year=2025,
        needs=("ROLL", "VER", "ADV"),
        settings={**RULES, "algorithm.correction": "geometric", "algorithm.correction_cap": 2.0},
        assumed="the cap 2, as of the others; with engines that agree one near 1 leaves out what is off",
    ),
    "countdown": Paper(
        title="RL is all you need: R1-Zero on Countdown",
        year=2025,
        arxiv="2503.09512",
        rows=(156,),
        needs=("ROLL", "VER", "ADV"),
        settings={**RULES, "reward.function": "recipes.reasoning._rewards:format_and_answer"},
        assumed="a format worth 0.1; the rows are given as data",
    ),
    "bleuberi": Paper(
        title="BLEUBERI: BLEU as the reward",
        year=2025,
        arxiv="2505.11080",
        rows=(157,),
        needs=("ROLL", "VER", "ADV", "SAMP"),
        settings={**RULES, "reward.function": "recipes.reasoning._rewards:bleu"},
        assumed="add-one smoothing; the prompts with the lowest BLEU are chosen beforehand, as data",
    ),
    "toolrl": Paper(
        title="ToolRL",
        year=2025,
        arxiv="2504.13958",
        rows=(158,),
        status="outline",
        needs=("TURN", "ROLL", "VER", "ADV", "SHAPE"),
        settings={**RULES, "reward.function": "recipes.reasoning._rewards:tool_calls"},
        assumed="one turn; the scales of the two rewards do not change in training",
    ),
    "prior_prompt_reason": Paper(
        title="Prior prompt engineering: reason",
        year=2025,
        arxiv="2505.14157",
        rows=(164,),
        needs=("ROLL", "VER", "ADV"),
        settings={**RULES, "data.train.system": "Think step by step before you answer.", "task": "none"},
        assumed=(
            "the wording; the paper's other prompts (plan, code, recall, null-example) are other texts of the setting"
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Settings of GRPO."""

    samples_per_prompt: int = 8
    """Responses to each prompt: the group."""
    mini_batches: int = 1
    """Optimizer steps in one pass over the batch."""
    epochs: int = 1
    """Passes over the batch."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    clip_high: float | None = None
    """Cut at 1 + clip_high from above instead (DAPO); None: as below."""
    ratio: Literal["token", "sequence", "sequence_token"] = "token"
    """One ratio a token, or the geometric mean of a response's (GSPO; GSPO-token)."""
    average: Literal["tokens", "rows", "rows_with_tokens", "groups"] = "tokens"
    """What the loss is averaged over: all tokens (DAPO), responses (the GRPO paper), responses with a counted token, or
    prompts."""
    row_divisor: float = 0.0
    """With an average over rows: divide each response's sum by this (Dr. GRPO); 0 for its own length."""
    kl_coef: float = 0.02
    """Weight of the KL estimate; 0 for none, and then no reference is held."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL estimate is put: into the loss of each token, or summed over the response into its reward."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k3"
    """Estimator of the KL. In the loss k2 or k3 (the gradient of k1 is 0 in expectation), in the reward k1."""
    kl_cap: float = 0.0
    """Largest KL estimate of a token, nats; a token above it gives no gradient of the KL; 0 for none."""
    scale: bool = True
    """Divide by the standard deviation of the rewards (False: Dr. GRPO)."""
    scale_over: Literal["group", "batch"] = "group"
    """Whose standard deviation: each group's, or that of all rewards of the step."""
    ddof: Literal[0, 1] = 0
    """The standard deviation has divisor n - ddof."""
    eps: float = 1e-6
    """Added to the standard deviation."""
    old: Literal["recomputed", "sampled"] = "recomputed"
    """The policy below the ratio: as the trainer computes it before the updates, or as the sampler drew with."""
    advantage_clip: float = 0.0
    """Advantages are cut to +-this; 0 for no bound."""
    mask_cut: bool = False
    """Responses that the token limit cut have no loss; average=rows_with_tokens leaves them out of the count, too."""
    correction: Literal["none", "token", "sequence", "masked", "geometric"] = "none"
    """Importance correction for rows of an older policy (placement.max_staleness): truncated per token or per
    sequence, masked per token, responses left out by their geometric mean, or none."""
    correction_cap: float = 2.0
    """Largest importance weight (of geometric: mean), >= 1."""


@recipe
def grpo(prompts: Prompts, actor: Actor, reference: Reference, reward: Reward, cfg: GRPO) -> None:
    """GRPO with a KL term towards the reference."""
    batch = actor.generate_sequences(prompts, n=cfg.samples_per_prompt)
    one_update = cfg.mini_batches * cfg.epochs == 1
    in_loss, in_reward = (cfg.kl_coef, 0.0) if cfg.kl_in == "loss" else (0.0, cfg.kl_coef)
    if in_reward or (cfg.old == "recomputed" and not one_update):
        batch = actor.compute_log_prob(batch)
    if cfg.kl_coef:
        batch = reference.compute_ref_log_prob(batch)
    batch = reward.compute_reward(batch)
    if cfg.mask_cut:
        batch = mask_cut_responses(batch)
    estimate = {"kl_estimator": cfg.kl_estimator, "kl_cap": cfg.kl_cap}
    deviation = {"scale": cfg.scale, "scale_over": cfg.scale_over, "ddof": cfg.ddof, "eps": cfg.eps}
    batch = grpo_advantage(batch, kl_coef=in_reward, **estimate, **deviation)
    loss = ppo_clip(
        cfg.clip,
        clip_high=cfg.clip_high,
        ratio=cfg.ratio,
        average=cfg.average,
        row_divisor=cfg.row_divisor,
        kl_coef=in_loss,
        kl_estimator=cfg.kl_estimator,
        kl_cap=cfg.kl_cap,
        advantage_clip=cfg.advantage_clip,
        old=cfg.old,
        on_policy=one_update and cfg.old == "recomputed",
        correction=cfg.correction,
        correction_cap=cfg.correction_cap,
    )
    actor.update_actor(batch, loss=loss, mini_batches=cfg.mini_batches, epochs=cfg.epochs)
