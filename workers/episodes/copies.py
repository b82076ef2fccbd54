"""Ranks that share a copy of the model: the first one plays episodes, the others do with the engines what it does.

    first rank     engine.add, abort ──> kept ──┐ told, before each step of an engine
                   engine.step ─────────────────┤
    the others                                  └──> add, abort, step

One broadcast a step, of a list that is mostly empty. The others wait for it as long as tools take, at most for the
time limit of the copy's process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, TypeAlias, cast

from workers.engines.generation.interface import GenerationEngine, Request, Response

Told: TypeAlias = list[tuple[int, Literal["add", "abort", "step"], Any]]
"""What is done, in this order: the engine's place, and the request, the name of one, or nothing."""


class Copy:
    """Engines that episodes ask, on one of the ranks of the copy. A context: the others are told when it ends."""

    def __init__(self, engines: Sequence[GenerationEngine]) -> None:
        """engines: alike on all ranks; one of several ranks may stand beside some that each rank has for itself."""
        self.engines = list({id(engine): engine for engine in engines}.values())
        self._link = max(self.engines, key=lambda engine: engine.ranks_of_copy[1])
        rank, self._ranks = self._link.ranks_of_copy
        self.leads = rank == 0
        """Whether this rank plays: with the engines of `of`. The others `follow`."""
        self._kept: Told = []
        self._stepping = False
        self._led = {id(engine): _Led(self, place) for place, engine in enumerate(self.engines)}

    def of(self, engine: GenerationEngine) -> GenerationEngine:
        """The engine as episodes are to ask it: the others hear of it."""
        return engine if self._ranks == 1 else cast(GenerationEngine, self._led[id(engine)])

    def keep(self, what: Told) -> None:
        """To be told before the next step."""
        self._kept += what

    def step(self, place: int) -> list[tuple[str, Response]]:
        """Tell, and step."""
        self._tell([*self._kept, (place, "step", None)])
        self._stepping = True
        done = self.engines[place].step()
        self._stepping = False
        return done

    def follow(self) -> None:
        """Do what the first rank does, until it is done."""
        while (told := self._told(None)) is not None:
            for place, what, given in told:
                engine = self.engines[place]
                if what == "step":
                    engine.step()
                elif what == "add":
                    engine.add(given)
                else:
                    engine.abort(given)

    def __enter__(self) -> Copy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ranks > 1 and self.leads and not self._stepping:  # a step that fails fails on all
            self._tell(self._kept)
            self._tell(None)

    def _tell(self, what: Told | None) -> None:
        self._kept = []
        self._told(what)

    def _told(self, what: Told | None) -> Told | None:
        (told,) = self._link.told([what])
        return told


class _Led:
    """An engine of the first rank."""

    def __init__(self, copy: Copy, place: int) -> None:
        self._copy, self._place, self._engine = copy, place, copy.engines[place]

    def add(self, request: Request) -> None:
        """See GenerationEngine; what it refuses the others do not hear of."""
        self._engine.add(request)
        self._copy.keep([(self._place, "add", request)])

    def step(self) -> list[tuple[str, Response]]:
        """See GenerationEngine."""
        return self._copy.step(self._place)

    def abort(self, name: str) -> Response:
        """See GenerationEngine."""
        self._copy.keep([(self._place, "abort", name)])
        return self._engine.abort(name)
