"""Which network a process talks over: the one that carries the address under which Ray knows its node.

    gloo, left alone, resolves the host name, which many systems map to 127.0.1.1: ranks on two nodes never meet
    NCCL chooses among the interfaces by itself, docker's bridge among them
    vLLM asks which interface leads to the internet

What the environment says already is a user's own choice and stays. Stores of process groups listen on a socket that
was open from the moment its port was told, so nobody can take the port in between. Their keys begin with a secret that
travels with the address, and are removed once they have been read: the store itself knows no passwords.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
from collections.abc import Iterable
from datetime import timedelta

import psutil
import torch.distributed as dist

LOOPBACK = "lo"
_BACKLOG = 4096
"""Ranks that may call a store before it answers."""
_log = logging.getLogger(__name__)
_reserved: dict[int, socket.socket] = {}
"""Port -> the socket that listens on it, until a store takes it."""


def interface_of(address: str) -> str | None:
    """The interface of this machine that has `address`, an IPv4 or IPv6 one; None where none has."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return LOOPBACK
    for name, addresses in psutil.net_if_addrs().items():
        for own in addresses:
            if own.family in (socket.AF_INET, socket.AF_INET6):
                if ipaddress.ip_address(own.address.partition("%")[0]) == wanted:
                    return str(name)
    return None


def use_network(address: str, one_node: bool) -> None:
    """Let gloo, NCCL and vLLM of this process use the interface of `address`, the node's as Ray knows it.

    one_node: all ranks of the process group run here, so gloo talks over loopback, which no firewall closes. NCCL
    does not: a process makes all its NCCL connections over what it found first, those to other pools' nodes too.
    """
    interface = interface_of(address)
    if interface is None:
        _log.warning(
            "no interface of this machine has the address %s, as which Ray knows it: gloo and NCCL choose one "
            "themselves; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME where they choose wrongly",
            address,
        )
    if one_node or interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK if one_node else str(interface))
    if interface is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without "=" it is the start of a name
        os.environ.setdefault("VLLM_HOST_IP", address)


def own_address(peer: str) -> str:
    """The address of this machine's interface that reaches `peer`."""
    with socket.socket(_family(peer), socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # a datagram socket sends nothing here, it only chooses the interface
        return str(probe.getsockname()[0])


def reserve_port(address: str) -> int:
    """A port of `address` that is ours from now on: the next `rendezvous` hosted on it takes the socket over.

    Where no interface has the address, as behind NAT, it listens on all of them.
    """
    own = address if interface_of(address) is not None else ""
    listener = socket.create_server((own, 0), family=_family(address), backlog=_BACKLOG)
    port = int(listener.getsockname()[1])
    _reserved[port] = listener
    return port


def new_secret() -> str:
    """What the keys of one meeting begin with: only those that were told it meet there."""
    return secrets.token_hex(16)


def rendezvous(address: str, port: int, hosts: bool, timeout_s: float, secret: str = "") -> dist.Store:
    """The store at which ranks meet; the one that `hosts` it listens on `address` and nowhere else.

    secret: `new_secret`, the same for all of them. Raises RuntimeError where it cannot.
    """
    store = _store(address, port, hosts, timeout_s)
    return dist.PrefixStore(secret, store) if secret else store


def keys_there(store: dist.Store) -> list[str]:
    """The keys of a store now, to be removed with `remove_keys` once all ranks have read them."""
    return store.list_keys()


def remove_keys(store: dist.Store, keys: Iterable[str]) -> None:
    """Take these keys away, those that are gone already too."""
    for key in keys:
        store.delete_key(key)


def _store(address: str, port: int, hosts: bool, timeout_s: float) -> dist.TCPStore:
    if not hosts:
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    try:
        listener = _reserved.pop(port, None) or socket.create_server(
            (address, port), family=_family(address), backlog=_BACKLOG
        )
    except OSError as error:
        raise RuntimeError(
            f"a store must listen on {address}:{port}, as the other ranks reach this machine, got "
            f"{error.strerror}; does the node's address belong to one of its interfaces?"
        ) from error
    return dist.TCPStore(
        address,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
