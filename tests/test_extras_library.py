"""extras/library.py: the file that it writes, the corpus that it makes of the file, and the training."""
import array
import dataclasses
import hashlib
import json
import os
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


def raising(error):
    def function(*arguments):
        raise error
    return function


def error_of(capsys, *arguments):
    """The error message of a command, which must be a single line."""
    capsys.readouterr()
    assert library.main(list(arguments)) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1
    return error


# From a text to a file of token ids

@given(text=some_text, size=st.integers(2, 40), kind=st.sampled_from(["story", "gpt2"]))
def test_blocks_lose_nothing_of_any_text_and_a_cut_between_words_keeps_the_tokens(tmp_path_factory, text, size, kind):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.replace("\0", "").encode("utf-8", "replace"))
    text = path.read_text(encoding="utf-8")
    pairs = [(a + b).encode() for a in "ab .,'\n\t\x1c" for b in "ab .,'\n\t\x1cs"]
    tokenizer = story_llm.BPETokenizer([*ALL_BYTES, *pairs, b"    ", b"<|", b"\xe3\x80"], kind)
    blocks = list(library.read_blocks(path, size))
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 2 * size
    if all(re.match(r"[ \n\t\u3000]\S", block) for block in blocks[1:]):
        assert [i for block in blocks for i in tokenizer.encode(block)] == tokenizer.encode(text)


@pytest.mark.parametrize("blanks", [2, 20, 21, 41])
def test_a_cut_behind_a_long_run_of_white_space_keeps_the_tokens(tmp_path, blanks):
    """The story's split pattern limits runs to 20 characters."""
    text = "one" + " " * blanks + "two" + "\n" * blanks + "three" * 50 + " four " + "x" * 300
    (tmp_path / "text").write_text(text, encoding="utf-8")
    tokenizer = story_llm.BPETokenizer(story_llm.train_bpe(text, 400), "story")
    for size in range(blanks + 4, 2 * blanks + 300, 7):
        blocks = list(library.read_blocks(tmp_path / "text", size))
        if all(block[:1] in (" ", "\n") for block in blocks[1:] if block):
            assert [i for block in blocks for i in tokenizer.encode(block)] == tokenizer.encode(text)


@pytest.mark.parametrize("text, size, blocks", [
    ("one two\n\n  three four", 16, ["one two\n\n ", " three four"]),
    ("one two\n\n  three four", 10, ["one", " two\n\n  three", " four"]),
    ("one two\n\n  three four", 22, ["one two\n\n  three four"]), ("one two", 7, ["one", " two"]), ("", 7, [""]),
    ("one.\x1ctwo three", 7, ["one.\x1ctw", "o", " three"]),      # white space for Python, a mark for GPT-2's pattern
    ("漢字" * 25, 20, ["漢字" * 10, "漢字" * 10, "漢字" * 5])])
def test_a_block_is_cut_at_its_last_place_between_words_or_at_its_end(tmp_path, text, size, blocks):
    (tmp_path / "text").write_text(text, encoding="utf-8")
    assert list(library.read_blocks(tmp_path / "text", size)) == blocks


def test_the_files_contain_the_token_ids_of_the_whole_text_and_the_tokens_as_plain_json(folder, monkeypatch):
    monkeypatch.setattr(library, "BLOCK", 1000)
    count = library.tokenize("big.txt", "big.bin", "story", 500)
    tokenizer, token_ids, digest = library.read_library("big.bin")
    text = (folder / "big.txt").read_text(encoding="utf-8")
    assert ids_on_disk("big.bin") == tokenizer.encode(text) == token_ids.tolist()
    assert count == len(token_ids) and token_ids.dtype == torch.uint16
    tokens = json.loads(Path("big.bin.json").read_text(encoding="utf-8"))["tokenizer"]["tokens"]
    assert [bytes(map(ord, token)) for token in tokens] == tokenizer.tokens == story_llm.train_bpe(text, 500)
    assert {path.name for path in folder.iterdir()} == {"big.txt", "big.bin", "big.bin.json"}


