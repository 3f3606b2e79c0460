"""Does locating matter? Train every block of a model by the same small budget, and compare estimators with what came of it.

    python tools/lftf_study.py run --model models/SmolLM2-135M-Instruct --out runs/study
    python tools/lftf_study.py report runs/study --json benchmarks/lftf_study.json --figure docs/images/lftf_study.png

What is asked and how it is decided: docs/lftf_study.md. `run` may be stopped at any moment and started again: what is done is in
the folder, a file for each block and seed. The frozen model runs every row once; what enters each block is kept, so that a block
and those above it are all that its training and its evaluation run. `report` takes what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from lftf_study_report import ESTIMATORS, report

from megatron_ext.bias.scores import afgb_score, pronoun_mass, ub_score
from megatron_ext.errors import UserError
from megatron_ext.files import json_text, write_json, write_whole
from recipes.cli.errors import user_errors

if TYPE_CHECKING:
    from recipes.run.pretrained import Pretrained

TASKS = {"chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}, "simple_equations": {}}
QUESTIONS, TEXTS, TEXT_TOKENS = 64, 64, 96
TEST, HINTED, FREE = "test", "test_hinted", "written"
GOLDEN = 0.6180339887  # blocks in an order that covers all depths however early it ends


@dataclasses.dataclass(frozen=True)
class Budget:
    steps: int
    prompts: int
    lr: float
    loss: str
    locate_prompts: int


class EveryBlock:
    """`BlockInputs` of all blocks, written down in one pass; streams enter at the chosen one."""

    def __init__(self, model, limit: int):
        from megatron_ext.blocks.inputs import BlockInputs

        self.blocks = [BlockInputs(model, block, limit) for block in range(model.model_config.num_layers)]
        self.chosen = 0

    def reserve(self, kind: str, lengths: Sequence[int]) -> bool:
        return all(block.reserve(kind, lengths) for block in self.blocks)

    def has(self, kind: str) -> bool:
        return self.blocks[0].has(kind)

    @contextlib.contextmanager
    def written_down(self, kind, numbers, groups) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(block.written_down(kind, numbers, groups))
            yield

    def share(self, kind: str) -> None:
        for block in self.blocks:
            block.share(kind)

    def enter(self, kind, numbers, batch):
        return self.blocks[self.chosen].enter(kind, numbers, batch)


class Study:
    """A model, what it is asked, and what the frozen one says. One process.

    Args:
        pretrained: the model.
        out: of the study, where the texts are that the frozen model has written: another machine would write others.
    """

    def __init__(self, pretrained: Pretrained, out: Path, budget: Budget, seeds: Sequence[int], gib: float):
        from megatron_ext.bias.prompts import PromptsConfig
        from megatron_ext.runtime.distributed import ParallelSizes, initialize, set_seed
        from recipes.bias.prompts import load_prompt_sets, pair_tokens
        from recipes.bias.streams import RowStreams
        from recipes.cli.config import build
        from recipes.data.tokenizer import load_tokenizer
        from recipes.run.settings import TrainedModel

        self.budget, self.device = budget, initialize(ParallelSizes())
        set_seed(1)
        self.pretrained = pretrained
        tokenizer = load_tokenizer(self.pretrained.tokenizer)
        self.config = build(TrainedModel, self.pretrained.architecture | {"precision": "32"}, "model")
        self.model = self.new_model()
        self.weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        prompts = PromptsConfig()
        self.pair = pair_tokens(tokenizer, (prompts.pair.first, prompts.pair.second))
        self.sets = load_prompt_sets(prompts, tokenizer, self.config.encoder_seq_length)
        test, train = self.sets["test"], self.sets["train"]
        self.hints = torch.tensor([prompt.hint for prompt in test.hinted])
        self.drawn = {seed: self._draw(seed, len(train.bias), len(train.hinted)) for seed in seeds}
        used = [sorted({i for drawn in self.drawn.values() for i in drawn[kind]}) for kind in (0, 1)]
        self.place = [{row: number for number, row in enumerate(rows)} for rows in used]
        self.answers, questions = answers(tokenizer)
        written = out / "written.json"
        if not written.exists():
            write_whole(written, json_text(self._written(tokenizer)))
        texts = json.loads(written.read_text())
        rows = {TEST: test.bias_tokens, HINTED: test.hinted_tokens, FREE: texts} | questions
        rows |= {"bias": [train.bias_tokens[i] for i in used[0]], "hint": [train.hinted_tokens[i] for i in used[1]]}
        self.rows, self.texts = rows, (FREE, *questions)
        self.streams = RowStreams(self.model, rows, self.texts, self.pair)
        self.inputs = EveryBlock(self.model, int(gib * (1 << 30) / self.config.num_layers))
        if left := self.streams.keep(self.inputs):
            raise UserError(f"what enters the blocks does not fit in --gib {gib:g}: no room for {left[0]}; give more")
        self.frozen = {kind: self.streams.ask(kind) for kind in rows}

    def new_model(self):
        from megatron_ext.models import build_gpt

        logging.disable(logging.WARNING)
        model = build_gpt(self.config, self.device)
        logging.disable(logging.NOTSET)
        if hasattr(self, "weights"):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.weights[name])
        else:
            self.pretrained.load(model)
        return model

    def _draw(self, seed: int, bias: int, hinted: int) -> tuple[list[int], list[int]]:
        rng, count = random.Random(seed), self.budget.steps * self.budget.prompts
        if count > min(bias, hinted):
            raise UserError(
                f"--steps x --prompts = {count}, but there are {min(bias, hinted)} training prompts of a kind"
            )
        return rng.sample(range(bias), count), rng.sample(range(hinted), count)

    def _written(self, tokenizer) -> list[list[int]]:
        """Texts that the frozen model writes itself."""
        from megatron_ext.rollouts import MegatronSource, Request, SamplingParams

        begin = [tokenizer.begin_id]
        requests = Request.each([begin], TEXTS, SamplingParams(TEXT_TOKENS))
        (found,) = MegatronSource(self.model).sample(requests)
        return [begin + list(trajectory.tokens) for trajectory in found]

    def rankings(self) -> dict[str, list[float]]:
        from megatron_ext.blocks.importance import rank_blocks

        probe = self.sets["train"].probe(self.pair, self.budget.locate_prompts, 1)
        return {name: list(rank_blocks(name, self.model, probe, ()).scores) for name in ESTIMATORS}

    def scores(self, said: dict[str, list[torch.Tensor]]) -> dict[str, float]:
        p, q = (torch.stack(said[kind]) for kind in (TEST, HINTED))
        found = {
            "afgb": afgb_score(*p.unbind(1)), "ub": ub_score(*q.unbind(1), self.hints),
            "pronoun_mass": pronoun_mass(*p.unbind(1)),
            "perplexity": (-torch.cat(said[FREE]).double().mean()).exp().item(),
        }  # fmt: skip
        for task, lengths in self.answers.items():
            own = [values[-length:].double().sum() for values, length in zip(said[task], lengths, strict=True)]
            found[task] = (torch.stack(own).mean()).item()
        return found

    def train(self, block: int, seed: int, scored_after: Sequence[int] = ()) -> dict[int, dict[str, float]]:
        """The scores after a block's training, and after so many of its steps, by the number of steps."""
        from megatron_ext.blocks.pairs import split_pairs
        from megatron_ext.blocks.places import ModelPlace
        from megatron_ext.blocks.training import train_only_places
        from megatron_ext.losses.lftf import BIAS_LOSSES, loss_weights, pair_loss
        from megatron_ext.runtime.engine import Engine
        from megatron_ext.runtime.optim import OptimConfig
        from recipes.bias.streams import LFTFMicrobatch, RowStreams

        model, budget, weights = self.new_model(), self.budget, loss_weights(self.budget.loss)
        train_only_places(model, [ModelPlace(block)])
        engine = Engine(model, OptimConfig(name="adam", lr=budget.lr), budget.steps)
        streams = RowStreams(model, self.rows, self.texts, self.pair)
        streams.inputs, self.inputs.chosen = self.inputs, block

        def loss(microbatch, logprobs, entropy):
            names = [name for name in weights if (name in BIAS_LOSSES) == (microbatch.kind == "bias")]
            he, she = split_pairs(logprobs)
            found = sum(weights[n] * pair_loss(n, he, she, microbatch.frozen).sum() for n in names) / microbatch.total
            return found, {"loss": found.detach()}

        found = {}
        for step in range(budget.steps):
            microbatches = []
            for number, kind in enumerate(("bias", "hint")):
                drawn = self.drawn[seed][number][step * budget.prompts :][: budget.prompts]
                rows = [self.place[number][row] for row in drawn]
                frozen = torch.stack([self.frozen[kind][row] for row in rows]).to(self.device)
                batch = streams.batch(kind, rows)
                microbatches.append(LFTFMicrobatch(batch, kind=kind, frozen=frozen, total=budget.prompts))
            engine.update(microbatches, loss)
            if step + 1 in (*scored_after, budget.steps):
                found[step + 1] = self.scores({kind: streams.ask(kind) for kind in (TEST, HINTED, *self.texts)})
        return found


