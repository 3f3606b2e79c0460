"""Rank the blocks of a checkpoint, their parts or their heads by how much they have to do with its gender bias, by one BMI
estimator or several.

    python recipes/locate_bias.py pretrained_checkpoint.restore_from_path=... exp_manager.explicit_log_dir=runs/located

Leaves a table, JSON and a bar chart for each estimator. recipes/train_lftf.py locates by itself; this is for a look, or to
compare.
"""

import sys
from pathlib import Path

NAMED = 40  # places that a line names behind the first


def main(cfg: dict) -> None:
    from megatron_ext.blocks.importance import check_excluded, rank_blocks
    from megatron_ext.errors import UserError
    from recipes.bias.models import CheckpointModel
    from recipes.bias.prompts import load_prompt_sets, pair_tokens
    from recipes.bias.report import write_ranking
    from recipes.bias.settings import LocateConfig
    from recipes.cli.config import build

    config = build(LocateConfig, cfg)
    opened = CheckpointModel(config)
    prompts, settings = config.data.prompts, config.trainer.locate
    try:
        check_excluded(settings.exclude_blocks, opened.num_layers)
    except UserError as error:
        raise UserError(f"trainer.locate.exclude_blocks: {error}") from error
    pair = pair_tokens(opened.tokenizer, (prompts.pair.first, prompts.pair.second))
    train = load_prompt_sets(prompts, opened.tokenizer, opened.longest)["train"]
    probe = train.probe(pair, settings.locate_prompts, settings.seed)
    asked = [(name, grain) for grain in settings.places for name in settings.estimators]
    with opened.session() as session, session.progress(len(asked), "locate", unit="ranking") as bar:
        for name, grain in asked:
            ranking = rank_blocks(name, session.model, probe, settings.exclude_blocks, grain)
            session.check_folder()
            if session.is_main:
                write_ranking(session.log_dir, ranking)
            first, *others = (ranking.name(place) for place in ranking.order)
            more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
            session.say(f"{name}: block {first} first, then {', '.join(others[:NAMED]) or 'none'}{more}")
            bar.update()
        session.say(f"rankings in {session.log_dir}")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see launch.run
    from recipes.cli import launch

    launch.run(main, __file__)
