"""Whole pipelines: files of stages, each of several recipes."""

from rlhf_dist.catalogue import Paper

RLHF = ("RMT", "ROLL", "RM", "REF", "CRIT")
PAPERS = {
    "tulu3": Paper(
        title="Tulu 3",
        year=2024,
        arxiv="2411.15124",
        rows=(4,),
        needs=("SFT", "PREF", "VER", "ROLL", "CRIT", "EVAL", "AUX"),
        assumed="the reward of a verified answer is 1, not alpha = 10; one learning rate a stage",
    ),
    "alpaca_farm": Paper(
        title="AlpacaFarm",
        year=2023,
        arxiv="2305.14387",
        rows=(5,),
        status="outline",
        needs=("ROLL", "RM", "REF", "CRIT", "JUDGE", "FILT"),
        assumed="binary FeedME is sft on rows marked good, best-of-n and win rates are recipes, and none a stage; "
        "constants are those of the recipes",
    ),
    "summarize_from_feedback": Paper(
        title="Learning to summarize from human feedback",
        year=2020,
        arxiv="2009.01325",
        rows=(6,),
        needs=RLHF,
        assumed="SFT is the first stage; beta 0.05",
    ),
    "okapi": Paper(
        title="Okapi: multilingual RLHF",
        year=2023,
        arxiv="2307.16039",
        rows=(8,),
        needs=("SFT", "RMT", "ROLL", "RM", "CRIT"),
        assumed="one language a launch; its rows are data",
    ),
    "unpacking_dpo_ppo": Paper(
        title="Unpacking DPO and PPO",
        year=2024,
        arxiv="2406.09279",
        rows=(10,),
        status="study",
        needs=("PREF", "RMT", "ROLL", "RM", "CRIT", "SAMP", "EVAL"),
        assumed="the evaluation is the held-out reward of data.heldout and the recipe pair_accuracy",
    ),
    "mixed_preference": Paper(
        title="MPO: DPO on easy pairs, then PPO on hard prompts",
        year=2024,
        arxiv="2403.19443",
        rows=(70,),
        status="outline",
        needs=("RM", "FILT", "PREF", "REF", "SNAP", "ROLL", "CRIT", "BRANCH"),
        assumed="the pairs are parted by the reward model's gap beforehand: easy ones and hard prompts are two files",
    ),
    "easy_to_hard": Paper(
        title="Easy-to-hard generalisation",
        year=2024,
        arxiv="2403.09472",
        rows=(129,),
        status="outline",
        needs=("RMT", "TOK", "ROLL", "CRIT", "SAMP", "EVAL"),
        assumed=(
            "an outcome reward model of easy problems in place of one of steps; hard prompts are a file of their own"
        ),
    ),
    "online_offline_gap": Paper(
        title="Online against offline alignment",
        year=2024,
        arxiv="2405.08448",
        rows=(85,),
        status="study",
        needs=("ROLL", "RM", "PREF", "EVAL"),
        assumed="one loss, IPO; the frontier of KL and win rate is read from the metrics of both stages",
    ),
    "suboptimal_on_policy": Paper(
        title="Preference fine-tuning should use suboptimal, on-policy data",
        year=2024,
        arxiv="2404.14367",
        rows=(84,),
        status="study",
        needs=("ROLL", "RM", "PREF", "SFT", "ADV", "EVAL"),
        assumed=(
            "four corners of the grid: offline or on-policy pairs, with (DPO) and without (RAFT) a negative gradient; "
            "reuse of samples is algorithm.epochs"
        ),
    ),
    "genies": Paper(
        title="GENIES: reward models under distribution shift",
        year=2023,
        arxiv="2311.07723",
        rows=(201,),
        status="study",
        needs=("EVAL", "RMT"),
        assumed="one of the 69 shifts a launch",
    ),
    "weak_to_strong_deception": Paper(
        title="Super(ficial) alignment: weak-to-strong deception",
        year=2024,
        arxiv="2406.11431",
        rows=(131,),
        status="study",
        needs=("XLM", "RMT", "PREF", "EVAL"),
        assumed="reward models, no DPO and SimPO; a conflicting target is what the pairs of the supervisor prefer",
    ),
    "concise_reasoning": Paper(
        title="Concise reasoning by a second phase of RL",
        year=2025,
        arxiv="2504.05185",
        rows=(154,),
        needs=("ROLL", "VER", "CRIT", "SAMP", "BRANCH"),
        assumed="the few problems of the second phase, solved now and then, are a file of their own",
    ),
}
