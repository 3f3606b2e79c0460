"""How a model sees: vision towers of transformers, what they are shown, connectors into a language model, kept features."""

from megatron_ext.vision.pixels import Pixels
from megatron_ext.vision.settings import VisionConfig
from megatron_ext.vision.tower import VisionTower

__all__ = ["Pixels", "VisionConfig", "VisionTower"]
