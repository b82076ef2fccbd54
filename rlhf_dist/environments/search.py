"""Search over the steps of an episode, for environments to call: beams, and Monte-Carlo tree search.

    async def episode(self, chat, row):
        await beam_search(chat, self.step, width=2, expand=4, depth=3)

    async def step(self, branch):
        reply = await branch.generate(max_tokens=32)
        return Step(value=float(row.answer in reply.text), done=reply.finished)

A step is played in a branch and says what its state is worth: by a rule, by a service behind `chat.run`, by the model
itself (`self_judged`). Every leaf of the search is a row with its value as its reward, unless it is pruned; inner steps
are worth what their leaves are (`tree_pairs`, `tree_nodes`, `tree_advantage`). A step that did not finish, for whatever
reason, is not gone on from.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from rlhf_dist.environments.environment import Branch, Chat


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step says of the state it has reached."""

    value: float
    done: bool = False
    """Nothing follows on it."""


Play = Callable[[Chat], Awaitable[Step]]
"""Plays one step in a branch."""


@dataclass(eq=False)
class Node:
    """A state of a search."""

    chat: Chat
    step: Step | None = None
    """None for the start, and for a step that has not finished."""
    depth: int = 0
    children: list[Node] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0
    """Sum of the values that were backed up."""

    @property
    def mean(self) -> float:
        """Mean value of what was seen from here; 0 before anything was."""
        return self.total / max(self.visits, 1)

    @property
    def open(self) -> bool:
        """Whether something may follow on it."""
        return self.depth == 0 or (self.step is not None and not self.step.done)


async def beam_search(chat: Chat, play: Play, *, width: int, expand: int, depth: int, prune: bool = True) -> list[Node]:
    """`depth` rounds of `expand` steps from each of the `width` best states; returns the best at the end, best first.

    A state that is done keeps its place while it is among the best. prune: what leads to none of those that are
    returned is no row.
    """
    start = Node(chat)
    beam = [start]
    for _ in range(depth):
        going = [node for node in beam if node.open]
        if not going:
            break
        await asyncio.gather(*(_expand(node, play, expand) for node in going))
        found = [node for node in beam if not node.open] + [child for node in going for child in node.children]
        beam = sorted((node for node in found if node.step is not None), key=_value, reverse=True)[:width]
    if prune:
        for child in start.children:
            _prune(child, beam)
    _reward(beam if prune else _leaves(start))
    return beam


async def tree_search(
    chat: Chat, play: Play, *, simulations: int, expand: int, depth: int, explore: float = 1.0
) -> Node:
    """Monte-Carlo tree search; returns the start with all that was searched from it.

    A simulation goes down to the child with the largest mean + explore * sqrt(ln N / n) (UCT: N visits of the state, n
    of the child), makes `expand` steps from where it ends, and backs the value of each up to the start.
    """
    start = Node(chat)
    for _ in range(simulations):
        path = [start]
        while going := [child for child in path[-1].children if child.step is not None]:
            above = path[-1]
            path.append(max(going, key=lambda child: _bound(child, above, explore)))
        node = path[-1]
        if node.open and node.depth < depth and not node.children:
            await _expand(node, play, expand)
            values = [child.step.value for child in node.children if child.step is not None]
            for child in node.children:
                child.visits, child.total = 1, _value(child)
        else:  # an end, reached once more
            values = [_value(node)]
        for one in path:
            one.visits, one.total = one.visits + len(values), one.total + sum(values)
    _reward(_leaves(start))
    return start


async def self_judged(chat: Chat, question: str, *, max_tokens: int = 16, default: float = 0.0) -> float:
    """What the model itself says of the state: the first number behind `question`, in a branch that is no row.

    `default` where it says none, or the branch ends otherwise.
    """

    async def ask(one: Chat) -> str:
        one.say(question)
        return (await one.generate(max_tokens=max_tokens)).text

    (verdict,) = await chat.branch(ask, n=1)
    verdict.chat.discard()
    number = re.search(r"-?\d+(\.\d+)?", verdict.returned or "")
    return float(number[0]) if number else default


async def _expand(node: Node, play: Play, n: int) -> None:
    branches: Sequence[Branch[Step]] = await node.chat.branch(play, n=n)
    node.children = [Node(branch.chat, branch.returned, node.depth + 1) for branch in branches]


def _value(node: Node) -> float:
    return node.step.value if node.step is not None else 0.0


def _bound(child: Node, parent: Node, explore: float) -> float:
    return child.mean + explore * math.sqrt(math.log(parent.visits) / child.visits)


def _leaves(node: Node) -> list[Node]:
    return [leaf for child in node.children for leaf in _leaves(child)] if node.children else [node]


def _prune(node: Node, kept: Sequence[Node]) -> bool:
    """Discard what leads to none of `kept`; whether `node` leads to one."""
    leads = [_prune(child, kept) for child in node.children]
    if any(leads) or node in kept:
        return True
    node.chat.discard()
    return False


def _reward(leaves: Sequence[Node]) -> None:
    for node in leaves:
        if node.step is not None:
            node.chat.reward(node.step.value)
