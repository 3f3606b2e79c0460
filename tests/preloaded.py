"""What a rank or a script of the tests has imported when it is forked: each alone would take seconds for it."""

import importlib

from megatron_ext.runtime.cpu import import_megatron

import_megatron()
for name in (
    "hydra", "lightning.pytorch.loggers", "nemo.utils.exp_manager", "torch.utils.tensorboard", "transformers",
    "megatron_ext.models", "megatron_ext.runtime.engine", "megatron_ext.runtime.checkpoint", "megatron_ext.hf",
    "recipes.cli.compose", "recipes.sft.trainer", "recipes.grpo.trainer", "recipes.bias.trainer",
):  # fmt: skip
    importlib.import_module(name)
