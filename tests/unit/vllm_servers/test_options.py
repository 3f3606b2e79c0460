"""Settings of servers that do not go together are refused."""

from __future__ import annotations

import pytest

from megatron_ext.errors import UserError
from megatron_ext.vllm_servers.options import TOLERANCES, VllmOptions

URL = "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "either urls"),
        ({"urls": (URL,), "start": 1}, "either urls"),
        ({"start": -1}, "must not be negative"),
        ({"urls": ("127.0.0.1:8000",)}, "no address of a server"),
        ({"urls": ("http://",)}, "no address of a server"),
        ({"urls": (URL, URL)}, "twice"),
        ({"start": 2, "cuda_devices": ("1",)}, "give one for each"),
        ({"urls": (URL,), "cuda_devices": ("1",)}, "give one for each"),
        ({"urls": (URL,), "arguments": ("--enforce-eager",)}, "not for urls"),
        ({"start": 1, "arguments": ("--dtype", "float16")}, "--dtype"),
        ({"start": 1, "arguments": ("--logprobs-mode=raw_logprobs",)}, "--logprobs-mode"),
        ({"start": 1, "timeout": 0.0}, "positive"),
        ({"start": 1, "patience": -1.0}, "positive"),
        ({"start": 1, "max_restarts": -1}, "max_restarts"),
        ({"start": 1, "tolerance": 0.0}, "tolerance"),
        ({"start": 1, "in_flight": "wait"}, "must be keep or abort, got 'wait'"),
        ({"urls": (URL, "http://node7:8000")}, "weights_dir, or set weights=nccl"),
        ({"urls": (URL,), "rendezvous": "/shared/meet"}, "say in start how many on each"),
        ({"start": 1, "rendezvous": "/shared/meet", "host": "10.0.0.5"}, "leave host out"),
        ({"start": 1, "weights": "gloo"}, "weights must be folder or nccl, got 'gloo'"),
        ({"urls": (URL,), "weights": "nccl", "weights_dir": "/shared"}, "weights_dir=/shared is for weights=folder"),
        ({"start": 1, "arguments": ("--weight-transfer-config", "{}")}, "--weight-transfer-config"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict, words: str):
    with pytest.raises(UserError, match=words):
        VllmOptions(**given)


def test_servers_elsewhere_read_weights_from_a_folder_that_is_named():
    assert str(VllmOptions(urls=("http://node7:8000",), weights_dir="/shared").folder) == "/shared"
    assert str(VllmOptions(urls=(URL,)).folder) == "/dev/shm"
    assert str(VllmOptions(start=1, rendezvous="/shared/meet").folder) == "/shared/meet"


def test_a_tolerance_that_is_said_is_taken():
    assert VllmOptions(start=1).tolerance_of("float32") == 1e-4
    assert VllmOptions(start=1, tolerance=0.3).tolerance_of("bfloat16") == 0.3
    assert TOLERANCES["float32"] < TOLERANCES["float16"] < TOLERANCES["bfloat16"]


def test_servers_elsewhere_need_no_folder_where_weights_come_by_nccl():
    assert VllmOptions(urls=("http://node7:8000",), weights="nccl").weights_dir is None
