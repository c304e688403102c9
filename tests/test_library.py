"""A text as a file of tokens: what is written, what is read, how it trains."""
import array
import json

import pytest
import torch
from conftest import STORY, TEXT, tiny_run, weights_equal
from hypothesis import given

import story_llm
from conftest import some_text
from story_llm import TokenFile, TrainConfig, main, text_blocks, tokenize_file


@pytest.fixture
def big(tmp_path):
    """A file of TEXT many times over, its paragraphs numbered."""
    path = tmp_path / "big.txt"
    path.write_text("\n".join(f"{i}. {TEXT}" for i in range(60)), encoding="utf-8")
    return path


def ids_on_disk(path, typecode="H"):
    ids = array.array(typecode)
    ids.frombytes(path.read_bytes())
    return ids.tolist()


@pytest.mark.parametrize("size", [50, 333, 1 << 20])
def test_blocks_are_the_whole_text_and_their_tokens_are_its_tokens(big, size):
    text = big.read_text(encoding="utf-8")
    tokenizer = story_llm.make_tokenizer("story", text, 0.0, 400)
    with open(big, encoding="utf-8") as file:
        blocks = list(text_blocks(file, size))
    assert "".join(blocks) == text and (len(blocks) > 1 or size > len(text))
    assert [i for block in blocks for i in tokenizer.encode(block)] == tokenizer.encode(text)


