"""ReEx-SQL (2025, arXiv 2505.12768): SQL is executed while the answer is drawn, and what it says is read.

    <sql>SELECT ...</sql>  ->  what the database says  ->  ...  ->  <answer>SELECT ...</answer>
    r = right + 0.1 parsed + explore (1 - 1 / (1 + k)),   k different queries that ran before the answer

right: the answer's rows are those of the reference query. The advantage is GRPO's over the group; what the database
said has no loss. A row's field `schema` is the SQL that makes its database, its answer the reference query. With
`branches` more than 1 every episode parts behind its first result: tree decoding, each leaf a row.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field

from rlhf_dist.algorithms import ppo_clip
from rlhf_dist.catalogue import Paper
from rlhf_dist.dataflow.recipe import recipe
from rlhf_dist.environments import Chat, Environment, EpisodeLimits, PolicyError, Row, TextCalls
from rlhf_dist.environments.tool_calls import ToolParser
from rlhf_dist.roles import Actor, Prompts
from rlhf_dist.transforms import grpo_advantage

PAPERS = {
    "reex_sql": Paper(
        title="ReEx-SQL",
        year=2025,
        arxiv="2505.12768",
        rows=(161,),
        status="outline",
        needs=("TURN", "ROLL", "VER", "ADV", "TREE"),
        assumed="weights of the reward's parts and the form of its exploration term; SQLite",
    ),
    "tree_decoding": Paper(
        title="ReEx-SQL, tree decoding",
        year=2025,
        arxiv="2505.12768",
        rows=(161,),
        status="outline",
        needs=("TURN", "ROLL", "VER", "ADV", "TREE"),
        settings={"algorithm.branches": 4, "algorithm.samples_per_prompt": 2},
        assumed="leaves part behind the first result, and train as rows; nothing chooses among them",
    ),
}
STEPS = 50_000
"""Instructions of SQLite's machine that a query may take, in hundreds."""
LONGEST = 1_000_000
"""Bytes of a value."""
ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
"""What a query may do: read, and no other file."""
ROWS = 20
"""Rows of a result that are shown."""


@dataclass(frozen=True, kw_only=True)
class ReExSQL:
    """Settings of ReEx-SQL."""

    samples_per_prompt: int = 8
    """Episodes of each prompt."""
    turns: int = 4
    """Most turns of an episode."""
    turn_tokens: int | None = None
    """Most tokens of a turn; None: as many as the row has left."""
    branches: int = 1
    """Leaves of an episode."""
    begin: str = "<sql>"
    """What stands before a query."""
    end: str = "</sql>"
    """What stands behind it."""
    parsed_reward: float = 0.1
    """For an answer that runs."""
    explore_reward: float = 0.1
    """Times 1 - 1 / (1 + k), k different queries that ran before the answer."""
    clip: float = 0.2
    """The probability ratio is cut at 1 - clip and 1 + clip."""
    seconds: float = 120.0
    """Longest that an episode may take."""


def run_sql(schema: str, query: str) -> list[tuple[object, ...]]:
    """What a query says on a new database. Raises PolicyError for one that does not run or takes too long."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(schema)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST)
        connection.set_authorizer(lambda what, *_: sqlite3.SQLITE_OK if what in ALLOWED else sqlite3.SQLITE_DENY)
        left = [STEPS]

        def tick() -> int:
            left[0] -= 1
            return left[0] < 0

        connection.set_progress_handler(tick, 100)
        return connection.execute(query).fetchmany(1000)
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise PolicyError(f"the query does not run: {error}") from error
    finally:
        connection.close()


def composite(right: bool, ran: bool, queries: int, *, parsed: float, explore: float) -> float:
    """The reward of an answer."""
    return float(right) + parsed * ran + explore * (1 - 1 / (1 + queries))


@dataclass(frozen=True, kw_only=True)
class Database(Environment):
    """Queries of a database, until a turn has none: that turn is the answer."""

    leaves: int = 1
    parser: ToolParser = field(default_factory=lambda: TextCalls(begin="<sql>", end="</sql>"))
    turn_tokens: int | None = None
    parsed: float = 0.1
    explore: float = 0.1

    async def episode(self, chat: Chat, row: Row) -> None:
        """See Environment."""
        if self.leaves == 1:
            await self.go_on(chat, set())
            return
        reply, ran = await chat.generate(max_tokens=self.turn_tokens), set[str]()
        if await self.queried(chat, reply.text, ran):
            await chat.branch(lambda branch: self.go_on(branch, set(ran)), n=self.leaves)
        else:
            await self.answered(chat, reply.text, ran)

    async def go_on(self, chat: Chat, ran: set[str]) -> None:
        """Turn after turn, up to the answer."""
        while True:
            reply = await chat.generate(max_tokens=self.turn_tokens)
            if not await self.queried(chat, reply.text, ran):
                await self.answered(chat, reply.text, ran)
                return

    async def queried(self, chat: Chat, text: str, ran: set[str]) -> bool:
        """Whether the turn asks the database, which then has answered; `ran` has the queries that did."""
        try:
            calls = self.parser.calls(text)
        except PolicyError as error:
            chat.say(f"\nerror: {error}\n", role="tool")
            return True
        for call in calls:
            query = str(call.arguments["text"]).strip()
            try:
                rows = await chat.run(run_sql, chat.row.fields["schema"], query)
            except PolicyError as error:
                chat.say(f"\nerror: {error}\n", role="tool")
                continue
            ran.add(query)
            chat.say("\n" + "\n".join(map(str, rows[:ROWS])) + "\n", role="tool")
        return bool(calls)

    async def answered(self, chat: Chat, text: str, ran: set[str]) -> None:
        """Reward the answer."""
        query = text.replace("<answer>", "").replace("</answer>", "").strip()
        schema = chat.row.fields["schema"]
        wanted = await chat.run(run_sql, schema, chat.row.answer)
        try:
            found = await chat.run(run_sql, schema, query)
        except PolicyError:
            chat.reward(composite(False, False, len(ran), parsed=self.parsed, explore=self.explore))
            return
        right = sorted(map(repr, found)) == sorted(map(repr, wanted))
        chat.reward(composite(right, True, len(ran), parsed=self.parsed, explore=self.explore))


@recipe
def reex_sql(prompts: Prompts, actor: Actor, cfg: ReExSQL) -> None:
    """GRPO with execution while answers are drawn."""
    environment = Database(
        leaves=cfg.branches,
        parser=TextCalls(begin=cfg.begin, end=cfg.end),
        turn_tokens=cfg.turn_tokens,
        parsed=cfg.parsed_reward,
        explore=cfg.explore_reward,
    )
    limits = EpisodeLimits(turns=cfg.turns, seconds=cfg.seconds)
    batch = actor.run_episodes(prompts, environment=environment, n=cfg.samples_per_prompt, limits=limits)
    actor.update_actor(grpo_advantage(batch), loss=ppo_clip(cfg.clip, on_policy=True))
