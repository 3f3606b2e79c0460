"""Time and weigh the way of Hugging Face weights in and out, against copying the same files with cp.

    python tools/bench_convert.py
    python tools/bench_convert.py --layers 4 --repeats 3 --folder /mnt/fast

A Llama of 2 GB in bf16 with random weights is written to a temporary folder, in four files, and removed at the end. Three times
that room is needed. In one process per rank, all variants in turn:

- load: `load_hf_weights` into a model that is there (read, cut for the rank, checked); the files are in the page cache.
- export: `export_hf` to a new folder, flushed to the disk.
- save: `save_checkpoint`, flushed to the disk; load and save are `convert_hf.py import` but for its start and random weights.
- cp: `cp` of the same files to a new folder; cp and flush: the same, then fsync of every file and of the folder, as export does.

Memory: the growth of each rank's resident set over the state with the model in memory, in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import MIB, ROOT, PeakMemory, print_table, ratios, record, spread, write_results

SIZES = ("layers", "hidden", "heads", "groups", "ffn", "vocab")
TARGET = 0.5  # of cp's throughput


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in zip(SIZES, (16, 2048, 32, 8, 8192, 32768), strict=True):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not counted")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, divided among the ranks")
    parser.add_argument(
        "--folder", type=Path, help="where the files are written (default: the system's temporary folder)"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "convert_cpu.json")
    parser.add_argument("--worker", choices=("time", "memory"), help=argparse.SUPPRESS)
    return parser.parse_args()


def make_folder(args: argparse.Namespace, folder: Path) -> int:
    """A model folder as if downloaded, written file by file; returns its bytes of tensors."""
    from megatron_ext.hf import make_hf_config
    from megatron_ext.hf.files import create_files, plan_files
    from megatron_ext.hf.mapping import hf_shapes
    from megatron_ext.hf.tensors import TensorWriter
    from megatron_ext.models import GPTModelConfig

    config = GPTModelConfig(
        num_layers=args.layers, hidden_size=args.hidden, num_attention_heads=args.heads, num_query_groups=args.groups,
        ffn_hidden_size=args.ffn, vocab_size=args.vocab, precision="bf16",
    )  # fmt: skip
    shapes = hf_shapes(config)
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * 2
    slots, beginnings = plan_files(shapes, torch.bfloat16, total // 4 + total // 40)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_hf_config(config) | {"dtype": "bfloat16"}))
    create_files(folder, slots, beginnings)
    writer = TensorWriter(folder, slots)
    draws = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.write(name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=draws))
    if error := writer.close():
        raise error
    return total


def cp(source: Path, target: Path, flushed: bool) -> None:
    target.mkdir()
    subprocess.run(["cp", *map(str, source.iterdir()), str(target)], check=True)
    if flushed:
        for path in (*target.iterdir(), target):
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)


def build(args: argparse.Namespace):
    """This rank's model with the weights of the folder."""
    from megatron_ext.hf import hf_model_config, load_hf_weights
    from megatron_ext.models import build_gpt
    from megatron_ext.runtime.distributed import ParallelSizes, initialize

    tp = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, args.threads // tp))
    device = initialize(ParallelSizes(tensor=tp))
    config = hf_model_config(args.folder / "model", precision="bf16", tensor_model_parallel_size=tp)
    model = build_gpt(config, device)
    load_hf_weights(args.folder / "model", model)
    return model


def variants(args: argparse.Namespace, model) -> dict[str, Callable[[Path], object]]:
    """Each takes a new folder to write to."""
    import torch.distributed as dist

    from megatron_ext.hf import export_hf, load_hf_weights
    from megatron_ext.runtime.checkpoint import save_checkpoint

    source = args.folder / "model"
    first = dist.get_rank() == 0
    return {
        "load": lambda target: load_hf_weights(source, model),
        "export": lambda target: export_hf(model, target, source, max_shard_size=args.shard),
        "save": lambda target: save_checkpoint(target, model, {}),
        "cp": lambda target: cp(source, target, False) if first else None,
        "cp and flush": lambda target: cp(source, target, True) if first else None,
    }


