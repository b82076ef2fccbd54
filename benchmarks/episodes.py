"""256 episodes of 1 to 6 turns with tools that take a while (lognormal, 0.5 s in the mean), on a tiny model.

    ours           an episode's next turn is drawn as soon as its tool has answered, beside whatever else is drawn
    waves          the same episodes in lock-step: all turns of a round are drawn, then all tools are waited for
    engine_bound   the same turns with tools that take no time: what the engine alone allows

The three draw the same tokens, which is checked. `cpu_s` is what each cost, where `seconds` on a shared machine say as
much about its other jobs; `tools_s` the seconds that no engine can save, of the longest episode and of the waves.

Beside them: 64 of these episodes, one of which waits for a tool of 5 s; and training on the leaves of episodes that
branch, with and without computing once what they share (`tree_training.py`). `--simulated`: in place of all that, what
up to 10,000 episodes at one time cost beside an engine that costs nothing (`many_episodes.py`). One JSON line last.

    make bench-episodes ARGS="--concurrent 64"
    make bench-episodes ARGS="--turn-tokens 32"
    make bench-episodes ARGS="--simulated --episodes 10000"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.lock_step import SAID, TURNS, latencies_of, play_waves, rows_of, tool_seconds
from benchmarks.many_episodes import many_episodes
from benchmarks.tree_training import Branching, tree_training
from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import ModelConfig, RolloutConfig
from rlhf_dist.data.conversation import Conversation
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from rlhf_dist.sampling import Sampling
from rlhf_dist.testing.tiny_model import save_llama
from workers.engines.generation.interface import GenerationEngine
from workers.episodes.leaves import Episode
from workers.episodes.rows import episode_columns
from workers.episodes.run import run_episodes

STRAGGLER_S = 5.0


class Tools(Environment):
    """Turns with a tool between them; `slow` 0: it takes no time."""

    def __init__(self, slow: float, turn_tokens: int) -> None:
        self.slow, self.turn_tokens = slow, turn_tokens

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        for seconds in [*self.waits(chat, row), None]:
            await chat.generate(max_tokens=self.turn_tokens)
            if seconds is not None:
                await asyncio.sleep(seconds)
                chat.say(SAID)
        chat.reward(1.0)

    def waits(self, chat: Chat, row: Row) -> list[float]:
        """Seconds of each tool."""
        return [self.slow * latency for latency in latencies_of(chat.rng)]


class OneStraggler(Tools):
    """The first row has one tool, which takes 5 s."""

    def waits(self, chat: Chat, row: Row) -> list[float]:
        """See Tools."""
        return [STRAGGLER_S] if row.prompt == "0+1=" else super().waits(chat, row)


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--simulated", action="store_true", help="cost of the host with an engine that costs nothing")
    parser.add_argument("--episodes", type=int, help="256, or 10,000 beside a simulated engine")
    parser.add_argument("--concurrent", type=int, help="most episodes under way at one time, in waves too; all")
    parser.add_argument("--turn-tokens", type=int, default=16)
    parser.add_argument("--trees", type=int, default=8, help="episodes that branch, for the part about training")
    arguments = parser.parse_args()
    if arguments.simulated:
        simulated(arguments.episodes or 10_000, arguments.turn_tokens)
    else:
        measured(arguments)


def simulated(most: int, turn_tokens: int) -> None:
    """The cost of up to `most` episodes beside a simulated engine."""
    tokens = TURNS * (turn_tokens + len(SAID))
    counts = [count for count in (100, 1_000) if count < most]
    found = many_episodes([*counts, most], Tools(1.0, turn_tokens), rows_of, tokens)
    print(json.dumps({"engine": "simulated", "turn_tokens": turn_tokens, "episodes": found}))


def measured(arguments: argparse.Namespace) -> None:
    """The three ways, and training on trees."""
    count = arguments.episodes or 256
    with tempfile.TemporaryDirectory() as scratch:
        model = save_llama(Path(scratch) / "model", hidden=128)
        bench = Bench(arguments.engine, model, arguments.turn_tokens, arguments.concurrent)
        bench.ours(8, slow=0.0)  # what the first call alone costs
        bound_took, bound = bench.ours(count, slow=0.0)
        ours_took, ours = bench.ours(count, slow=1.0)
        waves_took, waves = bench.waves(count)
        straggler = bench.straggler(min(count, 64))
        trained = tree_training(bench.model, bench.leaves(arguments.trees), budget=8192, turns=5)
        bench.engine.close()
    if waves != _turns(ours) or _turns(bound) != waves:
        raise SystemExit("the three ways must draw the same tokens, and did not")
    tokens = sum(len(turn) for turns in waves for turn in turns)
    result = {
        "engine": arguments.engine,
        "episodes": count,
        "concurrent": arguments.concurrent or count,
        "turn_tokens": arguments.turn_tokens,
        "tokens": tokens,
        "tools_s": tool_seconds(count, arguments.concurrent),
        "ours": {
            **_speed(tokens, ours_took),
            "lost": sum(not episode.trains for episode in ours),
            "outcomes": dict(Counter(episode.outcome for episode in ours)),
        },
        "waves": _speed(tokens, waves_took),
        "engine_bound": _speed(tokens, bound_took),
        "ours_over_waves": round(waves_took.seconds / ours_took.seconds, 2),
        "straggler": straggler,
        "tree_training": trained,
    }
    print(json.dumps(result))


@dataclass(frozen=True)
class Took:
    """What one way to play them took."""

    seconds: float
    cpu_s: float
    """Of all threads of this process."""


class Clock:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._seconds, self._cpu_s = time.perf_counter(), time.process_time()

    def took(self) -> Took:
        """Since then."""
        return Took(time.perf_counter() - self._seconds, time.process_time() - self._cpu_s)


class Bench:
    """An engine, and the ways to play episodes on it."""

    def __init__(self, kind: str, model: Path, turn_tokens: int, concurrent: int | None) -> None:
        self.model, self.turn_tokens, self.concurrent = model, turn_tokens, concurrent
        self.tokens = TURNS * (turn_tokens + len(SAID))
        rollout = RolloutConfig(
            engine=kind,
            max_prompt_tokens=self.tokens + 8,
            max_response_tokens=self.tokens,
            kv_cache_bytes=256 << 20,
        )
        where: dict[str, Any] = {"rank": 0, "world": 1, "device": torch.device("cpu")}
        self.engine: GenerationEngine
        if kind == "vllm":
            from workers.engines.generation.vllm import VllmEngine

            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            self.engine = VllmEngine(model_path=str(model), rollout=rollout, **where)
        else:
            from workers.engines.generation.transformers import TransformersEngine

            self.engine = TransformersEngine(model_path=str(model), rollout=rollout, **where)
        self.engine.load(ModelConfig(path=str(model)), 0)

    def ours(self, count: int, *, slow: float) -> tuple[Took, list[Episode]]:
        """What they took, and the episodes; slow: factor on what tools take."""
        return self.played(Tools(slow, self.turn_tokens), count)

    def straggler(self, count: int) -> dict[str, Any]:
        """Seconds of `count` episodes with tools that take no time, but for one of 5 s, and how many are kept, with
        what a step may do about it."""
        quick, slow = Tools(0.0, self.turn_tokens), OneStraggler(0.0, self.turn_tokens)
        ways: dict[str, tuple[Environment, dict[str, Any]]] = {
            "without": (quick, {}),
            "waits": (slow, {}),
            "first_by_time": (slow, {"wanted": count - count // 8, "first": "time"}),
            "first_by_turns": (slow, {"wanted": count - count // 8}),
            "step_seconds": (slow, {"step_seconds": STRAGGLER_S / 2}),
        }
        found = {}
        for name, (environment, more) in ways.items():
            took, episodes = self.played(environment, count, **more)
            kept = sum(episode.trains for episode in episodes)
            found[name] = {"seconds": round(took.seconds, 2), "kept": kept}
        return found

    def played(
        self, environment: Environment, count: int, *, step_seconds: float | None = None, **groups: Any
    ) -> tuple[Took, list[Episode]]:
        """What they took, and the episodes of `count` rows."""
        batch, call = rows_of(count)
        limits = EpisodeLimits(
            turns=TURNS, seconds=600.0, concurrent=self.concurrent or count, step_seconds=step_seconds
        )
        sampling, model = Sampling(max_tokens=self.tokens), str(self.model)
        clock = Clock()
        episodes = run_episodes(
            self.engine, model, batch, call, environment, limits, sampling, self.tokens + 8, **groups
        )
        return clock.took(), episodes

    def leaves(self, count: int) -> Batch:
        """The rows of episodes that branch, two turns' tokens a turn."""
        batch, call = rows_of(count)
        environment, sampling = Branching(self.turn_tokens * 2), Sampling(max_tokens=self.tokens)
        episodes = run_episodes(
            self.engine, str(self.model), batch, call, environment, EpisodeLimits(), sampling, self.tokens + 8
        )
        columns = episode_columns(episodes, rewards=True, trees=[episode.number for episode in episodes])
        groups = np.array([episode.number for episode in episodes], dtype=np.int64)
        return Batch({**columns, "group_id": Column(groups)})

    def waves(self, count: int) -> tuple[Took, list[list[list[int]]]]:
        """What they took in lock-step, and the tokens of each turn."""
        clock = Clock()
        talks = play_waves(self.engine, self.model, count, self.concurrent, self.turn_tokens)
        return clock.took(), [_drawn(talk) for talk in talks]


def _turns(episodes: list[Episode]) -> list[list[list[int]]]:
    """The tokens of each turn of each episode."""
    return [_drawn(episode.chat.conversation) for episode in episodes]


def _drawn(talk: Conversation) -> list[list[int]]:
    return [piece.token_ids.tolist() for piece in talk.pieces if piece.turn >= 0]


def _speed(tokens: int, took: Took) -> dict[str, float]:
    return {
        "tokens_per_s": round(tokens / took.seconds, 1),
        "seconds": round(took.seconds, 2),
        "cpu_s": round(took.cpu_s, 2),
    }


if __name__ == "__main__":
    main()
