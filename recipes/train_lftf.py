"""LFTF: locate the block most tied to a gender bias, then fine-tune only it.

    python recipes/train_lftf.py --config-name lftf_tiny pretrained_checkpoint.restore_from_path=runs/sft/checkpoints/final

Leaves in the run folder: checkpoints/final, an ordinary checkpoint; delta.safetensors, the trained block alone;
report.md, result.json and, where an estimator chose the block, its ranking.
"""

import sys
from pathlib import Path


def main(cfg: dict, loggers) -> None:
    from recipes.bias.prompts import load_prompt_sets, load_texts, pair_tokens
    from recipes.bias.settings import LFTFConfig
    from recipes.bias.trainer import LFTFTrainer
    from recipes.run.contents import Contents
    from recipes.run.inputs import Inputs
    from recipes.run.pretrained import configure
    from recipes.run.session import Session

    config = configure(LFTFConfig, cfg)
    inputs = Inputs.check(config)
    data, limit = config.data, config.model.encoder_seq_length
    pair = pair_tokens(inputs.tokenizer, (data.prompts.pair.first, data.prompts.pair.second))
    prompts = load_prompt_sets(data.prompts, inputs.tokenizer, limit)
    texts = load_texts(data.text_path, inputs.tokenizer, limit) if data.text_path else []
    path = data.validation_text_path
    validation_texts = load_texts(path, inputs.tokenizer, limit) if path else []
    rows = {
        "data.prompts.professions_path": [row for name in ("train", "dev", "test") for row in prompts[name].content]
    }
    rows |= {"data.text_path": texts, "data.validation_text_path": validation_texts}
    with Session.start(inputs, loggers, Contents(inputs, rows)) as session:
        LFTFTrainer(session, inputs.tokenizer, prompts, pair, texts, validation_texts).fit()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see launch.run
    from recipes.cli import launch
    from recipes.run.log_process import LogProcess

    launch.run(main, __file__, LogProcess.start)
