"""`rlhf-dist submit` and `rlhf-dist jobs`: runs on somebody's cluster, sent, watched and ended from here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from controller.commands.registry import Commands, users_mistakes
from rlhf_dist.typed import ConfigError

if TYPE_CHECKING:
    from controller.submission.job import Job, JobInfo, Target

TARGETS = ("ray", "slurm", "k8s")
MOST_NODES = 256


def register(commands: Commands) -> None:
    """`submit` and `jobs`."""
    submit = commands.add(
        "submit", submit_command, "run a recipe as a job of a cluster",
        "submit ppo --address http://head:8265 model.path=/models/llama data.train.path=/data/prompts.jsonl",
        "submit mine.py --address http://head:8265 --wait 3600 --detach",
        "submit grpo --to slurm --nodes 4 --gpus-per-node 8 --option=--partition=gpu --option=--time=8:00:00",
        "submit grpo --to slurm --nodes auto --node 8xH100 --dry-run model.path=/models/llama-70b",
        "submit grpo --to k8s --nodes 2 --gpus-per-node 8 --image registry/rlhf-dist:gpu --dry-run",
        launch=True,
    )  # fmt: skip
    _add_target(submit)
    submit.add_argument("--nodes", metavar="N|auto", default="1", help="slurm, k8s; auto: the least that it fits on")
    submit.add_argument("--node", metavar="GxKIND", help="what a node is, for --nodes auto, e.g. 8xH100")
    submit.add_argument("--gpus-per-node", metavar="G", type=_count, help="slurm, k8s")
    submit.add_argument("--dry-run", action="store_true", help="show what would be sent")
    submit.add_argument("--detach", action="store_true", help="print the job's id and return")
    submit.add_argument("--wait", metavar="SECONDS", type=float, help="ray: wait so long for slots to be free")
    submit.add_argument("--stop-with-me", action="store_true", help="Ctrl-C stops the job too")
    submit.add_argument("--pip", metavar="PACKAGE", action="append", default=[], help="install it for the job (ray)")
    submit.add_argument(
        "--env", metavar="NAME[=VALUE]", action="append", default=[],
        help="the job's environment; NAME alone: as it is here, so that no process argument here shows it (ray, k8s: "
        "its value goes into the job's runtime environment or manifest, which others of the cluster can read)",
    )  # fmt: skip
    submit.add_argument("--option", metavar="OPTION", action="append", default=[], help="slurm: an option of sbatch")
    submit.add_argument("--folder", metavar="DIR", help="slurm: where job folders go; all nodes must see it")
    submit.add_argument("--image", metavar="IMAGE", help="k8s: the container image, with rlhf-dist in it")
    jobs = commands.add(
        "jobs", jobs_command, "list, watch and stop submitted runs",
        "jobs list --address http://head:8265",
        "jobs logs raysubmit_Xy12 -f --address http://head:8265",
        "jobs stop 4711 --to slurm",
    )  # fmt: skip
    jobs.add_argument("action", choices=("list", "status", "logs", "stop", "attach"))
    jobs.add_argument("job", metavar="JOB", nargs="?", help="its id; all but list need it")
    jobs.add_argument("-f", "--follow", action="store_true", help="logs: go on until the job is over")
    jobs.add_argument("--format", choices=("text", "json"), default="text", help="list and status")
    _add_target(jobs)


def submit_command(arguments: argparse.Namespace) -> int:
    """Send the run; 0: it succeeded, or was sent with --detach or --dry-run, 1: it failed."""
    from controller.submission.job import note

    with users_mistakes():
        job = _job(arguments)
        target = _target(arguments, to_send=True)
    if arguments.dry_run:
        print(target.preview(job))
        return 0
    if job.travels:
        note(f"sending {job.files}")
    name = target.submit(job)
    note(f"job {name} sent to {_place(arguments)}: {job.command_line(None)}")
    if arguments.detach:
        print(name)
        return 0
    try:
        return _ended(target.log(name, follow=True))
    except KeyboardInterrupt:
        if not arguments.stop_with_me:
            note(f"job {name} goes on; `rlhf-dist jobs attach {name}{_same(arguments)}` shows it again, stop ends it")
            raise
        note(f"stopping job {name}")
        target.stop(name)
        raise


def jobs_command(arguments: argparse.Namespace) -> int:
    """0: done, or the job that was followed succeeded; 1: it did not."""
    from controller.submission.job import note

    if arguments.job is None and arguments.action != "list":
        raise ConfigError(f"`jobs {arguments.action}` needs a job's id; `rlhf-dist jobs list` names them")
    target = _target(arguments, to_send=False)
    if arguments.action == "list":
        _show(target.jobs(), arguments.format)
        return 0
    if arguments.action == "status":
        _show([target.info(arguments.job)], arguments.format)
        return 0
    if arguments.action == "stop":
        found = target.stop(arguments.job)
        note(f"job {found.id}: {found.status}" + (f" ({found.message})" if found.message else ""))
        return 0
    follows = arguments.follow or arguments.action == "attach"
    try:
        found = target.log(arguments.job, follow=follows)
    except KeyboardInterrupt:
        note(f"job {arguments.job} goes on")
        raise
    return _ended(found) if follows else 0


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", choices=TARGETS, default="ray", help="default: ray")
    parser.add_argument("--address", metavar="URL", help="ray: the cluster's dashboard, http://HOST:8265")


def _target(arguments: argparse.Namespace, to_send: bool) -> Target:
    if arguments.to != "ray" and arguments.address is not None:
        raise ConfigError(f"--address is Ray's dashboard, and --to {arguments.to} has none; leave one of them out")
    if arguments.to == "ray":
        from controller.submission.ray_jobs import RayJobs

        if arguments.address is None:
            raise ConfigError("--to ray needs --address http://HOST:8265, the cluster's dashboard")
        return RayJobs(arguments.address, arguments.wait if to_send else None)
    if arguments.to == "slurm":
        from controller.submission.slurm import Slurm

        if not to_send:
            return Slurm()
        folder = None if arguments.folder is None else Path(arguments.folder)
        return Slurm(folder, arguments.option, arguments.gpus_per_node)
    from controller.submission.kubernetes import RayJobManifests

    if not to_send:
        return RayJobManifests("", None)
    if arguments.image is None:
        raise ConfigError("--to k8s needs --image IMAGE, one with rlhf-dist in it (docker/Dockerfile)")
    return RayJobManifests(arguments.image, arguments.gpus_per_node)


def _job(arguments: argparse.Namespace) -> Job:
    from controller.lifecycle.session import slots_needed
    from controller.submission.files import job_files
    from controller.submission.job import Job
    from rlhf_dist.checks import check_one_origin
    from rlhf_dist.planner.launch import compose_planned
    from rlhf_dist.secret_settings import check_no_secrets

    if arguments.to == "ray" and arguments.nodes != "1":
        raise ConfigError("--nodes is for slurm and k8s; a Ray cluster has the nodes it has (placement.pools.*.nodes)")
    launch = compose_planned(arguments.recipe, arguments.overrides, arguments.config)
    check_no_secrets(launch.run.ray.worker_env, launch.run.output.store_options)
    check_one_origin(launch)  # models and data are looked for where the job runs
    variables = dict(_variable(text) for text in arguments.env)
    return Job(
        name=launch.run.name,
        recipe=launch.recipe.name,
        files=job_files(arguments.recipe, launch.yaml, arguments.overrides, Path.cwd()),
        overrides=arguments.overrides,
        config=None if arguments.config is None else Path(arguments.config),
        slots=slots_needed(launch),
        host_processes=launch.run.placement.host_processes,
        gpus=bool(arguments.gpus_per_node) or any(one.device == "cuda" for one in launch.run.placement.pools.values()),
        nodes=_nodes(arguments),
        pip=arguments.pip,
        variables=variables,
    )


def _nodes(arguments: argparse.Namespace) -> int:
    """What was asked for; auto: the fewest, in powers of two, on which every phase of the run fits."""
    from controller.lifecycle.prepare import prepared
    from controller.submission.job import note
    from rlhf_dist.hardware import parse_cluster

    if arguments.nodes != "auto":
        try:
            nodes = int(arguments.nodes)
        except ValueError:
            nodes = 0
        if nodes < 1:
            raise ConfigError(f"--nodes must be a number from 1, or auto, got {arguments.nodes!r}")
        return nodes
    if arguments.node is None:
        raise ConfigError("--nodes auto needs --node GxKIND, what a node is, e.g. 8xH100")
    nodes, why = 1, ""
    while nodes <= MOST_NODES:
        cluster = parse_cluster(f"{nodes}x{arguments.node}", key="--node")
        own = [] if nodes == 1 else [f"placement.pools.main.nodes={nodes}"]
        try:
            prepared(arguments.recipe, [*arguments.overrides, *own], arguments.config, cluster=cluster)
        except ConfigError as error:
            why = str(error)
            if not why.lower().count("fit") and not why.lower().count("memory"):
                raise
            nodes *= 2
            continue
        note(
            f"{nodes} nodes of {arguments.node}: the fewest on which it fits"
            + (f" (on {nodes // 2}: {why})" if why else "")
        )
        return nodes
    raise ConfigError(f"it does not fit on {MOST_NODES} nodes of {arguments.node}: {why}")


def _variable(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign and name in os.environ:
        return name, os.environ[name]
    if not sign or not name:
        raise ConfigError(f"--env must be NAME=VALUE, or the NAME of a variable that is set here, got {text!r}")
    return name, value


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return int(text)


def _place(arguments: argparse.Namespace) -> str:
    return str(arguments.address) if arguments.to == "ray" else str(arguments.to)


def _same(arguments: argparse.Namespace) -> str:
    return f" --address {arguments.address}" if arguments.to == "ray" else f" --to {arguments.to}"


def _ended(found: JobInfo) -> int:
    from controller.submission.job import note

    note(f"job {found.id}: {found.status}" + (f" ({found.message})" if found.message else ""))
    return 0 if found.status == "succeeded" else 1


def _show(jobs: list[JobInfo], form: str) -> None:
    if form == "json":
        print(json.dumps([dataclasses.asdict(one) for one in jobs]))
        return
    if not jobs:
        print("no jobs")
    for one in jobs:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.started)) if one.started else "-"
        print(f"{one.id}  {one.status:9}  {when:19}  {one.recipe}  {one.name}  {one.message}".rstrip())
