"""Who a process is, from what mlx.launch leaves in its environment."""

from __future__ import annotations

import json

import pytest

from localrl.distributed.launch import LaunchInfo, find_place
from localrl.errors import ConfigError


def test_alone():
    assert find_place({}) is None


@pytest.mark.parametrize("text", ["", '[["127.0.0.1:5000"]]'])
def test_a_launch_of_one_is_alone(tmp_path, text):
    (tmp_path / "hosts").write_text(text)
    assert find_place({"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts")}) is None


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_ring(tmp_path, rank):
    hosts = [["10.0.0.1:32323", "10.1.0.1:32324"], ["10.0.0.2:32325"], ["10.0.0.3:32326"]]
    (tmp_path / "hosts").write_text(json.dumps(hosts))
    environment = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(tmp_path / "hosts")}
    assert find_place(environment) == LaunchInfo(rank, 3, "ring", "10.0.0.1", 32322)


def test_jaccl(tmp_path):
    (tmp_path / "devices").write_text(json.dumps([[None, "rdma_en5"], ["rdma_en5", None]]))
    environment = {
        "MLX_RANK": "1",
        "MLX_JACCL_COORDINATOR": "[fe80::1]:32323",
        "MLX_IBV_DEVICES": str(tmp_path / "devices"),
    }
    assert find_place(environment) == LaunchInfo(1, 2, "jaccl", "fe80::1", 32322)


def test_another_backend_is_refused():
    with pytest.raises(ConfigError, match=r"mlx\.launch --backend ring"):
        find_place({"MLX_RANK": "0"})
