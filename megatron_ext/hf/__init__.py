"""Hugging Face models in and out, of the families in `families` and `multimodal`, in safetensors alone."""

from megatron_ext.hf.config import hf_model_config, is_hf_folder, make_hf_config, read_hf_config
from megatron_ext.hf.export import export_hf
from megatron_ext.hf.files import hf_weights_digest
from megatron_ext.hf.load import load_hf_weights, read_checked_config
from megatron_ext.hf.patch import apply_patch, make_patch

__all__ = [
    "apply_patch", "export_hf", "hf_model_config", "hf_weights_digest", "is_hf_folder", "load_hf_weights", "make_hf_config",
    "make_patch", "read_checked_config", "read_hf_config",
]  # fmt: skip
