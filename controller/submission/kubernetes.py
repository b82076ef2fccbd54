"""KubeRay: a `RayJob` manifest, applied with kubectl.

The operator makes the Ray cluster, runs the command on it and takes the cluster down again. The command and the user's
files travel in a ConfigMap, which holds at most 1 MiB; larger ones belong into the image or on a volume.

    RayJob.spec.entrypoint   bash /job/run.sh       the operator puts it into a shell script of its own, and `ray job
    ConfigMap                run.sh, files.tar      submit` into another: quotes and dollar signs would not survive
"""

from __future__ import annotations

import base64
import io
import json
import re
import secrets
import subprocess
import tarfile
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from controller.submission.job import OVER, Job, JobInfo, Status, SubmitError

COMMAND_S = 60.0
MOST_BYTES = 1_000_000
"""Of a ConfigMap."""
FILES = "/job"
SCRIPT, PACKED = "run.sh", "files.tar"
LABEL = "rlhf-dist/run"
NAME_CHARACTERS, LABEL_CHARACTERS = 47, 63
"""Most that the operator takes for a RayJob, and Kubernetes for a label."""
_STATUS: dict[str, Status] = {
    "": "waiting", "PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "succeeded", "FAILED": "failed",
    "STOPPED": "stopped",
}  # fmt: skip
_NEVER_RAN = ("Failed", "ValidationFailed")
"""Deployment status of a job that Ray may know nothing of: its manifest was refused, no submitter came, time was up."""


class RayJobManifests:
    """The cluster that kubectl is set up for."""

    def __init__(self, image: str, gpus_per_node: int | None) -> None:
        self._image, self._gpus = image, gpus_per_node

    def submit(self, job: Job) -> str:
        """See Target."""
        documents = self.documents(job)
        _kubectl("apply", "-f", "-", given=yaml.safe_dump_all(documents, sort_keys=False))
        return str(documents[-1]["metadata"]["name"])

    def preview(self, job: Job) -> str:
        """See Target: YAML that `kubectl apply -f -` takes."""
        return str(yaml.safe_dump_all(self.documents(job), sort_keys=False)).rstrip()

    def documents(self, job: Job) -> list[dict[str, Any]]:
        """ConfigMap and RayJob."""
        unique = f"-{secrets.token_hex(3)}"
        name = _label(job.name, NAME_CHARACTERS - len(unique)) + unique
        labels = {
            "app.kubernetes.io/managed-by": "rlhf-dist",
            LABEL: _plain(job.name, LABEL_CHARACTERS),
            "rlhf-dist/recipe": _plain(job.recipe, LABEL_CHARACTERS),
        }
        cluster: dict[str, Any] = {
            "headGroupSpec": {"rayStartParams": {}, "template": self._pod(job, name, "ray-head")}
        }
        if (others := job.nodes - 1) > 0:
            workers = {"groupName": "nodes", "replicas": others, "minReplicas": others, "maxReplicas": others}
            template = self._pod(job, name, "ray-worker")
            cluster["workerGroupSpecs"] = [{**workers, "rayStartParams": {}, "template": template}]
        spec = {
            "entrypoint": f"bash {FILES}/{SCRIPT}",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "submissionMode": "K8sJobMode",
            "rayClusterSpec": cluster,
        }
        return [
            self._files(job, name, labels),
            {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name, "labels": labels}, "spec": spec},
        ]

    def jobs(self) -> list[JobInfo]:
        """See Target."""
        shown = json.loads(_kubectl("get", "rayjobs", "-l", "app.kubernetes.io/managed-by=rlhf-dist", "-o", "json"))
        return [_info(one) for one in shown["items"]]

    def info(self, job: str) -> JobInfo:
        """See Target."""
        return _info(json.loads(_kubectl("get", "rayjob", job, "-o", "json")))

    def log(self, job: str, *, follow: bool) -> JobInfo:
        """See Target: of the pod that submitted it."""
        self.info(job)
        command = ["kubectl", "logs", *(["-f"] if follow else []), f"job/{job}"]
        code = subprocess.run(command, check=False, timeout=None if follow else COMMAND_S).returncode
        if code:
            raise SubmitError(f"`{' '.join(command)}` ended with code {code}; is the job's pod up yet?")
        return self.info(job)

    def stop(self, job: str) -> JobInfo:
        """See Target: its cluster goes with it."""
        found = self.info(job)
        _kubectl("delete", "rayjob", job)
        _kubectl("delete", "configmap", job, "--ignore-not-found")
        return found

    def _pod(self, job: Job, name: str, container: str) -> dict[str, Any]:
        cpus = job.slots + job.host_processes if not job.gpus else None
        limits = {"nvidia.com/gpu": self._gpus} if self._gpus else {"cpu": max(2, -(-(cpus or 2) // job.nodes) + 1)}
        holds: dict[str, Any] = {
            "name": container,
            "image": self._image,
            "resources": {"limits": limits, "requests": dict(limits)},
            "env": [{"name": key, "value": value} for key, value in job.variables.items()],
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "files", "mountPath": FILES}],
        }
        volumes = [
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "files", "configMap": {"name": name}},
        ]
        return {"spec": {"containers": [holds], "volumes": volumes}}

    def _files(self, job: Job, name: str, labels: dict[str, str]) -> dict[str, Any]:
        made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels}}
        unpack = f"python3 -m tarfile -e {FILES}/{PACKED} .\n" if job.travels else ""
        script = f"set -e\n{unpack}exec {job.command_line('auto')}\n"
        if not job.travels:
            return {**made, "data": {SCRIPT: script}}
        packed = io.BytesIO()
        with (
            tempfile.TemporaryDirectory(prefix="rlhf-dist-submit-") as place,
            tarfile.open(fileobj=packed, mode="w") as tar,
        ):
            job.pack(Path(place))
            tar.add(place, arcname=".")
        if (size := packed.tell()) > MOST_BYTES:
            raise SubmitError(
                f"the job's files have {size:,} bytes and a ConfigMap holds {MOST_BYTES:,}; put data and models on a "
                "volume (absolute paths), name what is not needed in a .rayignore file, or build them into the image"
            )
        encoded = base64.b64encode(packed.getvalue()).decode()
        return {**made, "data": {SCRIPT: script}, "binaryData": {PACKED: encoded}}


