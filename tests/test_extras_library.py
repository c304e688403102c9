"""extras/library.py: what is written of a text, what is read of it, and how it trains."""
import array
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TEXT, some_text, split_settings, story_llm, weights_equal
from hypothesis import given, strategies as st

sys.path.insert(0, str(ROOT / "extras"))
import library  # noqa: E402

SMALL = ["--emb-dim", "16", "--n-layers", "1", "--context-length", "12", "--batch-size", "8", "--eval-every", "5"]
TO_CUT_AT = " \n\t\u3000"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a text, in which the program runs: TEXT many times over, its paragraphs numbered."""
    text = "\n".join(f"{i}. {TEXT}" for i in range(20))
    (tmp_path / "big.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids_on_disk(path, typecode="H"):
    return array.array(typecode, Path(path).read_bytes()).tolist()


def blocks_of(path, size):
    with open(path, encoding="utf-8") as file:
        return list(library.text_blocks(file, size))


def mistake(capsys, *arguments):
    """What the program says to wrong arguments: one line, and nothing is done."""
    capsys.readouterr()
    assert library.main(list(arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("size", [60, 333, 1 << 20])
@pytest.mark.parametrize("kind", ["story", "gpt2"])
def test_blocks_are_the_whole_text_and_their_tokens_are_its_tokens(folder, size, kind):
    text = (folder / "big.txt").read_text(encoding="utf-8")
    tokenizer = story_llm.BPETokenizer(story_llm.learn_byte_pairs(text, 400), kind)
    blocks = blocks_of("big.txt", size)
    assert "".join(blocks) == text and (len(blocks) > len(text) // size)
    assert [i for block in blocks for i in tokenizer.encode(block)] == tokenizer.encode(text)


@given(text=some_text, size=st.integers(2, 40), kind=st.sampled_from(["story", "gpt2"]))
def test_any_text_is_cut_without_loss_and_between_words_its_tokens_stay(tmp_path_factory, text, size, kind):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode("utf-8", "replace"))
    text = path.read_text(encoding="utf-8")
    letters = [bytes([byte]) for byte in range(256)]
    pairs = [(a + b).encode() for a in "ab .,'\n\t\x1c" for b in "ab .,'\n\t\x1cs"]
    tokenizer = story_llm.BPETokenizer([*letters, *pairs, b"    ", b"<|", b"\xe3\x80"], kind)
    blocks = blocks_of(path, size)
    assert "".join(blocks) == text
    assert max(map(len, blocks)) <= 2 * size
    if all(block[0] in TO_CUT_AT and block[1:].strip() and not block[1].isspace() for block in blocks[1:] if block):
        assert [i for block in blocks for i in tokenizer.encode(block)] == tokenizer.encode(text)


def test_a_block_is_cut_at_the_last_place_between_words(tmp_path):
    (tmp_path / "text").write_text("one two\n\n  three four", encoding="utf-8")
    assert blocks_of(tmp_path / "text", 16) == ["one two\n\n ", " three", " four"]
    assert blocks_of(tmp_path / "text", 10) == ["one", " two\n\n  three", " four", ""]


def test_a_text_without_spaces_is_cut_all_the_same(tmp_path):
    (tmp_path / "text").write_text("漢字" * 5000, encoding="utf-8")
    blocks = blocks_of(tmp_path / "text", 100)
    assert "".join(blocks) == "漢字" * 5000 and max(map(len, blocks)) == 100


def test_the_file_holds_the_ids_of_the_whole_text_and_nothing_else(folder, monkeypatch):
    monkeypatch.setattr(library, "BLOCK", 1000)
    count = library.tokenize("big.txt", "big.bin", "story", 500)
    tokenizer, token_ids, digest = library.read_library("big.bin")
    text = (folder / "big.txt").read_text(encoding="utf-8")
    assert ids_on_disk("big.bin") == tokenizer.encode(text) == token_ids.tolist()
    assert count == len(token_ids) and token_ids.dtype == torch.uint16 and tokenizer.vocab_size > 400
    assert json.loads((folder / "big.bin.json").read_text()).keys() == {"dtype", "sha256", "tokenizer"}
    assert {path.name for path in folder.iterdir()} == {"big.txt", "big.bin", "big.bin.json"}


def test_a_file_of_gpt2s_tokens_is_what_nanogpt_reads(gpt2, folder):
    library.tokenize("big.txt", "big.bin")
    assert ids_on_disk("big.bin") == gpt2.encode_ordinary((folder / "big.txt").read_text(encoding="utf-8"))
    assert library.read_library("big.bin")[0].vocab_size == gpt2.n_vocab


def test_marks_and_line_ends_of_editors_are_read_as_a_story_is(folder):
    (folder / "dos.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    library.tokenize("dos.txt", "dos.bin", "story", 300)
    tokenizer, token_ids, _ = library.read_library("dos.bin")
    assert tokenizer.decode(token_ids.tolist()) == story_llm.load_text("dos.txt") == TEXT


def test_a_larger_vocabulary_takes_four_bytes(folder, monkeypatch):
    letters = [bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz"]
    pairs = [a + b for a in letters for b in letters]
    tokens = [*[bytes([byte]) for byte in range(256)], *pairs, *[a + b for a in pairs for b in pairs][:70_000], b"zzzz"]
    tokenizer = story_llm.BPETokenizer(tokens, "story")
    monkeypatch.setattr(story_llm, "make_tokenizer", lambda *_, **__: tokenizer)
    (folder / "big.txt").write_text("zzzz", encoding="utf-8")
    library.tokenize("big.txt", "big.bin", "story")
    assert ids_on_disk("big.bin", "I") == [len(tokens) - 1]
    assert library.read_library("big.bin")[1].tolist() == [len(tokens) - 1]


def test_memory_does_not_grow_with_the_text(folder, monkeypatch):
    monkeypatch.setattr(library, "BLOCK", 10_000)
    monkeypatch.setattr(story_llm, "LEARN_FROM", 10_000)
    peaks = []
    for times in (5, 50):
        (folder / "long.txt").write_text((folder / "big.txt").read_text(encoding="utf-8") * times, encoding="utf-8")
        library.tokenize("long.txt", "long.bin", "story", 300)      # once, for what is made only once
        tracemalloc.start()
        library.tokenize("long.txt", "long.bin", "story", 300)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < (folder / "long.txt").stat().st_size


def test_the_end_is_kept_for_validation_if_it_fills_a_window(folder):
    library.tokenize("big.txt", "big.bin", "story", 300)
    _, token_ids, _ = library.read_library("big.bin")
    n_val = len(token_ids) // 10
    corpus = library.library_corpus("big.bin", 0.1, context_length=n_val - 1)
    assert corpus.train_ids.tolist() + corpus.val_ids.tolist() == token_ids.tolist()
    assert len(corpus.val_ids) == n_val and corpus.train_text == ""
    short = library.library_corpus("big.bin", 0.1, context_length=n_val)
    assert len(short.val_ids) == 0 and len(short.train_ids) == len(token_ids)
    assert corpus.fingerprint == library.library_corpus("big.bin", 0.1, 12).fingerprint != short.fingerprint


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shown by Linux only")
def test_the_ids_stay_on_the_disk(folder):
    library.tokenize("big.txt", "big.bin", "story", 300)
    corpus = library.library_corpus("big.bin", 0.1, 12)
    assert str(folder / "big.bin") in Path("/proc/self/maps").read_text()
    assert corpus.train_ids.untyped_storage().data_ptr() == corpus.val_ids.untyped_storage().data_ptr()


def test_training_on_the_file_is_training_on_its_tokens(folder):
    library.tokenize("big.txt", "big.bin", "story", 300)
    from_file = library.library_corpus("big.bin", 0.0, 12)
    text = (folder / "big.txt").read_text(encoding="utf-8")
    from_text = story_llm.encode_corpus(from_file.tokenizer, text, "")
    config, train_config = split_settings(dict(context_length=12, emb_dim=16, n_layers=1, batch_size=8, max_steps=4,
                                               openings=0.0, val_fraction=0.0, precision="fp32"))
    runs = []
    for corpus in (from_file, from_text):
        run = story_llm.new_run(corpus, story_llm.GPTConfig(**config), story_llm.TrainConfig(**train_config))
        story_llm.train(run, corpus)
        runs.append(run)
    assert weights_equal(runs[0].model, runs[1].model)
    assert runs[0].history[-1].train_loss == runs[1].history[-1].train_loss < runs[0].history[0].train_loss
    assert runs[0].history[0].recall is None and runs[0].prompt == runs[1].prompt


def test_it_trains_goes_on_and_story_llm_generates_from_it(folder, capsys):
    tokenize = ["tokenize", "--text", "big.txt", "--out", "big.bin", "--tokenizer", "story", "--vocab-size", "300"]
    train = ["train", "--data", "big.bin", "--model", "big.pt", *SMALL]
    assert library.main(tokenize) == 0
    assert library.main([*train, "--max-steps", "3"]) == 0
    assert library.main([*train, "--max-steps", "6", "--resume"]) == 0
    run = story_llm.load_checkpoint("big.pt")
    assert (run.step, run.total_steps) == (6, 6) and run.history[0].step == 0 and run.history[-1].step == 6
    assert run.train_config.openings == 0 and {evaluation.recall for evaluation in run.history} == {None}
    capsys.readouterr()
    assert story_llm.main(["generate", "--model", "big.pt", "--prompt", "The old", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("The old")


def test_a_library_is_read_once_if_nothing_else_is_asked_for(folder, capsys):
    library.tokenize("big.txt", "big.bin", "story", 300)
    assert library.main(["train", "--data", "big.bin", *SMALL, "--batch-size", "64"]) == 0
    run = story_llm.load_checkpoint("story_llm.pt")
    assert run.step == run.steps_per_epoch < story_llm.FEWEST_STEPS


def test_what_cannot_change_on_the_way_is_refused(folder, capsys):
    library.tokenize("big.txt", "big.bin", "story", 300)
    library.tokenize("big.txt", "other.bin", "story", 400)
    assert library.main(["train", "--data", "big.bin", *SMALL, "--max-steps", "1"]) == 0
    again = ["train", "--max-steps", "2", "--resume", *SMALL]
    assert "another library" in mistake(capsys, *again, "--data", "other.bin")
    for other in (["--learning-rate", "0.1"], ["--emb-dim", "32"], ["--seed", "1"]):
        assert "other settings" in mistake(capsys, *again, "--data", "big.bin", *other)
    assert story_llm.load_checkpoint("story_llm.pt").step == 1


@pytest.mark.parametrize("option", [["--openings", "0.5"], ["--text", "big.txt"], ["--tokenizer", "story"]])
def test_options_about_the_text_are_refused(option, capsys):
    assert library.main(["train", *option]) == 2


def change_about(**changed):
    about = json.loads(Path("big.bin.json").read_text())
    Path("big.bin.json").write_text(json.dumps({**about, **changed}))


@pytest.mark.parametrize("damage, words", [
    (lambda: Path("big.bin").unlink(), "tokenize"),
    (lambda: Path("big.bin.json").unlink(), "tokenize"),
    (lambda: Path("big.bin").write_bytes(b"\0\1\2\3"), "fit"),
    (lambda: Path("big.bin").write_bytes(b""), "fit"),
    (lambda: Path("big.bin.json").write_text("[1]"), "describe"),
    (lambda: Path("big.bin.json").write_text("nonsense"), "describe"),
    (lambda: Path("big.bin.json").write_bytes(b"\xff"), "describe"),
    (lambda: change_about(dtype="float"), "describe"),
    (lambda: change_about(tokenizer={"kind": "story", "tokens": ["a"]}), "describe"),
    (lambda: change_about(tokenizer={"kind": "story", "tokens": [1]}), "describe"),
    (lambda: change_about(sha256="0"), "fit"),
])
def test_a_damaged_library_is_refused_in_one_line(folder, capsys, damage, words):
    library.tokenize("big.txt", "big.bin", "story", 300)
    damage()
    assert words in mistake(capsys, "train", "--data", "big.bin")
    assert not Path("story_llm.pt").exists()


def test_tokens_that_the_tokenizer_does_not_know_are_refused(folder):
    library.tokenize("big.txt", "big.bin", "story", 300)
    tokenizer, token_ids, _ = library.read_library("big.bin")
    state = story_llm.tokenizer_state(tokenizer)
    known = token_ids.long().max().item()               # one entry less, and <|endoftext|> takes its place
    change_about(tokenizer={**state, "tokens": state["tokens"][:known - 1]})
    with pytest.raises(ValueError, match=f"the token {known}, which"):
        library.read_library("big.bin")


@pytest.mark.parametrize("content, options, words", [
    (b"", [], "empty"), (b" \n", [], "empty"), (b"a\xff b c" * 9, [], "UTF-8"),
    (b"Some words.", ["--out", "x.txt"], ".bin"), (b"Some words.", ["--out", "no/x.bin"], "another path"),
    (b"Some words.", ["--text", "none.txt"], "none.txt"), (b"Some words.", ["--text", "."], "not a file"),
    (b"Some words.", ["--text", "text.bin", "--out", "./text.bin"], "both"),
    (b"Some words.", ["--vocab-size", "9"], "257"),
    (b"Some words.", ["--tokenizer", "gpt2", "--vocab-size", "300"], "whole")])
def test_what_cannot_be_tokenized_is_refused_and_leaves_all_as_it_was(folder, capsys, content, options, words):
    for name in ("text.txt", "text.bin"):
        Path(name).write_bytes(content)
    Path("out.bin").write_bytes(b"an older one")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = ["tokenize", "--text", "text.txt", "--out", "out.bin", "--tokenizer", "story", *options]
    assert words in mistake(capsys, *command)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_ctrl_c_ends_it_with_its_own_status_and_leaves_nothing(folder, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "text_blocks", interrupted)
    assert library.main(["tokenize", "--text", "big.txt", "--out", "big.bin", "--tokenizer", "story"]) == 130
    assert [path.name for path in folder.iterdir()] == ["big.txt"]
