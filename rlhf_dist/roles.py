"""Roles: what the algorithmic parts of RLHF can do, and what each operation touches.

An interface declares once, per op, which columns it reads and writes, whether it reads or writes the
role's weights, and how rows are spread over ranks (`rlhf_dist/dispatch.py`). Recipes name roles by
these types; workers implement them; the tracer, the checker, the planner and the executor read the
declarations. Names and signatures follow HybridFlow (arXiv 2409.19256, section 4).

Reads may depend on the call: `update_actor(batch, loss=...)` reads what its loss reads.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from rlhf_dist.algorithms.contract import Loss, columns_read
from rlhf_dist.algorithms.outputs import OF_LANGUAGE_MODELS, OF_VALUE_MODELS, Head
from rlhf_dist.batch import Batch
from rlhf_dist.config import (
    FunctionConfig,
    LanguageModelConfig,
    RemoteJudgeConfig,
    RewardConfig,
    ValueModelConfig,
)
from rlhf_dist.dispatch import ALL_MICRO_ROWS, ROWS, TransferProtocol
from rlhf_dist.environments import Environment, EpisodeLimits
from rlhf_dist.parsers import Parser, columns_of
from rlhf_dist.prompt_template import Template
from rlhf_dist.schema import GENERATED, SEQUENCE, TRAINABLE, TREE
from rlhf_dist.weights import Weights

F = TypeVar("F", bound=Callable[..., Any])
Columns = tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]]
"""Column names, or a function of the call's settings that gives them."""
RowEffect = Literal["keep", "new", "expand", "drop", "derive"]
"""What an op does to rows: keeps them, makes the first ones, makes responses of each, drops some, or makes new ones of
those that are there."""


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """What one op of a role touches."""

    name: str
    reads: Columns
    writes: Columns = ()
    optional: tuple[str, ...] = ()
    """Columns it reads where the batch has them."""
    rows: RowEffect = "keep"
    weights_read: str | None = None
    weights_written: str | None = None
    """Weight state of the role: `train` (what learns) or `rollout` (what generates)."""
    dispatch: TransferProtocol = ROWS
    mesh: str = "train"
    """Which of the role's meshes the rows are spread over: `train` or `rollout`."""
    outputs: tuple[str, ...] = ()
    """Kinds of output that the role's model can give a loss besides its heads; empty for ops without one."""
    streams: bool = False
    """Each row's result depends on that row alone: it may be given the first finished rows of its input while the
    others are being made (a rule on CPU processes; a model of another pool, with `placement.pieces`)."""
    loses: bool = False
    """Rows that it makes may be fewer than it was asked for: some were lost on the way."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Column as the worker calls it -> as `writes` does, where they differ: one worker serves several kinds of role."""
    missing: bool = False
    """Of a `State`'s: whether it knows what to make of missing numbers."""

    def columns(self, which: Columns, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
        """Column names for these arguments."""
        return which(kwargs) if callable(which) else which


def op(
    *,
    reads: Columns,
    writes: Columns = (),
    optional: tuple[str, ...] = (),
    rows: RowEffect = "keep",
    weights_read: str | None = None,
    weights_written: str | None = None,
    dispatch: TransferProtocol = ROWS,
    mesh: str = "train",
    outputs: tuple[str, ...] = (),
    streams: bool = False,
    loses: bool = False,
    names: Mapping[str, str] | None = None,
) -> Callable[[F], F]:
    """Declare a role's method as an op. Its positional arguments are batches, its keywords are settings."""

    def wrap(function: F) -> F:
        function.op_spec = OpSpec(  # type: ignore[attr-defined]
            name=function.__name__,
            reads=reads,
            writes=writes,
            optional=optional,
            rows=rows,
            weights_read=weights_read,
            weights_written=weights_written,
            dispatch=dispatch,
            mesh=mesh,
            outputs=outputs,
            streams=streams,
            loses=loses,
            names=names or {},
        )
        return function

    return wrap


def ops_of(interface: type) -> dict[str, OpSpec]:
    """All ops of an interface, inherited ones included."""
    found = {name: getattr(getattr(interface, name, None), "op_spec", None) for name in dir(interface)}
    return {name: spec for name, spec in found.items() if isinstance(spec, OpSpec)}


def _loss_columns(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*TRAINABLE, *columns_read(kwargs["loss"]))))


