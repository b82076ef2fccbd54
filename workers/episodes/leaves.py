"""What an episode became: one row, or the leaves of its tree, each with an outcome of its own.

    episode ─ turn ─┬─ branch 0 ─ turn ─┬─ branch 0/0 ─ turn      a row
                    │                   └─ branch 0/1 ─ turn      a row
                    ├─ branch 1 ─ turn                            a row
                    └─ branch 2 ─ (discarded)                     none, counted

What branches and draws nothing after that is no row, unless all its branches are discarded. A leaf whose episode, or
any branch above it, ended through no doing of the policy's ended so, too: whoever was to compare or reward the leaves
has not. A context that was closed (`chat.compact`) is a row with the mean reward of the leaves that come after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlhf_dist.environments import Environment
from rlhf_dist.environments.outcomes import OF_POLICY, Outcome
from workers.episodes.chat import Context, EpisodeEnded, LiveChat


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """How one ended, or one leaf of its tree."""

    outcome: Outcome
    detail: str
    """Why, one line; empty where it just finished."""
    traceback: str
    """Of an environment or infrastructure error."""
    chat: LiveChat
    """Of the last attempt; its conversation is the row's."""
    unrewarded: bool
    """Ended otherwise than finished, without a reward."""
    attempts: int
    seconds: float
    number: int = 0
    """Which of the episodes that were played; leaves of one tree share it."""
    speaker: str = ""
    """Whose side of the episode it is, where another's is a row, too; empty for the role's own."""
    branch: str = ""
    """Path from the episode's start, such as 0/2; .k behind it once k contexts were closed."""
    leaf: bool = True
    """No context that was closed."""
    total: float = 0.0
    """Rewards of the whole path; of a closed context, their mean over the leaves after it."""
    discarded: int = 0
    """Of the tree's first row: branches that were thrown away,"""
    failed: int = 0
    """and those of them that had ended through no doing of the policy's."""

    @property
    def trains(self) -> bool:
        """Whether it is a row of the batch."""
        return self.outcome in OF_POLICY and self.chat.conversation.turns > 0

    @property
    def lost(self) -> bool:
        """Whether it should have been a row, and is none."""
        return not self.trains and self.outcome != "surplus"


def episodes_of(
    environment: Environment, root: LiveChat, *, number: int, attempts: int, seconds: float
) -> list[Episode]:
    """The rows of an episode that is over, in the order of their paths; at least one, lost where none trains."""
    made = _Rows(environment, attempts, seconds, number)
    found, most = made.below(root, None), environment.leaves
    if len(found) > most:
        name = type(environment).__name__
        says = f"the episode has {len(found)} rows, and {name}.leaves says at most {most}; set it"
        found = [made.row(root, EpisodeEnded("environment_error", says), "")]
    thrown = [_own_end(chat).outcome for chat in _all(root) if chat.discarded]
    failed = sum(outcome not in OF_POLICY for outcome in thrown)
    return [replace(found[0], discarded=len(thrown), failed=failed), *found[1:], *made.sides(root, found[0])]


