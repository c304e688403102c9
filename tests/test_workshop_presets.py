"""--preset writer depends on the size of the text. (Its --keep-best is tested with step 10.)"""
from helpers import TEXT, story_llm


def test_the_command_line_takes_the_settings_of_the_size_unless_others_are_given(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 2, encoding="utf-8")
    for given, drop_rate in (([], 0.3), (["--drop-rate", "0.05"], 0.05)):
        args = story_llm.parse(["train", "--preset", "writer", "--text", str(text), *given])
        run, corpus = story_llm.new_run_from_args(args)
        assert run.config.drop_rate == drop_rate and run.train_config.epochs == 6
        assert corpus.tokenizer.kind == "story" and run.config.vocab_size <= 1024
