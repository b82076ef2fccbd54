"""A run between its start and its end: first sync, evaluation, steps and what happens between them, recovery, export.

sync ─> evaluate ─> steps ... ─> evaluate ─> export
  ^                  |    on every finished step: metrics.jsonl, trackers, display
  |                  |    at barriers: evaluation, copy in memory, scaling, checkpoint
  +── recovery, from a failure anywhere (recovering.py)
                          notice: checkpoint, Preempted (preemption.py)
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from controller.cluster.pool import ClusterError, NoRoom
from controller.execution.eager import run_eagerly
from controller.execution.executor import StepReport, run_steps
from controller.execution.failed_calls import NodeError, WorkerLost
from controller.execution.looking import Looking
from controller.execution.ray_runner import RayRunner
from controller.lifecycle.evaluation import Evaluation
from controller.lifecycle.export import check_exported
from controller.lifecycle.preemption import Notices, Preempted
from controller.lifecycle.recovering import RECOVERABLE, Recoveries, Recovery, shortened, with_reason
from controller.lifecycle.replicas import DeadReplicas
from controller.lifecycle.run_checkpoints import RunCheckpoints
from controller.lifecycle.run_folder import Beginning
from controller.lifecycle.scaling import Answer, NotScaled, Scaling, slots_for
from controller.lifecycle.session import Session
from controller.lifecycle.step_end import StepEnd
from controller.lifecycle.step_warnings import StepWarnings
from controller.lifecycle.uploads import Uploads
from controller.record.graph_file import GraphFile
from controller.record.metrics import MetricsWriter
from controller.record.timeline import Timeline
from rlhf_dist.compose import Launch
from rlhf_dist.dataflow.beside import with_evaluations
from rlhf_dist.dataflow.passes import insert_rollout_dump
from rlhf_dist.durable_files import sync
from rlhf_dist.held_out import HELDOUT


class StepDisplay(Protocol):
    """What shows progress (`controller/record/display.py`)."""

    def step(self, step: int, metrics: Mapping[str, float], node_seconds: Mapping[str, float]) -> None:
        """A step is finished."""
        ...

    def phase(self, text: str) -> None:
        """Something of the start-up begins."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line happened."""
        ...


@dataclass
class Progress:
    """What the run has done so far, for its summary."""

    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    timeline: Timeline | None = None
    warnings: StepWarnings = field(default_factory=StepWarnings)
    recoveries: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    """That were run, those that were run again included."""
    tokens: float = 0.0
    seconds: float = 0.0
    node_seconds: dict[str, list[float]] = field(default_factory=dict)
    """Node -> of each step that was run."""


