"""Small random towers and models that see, made by transformers, and pictures and prompts for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.models.media import MediaPrompt
from megatron_ext.rotary import Video
from megatron_ext.vision import Pixels
from megatron_ext.vision.tiling import most_tiles, plan_tiling
from tests.hf_models import SIZES, VOCAB

__all__ = [
    "IMAGE", "NEXT", "ONEVISION", "ONEVISION_SIDE", "PREPROCESSING", "QWEN", "QWEN3_VIDEO_PREPROCESSING", "QWEN_PREPROCESSING",
    "QWEN_VIDEO", "SIDE", "TOWERS", "CutImage", "cut_image", "image_prompt", "make_llava", "make_next", "make_onevision",
    "make_qwen", "make_tower", "next_image", "next_preprocessing", "onevision_prompt", "onevision_tower", "patches", "pictures",
    "qwen_prompt", "qwen_tower", "random_weights", "tiles",
]  # fmt: skip

SIDE, PATCH = 8, 4  # pixels: 2 x 2 patches
ONEVISION_SIDE = 12
# One, two or three tiles in a row, or two by two; of those of more than two tiles what is left is interpolated.
ONEVISION: dict[str, Any] = {
    "image_grid_pinpoints": [[12, 12], [12, 24], [24, 12], [24, 24], [36, 12], [12, 36]],
    "vision_aspect_ratio": "anyres_max_2",
}
# As many tiles of LLaVA-1.6, whose images of up to 24 tokens are short enough for two of them in a row.
NEXT: dict[str, Any] = {
    "image_grid_pinpoints": [[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]],
    "vision_aspect_ratio": "anyres",
}
IMAGE = VOCAB - 1  # the token that stands for an image's
QWEN_VIDEO = IMAGE - 1  # for a video's
ENCODER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {"model_type": "clip_vision_model", **ENCODER},
    "siglip": {"model_type": "siglip_vision_model", **ENCODER},
}
MIDDLE = [0.5, 0.4, 0.6]
PREPROCESSING: dict[str, dict[str, Any]] = {
    "clip": {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE}, "image_mean": MIDDLE, "image_std": [0.3, 0.25, 0.35],
    },
    "siglip": {
        "image_processor_type": "SiglipImageProcessorFast", "size": {"height": SIDE, "width": SIDE}, "image_mean": MIDDLE,
        "image_std": [0.5, 0.5, 0.5],
    },
}  # fmt: skip


def random_weights(model: torch.nn.Module, rng: torch.Generator) -> None:
    """In which every term counts: norms around 1, biases not 0. A language model says no token that stands for a medium."""
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(1 + 0.3 * values if parameter.dim() == 1 else values * parameter[0].numel() ** -0.5)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if (
            head is not None
        ):  # what stands for a medium is said as good as never, where a drawn model may say nothing else
            head.weight[[QWEN_VIDEO, IMAGE]] = 0


def make_tower(folder: Path, kind: str, rng: torch.Generator, **changes: Any) -> torch.nn.Module:
    """A folder with a vision model alone, as transformers saves it."""
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model(**TOWERS[kind] | changes)).eval()
    random_weights(model, rng)
    model.save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING[kind]))
    return model


def make_llava(folder: Path, kind: str, rng: torch.Generator, **changes: Any) -> torch.nn.Module:
    """A folder with a LLaVA around a Llama (CLIP) or Qwen2 (SigLIP) language model."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    text = {"clip": "llama", "siglip": "qwen2"}[kind]
    config = LlavaConfig(
        text_config=AutoConfig.for_model(text, **SIZES).to_dict(),
        vision_config=AutoConfig.for_model(**TOWERS[kind]).to_dict(),
        image_token_id=IMAGE,
        image_seq_length=4,
        vision_feature_select_strategy={"clip": "default", "siglip": "full"}[kind],
        **changes,
    )
    model = LlavaForConditionalGeneration(config).eval()
    random_weights(model, rng)
    model.save_pretrained(str(folder), max_shard_size=30_000)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING[kind]))
    return model


def next_preprocessing(kind: str) -> dict[str, Any]:
    """Of a tower: as published ones have it, by the shortest edge and a square of it (CLIP), or by height and width (SigLIP)."""
    said = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": NEXT["image_grid_pinpoints"]}
    crop = {"crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": kind == "clip"}
    return PREPROCESSING[kind] | crop | said


