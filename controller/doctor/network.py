"""Interfaces and host names: by which way ranks of different nodes would reach each other."""

from __future__ import annotations

from ipaddress import ip_address

from controller.doctor.finding import Finding, failed, of_nodes, ok
from controller.doctor.node_facts import NodeFacts
from controller.doctor.subject import Subject


def interface_of(node: NodeFacts, address: str) -> str | None:
    """The interface that has this address."""
    return next((name for name, addresses in node.interfaces.items() if address in addresses), None)


def interfaces(subject: Subject) -> Finding:
    """Which interface has the address that Ray uses: a run's processes talk over it, unless they are told another."""

    def judge(node: NodeFacts) -> Finding:
        ray_interface = interface_of(node, node.address)
        if ray_interface is None:
            there = ", ".join(
                f"{name} {'/'.join(addresses)}" for name, addresses in node.interfaces.items() if addresses
            )
            return failed(
                f"none of its interfaces has {node.address}, by which Ray knows it ({there or 'none is up'})",
                "start Ray there with --node-ip-address of an interface that the other nodes reach",
            )
        if node.gloo_interface is not None:
            if node.gloo_interface not in node.interfaces:
                return failed(
                    f"GLOO_SOCKET_IFNAME={node.gloo_interface}, and there is {', '.join(node.interfaces)}",
                    f"set it to {ray_interface}, or unset it, where Ray is started",
                )
            return ok(f"Ray by {node.address} on {ray_interface}, gloo by {node.gloo_interface} (GLOO_SOCKET_IFNAME)")
        own = "; gloo by lo on a single node" if len(subject.nodes) == 1 else ""
        return ok(f"Ray by {node.address} on {ray_interface}, which gloo and NCCL of a run take too{own}")

    return of_nodes(subject.nodes, judge)


def host_names(subject: Subject) -> Finding:
    """What host names resolve to: loopback is what makes other programs over gloo hang. A run does not ask for it."""

    def judge(node: NodeFacts) -> Finding:
        to = ", ".join(node.host_addresses) or "nothing"
        local = not node.host_addresses or ip_address(node.host_addresses[0]).is_loopback
        return ok(f"{node.host_name} resolves to {to}" + (": no matter, runs go by Ray's address" if local else ""))

    return of_nodes(subject.nodes, judge)
