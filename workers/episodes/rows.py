"""Episodes as rows of an ordinary batch, and what is counted and logged of those that are none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_dist.batch import Column
from rlhf_dist.data.conversation import Conversation, Piece
from rlhf_dist.environments.outcomes import OF_OTHERS, OF_POLICY
from rlhf_dist.metrics import Largest, Mean, Metrics
from workers.episodes.chat import Segment
from workers.episodes.leaves import Episode

_TYPES = {
    "segment": np.int32,
    "response_ids": np.int32,
    "response_mask": np.uint8,
    "rollout_log_probs": np.float32,
    "policy_version": np.int32,
    "turn": np.int32,
    "token_rewards": np.float32,
}


def episode_columns(
    episodes: Sequence[Episode], *, rewards: bool, trees: Sequence[int] | None = None
) -> dict[str, Column]:
    """The columns of these episodes, all of which train; rewards: theirs among them. trees: what each one's tree is
    called, for the columns of trees; None without those."""
    talks = [episode.chat.conversation for episode in episodes]
    tokens = [_token_columns(episode) for episode in episodes]
    for row, segments in zip(tokens, _segments(episodes), strict=True):
        row["segment"] = segments
    columns = {name: Column.ragged([row[name] for row in tokens], dtype) for name, dtype in _TYPES.items()}
    columns["prompt_ids"] = Column.ragged([np.array(talk.prompt, np.int32) for talk in talks], np.int32)
    texts = [_texts(talk, row["response_ids"].tolist()) for talk, row in zip(talks, tokens, strict=True)]
    columns["response"] = Column.strings([text for text, _ in texts])
    columns["raw_response"] = Column.strings([raw for _, raw in texts])
    columns["finished"] = Column.dense([episode.outcome == "finished" for episode in episodes], dtype=np.uint8)
    columns["outcome"] = Column.strings([episode.outcome for episode in episodes])
    columns["turns"] = Column.dense([episode.chat.turns for episode in episodes], dtype=np.int32)
    columns["transcript"] = Column.strings([json.dumps(transcript(episode)) for episode in episodes])
    if trees is None:
        del columns["segment"]
    else:
        columns["tree"] = Column.dense(trees, dtype=np.int64)
        columns["branch"] = Column.strings([episode.branch for episode in episodes])
        columns["leaf"] = Column.dense([episode.leaf for episode in episodes], dtype=np.uint8)
    if rewards:
        columns["rewards"] = Column.dense([episode.total for episode in episodes], dtype=np.float32)
    else:
        del columns["token_rewards"]
    return columns


def transcript(episode: Episode) -> list[dict[str, Any]]:
    """The prompt and each piece of the response: text, tokens, whether it trains, its reward and version."""
    talk, rewards, first = episode.chat.conversation, episode.chat.rewards, episode.chat.first_turn
    said: list[dict[str, Any]] = [
        {"who": "prompt", "text": talk.tokenizer.decode(talk.prompt), "tokens": len(talk.prompt), "trains": False}
    ]
    for piece in _pieces(talk):
        text = talk.tokenizer.decode(piece.token_ids.tolist())
        entry = {"who": "model", "text": text, "tokens": len(piece.token_ids), "trains": piece.turn >= 0}
        if piece.turn < 0:
            entry["who"] = "environment"
        else:
            turn = first + piece.turn
            entry |= {"turn": turn, "version": int(piece.versions[0]), "reward": rewards.get(turn)}
        said.append(entry)
    return said


def episode_metrics(episodes: Sequence[Episode]) -> Metrics:
    """Counts of every outcome, and of what was lost, retried and not rewarded."""
    outcomes = Counter(episode.outcome for episode in episodes)
    kept = [episode for episode in episodes if episode.trains]
    count = float(len(kept))
    seconds = {episode.number: episode.seconds for episode in episodes}
    retried = {episode.number: episode.attempts - 1 for episode in episodes}
    return {
        "episodes": Mean(float(len(seconds)), 0),
        "discarded_branches": Mean(float(sum(episode.discarded for episode in episodes)), 0),
        "failed_branches": Mean(float(sum(episode.failed for episode in episodes)), 0),
        "lost": Mean(float(sum(episode.lost for episode in episodes)), 0),
        **{f"outcome_{name}": Mean(float(outcomes[name]), 0) for name in (*OF_POLICY, *OF_OTHERS)},
        "retried": Mean(float(sum(retried.values())), 0),
        "unrewarded": Mean(float(sum(episode.unrewarded for episode in kept)), 0),
        "turns": Mean(float(sum(episode.chat.turns for episode in kept)), count),
        "episode_seconds": Mean(sum(seconds.values()), float(len(seconds))),
        "longest_episode_s": Largest(max(seconds.values(), default=0.0)),
    }


def group_metrics(episodes: Sequence[Episode], *, wanted: int, n: int) -> Metrics:
    """What became of over-sampled groups, of `n` episodes each, of which `wanted` were to be kept on this rank."""
    of_group = Counter(number // n for number in {episode.number for episode in episodes if episode.trains})
    drawn = {
        id(piece): len(piece.token_ids)  # leaves of a tree share theirs
        for episode in episodes
        if episode.outcome == "surplus"
        for piece in episode.chat.conversation.pieces
        if piece.turn >= 0
    }
    return {
        "groups": Mean(float(len(of_group)), 0),
        "groups_incomplete": Mean(float(sum(count < n for count in of_group.values())), 0),
        "groups_missing": Mean(float(max(0, wanted - len(of_group))), 0),
        "surplus_tokens": Mean(float(sum(drawn.values())), 0),
    }


def log_lost(episodes: Sequence[tuple[dict[str, Any], Episode]], file: Path) -> None:
    """Append a line of JSON for each episode that was lost, with its row and turn; nothing if none was."""
    lost = [(where, episode) for where, episode in episodes if episode.lost]
    if not lost:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for where, episode in lost:
        turn = episode.chat.turns
        where = where | ({"branch": episode.branch} if episode.branch else {})
        print(f"episode lost: {where}, turn {turn}: {episode.outcome}: {episode.detail}", flush=True)
        entry = {
            **where,
            "turn": turn,
            "outcome": episode.outcome,
            "detail": episode.detail,
            "attempts": episode.attempts,
            "traceback": episode.traceback,
            "transcript": transcript(episode) if episode.chat.conversation.pieces else [],
        }
        lines.append(json.dumps(entry) + "\n")
    with file.open("a", encoding="utf-8") as out:  # each rank has a file of its own
        out.write("".join(lines))


def _pieces(talk: Conversation) -> list[Piece]:
    """Up to the last turn: what was said behind it nobody has read."""
    last = max((at for at, piece in enumerate(talk.pieces) if piece.turn >= 0), default=-1)
    return talk.pieces[: last + 1]


def _token_columns(episode: Episode) -> dict[str, Any]:
    pieces, first = _pieces(episode.chat.conversation), episode.chat.first_turn
    turn = np.concatenate(
        [np.full(len(piece.token_ids), piece.turn + (first if piece.turn >= 0 else 0), np.int32) for piece in pieces]
    )
    rewards = np.zeros(len(turn), np.float32)
    for its_turn, value in episode.chat.rewards.items():
        if its_turn >= first:  # those before are of another row, whose context was closed
            rewards[np.flatnonzero(turn == its_turn)[-1]] += value
    return {
        "response_ids": np.concatenate([piece.token_ids for piece in pieces]),
        "response_mask": (turn >= 0).astype(np.uint8),
        "rollout_log_probs": np.concatenate([piece.log_probs for piece in pieces]),
        "policy_version": np.concatenate([piece.versions for piece in pieces]),
        "turn": turn,
        "token_rewards": rewards,
    }


def _segments(episodes: Sequence[Episode]) -> list[NDArray[np.int32]]:
    """For each episode, each token's segment: numbers from 0 in the order in which a tree's rows have them."""
    numbers: dict[int, dict[Segment, int]] = {}
    found = []
    for episode in episodes:
        known = numbers.setdefault(episode.number, {})
        pieces, marks = _pieces(episode.chat.conversation), dict(episode.chat.segments)  # the last at a place counts
        current, of_pieces = episode.chat.segments[0][1], []
        for at, piece in enumerate(pieces):
            current = marks.get(at, current)
            of_pieces.append(np.full(len(piece.token_ids), known.setdefault(current, len(known)), np.int32))
        found.append(np.concatenate(of_pieces))
    return found


def _texts(talk: Conversation, ids: list[int]) -> tuple[str, str]:
    return talk.tokenizer.decode(ids, special_tokens=False), talk.tokenizer.decode(ids)
