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
    from recipes.environments.registry import environment_file, get_environment
    from recipes.grpo.choices import advantages_file, objective_file
    from recipes.grpo.conversations import check_template
    from recipes.grpo.recorded import load_recorded
    from recipes.grpo.settings import GRPOConfig
    from recipes.grpo.trainer import GRPOTrainer
    from recipes.grpo.validation import ValidationSet
    from recipes.rewards.several import rewards_for
    from recipes.run.contents import Contents
    from recipes.run.inputs import Inputs
    from recipes.run.pretrained import configure
    from recipes.run.session import Session

    config = configure(GRPOConfig, cfg)
    grpo = config.trainer.grpo
    environment = get_environment(grpo.environment)
    rewards = rewards_for(grpo.reward, grpo.rewards, environment, grpo.reward_limits)
    inputs = Inputs.check(config)
    limit = config.data.max_prompt_length
    video = VideoReader(config.data.video, config.model.vision.feature_size) if config.data.video else None
    inputs.tokenizer.template.choose(config.data.chat_template)
    rewards.check_here()
    keys = rewards.row_keys
    opening = environment and environment.opening

    def load(path, section=config.data):
        prompts = load_prompts(path, inputs.tokenizer, limit, video, section, keys, opening)
        rewards.check_rows(prompts, path)
        return prompts

    data = config.data
    train = {name: load(section.path, data.of_set(section)) for name, section in data.trained.items()}
    held_out = data.held_out
    validation = [ValidationSet(name, i, held_out[name], load(held_out[name].path)) for i, name in enumerate(held_out)]
    recorded = load_recorded(config, inputs.tokenizer) if grpo.rollout.source == "file" else []
    prompts = [prompt for each in train.values() or [each.prompts for each in validation] for prompt in each]
    check_template(environment, inputs.tokenizer, prompts, grpo.sampling(inputs.tokenizer.stop_ids).ends)
    code = rewards.files | {
        "trainer.grpo.environment": environment_file(grpo.environment),
        "trainer.grpo.objective": objective_file(grpo.objective),
        "trainer.grpo.objective.advantages": advantages_file(grpo.chosen),
    }
    rows = {data.train_key(name): prompts for name, prompts in train.items()} | {"trainer.grpo.rollout.path": recorded}
    rows |= {data.held_out_key(each.name): each.prompts for each in validation}
    contents = Contents(inputs, rows, code, in_order=["trainer.grpo.rollout.path"])
    with Session.start(inputs, loggers, contents) as session:
        if recorded:
            session.say(
                f"responses and rewards come from {grpo.rollout.path}; trainer.grpo.reward scores answers to held-out prompts "
                "alone"
            )
        GRPOTrainer(session, rewards, train, validation, recorded, environment).fit()


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see launch.run
    from recipes.cli import launch
    from recipes.run.log_process import LogProcess

    launch.run(main, __file__, LogProcess.start)
