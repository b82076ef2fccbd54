"""Ray Jobs: ship the recipe, start it on the cluster, follow its log, end as it ends.

    here                                     cluster
    submit_job  -- files, command ----->     rlhf-dist run ... ray.address=auto
    tail log    <-- websocket --------       its stdout and stderr
    poll status <-- every POLL_S ------      SUCCEEDED / FAILED / STOPPED
    stop_job    ---------------------->      SIGTERM, then the run's own clean-up

Every request is bounded by REQUEST_S; the log ends when the job does, and a lost connection is opened
again while the job lives. `files.py` says what travels; what has an absolute path is read on the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from controller.submission.job import OVER, Job, JobInfo, Status, SubmitError, note

REQUEST_S = 60.0
POLL_S = 1.0
STOP_S = 30.0
LOST_S = 120.0
"""Longest time without any answer of the cluster before the job is given up (it goes on there)."""
_STATUS: dict[str, Status] = {
    "PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "stopped",
}  # fmt: skip


class RayJobs:
    """The job server of a Ray cluster."""

    def __init__(self, address: str, wait_s: float | None = None) -> None:
        """address: of the dashboard, http://HOST:8265. wait_s: how long a job waits for slots to be free; None: it is
        sent at once where the cluster is large enough, and waits `ray.ready_timeout_s` there."""
        _use_token_if_given()
        self._address = address if "://" in address else f"http://{address}"
        self._wait_s = wait_s
        self._client = _connect(self._address)

    def submit(self, job: Job) -> str:
        """See Target."""
        self._wait_for_room(job)
        with tempfile.TemporaryDirectory(prefix="rlhf-dist-submit-") as folder:
            environment = _environment(job, Path(folder))
            return str(
                self._asked(
                    self._client.submit_job,
                    entrypoint=job.command_line("auto"),
                    runtime_env=environment,
                    metadata={"run": job.name, "recipe": job.recipe},
                )
            )

    def preview(self, job: Job) -> str:
        """See Target."""
        environment = _environment(job, None)
        lines = [f"address     {self._address}", f"entrypoint  {job.command_line('auto')}", f"files       {job.files}"]
        return "\n".join([*lines, f"runtime     {json.dumps(environment)}"])

    def jobs(self) -> list[JobInfo]:
        """See Target."""
        found = [_info(one) for one in self._asked(self._client.list_jobs) if "recipe" in (one.metadata or {})]
        return sorted(found, key=lambda one: one.started or float("inf"))

    def info(self, job: str) -> JobInfo:
        """See Target."""
        return _info(self._asked(self._client.get_job_info, job))

    def log(self, job: str, *, follow: bool) -> JobInfo:
        """See Target."""
        self.info(job)
        if follow:
            asyncio.run(_follow(self._client, job))
        else:
            sys.stdout.write(self._asked(self._client.get_job_logs, job))
            sys.stdout.flush()
        return self.info(job)

    def stop(self, job: str) -> JobInfo:
        """See Target."""
        self._asked(self._client.stop_job, job)
        deadline = time.monotonic() + STOP_S
        while (found := self.info(job)).status not in OVER and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if found.status in OVER:
            return found
        return replace(found, message=f"not over after {STOP_S:g} s; the cluster goes on stopping it")

    def _wait_for_room(self, job: Job) -> None:
        """Raises SubmitError where the slots can never be, or with `wait_s` are not, free."""
        kind, needed = ("GPU", job.slots) if job.gpus else ("CPU", job.slots + job.host_processes)
        deadline, said = time.monotonic() + (self._wait_s or 0.0), False
        while True:
            used, total = self._usage(kind)
            if total is None or total - used >= needed or (self._wait_s is None and total >= needed):
                return
            room = (
                f"{job.name} needs {needed} {kind}, the cluster at {self._address} has {total:g}, {total - used:g} free"
            )
            if total < needed:
                raise SubmitError(f"{room}; use fewer slots (placement.pools.*.slots), or add nodes first")
            if time.monotonic() >= deadline:
                raise SubmitError(f"{room} after {self._wait_s:g} s; wait longer (--wait SECONDS), or stop a job first")
            if not said:
                note(f"{room}; waiting up to {self._wait_s:g} s")
                said = True
            time.sleep(2 * POLL_S)

    def _usage(self, kind: str) -> tuple[float, float | None]:
        """Used, and there in all; None where the cluster does not say."""
        try:
            answer = self._client._do_request("GET", "/api/cluster_status")
            usage = answer.json()["data"]["clusterStatus"]["loadMetricsReport"]["usage"]
        except (KeyError, TypeError, ValueError, OSError):
            return 0.0, None
        used, total = usage.get(kind, (0.0, 0.0))
        return float(used), float(total) if usage else None

    def _asked(self, call: Any, *arguments: Any, **settings: Any) -> Any:
        return _asked(self._address, call, *arguments, **settings)


def _environment(job: Job, folder: Path | None) -> dict[str, Any]:
    """Ray's runtime environment, with a copy of the user's files in `folder` (None: only named)."""
    environment = dict[str, Any]()
    if job.travels:
        environment["working_dir"] = "(the files)" if folder is None else str(folder)
        if folder is not None:
            job.pack(folder)
    if job.pip:
        environment["pip"] = list(job.pip)
    if job.variables:
        environment["env_vars"] = dict(job.variables)
    return environment


def _info(details: Any) -> JobInfo:
    metadata = details.metadata or {}
    status = _STATUS[str(getattr(details.status, "value", details.status))]
    seconds = [None if at is None else at / 1000 for at in (details.start_time, details.end_time)]
    return JobInfo(
        id=details.submission_id or details.job_id,
        name=metadata.get("run", ""),
        recipe=metadata.get("recipe", ""),
        status=status,
        message="" if status in ("running", "succeeded") else " ".join((details.message or "").split()),
        started=seconds[0],
        ended=seconds[1],
    )


def _use_token_if_given() -> None:
    """Ray reads RAY_AUTH_MODE when it is imported; a token without a mode can only mean `token`."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _connect(address: str) -> Any:
    from ray.dashboard.modules.job.sdk import JobSubmissionClient

    class BoundedClient(JobSubmissionClient):
        """Ray's client with a limit on every request; its own waits for ever."""

        def _do_request(self, *arguments: Any, **settings: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": REQUEST_S, **settings})

    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(variable, None)  # Ray would prefer them to the address that was asked for.
    return _asked(address, BoundedClient, address)


def _asked(address: str, call: Any, *arguments: Any, **settings: Any) -> Any:
    """`call(...)`, with Ray's and the network's errors made into a SubmitError with the next step."""
    from ray.exceptions import AuthenticationError
    from requests.exceptions import RequestException

    try:
        return call(*arguments, **settings)
    except AuthenticationError as error:
        given = "was refused" if os.environ.get("RAY_AUTH_MODE") == "token" else "is missing"
        raise SubmitError(
            f"the cluster at {address} asks for a token and ours {given} ({str(error).splitlines()[0]}); "
            f"set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to its file"
        ) from error
    except (ConnectionError, RequestException) as error:
        raise SubmitError(
            f"no Ray dashboard answers at {address} ({type(error).__name__}); is the cluster up, and is this the "
            f"dashboard's address (http://HOST:8265)?"
        ) from error
    except RuntimeError as error:
        text = str(error)
        if "404" in text or "does not exist" in text:
            known = "`rlhf-dist jobs list` names those there are"
            raise SubmitError(f"the cluster at {address} has no job {arguments[0]!r}; {known}") from error
        raise SubmitError(f"the cluster at {address} refused: {text.strip().splitlines()[-1]}") from error


async def _follow(client: Any, job: str) -> None:
    """Copies the job's log to stdout until the job is over."""
    log = asyncio.create_task(_tail(client, job))
    answered = time.monotonic()
    try:
        while True:
            try:
                status = await asyncio.to_thread(client.get_job_status, job)
                answered = time.monotonic()
            except Exception as error:  # a cluster that restarts its dashboard answers again later
                if time.monotonic() - answered > LOST_S:
                    raise SubmitError(f"job {job}: no answer for {LOST_S:g} s ({error}); it may still run") from error
            else:
                if status.is_terminal():
                    await asyncio.wait([log], timeout=5.0)
                    return
            await asyncio.sleep(POLL_S)
    finally:
        log.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([log], timeout=1.0)


async def _tail(client: Any, job: str) -> None:
    """Writes the log as it grows. A connection that breaks is opened again, without repeating what was shown."""
    shown = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                if seen + len(text) > shown:
                    sys.stdout.write(text[max(0, shown - seen) :])
                    sys.stdout.flush()
                seen += len(text)
                shown = max(shown, seen)
            return
        except Exception:
            await asyncio.sleep(POLL_S)
