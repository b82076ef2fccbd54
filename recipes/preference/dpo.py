"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its relatives with a reference.

    L = -log sigma(beta [log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l)])        a pair: two labelled rows of a group

`kind` takes another loss on the same pairs (`_pairs.py` has their formulas; `ipo`: (D - 1/(2 tau))^2), `nll_coef` adds
-log pi(y_w): DPO with the SFT loss as a regulariser.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from recipes.preference._pairs import WithReference, with_reference
from rlhf_dist.algorithms import dpo as dpo_loss
from rlhf_dist.algorithms import ipo, loss
from rlhf_dist.algorithms.losses.pairs import chosen_and_rejected
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.roles import Actor, Preferences, Reference

NEEDS = ("PREF", "REF")
PAPERS = {
    "dpo": Paper(title="DPO", year=2023, arxiv="2305.18290", rows=(45,), needs=NEEDS),
    "ipo": Paper(
        title="IPO", year=2023, arxiv="2310.12036", rows=(46,), needs=NEEDS, settings={"algorithm.kind": "ipo"}
    ),
    "cdpo": Paper(
        title="Conservative DPO (cDPO)",
        year=2023,
        needs=NEEDS,
        settings={"algorithm.label_smoothing": 0.1},
        assumed="the share of flipped labels depends on the data",
    ),
    "robust": Paper(
        title="Robust DPO (rDPO)",
        year=2024,
        arxiv="2403.00409",
        rows=(49,),
        needs=NEEDS,
        settings={"algorithm.label_smoothing": 0.1, "algorithm.smoothing": "robust"},
        assumed="the share of flipped labels depends on the data",
    ),
    "length_normalised": Paper(
        title="Length-normalised DPO (Tulu 3)",
        year=2024,
        arxiv="2411.15124",
        needs=NEEDS,
        settings={"algorithm.length_normalised": True, "algorithm.beta": 5.0},
    ),
    "rpo": Paper(
        title="RPO: the SFT loss as an adversarial regulariser",
        year=2024,
        arxiv="2405.16436",
        rows=(50,),
        needs=(*NEEDS, "AUX"),
        settings={"algorithm.nll_coef": 0.005},
        assumed="eta beta, the weight of the SFT loss",
    ),
    "exo": Paper(
        title="EXO on pairs",
        year=2024,
        arxiv="2402.00856",
        rows=(41,),
        needs=NEEDS,
        settings={"algorithm.kind": "exo"},
        assumed="epsilon 1e-3, as TRL has it",
    ),
    "hinge": Paper(
        title="Hinge on log-ratios", year=2023, arxiv="2309.06657", needs=NEEDS, settings={"algorithm.kind": "hinge"}
    ),
    "sppo": Paper(
        title="SPPO's loss, hard labels",
        year=2024,
        arxiv="2405.00675",
        needs=NEEDS,
        settings={"algorithm.kind": "sppo", "algorithm.beta": 0.001},
    ),
    "nca": Paper(title="NCA on pairs", year=2024, arxiv="2402.05369", needs=NEEDS, settings={"algorithm.kind": "nca"}),
    "apo_zero": Paper(
        title="Anchored preference optimisation, zero",
        year=2024,
        arxiv="2408.06266",
        needs=NEEDS,
        settings={"algorithm.kind": "apo_zero"},
    ),
    "apo_down": Paper(
        title="Anchored preference optimisation, down",
        year=2024,
        arxiv="2408.06266",
        needs=NEEDS,
        settings={"algorithm.kind": "apo_down"},
    ),
    "dpop": Paper(
        title="DPO-Positive (Smaug)",
        year=2024,
        arxiv="2402.13228",
        needs=NEEDS,
        settings={"algorithm.kind": "dpop", "algorithm.beta": 0.3},
    ),
    "cal_dpo": Paper(
        title="Cal-DPO",
        year=2024,
        arxiv="2412.14516",
        status="outline",
        needs=NEEDS,
        settings={"algorithm.kind": "cal_dpo"},
        assumed="the formula is from memory of the paper, its beta the usual one",
    ),
    "discopop": Paper(
        title="DiscoPOP",
        year=2024,
        arxiv="2406.08414",
        needs=NEEDS,
        settings={"algorithm.kind": "discopop", "algorithm.beta": 0.05},
    ),
    "pedagogical": Paper(
        title="Pedagogical alignment: DPO on pairs of tutors' moves",
        year=2024,
        arxiv="2402.05000",
        rows=(67,),
        needs=NEEDS,
        assumed="only the pairs differ: data.train.path names them",
    ),
    "fipo": Paper(
        title="FIPO: pairs of prompts for an optimiser of prompts",
        year=2024,
        arxiv="2402.11811",
        rows=(188,),
        needs=("PREF", "SFT"),
        settings={"algorithm.kind": "ipo"},
        assumed="only the pairs differ; SFT before it is the recipe sft",
    ),
    "mepo": Paper(
        title="MePO: pairs of prompts by their merits",
        year=2025,
        arxiv="2505.09930",
        rows=(189,),
        status="outline",
        needs=("PREF", "JUDGE"),
        assumed="the pairs, which a light model makes and judges, are given as data",
    ),
}


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Settings of DPO."""

    kind: Literal[
        "dpo", "ipo", "hinge", "exo", "sppo", "nca", "apo_zero", "apo_down", "dpop", "cal_dpo", "discopop"
    ] = "dpo"
    """The loss on a pair."""
    beta: float = 0.1
    """Strength of the pull towards the reference (tau of ipo)."""
    label_smoothing: float = 0.0
    """Of dpo: share of labels assumed to be wrong, in [0, 0.5)."""
    smoothing: Literal["conservative", "robust"] = "conservative"
    """What is done about them: cDPO, or robust DPO's unbiased loss."""
    length_normalised: bool = False
    """Of dpo and ipo: mean instead of sum of the log-ratios over a response's tokens."""
    nll_coef: float = 0.0
    """Weight of -log pi(y_w) beside the loss; 0 for none."""
    mini_batches: int = 1
    """Optimizer steps for each batch from the source."""


@loss(reads=("label",), average="groups")
def chosen_nll(model, rows):
    """-log pi of the chosen response of each pair."""
    value = -chosen_and_rejected(rows.sum_tokens(model.log_probs), rows)[0]
    return value, {"chosen_nll": value.detach()}


@recipe
def dpo(pairs: Preferences, actor: Actor, reference: Reference, cfg: DPO) -> None:
    """DPO on given pairs."""
    pairs = reference.compute_ref_log_prob(pairs)
    if cfg.kind in get_args(WithReference):
        loss_of = with_reference(cfg.kind, cfg.beta)
    elif cfg.kind == "ipo":
        loss_of = ipo(cfg.beta, length_normalised=cfg.length_normalised)
    else:
        loss_of = dpo_loss(
            cfg.beta,
            label_smoothing=cfg.label_smoothing,
            smoothing=cfg.smoothing,
            length_normalised=cfg.length_normalised,
        )
    terms = [(pairs, loss_of)] if not cfg.nll_coef else [(pairs, loss_of), (pairs, chosen_nll(), cfg.nll_coef)]
    actor.update_actor(terms, mini_batches=cfg.mini_batches)
