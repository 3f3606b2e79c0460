"""How long 100,000 rows take to become tokens, and a run on them to begin.

    python tools/bench_rows.py --against ../another-checkout

Rows are prompts in plain text, and conversations; the tokenizer is a byte-level BPE of 16,384 tokens, trained on this
repository's documentation, as the texts are drawn from. The other checkout reads rows in each rank by itself. Each reading is a
process of its own, whose imports do not count; each run is a whole process of one step on two ranks. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench_common import print_table, record, write_results

ROOT = Path(__file__).resolve().parent.parent
READ = """
import json, resource, sys, time
from recipes.data.rows import {imports}
from recipes.data.tokenizer import load_tokenizer
import torch
tokenizer = load_tokenizer(sys.argv[2])
def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
begun, before = time.perf_counter(), cpu()
{load}
print(json.dumps([time.perf_counter() - begun, cpu() - before, len(rows)]))
"""
ALONE = READ.format(imports="load_prompts", load="rows = load_prompts(sys.argv[1], tokenizer, 4096)")
KEPT = READ.format(
    imports="PromptReading\nfrom recipes.data.token_cache import TokenCache",
    load="rows = TokenCache(sys.argv[3], int(sys.argv[4])).load(sys.argv[1], PromptReading(tokenizer, 4096))",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_data(folder: Path, count: int) -> None:
    """A tokenizer and three files of rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16384, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer/tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "chat_template": TEMPLATE}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    words, rng = " ".join(texts).split(), random.Random(1)
    with open(folder / "prompts.jsonl", "w") as plain, open(folder / "chats.jsonl", "w") as chats:
        with open(folder / "pairs.jsonl", "w") as pairs:
            for number in range(count):
                start = rng.randrange(len(words) - 400)
                text = " ".join(words[start : start + rng.randint(20, 180)])
                plain.write(json.dumps({"prompt": text, "answer": str(number)}) + "\n")
                pairs.write(json.dumps({"prompt": text, "response": f" {number}"}) + "\n")
                talk = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": text}]
                chats.write(json.dumps({"messages": talk, "answer": str(number)}) + "\n")


def read(checkout: Path, program: str, *arguments: object) -> tuple[float, float]:
    """(seconds, CPU seconds of all its processes) of one reading."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: a reading in {checkout} failed: {done.stderr[-2000:]}")
    wall, cpu, _ = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu


def start(checkout: Path, data: Path, out: Path, *overrides: str) -> tuple[float, float]:
    """(seconds, CPU seconds) of a run of one step."""
    command = [
        sys.executable, "recipes/train_sft.py", "--config-name", "sft_tiny", f"data.train_path={data / 'pairs.jsonl'}",
        f"model.tokenizer={data / 'tokenizer'}", f"exp_manager.explicit_log_dir={out}", "trainer.devices=2",
        "trainer.sft.max_steps=1", "model.encoder_seq_length=512", "model.micro_batch_size=4", "model.global_batch_size=8",
        "model.loss_on_prompt=false", *overrides,
    ]  # fmt: skip
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} in {checkout} failed: {done.stderr[-2000:]}")
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-starts", action="store_true", help="readings alone")
    parser.add_argument("--against", type=Path, required=True, help="a checkout of before rows were kept in tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/rows_cpu.json")
    args = parser.parse_args()
    other = args.against.resolve()
    seconds: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench_rows_") as place:
        data = Path(place)
        make_data(data, args.rows)
        for number in range(args.runs):
            for file in ("prompts", "chats"):
                given, kept = (data / f"{file}.jsonl", data / "tokenizer"), data / f"kept-{file}"
                shutil.rmtree(kept, ignore_errors=True)
                for name, found in (
                    (f"{file}, one rank before", read(other, ALONE, *given)),
                    (f"{file}, {args.processes} processes", read(ROOT, KEPT, *given, kept, args.processes)),
                    (f"{file}, kept", read(ROOT, KEPT, *given, kept, args.processes)),
                ):
                    seconds.setdefault(name, []).append([round(x, 3) for x in found])
            kept = data / f"run-{number}-kept"
            for name, found in (
                ()
                if args.no_starts
                else (
                    ("run, before", start(other, data, data / f"run-{number}-before")),
                    (
                        "run, nothing kept yet",
                        start(ROOT, data, data / f"run-{number}-cold", f"data.token_cache={kept}"),
                    ),
                    ("run, kept", start(ROOT, data, data / f"run-{number}-warm", f"data.token_cache={kept}")),
                )
            ):
                seconds.setdefault(name, []).append([round(x, 2) for x in found])
    rows, medians = [], {name: [median(x) for x in zip(*found, strict=True)] for name, found in seconds.items()}
    for name, (wall, cpu) in medians.items():
        what = name.split(",")[0]
        base = next(value for other_name, value in medians.items() if other_name.startswith(what))
        rate = "" if what == "run" else f"{args.rows / wall:,.0f}"
        rows.append([name, f"{wall:.2f}", f"{cpu:.2f}", rate, f"{base[0] / wall:.2f}", f"{base[1] / cpu:.2f}"])
    header = ["", "seconds", "CPU seconds", "rows/s", "times as fast", "of CPU seconds"]
    print_table(f"{args.rows:,} rows, medians of {args.runs}", header, rows)
    against = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=other, capture_output=True, text=True)
    settings = {"rows": args.rows, "runs": args.runs, "processes": args.processes, "against": against.stdout.strip()}
    write_results(args.out, record(**settings) | {"seconds": seconds})


if __name__ == "__main__":
    main()
