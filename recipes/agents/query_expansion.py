"""GRPO on what a search engine finds for the words that the policy adds to a query (LESER 2025, arXiv 2509.05570).

    q' = q + pi(. | q),   D = search(q'),   r = w_rel * nDCG(D) + w_cov * |D and wanted| / |wanted|

The engine is asked while the policy trains: BM25 over passages on disk. A row's answer is a JSON list of the numbers
(from 0) of the passages that are wanted.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import log2

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.environments.search_tool import index_of
from rlhf_dist.roles import Actor, Prompts
from rlhf_dist.transforms import grpo_advantage

PAPERS = {
    "query_expansion": Paper(
        title="LESER: query expansion with a live search engine",
        year=2025,
        arxiv="2509.05570",
        rows=(163,),
        status="outline",
        needs=("ROLL", "VER", "ADV"),
        assumed="nDCG for relevance, weights of a half each, BM25 for its engine",
    )
}


def ndcg(found: Sequence[int], wanted: Collection[int], most: int) -> float:
    """Normalised discounted cumulative gain of a ranking of at most `most`, with gain 1 for what is wanted: 1 for one
    that begins with all of it, or with `most`."""
    gain = sum(1 / log2(place + 2) for place, one in enumerate(found) if one in wanted)
    return gain / (sum(1 / log2(place + 2) for place in range(min(len(wanted), most))) or 1.0)


def coverage(found: Sequence[int], wanted: Collection[int]) -> float:
    """Share of what is wanted that was found."""
    return sum(one in wanted for one in found) / max(len(wanted), 1)


@dataclass(frozen=True, kw_only=True)
class Expansion(Environment):
    """One turn: words that are added to the query."""

    corpus: str
    column: str
    results: int
    relevance: float
    """Weight of nDCG."""
    covered: float
    """Weight of coverage."""

    def prepare(self) -> None:
        """See Environment."""
        index_of(self.corpus, self.column)

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        wanted = set(json.loads(row.answer))
        reply = await chat.generate()
        hits = await chat.run(index_of(self.corpus, self.column).search, f"{row.prompt} {reply.text}", self.results)
        found = [number for number, _ in hits]
        chat.reward(self.relevance * ndcg(found, wanted, self.results) + self.covered * coverage(found, wanted))


@dataclass(frozen=True, kw_only=True)
class QueryExpansion:
    """Settings of query expansion."""

    corpus: str = "corpus.parquet"
    """Parquet or JSON-lines file of passages."""
    column: str = "text"
    """Its column of passages."""
    results: int = 10
    """Passages that are looked at."""
    relevance: float = 0.5
    """Weight of nDCG."""
    coverage: float = 0.5
    """Weight of the share of what is wanted that was found."""
    samples_per_prompt: int = 8
    """Expansions of each query: the group."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""


@recipe
def query_expansion(prompts: Prompts, actor: Actor, cfg: QueryExpansion) -> None:
    """GRPO with a search engine as the reward."""
    environment = Expansion(
        corpus=cfg.corpus, column=cfg.column, results=cfg.results, relevance=cfg.relevance, covered=cfg.coverage
    )
    batch = actor.run_episodes(
        prompts, environment=environment, n=cfg.samples_per_prompt, limits=EpisodeLimits(turns=1, seconds=300.0)
    )
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(cfg.clip, on_policy=True))
