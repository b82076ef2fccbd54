"""Machines: devices, processors, memory, open files, clocks."""

from __future__ import annotations

from collections import Counter

from controller.doctor.finding import Finding, counted, failed, nbytes, of_nodes, ok, skipped, warning
from controller.doctor.node_facts import NodeFacts
from controller.doctor.subject import Subject
from rlhf_dist.machine import BFLOAT16_FLAGS

BF16_FLAGS = frozenset(flag for flags in BFLOAT16_FLAGS.values() for flag in flags)
LEAST_MEMORY = 4 << 30
"""Free for the controller, Ray and two ranks of a tiny model; each rank imports about 1 GiB of libraries."""
LEAST_OPEN_FILES, FEW_OPEN_FILES = 1024, 4096
"""Ray's raylet and gloo hold a few for each peer: below the first it fails on one node, below the second on many."""
CLOCK_WARNING_S, CLOCK_FAILED_S = 0.5, 60.0
"""The timeline puts events of all nodes on one axis; tokens and certificates go by minutes."""


def reachable(subject: Subject) -> Finding:
    """Whether every node that Ray counts answered, which takes rlhf-dist being importable there."""
    if subject.unreachable:
        address, why = next(iter(subject.unreachable.items()))
        more = f" ({len(subject.unreachable)} nodes)" if len(subject.unreachable) > 1 else ""
        return failed(
            f"{address} does not answer{more}: {why}",
            "install rlhf-dist on every node, in the environment of its `ray start`; look at the raylet's log there",
        )
    cores = sum(node.cores for node in subject.nodes)
    return ok(f"{counted(len(subject.nodes), 'node')}, {counted(cores, 'core')}, {subject.about}")


def devices(subject: Subject) -> Finding:
    """GPUs and their drivers; whether Ray counts the GPUs that a node has."""
    for node in subject.nodes:
        by_ray = subject.gpus_of(node)
        if by_ray != len(node.gpus):
            return warning(
                f"{node.name} has {len(node.gpus)} GPUs by nvidia-smi, and Ray counts {by_ray:g} there",
                "start Ray with --num-gpus of what the node has, and look at CUDA_VISIBLE_DEVICES where it was started",
            )
    if not any(node.gpus for node in subject.nodes):
        return ok("no GPU on any node: engines run on the CPU")
    kinds = Counter((gpu.name, gpu.memory_bytes, gpu.driver) for node in subject.nodes for gpu in node.gpus)
    found = "; ".join(
        f"{count} x {name} ({nbytes(size)}), driver {driver}" for (name, size, driver), count in kinds.items()
    )
    if len(kinds) > 1:
        return warning(found, "place a pool on nodes of one kind: its slowest GPU sets the pace; use one driver")
    return ok(f"{found}; on {counted(len(subject.nodes), 'node')}")


def processors(subject: Subject) -> Finding:
    """Whether bfloat16 is in hardware: only of interest where engines run on the CPU."""
    if all(node.gpus for node in subject.nodes):
        return skipped("engines run on GPUs")

    def judge(node: NodeFacts) -> Finding:
        if not node.cpu_flags:
            return skipped("/proc/cpuinfo says nothing of its instructions")
        if found := sorted(BF16_FLAGS & node.cpu_flags):
            return ok(f"{node.cores} cores with bfloat16 in hardware ({', '.join(found)})")
        widest = next(
            (flag for flag in ("avx512f", "avx2", "asimd") if flag in node.cpu_flags), "neither AVX2 nor more"
        )
        return ok(f"{node.cores} cores ({widest}) without bfloat16 instructions: runs compute in float32 (dtype=auto)")

    return of_nodes([node for node in subject.nodes if not node.gpus], judge)


def memory(subject: Subject) -> Finding:
    """Host memory, and the control group's limit, which ends a process without a word."""

    def judge(node: NodeFacts) -> Finding:
        most = node.memory_limit or node.memory_total
        free = min(most, node.memory_available)
        limit = f", limited to {nbytes(node.memory_limit)} by its control group" if node.memory_limit else ""
        found = f"{nbytes(free)} of {nbytes(node.memory_total)} free{limit}"
        if free < LEAST_MEMORY:
            return warning(found, f"free memory, or raise the container's limit, to {nbytes(LEAST_MEMORY)} or more")
        return ok(found)

    return of_nodes(subject.nodes, judge)


def open_files(subject: Subject) -> Finding:
    """How many files and sockets a process may have open."""

    def judge(node: NodeFacts) -> Finding:
        found = f"a process may open {node.open_files:,} files (up to {node.open_files_most:,})"
        advice = "raise it where Ray is started (ulimit -n 65536; in a service LimitNOFILE), and start Ray anew"
        if node.open_files < LEAST_OPEN_FILES:
            return failed(found, advice)
        return warning(found, advice) if node.open_files < FEW_OPEN_FILES else ok(found)

    return of_nodes(subject.nodes, judge)


def clocks(subject: Subject) -> Finding:
    """Each node's clock against this machine's, as near as the shortest of a few round trips tells."""
    skews = {name: subject.clock_skew_s(name) for name in subject.probes}
    name, (skew, error) = max(skews.items(), key=lambda item: abs(item[1][0]))
    found = f"at most {abs(skew) * 1e3:.1f} ms apart (+- {error * 1e3:.1f}; {name})"
    advice = "start a time service (chrony, systemd-timesyncd) on all nodes"
    if abs(skew) - error > CLOCK_FAILED_S:
        return failed(found, advice)
    return warning(found, advice) if abs(skew) - error > CLOCK_WARNING_S else ok(found)
