"""extras/library.py: the file that it writes, the corpus that it makes of the file, and the training."""
import array
import dataclasses
import hashlib
import json
import re
import signal
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TEXT, some_text, split_settings, story_llm, train_to, weights_equal
from hypothesis import given, strategies as st

sys.path.insert(0, str(ROOT / "extras"))
import library  # noqa: E402

SMALL = ["--emb-dim", "16", "--n-layers", "1", "--context-length", "12", "--batch-size", "8", "--eval-every", "5"]
ALL_BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a file big.txt: numbered copies of TEXT."""
    text = "\n".join(f"{i}. {TEXT}" for i in range(20))
    (tmp_path / "big.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tokenized(folder):
    """The same folder after `tokenize`, with big.bin and big.bin.json."""
    library.tokenize("big.txt", "big.bin", "story", 300)
    return folder


def ids_on_disk(path, typecode="H"):
    return array.array(typecode, Path(path).read_bytes()).tolist()


def error_of(capsys, *arguments):
    """The error message of a command, which must be a single line."""
    capsys.readouterr()
    assert library.main(list(arguments)) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    return error


# From a text to a file of token ids

@pytest.mark.parametrize("size", [60, 333, 1 << 20])
@pytest.mark.parametrize("kind", ["story", "gpt2"])
def test_blocks_add_up_to_the_text_and_their_tokens_to_its_tokens(folder, size, kind):
    text = (folder / "big.txt").read_text(encoding="utf-8")
    tokenizer = story_llm.BPETokenizer(story_llm.train_bpe_fast(text, 400), kind)
    blocks = list(library.read_blocks("big.txt", size))
    assert "".join(blocks) == text and (len(blocks) == 1 if size > len(text) else len(blocks) >= len(text) // size)
    assert [i for block in blocks for i in tokenizer.encode(block)] == tokenizer.encode(text)


@given(text=some_text, size=st.integers(2, 40), kind=st.sampled_from(["story", "gpt2"]))
def test_blocks_lose_nothing_of_any_text_and_a_cut_between_words_keeps_the_tokens(tmp_path_factory, text, size, kind):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode("utf-8", "replace"))
    text = path.read_text(encoding="utf-8")
    pairs = [(a + b).encode() for a in "ab .,'\n\t\x1c" for b in "ab .,'\n\t\x1cs"]
    tokenizer = story_llm.BPETokenizer([*ALL_BYTES, *pairs, b"    ", b"<|", b"\xe3\x80"], kind)
    blocks = list(library.read_blocks(path, size))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 2 * size
    if all(re.match(r"[ \n\t\u3000]\S", block) for block in blocks[1:]):
        assert [i for block in blocks for i in tokenizer.encode(block)] == tokenizer.encode(text)


@pytest.mark.parametrize("blanks", [1, 2, 19, 20, 21, 22, 41, 42])
def test_a_cut_behind_a_long_run_of_white_space_keeps_the_tokens(tmp_path, blanks):
    """The story's split pattern limits runs to 20 characters."""
    text = "one" + " " * blanks + "two" + "\n" * blanks + "three" * 50 + " four " + "x" * 300
    (tmp_path / "text").write_text(text, encoding="utf-8")
    tokenizer = story_llm.BPETokenizer(story_llm.train_bpe_fast(text, 400), "story")
    for size in range(blanks + 4, 2 * blanks + 300, 7):
        blocks = list(library.read_blocks(tmp_path / "text", size))
        if all(block[:1] in (" ", "\n") for block in blocks[1:] if block):
            assert [i for block in blocks for i in tokenizer.encode(block)] == tokenizer.encode(text)


def test_a_block_is_cut_at_its_last_place_between_words(tmp_path):
    (tmp_path / "text").write_text("one two\n\n  three four", encoding="utf-8")
    assert list(library.read_blocks(tmp_path / "text", 16)) == ["one two\n\n ", " three four"]
    assert list(library.read_blocks(tmp_path / "text", 10)) == ["one", " two\n\n  three", " four"]
    assert list(library.read_blocks(tmp_path / "text", 21)) == ["one two\n\n  three", " four"]
    assert list(library.read_blocks(tmp_path / "text", 22)) == ["one two\n\n  three four"]


def test_a_block_is_not_cut_at_a_character_that_is_white_space_for_python_alone(tmp_path):
    """For GPT-2's split pattern, \\x1c is a mark, and marks in a row are one word."""
    (tmp_path / "text").write_text("one.\x1ctwo three", encoding="utf-8")
    assert list(library.read_blocks(tmp_path / "text", 7)) == ["one.\x1ctw", "o", " three"]


