"""The roles and states that a recipe handles: their ops record nodes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, cast

from rlhf_dist.dataflow.generation_calls import generation_settings
from rlhf_dist.dataflow.graph import GraphError
from rlhf_dist.dataflow.op_settings import (
    check_heads,
    check_loss,
    check_settings,
    defaults,
    terms_of,
)
from rlhf_dist.dataflow.state_value import value_of
from rlhf_dist.dataflow.traced_batch import TracedBatch
from rlhf_dist.dataflow.tracer import Tracer
from rlhf_dist.dataflow.weight_ops import WeightRole, record_weights
from rlhf_dist.roles import OpSpec, State, ops_of
from rlhf_dist.weights import WeightOp, weight_ops_of


class RoleHandle:
    """A role in a recipe: its ops record nodes."""

    def __init__(self, tracer: Tracer, role: str, interface: type) -> None:
        self._tracer, self._role, self._interface = tracer, role, interface
        self._ops, self._weight_ops = ops_of(interface), weight_ops_of(interface)

    def weight_role(self) -> WeightRole:
        """This role, for another one that takes its weights."""
        return WeightRole(self._role, self._interface)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._weight_ops:
            return self._weights_call(self._weight_ops[name])
        if name not in self._ops:
            near = difflib.get_close_matches(name, [*self._ops, *self._weight_ops], n=1)
            raise GraphError(
                f"{self._tracer.line()}: {self._interface.__name__} {self._role!r} has no op {name!r}; "
                f"it has {', '.join(self._ops)}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        spec = self._ops[name]

        def call(batch: TracedBatch, **kwargs: Any) -> TracedBatch:
            return self._call(spec, batch, kwargs)

        return call

    def _weights_call(self, spec: WeightOp) -> Callable[..., None]:
        def call(*given: Any, **kwargs: Any) -> None:
            record_weights(self._tracer, self.weight_role(), spec, given, kwargs)

        return call

    def _call(self, spec: OpSpec, batch: TracedBatch, kwargs: dict[str, Any]) -> TracedBatch:
        where, line = f"{self._role}.{spec.name}", self._tracer.line()
        function = getattr(self._interface, spec.name)
        if isinstance(batch, list | tuple):
            return self._update(spec, where, terms_of(line, where, function, batch, kwargs, TracedBatch), kwargs)
        if not isinstance(batch, TracedBatch):
            raise GraphError(f"{line}: {where} takes a batch first, got {type(batch).__name__}")
        check_settings(line, where, function, kwargs)
        settings = {**defaults(function), **kwargs}
        if "loss" in settings:
            self._check_loss(spec, where, settings["loss"])
        check_heads(line, where, settings, self._interface)
        settings, lenders = generation_settings(line, where, batch, settings)
        return self._record(spec, where, [(batch, self._reads(spec, batch, settings))], settings, lenders)

    def _update(
        self, spec: OpSpec, where: str, terms: list[tuple[TracedBatch, Any, Any]], kwargs: dict[str, Any]
    ) -> TracedBatch:
        line, function = self._tracer.line(), getattr(self._interface, spec.name)
        settings = {**defaults(function), **kwargs}
        batches = []
        for batch, loss, _ in terms:
            check_settings(line, where, function, {**kwargs, "loss": loss})
            self._check_loss(spec, where, loss)
            batches.append((batch, self._reads(spec, batch, {**settings, "loss": loss})))
        return self._record(spec, where, batches, {**settings, "terms": tuple((loss, w) for _, loss, w in terms)})

    def _check_loss(self, spec: OpSpec, where: str, loss: Any) -> None:
        teachers = [role for role, kind in self._tracer.recipe.roles.items() if hasattr(kind, "compute_top_k")]
        check_loss(self._tracer.line(), where, loss, spec.outputs, getattr(self._interface, "heads", ()), teachers)

    def _reads(self, spec: OpSpec, batch: TracedBatch, settings: Mapping[str, Any]) -> tuple[str, ...]:
        more = dict.fromkeys((*spec.optional, *self._tracer.recipe.reads.get(self._role, ())))
        needed = spec.columns(spec.reads, settings)
        return (*needed, *(name for name in more if name in batch.origins and name not in needed))

    def _record(
        self,
        spec: OpSpec,
        where: str,
        batches: list[tuple[TracedBatch, tuple[str, ...]]],
        settings: Mapping[str, Any],
        lenders: tuple[str, ...] = (),
    ) -> TracedBatch:
        """lenders: other roles whose generation weights it reads."""
        return batches[0][0]._record(
            name=where,
            role=self._role,
            op=spec.name,
            kind="op",
            batches=batches,
            writes=spec.columns(spec.writes, settings),
            rows=spec.rows,
            kwargs=settings,
            spec=spec,
            weights_read=tuple(f"{role}.{spec.weights_read}" for role in (self._role, *lenders) if spec.weights_read),
            weights_written=(f"{self._role}.{spec.weights_written}",) if spec.weights_written else (),
            names=spec.names,
        )


class StateHandle:
    """A `State` in a recipe: `value(key)` for a number, its `state_op` methods."""

    def __init__(self, tracer: Tracer, role: str, kind: type[State], cfg: Any) -> None:
        self._tracer, self._role, self._kind = tracer, role, kind
        self._ops = ops_of(kind)
        try:
            initial = kind().initial(cfg)
            self._first: dict[str, float] = {key: one for key, one in initial.items() if isinstance(one, int | float)}
        except Exception as error:  # the user's own code
            raise GraphError(
                f"{tracer.recipe.file.name}: {kind.__name__}.initial, which gives {role!r} its numbers at the start, "
                f"raised {type(error).__name__}: {error}"
            ) from error

    def value(self, key: str) -> float:
        """Stands for the number `key` wherever an op takes one, in a loss too; see `state_value.py`."""
        if key not in self._first:
            near = difflib.get_close_matches(str(key), self._first, n=1)
            raise GraphError(
                f"{self._tracer.line()}: {self._kind.__name__} {self._role!r} starts without a number {key!r}; it has "
                f"{', '.join(self._first) or 'none'}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        return cast(float, value_of(self._role, key, self._first[key], self._tracer.line))

    def __getattr__(self, name: str) -> Callable[..., TracedBatch]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._ops:
            near = difflib.get_close_matches(name, self._ops, n=1)
            raise GraphError(
                f"{self._tracer.line()}: {self._kind.__name__} {self._role!r} has no op {name!r}; it has "
                f"{', '.join(self._ops) or 'none'}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        spec = self._ops[name]

        def call(*batches: TracedBatch, **kwargs: Any) -> TracedBatch:
            return self._call(spec, batches, kwargs)

        return call

    def _call(self, spec: OpSpec, batches: tuple[TracedBatch, ...], kwargs: dict[str, Any]) -> TracedBatch:
        where, line = f"{self._role}.{spec.name}", self._tracer.line()
        takes = 0 if spec.rows == "new" else 1
        if len(batches) != takes or not all(isinstance(batch, TracedBatch) for batch in batches):
            got = ", ".join(type(one).__name__ for one in batches) or "none"
            raise GraphError(f"{line}: {where} takes {'one batch' if takes else 'no batch'} first, got {got}")
        function = getattr(self._kind, spec.name)
        check_settings(line, where, function, kwargs)
        settings = {**defaults(function), **kwargs}
        batch = batches[0] if batches else TracedBatch(self._tracer, "", {})
        return batch._record(
            name=where,
            role=self._role,
            op=spec.name,
            kind="state",
            batches=[(batch, spec.columns(spec.reads, settings))] if batches else [],
            writes=spec.columns(spec.writes, settings),
            rows=spec.rows,
            kwargs=settings,
            spec=spec,
            weights_read=(f"{self._role}.state",),
            weights_written=(f"{self._role}.state",),
        )
