"""Interfaces and host names: by which way ranks of different nodes would reach each other."""

from __future__ import annotations

from ipaddress import ip_address

from controller.doctor.finding import Finding, failed, of_nodes, ok, warning
from controller.doctor.node_facts import NodeFacts
from controller.doctor.subject import Subject


def interface_of(node: NodeFacts, address: str) -> str | None:
    """The interface that has this address."""
    return next((name for name, addresses in node.interfaces.items() if address in addresses), None)


def interfaces(subject: Subject) -> Finding:
    """Which interface has the address that Ray uses, and which one gloo would take."""

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
        found = next((name for at in node.host_addresses if (name := interface_of(node, at))), None)
        found = f"Ray by {node.address} on {ray_interface}; gloo, left alone, by {found or 'lo'}"
        return ok(found)

    return of_nodes(subject.nodes, judge)


def host_names(subject: Subject) -> Finding:
    """Whether a host name resolves to loopback: gloo, left alone, would listen there, where no other node comes."""
    alone = len(subject.nodes) == 1

    def judge(node: NodeFacts) -> Finding:
        to = ", ".join(node.host_addresses) or "nothing"
        found = f"{node.host_name} resolves to {to}"
        if node.host_addresses and not ip_address(node.host_addresses[0]).is_loopback:
            return ok(found)
        if alone:
            return ok(f"{found}: all the same on a single node")
        interface = interface_of(node, node.address) or "the interface of the node's address"
        return warning(
            found, f"give the name the address {node.address} in /etc/hosts, or set GLOO_SOCKET_IFNAME={interface}"
        )

    return of_nodes(subject.nodes, judge)