def test_a_file_of_gpt2_tokens_is_what_nanogpt_reads(gpt2, folder):
    library.tokenize("big.txt", "big.bin")
    assert ids_on_disk("big.bin") == gpt2.encode_ordinary((folder / "big.txt").read_text(encoding="utf-8"))
    assert library.read_library("big.bin")[0].vocab_size == gpt2.n_vocab


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_encodings_and_line_ends_are_read_as_in_a_story(folder, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (folder / "dos.txt").write_bytes((mark + TEXT.replace("\n", "\r\n")).encode(encoding))
    library.tokenize("dos.txt", "dos.bin", "story", 300)
    tokenizer, token_ids, _ = library.read_library("dos.bin")
    assert tokenizer.decode(token_ids.tolist()) == story_llm.load_text("dos.txt") == TEXT


def test_a_large_vocabulary_takes_four_bytes_for_each_token(folder, monkeypatch):
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    tokenizer = story_llm.BPETokenizer([*ALL_BYTES, *pairs, b"zzzz"], "story")
    monkeypatch.setattr(story_llm, "make_tokenizer", lambda *_, **__: tokenizer)
    (folder / "big.txt").write_text("zzzz", encoding="utf-8")
    library.tokenize("big.txt", "big.bin", "story")
    highest = len(tokenizer.tokens) - 1
    assert ids_on_disk("big.bin", "I") == library.read_library("big.bin")[1].tolist() == [highest] and highest > 1 << 16


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
    ("Some words.".encode("utf-16-le"), [], "UTF-16"), (b"\xff\xfeS", [], "UTF-16"),
    (b"Some words.", ["--out", "x.txt"], ".bin"), (b"Some words.", ["--out", "no/x.bin"], "folder that exists"),
    (b"Some words.", ["--text", "none.txt"], "none.txt"), (b"Some words.", ["--text", "."], "give a text file"),
    (b"Some words.", ["--text", "text.bin", "--out", "./text.bin"], "same file"),
    (b"Some words.", ["--text", "out.bin.json"], "same file"),
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


@pytest.mark.parametrize("owner, name", [(json, "dumps"), (os, "replace")])
def test_a_mistake_late_in_the_text_and_a_full_disk_leave_the_old_files(tokenized, capsys, monkeypatch, owner, name):
    before = {path.name: path.read_bytes() for path in tokenized.iterdir()}
    (tokenized / "late.txt").write_bytes(TEXT.encode() * 100 + b"\xff")
    command = ["tokenize", "--out", "big.bin", "--tokenizer", "story", "--text"]
    monkeypatch.setattr(story_llm, "MAX_BPE_CHARS", 1000)
    monkeypatch.setattr(library, "BLOCK", 1000)
    assert "UTF-8" in error_of(capsys, *command, "late.txt")
    monkeypatch.setattr(owner, name, raising(OSError(28, "No space left on device")))
    assert "No space left on device" in error_of(capsys, *command, "big.txt")
    (tokenized / "late.txt").unlink()
    assert {path.name: path.read_bytes() for path in tokenized.iterdir()} == before


def test_files_of_other_names_links_and_modes_stay_as_they_are(folder):
    kept = {name: f"my own {name}" for name in ("big.bin.tmp", "big.bin.json.tmp")}
    for name, text in kept.items():
        Path(name).write_text(text)
    Path("disk").mkdir()
    Path("disk/real.bin").write_bytes(b"from before")
    Path("disk/real.bin").chmod(0o600)
    try:
        Path("big.bin").symlink_to("disk/real.bin")
    except OSError:
        pytest.skip("links cannot be made here")
    library.tokenize("big.txt", "big.bin", "story", 300)
    assert {name: Path(name).read_text() for name in kept} == kept
    assert Path("big.bin").is_symlink() and Path("disk/real.bin").stat().st_mode & 0o777 == 0o600
    tokenizer, token_ids, _ = library.read_library("big.bin")
    assert tokenizer.decode(token_ids.tolist()) == Path("big.txt").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {*kept, "big.txt", "disk", "big.bin", "big.bin.json"}


def test_ctrl_c_ends_tokenize_with_exit_status_130_and_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(story_llm.BPETokenizer, "encode", raising(KeyboardInterrupt))
    assert library.main(["tokenize", "--text", "big.txt", "--out", "big.bin", "--tokenizer", "story"]) == 130
    assert [path.name for path in folder.iterdir()] == ["big.txt"]


# From the file to a corpus

def test_the_end_of_the_file_is_the_validation_split(tokenized):
    _, token_ids, _ = library.read_library("big.bin")
    n_val = len(token_ids) // 10
    corpus = library.library_corpus("big.bin", 0.1, 12)
    assert corpus.train_ids.tolist() + corpus.val_ids.tolist() == token_ids.tolist()
    assert len(corpus.val_ids) == n_val and corpus.text == corpus.train_text == ""
    whole = library.library_corpus("big.bin", 0.0, context_length=len(token_ids) - 1)
    assert len(whole.val_ids) == 0 and whole.train_ids.tolist() == token_ids.tolist()
    assert corpus.fingerprint == library.library_corpus("big.bin", 0.1, 12).fingerprint != whole.fingerprint
    with pytest.raises(story_llm.StoryError, match="smaller --context-length"):
        library.library_corpus("big.bin", 0.0, context_length=len(token_ids))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists the mapped files of a process")
def test_the_token_ids_stay_on_the_disk(tokenized):
    corpus = library.library_corpus("big.bin", 0.1, 12)
    assert str(tokenized / "big.bin") in Path("/proc/self/maps").read_text()
    assert corpus.train_ids.untyped_storage().data_ptr() == corpus.val_ids.untyped_storage().data_ptr()


CHARACTERS = list(map(chr, range(256)))     # a tokenizer of bytes alone


def change_about(**changes):
    about = json.loads(Path("big.bin.json").read_text())
    Path("big.bin.json").write_text(json.dumps({**about, **changes}))


@pytest.mark.parametrize("damage, words", [
    (lambda: Path("big.bin").unlink(), "big.bin cannot be read"),
    (lambda: Path("big.bin.json").unlink(), "big.bin.json cannot be read"),
    (lambda: Path("big.bin").write_bytes(b"\0\1\2\3"), "belong"),
    (lambda: Path("big.bin").write_bytes(b""), "belong"),
    (lambda: (Path("big.bin.json").unlink(), Path("big.bin.json").mkdir()), "folder"),
    (lambda: Path("big.bin.json").write_text("[1]"), "describe"),
    (lambda: Path("big.bin.json").write_text("[" * 100_000), "describe"),
    (lambda: Path("big.bin.json").write_bytes(b"\xff"), "describe"),
    (lambda: change_about(dtype="float\n"), "describe"),
    (lambda: change_about(dtype=["uint16"]), "describe"),
    (lambda: change_about(tokenizer={"kind": ["story"], "tokens": CHARACTERS}), "describe"),
    (lambda: change_about(tokenizer={"kind": "story", "tokens": ["a"]}), "describe"),
    (lambda: change_about(tokenizer={"kind": "story", "tokens": ["漢"]}), "describe"),
    (lambda: change_about(tokenizer={"kind": "auto", "tokens": CHARACTERS}), "describe"),
    (lambda: change_about(tokenizer={"kind": "story", "tokens": CHARACTERS}), "only 257 tokens"),
    (lambda: change_about(sha256="0"), "belong"),
    (lambda: (Path("big.bin").write_bytes(b""), change_about(sha256=hashlib.sha256().hexdigest())), "belong"),
])
def test_a_damaged_library_is_refused_in_one_line(tokenized, capsys, damage, words):
    damage()
    assert words in error_of(capsys, "train", "--data", "big.bin")
    assert not Path("story_llm.pt").exists()


# Training

def test_training_on_the_file_is_training_on_its_tokens(tokenized):
    from_file = library.library_corpus("big.bin", 0.0, 12)
    text = (tokenized / "big.txt").read_text(encoding="utf-8")
    config, train_config = split_settings(dict(context_length=12, emb_dim=16, n_layers=1, batch_size=8, max_steps=4,
                                               prompt_windows=0.0, val_fraction=0.0, precision="fp32"))
    config, train_config = story_llm.GPTConfig(**config), story_llm.TrainConfig(**train_config)
    from_text = story_llm.corpus_from_text(text, from_file.tokenizer, train_config)
    from_text.train_ids = from_text.train_ids[:-1]      # the file has no `<|endoftext|>` at its end
    runs = [train_to(story_llm.new_run(corpus, config, train_config), corpus) for corpus in (from_file, from_text)]
    assert weights_equal(runs[0].model, runs[1].model)
    assert runs[0].history[-1].train_loss == runs[1].history[-1].train_loss < runs[0].history[0].train_loss
    assert runs[0].history[0].recall is None and runs[0].prompt == runs[1].prompt


@pytest.mark.usefixtures("handlers_are_restored")
def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(tokenized, monkeypatch, capsys):
    train = ["train", "--data", "big.bin", "--max-steps", "7", *SMALL, "--model"]
    assert library.main([*train, "whole.pt"]) == 0
    learning_rate = story_llm.learning_rate

    def signal_in_the_third_step(step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(step, *rest)

    monkeypatch.setattr(story_llm, "learning_rate", signal_in_the_third_step)
    assert library.main([*train, "part.pt"]) == 130
    assert story_llm.load_checkpoint("part.pt").step == 3
    monkeypatch.undo()
    monkeypatch.chdir(tokenized)
    assert library.main(["train", "--data", "big.bin", "--resume", "--model", "part.pt"]) == 0
    whole, part = (story_llm.load_checkpoint(name) for name in ("whole.pt", "part.pt"))
    assert part.step == 7 and weights_equal(whole.model, part.model)
    assert {evaluation.recall for evaluation in part.history} == {None}
    assert story_llm.main(["generate", "--model", "part.pt", "--prompt", "The old", "--max-new-tokens", "3"]) == 0
    assert "\nThe old" in capsys.readouterr().out


def test_a_library_is_read_once_by_default_and_more_epochs_can_follow(tokenized, capsys):
    train = ["train", "--data", "big.bin"]
    assert library.main([*train, *SMALL, "--batch-size", "64"]) == 0
    run = story_llm.load_checkpoint("story_llm.pt")
    assert run.step == run.steps_per_epoch > 1
    assert "larger --epochs" in error_of(capsys, *train, "--resume")
    assert library.main([*train, "--resume", "--epochs", "2"]) == 0
    assert story_llm.load_checkpoint("story_llm.pt").step == 2 * run.steps_per_epoch


def test_the_best_weights_need_a_validation_split(tokenized):
    for val_fraction, status in (("0", 1), ("0.2", 0)):
        assert library.main(["train", "--data", "big.bin", *SMALL, "--max-steps", "1", "--keep-best", "--val-fraction",
                             val_fraction]) == status


def test_the_preset_gpt2_small_has_its_shape_and_samples_begin_with_the_prompt(tokenized):
    small = ["--emb-dim", "24", "--n-layers", "1", "--max-steps", "1", "--batch-size", "1", "--context-length", "12"]
    preset = ["--preset", "gpt2-small", "--prompt", r"At\nnight"]
    assert library.main(["train", "--data", "big.bin", *preset, *small]) == 0
    run = story_llm.load_checkpoint("story_llm.pt")
    assert (run.config.n_heads, run.config.qkv_bias, run.config.gelu) == (12, True, "tanh")
    assert run.prompt == run.history[-1].prompt == "At\nnight"


def test_a_model_does_not_replace_its_library(tokenized, capsys):
    assert "same file" in error_of(capsys, "train", "--data", "big.bin", "--model", "./big.bin")


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
                                    ["--vocab-size", "300"], ["--plot", "x.png"], ["--preset", "writer"]])
def test_options_that_need_the_text_are_refused_in_one_line(option, capsys):
    assert library.main(["train", *option]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("f", dataclasses.fields(story_llm.TrainConfig) + dataclasses.fields(story_llm.GPTConfig),
                         ids=lambda f: f.name)
def test_every_setting_is_used_or_refused(tokenized, f):
    """Also a setting that story_llm.py gets later: `train` must not accept it and then ignore it."""
    if "choices" in f.metadata:
        value = next(choice for choice in f.metadata["choices"] if choice != f.default)
    else:
        value = {bool: True, int: 2 * f.default + 4, float: f.default / 2 + 0.2}[f.type]
    command = ["train", "--data", "big.bin", story_llm.option_string(f.name)] + ([] if f.type is bool else [str(value)])
    if f.name in ("prompt_windows", "vocab_size"):
        with pytest.raises(SystemExit):
            library.parse(command)
    else:
        run, corpus = library.new_run(library.parse(command))
        settings = {**dataclasses.asdict(run.config), **dataclasses.asdict(run.train_config)}
        assert settings[f.name] == value != f.default
        assert len(corpus.train_text) == run.train_config.prompt_windows == 0
