"""Where bytes lie: shared memory, Ray's object store and temporary folder, the folder of runs."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from controller.doctor.finding import Finding, counted, failed, nbytes, of_nodes, ok, warning
from controller.doctor.node_facts import NodeFacts
from controller.doctor.subject import Subject

LEAST_SHM, LITTLE_SHM = 64 << 20, 1 << 30
"""Docker gives a container 64 MiB, in which no object store fits; the store's default here is half a GiB."""
LITTLE_STORE = 128 << 20
"""A batch of a thousand rows of 8,192 tokens with six columns is 200 MB."""
LEAST_DISK, LITTLE_DISK = 1 << 30, 20 << 30
"""A checkpoint of a 1B model with its optimizer is 16 GB."""
LITTLE_TEMP = 5 << 30
"""Ray spills objects there, and refuses tasks where the disk is 95 % full."""
_OBJECT = 16 << 20


def shared_memory(subject: Subject) -> Finding:
    """/dev/shm: Ray's object store lies there, vLLM's queues and NCCL's too."""

    def judge(node: NodeFacts) -> Finding:
        found = f"{nbytes(node.shm_free)} of {nbytes(node.shm_total)} free in /dev/shm"
        advice = "docker run --shm-size=8g (Kubernetes: an emptyDir of medium Memory at /dev/shm)"
        if node.shm_total <= LEAST_SHM:
            return failed(found, advice)
        return warning(found, advice) if node.shm_free < LITTLE_SHM else ok(found)

    return of_nodes(subject.nodes, judge)


def object_store(subject: Subject) -> Finding:
    """Its size, and an object on its way to every node."""
    started = time.perf_counter()
    sizes = subject.send_object(_OBJECT)
    seconds = time.perf_counter() - started
    lost = [address for address, size in sizes.items() if size != _OBJECT]
    if lost:
        return failed(
            f"an object of {nbytes(_OBJECT)} did not reach {', '.join(lost)}", "look at the raylet's log there"
        )
    least, name = min((subject.store_bytes(node), node.name) for node in subject.nodes)
    found = f"{nbytes(least)} a node, {nbytes(_OBJECT)} to {counted(len(sizes), 'node')} in {seconds:.2f} s"
    if least < LITTLE_STORE:
        return warning(
            f"{found} (least on {name})", "make it larger: ray start --object-store-memory, ray.object_store_bytes"
        )
    return ok(found)


def disk(subject: Subject) -> Finding:
    """Where runs are written: checkpoints, exports."""
    return of_nodes(
        [subject.here],
        lambda node: _enough(node.run_folder_free, f"where runs go ({subject.run_folder})", LEAST_DISK, LITTLE_DISK),
    )


def ray_temp(subject: Subject) -> Finding:
    """Ray's temporary folder: logs, sockets, spilled objects."""
    return of_nodes(
        subject.nodes,
        lambda node: _enough(node.ray_temp_free, f"in Ray's folder {node.ray_temp}", LEAST_DISK, LITTLE_TEMP),
    )


def run_folder(subject: Subject) -> Finding:
    """A file written here is read on every node, and theirs here."""
    folder, name = Path(subject.run_folder), f".doctor-{uuid4().hex}"
    advice = "give --folder (of runs: output.root) that may be written to, on a file system that all nodes mount"
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
        answers = subject.read_and_write(str(folder), name)
        blind = [address for address, own in answers.items() if own is None or not (folder / own).exists()]
    except OSError as error:
        return failed(f"{folder} cannot be written to: {error.strerror or error}", advice)
    finally:
        for path in folder.glob(f"{name}*") if folder.is_dir() else ():
            path.unlink()
        with suppress(OSError):  # not made, or in use by now
            for path in made:
                path.rmdir()
    if blind:
        return failed(f"{folder} is not the same folder on {', '.join(blind)} as here", advice)
    return ok(f"{folder} is seen and written by {counted(len(answers), 'node')}")


def _enough(free: int, where: str, least: int, little: int) -> Finding:
    found, advice = f"{nbytes(free)} free {where}", "free some, or use another disk (output.root, ray --temp-dir)"
    if free < least:
        return failed(found, advice)
    return warning(found, advice) if free < little else ok(found)
