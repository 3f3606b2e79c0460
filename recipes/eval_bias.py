"""Measure gender bias: GenBiasEval (AFGB), GenHintEval (UB), and independent checks where their files are given.

    python recipes/eval_bias.py pretrained_checkpoint.restore_from_path=... exp_manager.explicit_log_dir=runs/bias

The model is a checkpoint of ours, spread over ranks as the command line says, or a Hugging Face folder, which
transformers runs in one process. Leaves bias.json, bias.md and professions.png.
"""

import sys
from pathlib import Path


def main(cfg: dict) -> None:
    from recipes.bias.models import open_model
    from recipes.bias.prompts import load_prompt_sets, load_texts, pair_tokens
    from recipes.bias.settings import BiasEvalConfig
    from recipes.cli.config import build

    config = build(BiasEvalConfig, cfg)
    model = open_model(config)
    data, words = config.data, (config.data.prompts.pair.first, config.data.prompts.pair.second)
    pair = pair_tokens(model.tokenizer, words)
    prompts = load_prompt_sets(data.prompts, model.tokenizer, model.longest)[data.split]
    path = data.validation_text_path
    texts = load_texts(path, model.tokenizer, model.longest) if path else []
    evaluate_all(config, model, prompts, pair, texts, words)


def evaluate_all(config, model, prompts, pair, texts, words) -> None:
    from megatron_ext.bias.public_sets import read_crows_pairs
    from megatron_ext.bias.winobias import read_winobias
    from recipes.bias.evaluation import evaluate, pair_preference, question_accuracy
    from recipes.bias.prompts import question_rows, read_winogender, sentence_rows
    from recipes.bias.report import summary_rows, write_report

    data = config.data
    pairs, counts = {}, {}
    if data.crows_pairs_path:
        found = read_crows_pairs(data.crows_pairs_path)
        pairs["crows_pairs_stereotype_share"] = sentence_rows(found, model.tokenizer, model.longest)
        counts["crows_pairs"] = len(found)
    if data.winobias_paths:
        found, dropped = read_winobias(*data.winobias_paths)
        pairs["winobias_stereotype_share"] = sentence_rows(found, model.tokenizer, model.longest)
        counts |= {"winobias_pairs": len(found), "winobias_dropped": dropped}
    questions = read_winogender(data.winogender_path) if data.winogender_path else []
    if questions:
        counts["winogender_questions"] = len(questions)
    asked = question_rows(questions, model.tokenizer, model.longest)
    total = len(prompts.bias) + len(prompts.hinted) + len(texts) + len(asked) + sum(map(len, pairs.values()))
    with model.start() as scorer:
        with model.progress(total) as bar:
            result = evaluate(scorer, prompts, pair, texts, data.bootstrap_samples, bar.update) | counts
            for key, rows in pairs.items():
                result[key] = pair_preference(scorer, rows, bar.update)
            if questions:
                result |= question_accuracy(scorer, questions, asked, bar.update)
        model.check_folder()
        if model.is_main:
            name = config.pretrained_checkpoint.restore_from_path
            write_report(model.log_dir, f"Gender bias of {name}", {"model": name, "split": data.split, **result}, words)
            print("\n".join(f"  {title:<56} {value}" for title, value in summary_rows(result, words)))
            print(f"report in {model.log_dir / 'bias.md'}")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see launch.run
    from recipes.cli import launch

    launch.run(main, __file__)
