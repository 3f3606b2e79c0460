"""TRL's own loss, on one Hugging Face model with one batch and the same old and reference log-probabilities: loss and every
gradient.

`make trl` installs TRL, or TRL_PYTHON names an interpreter that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.grouping import pack
from megatron_ext.hf import export_hf
from megatron_ext.losses import OBJECTIVES, GrpoTerms, grpo_loss, token_weights
from megatron_ext.models.prompt_streams import text_logits
from tests.conftest import fresh_generator
from tests.gpt_cases import run
from tests.harness import ROOT
from tests.hf_folders import imported, tensors
from tests.hf_models import VOCAB, make_hf_model
from tests.layouts import randn
from tests.vllm_cases import make_tokenizer

MADE = ROOT / ".venv-trl"
PYTHON = Path(os.environ.get("TRL_PYTHON", MADE / "bin/python"))
pytestmark = [
    pytest.mark.functional,
    pytest.mark.skipif(
        not (PYTHON.exists() if "TRL_PYTHON" in os.environ else (MADE / "stamp").exists()),
        reason=f"no TRL in {PYTHON}: `make trl` installs it, or TRL_PYTHON names an interpreter that has it",
    ),
]

LENGTHS = [(7, [3, 5]), (4, [6, 1]), (9, [2, 12])]
LONGEST = 12
CLIP = {"epsilon": 0.2, "epsilon_high": 0.2}
# name -> (our objective, its options, TRL's).
OBJECTIVE_CASES = {
    "grpo": ("grpo", {"normalisation": "sequence"}, {"loss_type": "grpo"} | CLIP),
    "dapo": ("dapo", {}, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "dr_grpo": ("dr_grpo", {}, {"loss_type": "dr_grpo"} | CLIP),
    "dual clip": ("dual_clip", {"ratio_max": 1.3, "normalisation": "sequence"}, {"loss_type": "grpo", "delta": 1.3} | CLIP),
    "gspo": (
        "gspo",
        {},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo, wide": (
        "gspo",
        {"ratio_clip_min": 0.2, "ratio_clip_max": 0.2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"} | CLIP,
    ),
    "cispo": ("cispo", {"ratio_max": 1.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": ("sapo", {}, {"loss_type": "sapo"}),
    "sapo, steep": (
        "sapo",
        {"temperature_positive": 2.0, "temperature_negative": 4.0},
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 4.0},
    ),
}  # fmt: skip
# Where ratios, of tokens or of responses, are clipped in any of them.
CLIPS = torch.tensor([0.8, 1.2, 1.28, 1.3, 1 - 3e-4, 1 + 4e-4], dtype=torch.float64)
# TRL weighs the penalty by the ratio that the objective has: under gspo by the response's, where ours is the token's own.
KL_CASES = {"none": {}, "k3": {"kl_penalty": 0.3}, "weighted": {"kl_penalty": 0.3, "kl_weighted": True}}
CASES = [
    (name, kl) for name in OBJECTIVE_CASES for kl in KL_CASES if not (name.startswith("gspo") and kl == "weighted")
]


def trl_options(name: str, kl: str) -> dict:
    terms = KL_CASES[kl]
    penalty = {"beta": terms.get("kl_penalty", 0.0), "use_bias_correction_kl": terms.get("kl_weighted", False)}
    return OBJECTIVE_CASES[name][2] | penalty | {"max_completion_length": LONGEST}


class Comparison:
    """One model and batch; what TRL makes of it in each case, and the means to make the same."""

    def __init__(self, folder: Path, device: torch.device):
        rng = fresh_generator()
        self.folder = folder
        make_tokenizer(folder / "model")
        make_hf_model(folder / "model", "qwen3 tied", rng)
        self.model = imported(folder / "model", device).double()
        prompts = [torch.randint(VOCAB, (p,), generator=rng).tolist() for p, _ in LENGTHS]
        responses = [[torch.randint(VOCAB, (n,), generator=rng).tolist() for n in s] for _, s in LENGTHS]
        self.batch = pack(prompts, responses, 16)
        with torch.no_grad():
            logprobs, _ = run(self.model, self.batch)
            whole = [p + r for p, group in zip(prompts, responses, strict=True) for r in group]
            # Of TRL's logits, in fp32: half a unit in the last place of 1, times the largest.
            self.rounding = 2**-24 * max(float(text_logits(self.model, row).abs().max()) for row in whole)
        groups, near = self.batch.groups, True
        while near:  # a ratio at a clip: TRL's rounding would say which side it is on
            self.old, self.reference = (logprobs + 0.3 * randn(rng, len(logprobs)) for _ in range(2))
            moved = logprobs - self.old
            of_responses = [moved[groups.response_ids == i].mean() for i in range(groups.num_responses)]
            ratios = torch.cat((moved, torch.stack(of_responses))).exp()
            near = bool(((ratios[:, None] - CLIPS).abs() < 1e-4).any())
        self.gains = randn(rng, groups.num_responses)
        # One that no clip of its response stops.
        self.gains[0] = -of_responses[0].sign() * self.gains[0].abs()
        self._write(prompts, responses)
        done = subprocess.run(
            [PYTHON, ROOT / "tests/programs/trl_losses.py", folder],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def _write(self, prompts: list[list[int]], responses: list[list[list[int]]]) -> None:
        flat = [(p, r) for p, group in zip(prompts, responses, strict=True) for r in group]
        longest = max(len(p) for p, _ in flat)
        counts = [len(r) for _, r in flat]
        rows = [torch.split(x, counts) for x in (self.old, self.reference)]
        batch = {
            "prompt_ids": torch.tensor([[0] * (longest - len(p)) + p for p, _ in flat]),
            "prompt_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in flat]),
            "completion_ids": torch.tensor([r + [0] * (LONGEST - len(r)) for _, r in flat]),
            "completion_mask": torch.tensor([[1] * len(r) + [0] * (LONGEST - len(r)) for _, r in flat]),
            "advantages": self.gains,
            "num_items_in_batch": torch.tensor(sum(counts)),
        }
        for name, parts in zip(("old_per_token_logps", "ref_per_token_logps"), rows, strict=True):
            batch[name] = torch.stack([torch.nn.functional.pad(part, (0, LONGEST - len(part))) for part in parts])
        save_file(batch, str(self.folder / "batch.safetensors"))
        (self.folder / "cases.json").write_text(json.dumps([trl_options(*case) for case in CASES]))

    def theirs(self, case: tuple[str, str]) -> dict[str, torch.Tensor]:
        return load_file(str(self.folder / f"{CASES.index(case)}.safetensors"))

    def ours(self, case: tuple[str, str], out: Path) -> dict[str, torch.Tensor]:
        """Gradients by Hugging Face's names: written as if they were weights; and by how much at most the loss moves if every
        log-probability does by 1."""
        name, options, _ = OBJECTIVE_CASES[case[0]]
        objective, groups = OBJECTIVES[name](**options), self.batch.groups
        ids, count = groups.response_ids, groups.num_responses
        mask = torch.ones(len(ids), dtype=torch.bool)
        weights = token_weights(ids, mask, count, len(ids), count, objective.normalisation, float(count * LONGEST))
        self.model.zero_grad(set_to_none=True)
        logprobs, entropy = run(self.model, self.batch)
        logprobs.retain_grad()
        terms = GrpoTerms(objective, **KL_CASES[case[1]])
        reference = self.reference if terms.kl_penalty else None
        loss, _ = grpo_loss(logprobs, self.old, self.gains[ids], weights, terms, reference, entropy, ids, count)
        loss.backward()
        weights = {n: p.data for n, p in self.model.named_parameters()}
        for parameter in self.model.parameters():
            parameter.data = parameter.grad
        export_hf(self.model, out)
        for n, parameter in self.model.named_parameters():
            parameter.data = weights[n]
        return tensors(out) | {"loss": loss.detach().reshape(1), "reach": logprobs.grad.abs().sum()}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, world) -> Comparison:
    return Comparison(tmp_path_factory.mktemp("trl"), world)


@pytest.mark.parametrize("case", CASES, ids=[f"{name}, KL {kl}" for name, kl in CASES])
def test_loss_and_every_gradient_are_trls(case, comparison, tmp_path):
    """fp64 on both sides, but for TRL's logits, which are fp32. The loss to 32 of their roundings in every log-probability, of
    which 2 are seen; a gradient to 200 of its largest entry, of which 11 are, or, of norms, whose small gradients are sums
    of large ones that cancel, to 50 of the largest of all, of which 5 are."""
    ours, theirs = comparison.ours(case, tmp_path / "gradients"), comparison.theirs(case)
    assert abs(ours.pop("loss") - theirs.pop("loss")) <= 32 * comparison.rounding * ours.pop("reach")
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert torch.count_nonzero(gradient), name
        floor = 50 * comparison.rounding * largest if "norm" in name else 0
        bound = max(200 * comparison.rounding * gradient.abs().max(), floor)
        assert (ours[name] - gradient).abs().max() <= bound, name
