"""Generation: in the trainer's process, in a pool of its own with weights synced, or of a role that never learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_dist.batch import Batch, Column
from rlhf_dist.config import LanguageModelConfig
from rlhf_dist.environments import Environment, EpisodeLimits
from rlhf_dist.metrics import Largest, Mean, Metrics, reward_metrics
from rlhf_dist.placement.roles import rollout_of
from rlhf_dist.reshard.groups import consecutive_axes, rollout_grid
from rlhf_dist.sampling import Sampling, seed_of
from rlhf_dist.wire import Bridge, Call, OpResult, WorkerContext
from workers.build_engines import new_generation_engine
from workers.engines.generation.interface import Response, StaleWeights
from workers.episodes.play import Episode
from workers.episodes.rows import episode_columns, episode_metrics, log_lost
from workers.episodes.run import run_episodes
from workers.memory.arbiter import arbiter_of, generating
from workers.reshard.separate import GenerationEnd
from workers.reshard.sync import SyncReport

NOTHING = Batch({}, 0)


@dataclass(frozen=True, eq=False)
class _Begun:
    """Generation that was interrupted."""

    responses: list[Response]
    staleness: NDArray[np.int64]
    """[B] updates they were behind."""


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
        self.tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        copies = rollout_grid(axes or consecutive_axes(config, context.world)).tolist()
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

    def interrupt(self) -> None:
        """Stop generating after the token at hand, if something is generated; called from another thread."""
        self._stop.set()

    def generate_sequences(self, batch: Batch, call: Call, *, n: int = 1, greedy: bool = False) -> OpResult:
        """`n` responses to each prompt. What is drawn depends on (run seed, step, node, row, copy) only."""
        self._stop.clear()
        staleness, sampling = self._begin(call), self._sampling(n, greedy)
        prompts = [batch["prompt_ids"].row(row) for row in range(batch.num_rows)]
        seeds = [
            seed_of(call.seed, call.step, call.node, int(row), copy) for row in call.row_index for copy in range(n)
        ]
        begun = self._begun.pop((call.node, call.step), None)
        behind = np.full(len(seeds), staleness)
        if begun is not None:  # staleness is that of the policy that drew the first token
            old = np.array([len(response.token_ids) > 0 for response in begun.responses], dtype=bool)
            behind = np.where(old, begun.staleness, behind)
        responses = self.engine.generate(
            prompts,
            sampling,
            seeds,
            begun=None if begun is None else begun.responses,
            stop=self._stop.is_set if self._interrupts else None,
        )
        if any(response.interrupted for response in responses):
            self._begun[call.node, call.step] = _Begun(responses, behind)
            return OpResult(columns=NOTHING, interrupted=True)
        parent = np.repeat(np.arange(batch.num_rows), n)
        columns = response_columns(responses)
        # One by one: the tokenizer's batch of no rows is one empty text, and a rank may have no rows.
        for name, skips in (("response", True), ("raw_response", False)):
            texts = [self.tokenizer.decode(r.token_ids, skip_special_tokens=skips) for r in responses]
            columns[name] = Column.strings(texts)
        lengths = columns["response_ids"].lengths
        tokens = batch["prompt_ids"].lengths[parent] + lengths
        rows = float(len(responses))
        continued = sum(len(r.versions) > 0 and r.versions[0] != r.versions[-1] for r in responses)
        return OpResult(
            columns=Batch(columns, len(responses)),
            parent=parent,
            tokens=tokens,
            metrics={
                "response_tokens": Mean(float(lengths.sum()), rows),
                "longest_response": Largest(float(lengths.max(initial=0))),
                "finished": Mean(float(columns["finished"].values.sum()), rows),
                "empty_responses": Mean(float((lengths == 0).sum()), 0),
                "rows": Mean(rows, 0),
                "sequence_tokens": Mean(float(tokens.sum()), 0),
                "staleness": Mean(float(behind.sum()), rows),
                **({"continued": Mean(float(continued), 0)} if begun else {}),
            },
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
    ) -> OpResult:
        """`n` episodes of each row. Weights that wait for the pool (`placement.interrupt`) wait until all are over."""
        assert self.config.rollout.tensor_parallel == 1, "checked before anything starts"
        staleness, rollout = self._begin(call), self.config.rollout
        episodes = run_episodes(
            self.engine,
            self.config.model.path,
            batch,
            call,
            environment,
            limits or EpisodeLimits(),
            self._sampling(n, greedy),
            rollout.max_prompt_tokens,
        )
        self._log(episodes, batch, call, n)
        kept = np.array([at for at, episode in enumerate(episodes) if episode.trains], dtype=np.int64)
        columns = episode_columns([episodes[at] for at in kept], rewards=environment.rewards)
        lengths = columns["response_ids"].lengths
        tokens = columns["prompt_ids"].lengths + lengths
        rows, trained = float(len(kept)), float(columns["response_mask"].values.sum())
        metrics: Metrics = {
            **episode_metrics(episodes),
            "response_tokens": Mean(float(lengths.sum()), rows),
            "drawn_tokens": Mean(trained, rows),
            "longest_response": Largest(float(lengths.max(initial=0))),
            "finished": Mean(float(columns["finished"].values.sum()), rows),
            "rows": Mean(rows, 0),
            "sequence_tokens": Mean(float(tokens.sum()), 0),
            "staleness": Mean(staleness * rows, rows),
        }
        if environment.rewards:
            metrics |= reward_metrics(columns["rewards"].values)
        return OpResult(columns=Batch(columns, len(kept)), parent=kept // n, tokens=tokens, metrics=metrics)

    def _log(self, episodes: Sequence[Episode], batch: Batch, call: Call, n: int) -> None:
        groups = batch["group_id"].values
        places = [
            {"step": call.step, "node": call.node, "group_id": int(groups[at // n]), "copy": at % n}
            for at in range(len(episodes))
        ]
        file = Path(self.context.folder) / "episodes" / f"lost_{self.name}_rank_{self.context.rank}.jsonl"
        log_lost(list(zip(places, episodes, strict=True)), file)

    def _begin(self, call: Call) -> int:
        """Take the device; the updates that the weights are behind. Raises StaleWeights for too many."""
        self.memory.turn(generating(self.name))
        # Weights that this step has trained already are ahead of its number.
        staleness = 0 if self.max_staleness is None else max(0, call.step - self.weights_step)
        if staleness > (self.max_staleness or 0):
            raise StaleWeights(
                f"weights may be {self.max_staleness} updates behind (placement.max_staleness), they are {staleness}; "
                "the controller must sync first"
            )
        return staleness

    def _sampling(self, n: int, greedy: bool) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            n=n,
            greedy=greedy,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_tokens=rollout.max_response_tokens,
        )

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


def sync_metrics(report: SyncReport) -> Metrics:
    """What a weight sync reports; one rank of the receiving end does."""
    return {
        "sync_seconds": Mean(report.seconds, 1),
        "sync_bytes": Mean(float(report.bytes_received), 0),
        "sync_parameters": Mean(float(report.parameters), 0),
    }


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
