"""Supervised fine-tuning on prompt and response pairs.

    python recipes/train_sft.py --config-name sft_tiny data.train_path=my.jsonl model.tokenizer=my_tokenizer/

Starts `trainer.devices` processes itself; under torchrun it is one of its processes.
"""

import sys
from pathlib import Path


def main(cfg: dict) -> None:
    from megatron_ext.runtime.engine import Engine
    from recipes.data.rows import load_pairs
    from recipes.data.video import VideoReader
    from recipes.run.pretrained import configure
    from recipes.run.session import Session
    from recipes.sft.settings import SFTConfig
    from recipes.sft.trainer import SFTTrainer

    config, cfg = configure(SFTConfig, cfg)
    session = Session(config, cfg)
    limit = config.model.encoder_seq_length
    video = VideoReader(config.data.video, config.model.vision.feature_size) if config.data.video else None
    train = load_pairs(config.data.train_path, session.tokenizer, limit, video)
    path = config.data.validation_path
    validation = load_pairs(path, session.tokenizer, limit, video) if path else []
    session.start()
    model = session.build_model()
    settings = config.trainer.sft
    engine = Engine(model, config.model.optim, settings.max_steps, settings.gradient_clip_val)
    trainer = SFTTrainer(session, engine, train, validation)
    session.open_run_folder()
    try:
        trainer.fit()
    finally:
        session.close()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see launch.run
    from recipes.cli import launch

    launch.run(main, __file__)