def _top_columns(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{kwargs['prefix']}_{what}" for what in ("ids", "log_probs", "log_rest"))


EPISODE_READS = ("prompt_ids", "prompt", "answer", "group_id")
"""What every environment reads of a row."""


def _episode_reads(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    if "environment" not in kwargs:  # a list of ops wants to know what any reads
        return EPISODE_READS
    environment = kwargs["environment"]
    if not isinstance(environment, Environment):
        raise ValueError(f"run_episodes needs environment=, an Environment, got {environment!r}")
    if not isinstance(environment.leaves, int) or environment.leaves < 1:
        name = type(environment).__name__
        raise ValueError(f"{name}.leaves, the most rows of an episode, must be at least 1, got {environment.leaves!r}")
    if not inspect.iscoroutinefunction(environment.episode):
        raise ValueError(f"{type(environment).__name__}.episode must be written with `async def`")
    return tuple(dict.fromkeys((*EPISODE_READS, *environment.reads)))


def _episode_writes(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    environment = kwargs.get("environment")
    rewards = ("rewards", "token_rewards") if getattr(environment, "rewards", True) else ()
    tree = TREE if getattr(environment, "leaves", 1) > 1 else ()
    return ("prompt_ids", *GENERATED, "turn", "turns", "outcome", "transcript", "speaker", *tree, *rewards)


def _asked_columns(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    template, prefix = kwargs.get("template"), kwargs.get("prefix")
    asked = ("prompt_ids",) if template is None else template.columns
    return asked if prefix is None else tuple(dict.fromkeys((*asked, prefix)))


def _answered_columns(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    template, parser, prefix = kwargs.get("template"), kwargs.get("parser"), kwargs.get("prefix")
    prompt = ("prompt_ids", "prompt") if template is not None else ("prompt_ids",) if prefix is not None else ()
    return (*prompt, *GENERATED, *(() if parser is None else columns_of(parser)))


def _encoding_reads(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    template, response = kwargs.get("template"), kwargs.get("response")
    if "template" in kwargs and not isinstance(template, Template):
        raise ValueError(f"encode needs template=, a Template of rlhf_dist.prompt_template, got {template!r}")
    asked = () if template is None else template.columns
    return asked if response is None else tuple(dict.fromkeys((*asked, response)))


def _encoded_columns(kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    said = ("response_ids", "response_mask", "response", "finished") if kwargs.get("response") is not None else ()
    return ("prompt_ids", "prompt", *said)


class Role(Protocol):
    """Base of every kind of role."""

    worker: ClassVar[str | type] = ""
    """What implements the role: `package.module:Class`, imported on the workers only, or a class of a user's file."""
    settings: ClassVar[type] = FunctionConfig
    """Dataclass of the role's section in the settings."""
    heads: ClassVar[tuple[Head, ...]] = ()
    """Heads of its model besides the one it comes with; a class of your own lists them."""


class OfTrunk(Weights, Role, Protocol):
    """What any model says besides the words of its own kind, and what is done with its weights."""

    @op(reads=SEQUENCE, writes=("hidden",), weights_read="train", streams=True)
    def compute_hidden(self, batch: Batch) -> Batch:
        """The last states that response tokens are predicted from, float32."""
        ...

    @op(reads=SEQUENCE, writes=lambda kwargs: tuple(kwargs.get("names", ())), weights_read="train", streams=True)
    def compute_heads(self, batch: Batch, *, names: tuple[str, ...]) -> Batch:
        """What these heads of the role's own say, a column each, of the head's name."""
        ...


# --- the bases -------------------------------------------------------------------------------------------
class LanguageModel(OfTrunk, Protocol):
    """A language model: generates, gives log-probs, learns."""

    worker: ClassVar[str | type] = "workers.language_model:LanguageModelWorker"
    settings: ClassVar[type] = LanguageModelConfig

    @op(
        reads=_asked_columns,
        writes=_answered_columns,
        rows="expand",
        weights_read="rollout",
        dispatch=ALL_MICRO_ROWS,
        mesh="rollout",
    )
    def generate_sequences(
        self,
        prompts: Batch,
        *,
        n: int = 1,
        greedy: bool = False,
        template: Template | None = None,
        parser: Parser | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        prefix: str | None = None,
        mixture: tuple[LanguageModel, float] | None = None,
    ) -> Batch:
        """`n` responses to every prompt, copies of a prompt adjacent, all its columns carried along.

        template: the prompt is made of each row's columns, for this role's tokenizer and chat template. parser: the
        response's text becomes columns, too. temperature, top_p, top_k, max_tokens: in place of the role's settings;
        stop: texts that end a response. prefix: a column of text or token ids that each response goes on from; it
        becomes a part of the prompt. mixture: (role, share): tokens are drawn from pi^(1 - share) role^share.
        """
        ...

    @op(
        reads=_episode_reads,
        writes=_episode_writes,
        optional=("source", "fields"),
        rows="expand",
        loses=True,
        weights_read="rollout",
        dispatch=ALL_MICRO_ROWS,
        mesh="rollout",
    )
    def run_episodes(
        self,
        prompts: Batch,
        *,
        environment: Environment,
        n: int = 1,
        greedy: bool = False,
        limits: EpisodeLimits | None = None,
        speakers: Mapping[str, LanguageModel] | None = None,
        rows_of: tuple[str, ...] = (),
        groups: int | None = None,
        first: Literal["turns", "time"] = "turns",
        held_out: bool = False,
    ) -> Batch:
        """`n` episodes of every row, each of several turns: a response is all of them, with what was said between them
        masked. Episodes that ended through no doing of the policy's are no rows; see `environments/outcomes.py`. One
        that branches is several rows, at most the environment's `leaves`.

        speakers: other roles that the environment lets speak, as `chat.speaker(name)`, in the same pool. rows_of:
        those of them whose sides are rows, too; `spoken_by(batch, name="...")` parts rows by who drew them. held_out:
        the random numbers of a row's episode are the same at every step, so that what changes is the policy.

        groups: episodes of all rows are begun, and those of the first `groups` rows to be complete are kept; the others
        end as `surplus` as soon as they cannot be among them. first: by the turns of a row's longest episode, then by
        row, so that how long tools take changes nothing; or by the time at which they are over.
        """
        ...

    @op(reads=_encoding_reads, writes=_encoded_columns)
    def encode(self, batch: Batch, *, template: Template, response: str | None = None) -> Batch:
        """Rows under other prompts: the template, filled with each row's columns, in this role's tokenizer and chat
        template. Responses stay as they are; response: a column of text that takes their place, with an end of text
        behind it, cut at `rollout.max_response_tokens`. No model runs; the role has a training engine."""
        ...

    @op(
        reads=SEQUENCE,
        writes=("log_probs", "entropy"),
        optional=("rollout_log_probs", "turn"),
        weights_read="train",
        streams=True,
    )
    def compute_log_prob(self, batch: Batch) -> Batch:
        """Log-probs of the responses, whoever wrote them, and the entropy before each token. Reports how far they are
        from those of sampling, where the batch has them."""
        ...

    @op(reads=SEQUENCE, writes=("logits", "largest_logits"), weights_read="train", streams=True)
    def compute_logits(self, batch: Batch) -> Batch:
        """The logit of each response token, and the largest of all tokens' before it, as the head gives them: no
        temperature, no normalisation. A model trained by teacher forcing says with them what an action is worth."""
        ...

    @op(reads=SEQUENCE, writes=_top_columns, weights_read="train", streams=True)
    def compute_top_k(self, batch: Batch, *, k: int = 32, prefix: str = "top") -> Batch:
        """The `k` most likely tokens before each response token, their log-probs, and the log of what is left, at the
        temperature of the role's log-probs."""
        ...

    @op(reads=_loss_columns, weights_read="train", weights_written="train", outputs=OF_LANGUAGE_MODELS)
    def update(self, batch: Batch, *, loss: Loss, mini_batches: int = 1, epochs: int = 1) -> None:
        """`epochs` passes over the batch cut into `mini_batches`, one optimizer step for each."""
        ...


class ValueModel(OfTrunk, Protocol):
    """The trunk of a language model with a linear head: a number before each token, or K for the whole response."""

    model_head: ClassVar[Literal["policy", "value"]] = "value"
    worker: ClassVar[str | type] = "workers.value_model:ValueModelWorker"
    settings: ClassVar[type] = ValueModelConfig

    @op(reads=SEQUENCE, writes=("values",), weights_read="train", streams=True)
    def compute_values(self, batch: Batch) -> Batch:
        """V(s_t) before each response token."""
        ...

    @op(reads=SEQUENCE, writes=("attention",), weights_read="train", streams=True)
    def compute_attention(self, batch: Batch) -> Batch:
        """How much the row's last token, where its score is read, attends to each response token in the last layer:
        the mean over heads, of 1 for all that it sees."""
        ...

    @op(reads=SEQUENCE, writes=("scores",), weights_read="train", streams=True)
    def compute_scores(self, batch: Batch) -> Batch:
        """All K labels' scores of every row, [B, K] also where K is 1."""
        ...

    @op(reads=_loss_columns, weights_read="train", weights_written="train", outputs=OF_VALUE_MODELS)
    def update(self, batch: Batch, *, loss: Loss, mini_batches: int = 1, epochs: int = 1) -> None:
        """As `LanguageModel.update`."""
        ...


class Function(Role, Protocol):
    """Columns in, columns out, on CPU processes: derive one with ops, `settings` and `worker` of your own."""


class Speller(Function, Protocol):
    """Knows what each token adds to a text; for what is said of parts of a response."""

    worker: ClassVar[str | type] = "workers.spelling:SpellerWorker"

    @op(reads=("response_ids",), writes=("text_ends",), streams=True)
    def spell(self, batch: Batch, *, of: str) -> Batch:
        """Where each token of a response ends in `response`, by the tokenizer of the role `of` that generated it."""
        ...


# --- what the field calls them: the same models under names of their own, ops with names and columns to match ---
class Actor(LanguageModel, Protocol):
    """The policy that is trained."""

    @op(
        reads=SEQUENCE,
        writes=("old_log_probs", "entropy"),
        optional=("rollout_log_probs", "turn"),
        weights_read="train",
        streams=True,
        names={"log_probs": "old_log_probs"},
    )
    def compute_log_prob(self, batch: Batch) -> Batch:
        """Log-probs of the responses under the policy as it is before this step's update. Reports how far they are
        from those of sampling, where the batch has them."""
        ...

    @op(reads=_loss_columns, weights_read="train", weights_written="train", outputs=OF_LANGUAGE_MODELS)
    def update_actor(self, batch: Batch, *, loss: Loss, mini_batches: int = 1, epochs: int = 1) -> None:
        """As `LanguageModel.update`."""
        ...


class Reference(LanguageModel, Protocol):
    """A frozen policy. Its weights change where a recipe writes them (`rlhf_dist/weights.py`)."""

    @op(reads=SEQUENCE, writes=("ref_log_probs",), weights_read="train", streams=True)
    def compute_ref_log_prob(self, batch: Batch) -> Batch:
        """Log-probs of the responses under the frozen policy."""
        ...


class Teacher(LanguageModel, Protocol):
    """A model to learn from."""


class Opponent(LanguageModel, Protocol):
    """A policy that generates beside the one that is trained."""


class Judge(LanguageModel, Protocol):
    """A language model that says which response is better."""


class RemoteJudge(Function, Protocol):
    """A judge behind an OpenAI-compatible endpoint; what it answers is kept, and not asked for twice."""

    worker: ClassVar[str | type] = "workers.remote_judge:RemoteJudgeWorker"
    settings: ClassVar[type] = RemoteJudgeConfig

    @op(
        reads=lambda kwargs: kwargs["template"].columns if isinstance(kwargs.get("template"), Template) else (),
        writes=lambda kwargs: ("prompt", "response", *(columns_of(kwargs["parser"]) if kwargs.get("parser") else ())),
        rows="expand",
    )
    def ask(
        self,
        batch: Batch,
        *,
        template: Template,
        parser: Parser | None = None,
        n: int = 1,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
    ) -> Batch:
        """`n` answers to the question that the template makes of each row, as columns where there is a parser. A row
        that got none has no verdict: its columns are missing, and `parsed` is 0."""
        ...


class Critic(ValueModel, Protocol):
    """The value function."""

    @op(reads=_loss_columns, weights_read="train", weights_written="train", outputs=OF_VALUE_MODELS)
    def update_critic(self, batch: Batch, *, loss: Loss, mini_batches: int = 1, epochs: int = 1) -> None:
        """As `LanguageModel.update`."""
        ...


class RewardModel(ValueModel, Protocol):
    """A reward model that is trained on preferences."""

    @op(reads=SEQUENCE, writes=("rewards",), weights_read="train", streams=True)
    def compute_reward(self, batch: Batch) -> Batch:
        """The score of every row."""
        ...

    @op(reads=_loss_columns, weights_read="train", weights_written="train", outputs=OF_VALUE_MODELS)
    def update_reward_model(self, batch: Batch, *, loss: Loss, mini_batches: int = 1, epochs: int = 1) -> None:
        """As `LanguageModel.update`."""
        ...


class Reward(Role, Protocol):
    """A score for each response: a rule, or a sequence-classification model."""

    worker: ClassVar[str | type] = "workers.value_model:ValueModelWorker"
    rule_worker: ClassVar[str] = "workers.rule_reward:RuleRewardWorker"
    settings: ClassVar[type] = RewardConfig

    @op(
        reads=("prompt_ids", "response_ids", "prompt", "response", "answer"),
        writes=("rewards",),
        optional=("raw_response", "source", "fields"),
        streams=True,
    )
    def compute_reward(self, batch: Batch) -> Batch:
        """The terminal reward of every row."""
        ...


class Cost(Reward, Protocol):
    """A reward that is to be kept below a limit."""


BASES: tuple[type, ...] = (LanguageModel, ValueModel, Reward, Function)
"""What every kind of role is one of."""
KINDS: tuple[type, ...] = (
    *(Actor, Critic, Reference, Reward, RewardModel, Cost, Teacher, Opponent, Judge, RemoteJudge),
    *(LanguageModel, ValueModel, Function, Speller),
)
"""The kinds of role there are; recipes may derive their own."""


def base_of(interface: type) -> type | None:
    """Which of `BASES` a kind of role derives from; None for a class that is no kind of role."""
    return next((base for base in interface.__mro__ if base in BASES), None)


class Prompts(Batch):
    """A recipe parameter of this type (or plain `Batch`) is fed with prompts.

    A class of your own names what else a row of the file has, and what that is; each becomes a column of its name:

        class Graded(Prompts):
            fields = {"difficulty": "float32", "hint": "text"}
    """

    rows_kind: ClassVar[str] = "prompts"
    fields: ClassVar[Mapping[str, str]] = {}
    """Field of a row -> `float32`, `int64`, `text`, or `json` for anything, as its JSON text."""
    columns: ClassVar[tuple[str, ...]] = ("group_id", "prompt_ids", "prompt", "answer", "source", "fields")


class Examples(Batch):
    """A recipe parameter of this type is fed with prompts and given responses."""

    rows_kind: ClassVar[str] = "examples"
    columns: ClassVar[tuple[str, ...]] = (*Prompts.columns, "response_ids", "response_mask")


class Preferences(Batch):
    """A recipe parameter of this type is fed with labelled responses: two rows of one group make a pair."""

    rows_kind: ClassVar[str] = "preferences"
    columns: ClassVar[tuple[str, ...]] = (*Examples.columns, "label", "margin")


class State(ABC):
    """What a recipe remembers from step to step: multipliers and coefficients, statistics of prompts, rows.

    Its values are numbers, texts, arrays, batches, and lists and mappings of numbers and texts; they are checkpointed.
    The controller holds the numbers, and references to the rest. Subclass it; methods marked with `state_op` are pure:
    (values, batch, **settings) -> (new values, metrics or a `HostResult`). In a recipe `state.value("key")` stands for
    a number wherever an op takes one.
    """

    @abstractmethod
    def initial(self, cfg: Any) -> dict[str, Any]:
        """The values a run starts with; `cfg` is the recipe's algorithm section."""


StateRows = Literal["keep", "drop", "derive", "new"]
"""As of a host op; or `new`: the op is given no batch, and the rows it writes are the first."""


def state_op(
    *, reads: Columns = (), writes: Columns = (), rows: StateRows = "keep", missing: bool = False
) -> Callable[[F], F]:
    """Declare a `State` method that reads `reads` of a batch, and may write columns or move rows as a host op does.

    It sees the whole batch. With `rows="new"` it has no batch, and must write `group_id`. A method with a keyword `rng`
    is given a random generator, seeded by the run's seed, the step and the node. missing: as of a host op.
    """

    def wrap(function: F) -> F:
        function.op_spec = OpSpec(  # type: ignore[attr-defined]
            name=function.__name__,
            reads=reads,
            writes=writes,
            rows=rows,
            weights_read="state",
            weights_written="state",
            missing=missing,
        )
        return function

    return wrap
