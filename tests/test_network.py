"""Which interface a process uses, which variables reach it, and ports that nobody takes in between."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist

from controller.cluster.worker_environment import is_sent
from workers.device import init_distributed
from workers.network import (
    interface_of,
    keys_there,
    new_secret,
    own_address,
    remove_keys,
    rendezvous,
    reserve_port,
    use_network,
)

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def told() -> list[str | None]:
    return [os.environ.get(name) for name in NAMES]


def test_the_interface_is_the_one_with_the_node_s_address(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    address = type(psutil.net_if_addrs()["lo"][0])(socket.AF_INET, "10.1.2.3", None, None, None)
    scoped = address._replace(family=socket.AF_INET6, address="fe80::1%eth7")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"docker0": [], "eth7": [scoped, address]})
    assert interface_of("10.1.2.3") == interface_of("fe80::1") == "eth7"
    assert interface_of("127.0.0.1") == interface_of("::1") == "lo"
    assert interface_of("10.1.2.4") is None
    use_network("10.1.2.3", one_node=False)
    assert told() == ["eth7", "=eth7", "10.1.2.3"]


def test_a_pool_on_one_node_talks_over_loopback_and_a_user_s_own_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    use_network("127.0.0.1", one_node=True)
    assert told() == ["lo", "=lo", "127.0.0.1"]
    for name in NAMES:
        monkeypatch.setenv(name, "mine")
    use_network("127.0.0.1", one_node=True)
    assert told() == ["mine"] * 3


def test_an_address_of_no_interface_leaves_the_choice_to_the_libraries(caplog: pytest.LogCaptureFixture) -> None:
    use_network("192.0.2.1", one_node=False)
    assert told() == [None] * 3 and "192.0.2.1" in caplog.text
    use_network("192.0.2.1", one_node=True)
    assert told() == ["lo", None, None]
    socket.create_connection(("127.0.0.1", reserve_port("192.0.2.1")), timeout=5).close()  # as NAT would pass it on


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_stays_ours_from_when_it_is_told_until_the_store_has_it(address: str) -> None:
    if ":" in address and "::1" not in [own.address for own in _loopback()]:
        pytest.skip("this machine has no IPv6 loopback")
    port = reserve_port(address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with pytest.raises(OSError, match="in use"):
        socket.create_server((address, port), family=family)
    early = socket.create_connection((address, port), timeout=5)  # a rank that is faster than the store
    store = rendezvous(address, port, hosts=True, timeout_s=5.0)
    store.set("key", "value")
    assert rendezvous(address, port, hosts=False, timeout_s=5.0).get("key") == b"value"
    assert own_address(address) == address
    early.close()


def test_a_meeting_is_for_those_who_know_its_secret_and_leaves_no_key() -> None:
    address, port, secret = "127.0.0.1", reserve_port("127.0.0.1"), new_secret()
    init_distributed(
        rank=0,
        world=1,
        master_addr=address,
        master_port=port,
        device=torch.device("cpu"),
        timeout_s=10.0,
        secret=secret,
    )
    try:
        stranger = rendezvous(address, port, hosts=False, timeout_s=5.0)
        assert [key for key in keys_there(stranger) if secret in key] == []
        known = rendezvous(address, port, hosts=False, timeout_s=5.0, secret=secret)
        known.set("weights", "mine")
        stranger.set("weights", "another's")
        assert known.get("weights") == b"mine" and keys_there(known) == ["weights"]
        remove_keys(known, ["weights", "gone already"])
        assert keys_there(known) == []
        dist.barrier()  # the group needs the store no more
    finally:
        dist.destroy_process_group()


def test_workers_get_what_their_libraries_read_and_nothing_secret() -> None:
    sent = ["NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "HF_HOME", "TORCH_NCCL_DUMP_ON_TIMEOUT", "PYTORCH_ALLOC_CONF"]
    sent += ["CUDA_DEVICE_ORDER", "TOKENIZERS_PARALLELISM", "VLLM_ATTENTION_BACKEND", "OMP_NUM_THREADS"]
    kept = ["CUDA_VISIBLE_DEVICES", "VLLM_HOST_IP", "HF_TOKEN", "VLLM_API_KEY", "RAY_ADDRESS", "HTTPS_PROXY", "HOME"]
    kept += ["AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "PATH"]
    assert [name for name in sent + kept if is_sent(name)] == sent


def _loopback() -> list[object]:
    import psutil

    return list(psutil.net_if_addrs()["lo"])
