"""Generation: in the trainer's process, in a pool of its own with weights synced, or of a role that never learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import LanguageModelConfig
from rlhf_dist.environments import Environment, EpisodeLimits
from rlhf_dist.metrics import Largest, Mean, Metrics, reward_metrics
from rlhf_dist.parsers import PARSED, Parser, parsed_columns
from rlhf_dist.placement.roles import rollout_of
from rlhf_dist.prompt_template import Template
from rlhf_dist.reshard.groups import consecutive_axes, rollout_grid
from rlhf_dist.sampling import Sampling, seed_of
from rlhf_dist.wire import Bridge, Call, OpResult, WorkerContext
from workers.asked import Asked, Asker, check_fits
from workers.build_engines import new_generation_engine
from workers.engines.generation.interface import NOTHING_DRAWN, Ends, GenerationEngine, Response, StaleWeights
from workers.episodes.copies import Copy
from workers.episodes.groups import First
from workers.episodes.leaves import Episode
from workers.episodes.rows import episode_columns, episode_metrics, group_metrics, log_lost
from workers.episodes.run import EpisodesUnderWay, Hand, Speaker, begin_episodes
from workers.gathered import Gathered
from workers.memory.arbiter import arbiter_of, generating
from workers.reshard.separate import GenerationEnd
from workers.reshard.sync import SyncReport

NOTHING = Batch({}, 0)
NO_RESPONSE = replace(NOTHING_DRAWN, interrupted=False)


@dataclass(frozen=True, eq=False)
class _Begun:
    """Generation that was interrupted."""

    responses: list[Response]
    staleness: NDArray[np.int64]
    """[B] updates they were behind."""
    gathered: Gathered[Response] | None
    """Those that are whole, where others take them piece by piece."""


class RolloutWorker:
    """One rank that generates. Implements the generating half of `rlhf_dist.roles.LanguageModel`."""

    def __init__(
        self,
        context: WorkerContext,
        config: LanguageModelConfig,
        max_staleness: int | None = 0,
        interrupts: bool = False,
        axes: Mapping[str, int] | None = None,
        loads: bool = False,
    ) -> None:
        """max_staleness: updates the weights may be behind the step they generate for, more is an error; None for
        weights that never change. interrupts: `interrupt` may be called while it generates. axes: of the mesh
        whose ranks share copies of the model; None: consecutive ranks do. loads: nobody syncs it, it has the weights
        that its model starts with."""
        from transformers import AutoTokenizer

        self.context, self.config, self.max_staleness = context, config, max_staleness
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=False)
        self.asker = Asker(config.model.path, context)
        copies = rollout_grid(axes or consecutive_axes(config, context.group_world)).tolist()
        self.engine = new_generation_engine(config.model.path, config.rollout, context, copies)
        self.name, self.memory = rollout_of(context.role.removesuffix(rollout_of(""))), arbiter_of(context)
        if loads:
            self.engine.load(config.model, context.seed)
        if loads or context.role == self.name:  # beside a trainer it is traced first (`colocated.py`)
            self.memory.add_generation(self.name, self.engine, sleeps=config.rollout.sleeps)
        self.weights_step = 0
        """Steps whose updates the weights held contain."""
        self._interrupts, self._stop = interrupts, Event()
        self._begun: dict[tuple[str, int], _Begun] = {}
        self._under_way: dict[tuple[str, int], EpisodesUnderWay] = {}

    def interrupt(self) -> None:
        """Stop generating after the token at hand, if something is generated; called from another thread."""
        self._stop.set()

    def abandon(self) -> None:
        """Forget responses and episodes that were interrupted: their step is run again from its start."""
        self._begun.clear()
        for episodes in self._under_way.values():
            episodes.loop.abandon()
        self._under_way.clear()

    def generate_sequences(
        self,
        batch: Batch,
        call: Call,
        *,
        n: int = 1,
        greedy: bool = False,
        template: Template | None = None,
        decode: Mapping[str, str] = MappingProxyType({}),
        prefix: str | None = None,
        parser: Parser | None = None,
        mixture: tuple[str, float] | None = None,
        **sampled: Any,
    ) -> OpResult:
        """`n` responses to each prompt. What is drawn depends on (run seed, step, node, row, copy) only.

        decode: token column of the template -> whose tokenizer made it. sampled: as in the role's interface.
        """
        self._stop.clear()
        sampling = self._sampling(n, greedy, **sampled)
        lender = None if mixture is None else self._lender(mixture[0])
        self.memory.turn(generating(self.name) if lender is None else self.memory.add_together(self.name, lender.name))
        staleness = self._staleness(call.step)
        asked = self.asker.ask(batch, template, decode, prefix)
        fits = self._fits(asked, drops=parser is not None)
        seeds = [
            seed_of(call.seed, call.step, call.node, int(row), copy) for row in call.row_index for copy in range(n)
        ]
        begun = self._begun.pop((call.node, call.step), None)
        behind = np.full(len(seeds), staleness)
        if begun is not None:  # staleness is that of the policy that drew the first token
            old = np.array([len(response.token_ids) > 0 for response in begun.responses], dtype=bool)
            behind = np.where(old, begun.staleness, behind)

        def rows_of_some(numbers: NDArray[np.int64], some: Sequence[Response]) -> OpResult:
            return self._response_rows(numbers, some, asked, n, template, prefix, sampling, parser)

        def hand(piece: int, made: Sequence[tuple[int, Response]]) -> None:
            numbers = np.array([number for number, _ in made], dtype=np.int64)
            self.context.hand(call, piece, rows_of_some(numbers, [response for _, response in made]))

        gathered = None if begun is None else begun.gathered
        if call.pieces is not None and begun is None:
            gathered = Gathered(call.pieces.of_row, n, hand)
        responses = self._drawn(
            asked.prompts,
            np.flatnonzero(fits),
            sampling,
            seeds,
            begun=None if begun is None else begun.responses,
            stop=self._stop.is_set if self._interrupts else None,
            mixture=None if lender is None or mixture is None else (lender.engine, mixture[1]),
            done=None if gathered is None else gathered.over,
        )
        if any(response.interrupted for response in responses):
            self._begun[call.node, call.step] = _Begun(responses, behind, gathered)
            return OpResult(columns=NOTHING, interrupted=True)
        made = rows_of_some(np.arange(len(responses)), responses)
        columns, tokens = dict(made.columns.items()), made.tokens
        assert tokens is not None, "rows of responses have token ids"
        metrics: Metrics = {}
        if parser is not None:
            metrics = {
                "unparsed": Mean(float(len(responses) - columns[PARSED].values.sum()), float(len(responses))),
                "prompts_too_long": Mean(float((~fits).sum()), 0),
            }
        if begun is not None:
            continued = sum(len(r.versions) > 0 and r.versions[0] != r.versions[-1] for r in responses)
            metrics["continued"] = Mean(float(continued), 0)
        return replace(made, metrics={**generation_metrics(columns, tokens, behind), **metrics})

    def _response_rows(
        self,
        numbers: NDArray[np.int64],
        responses: Sequence[Response],
        asked: Asked,
        n: int,
        template: Template | None,
        prefix: str | None,
        sampling: Sampling,
        parser: Parser | None,
    ) -> OpResult:
        """The rows of some responses, without metrics. numbers: [B'] which ones of all, the `n` of a row together."""
        parent = numbers // n
        columns = {**response_columns(responses), **asked_columns(asked, parent, template, prefix)}
        columns |= self._texts(responses, sampling)
        if parser is not None:
            found, _ = parsed_columns(parser, _whole_answers(asked, parent, columns["response"]))
            columns |= found
        prompt_tokens = np.array([len(prompt) for prompt in asked.prompts], dtype=np.int64)[parent]
        tokens = prompt_tokens + columns["response_ids"].lengths
        return OpResult(columns=Batch(columns, len(responses)), parent=parent, tokens=tokens)

    def _sampling(self, n: int, greedy: bool, *, stop: Sequence[str] = (), **sampled: float | None) -> Sampling:
        """The role's own settings, and what the call says in their place."""
        rollout = self.config.rollout
        own: dict[str, Any] = {
            "temperature": rollout.temperature,
            "top_p": rollout.top_p,
            "top_k": rollout.top_k,
            "max_tokens": rollout.max_response_tokens,
        }
        whole = {"top_k": int, "max_tokens": int}  # a state's number is not
        own |= {name: whole.get(name, float)(value) for name, value in sampled.items() if value is not None}
        return Sampling(n=n, greedy=greedy, stop=tuple(stop), **own)

    def _texts(self, responses: Sequence[Response], sampling: Sampling) -> dict[str, Column]:
        # One by one: the tokenizer's batch of no rows is one empty text, and a rank may have no rows.
        plain, raw = (
            [self.tokenizer.decode(one.token_ids, skip_special_tokens=skips) for one in responses]
            for skips in (True, False)
        )
        return {
            "response": Column.strings([before_stop(text, sampling.stop) for text in plain]),
            "raw_response": Column.strings(raw),
        }

    def _staleness(self, step: int) -> int:
        """Updates that the weights are behind `step`. Raises StaleWeights where that is more than they may be."""
        # Weights that this step has trained already are ahead of its number.
        staleness = 0 if self.max_staleness is None else max(0, step - self.weights_step)
        if staleness > (self.max_staleness or 0):
            raise StaleWeights(
                f"weights may be {self.max_staleness} updates behind (placement.max_staleness), they are {staleness}; "
                "the controller must sync first"
            )
        return staleness

    def _lender(self, role: str) -> RolloutWorker:
        """The worker of this process that generates for `role`: whose logits are mixed with these, or who speaks."""
        if role == self.name.removesuffix(rollout_of("")):
            return self
        for name in (rollout_of(role), role):
            worker = self.context.peers.get(name)
            found = worker if isinstance(worker, RolloutWorker) else getattr(worker, "generation", None)
            if isinstance(found, RolloutWorker):
                return found
        raise ValueError(f"{self.name} generates beside {role!r}, which does not generate in this process")

    def _fits(self, asked: Asked, *, drops: bool) -> NDArray[np.bool_]:
        """[B] prompts that are asked. drops: those too long are not, and count as not parsed; else a ValueError names
        the first that a template made, and the engine any other."""
        limit = self.config.rollout.max_prompt_tokens
        lengths = np.array([len(prompt) for prompt in asked.prompts], dtype=np.int64)
        fits = lengths <= limit
        if drops:
            return fits
        if asked.texts is not None:
            check_fits(asked, limit, f"{self.name}.max_prompt_tokens")
        return np.ones(len(lengths), dtype=bool)

    def _drawn(
        self,
        prompts: Sequence[NDArray[np.int32]],
        rows: NDArray[np.int64],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        begun: Sequence[Response] | None,
        stop: Callable[[], bool] | None,
        mixture: tuple[GenerationEngine, float] | None,
        done: Callable[[int, Response], None] | None,
    ) -> list[Response]:
        """Responses to all prompts; those that are not among `rows` get an empty one. done: told of each as it ends."""
        places = (rows[:, None] * sampling.n + np.arange(sampling.n)).ravel().tolist()
        responses = [NO_RESPONSE] * len(seeds)
        if done is not None and begun is None:
            for place in sorted(set(range(len(seeds))) - set(places)):
                done(place, NO_RESPONSE)
        found = self.engine.generate(
            [prompts[row] for row in rows],
            sampling,
            [seeds[place] for place in places],
            begun=None if begun is None else [begun[place] for place in places],
            stop=stop,
            ends=self._ends(sampling.stop),
            mixture=mixture,
            done=None if done is None else lambda at, response: done(places[at], response),
        )
        for place, response in zip(places, found, strict=True):
            responses[place] = response
        return responses

    def _ends(self, texts: Sequence[str]) -> Ends | None:
        """Ends a response that says one of `texts`. A token has at least one byte, and a text may begin inside one."""
        if not texts:
            return None
        last = max(len(text.encode()) for text in texts) + 4
        return Ends(
            last, lambda ids: any(text in self.tokenizer.decode(ids, skip_special_tokens=True) for text in texts)
        )

    def run_episodes(
        self,
        batch: Batch,
        call: Call,
        *,
        environment: Environment,
        n: int = 1,
        greedy: bool = False,
        limits: EpisodeLimits | None = None,
        speakers: Mapping[str, str] = MappingProxyType({}),
        rows_of: Sequence[str] = (),
        groups: int | None = None,
        first: First = "turns",
        held_out: bool = False,
    ) -> OpResult:
        """`n` episodes of each row, which the first rank of those that share a copy of the model plays, and answers
        for; the others follow it. Where new weights interrupt it (`placement.interrupt`, one rank a copy) it is called
        again, and the episodes go on where they were.

        speakers: name -> role of this process that speaks, too. rows_of: names of those whose sides are rows. groups:
        rows whose episodes all ranks together keep, in the order that `first` says; `call` has this rank's share.
        held_out: no random number depends on the step."""
        wanted = groups if call.wanted is None else call.wanted

        def rows_of_some(some: Sequence[Episode]) -> OpResult:
            return self._episode_rows(some, call, n, environment)

        played = self._played(
            batch,
            replace(call, step=0) if held_out else call,
            step=call.step,
            environment=environment,
            sampling=self._sampling(n, greedy),
            limits=limits or EpisodeLimits(),
            speakers=speakers,
            rows_of=rows_of,
            wanted=wanted,
            first=first,
            # Which rows are the first is known when all are over.
            hand=None if wanted is not None else lambda piece, some: self.context.hand(call, piece, rows_of_some(some)),
        )
        if played is None:
            return OpResult(columns=NOTHING, interrupted=True)
        episodes, behind = played
        staleness = behind[self.engine.weights_version]
        self._log(episodes, batch, call, n, held_out)
        kept = [episode for episode in episodes if episode.trains]
        made = rows_of_some(kept)
        columns, tokens = dict(made.columns.items()), made.tokens
        assert tokens is not None, "rows of episodes have token ids"
        speaker = np.array(columns["speaker"].rows(), dtype=object)
        role, lengths = self.name.removesuffix(rollout_of("")), columns["response_ids"].lengths
        count, trained = float(len(kept)), float(columns["response_mask"].values.sum())
        metrics: Metrics = {
            **episode_metrics([episode for episode in episodes if not episode.speaker]),
            "response_tokens": Mean(float(lengths.sum()), count),
            "drawn_tokens": Mean(trained, count),
            "longest_response": Largest(float(lengths.max(initial=0))),
            "finished": Mean(float(columns["finished"].values.sum()), count),
            "rows": Mean(count, 0),
            "sequence_tokens": Mean(float(tokens.sum()), 0),
            "staleness": Mean(_behind(columns["policy_version"], behind, staleness), count),
            **version_metrics(columns),
        }
        if len(behind) > 1:
            versions = columns["policy_version"].rows()
            metrics["continued"] = Mean(float(sum(len(set(one.tolist())) > 1 for one in versions)), 0)
        if wanted is not None:
            metrics |= group_metrics(episodes, wanted=wanted, n=n)
        if environment.rewards:
            metrics |= reward_metrics(columns["rewards"].values[speaker == role])
        for name in rows_of:
            theirs = speaker == name
            metrics[f"rows_of_{name}"] = Mean(float(theirs.sum()), 0)
            if environment.rewards:
                metrics[f"reward_of_{name}"] = Mean(float(columns["rewards"].values[theirs].sum()), float(theirs.sum()))
        return replace(made, metrics=metrics)

    def _episode_rows(self, episodes: Sequence[Episode], call: Call, n: int, environment: Environment) -> OpResult:
        """The rows of those that train, without metrics."""
        kept = [episode for episode in episodes if episode.trains]
        numbers = np.array([episode.number for episode in kept], dtype=np.int64)
        trees = None
        if environment.leaves > 1:
            rows, copies = call.row_index[numbers // n].tolist(), (numbers % n).tolist()
            trees = [seed_of(call.step, call.node, row, copy) for row, copy in zip(rows, copies, strict=True)]
        columns = episode_columns(kept, rewards=environment.rewards, trees=trees)
        role = self.name.removesuffix(rollout_of(""))
        columns["speaker"] = Column.strings([episode.speaker or role for episode in kept])
        tokens = columns["prompt_ids"].lengths + columns["response_ids"].lengths
        return OpResult(columns=Batch(columns, len(kept)), parent=numbers // n, tokens=tokens)

    def _speaker(self, name: str, learns: bool) -> Speaker:
        """This role in another's episodes, as its own settings have it generate."""
        model, rollout = self.config.model.path, self.config.rollout
        return Speaker(
            name=name,
            engine=self.engine,
            model=model,
            sampling=self._sampling(1, False),
            prompt_tokens=rollout.max_prompt_tokens,
            learns=learns,
        )

    def _played(
        self,
        batch: Batch,
        call: Call,
        *,
        step: int,
        environment: Environment,
        sampling: Sampling,
        limits: EpisodeLimits,
        speakers: Mapping[str, str],
        rows_of: Sequence[str],
        wanted: int | None,
        first: First,
        hand: Hand | None,
    ) -> tuple[list[Episode], Mapping[int, int]] | None:
        """All that was played (nothing on a rank that follows), and how many updates each version that drew was behind;
        None where new weights interrupt it. call: what random numbers depend on. step: the one that asks."""
        self._stop.clear()
        lenders = {name: self._lender(role) for name, role in speakers.items()}
        others = dict.fromkeys(one.name for one in lenders.values() if one is not self)
        self.memory.turn(self.memory.add_together(self.name, *others))
        for one in lenders.values():
            one._staleness(step)
        staleness, rollout = self._staleness(step), self.config.rollout
        with Copy([self.engine, *(one.engine for one in lenders.values())]) as copy:
            if not copy.leads:
                copy.follow()
                return [], {self.engine.weights_version: staleness}
            under_way = self._under_way.pop((call.node, step), None) or begin_episodes(
                copy.of(self.engine),
                self.config.model.path,
                batch,
                call,
                environment,
                limits,
                sampling,
                rollout.max_prompt_tokens,
                [
                    replace(lender._speaker(name, name in rows_of), engine=copy.of(lender.engine))
                    for name, lender in lenders.items()
                ],
                wanted=wanted,
                first=first,
                hand=hand,
            )
            under_way.behind.setdefault(self.engine.weights_version, staleness)
            # Ranks that follow would have to be called again, too.
            interruptible = self._interrupts and rollout.tensor_parallel == 1
            episodes = under_way.go_on(self._stop.is_set if interruptible else None)
            if episodes is None:
                self._under_way[call.node, step] = under_way
                return None
            return episodes, under_way.behind

    def _log(self, episodes: Sequence[Episode], batch: Batch, call: Call, n: int, held_out: bool) -> None:
        groups, of = batch["group_id"].values, {"held_out": True} if held_out else {}
        places = [
            {"step": call.step, "node": call.node, **of, "group_id": int(groups[number // n]), "copy": number % n}
            for number in (episode.number for episode in episodes)
        ]
        role = self.name.removesuffix(rollout_of(""))
        file = Path(self.context.folder) / "episodes" / f"lost_{role}_rank_{self.context.rank}.jsonl"
        log_lost(list(zip(places, episodes, strict=True)), file)

    def connect(self, bridge: Bridge) -> None:
        """Meet the ranks that train, in a pool of their own; all of both pools do."""
        device = torch.device(self.context.device)
        self.end = GenerationEnd(self.engine, self.config.rollout, bridge, self.context.rank, device)
        # Weights of another pool come when that pool sends: nothing may be given up in the hope of it.
        self.memory.add_sync(
            f"{self.name}.sync", {self.name: "weights"}, overwrites=False, buckets=2 * self.end.bucket_bytes
        )

    def receive_weights(self, batch: Batch, call: Call) -> OpResult:
        """Take the weights that the training ranks send, verified: version, count, per-parameter checksums."""
        self.memory.turn(f"{self.name}.sync")
        report = self.end.run()
        self.weights_step = call.step + 1
        return OpResult(columns=NOTHING, metrics=sync_metrics(report) if self.context.rank == 0 else {})

    def close(self) -> None:
        """Free what the generation engine holds outside the process."""
        self.engine.close()


def _behind(versions: Column, behind: Mapping[int, int], staleness: int) -> float:
    """Updates that the policy which drew each row's first token was behind, added up. versions: of tokens. staleness:
    of versions that are none of the role's own."""
    return float(sum(behind.get(int(row[0]), staleness) for row in versions.rows()))


def sync_metrics(report: SyncReport) -> Metrics:
    """What a weight sync reports; one rank of the receiving end does."""
    return {
        "sync_seconds": Mean(report.seconds, 1),
        "sync_bytes": Mean(float(report.bytes_received), 0),
        "sync_parameters": Mean(float(report.parameters), 0),
    }


def generation_metrics(columns: Mapping[str, Column], tokens: NDArray[np.int64], behind: NDArray[np.int64]) -> Metrics:
    """Of responses: their lengths, how they ended, and how old the weights were that drew them. tokens: [B] with the
    prompts'. behind: [B] updates."""
    lengths, rows = columns["response_ids"].lengths, float(len(tokens))
    return {
        "response_tokens": Mean(float(lengths.sum()), rows),
        "longest_response": Largest(float(lengths.max(initial=0))),
        "finished": Mean(float(columns["finished"].values.sum()), rows),
        "empty_responses": Mean(float((lengths == 0).sum()), 0),
        "rows": Mean(rows, 0),
        "sequence_tokens": Mean(float(tokens.sum()), 0),
        "staleness": Mean(float(behind.sum()), rows),
        **version_metrics(columns),
    }


def version_metrics(columns: Mapping[str, Column]) -> Metrics:
    """The weight version that drew the tokens, in the mean over them (a whole number where it was one); nothing of no
    tokens."""
    drawn = columns["policy_version"].values[columns["response_mask"].values > 0]
    return {"policy_version": Mean(float(drawn.sum(dtype=np.float64)), float(len(drawn)))} if len(drawn) else {}


def asked_columns(
    asked: Asked, parent: NDArray[np.int64], template: Template | None, prefix: str | None
) -> dict[str, Column]:
    """The columns of prompts that generation has made itself, of each response's."""
    if template is None and prefix is None:
        return {}
    columns = {"prompt_ids": Column.ragged(asked.prompts, dtype=np.int32).take(parent)}
    if asked.texts is not None:
        columns["prompt"] = Column.strings(asked.texts).take(parent)
    return columns


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _whole_answers(asked: Asked, parent: NDArray[np.int64], response: Column) -> list[str]:
    """What each response says, behind the beginning that it was given."""
    texts: list[str] = response.rows()
    if asked.answers is None:
        return texts
    return [asked.answers[row] + text for row, text in zip(parent, texts, strict=True)]


def response_columns(responses: Sequence[Response]) -> dict[str, Column]:
    """The columns that generation writes, text aside."""
    ids = Column.ragged([r.token_ids for r in responses], dtype=np.int32)
    return {
        "response_ids": ids,
        "response_mask": Column(np.ones(len(ids.values), dtype=np.uint8), ids.offsets),
        "rollout_log_probs": Column.ragged([r.log_probs for r in responses], dtype=np.float32),
        "finished": Column.dense([r.finished for r in responses], dtype=np.uint8),
        "policy_version": Column.ragged([r.versions for r in responses], dtype=np.int32),
    }
