"""A run as a Ray job: ship the recipe, start it on the cluster, follow its log, end as it ends.

    here                                     cluster
    submit_job  -- files, command ----->     rlhf-dist run ... ray.address=auto
    tail log    <-- websocket --------       its stdout and stderr
    poll status <-- every POLL_S ------      SUCCEEDED / FAILED / STOPPED  -> exit code
    Ctrl-C      -- stop_job ---------->      SIGTERM, then the run's own clean-up

Every request is bounded by REQUEST_S; the log ends when the job does, and a lost connection is opened
again while the job lives. `job_files.py` says what travels; what has an absolute path is read on the cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controller.commands.job_files import JobFiles, job_files
from controller.commands.registry import Commands, users_mistakes

if TYPE_CHECKING:
    from rlhf_dist.compose import Launch

REQUEST_S = 60.0
POLL_S = 1.0
STOP_S = 30.0
SETTINGS = "rlhf-dist-settings.yaml"
"""Name under which the --config file travels."""
LOST_S = 120.0
"""Longest time without any answer of the cluster before the job is given up (it goes on there)."""


class SubmitError(RuntimeError):
    """The job could not be sent, or was lost; the message says what to do."""


def register(commands: Commands) -> None:
    """`submit`."""
    submit = commands.add(
        "submit", submit_command, "run a recipe as a Ray job and follow its log",
        "submit path/to/mine.py --address http://head:8265 model.path=/models/llama", launch=True,
    )  # fmt: skip
    submit.add_argument("--address", required=True, metavar="URL", help="the cluster's dashboard, http://HOST:8265")


def submit_command(arguments: argparse.Namespace) -> int:
    """Send and follow the job. Raises UserError before anything is sent, and SubmitError."""
    from rlhf_dist.planner.launch import compose_planned

    with users_mistakes():
        launch = compose_planned(arguments.recipe, arguments.overrides, arguments.config)
    return submit(launch, arguments.recipe, arguments.overrides, arguments.address, arguments.config)


def submit(launch: Launch, spec: str, overrides: Sequence[str], address: str, config: str | None = None) -> int:
    """Run recipe `spec` on the cluster whose dashboard is at `address`; returns 0 if the job succeeded, else 1.

    config: a file of settings, which travels too.
    Raises SubmitError if the cluster cannot be reached or refuses the token, ConfigError for what cannot travel.
    """
    taken = job_files(spec, launch.yaml, overrides, Path.cwd())
    if taken.files:
        _note(f"sending {taken}")
    _use_token_if_given()
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="rlhf-dist-submit-") as folder:
        entrypoint, runtime_env = _package(taken, overrides, Path(folder), config)
        _note(f"job entrypoint: {entrypoint}")
        if not Path(launch.run.output.root).is_absolute():
            _note(
                f"output.root={launch.run.output.root} is relative: the run's files stay in the job's working folder "
                f"on the head node; set output.root to a shared absolute path to keep them"
            )
        job = _asked(
            address,
            client.submit_job,
            entrypoint=entrypoint,
            runtime_env=runtime_env,
            metadata={"run": launch.run.name, "recipe": launch.recipe.name},
        )
    _note(f"job {job} sent to {address}")
    try:
        status = asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        _stop(client, job)
        raise
    details = _asked(address, client.get_job_info, job)
    _note(
        f"job {job}: {status.lower()}" + (f" ({details.message})" if status != "SUCCEEDED" and details.message else "")
    )
    return 0 if status == "SUCCEEDED" else 1


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
    if "://" not in address:
        address = f"http://{address}"
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
        raise SubmitError(f"the cluster at {address} refused: {error}") from error


def _package(
    taken: JobFiles, overrides: Sequence[str], folder: Path, config: str | None = None
) -> tuple[str, dict[str, Any]]:
    """The job's command, and the runtime environment with a copy of the user's files in `folder`."""
    runtime_env = dict[str, Any]()
    for path, file in taken.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / path)
        runtime_env["working_dir"] = str(folder)
    options: list[str] = []
    if config is not None:
        shutil.copy(Path(config).expanduser(), folder / SETTINGS)
        runtime_env["working_dir"], options = str(folder), ["--config", SETTINGS]
    if not any(override.lstrip("+").startswith("ray.address=") for override in overrides):
        overrides = [*overrides, "ray.address=auto"]
    return shlex.join(["rlhf-dist", "run", taken.spec, *options, *overrides]), runtime_env


async def _follow(client: Any, job: str) -> str:
    """Copies the job's log to stdout until the job is over; returns its status."""
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
                    return str(status.value)
            await asyncio.sleep(POLL_S)
    finally:
        log.cancel()
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


def _stop(client: Any, job: str) -> None:
    _note(f"stopping job {job}")
    try:
        client.stop_job(job)
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline:
            if client.get_job_status(job).is_terminal():
                return
            time.sleep(POLL_S)
        _note(f"job {job} has not ended after {STOP_S:g} s; the cluster goes on stopping it")
    except Exception as error:
        _note(f"could not stop job {job}: {error}; stop it with `ray job stop {job}`")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