@dataclass(frozen=True)
class _Rows:
    """Makes the rows of one tree."""

    environment: Environment
    attempts: int
    seconds: float
    number: int

    def below(self, chat: LiveChat, above: EpisodeEnded | None) -> list[Episode]:
        """Of `chat` and what branched from it. above: how something above it ended that takes it along."""
        chat = _reopened(chat)
        ended, children = above or _own_end(chat), [child for child in chat.children if not child.discarded]
        found = [self._leaf(chat, above)] if chat.drew or not children else []
        for child in children:
            found += self.below(child, None if ended.outcome in OF_POLICY else ended)
        return [*self._closed(chat, found), *found]

    def sides(self, root: LiveChat, own: Episode) -> list[Episode]:
        """Of others who learn from the episode, where it is one; who has drawn nothing has none."""
        if not own.trains:
            return []
        ended = EpisodeEnded(own.outcome, own.detail)
        return [replace(self.row(chat, ended, ""), speaker=name) for name, chat in _learners(root)]

    def row(self, chat: LiveChat, ended: EpisodeEnded, trace: str) -> Episode:
        return Episode(
            outcome=ended.outcome,
            detail=ended.detail,
            traceback=trace,
            chat=chat,
            unrewarded=self.environment.rewards and ended.outcome in OF_POLICY and not chat.rewards,
            attempts=self.attempts,
            seconds=self.seconds,
            number=self.number,
            branch="/".join(map(str, chat.path)) + (f".{chat.contexts}" if chat.contexts else ""),
            total=sum(chat.rewards.values()),
        )

    def _leaf(self, chat: LiveChat, above: EpisodeEnded | None) -> Episode:
        if above:
            return self.row(chat, EpisodeEnded(above.outcome, f"what it branched from ended: {above.detail}"), "")
        ended, what = _own_end(chat), "branch" if chat.path else "episode"
        finished = ended.outcome == "finished"
        if ended.outcome in OF_POLICY:
            if not chat.conversation.turns or (finished and chat.turns == chat.forked_at):
                nothing = f"the {what} ended before chat.generate() had drawn anything"
                if chat.children:
                    nothing = f"no leaf is left: every branch of the {what} was discarded"
                return self.row(chat, EpisodeEnded("environment_error", nothing), "")
            silent = [f" of {name!r}, whose rows are kept" for name, one in _learners(chat) if not one.rewards]
            if finished and self.environment.rewards and (not chat.rewards or silent):
                who = "" if not chat.rewards else silent[0]
                forgot = (
                    f"the {what} finished without chat.reward(){who}; set `rewards = False` where a reward role scores "
                    "it"
                )
                return self.row(chat, EpisodeEnded("environment_error", forgot), "")
        row = self.row(chat, ended, chat.traceback)
        extra = self.environment.unfinished_reward
        if finished or ended.outcome not in OF_POLICY or not extra:
            return row
        # Whose limit it was; what the policy wrote that cannot be used is the role's own.
        side = ended.of if ended.of is not None and ended.of.whole is not None else None
        stopped = side or chat
        if stopped.turns:
            last = stopped.turns - 1
            stopped.rewards[last] = stopped.rewards.get(last, 0.0) + extra
        return row if side else replace(row, total=row.total + extra)

    def _closed(self, chat: LiveChat, after: Sequence[Episode]) -> list[Episode]:
        """Contexts that this branch has closed: what its leaves got later falls to each one's last token."""
        leaves = [episode for episode in after if episode.leaf and episode.trains]
        total = sum(leaf.total for leaf in leaves) / max(len(leaves), 1)
        ended = (
            EpisodeEnded("finished", "") if leaves else EpisodeEnded("environment_error", "no leaf after it is left")
        )
        rows = []
        for context in chat.closed:
            last = context.first_turn + context.conversation.turns - 1
            own = {turn: value for turn, value in chat.rewards.items() if context.first_turn <= turn <= last}
            if leaves:
                before = sum(value for turn, value in chat.rewards.items() if turn <= last)
                own[last] = own.get(last, 0.0) + total - before
            row = self.row(_view(chat, context, own), ended, "")
            rows.append(replace(row, leaf=False, total=total, unrewarded=False))
        return rows


def _learners(chat: LiveChat) -> list[tuple[str, LiveChat]]:
    """Others who speak in the episode, have drawn something and learn from it."""
    return [(name, one) for name, one in chat.speakers.items() if one.learns and one.turns]


def _reopened(chat: LiveChat) -> LiveChat:
    """The chat in its last context that has a turn: nothing came after it was closed."""
    if not chat.closed or chat.conversation.turns or chat.children:
        return chat
    *closed, context = chat.closed
    return replace(_view(chat, context, chat.rewards), closed=closed, drew=True)


def _view(chat: LiveChat, context: Context, rewards: dict[int, float]) -> LiveChat:
    return replace(
        chat,
        conversation=context.conversation,
        first_turn=context.first_turn,
        segments=context.segments,
        contexts=context.number,
        rewards=rewards,
    )


def _own_end(chat: LiveChat) -> EpisodeEnded:
    return chat.ended or EpisodeEnded("environment_error", "still going on when its episode was over")


def _all(chat: LiveChat) -> Iterator[LiveChat]:
    yield chat
    for child in chat.children:
        yield from _all(child)
