"""What transformers' video processors make of videos, for tests/functional/test_video_processors.py: `python video_processors.py
FOLDER TORCHVISION`, where the second is the folder in which `make trl` has put it.

FOLDER holds frames.safetensors, uint8 [T, 3, H, W] under "0", "1", ..., and cases.json, of each the settings of its video
processor; pixel_values_videos and video_grid_thw of each are written to FOLDER/made.safetensors, as "0.pixels" and "0.grid".
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, sys.argv[2])
try:
    import torchvision  # noqa: F401
except RuntimeError:
    # Built for CUDA and beside a torch without: its own operators are missing, which resizing does not need. Declared, they are
    # not missed on import.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers
from safetensors.torch import load_file, save_file


def main(folder: Path) -> None:
    frames, made = load_file(str(folder / "frames.safetensors")), {}
    for number, settings in enumerate(json.loads((folder / "cases.json").read_text())):
        processor = getattr(transformers, settings.pop("video_processor_type"))(**settings)
        found = processor(videos=[frames[str(number)]], return_tensors="pt", do_sample_frames=False)
        made[f"{number}.pixels"] = found["pixel_values_videos"].contiguous()
        if "video_grid_thw" in found:
            made[f"{number}.grid"] = found["video_grid_thw"]
    save_file(made, str(folder / "made.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
