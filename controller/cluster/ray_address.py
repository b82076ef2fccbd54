"""Which cluster a run uses: one of its own, or the one at `ray.address`, which is asked before it is joined.

    ray.address   None         a cluster of its own, whatever RAY_ADDRESS and earlier clusters left behind
                  None, in a Ray job   the cluster that runs the job
                  auto         RAY_ADDRESS, else the cluster that `ray start` last started on this machine
                  host:port    that one

Ray itself waits for minutes for an address where nobody answers; here every question has a limit.
"""

from __future__ import annotations

import os
import secrets
import socket
from typing import Any

ADDRESS = "RAY_ADDRESS"
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the processes of a submitted job."""
CONNECT_S = 5.0
"""Limit of a TCP connection to the address."""
ANSWER_S = 10.0
"""Limit of an answer of the cluster behind it."""


class AddressError(RuntimeError):
    """There is no cluster to join at `ray.address`; the message says what was tried and what to do."""


def address_to_join(configured: str | None, key: str = "ray.address") -> str | None:
    """host:port of a cluster that answers, of which this machine is a node; None: start one.

    configured: `ray.address`, or what is called `key` where it was given. Raises AddressError within CONNECT_S +
    ANSWER_S.
    """
    if configured is None and IN_A_JOB not in os.environ:
        return None
    wanted = configured or "auto"
    source = f"{key}={wanted}"
    address = _found(source, key) if wanted == "auto" else wanted
    if wanted == "auto" and address == os.environ.get(ADDRESS):
        source += f" with {ADDRESS}={address}"
    _check_form(address, source)
    _use_token()
    _check_listening(address, source)
    _check_cluster(address, source)
    return address


def prepare_own() -> str | None:
    """Keep the environment's other clusters out of one started here; returns the RAY_ADDRESS that was set aside.

    Ray's default leaves a token in the home folder, after which every `ray start` there wants one. A cluster
    that lives as long as this process needs no file: the token is handed to its processes in the environment.
    """
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return os.environ.pop(ADDRESS, None)


def _found(source: str, key: str) -> str:
    from ray._private import services

    try:
        found = services.get_ray_address_from_environment("auto", None)
    except ConnectionError:
        raise AddressError(
            f"{source} finds no cluster on this machine; start one with `ray start --head`, give its host:port, or "
            f"leave {key} out for a cluster that lives as long as this command"
        ) from None
    return str(found)


def _check_form(address: str, source: str) -> None:
    if address.startswith(("http://", "https://")):
        raise AddressError(
            f"{source} must be host:port of a cluster (port 6379), got a web address; a dashboard takes jobs: "
            f"rlhf-dist submit RECIPE --address {address}"
        )
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise AddressError(f"{source} must be auto or host:port of a cluster (port 6379), got {address!r}")


def _use_token() -> None:
    """Show the token that a cluster started here would ask for: Ray itself does so for `auto` only."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _check_listening(address: str, source: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        left = " (left by a cluster that is gone?)" if "auto" in source else ""
        raise AddressError(
            f"nothing listens at {address}, which {source} names{left}: {error}; is the cluster up, and is this its "
            f"port (6379, not the dashboard's 8265)?"
        ) from error


def _check_cluster(address: str, source: str) -> None:
    """Ask for the cluster's nodes: no Ray, another token, or a cluster that this machine is no node of."""
    import grpc
    from ray._private import services
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2  # made at run time, without types
    channel: Any = init_grpc_channel(address)
    try:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        reply = stub.GetAllNodeInfo(messages.GetAllNodeInfoRequest(), timeout=ANSWER_S)
    except grpc.RpcError as error:
        code = error.code()
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise AddressError(
                f"the cluster at {address} asks for a token and ours is missing or another; set RAY_AUTH_TOKEN to its "
                f"token, or RAY_AUTH_TOKEN_PATH to the file (~/.ray/auth_token on its head node)"
            ) from error
        raise AddressError(
            f"what listens at {address}, which {source} names, does not answer as a Ray cluster within {ANSWER_S:g} s "
            f"({code.name}); is this its port (6379, not the dashboard's 8265)?"
        ) from error
    finally:
        channel.close()
    here = services.find_node_ids()
    if not any(node.node_id.hex() in here for node in reply.node_info_list if node.state == 0):
        raise AddressError(
            f"this machine is no node of the cluster at {address}; run on one of its nodes, or send the run there: "
            f"rlhf-dist submit RECIPE --address http://HEAD:8265"
        )