def _info(found: dict[str, Any]) -> JobInfo:
    status, labels = found.get("status", {}), found["metadata"].get("labels", {})
    said = _STATUS.get(status.get("jobStatus", ""), "waiting")
    if said not in OVER and status.get("jobDeploymentStatus") in _NEVER_RAN:
        said = "failed"
    words = [status.get("reason", ""), " ".join(status.get("message", "").split())]
    return JobInfo(
        id=found["metadata"]["name"],
        name=labels.get(LABEL, ""),
        recipe=labels.get("rlhf-dist/recipe", ""),
        status=said,
        message=": ".join(filter(None, words)),
        started=_seconds(status.get("startTime")),
        ended=_seconds(status.get("endTime")),
    )


def _seconds(time: str | None) -> float | None:
    return None if time is None else datetime.fromisoformat(time).timestamp()


def _kubectl(*command: str, given: str | None = None) -> str:
    try:
        done = subprocess.run(
            ["kubectl", *command], input=given, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
    except FileNotFoundError as error:
        raise SubmitError(
            "`--to k8s` needs kubectl on this machine; --dry-run writes the manifest without it"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SubmitError(f"kubectl did not answer within {COMMAND_S:g} s; is the cluster reachable?") from error
    if done.returncode != 0:
        raise SubmitError(f"kubectl: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return done.stdout


def _plain(name: str, most: int) -> str:
    """As Kubernetes takes the values of labels."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:most].strip("-") or "run"


def _label(name: str, most: int) -> str:
    """As the operator takes names: DNS labels whose first character is a letter."""
    plain = _plain(name, most)
    return plain if plain[0].isalpha() else _plain(f"run-{plain}", most)
