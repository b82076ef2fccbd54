"""Manifests of `--to k8s` against the schemas of what they are applied to, and what a RayJob's status says."""

from __future__ import annotations

import base64
import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from controller.commands.cli import main
from controller.submission.files import JobFiles
from controller.submission.job import Job
from controller.submission.kubernetes import RayJobManifests, _info
from tests.submission.rayjob_schema import RAY_JOB

KUBERNETES = "1.34"
"""Its schemas; strict: an unknown field is an error."""


def checked(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ConfigMap and the RayJob, which keep to their schemas."""
    files, job = yaml.safe_load_all(text)
    kubernetes_validate.validate(files, KUBERNETES, strict=True)
    assert {"data", "binaryData"} >= files.keys() - {"apiVersion", "kind", "metadata"}
    jsonschema.Draft202012Validator(RAY_JOB).validate(job)
    for pods in templates(job):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pods}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)
        [container] = pods["spec"]["containers"]
        assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pods["spec"]["volumes"]}
        assert {"name": "files", "configMap": {"name": files["metadata"]["name"]}} in pods["spec"]["volumes"]
    assert files["metadata"] == job["metadata"]
    return files, job


def templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [one["template"] for one in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ()))]


def manifest(name: str = "run", recipe: str = "ppo", overrides: tuple[str, ...] = (), **settings: Any) -> str:
    files = JobFiles(spec=recipe, files={}, left_out=0)
    job = Job(name=name, recipe=recipe, files=files, overrides=overrides, **settings)
    return RayJobManifests("registry/rlhf:1", 8 if settings.get("gpus") else None).preview(job)


def test_a_job_has_the_command_the_files_and_the_nodes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    words = ["submit", "sft", "--to", "k8s", "--image", "registry/rlhf:1", "--nodes", "3", "--gpus-per-node", "8"]
    words += ["--env", "NCCL_DEBUG=INFO", "model.path=/models/m", "data.train.path=rows.jsonl", "name=A Run"]
    assert main([*words, "--dry-run"]) == 0
    files, job = checked(capsys.readouterr().out)
    assert job["metadata"]["name"].startswith("a-run-") and job["spec"]["entrypoint"] == "bash /job/run.sh"
    packed = io.BytesIO(base64.b64decode(files["binaryData"]["files.tar"]))
    assert "./rows.jsonl" in tarfile.open(fileobj=packed).getnames()
    script = files["data"]["run.sh"]
    assert "tarfile -e /job/files.tar" in script and "rlhf-dist run sft" in script and "ray.address=auto" in script
    [workers] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2
    for pods in templates(job):
        [container] = pods["spec"]["containers"]
        assert container["image"] == "registry/rlhf:1" and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]


@pytest.mark.parametrize("gpus", [False, True])
@pytest.mark.parametrize("nodes", [1, 2])
def test_manifests_keep_to_the_schemas(nodes: int, gpus: bool) -> None:
    checked(manifest(nodes=nodes, gpus=gpus, slots=8, variables={"A": "1"}))


@pytest.mark.parametrize(
    ("name", "begins"),
    [("4b run", "run-4b-run-"), ("Ünïcode/run", "n-code-run-"), ("x" * 90, "x" * 40 + "-"), ("_", "run-")],
)
def test_any_name_of_a_run_becomes_one_that_the_operator_takes(name: str, begins: str) -> None:
    _, job = checked(manifest(name=name, recipe=f"{'deep/' * 20}mine.py:mine"))
    assert job["metadata"]["name"].startswith(begins)


def test_quotes_and_dollar_signs_reach_the_command_as_they_were_typed(tmp_path: Path) -> None:
    """Whatever shells lie between the manifest and the command: the entrypoint has nothing that one would change."""
    typed = ("ray.worker_env={KEY: $KEY}", "prompt=\"a 'b' `c` \\ $(d)\"")
    files, job = checked(manifest(overrides=typed))
    assert job["spec"]["entrypoint"].replace("/job/run.sh", "").strip() == "bash"
    (tmp_path / "rlhf-dist").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "rlhf-dist").chmod(0o700)
    said = subprocess.run(
        ["bash", "-c", files["data"]["run.sh"]], env={"PATH": f"{tmp_path}:/usr/bin:/bin", "KEY": "secret"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.splitlines() == ["run", "ppo", *typed, "ray.address=auto"]


@pytest.mark.parametrize(
    ("deployment", "job", "reason", "said"),
    [
        ("", "", "", "waiting"),
        ("Initializing", "", "", "waiting"),
        ("Running", "RUNNING", "", "running"),
        ("Complete", "SUCCEEDED", "", "succeeded"),
        ("Failed", "", "SubmissionFailed", "failed"),
        ("Failed", "RUNNING", "DeadlineExceeded", "failed"),
        ("Failed", "STOPPED", "", "stopped"),
    ],
)
def test_a_status_is_read_of_the_job_and_of_its_deployment(deployment: str, job: str, reason: str, said: str) -> None:
    status = {"jobDeploymentStatus": deployment, "jobStatus": job, "reason": reason, "message": "a \n  message"}
    times = {"startTime": "2026-01-02T03:04:05Z", "endTime": "2026-01-02T03:05:05Z"}
    found = _info({"metadata": {"name": "a-1", "labels": {"rlhf-dist/run": "a"}}, "status": status | times})
    assert (found.id, found.name, found.status) == ("a-1", "a", said)
    assert found.message == (f"{reason}: a message" if reason else "a message")
    assert found.started is not None and found.ended is not None and found.ended - found.started == 60
    assert _info({"metadata": {"name": "a-1"}}).status == "waiting", "the operator has not seen it yet"
