"""GRPO with a shared prefix.

    python recipes/train_grpo.py --config-name grpo_tiny data.train_path=my.jsonl \\
        pretrained_checkpoint.restore_from_path=runs/sft/checkpoints/final

Starts `trainer.devices` processes itself; under torchrun it is one of its processes.
"""

import sys
from pathlib import Path


def main(cfg: dict, loggers) -> None:
    from recipes.data.rows import load_prompts
    from recipes.data.video import VideoReader
    from recipes.grpo.recorded import load_recorded
    from recipes.grpo.rewards import check_rows, get_reward, reward_file, row_keys
    from recipes.grpo.settings import GRPOConfig
    from recipes.grpo.trainer import GRPOTrainer
    from recipes.run.contents import Contents
    from recipes.run.inputs import Inputs
    from recipes.run.pretrained import configure
    from recipes.run.session import Session

    config = configure(GRPOConfig, cfg)
    reward = get_reward(config.trainer.grpo.reward)
    inputs = Inputs.check(config)
    limit = config.data.max_prompt_length
    video = VideoReader(config.data.video, config.model.vision.feature_size) if config.data.video else None
    inputs.tokenizer.template.choose(config.data.chat_template)
    keys = row_keys(reward)
    train, validation = (
        load_prompts(path, inputs.tokenizer, limit, video, config.data, keys) if path else []
        for path in (config.data.train_path, config.data.validation_path)
    )
    recorded = load_recorded(config, inputs.tokenizer) if config.trainer.grpo.rollout.source == "file" else []
    check_rows(reward, train, config.data.train_path)
    check_rows(reward, validation, config.data.validation_path)
    code = {"trainer.grpo.reward": reward_file(config.trainer.grpo.reward)}
    rows = {"data.train_path": train, "data.validation_path": validation, "trainer.grpo.rollout.path": recorded}
    contents = Contents(inputs, rows, code, in_order=["trainer.grpo.rollout.path"])
    with Session.start(inputs, loggers, contents) as session:
        if recorded:
            session.say(
                f"responses and rewards come from {config.trainer.grpo.rollout.path}; trainer.grpo.reward scores answers to "
                "data.validation_path alone"
            )
        GRPOTrainer(session, reward, train, validation, recorded).fit()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see launch.run
    from recipes.cli import launch
    from recipes.run.log_process import LogProcess

    launch.run(main, __file__, LogProcess.start)
