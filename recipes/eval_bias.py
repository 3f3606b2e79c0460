"""Measure gender bias: GenBiasEval (AFGB), GenHintEval (UB), and independent checks where their files are given.

    python recipes/eval_bias.py pretrained_checkpoint.restore_from_path=... exp_manager.explicit_log_dir=runs/bias

The model is a checkpoint of ours, spread over ranks as the command line says, or a Hugging Face folder, which
transformers runs in one process. Leaves bias.json, bias.md and professions.png, and answers.json, with which
data.compare_with=[...] of a later evaluation sets models side by side.
"""

import sys
from pathlib import Path


def main(cfg: dict) -> None:
    from recipes.bias.comparing import digest_of, read_earlier
    from recipes.bias.models import open_model
    from recipes.bias.prompts import answer_tokens, load_prompt_sets, load_texts
    from recipes.bias.sets import read_public_sets
    from recipes.bias.settings import BiasEvalConfig
    from recipes.cli.config import build

    config = build(BiasEvalConfig, cfg)
    data, pair = config.data, config.data.prompts.pair
    earlier = read_earlier(data.compare_with)
    model = open_model(config)
    answers = answer_tokens(model.tokenizer, pair.words)
    prompts = load_prompt_sets(data.prompts, model.tokenizer, model.longest)[data.split]
    path = data.validation_text_path
    texts = load_texts(path, model.tokenizer, model.longest) if path else []
    sets = read_public_sets(data, model.tokenizer, model.longest)
    asked = {"prompts": digest_of(prompts.bias, prompts.hinted, pair.words), "texts": digest_of(texts)}
    asked |= {one.name: digest_of(one.questions) for one in sets}
    general = harness_tasks(data.harness)
    if general:
        asked["general"] = digest_of(general.tasks)
    for one in earlier:
        one.check(asked)
    evaluate_all(config, model, prompts, answers, texts, sets, general, asked, earlier)


def harness_tasks(section):
    """Loaded, if any are named."""
    from recipes.bias.general import HarnessTasks, LoadedTasks

    if not section.tasks:
        return None
    return LoadedTasks.load(
        HarnessTasks(tuple(section.tasks), section.include_path, section.num_fewshot, section.limit)
    )


def evaluate_all(config, model, prompts, answers, texts, sets, general, asked, earlier) -> None:
    from recipes.bias.comparing import Answers, compared, comparison_lines, digest_of
    from recipes.bias.evaluation import ask_prompts, ask_texts, summary
    from recipes.bias.report import harness_lines, summary_rows, write_report

    data, pair = config.data, config.data.prompts.pair
    words = pair.first, pair.second
    total = len(prompts.bias) + len(prompts.hinted) + len(texts) + sum(len(one.rows) for one in sets)
    found = Answers(asked)
    with model.start() as scorer:
        if general:  # first: what it may refuse is known as it asks
            ability, numbers, cut = general.ask(scorer, model.tokenizer, model.longest)
        with model.progress(total) as bar:
            found.measures["prompts"], facts = ask_prompts(scorer, prompts, answers, pair.others, bar.update)
            if texts:
                found.measures["texts"] = ask_texts(scorer, texts, bar.update)
            for one in sets:
                found.measures[one.name] = one.measures(scorer.token_logprobs(one.rows, bar.update))
                facts |= one.counts
        if general:
            found.measures["general"], facts["harness"] = ability, numbers
            if cut:
                facts["harness_cut"] = cut
                asked["general"] = digest_of(general.tasks, model.longest)
        model.check_folder()
        if model.is_main:
            name = config.pretrained_checkpoint.name
            result = {"model": name, "split": data.split, **facts, **summary(found.by_name, data.bootstrap_samples)}
            beside = [compared(one, found, data.bootstrap_samples) for one in earlier]
            if earlier:
                result["compared"] = {one.name: gaps for one, gaps in zip(earlier, beside, strict=True)}
            table = facts["profession_table"]
            found.write(model.log_dir, name, table)
            lines = harness_lines(numbers, cut, model.longest) if general else []
            lines += comparison_lines(earlier, beside, found, table, words) if earlier else []
            write_report(model.log_dir, f"Gender bias of {name}", result, words, lines)
            print("\n".join(f"  {title:<56} {value}" for title, value in summary_rows(result, words)))
            print("\n".join(lines))
            print(f"report in {model.log_dir / 'bias.md'}")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see launch.run
    from recipes.cli import launch

    launch.run(main, __file__)
