"""GRPO with a shared prefix.

    python recipes/train_grpo.py --config-name grpo_tiny data.train_path=my.jsonl \\
        pretrained_checkpoint.restore_from_path=runs/sft/checkpoints/final

Starts `trainer.devices` processes itself; under torchrun it is one of its processes.
"""

import sys
from pathlib import Path


def main(cfg: dict, loggers) -> None:
    from recipes.data.mixture import Joined
    from recipes.data.rows import PromptReading
    from recipes.data.token_cache import TokenCache
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
    video = VideoReader.of(config.data.video, config.model)
    inputs.tokenizer.template.choose(config.data.chat_template)
    rewards.check_here()
    keys = rewards.row_keys
    opening = environment and environment.opening
    cache = TokenCache.of(config.data, inputs.log_dir)

    def reading(section):
        return PromptReading(inputs.tokenizer, limit, video, section, keys, opening)

    def load(path, section=config.data):
        prompts = cache.load(path, reading(section))
        rewards.check_rows(prompts, path)
        return prompts

    def rows_of(section):
        if not data.streaming:
            return load(section.path, data.of_set(section))
        return cache.stream(
            section.path, reading(data.of_set(section)), lambda row: rewards.check_row(row, section.path)
        )

    data = config.data
    train = {name: rows_of(section) for name, section in data.trained.items()}
    held_out = data.held_out
    validation = [ValidationSet(name, i, held_out[name], load(held_out[name].path)) for i, name in enumerate(held_out)]
    recorded = load_recorded(config, inputs.tokenizer) if grpo.rollout.source == "file" else []
    prompts = Joined(train.values() or [each.prompts for each in validation])
    first = next(filter(None, prompts), None)
    check_template(environment, inputs.tokenizer, first, grpo.sampling(inputs.tokenizer.stop_ids).ends)
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
