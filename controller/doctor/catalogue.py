"""The one list of checks, in the order in which they run: later ones need what earlier ones look at."""

from __future__ import annotations

from controller.doctor import engines, machines, network, ranks, storage, versions
from controller.doctor.finding import Check

_LOGS = "look at the ranks' logs in Ray's session folder (/tmp/ray/session_latest/logs/worker-*)"

CHECKS = (
    Check(name="nodes", run=machines.reachable),
    Check(name="versions", run=versions.versions),
    Check(name="same-versions", run=versions.same_versions),
    Check(name="devices", run=machines.devices),
    Check(name="processors", run=machines.processors),
    Check(name="memory", run=machines.memory),
    Check(name="open-files", run=machines.open_files),
    Check(name="clocks", run=machines.clocks),
    Check(name="interfaces", run=network.interfaces),
    Check(name="host-names", run=network.host_names),
    Check(name="shared-memory", run=storage.shared_memory),
    Check(name="object-store", run=storage.object_store, limit_s=20.0, advice="look at the raylets' logs"),
    Check(name="disk", run=storage.disk),
    Check(name="ray-disk", run=storage.ray_temp),
    Check(name="run-folder", run=storage.run_folder, advice="give --folder on a file system that all nodes mount"),
    Check(
        name="processes",
        run=ranks.processes,
        limit_s=60.0,
        advice="free slots (ray status), and let the nodes reach each other on all ports",
    ),
    Check(
        name="gloo",
        run=ranks.gloo,
        limit_s=45.0,
        advice="export GLOO_SOCKET_IFNAME, which ranks are sent, where it is not the interface of Ray's address",
    ),
    Check(
        name="nccl",
        run=ranks.nccl,
        limit_s=45.0,
        advice="export NCCL_SOCKET_IFNAME likewise; NCCL_DEBUG=INFO says more in the ranks' logs",
    ),
    Check(name="weight-transfer", run=ranks.weight_transfer, limit_s=45.0, advice=_LOGS),
    Check(name="training", run=engines.training, limit_s=60.0, advice=_LOGS),
    Check(name="generation", run=engines.generation, limit_s=90.0, advice=_LOGS),
    Check(name="memory-ledger", run=engines.memory_ledger, limit_s=90.0, advice=_LOGS),
    Check(name="deepspeed", run=engines.deepspeed, limit_s=60.0, advice="ROLE.engine=fsdp does without; " + _LOGS),
)
"""Every check; limits are several times what it takes on 2 cores."""