class RunInProgress:
    """A run between its start and its end."""

    def __init__(
        self,
        launch: Launch,
        session: Session,
        beginning: Beginning,
        writer: MetricsWriter,
        display: StepDisplay,
        progress: Progress,
        eager: bool,
        cluster_metrics: Callable[[], dict[str, float]],
        uploads: Uploads | None,
        notices: Notices,
    ) -> None:
        folder = beginning.folder
        self.launch, self.session, self.folder, self.checkpoint = launch, session, folder, beginning.checkpoint
        session.shifts = {name: of["shift"] for name, of in beginning.sources.items()}
        self.writer, self.display, self.progress, self.eager = writer, display, progress, eager
        output = launch.run.output
        dumps = folder / "rollouts" if output.rollouts_every else None
        self.evaluation = Evaluation(session, dumps, notices.check, eager=eager)
        step = insert_rollout_dump(
            launch.dataflow,
            folder=str((folder / "rollouts").resolve()),
            rows=output.rollout_rows,
            every=output.rollouts_every,
        )
        self.dataflow = with_evaluations(step, self.evaluation.beside, HELDOUT)
        self.looking = Looking(
            folder=folder,
            every=output.inputs_every,
            keep=output.keep_inputs,
            nodes=output.inputs_nodes,
            profiled=launch.run.profile.steps,
        )
        self.notices, self.scaling, self.done = notices, Scaling(folder), 0
        self.checkpoints = RunCheckpoints(session, beginning, uploads, display.note)
        self.runner = self._new_runner()
        # Asked of the runner there is: one that a recovery has replaced must not be held, with all its rows.
        self.progress.timeline = Timeline(self.dataflow, lambda node: self.runner.pools_of(node))
        self.graph_file = GraphFile(folder, step, self.evaluation.graphs)
        if self.evaluation.in_vain:
            display.note(
                "data.heldout is not evaluated: nothing that generates has rewards, of a role or of its episodes"
            )
        self.recoveries = Recoveries(session, display.phase)
        self.cluster_metrics = cluster_metrics
        self.closed_s = time.perf_counter()
        self.began = self.furthest = 0
        """Steps done when this launch began, and at most until now."""
        self.end: StepEnd | None = None
        """Of the last step that ended."""
        self.copied: dict[str, float] = {}
        """What a copy in memory cost since the last step."""
        self.recovered_s: list[float] = []
        """Seconds of recoveries since the last step."""

    def _new_runner(self) -> RayRunner:
        numbers = {name: state.initial(self.launch.algorithm) for name, state in self.session.states.items()}
        # Line by line, anything may be looked at until the step ends, whoever else reads it.
        replicas = DeadReplicas(self.session, self._admit, self.display.phase, self._recovered_from)
        graph = None if self.eager else self.dataflow
        return self.session.runner(graph, numbers, check=self.notices.check, replicas=replicas, looking=self.looking)

    def execute(self) -> None:
        """From its start, or from a checkpoint, to its end."""
        first_step = 0 if self.checkpoint is None else self.checkpoint.step
        done = self.began = self.furthest = first_step
        try:
            try:
                self._begin(first_step)
            except RECOVERABLE as error:
                done = self._recover(error)
            while True:
                try:
                    self._go_on(done)
                    return
                except RECOVERABLE as error:
                    done = self._recover(error)
        except Preempted as notice:
            self._make_room(notice)
        except BaseException as error:
            self._say_inputs(error)
            self._leave_checkpoint()
            raise

    def _say_inputs(self, error: BaseException) -> None:
        """How a person goes on from a node that failed."""
        self.looking.bound()
        at = error.of_node if isinstance(error, NodeError) else None
        if at is not None and self.looking.kept(*at) is not None:
            node, step = at
            self.display.note(
                f"the inputs of {node} are kept: rlhf-dist replay {self.folder} --step {step} --node {node}"
            )

    def _begin(self, first_step: int) -> None:
        if self.checkpoint is not None:
            self.display.phase("checkpoint")
            self.checkpoints.restore(self.checkpoint, self.runner)
            self.display.note(f"resumed after {first_step} steps from {self.checkpoint.folder}")
        if self.launch.dataflow.generating:
            self.display.phase("first weight sync")
        self.session.sync(first_step)

    def _go_on(self, done: int) -> None:
        """From `done` steps done to the end; nothing is under way."""
        self._remember_end(done)
        if done == self.began and self._evaluation_is_due(done):
            self.display.phase("evaluation")
        self._at_barrier(done)
        if done == self.began < self.launch.run.steps:
            self.display.phase("first step")
        self.closed_s = time.perf_counter()
        self.done, self.notices.running = done, True
        self._steps(done)
        self.checkpoints.advance(wait=True)
        if self.notices.look():
            raise Preempted(self.notices.asked)
        self.notices.running = False
        self._export()

    def _steps(self, first_step: int) -> None:
        run = self.launch.run
        if self.eager:
            run_eagerly(
                self.launch.recipe,
                self.launch.algorithm,
                self.runner,
                start=first_step,
                stop=run.steps,
                on_step=self._on_step,
                refilled=self.launch.dataflow.refilled,
                at_the_end=[node for node in self.dataflow if node.op == "dump"],
            )
        else:
            run_steps(
                self.dataflow,
                self.runner,
                start=first_step,
                stop=run.steps,
                on_step=self._on_step,
                barrier=self._is_barrier,
            )

    def _on_step(self, report: StepReport) -> None:
        now = time.perf_counter()
        seconds, self.closed_s = now - self.closed_s, now
        own, evaluated = self.evaluation.of_step(report)
        self._tell_evaluation(report.step, evaluated)
        metrics = own.metrics
        tokens = self._tokens(metrics)
        metrics |= {"step_s": seconds, "tokens_per_s": tokens / seconds, **self.cluster_metrics()}
        metrics |= self.copied
        self.copied = {}
        if self.recovered_s:
            metrics |= {"recoveries": float(len(self.recovered_s)), "recovery_s": sum(self.recovered_s)}
            self.recovered_s = []
        self._remember(report, metrics, tokens, seconds)
        self.writer.write(report.step, metrics, report.seconds)
        self.graph_file.saw(own.nodes)
        self.display.step(report.step, metrics, report.seconds)
        for said in (self.progress.warnings.of(report.step, metrics), *self.looking.after(report.step)):
            if said:
                self.display.note(said)
        done = report.step + 1
        self.done = done
        self.furthest = max(self.furthest, done)
        self._remember_end(done)
        self.checkpoints.advance(wait=False)
        self._at_barrier(done)
        if self.notices.look() and self._is_settled:
            raise Preempted(self.notices.asked)
        self.closed_s = time.perf_counter()

    def _tokens(self, metrics: Mapping[str, float]) -> float:
        """Prompt and response tokens of the step: what was generated, or what the sources gave."""
        counted = {name: value for name, value in metrics.items() if name.endswith("/sequence_tokens")}
        sources = {f"{name}/sequence_tokens" for name in self.launch.recipe.sources}
        return sum(value for name, value in counted.items() if name not in sources) or sum(counted.values())

    def _remember(self, report: StepReport, metrics: dict[str, float], tokens: float, seconds: float) -> None:
        self.progress.first = self.progress.first or metrics
        self.progress.last = metrics
        self.progress.steps += 1
        self.progress.tokens += tokens
        self.progress.seconds += seconds
        assert self.progress.timeline is not None, "set when the run begins"
        self.progress.timeline.finished += report.nodes
        for node, spent in report.seconds.items():
            self.progress.node_seconds.setdefault(node, []).append(spent)

    @contextmanager
    def _paused(self, what: str) -> Iterator[None]:
        """Nothing of the graph runs inside."""
        started = time.perf_counter()
        yield
        assert self.progress.timeline is not None, "set when the run begins"
        self.progress.timeline.paused.append((what, started, time.perf_counter()))

    # --- barriers ------------------------------------------------------------------------------------
    def _at_barrier(self, done: int) -> None:
        """Evaluate and save what is due after `done` steps and has not been done before a recovery."""
        if self._evaluation_is_due(done) and not self.notices.look():
            with self._paused("evaluation"):
                self._evaluate(done)
        if self._copies_in_memory and (self._copies_after(done - 1) or done == self.began):
            with self._paused("copy in memory"):
                self._copy(done)
        if self.scaling.look() is not None and self._is_settled:
            with self._paused("scale"):
                self._scale(done)
        asked = self.notices.wants_checkpoint and self._is_settled
        if done > self.began and (asked or self._checkpoints_after(done - 1)) and self.checkpoints.kept_at != done:
            with self._paused("checkpoint"):
                self._checkpoint(done)

    def _evaluation_is_due(self, done: int) -> bool:
        """Whether what `done` steps have made is to be evaluated before the next, and has not been."""
        if done > self.began:
            due = self._evaluates_after(done - 1)
        else:
            due = self.began < self.launch.run.steps and not self.evaluation.due_beside(done)
        return due and self.evaluation.possible and not self._is_evaluated(done)

    def _is_evaluated(self, done: int) -> bool:
        return any(one["step"] == done for one in self.progress.evaluations)

    def _evaluates_after(self, step: int) -> bool:
        """Whether all waits for an evaluation behind this step."""
        every, done = self.launch.run.output.evaluate_every, step + 1
        between = bool(every) and done % every == 0 and not self.evaluation.beside
        return self.evaluation.possible and (done == self.launch.run.steps or between)

    def _checkpoints_after(self, step: int) -> bool:
        every, done = self.launch.run.output.checkpoint_every, step + 1
        return every is not None and (done == self.launch.run.steps or bool(every and done % every == 0))

    @property
    def _copies_in_memory(self) -> bool:
        return bool(self.launch.run.recovery.memory_every and self.launch.run.recovery.retries)

    def _copies_after(self, step: int) -> bool:
        every = self.launch.run.recovery.memory_every
        return bool(every) and (step + 1) % every == 0

    def _is_barrier(self, step: int) -> bool:
        asked = self.notices.look() or self.notices.wants_checkpoint or self.scaling.look() is not None
        return asked or self._evaluates_after(step) or self._checkpoints_after(step) or self._copies_after(step)

    def _evaluate(self, done: int) -> None:
        self._tell_evaluation(done, self.evaluation.run(done, self.runner.numbers))

    def _tell_evaluation(self, done: int, metrics: Mapping[str, float]) -> None:
        """Metrics of held-out rows, if there are any; those of a step that was run again were told before."""
        if metrics and not self._is_evaluated(done):
            self.progress.evaluations.append({"step": float(done), **metrics})
            self.writer.write_evaluation(done, metrics)
            of = {name.split("/")[-2]: value for name, value in metrics.items() if name.endswith("/reward")}
            said = ", ".join(f"{value:.4f}" if role == HELDOUT else f"{role} {value:.4f}" for role, value in of.items())
            lost = sum(value for name, value in metrics.items() if name.endswith("/lost"))
            missing = f" ({lost:g} episodes are lost: rlhf-dist rollouts {self.folder} --lost)" if lost else ""
            self.display.note(f"held-out reward after {done} steps: {said or 'none'}{missing}")

    @property
    def _is_settled(self) -> bool:
        """Whether weights, states and sources are those after `done` steps: no later step has touched them."""
        return self.runner.newest < self.done or not (self.dataflow.staleness or self.runner.changing)

    def _scale(self, done: int) -> None:
        """Give a pool that generates the number of replicas that somebody has asked for."""
        request, started = self.scaling.look(), time.perf_counter()
        if request is None:  # withdrawn since
            return
        try:
            slots = slots_for(self.session, request)
            self.display.phase(f"scale: pool {request.pool} to {request.replicas} replicas")
            self.recoveries.resize(request.pool, slots, done)
        except (NotScaled, NoRoom) as error:
            self.scaling.answer(Answer(done=False, text=str(error)))
            self.display.note(f"not scaled: {error}")
            return
        except RECOVERABLE as error:
            self.scaling.answer(Answer(done=False, text=f"the run recovers from: {error}"))
            raise
        self.runner.groups = {**self.runner.groups, **self.session.groups}
        said = (
            f"pool {request.pool} has {request.replicas} replicas after {done} steps, with the weights of that step; "
            f"the steps waited {time.perf_counter() - started:.1f} s"
        )
        self.scaling.answer(Answer(done=True, text=said))
        self.display.note(said)

    def _copy(self, done: int) -> None:
        """A copy of what all ranks hold, in other nodes' memory, for a recovery to go back to."""
        assert self.end is not None and self.end.done == done, "the step has just ended"
        try:
            self.copied = self.recoveries.copies.make(self.end)
        except ClusterError as error:  # Of a rank that is gone the next node tells; a copy alone ends nothing.
            self.display.note(f"no copy in memory after {done} steps: {error}")

    def _checkpoint(self, done: int, limit_s: float | None = None) -> None:
        self.notices.wants_checkpoint = False
        self.checkpoints.begin(done, self.runner, limit_s)

    def _make_room(self, notice: Preempted) -> None:
        """Save what is done, where no step under way has changed it yet, and end. Raises Preempted."""
        if (
            self.checkpoints.last < self.done
            and self.launch.run.output.checkpoint_every is not None
            and self._is_settled
        ):
            try:
                self._checkpoint(self.done, limit_s=max(self.notices.left_s, 1.0))
            except Exception as error:  # without it the last one stands, which is said below
                self.display.note(f"no checkpoint after {self.done} steps: {error}")
        self._leave_checkpoint()
        last = self.checkpoints.saved
        saved = f"the last checkpoint is of step {last}" if last else "there is no checkpoint"
        lost = "" if last == self.done else f", and {self.done - last} steps {'after it ' if last else ''}are lost"
        how = "go on with resume=auto" if last else "resume=auto starts again"
        raise Preempted(f"{notice} after {self.done} steps; {saved}{lost}; {how}") from notice

    def _leave_checkpoint(self) -> None:
        if not self.notices.at_once:
            self.checkpoints.leave()

    # --- recovery ------------------------------------------------------------------------------------
    def _remember_end(self, done: int) -> None:
        held = {name: self.runner.held_state(name) for name in self.runner.numbers}
        self.end = StepEnd(done=done, states=held, written=frozenset(self.runner.written))

    def _recover(self, error: NodeError | ClusterError) -> int:
        """Bring all pools back to where a step ended; how many steps are done there. Raises `error`, or what ended
        the last attempt, where the run must end."""
        started, first = time.perf_counter(), shortened(str(error))
        self.looking.bound()
        while True:
            self.recoveries.admit(error, self.furthest)
            try:
                return self._recovered(error, started)
            except RECOVERABLE as again:
                if again is error:  # there is nothing to go back to
                    raise
                again.__context__ = error
                error = with_reason(again, f"in a recovery from: {first}")

    def _recovered(self, error: Exception, started: float) -> int:
        recoveries, written = self.recoveries, self.runner.written
        dead = recoveries.survey(error)
        self.checkpoints.settle(dead)
        done, source, state = recoveries.newest(self.end, written, lambda: self.checkpoints.newest(self.furthest))
        if done < self.began:
            raise with_reason(
                error, f"the checkpoint after {self.began} steps, which this run began from, is not there any more"
            )
        rebuilt = recoveries.rebuild()
        self.runner = self._new_runner()
        if source != "processes":
            self.end = None  # What the processes hold is no more that of the last step.
        if source == "memory":
            recoveries.copies.put_back()
        if isinstance(state, StepEnd):
            for name, held in state.states.items():
                self.runner.restore_state(name, held)
        elif state is not None:
            self.checkpoints.restore(state, self.runner)
        recoveries.synced(done)
        self._rewind(done)
        what, seconds = shortened(str(error)), time.perf_counter() - started
        self._recovered_from(
            Recovery(what=what, pools=rebuilt, failed_at=self.furthest, back_to=done, source=source, seconds=seconds)
        )
        return done

    def _recovered_from(self, recovery: Recovery) -> None:
        """Count it and say so."""
        self.recoveries.done.append(recovery)
        self.recovered_s.append(recovery.seconds)
        self.progress.recoveries = self.recoveries.summary()
        self.display.note(str(recovery))

    def _admit(self, error: WorkerLost) -> int:
        """Steps done, where the run may go on without what is lost; raises `error` where it may not."""
        self.recoveries.admit(error, self.furthest)
        return self.done

    def _rewind(self, done: int) -> None:
        """Take back what was said of steps that are run again."""
        self.writer.rewind(done)
        self.progress.evaluations = [one for one in self.progress.evaluations if one["step"] <= done]

    def _export(self) -> None:
        if not self.launch.run.output.save_model:
            return
        for role in self.session.model_roles:
            target = self.folder / "models" / role
            partial = target.with_name(f".{role}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.session.call_role(role, "export", self.launch.run.steps, folder=str(partial.resolve()))
            check_exported(partial, role)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            sync([target.parent])
            self.display.note(f"wrote {target}")