def measure_time(args: argparse.Namespace) -> dict:
    """Seconds until all ranks are done, by variant and round; A B C, B C A, ..."""
    import torch.distributed as dist

    run = variants(args, build(args))
    names = list(run)
    times: dict[str, list[float]] = {name: [] for name in names}
    target = args.folder / "target"
    for number in range(args.repeats + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if dist.get_rank() == 0:
                os.sync()  # nothing of an earlier variant is still to be written
            dist.barrier()
            begin = time.perf_counter()
            run[name](target)
            dist.barrier()
            seconds = time.perf_counter() - begin
            if dist.get_rank() == 0:
                shutil.rmtree(target, ignore_errors=True)
            if number:
                times[name].append(seconds)
    return times


def measure_memory(args: argparse.Namespace) -> dict:
    """Bytes beyond the model, on the rank that needs most."""
    import torch.distributed as dist

    model = build(args)
    run = variants(args, model)
    target = args.folder / "target"
    device = next(model.parameters()).device
    found = {}
    for name in ("load", "export"):
        with PeakMemory(device) as peak:
            run[name](target)
        growth = torch.tensor(peak.growth)
        dist.all_reduce(growth, op=dist.ReduceOp.MAX)
        found[name] = int(growth)
    if dist.get_rank() == 0:
        shutil.rmtree(target)
    return found


def on_ranks(args: argparse.Namespace, what: str, tp: int) -> dict:
    """Run this script on so many ranks; rank 0's last line is the answer."""
    own = [f"--{name}={getattr(args, name)}" for name in (*SIZES, "repeats", "threads", "folder")]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = str(max(1, args.threads // tp))
    done = subprocess.run(
        [*command, __file__, f"--worker={what}", *own], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = arguments()
    if args.worker:
        total = sum(path.stat().st_size for path in (args.folder / "model").iterdir())
        args.shard = total // 4 + total // 40
        found = {"time": measure_time, "memory": measure_memory}[args.worker](args)
        if os.environ["RANK"] == "0":
            print(json.dumps(found), flush=True)
        return
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        args.folder = Path(name)
        size = make_folder(args, args.folder / "model")
        if shutil.disk_usage(name).free < 2 * size:
            raise SystemExit(f"{name} has no room for two more copies of {size / 1e9:.1f} GB; name another --folder")
        largest = max(args.vocab, args.ffn) * args.hidden * 2
        files = len(list((args.folder / "model").glob("*.safetensors")))
        result = record(
            **{name: getattr(args, name) for name in (*SIZES, "repeats", "threads")}, bytes=size, files=files
        )
        rows, result["layouts"] = [], {}
        for tp in (1, 2):
            times, memory = on_ranks(args, "time", tp), on_ranks(args, "memory", tp)
            result["layouts"][f"TP={tp}"] = {"seconds": times, "peak_bytes": memory, "largest_tensor_bytes": largest}
            times["load and save"] = [a + b for a, b in zip(times["load"], times["save"], strict=True)]
            for what in ("load", "export", "load and save"):
                share = {kind: ratios(times, kind, what) for kind in ("cp", "cp and flush")}
                extra = f"{memory[what] / MIB:.0f} MiB = {memory[what] / largest:.2f}" if what in memory else ""
                rows.append([
                    f"{what}, TP={tp}", f"{spread([size / 1e9 / s for s in times[what]]):.2f}",
                    f"{share['cp']:.2f}", f"{share['cp and flush']:.2f}", extra,
                ])  # fmt: skip
        for kind in ("cp", "cp and flush"):
            times = [s for found in result["layouts"].values() for s in found["seconds"][kind]]
            rows.append([kind, f"{spread([size / 1e9 / s for s in times]):.2f}", "", "", ""])
    header = [
        "",
        "GB/s",
        "of cp",
        "of cp and flush",
        f"beyond the model, of the largest tensor ({largest / MIB:.0f} MiB)",
    ]
    print_table(f"{size / 1e9:.2f} GB in {files} files, bf16, page cache warm", header, rows)
    write_results(args.json, result)


if __name__ == "__main__":
    main()