def test_a_text_without_spaces_is_cut_anyway(tmp_path):
    (tmp_path / "text").write_text("漢字" * 5000, encoding="utf-8")
    blocks = list(library.read_blocks(tmp_path / "text", 100))
    assert "".join(blocks) == "漢字" * 5000 and max(map(len, blocks)) == 100


def test_the_file_contains_the_token_ids_of_the_whole_text_and_nothing_else(folder, monkeypatch):
    monkeypatch.setattr(library, "BLOCK", 1000)
    count = library.tokenize("big.txt", "big.bin", "story", 500)
    tokenizer, token_ids, digest = library.read_library("big.bin")
    text = (folder / "big.txt").read_text(encoding="utf-8")
    assert ids_on_disk("big.bin") == tokenizer.encode(text) == token_ids.tolist()
    assert count == len(token_ids) and token_ids.dtype == torch.uint16
    assert tokenizer.tokens == story_llm.train_bpe_fast(text, 500) and tokenizer.vocab_size > 400
    assert {path.name for path in folder.iterdir()} == {"big.txt", "big.bin", "big.bin.json"}


def test_the_description_is_plain_json_with_a_character_for_each_byte_of_a_token(tokenized):
    about = json.loads((tokenized / "big.bin.json").read_text(encoding="utf-8"))
    assert about.keys() == {"dtype", "sha256", "tokenizer"} and about["tokenizer"]["kind"] == "story"
    tokens = about["tokenizer"]["tokens"]
    assert [bytes(map(ord, token)) for token in tokens[:256]] == ALL_BYTES
    assert [bytes(map(ord, token)) for token in tokens] == library.read_library("big.bin")[0].tokens


def test_a_file_of_gpt2_tokens_is_what_nanogpt_reads(gpt2, folder):
    library.tokenize("big.txt", "big.bin")
    assert ids_on_disk("big.bin") == gpt2.encode_ordinary((folder / "big.txt").read_text(encoding="utf-8"))
    assert library.read_library("big.bin")[0].vocab_size == gpt2.n_vocab


