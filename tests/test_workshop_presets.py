"""--preset writer depends on the size of the text. (Its --keep-best is tested with step 10.)"""
import pytest

from helpers import TEXT, story_llm


@pytest.mark.parametrize("n_bytes, given, weight_decay", [
    (500, [], 5), (100_000, [], 5), (400_000, [], 2.5), (1_600_000, [], 1.25),
    (400_000, ["--weight-decay", "0.25"], 0.25)])
def test_a_writer_limits_a_shorter_text_more_unless_the_user_has_chosen(n_bytes, given, weight_decay, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * (n_bytes // len(TEXT)) + TEXT[:n_bytes % len(TEXT)], encoding="utf-8")
    args = story_llm.parse(["train", "--preset", "writer", "--text", str(text), *given])
    run, corpus = story_llm.new_run_from_args(args)
    assert run.train_config.weight_decay == weight_decay and run.train_config.epochs == 9
    assert corpus.tokenizer.kind == "story" and run.config.vocab_size <= 2048
