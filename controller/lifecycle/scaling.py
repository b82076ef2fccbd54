"""A run is asked to change the number of replicas of a pool that generates: `rlhf-dist scale RUN`.

    RUN/scale.json            what is asked, by the command; read at the end of a step, and taken away
    RUN/scale-ID.json         what came of it, by the run; the command shows it, and takes it away

Files, since a run may be on another host than who asks: its folder is what both reach.
"""

from __future__ import annotations

import json
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from controller.cluster.pool import ClusterError
from controller.lifecycle.folder_lock import owner_of
from controller.lifecycle.session import Session, pools_of_roles, team_of
from rlhf_dist.durable_files import write_durably
from rlhf_dist.placement.roles import pool_slots
from rlhf_dist.typed import unknown

ASKED = "scale.json"
LOOK_S = 0.2
"""Between two looks for what is asked, and for an answer."""


class NotScaled(ClusterError):
    """The run does not change the pool, and goes on as it is; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks of a run."""

    id: str
    pool: str
    replicas: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of it."""

    done: bool
    text: str


class Scaling:
    """The end of the run."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._looked_s = folder, float("-inf")
        self._request: Request | None = None
        (folder / ASKED).unlink(missing_ok=True)  # of an earlier run

    def look(self) -> Request | None:
        """What is asked, and has neither an answer yet nor been withdrawn."""
        now = time.monotonic()
        if self._request is not None or now - self._looked_s > LOOK_S:
            self._looked_s = now
            try:
                self._request = _read(self._folder / ASKED)
            except OSError:  # the disk does not answer just now: nothing says that it is withdrawn
                pass
        return self._request

    def answer(self, answer: Answer) -> None:
        """Say what came of it; the next may ask."""
        assert self._request is not None, "an answer has a question"
        write_durably(self._folder / f"scale-{self._request.id}.json", json.dumps(asdict(answer)))
        _take_away(self._folder / ASKED, self._request.id)
        self._request = None


def slots_for(session: Session, request: Request) -> int:
    """Slots of the pool with so many replicas. Raises NotScaled where it cannot have them."""
    launch, name = session.launch, request.pool
    pools = launch.run.placement.pools
    if name not in pools:
        raise NotScaled(f"--pool {name}: {unknown(name, pools, 'pool')}")
    team = team_of(launch, name)
    if not team:
        roles = ", ".join(role for role, pool in pools_of_roles(launch).items() if pool == name)
        raise NotScaled(
            f"pool {name!r} does more than generate ({roles}), and keeps its size while the run goes; only a pool of "
            f"placement.rollout grows and shrinks"
        )
    if pools[name].nodes:
        raise NotScaled(f"pool {name!r} spans placement.pools.{name}.nodes={pools[name].nodes}, and keeps its size")
    if request.replicas < 1:
        raise NotScaled(f"pool {name!r} needs at least one replica, got {request.replicas}")
    if request.replicas * team == pool_slots(launch.run.placement, name):
        raise NotScaled(f"pool {name!r} has {request.replicas} replicas already")
    return request.replicas * team


def ask(folder: Path, pool: str, replicas: int, wait_s: float) -> Answer:
    """Ask the run in this folder, and wait for what comes of it. Raises NotScaled where no run is there, another
    request waits, or nothing comes within `wait_s`."""
    state, _ = owner_of(folder) if folder.is_dir() else ("free", "")
    if state not in ("live", "watch"):
        raise NotScaled(f"{folder} has no run under way; name the folder of one, e.g. runs/grpo")
    path, request = folder / ASKED, Request(id=secrets.token_hex(4), pool=pool, replicas=replicas)
    if path.exists():
        raise NotScaled(f"{folder} has been asked already, and answers at the end of a step: {path.read_text()}")
    write_durably(path, json.dumps(asdict(request)))
    answered, deadline = folder / f"scale-{request.id}.json", time.monotonic() + wait_s
    try:
        while not answered.exists():
            if time.monotonic() > deadline:
                raise NotScaled(f"no answer within {wait_s:g} s; a run answers at the end of a step (--wait SECONDS)")
            if owner_of(folder)[0] not in ("live", "watch"):
                raise NotScaled(f"the run in {folder} ended before it answered")
            time.sleep(LOOK_S)
        return Answer(**json.loads(answered.read_text()))
    finally:
        _take_away(path, request.id)
        answered.unlink(missing_ok=True)


def _read(path: Path) -> Request | None:
    """The request in this file; None where there is none, or something else. Raises OSError where nobody knows."""
    try:
        return Request(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _take_away(path: Path, id: str) -> None:
    """Remove the file while it holds this request: somebody else may have asked since."""
    with suppress(OSError):
        found = _read(path)
        if found is not None and found.id == id:
            path.unlink(missing_ok=True)
