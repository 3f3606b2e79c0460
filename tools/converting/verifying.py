"""A model of ours beside transformers: the texts that both read, and how far their logits are apart."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.models.placement import PRECISIONS
from recipes.bias.scorers import HuggingFaceScorer
from recipes.run.pretrained import Pretrained

__all__ = ["compare", "open_theirs", "same_vocabulary", "texts_of"]


def texts_of(args: argparse.Namespace) -> list[str]:
    """What verify is to read, from --text and --text-file.

    Raises:
        UserError: nothing, or no UTF-8.
    """
    texts = list(args.text or [])
    for text in texts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"--text {text!r} is no UTF-8 text")
    if args.text_file:
        try:
            texts += [line for line in args.text_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"--text-file {args.text_file} is no UTF-8 text: {error}") from error
    if not texts:
        raise UserError("nothing to compare: give --text or --text-file")
    return texts


def open_theirs(source: Path) -> Pretrained:
    """What is compared with.

    Raises:
        UserError: it is no Hugging Face folder.
    """
    theirs = Pretrained.open(str(source), "HF_FOLDER")
    if not theirs.hugging_face:
        raise UserError(f"{source} is a checkpoint of ours: name the Hugging Face folder first, then the checkpoint")
    return theirs


def same_vocabulary(theirs: Pretrained, model: Pretrained, rows: list[list[int]]) -> None:
    """
    Raises:
        UserError: the vocabularies differ, or the tokenizer's is larger.
    """
    source, size, here = theirs.path, theirs.architecture["vocab_size"], model.architecture["vocab_size"]
    if size != here:
        raise UserError(
            f"the vocabularies differ: {here} rows in {model.path}, {size} in {source}; name the folder that was exported from it"
        )
    if (largest := max((token for row in rows for token in row), default=0)) >= size:
        raise UserError(
            f"the tokenizer of {source} gives token {largest}, the model has {size} rows; name its own folder"
        )


def compare(args: argparse.Namespace, texts: list[str], rows: list[list[int]], ours: list[Tensor]) -> tuple[float, int]:
    """(largest difference of a logit, same next tokens) beside transformers.

    Raises:
        UserError: transformers cannot load the folder, a logit is not finite, or the difference is too large.
    """
    theirs = HuggingFaceScorer(args.source, torch.device("cpu"), PRECISIONS[args.precision])
    worst, agreed = 0.0, 0
    for text, row, mine in zip(texts, rows, ours, strict=True):
        other = theirs.logits(row)
        for logits, whose in ((mine, f"{args.model or args.source} here"), (other, f"{args.source} in transformers")):
            if bad := int((~logits.isfinite().all(1)).sum()):
                raise UserError(
                    f"{whose} has logits that are not finite behind {bad} of {len(row)} tokens of {text[:40]!r}: its "
                    "weights are of no use"
                )
        gap, same = float((mine - other).abs().max()), int((mine.argmax(1) == other.argmax(1)).sum())
        print(f"  {len(mine):>6} tokens   largest difference {gap:.2e}   same next token {same} of {len(mine)}   "
              f"{text[:40]!r}")  # fmt: skip
        worst, agreed = max(worst, gap), agreed + same
    if not worst <= args.tolerance:
        raise UserError(
            f"{args.model or args.source} and transformers' {args.source} differ: a logit by {worst:.2e}, more than "
            f"--tolerance {args.tolerance:.0e}"
        )
    return worst, agreed
