"""What is written down of a machine is this one, and names nobody."""

from __future__ import annotations

import os
import platform
import socket
import sys
from importlib.metadata import version

import torch

from megatron_ext.runtime.machine import machine, versions


def test_it_is_this_machine():
    found = machine()
    assert found["cores"] == os.cpu_count() and found["threads"] == torch.get_num_threads()
    assert found["gpu"] is None and found["cpu"] and found["system"] == f"{platform.system()} {platform.machine()}"
    assert socket.gethostname() not in found.values()


def test_versions_are_those_that_are_installed():
    found = versions(["torch", "no-such-package"])
    assert found == {"python": sys.version.split()[0], "torch": version("torch"), "no-such-package": None}
