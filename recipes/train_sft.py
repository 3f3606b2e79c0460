"""Supervised fine-tuning on prompt and response pairs.

    python recipes/train_sft.py --config-name sft_tiny data.train_path=my.jsonl model.tokenizer=my_tokenizer/

Starts `trainer.devices` processes itself; under torchrun it is one of its processes.
"""

import sys
from pathlib import Path


def main(cfg: dict, loggers) -> None:
    from recipes.data.rows import PairReading
    from recipes.data.token_cache import TokenCache
    from recipes.data.video import VideoReader
    from recipes.run.contents import Contents
    from recipes.run.inputs import Inputs
    from recipes.run.pretrained import configure
    from recipes.run.session import Session
    from recipes.sft.settings import SFTConfig
    from recipes.sft.trainer import SFTTrainer, check_validation

    config = configure(SFTConfig, cfg)
    inputs = Inputs.check(config)
    limit = config.model.encoder_seq_length
    video = VideoReader.of(config.data.video, config.model)
    inputs.tokenizer.template.choose(config.data.chat_template)
    data = config.data
    cache = TokenCache.of(data, inputs.log_dir)

    def reading(section):
        return PairReading(inputs.tokenizer, limit, video, section, data.train_on_turns == "all")

    def load(path, section=data):
        return cache.load(path, reading(section))

    def rows_of(section):
        if not data.streaming:
            return load(section.path, data.of_set(section))
        return cache.stream(section.path, reading(data.of_set(section)))

    train = {name: rows_of(section) for name, section in data.trained.items()}
    held_out = data.validation_path
    validation = load(held_out) if held_out else []
    check_validation(validation, held_out, inputs.data_size)
    rows = {data.train_key(name): pairs for name, pairs in train.items()}
    contents = Contents(inputs, rows | {"data.validation_path": validation})
    with Session.start(inputs, loggers, contents) as session:
        SFTTrainer(session, train, validation).fit()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see launch.run
    from recipes.cli import launch
    from recipes.run.log_process import LogProcess

    launch.run(main, __file__, LogProcess.start)