@given(text=some_text)
def test_any_text_is_cut_without_loss(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("cut") / "text"
    path.write_bytes(text.encode("utf-8", "replace"))
    text = path.read_text(encoding="utf-8")
    tokenizer = story_llm.BPETokenizer([bytes([b]) for b in range(256)] + [b" a", b"  ", b" b"], "story")
    with open(path, encoding="utf-8") as file:
        blocks = list(text_blocks(file, 3))
    assert "".join(blocks) == text
    assert [i for block in blocks for i in tokenizer.encode(block)] == tokenizer.encode(text)


def test_the_file_holds_the_ids_of_the_whole_text_and_nothing_else(big, tmp_path, monkeypatch):
    monkeypatch.setattr(story_llm, "BLOCK", 1000)
    count = tokenize_file(big, tmp_path / "big.bin", "story", 500)
    tokens, text = TokenFile(tmp_path / "big.bin"), big.read_text(encoding="utf-8")
    assert ids_on_disk(tmp_path / "big.bin") == tokens.tokenizer.encode(text) == tokens.ids.tolist()
    assert count == len(tokens.ids) and tokens.ids.dtype == torch.uint16
    assert tokens.tokenizer.decode(tokens.ids.tolist()) == text
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_of_gpt2s_tokens_is_what_nanogpt_reads(gpt2, big, tmp_path):
    tokenize_file(big, tmp_path / "big.bin", "gpt2")
    assert ids_on_disk(tmp_path / "big.bin") == gpt2.encode_ordinary(big.read_text(encoding="utf-8"))


def test_a_larger_vocabulary_takes_four_bytes(big, tmp_path, monkeypatch):
    letters = "abcdefghijklmnopqrstuvwxyz".encode()
    pairs = [bytes([a, b]) for a in letters for b in letters]
    tokens = [bytes([b]) for b in range(256)] + pairs + [a + b for a in pairs for b in pairs][:70_000] + [b"zzzz"]
    monkeypatch.setattr(story_llm, "make_tokenizer", lambda *_: story_llm.BPETokenizer(tokens, "story"))
    big.write_text("zzzz", encoding="utf-8")
    tokenize_file(big, tmp_path / "big.bin", "story")
    assert (tmp_path / "big.bin").stat().st_size % 4 == 0
    assert TokenFile(tmp_path / "big.bin").ids.dtype == torch.uint32
    assert ids_on_disk(tmp_path / "big.bin", "I") == TokenFile(tmp_path / "big.bin").tokenizer.encode("zzzz") == [len(tokens) - 1]


def test_training_on_the_file_is_training_on_its_tokens(big, tmp_path):
    """Without openings, and with the same tokens on both sides of the split, text and file give the same weights."""
    tokenize_file(big, tmp_path / "big.bin", "story", 300)
    tokens, text = TokenFile(tmp_path / "big.bin"), big.read_text(encoding="utf-8")
    runs = []
    for source in (tokens, text):
        run = tiny_run(source, "auto" if source is tokens else "story", openings=0.0, val_fraction=0.0, epochs=1)
        run.train_config = TrainConfig(**{**vars(run.train_config), "epochs": 0})
        story_llm.train(run, source, lambda line: None, stop=lambda: run.step == 3)
        runs.append(run)
    assert weights_equal(runs[0].model, runs[1].model)
    assert runs[0].history[0]["recall"] is None and runs[0].fingerprint == tokens.sha256


def test_it_trains_goes_on_evaluates_and_generates_from_the_command_line(big, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--emb-dim", "32", "--n-layers", "1", "--batch-size", "8", "--text", "big.bin"]
    assert main(["tokenize", "--text", str(big), "--out", "big.bin", "--tokenizer", "story"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert main(["train", *small, "--epochs", "1"]) == 0
    assert main(["train", *small, "--epochs", "2", "--resume"]) == 0
    assert main(["evaluate", "--text", "big.bin"]) == 0
    assert main(["windows", "--text", "big.bin"]) == main(["model", "--text", "big.bin"]) == 0
    assert main(["generate", "--prompt", "The old ferryman", "--max-new-tokens", "3"]) == 0
    output = capsys.readouterr()
    assert "Recall" in output.out and "error" not in output.err


@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "big.bin").unlink(), "tokenize"),
    (lambda folder: (folder / "big.bin.json").unlink(), "tokenize"),
    (lambda folder: (folder / "big.bin").write_bytes(b"\0\1\2\3"), "fit"),
    (lambda folder: (folder / "big.bin.json").write_text("[1]"), "description"),
    (lambda folder: (folder / "big.bin.json").write_text("nonsense"), "description"),
    (lambda folder: (folder / "big.bin.json").write_text(json.dumps(
        {**json.loads((folder / "big.bin.json").read_text()), "dtype": "float"})), "description"),
])
def test_a_damaged_file_is_refused_in_one_line(big, tmp_path, monkeypatch, capsys, damage, words):
    monkeypatch.chdir(tmp_path)
    tokenize_file(big, "big.bin", "story", 300)
    damage(tmp_path)
    assert main(["train", "--text", "big.bin"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize("content, options, words", [
    (b"", [], "empty"), (b" \n", [], "empty"), (b"a\xff b c" * 9, [], "UTF-8"),
    (b"Some words of text.", ["--tokenizer", "word"], "byte-pair"), (b"Some words.", ["--out", "x.txt"], ".bin"),
    (b"Some words.", ["--out", "no/folder.bin"], "folder"), (b"Some words.", ["--text", "none.txt"], "none.txt")])
def test_what_cannot_be_tokenized_is_refused_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys, content, options,
                                                                       words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(content)
    command = ["tokenize", "--text", "text.txt", "--out", "out.bin", "--tokenizer", "story", *options]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_text_too_large_for_memory_is_told_the_way(tmp_path, monkeypatch, capsys):
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(300_000_000)  # without taking that room on the disk
    assert main(["train", "--text", str(tmp_path / "huge.txt")]) == 1
    error = capsys.readouterr().err
    assert "300 MB" in error and "tokenize" in error and error.count("\n") == 1


def test_the_learned_encoding_of_a_long_text_is_learned_from_its_beginning_and_says_so(monkeypatch):
    monkeypatch.setattr(story_llm, "LEARN_FROM", len(TEXT))
    lines = []
    tokenizer = story_llm.make_tokenizer("story", TEXT + "Vikram " * 999, 0.0, 300, log=lines.append)
    assert tokenizer.tokens == story_llm.learn_byte_pairs(TEXT, 300) and "first" in lines[0]


def test_the_story_itself_is_small_enough_for_memory():
    assert STORY.stat().st_size < 1e6


def test_a_text_without_spaces_is_cut_all_the_same(tmp_path):
    (tmp_path / "text").write_text("漢字" * 5000, encoding="utf-8")
    with open(tmp_path / "text", encoding="utf-8") as file:
        blocks = list(text_blocks(file, 100))
    assert "".join(blocks) == "漢字" * 5000 and max(map(len, blocks)) == 1600


def test_a_file_for_another_tokenizer_than_the_models_is_refused(big, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, size in (("a.bin", 300), ("b.bin", 400)):
        tokenize_file(big, name, "story", size)
    assert main(["train", "--text", "a.bin", "--max-steps", "2", "--emb-dim", "32"]) == 0
    assert main(["plot", "--samples", "--text", "a.bin"]) == 0
    capsys.readouterr()
    for wrong in (["evaluate", "--text", "b.bin"], ["words", "--text", "a.bin"], ["plot", "--samples", "--text", "b.bin"],
                  ["tokenize", "--text", "a.bin", "--out", "c.bin"]):
        assert main(wrong) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_tokens_that_the_tokenizer_does_not_know_are_refused(big, tmp_path):
    path = tmp_path / "big.bin"
    tokenize_file(big, path, "story", 300)
    about = json.loads(path.with_name("big.bin.json").read_text())
    path.with_name("big.bin.json").write_text(json.dumps({**about, "tokens": about["tokens"][:256]}))
    with pytest.raises(ValueError, match="does not know"):
        TokenFile(path)