def make_next(folder: Path, kind: str, rng: torch.Generator, **changes: Any) -> torch.nn.Module:
    """A folder with a LLaVA-1.6 around a Mistral (CLIP), or, as Granite Vision has it, a Granite (SigLIP) language model."""
    from transformers import AutoConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    multipliers = {"embedding_multiplier": 1.5, "residual_multiplier": 0.7, "attention_multiplier": 0.4}
    text, more = {"clip": ("mistral", {}), "siglip": ("granite", multipliers)}[kind]
    config = LlavaNextConfig(
        text_config=AutoConfig.for_model(text, **SIZES | more).to_dict(),
        vision_config=AutoConfig.for_model(**TOWERS[kind]).to_dict(),
        image_token_index=IMAGE,
        image_seq_length=4,
        image_grid_pinpoints=NEXT["image_grid_pinpoints"],
        vision_feature_select_strategy={"clip": "default", "siglip": "full"}[kind],
        **changes,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    random_weights(model, rng)
    model.save_pretrained(str(folder), max_shard_size=30_000)
    (folder / "preprocessor_config.json").write_text(json.dumps(next_preprocessing(kind)))
    return model


def onevision_tower() -> dict[str, Any]:
    """A tower's configuration; its pictures have 3 x 3 patches, of which a video's frames keep 2 x 2."""
    return TOWERS["siglip"] | {"image_size": ONEVISION_SIDE, "vision_use_head": False}


def make_onevision(folder: Path, rng: torch.Generator, **changes: Any) -> torch.nn.Module:
    """A folder with a LLaVA-OneVision."""
    from transformers import AutoConfig, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        text_config=AutoConfig.for_model("qwen2", **SIZES).to_dict(),
        vision_config=AutoConfig.for_model(**onevision_tower()).to_dict(),
        image_token_index=IMAGE,
        video_token_index=QWEN_VIDEO,
        **ONEVISION | changes,
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    random_weights(model, rng)
    model.save_pretrained(str(folder), max_shard_size=30_000)
    size = {"height": ONEVISION_SIDE, "width": ONEVISION_SIDE}
    processor = {"image_processor_type": "LlavaOnevisionImageProcessor", "size": size, "image_mean": MIDDLE}
    processor["image_grid_pinpoints"] = model.config.image_grid_pinpoints
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def tiles(rng: torch.Generator, count: int, video: bool = False) -> Pixels:
    """Random ones as LLaVA-OneVision's tower is shown an image, or the frames of a video."""
    side = ONEVISION_SIDE // PATCH
    return Pixels(torch.randn(count, 3, ONEVISION_SIDE, ONEVISION_SIDE, generator=rng), (count, side, side), video)


@dataclass(frozen=True, eq=False)
class CutImage(Pixels):
    """
    Attributes:
        size: of the image, height and width.
    """

    size: tuple[int, int] = (0, 0)


def cut_image(rng: torch.Generator) -> CutImage:
    """A random image of any shape that is alone in its sample, as LLaVA-OneVision's tower is shown it."""
    return _cut(torch.randint(4, 60, (2,), generator=rng).tolist(), ONEVISION_SIDE, ONEVISION, rng)


def next_image(rng: torch.Generator) -> CutImage:
    """A random image of any shape that leaves a row of patches, as LLaVA-1.6's tower is shown it."""
    return _cut(torch.randint(8, 48, (2,), generator=rng).tolist(), SIDE, NEXT, rng)


def _cut(size: list[int], side: int, tiles: dict[str, Any], rng: torch.Generator) -> CutImage:
    sizes, most = tuple(map(tuple, tiles["image_grid_pinpoints"])), most_tiles(tiles["vision_aspect_ratio"])
    tiling = plan_tiling(*size, sizes, side, side // PATCH, most)
    count = 1 + tiling.rows * tiling.columns
    values = torch.randn(count, 3, side, side, generator=rng)
    return CutImage(values, (count, side // PATCH, side // PATCH), tiling=tiling, size=tuple(size))


def onevision_prompt(rng: torch.Generator, parts: list[int | Pixels]) -> MediaPrompt:
    """Texts of these lengths, and media, a token or the rows of an image's tiles behind each of them; LLaVA-1.6's, too."""
    tokens: list[int] = []
    grids: list[Video] = []
    for part in parts:
        if isinstance(part, int):
            tokens += torch.randint(3, QWEN_VIDEO, (part,), generator=rng).tolist()
            continue
        t, h, w = part.patches
        behind = Video(1, *(part.tiling.grid if part.tiling else (1, 1)))
        grids += [Video(t, -(-h // 2), -(-w // 2)) if part.video else Video(1, h, w), behind]
        tokens += [QWEN_VIDEO if part.video else IMAGE] * (grids[-2].length + behind.length)
    return MediaPrompt.of(tokens, [IMAGE, QWEN_VIDEO], grids, [part for part in parts if isinstance(part, Pixels)])


def pictures(rng: torch.Generator, count: int) -> Pixels:
    """Random ones, as if resized and normalised."""
    side = SIDE // PATCH
    return Pixels(torch.randn(count, 3, SIDE, SIDE, generator=rng), (count, side, side))


def image_prompt(rng: torch.Generator, parts: list[int | Pixels]) -> MediaPrompt:
    """Texts of these lengths, and media."""
    tokens: list[int] = []
    for part in parts:
        if isinstance(part, int):
            tokens += torch.randint(IMAGE, (part,), generator=rng).tolist()
        else:
            t, h, w = part.patches
            tokens += [IMAGE] * (t * h * w)
    media = [part for part in parts if isinstance(part, Pixels)]
    return MediaPrompt.of(tokens, IMAGE, [Video(*m.patches) for m in media], media)


QWEN_PATCH = 3 * 2 * 4 * 4  # numbers of a patch
QWEN: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "depth": 3, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
        "fullatt_block_indexes": [1], "tokens_per_second": 2,
    },
    "qwen3_vl": {
        "depth": 4, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 2],
    },
}  # fmt: skip
QWEN_PREPROCESSING: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2,
    "size": {"shortest_edge": 16 * 16, "longest_edge": 40 * 40}, "image_mean": MIDDLE, "image_std": [0.3, 0.2, 0.4],
}  # fmt: skip
QWEN3_VIDEO_PREPROCESSING: dict[str, Any] = {
    key: value for key, value in QWEN_PREPROCESSING.items() if key != "image_processor_type"
} | {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "size": {"shortest_edge": 2 * 16 * 16, "longest_edge": 4 * 32 * 32},
}
QWEN_TEXT: dict[str, dict[str, Any]] = {"qwen3_vl": {"head_dim": 16, "max_position_embeddings": 128}}


def qwen_tower(family: str) -> dict[str, Any]:
    """A tower's configuration, of pixels that `patches` draws."""
    sizes = {"num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return {"model_type": f"{family}_vision"} | sizes | QWEN[family]


def make_qwen(folder: Path, family: str, rng: torch.Generator, **changes: Any) -> torch.nn.Module:
    """A folder with a model of Qwen's; its tower has windows, or feeds the first layers, where the family's does."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = SIZES | QWEN_TEXT.get(family, {})
    pairs = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]) // 2
    spatial = pairs // 4
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [pairs - 2 * spatial, spatial, spatial]}
    config = AutoConfig.for_model(
        family, text_config=text | {"rope_parameters": rope}, vision_config=qwen_tower(family), image_token_id=IMAGE,
        video_token_id=QWEN_VIDEO, vision_start_token_id=1, vision_end_token_id=2, **changes,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config).eval()
    random_weights(model, rng)
    model.save_pretrained(str(folder), max_shard_size=30_000)
    (folder / "preprocessor_config.json").write_text(json.dumps(QWEN_PREPROCESSING))
    if family == "qwen3_vl":
        (folder / "video_preprocessor_config.json").write_text(json.dumps(QWEN3_VIDEO_PREPROCESSING))
    return model


def patches(rng: torch.Generator, t: int, h: int, w: int) -> Pixels:
    """Random ones of a picture of h x w patches, or of a video of t times as many."""
    return Pixels(torch.randn(t * h * w, QWEN_PATCH, generator=rng), (t, h, w))


def qwen_prompt(rng: torch.Generator, parts: list[int | Pixels], family: str = "qwen2_vl") -> MediaPrompt:
    """Texts of these lengths, and media of which 2 x 2 patches are a token; what has several frames is a video. Qwen3-VL writes
    when a frame is shown before each of them."""

    def text(length: int) -> list[int]:
        return torch.randint(3, QWEN_VIDEO, (length,), generator=rng).tolist()

    tokens: list[int] = []
    grids: list[Video] = []
    for part in parts:
        if isinstance(part, int):
            tokens += text(part)
            continue
        t, h, w = part.patches
        apart = family == "qwen3_vl" and t > 1
        for _ in range(t if apart else 1):
            grids.append(Video(1 if apart else t, h // 2, w // 2))
            tokens += text(1 + len(grids) % 2 if apart else 0) + [IMAGE if t == 1 else QWEN_VIDEO] * grids[-1].length
    return MediaPrompt.of(tokens, [IMAGE, QWEN_VIDEO], grids, [part for part in parts if isinstance(part, Pixels)])
