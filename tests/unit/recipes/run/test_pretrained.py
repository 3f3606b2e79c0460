"""The model that a run starts from: what of its architecture a YAML takes over."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_ext.models import GPTModelConfig
from megatron_ext.models.config import PositionEmbedding
from megatron_ext.runtime.checkpoint import INFO_FILE, WEIGHTS_FOLDER
from megatron_ext.runtime.checkpoint_files import self_checksum
from recipes.run.pretrained import Pretrained, configure


@dataclasses.dataclass
class Config:
    model: GPTModelConfig
    pretrained_checkpoint: dict


def checkpoint(folder: Path, head: int, position: PositionEmbedding, old: bool = False) -> Path:
    """What of a checkpoint says which model it holds; `old`: from before there were sections."""
    config = GPTModelConfig(2, 64, 4, 128, kv_channels=head, vocab_size=99, position_embedding=position, precision="32")
    model = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    model["position_embedding"] = dataclasses.asdict(position)
    if old:
        del model["position_embedding"]["sections"]
    info = {"model": model}
    (folder / WEIGHTS_FOLDER).mkdir(parents=True)
    (folder / INFO_FILE).write_text(json.dumps(info | {"checksum": self_checksum(info)}))
    return folder


@pytest.mark.parametrize(
    ("head", "position", "sections"),
    [
        (64, {"scheme": "mrope_interleaved"}, [12, 10, 10]),  # as it was divided then; today [11, 11, 10]
        (256, {"scheme": "mrope_interleaved", "percent": 0.25}, [12, 10, 10]),
        (128, {"scheme": "mrope_interleaved"}, None),
        (64, {"scheme": "mrope"}, None),
        (64, {"scheme": "rope"}, None),
    ],
)
def test_a_checkpoint_from_before_there_were_sections_keeps_how_it_was_trained(tmp_path, head, position, sections):
    old = checkpoint(tmp_path / "old", head, PositionEmbedding(**position), old=True)
    new = checkpoint(tmp_path / "new", head, PositionEmbedding(**position))
    for folder, expected in ((old, sections), (new, None)):
        config, _ = configure(Config, {"model": {}, "pretrained_checkpoint": {"restore_from_path": str(folder)}})
        assert config.model.position_embedding.sections == expected
        Pretrained.open(str(folder)).check(config.model)


def test_sections_go_with_the_scheme_that_they_belong_to(tmp_path):
    folder = checkpoint(tmp_path / "model", 64, PositionEmbedding("mrope_interleaved", sections=[16, 8, 8]))
    start = {"pretrained_checkpoint": {"restore_from_path": str(folder)}}
    for given, expected in (
        ({}, [16, 8, 8]),
        ({"base": 100.0}, [16, 8, 8]),
        ({"scheme": "mrope_interleaved"}, [16, 8, 8]),
        ({"scheme": "vrope"}, None),
        ({"scheme": "mrope", "sections": [0, 16, 16]}, [0, 16, 16]),
    ):
        config, _ = configure(Config, start | {"model": {"position_embedding": given}})
        assert config.model.position_embedding.sections == expected, given
