"""`check_environment`: an environment played for real on a tiny random model, twice, and compared.

    travels         it is pickled by value, as it is sent to workers
    traced          a recipe can run it: its `reads` are columns that prompts have
    ends            every episode ends as the policy's doing, within the limits
    the same again  one episode after the other, with a second instance: tokens, outcomes and rewards to the last bit
    token-exact     the log-prob of each token that was drawn is that of the model given exactly the row's tokens

A random model writes nonsense: an environment has to end well on it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_dist.batch import Batch, Column
from rlhf_dist.data.tokenizer import TextTokenizer
from rlhf_dist.environments import Environment, EpisodeLimits
from rlhf_dist.schema import COLUMNS
from rlhf_dist.testing.failed import CheckFailed
from rlhf_dist.testing.tiny_model import save_llama

if TYPE_CHECKING:
    from workers.episodes.leaves import Episode

PROMPT_TOKENS = 256
TOLERANCE = 1e-3
"""Largest difference of a log-prob from that of the whole row, float32; tiny models are within 1e-5."""


def check_environment(
    environment: Environment,
    rows: Sequence[Mapping[str, Any]],
    *,
    n: int = 2,
    limits: EpisodeLimits | None = None,
    response_tokens: int = 128,
    model: str | Path | None = None,
    seed: int = 0,
    speakers: Sequence[str] = (),
) -> list[list[dict[str, Any]]]:
    """Raises CheckFailed for what does not hold (see the module's docstring). Returns each episode's transcript.

    rows: `prompt`, `answer` and what else the environment's `reads` name, texts and numbers. n: episodes of each.
    model: a folder; None for a tiny one with a token for each character. speakers: names of others who speak in it, all
    played by that model.
    """
    name = type(environment).__name__
    _check_traced(name, environment, speakers)
    with tempfile.TemporaryDirectory(prefix="check_environment_") as scratch:
        folder = Path(model) if model is not None else save_llama(Path(scratch) / "model", hidden=64)
        stage = _Stage(folder, response_tokens, n, seed, speakers)
        limits = limits or EpisodeLimits()
        first = stage.play(_travelled(name, environment), rows, limits)
        _check_ends(name, first, rows, n)
        second = stage.play(_travelled(name, environment), rows, replace(limits, concurrent=1))
        _check_same(name, first, second, n)
        stage.check_exact(name, first)
    from workers.episodes.rows import transcript

    return [transcript(episode) for episode in first]


class _Stage:
    """A tiny engine, on which episodes are played."""

    def __init__(self, folder: Path, response_tokens: int, n: int, seed: int, speakers: Sequence[str]) -> None:
        import torch

        from rlhf_dist.config import ModelConfig, RolloutConfig
        from workers.engines.generation.transformers import TransformersEngine

        self.folder, self.response_tokens, self.n, self.seed = folder, response_tokens, n, seed
        self.speakers = speakers
        self.engine = TransformersEngine(
            model_path=str(folder),
            rollout=RolloutConfig(
                engine="transformers", max_prompt_tokens=PROMPT_TOKENS, max_response_tokens=response_tokens
            ),
            rank=0,
            world=1,
            device=torch.device("cpu"),
        )
        self.engine.load(ModelConfig(path=str(folder)), seed)

    def play(self, environment: Environment, rows: Sequence[Mapping[str, Any]], limits: EpisodeLimits) -> list[Episode]:
        from rlhf_dist.sampling import Sampling
        from rlhf_dist.wire import Call
        from workers.episodes.run import Speaker, run_episodes

        batch, count = _batch(self.folder, rows), len(rows)
        call = Call(
            num_rows=count, row_index=np.arange(count), step=0, node="check_environment", line="", seed=self.seed
        )
        sampling = Sampling(n=self.n, max_tokens=self.response_tokens)
        model = str(self.folder)
        others = [
            Speaker(
                name=name,
                engine=self.engine,
                model=model,
                sampling=sampling,
                prompt_tokens=PROMPT_TOKENS,
                learns=False,
            )
            for name in self.speakers
        ]
        return run_episodes(self.engine, model, batch, call, environment, limits, sampling, PROMPT_TOKENS, others)

    def check_exact(self, name: str, episodes: Sequence[Episode]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, trust_remote_code=False)
        for number, episode in enumerate(episodes):
            talk = episode.chat.conversation
            ids = np.concatenate([np.array(talk.prompt), *(piece.token_ids for piece in talk.pieces)]).astype(np.int64)
            with torch.no_grad():
                said = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1].log_softmax(-1)
            found = said.gather(1, torch.from_numpy(ids)[1:, None])[:, 0].numpy()[len(talk.prompt) - 1 :]
            drawn = np.concatenate([np.full(len(piece.token_ids), piece.turn >= 0) for piece in talk.pieces])
            kept = np.concatenate([piece.log_probs for piece in talk.pieces])
            apart = float(np.abs(found - kept)[drawn].max())
            if not apart <= TOLERANCE:
                raise CheckFailed(name, f"episode {number} was not drawn from the tokens that its row has: {apart:.3g}")


def _travelled(name: str, environment: Environment) -> Environment:
    import cloudpickle

    try:
        return cloudpickle.loads(cloudpickle.dumps(environment))  # type: ignore[no-any-return]
    except Exception as error:
        raise CheckFailed(name, f"it cannot be sent to workers: {type(error).__name__}: {error}") from error


def _check_traced(name: str, environment: Environment, speakers: Sequence[str]) -> None:
    from rlhf_dist.dataflow.recipe import recipe
    from rlhf_dist.dataflow.trace import trace
    from rlhf_dist.roles import Actor, Prompts

    class Own(Prompts):
        fields = {column: "text" for column in environment.reads if column not in COLUMNS}

    def check(prompts: Batch, actor: Any) -> None:
        actor.run_episodes(prompts, environment=environment, speakers=dict.fromkeys(speakers, actor))

    check.__annotations__ = {"prompts": Own, "actor": Actor, "return": None}
    try:
        trace(recipe(check))
    except ValueError as error:
        raise CheckFailed(name, str(error)) from error


def _batch(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Batch:
    tokenizer = TextTokenizer(folder)
    columns: dict[str, Column] = {}
    for key in {"prompt", "answer", *(key for row in rows for key in row)}:
        values = [row.get(key, "") for row in rows]
        columns[key] = Column.strings(values) if isinstance(values[0], str) else Column.dense(values)
    texts = columns["prompt"].rows()
    if tokenizer.has_chat_template:
        texts = [tokenizer.render([{"role": "user", "content": text}]) for text in texts]
    ids = tokenizer.encode(texts, special_tokens=not tokenizer.has_chat_template)
    return Batch({**columns, "prompt_ids": Column.ragged(ids, np.int32)})


def _check_ends(name: str, episodes: Sequence[Episode], rows: Sequence[Mapping[str, Any]], n: int) -> None:
    for episode in episodes:
        if not episode.trains:
            where = f"{_named(episode, n)} of {rows[episode.number // n]}, turn {episode.chat.turns}"
            raise CheckFailed(name, f"{where}: {episode.outcome}: {episode.detail} {episode.traceback[-600:]}")


def _check_same(name: str, first: Sequence[Episode], second: Sequence[Episode], n: int) -> None:
    branches = [[(episode.number, episode.branch) for episode in episodes] for episodes in (first, second)]
    if branches[0] != branches[1]:
        only = sorted(set(branches[0]) ^ set(branches[1]))[:1]
        raise CheckFailed(name, f"it has other branches when it is played again: (episode, branch) {only} only once")
    for one, other in zip(first, second, strict=True):
        for what in ("prompt", "turns", "outcome", "rewards", "tokens"):
            mine, theirs = _part(one, what), _part(other, what)
            if mine != theirs:
                raise CheckFailed(
                    name,
                    f"{_named(one, n)} of row {one.number // n} has other {what} when it is played again: {mine} and "
                    f"{theirs}; it depends on something besides its row and chat.rng (time, what it keeps on itself)",
                )


def _named(episode: Episode, n: int) -> str:
    return f"episode {episode.number % n}" + (f", branch {episode.branch}," if episode.branch else "")


def _part(episode: Episode, what: str) -> Any:
    talk = episode.chat.conversation
    if what == "tokens":
        return [piece.token_ids.tolist() for piece in talk.pieces]
    if what in ("prompt", "turns"):
        return getattr(talk, what)
    return getattr(episode if what == "outcome" else episode.chat, what)
