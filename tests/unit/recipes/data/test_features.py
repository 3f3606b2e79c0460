"""Features that were made before: any type, opened by their shape alone, refused where they end early."""

from __future__ import annotations

import json
import math
import struct
import sys

import numpy as np
import pytest
import torch

from megatron_ext.rotary import Video
from recipes.data.errors import VideoError
from tests.unit.recipes.data.clip_cases import opened


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_precomputed_features(suffix, tmp_path, rng):
    from safetensors.torch import save_file

    features = torch.randn(2, 3, 4, 10, generator=rng)
    path = tmp_path / f"features{suffix}"
    np.save(path, features.numpy()) if suffix == ".npy" else save_file({"features": features}, path)
    found = opened({"features": path.name}, tmp_path, 10)
    assert found.grid == Video(2, 3, 4) and torch.equal(found.features(), features.flatten(0, 2))


def large(path, shape=(16, 16, 1024, 1024)) -> None:
    """A sparse file with 1 GiB of zeros for features."""
    size = 4 * math.prod(shape)
    with open(path, "wb") as file:
        if path.suffix == ".npy":
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        else:
            header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
            file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(file.tell() + size)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_opening_features_reads_their_shape_only(suffix, tmp_path):
    from tools.bench_common import PeakMemory

    large(tmp_path / f"large{suffix}")
    with PeakMemory(torch.device("cpu")) as peak:
        found = opened({"features": f"large{suffix}"}, tmp_path, 1024)
    assert found.grid == Video(16, 16, 1024) and peak.growth < 1 << 28


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_features_that_end_early(suffix, tmp_path):
    path = tmp_path / f"cut{suffix}"
    large(path, (2, 2, 2, 4))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VideoError, match=f"rows.jsonl:1: cannot read features .*cut{suffix}: "):
        opened({"features": path.name}, tmp_path, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_become_fp32(dtype, tmp_path, rng):
    from safetensors.torch import save_file

    features = torch.randn(1, 2, 2, 5, generator=rng).to(dtype)
    save_file({"features": features}, tmp_path / "f.safetensors")
    found = opened({"features": "f.safetensors"}, tmp_path, 5).features()
    assert found.dtype == torch.float32 and torch.equal(found, features.flatten(0, 2).float())
