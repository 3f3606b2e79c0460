"""Multiple-choice questions about videos: accuracy by category, for a checkpoint of ours or a Hugging Face folder.

    python recipes/eval_video.py pretrained_checkpoint.restore_from_path=... data.path=questions.jsonl \\
        exp_manager.explicit_log_dir=runs/video_eval

Rows {video, question, options, answer, category}, or the published files of VideoMME, MVBench, LongVideoBench, TempCompass and
EgoSchema (data.set). Leaves video_eval.json, video_eval.md and answers.jsonl.
"""

import sys
from pathlib import Path


def main(cfg: dict) -> None:
    from megatron_ext.errors import UserError
    from recipes.cli.config import build
    from recipes.data.video import VideoReader
    from recipes.run.evaluated import checkpoint_inputs
    from recipes.run.progress import progress_bar
    from recipes.run.session import Session
    from recipes.video_eval.report import summary, table, write_report
    from recipes.video_eval.scoring import ask_all, prepare
    from recipes.video_eval.sets import read_questions
    from recipes.video_eval.settings import VideoEvalConfig

    config = build(VideoEvalConfig, cfg)
    inputs = checkpoint_inputs(config)
    data, model = config.data, inputs.config.model
    questions = read_questions(data.path, data.set, data.videos)
    if model.vision is None and (shown := next((q.place for q in questions if q.media), None)):
        raise UserError(
            f"{shown} shows an image or video, and {config.pretrained_checkpoint.restore_from_path} is a model without eyes: "
            "name one that was trained with model.vision"
        )
    video = None if model.vision is None else VideoReader.of(data.video, model)
    asked = prepare(questions, data, inputs.tokenizer, video, model.encoder_seq_length)
    with Session.start(inputs) as session:
        with progress_bar(len(asked), "questions", "question", shown=session.is_main) as bar:
            scores = ask_all(session.model, asked, data.video.workers, bar.update)
        session.check_folder()
        if session.is_main:
            name = config.pretrained_checkpoint.name
            found = {"model": name, "set": data.set, "path": data.path, **summary(asked, scores)}
            write_report(session.log_dir, f"{data.set} of {name}", found, asked, scores)
            for row in table(found):
                print("  {:<44} {:>6} {:>6} %  [{}]  chance {} %".format(*row))
            print(f"report in {session.log_dir / 'video_eval.md'}")


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # see launch.run
    from recipes.cli import launch

    launch.run(main, __file__)