def answers(tokenizer) -> tuple[dict[str, list[int]], dict[str, list[list[int]]]]:
    """Of each task, the tokens of each answer, counted, and the questions with their answers."""
    from tools.make_reasoning_gym import entries

    lengths: dict[str, list[int]] = {}
    rows: dict[str, list[list[int]]] = {}
    for task, settings in TASKS.items():
        pairs = []
        for entry in entries(task, settings, QUESTIONS, 1):
            question, answer = tokenizer.encode_pair(f"Question: {entry['question']}\nAnswer:", f" {entry['answer']}")
            pairs.append((question, answer))
        lengths[task] = [len(answer) for _, answer in pairs]
        rows[task] = [[*question, *answer] for question, answer in pairs]
    return lengths, rows


def order_of(num_layers: int) -> list[int]:
    return sorted(range(num_layers), key=lambda block: (block + 1) * GOLDEN % 1)


def run(options: argparse.Namespace) -> None:
    from megatron_ext.blocks.blocks import check_block
    from recipes.run.pretrained import Pretrained

    warnings.simplefilter("ignore")
    for name in ("threads", "steps", "prompts", "locate_prompts"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    for name in ("lr", "gib"):
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"--{name} {getattr(options, name):g} must be a number above 0")
    torch.set_num_threads(options.threads)
    budget = Budget(options.steps, options.prompts, options.lr, options.loss, options.locate_prompts)
    options.out.mkdir(parents=True, exist_ok=True)
    plan: dict = {"budget": dataclasses.asdict(budget)}
    if options.scored_after:
        after = plan["scored_after"] = sorted({*options.scored_after})
        if after[0] < 1 or after[-1] >= budget.steps:
            raise UserError(f"--scored-after {after}: wants numbers of steps below --steps {budget.steps}")
    path, pretrained = options.out / "plan.json", Pretrained.open(str(options.model))
    layers = pretrained.architecture["num_layers"]
    for block in options.blocks or ():
        check_block(block, layers)
    plan |= {
        "model": options.name or options.model.resolve().name,
        "weights": pretrained.digest(),
        "blocks": layers,
    }
    if path.exists() and json.loads(path.read_text()) != plan:
        raise UserError(f"{path} is of another study (another model or budget): choose another --out")
    write_json(path, plan)
    study = Study(pretrained, options.out, budget, options.seeds, options.gib)
    before = options.out / "before.json"
    rankings = json.loads(before.read_text())["rankings"] if before.exists() else study.rankings()
    found = {"scores": study.scores(study.frozen), "rankings": rankings}
    write_json(before, found)
    print("before", found["scores"], flush=True)
    for seed in options.seeds:
        for block in options.blocks or order_of(layers):
            path = options.out / f"block-{block}-seed-{seed}.json"
            if path.exists():
                continue
            on_the_way = study.train(block, seed, plan.get("scored_after", ()))
            found = on_the_way.pop(budget.steps)
            curve = {"on the way": on_the_way} if on_the_way else {}
            write_json(path, {"block": block, "seed": seed, "scores": found} | curve)
            print(f"seed {seed} block {block}", {name: round(value, 4) for name, value in found.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="train what is not done yet")
    one.add_argument("--model", type=Path, required=True, help="Hugging Face folder or checkpoint of ours")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--name", help="of the model, in the report; default: its folder's")
    one.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    one.add_argument("--blocks", type=int, nargs="+", help="only these")
    one.add_argument("--steps", type=int, default=8)
    one.add_argument("--scored-after", type=int, nargs="+", default=[], help="also after so many of the steps")
    one.add_argument("--prompts", type=int, default=32, help="of either kind in a step")
    one.add_argument("--lr", type=float, default=1e-4)
    one.add_argument("--loss", default="balanced+hint")
    one.add_argument("--locate-prompts", type=int, default=128)
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--gib", type=float, default=8, help="of memory for what enters the blocks")
    one.set_defaults(work=run)
    two = commands.add_parser("report", help="what is done, compared")
    two.add_argument("folder", type=Path)
    two.add_argument("--json", type=Path, required=True)
    two.add_argument("--figure", type=Path)
    two.set_defaults(work=report)
    options = parser.parse_args()
    with user_errors():
        options.work(options)


if __name__ == "__main__":
    main()