def test_byte_order_marks_and_line_ends_are_read_as_in_a_story(folder):
    (folder / "dos.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    library.tokenize("dos.txt", "dos.bin", "story", 300)
    tokenizer, token_ids, _ = library.read_library("dos.bin")
    assert tokenizer.decode(token_ids.tolist()) == story_llm.load_text("dos.txt") == TEXT


def test_a_large_vocabulary_takes_four_bytes_for_each_token(folder, monkeypatch):
    letters = [bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz"]
    pairs = [a + b for a in letters for b in letters]
    tokens = [*ALL_BYTES, *pairs, *[a + b for a in pairs for b in pairs][:70_000], b"zzzz"]
    tokenizer = story_llm.BPETokenizer(tokens, "story")
    monkeypatch.setattr(story_llm, "make_tokenizer", lambda *_, **__: tokenizer)
    (folder / "big.txt").write_text("zzzz", encoding="utf-8")
    library.tokenize("big.txt", "big.bin", "story")
    assert ids_on_disk("big.bin", "I") == [len(tokens) - 1]
    assert library.read_library("big.bin")[1].tolist() == [len(tokens) - 1]


def test_memory_does_not_grow_with_the_text(folder, monkeypatch):
    monkeypatch.setattr(library, "BLOCK", 10_000)
    monkeypatch.setattr(story_llm, "MAX_BPE_CHARS", 10_000)
    peaks = []
    for times in (5, 50):
        (folder / "long.txt").write_text((folder / "big.txt").read_text(encoding="utf-8") * times, encoding="utf-8")
        library.tokenize("long.txt", "long.bin", "story", 300)      # warm-up, for what Python caches
        tracemalloc.start()
        library.tokenize("long.txt", "long.bin", "story", 300)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < (folder / "long.txt").stat().st_size


@pytest.mark.parametrize("content, options, words", [
    (b"", [], "empty"), (b" \n", [], "empty"), (b"a\xff b c" * 9, [], "UTF-8"),
    (b"Some words.", ["--out", "x.txt"], ".bin"), (b"Some words.", ["--out", "no/x.bin"], "another path"),
    (b"Some words.", ["--text", "none.txt"], "none.txt"), (b"Some words.", ["--text", "."], "give a text file"),
    (b"Some words.", ["--text", "text.bin", "--out", "./text.bin"], "same file"),
    (b"Some words.", ["--vocab-size", "9"], "257"),
    (b"Some words.", ["--tokenizer", "gpt2", "--vocab-size", "300"], "--tokenizer story")])
def test_what_cannot_be_tokenized_is_refused_and_every_file_is_kept(folder, capsys, content, options, words):
    for name in ("text.txt", "text.bin"):
        Path(name).write_bytes(content)
    for name in ("out.bin", "out.bin.json"):
        Path(name).write_bytes(b"from before")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = ["tokenize", "--text", "text.txt", "--out", "out.bin", "--tokenizer", "story", *options]
    assert words in error_of(capsys, *command)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("owner, name", [(json, "dumps"), (Path, "replace")])
def test_a_mistake_late_in_the_text_and_a_full_disk_leave_the_old_files(tokenized, capsys, monkeypatch, owner, name):
    before = {path.name: path.read_bytes() for path in tokenized.iterdir()}
    (tokenized / "late.txt").write_bytes(TEXT.encode() * 100 + b"\xff")
    command = ["tokenize", "--out", "big.bin", "--tokenizer", "story", "--text"]
    monkeypatch.setattr(story_llm, "MAX_BPE_CHARS", 1000)
    monkeypatch.setattr(library, "BLOCK", 1000)
    assert "UTF-8" in error_of(capsys, *command, "late.txt")

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, full_disk)
    error = error_of(capsys, *command, "big.txt")
    assert "big.bin could not be written (No space left on device)" in error
    (tokenized / "late.txt").unlink()
    assert {path.name: path.read_bytes() for path in tokenized.iterdir()} == before


def test_ctrl_c_ends_tokenize_with_exit_status_130_and_leaves_nothing(folder, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(story_llm.BPETokenizer, "encode", interrupt)
    assert library.main(["tokenize", "--text", "big.txt", "--out", "big.bin", "--tokenizer", "story"]) == 130
    assert [path.name for path in folder.iterdir()] == ["big.txt"]


# From the file to a corpus

def test_the_end_of_the_file_is_the_validation_split(tokenized):
    _, token_ids, _ = library.read_library("big.bin")
    n_val = len(token_ids) // 10
    corpus = library.library_corpus("big.bin", 0.1, context_length=n_val - 1)
    assert corpus.train_ids.tolist() + corpus.val_ids.tolist() == token_ids.tolist()
    assert len(corpus.val_ids) == n_val and corpus.train_text == ""
    whole = library.library_corpus("big.bin", 0.0, context_length=len(token_ids) - 1)
    assert len(whole.val_ids) == 0 and whole.train_ids.tolist() == token_ids.tolist()
    assert corpus.fingerprint == library.library_corpus("big.bin", 0.1, 12).fingerprint != whole.fingerprint


def test_a_split_that_does_not_fill_a_window_is_refused(tokenized):
    n_tokens = len(library.read_library("big.bin")[1])
    with pytest.raises(story_llm.StoryError, match="--val-fraction 0"):
        library.library_corpus("big.bin", 0.1, n_tokens // 10)
    with pytest.raises(story_llm.StoryError, match="smaller --context-length"):
        library.library_corpus("big.bin", 0.0, n_tokens)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the mapped files of a process")
def test_the_token_ids_stay_on_the_disk(tokenized):
    corpus = library.library_corpus("big.bin", 0.1, 12)
    assert str(tokenized / "big.bin") in Path("/proc/self/maps").read_text()
    assert corpus.train_ids.untyped_storage().data_ptr() == corpus.val_ids.untyped_storage().data_ptr()


def change_about(**changes):
    about = json.loads(Path("big.bin.json").read_text())
    Path("big.bin.json").write_text(json.dumps({**about, **changes}))


@pytest.mark.parametrize("damage, words", [
    (lambda: Path("big.bin").unlink(), "big.bin cannot be read"),
    (lambda: Path("big.bin.json").unlink(), "big.bin.json cannot be read"),
    (lambda: Path("big.bin").write_bytes(b"\0\1\2\3"), "belong"),
    (lambda: Path("big.bin").write_bytes(b""), "belong"),
    (lambda: Path("big.bin.json").write_text("[1]"), "describe"),
    (lambda: Path("big.bin.json").write_text("nonsense"), "describe"),
    (lambda: Path("big.bin.json").write_bytes(b"\xff"), "describe"),
    (lambda: change_about(dtype="float"), "describe"),
    (lambda: change_about(dtype=["uint16"]), "describe"),
    (lambda: change_about(tokenizer={"kind": "story", "tokens": ["a"]}), "describe"),
    (lambda: change_about(tokenizer={"kind": "story", "tokens": [1]}), "describe"),
    (lambda: change_about(tokenizer={"kind": "story", "tokens": ["漢"]}), "describe"),
    (lambda: change_about(tokenizer={"kind": "auto", "tokens": list(map(chr, range(256)))}), "describe"),
    (lambda: change_about(sha256="0"), "belong"),
    (lambda: (Path("big.bin").write_bytes(b""), change_about(sha256=hashlib.sha256().hexdigest())), "belong"),
])
def test_a_damaged_library_is_refused_in_one_line(tokenized, capsys, damage, words):
    damage()
    assert words in error_of(capsys, "train", "--data", "big.bin")
    assert not Path("story_llm.pt").exists()


def test_token_ids_that_the_tokenizer_does_not_know_are_refused(tokenized):
    tokenizer, token_ids, _ = library.read_library("big.bin")
    highest = token_ids.long().max().item()
    tokens = [token.decode("latin-1") for token in tokenizer.tokens]
    change_about(tokenizer={"kind": "story", "tokens": tokens[:highest - 1]})       # its <|endoftext|> is highest - 1
    with pytest.raises(story_llm.StoryError, match=f"the token id {highest}, but"):
        library.read_library("big.bin")


# Training

def test_training_on_the_file_is_training_on_its_tokens(tokenized):
    from_file = library.library_corpus("big.bin", 0.0, 12)
    text = (tokenized / "big.txt").read_text(encoding="utf-8")
    from_text = story_llm.corpus_from_text(text, from_file.tokenizer, 0.0, 12)
    from_text.train_ids = from_text.train_ids[:-1]      # the file has no `<|endoftext|>` at its end
    config, train_config = split_settings(dict(context_length=12, emb_dim=16, n_layers=1, batch_size=8, max_steps=4,
                                               prompt_windows=0.0, val_fraction=0.0, precision="fp32"))
    config, train_config = story_llm.GPTConfig(**config), story_llm.TrainConfig(**train_config)
    runs = [train_to(story_llm.new_run(corpus, config, train_config), corpus) for corpus in (from_file, from_text)]
    assert weights_equal(runs[0].model, runs[1].model)
    assert runs[0].history[-1].train_loss == runs[1].history[-1].train_loss < runs[0].history[0].train_loss
    assert runs[0].history[0].recall is None and runs[0].prompt == runs[1].prompt


def test_a_model_is_trained_resumed_and_used_by_story_llm(folder, capsys):
    tokenize = ["tokenize", "--text", "big.txt", "--out", "big.bin", "--tokenizer", "story", "--vocab-size", "300"]
    train = ["train", "--data", "big.bin", "--model", "big.pt"]
    assert library.main(tokenize) == 0
    assert library.main([*train, *SMALL, "--max-steps", "3"]) == 0
    assert library.main([*train, "--max-steps", "6", "--resume"]) == 0
    run = story_llm.load_checkpoint("big.pt")
    assert (run.step, run.total_steps) == (6, 6) and run.history[0].step == 0 and run.history[-1].step == 6
    assert run.train_config.prompt_windows == 0 and {evaluation.recall for evaluation in run.history} == {None}
    capsys.readouterr()
    assert story_llm.main(["generate", "--model", "big.pt", "--prompt", "The old", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("The old")


@pytest.mark.parametrize("options, prompt", [([], "0. The old ferryman tied"), (["--prompt", "At night"], "At night")])
def test_samples_begin_with_the_prompt_or_the_first_words(tokenized, options, prompt):
    assert library.main(["train", "--data", "big.bin", *SMALL, "--max-steps", "1", *options]) == 0
    run = story_llm.load_checkpoint("story_llm.pt")
    assert run.prompt == run.history[-1].prompt == prompt


def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(tokenized, monkeypatch):
    train = ["train", "--data", "big.bin", "--max-steps", "7", *SMALL, "--model"]
    assert library.main([*train, "whole.pt"]) == 0
    update = story_llm.training_step

    def signal_in_the_third_step(run, *batch):
        update(run, *batch)
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(story_llm, "training_step", signal_in_the_third_step)
    assert library.main([*train, "part.pt"]) == 130
    assert story_llm.load_checkpoint("part.pt").step == 3
    monkeypatch.undo()
    assert library.main(["train", "--data", str(tokenized / "big.bin"), "--resume",
                         "--model", str(tokenized / "part.pt")]) == 0
    whole, part = (story_llm.load_checkpoint(tokenized / name) for name in ("whole.pt", "part.pt"))
    assert part.step == 7 and weights_equal(whole.model, part.model)


def test_a_library_is_read_once_by_default_and_more_epochs_can_follow(tokenized):
    train = ["train", "--data", "big.bin"]
    assert library.main([*train, *SMALL, "--batch-size", "64"]) == 0
    run = story_llm.load_checkpoint("story_llm.pt")
    assert run.step == run.steps_per_epoch > 1
    assert library.main([*train, "--resume", "--epochs", "2"]) == 0
    assert story_llm.load_checkpoint("story_llm.pt").step == 2 * run.steps_per_epoch


def test_epochs_replace_the_steps_that_a_resumed_training_was_to_have(tokenized):
    assert library.main(["train", "--data", "big.bin", *SMALL, "--batch-size", "64", "--max-steps", "2"]) == 0
    assert library.main(["train", "--data", "big.bin", "--resume", "--epochs", "1"]) == 0
    run = story_llm.load_checkpoint("story_llm.pt")
    assert run.step == run.steps_per_epoch > 2


def test_resume_refuses_another_library_and_other_settings(tokenized, capsys):
    library.tokenize("big.txt", "other.bin", "story", 400)
    assert library.main(["train", "--data", "big.bin", *SMALL, "--max-steps", "1"]) == 0
    resume = ["train", "--max-steps", "2", "--resume"]
    assert "not trained on other.bin" in error_of(capsys, *resume, "--data", "other.bin")
    for option in (["--learning-rate", "0.1"], ["--emb-dim", "16"], ["--seed", "42"], ["--prompt", "The"]):
        error = error_of(capsys, *resume, "--data", "big.bin", *option)
        assert f"{option[0]} cannot be combined with --resume" in error
    assert story_llm.load_checkpoint("story_llm.pt").step == 1


@pytest.mark.parametrize("option", [["--prompt-windows", "0.5"], ["--text", "big.txt"], ["--tokenizer", "story"],
                                    ["--vocab-size", "300"], ["--plot", "x.png"], ["--full-vocab"]])
def test_options_that_need_the_text_are_wrong_usage(option, capsys):
    assert library.main(["train", *option]) == 2


OTHER_VALUES = {"epochs": 2, "max_steps": 12, "batch_size": 7, "learning_rate": 0.01, "warmup_steps": 0,
                "weight_decay": 0.5, "grad_clip": 0.1, "val_fraction": 0.2, "eval_every": 3, "seed": 1,
                "context_length": 11, "emb_dim": 20, "n_heads": 2, "n_layers": 2, "drop_rate": 0.5, "precision": "bf16"}


def other_value(f):
    """A value of a setting that is not its default; for a setting that this file does not know, a guess."""
    if f.name in OTHER_VALUES:
        return OTHER_VALUES[f.name]
    if f.name in story_llm.CHOICES:
        return story_llm.CHOICES[f.name][-1]
    return not f.default if f.type is bool else f.default + 1


def outcome(options):
    """What a short training gives: the weights and every evaluation."""
    assert library.main(["train", "--data", "big.bin", "--emb-dim", "16", "--n-layers", "1", "--context-length", "12",
                         "--batch-size", "16", "--precision", "fp32", *options]) == 0
    run = story_llm.load_checkpoint("story_llm.pt")
    weights = {name: weight.tolist() for name, weight in run.model.state_dict().items()}
    return weights, [dataclasses.astuple(evaluation) for evaluation in run.history]


@pytest.fixture(scope="module")
def usual_outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        Path("big.txt").write_text("\n".join(f"{i}. {TEXT}" for i in range(20)), encoding="utf-8")
        library.tokenize("big.txt", "big.bin", "story", 300)
        return outcome([])


@pytest.mark.parametrize("f", dataclasses.fields(story_llm.TrainConfig) + dataclasses.fields(story_llm.GPTConfig),
                         ids=lambda f: f.name)
def test_every_setting_has_an_effect_or_is_refused(tokenized, usual_outcome, f):
    """Also a setting that story_llm.py gets later: `train` must not accept it and then ignore it."""
    value = other_value(f)
    option = [story_llm.option_string(f.name)] + ([] if f.type is bool else [str(value)])
    if f.name in ("prompt_windows", "vocab_size"):
        assert library.main(["train", *option]) == 2
    elif f.name == "keep_best":     # this has an effect only if the validation loss rises
        assert outcome(["--learning-rate", "2", *option]) != outcome(["--learning-rate", "2"])
    else:
        assert outcome(option) != usual_outcome


def test_a_line_break_can_be_typed_in_the_prompt_of_any_program():
    """Their help says so, because it is that of story_llm.py."""
    for args in (library.parse(["train", "--prompt", r"One\nTwo"]),
                 story_llm.parse(["train", "--prompt", r"One\nTwo"])):
        assert args.prompt == args.given["prompt"] == "One\nTwo"
