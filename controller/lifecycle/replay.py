"""One node of a step again, from the rows that the run kept: in this process, as `--local` runs are.

    runs/NAME/config.yaml ──> launch      inputs/step_3/NODE ──> rows      checkpoints/step_3 ──> weights
                                 └─ the recipe is called, line by line: nodes before NODE are passed over,
                                    but for those of the step that changed the weights it uses; then NODE runs
    its outputs and metrics ──> compared with what the run kept of them

Rows that several ranks had are one batch here, in the order of the whole, and the one rank holds the whole model: what
it computes of a row or a batch is what they computed, to rounding (`replayed.py`). Shards of host ops stay apart.
`fetch` in the recipe gives what the run kept of the step.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from controller.cluster.failure_text import explained
from controller.cluster.local import POOL, Local, local_launch
from controller.cluster.pool import ClusterError, Pool
from controller.execution.failed_calls import NodeError
from controller.execution.ray_runner import metrics_of
from controller.execution.worker_group import build_call
from controller.lifecycle.checkpoint import load_checkpoint
from controller.lifecycle.replay_weights import Weights, roles_of, weights_of, writers_before
from controller.lifecycle.replayed import Replayed, dtypes_of, rounding_of
from controller.lifecycle.run_folder import is_run, recipe_of
from controller.lifecycle.session import Session, pools_of_roles
from controller.record import graph_file
from controller.record.metrics import read_metrics
from rlhf_dist.batch import Batch
from rlhf_dist.compose import Launch
from rlhf_dist.data.of_launch import with_steps_of_epochs
from rlhf_dist.dataflow.graph import Node
from rlhf_dist.dataflow.state_value import resolved
from rlhf_dist.dataflow.trace import rehearsal, run_traced
from rlhf_dist.failure import Failure
from rlhf_dist.metrics import combine
from rlhf_dist.placement.roles import HOST_POOL
from rlhf_dist.planner.launch import compose_planned
from rlhf_dist.saved_calls import STATE, SavedCall, SavedRows, read_calls, saved_steps, step_folder, together
from rlhf_dist.typed import ConfigError, unknown
from rlhf_dist.wire import Fetch, Given, HeldState, Reply


class _Over(BaseException):
    """The node has run: the rest of the recipe is not called."""


def replay(folder: Path, step: int, node: str, overrides: Sequence[str] = (), weights: str | None = None) -> Replayed:
    """Run `node` of `step` again. weights: `start` or `step_N`; None: exactly those that it ran with.

    Raises ConfigError for what is not there, NodeError for a node that fails again.
    """
    calls = _saved(folder, step, node)
    launch = _launch(folder, overrides)
    found = next((one for one in launch.dataflow if one.name == node), None)
    if found is None:
        raise ConfigError(unknown(node, [one.name for one in launch.dataflow], "node"))
    before = writers_before(launch, found, step)
    saved = {node: calls} | {one.name: read_calls(step_folder(folder, step), one.name) for one in before}
    from_ = weights_of(folder, launch, [*before, found], step, saved, weights)
    with Local(launch.run.ray.call_timeout_s) as cluster:
        session = _session(launch, cluster, [*before, found])
        return _Replay(folder, launch, session, step, saved, from_).run([*before, found])


# --- what is there ---------------------------------------------------------------------------------------
def _saved(folder: Path, step: int, node: str) -> list[SavedCall]:
    if not is_run(folder):
        raise ConfigError(f"{folder} is not the folder of a run; give one, e.g. runs/ppo")
    steps = saved_steps(folder)
    if not steps:
        raise ConfigError(
            f"{folder} has no inputs of nodes; a run keeps those of calls that fail, and with output.inputs_every=K "
            "those of every K steps"
        )
    if step not in steps:
        raise ConfigError(f"{folder} has no inputs of step {step}; it has those of step {', '.join(map(str, steps))}")
    if node not in steps[step]:
        near = difflib.get_close_matches(node, steps[step], n=1)
        meant = f", did you mean {near[0]}?" if near else ";"
        raise ConfigError(f"step {step} has no inputs of {node}{meant} there are those of {', '.join(steps[step])}")
    return read_calls(step_folder(folder, step), node)


def _launch(folder: Path, overrides: Sequence[str]) -> Launch:
    """Of the run, in this process; what it writes goes to runs/NAME/replay."""
    with rehearsal():
        made = with_steps_of_epochs(compose_planned(recipe_of(folder), overrides, str(folder / "config.yaml")))
    made = local_launch(replace(made, roles={role: _on_one_rank(one) for role, one in made.roles.items()}), overrides)
    output = replace(made.run.output, root=str(folder))
    return replace(made, run=replace(made.run, name="replay", output=output))


def _on_one_rank(config: Any) -> Any:
    """The settings of a role whose whole model is held by one rank."""
    parts = {"engine": ("sequence_parallel", "tensor_parallel", "replicas"), "rollout": ("tensor_parallel",)}
    cut = [one.name for one in fields(config) if one.name in parts]
    return replace(config, **{name: replace(getattr(config, name), **dict.fromkeys(parts[name], 1)) for name in cut})


def _session(launch: Launch, cluster: Local, nodes: Sequence[Node]) -> Session:
    roles = roles_of(launch, nodes)
    sources = {one.role for one in nodes if one.kind == "source"}
    states = {name: kind() for name, kind in launch.recipe.states.items()}
    session = Session(launch, cluster, {}, states, only=roles | sources)
    placed = pools_of_roles(launch)
    pools = {HOST_POOL, *(placed[role] for role in roles)}
    session.start([name for name in (HOST_POOL, POOL) if name in pools], lambda text: None)
    return session


# --- the run ---------------------------------------------------------------------------------------------
class _Replay:
    def __init__(
        self,
        folder: Path,
        launch: Launch,
        session: Session,
        step: int,
        saved: Mapping[str, Sequence[SavedCall]],
        weights: Weights,
    ) -> None:
        self.folder, self.launch, self.session, self.step = folder, launch, session, step
        self.saved, self.weights = saved, weights

    def run(self, nodes: Sequence[Node]) -> Replayed:
        """The last of `nodes`, after the others."""
        self._restore()
        left, replies = list(nodes), list[Reply]()

        def execute(node: Node) -> None:
            """The recipe has come to `node`."""
            while any(one.name == node.name for one in left):
                replies[:] = self._execute(left.pop(0))
            if not left:
                raise _Over

        try:
            refilled = self.launch.dataflow.refilled
            run_traced(self.launch.recipe, self.launch.algorithm, execute, self._fetch, refilled)
            while left:  # what a pass put into the graph has no line in the recipe
                replies[:] = self._execute(left.pop(0))
        except _Over:
            pass
        return self._compared(nodes[-1], replies)

    def _restore(self) -> None:
        session, checkpoint = self.session, self.weights.checkpoint
        learned = [role for role in self.launch.learning_roles if role in session.groups]
        if checkpoint is not None:
            load_checkpoint(
                checkpoint,
                roles=learned,
                load_role=lambda role, path: session.call_role(role, "load", checkpoint.step, folder=path),
            )
        session.sync(0 if checkpoint is None else checkpoint.step)

    def _calls(self, node: Node) -> list[SavedCall]:
        calls = list(self.saved[node.name])
        if not calls:
            return [SavedCall(step=self.step, node=node.name)]
        apart = node.kind in ("host", "state") or any(call.streamed for call in calls)
        return calls if apart else [together(calls)]

    def _execute(self, node: Node) -> list[Reply]:
        return [self._call(node, call) for call in self._calls(node)]

    def _call(self, node: Node, saved: SavedCall) -> Reply:
        host: Pool = self.session.cluster.pools[HOST_POOL]
        settings = dict(saved.given) if node.kind == "source" else resolved(node.kwargs, saved.numbers)
        given = [_given(rows) for rows in saved.batches]
        call = build_call(node, self.step, self.launch.run.seed, given, settings)
        if node.kind == "host":
            done = host.processes[0].run_host_op.remote(node.spec, call)
        elif node.kind == "state":
            held = self._held(node, saved, host)
            done = host.processes[0].run_state_op.remote(self.session.states[node.role], node.op, held, call)
        else:
            process = self.session.groups[node.role].pool.processes[0]
            done = process.call.remote(node.role, node.op, call)
        (reply,) = self.session.cluster.replies.get([done], 0.0)
        if isinstance(reply, Failure):
            raise NodeError(f"{node.name} (step {self.step}, {node.line}) failed: {explained(reply, None)}")
        assert isinstance(reply, Reply), "a local process answers or says what failed"
        return reply

    def _held(self, node: Node, saved: SavedCall, host: Pool) -> HeldState:
        numbers = saved.numbers.get(node.role, {})
        if saved.folder is None or not (saved.folder / STATE).is_dir():
            raise ConfigError(f"the values of {node.role} before {node.name} were not kept; save the step again")
        (held,) = self.session.cluster.replies.get(
            [host.processes[0].load_state.remote(str(saved.folder / STATE))], 0.0
        )
        if isinstance(held, Failure):
            raise ClusterError(f"{saved.folder / STATE} cannot be read: {held.text}")
        assert isinstance(held, HeldState), "it is what load_state gives"
        return HeldState(numbers or held.numbers, held.ref)

    def _fetch(self, node: str, column: str) -> Any:
        """What the run kept of the column that `node` wrote at this step."""
        calls = self.saved.get(node) or read_calls(step_folder(self.folder, self.step), node)
        written = together(calls).outputs if calls else None
        if written is not None and column in written:
            return written[column].rows()
        for name, saved in self.saved.items():
            reads = next((one.inputs for one in self.launch.dataflow if one.name == name), ())
            for entry, rows in zip(reads, together(saved).batches if saved else (), strict=False):
                for seen, origin in entry.columns.items():
                    if (origin.node, origin.column) == (node, column) and seen in rows.columns:
                        return rows.columns[seen].rows()
        raise ConfigError(
            f"{column} of {node} was not kept of step {self.step}; output.inputs_every keeps what every node wrote"
        )

    def _compared(self, node: Node, replies: Sequence[Reply]) -> Replayed:
        calls = self._calls(node)
        written = [
            Batch({name: columns[name] for names, columns in reply.stored for name in names}, reply.num_rows)
            for reply in replies
        ]
        outputs = Batch.concat(written) if len(written) != 1 else written[0]
        kept = [call.outputs for call in calls if call.outputs is not None]
        recorded = Batch.concat(kept) if len(kept) == len(written) and kept else None
        prefix = metrics_of(node)
        metrics = {f"{prefix}/{name}": one.value for name, one in combine(r.metrics for r in replies).items()}
        return Replayed(
            node=node.name,
            step=self.step,
            line=node.line,
            weights=self.weights.about,
            rows=sum(rows.columns.num_rows for call in calls for rows in call.batches[:1]),
            of_rows=next((call.of_rows for call in calls), None),
            parts=len(self.saved[node.name]),
            rounding=rounding_of(dtypes_of(self.launch, node)),
            failure="; ".join(dict.fromkeys(call.failure for call in calls if call.failure)),
            outputs=outputs,
            recorded=recorded,
            metrics=metrics,
            recorded_metrics=self._recorded_metrics(node),
        )

    def _recorded_metrics(self, node: Node) -> dict[str, Any]:
        """Those of the step that this node told, not one of the same name."""
        rows = [row for row in read_metrics(self.folder) if row["step"] == self.step and "kind" not in row]
        file = self.folder / graph_file.NAME
        told = json.loads(file.read_text(encoding="utf-8")).get("metrics", {}) if file.is_file() else {}
        return {name: value for row in rows[-1:] for name, value in row.items() if told.get(name) == node.name}


def _given(rows: SavedRows) -> Given:
    """A call's rows, which lie in one object of this process."""
    count = rows.columns.num_rows
    fetch = Fetch(
        names={name: (name,) for name in rows.columns},
        refs=(rows.columns,),
        object_of=np.zeros(count, np.int32),
        row_of=np.arange(count, dtype=np.int32),
    )
    return Given(
        num_rows=count,
        fetches=(fetch,) if rows.columns.keys() else (),
        row_index=rows.row_index,
        mini_batch=rows.mini_batch,
    )
