"""--preset writer depends on the size of the text. (Its --keep-best is tested with step 10.)"""
import pytest

from helpers import TEXT, story_llm


@pytest.mark.parametrize("kb, expected", [(100, (2048, 0.3, 6)), (1115, (4096, 0.2, 9))])
def test_the_preset_writer_has_the_settings_that_were_measured_for_these_sizes(kb, expected):
    assert tuple(story_llm.writer_settings(kb * 1000).values()) == expected


def test_the_command_line_takes_the_settings_of_the_size_unless_others_are_given(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 2, encoding="utf-8")
    for given, drop_rate in (([], 0.3), (["--drop-rate", "0.05"], 0.05)):
        args = story_llm.parse(["train", "--preset", "writer", "--text", str(text), *given])
        run, corpus = story_llm.new_run_from_args(args)
        assert run.config.drop_rate == drop_rate and run.train_config.epochs == 6
        assert corpus.tokenizer.kind == "story" and run.config.vocab_size <= 1024
