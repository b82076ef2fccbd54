"""Episodes as rows: drawn alike whatever runs beside them, and token for token what the model was given and drew."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from rlhf_dist.environments import Chat, Environment, EpisodeLimits, Row
from tests.episodes.conftest import Play
from workers.engines.generation.transformers import TransformersEngine
from workers.episodes.leaves import Episode
from workers.episodes.rows import episode_columns


class Talk(Environment):
    """Two or three turns, as the random numbers of the episode say, with a tool that takes a while."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay

    async def episode(self, chat: Chat, row: Row) -> None:
        for turn in range(int(chat.rng.integers(2, 4))):
            if turn:
                await chat.run(time.sleep, self.delay * float(np.random.default_rng().random()))
                chat.say(f" so {turn}:")
            reply = await chat.generate(max_tokens=6)
            chat.reward(float(len(reply.text)))


def tokens(episodes: list[Episode]) -> list[list[int]]:
    columns = episode_columns(episodes, rewards=True)
    return [columns["response_ids"].row(row).tolist() for row in range(len(episodes))]


def test_what_is_drawn_depends_on_row_copy_and_turn_and_not_on_what_runs_beside_it(play_all: Play) -> None:
    texts = ("2+2=", "1+10=", "7*3=")
    together = tokens(play_all(Talk(0.05), texts=texts, n=3))
    assert tokens(play_all(Talk(), texts=texts, n=3)) == together, "tools took other times"
    assert tokens(play_all(Talk(), EpisodeLimits(concurrent=1), texts=texts, n=3)) == together, "one after the other"
    assert tokens(play_all(Talk(), texts=texts, n=3, rows=(2,))) == together[6:], "another rank has the other rows"
    other = tokens(play_all(Talk(), texts=texts, n=3, seed=1))
    assert all(mine != theirs for mine, theirs in zip(together, other, strict=True))
    assert len({tuple(row) for row in together}) == 9


def test_columns_are_what_the_model_was_given_and_drew(play_all: Play, engine: TransformersEngine) -> None:
    episodes = play_all(Talk(), n=2)
    columns = episode_columns(episodes, rewards=True)
    for row, episode in enumerate(episodes):
        ids, turn = columns["response_ids"].row(row), columns["turn"].row(row)
        mask, log_probs = columns["response_mask"].row(row), columns["rollout_log_probs"].row(row)
        assert (mask == (turn >= 0)).all() and (log_probs[mask == 0] == 0).all() and (log_probs[mask == 1] < 0).all()
        assert columns["policy_version"].row(row).tolist() == [0] * len(ids)
        whole = np.concatenate([columns["prompt_ids"].row(row), ids])
        wanted = _log_probs(engine, whole)[-len(ids) :]
        assert np.abs(wanted - log_probs)[mask == 1].max() < 1e-4, "each token was drawn behind exactly this text"
        rewards = columns["token_rewards"].row(row)
        ends = [np.flatnonzero(turn == k)[-1] for k in range(episode.chat.conversation.turns)]
        assert rewards[ends].tolist() == list(episode.chat.rewards.values()) and rewards.sum() == rewards[ends].sum()
        assert columns["rewards"].row(row) == rewards.sum()


def _log_probs(engine: TransformersEngine, ids: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    import torch

    model = engine._running("test")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0, :-1].log_softmax(-1)
    found: np.ndarray = logits.gather(1, torch.tensor(ids[1:, None].astype(np.int64)))[:, 0].numpy()  # type: ignore[type-arg]
    return found


def test_the_environment_may_say_the_prompt_itself(play_all: Play, model: Path) -> None:
    class Game(Environment):
        async def episode(self, chat: Chat, row: Row) -> None:
            chat.say("you play a game\n", role="system")
            chat.say(f"first {row.answer}: ")
            await chat.generate(max_tokens=4)
            chat.reward(0.0)

    (episode,) = play_all(Game(), texts=("2+2=",))
    prompt = episode.chat.conversation.prompt
    assert episode.chat.conversation.tokenizer.decode(prompt) == "you play a game\nfirst 4: "


def test_a_turn_that_was_cut_goes_on(play_all: Play) -> None:
    class Pieces(Environment):
        async def episode(self, chat: Chat, row: Row) -> None:
            for _ in range(3):
                await chat.generate(max_tokens=2)
            chat.reward(1.0)

    (episode,) = play_all(Pieces(), texts=("2+2=",), seed=1)
    columns = episode_columns([episode], rewards=True)
    assert columns["turn"].row(0).tolist() == [0, 0, 1, 1, 2, 2] and columns["response_mask"].row(0).all()
    assert [message["role"] for message in episode.chat.conversation.messages] == ["user", "assistant"]
