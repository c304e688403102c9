"""extras/huggingface.py against transformers itself: small folders with random weights, loaded and saved."""
import dataclasses
import json
import math
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import KINDS, ROOT, STORY, TEXT, LaterConfig, lively_model, story_llm, train_to, trained, weights_equal
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn import functional as F

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
sys.path.insert(0, str(ROOT / "extras"))
import huggingface  # noqa: E402

SHAPES = [{"n_layer": 1, "n_head": 1, "n_embd": 16}, {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 9},
          {"n_layer": 2, "n_head": 2, "n_embd": 24, "tie_word_embeddings": False},
          {"n_layer": 1, "n_head": 2, "n_embd": 32, "activation_function": "gelu", "n_inner": 128}]
TEXTS = [TEXT, "  two  spaces\n\n\tand\r\nlines 12345 it's I'LL", "漢字 日本語 தமிழ் हिन्दी عربي ไทย 😀👩‍👩‍👧",
         "naïve café — “quotes” x\u200dy\u200c a\u200cb 1\u200d2 नमस्‍ते،\u200c", "a" * 250 + " " * 120 + "1" * 101, ""]


@pytest.fixture(scope="module")
def vocabulary():
    """The byte strings of a trained tokenizer, without <|endoftext|>."""
    return story_llm.train_bpe(Path(STORY).read_text(encoding="utf-8"), 400)


@pytest.fixture
def make_folder(tmp_path, vocabulary):
    """make_folder(**settings of GPT2Config) returns a folder as transformers writes it, and its model."""
    def make(name="theirs", **shape):
        torch.manual_seed(0)
        config = transformers.GPT2Config(**{"vocab_size": len(vocabulary) + 1, "n_positions": 12, **shape})
        model = transformers.GPT2LMHeadModel(config).eval()
        for weight in model.parameters():       # biases of 0 and norms of 1 would hide mistakes
            weight.data.add_(0.1 * torch.randn_like(weight))
        folder = tmp_path / name
        model.save_pretrained(folder)
        names = [huggingface.as_characters(token) for token in vocabulary]
        ids = {token: i for i, token in enumerate([*names, "<|endoftext|>"])}
        merges = [map(huggingface.as_characters, last_merge(token, vocabulary)) for token in vocabulary[256:]]
        (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")
        return folder, model
    return make


def last_merge(token, vocabulary):
    """The pair that is merged into a token when its bytes are merged in order; GPT-2's file has just this one."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged = [first + second for first, second in zip(parts, parts[1:])]
        index = min(range(len(merged)), key=lambda i: vocabulary.index(merged[i]) if merged[i] in vocabulary else 1e9)
        parts[index:index + 2] = [merged[index]]
    return parts


def greedy(model, token_ids, count, context_length):
    """Continue token ids with the model of transformers; like ours, it sees only the last ones."""
    token_ids = torch.tensor([token_ids])
    for _ in range(count):
        with torch.no_grad():
            logits = model(token_ids[:, -context_length:]).logits
        token_ids = torch.cat([token_ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return token_ids[0].tolist()


def error_of(capsys, *arguments):
    """The error message of a command, which must be a single line."""
    capsys.readouterr()
    assert huggingface.main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 500
    return err


def lively_run(tokenizer="story", **config):
    """An untrained run of which no parameter is 0 or 1, so that mistakes in any of them are noticed."""
    tokenizer = story_llm.make_tokenizer(tokenizer, TEXT, vocab_size=300)
    model = lively_model(**{"vocab_size": tokenizer.vocab_size, **config})
    return story_llm.Run(model, tokenizer, story_llm.TrainConfig(), fingerprint="", steps_per_epoch=1, total_steps=1,
                         prompt="The old")


# load

@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_greedy_tokens_are_those_of_transformers_even_beyond_the_context(make_folder, tmp_path, shape):
    folder, theirs = make_folder(**shape)
    assert huggingface.main(["load", str(folder), "--model", str(tmp_path / "gpt2.pt")]) == 0
    run = story_llm.load_checkpoint(tmp_path / "gpt2.pt")
    T = run.config.context_length
    token_ids = torch.randint(run.config.vocab_size, (3, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(run.model(token_ids), theirs(token_ids).logits, rtol=0, atol=1e-4)
    prompt = token_ids[0, :4].tolist()
    new = [token.item() for token in story_llm.generate(run.model, torch.tensor([prompt]), 2 * T)]
    assert prompt + new == greedy(theirs, prompt, 2 * T, T) and len(set(new)) > 1


def test_a_pickle_names_without_prefix_half_precision_and_masks_can_be_loaded(make_folder):
    """The files of 2019 have all of these."""
    folder, theirs = make_folder(**SHAPES[1])
    expected = huggingface.load(folder)
    weights = {name.removeprefix("transformer."): weight for name, weight in theirs.state_dict().items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 9, 9)
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert weights_equal(huggingface.load(folder).model, expected.model)
    torch.save({name: weight.half() for name, weight in weights.items()}, folder / "pytorch_model.bin")
    for found, wanted in zip(huggingface.load(folder).model.parameters(), expected.model.parameters()):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)


def test_the_single_tokenizer_file_that_transformers_writes_can_be_loaded(make_folder):
    folder, _ = make_folder(**SHAPES[0])
    expected = huggingface.load(folder).tokenizer
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    theirs.save_pretrained(folder)
    assert not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists()
    assert huggingface.load(folder).tokenizer.tokens == expected.tokens


def test_texts_have_the_same_tokens_as_in_transformers(make_folder):
    folder, _ = make_folder(**SHAPES[0])
    ours, theirs = huggingface.load(folder).tokenizer, transformers.GPT2Tokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text) and ours.decode(ours.encode(text)) == text


def test_the_commands_of_story_llm_work_with_a_loaded_model(make_folder, tmp_path, monkeypatch, capsys):
    make_folder("gpt2", **SHAPES[1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    assert huggingface.main(["load", "gpt2"]) == 0
    for command in (["generate", "--prompt", "The old"], ["next"], ["attention"], ["evaluate", "--text", "my.txt"]):
        assert story_llm.main([*command, "--model", "gpt2.pt"]) == 0, capsys.readouterr().err


# load --text

@pytest.fixture
def story_folder(make_folder, tmp_path, monkeypatch):
    """The current folder, with a GPT-2 of 40 positions in "theirs" and a text my.txt."""
    make_folder(n_layer=2, n_head=2, n_embd=32, n_positions=40)
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_is_loaded_trained_on_a_text_and_generates(story_folder, capsys):
    """The three commands of the docstring, one after the other."""
    options = ["--text", "my.txt", "--context-length", "16", "--batch-size", "8", "--learning-rate", "0.01"]
    assert huggingface.main(["load", "theirs", *options]) == 0
    loaded = story_llm.load_checkpoint("gpt2.pt")
    assert loaded.step == 0 and loaded.history == [] and loaded.total_steps >= 150
    assert "python story_llm.py train --resume --model gpt2.pt" in capsys.readouterr().out
    assert story_llm.main(["train", "--resume", "--model", "gpt2.pt", "--max-steps", "30"]) == 0
    run = story_llm.load_checkpoint("gpt2.pt")
    assert (run.step, run.history[0].step, run.history[-1].step) == (30, 0, 30)
    assert run.history[-1].train_loss < 0.7 * run.history[0].train_loss
    capsys.readouterr()
    assert story_llm.main(["generate", "--model", "gpt2.pt", "--prompt", "The old", "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out.startswith("The old")


def test_a_run_to_train_has_the_weights_of_the_folder_a_shorter_context_and_the_split_of_its_settings(story_folder):
    whole = huggingface.load("theirs")
    config = story_llm.TrainConfig(val_fraction=0.4)
    run, corpus = huggingface.load_to_train("theirs", TEXT, config, context_length=16)
    assert run.tokenizer.tokens == whole.tokenizer.tokens and run.config.context_length == 16
    with torch.no_grad():
        assert torch.equal(run.model(corpus.train_ids[None, :16]), whole.model(corpus.train_ids[None, :16]))
    assert run.train_config == config and 0.5 < len(corpus.train_text) / len(TEXT) < 0.61
    assert run.tokenizer.decode(corpus.val_ids.tolist()) == TEXT[len(corpus.train_text):]
    longest, _ = huggingface.load_to_train("theirs", TEXT, config)
    assert longest.config == whole.config and weights_equal(longest.model, whole.model)


def test_training_from_the_checkpoint_is_training_from_the_loaded_run(story_folder):
    options = {"batch_size": 8, "max_steps": 5, "seed": 7, "precision": "fp32", "val_fraction": 0.3}
    words = [word for name, value in options.items() for word in (story_llm.option_string(name), str(value))]
    assert huggingface.main(["load", "theirs", "--text", "my.txt", "--context-length", "16", *words]) == 0
    assert story_llm.main(["train", "--resume", "--model", "gpt2.pt"]) == 0
    train_config = story_llm.TrainConfig(learning_rate=1.25e-3, **options)
    run = train_to(*huggingface.load_to_train("theirs", TEXT, train_config, 16))
    assert weights_equal(run.model, story_llm.load_checkpoint("gpt2.pt").model)


@pytest.mark.parametrize("options, expected", [
    ("", {"learning_rate": 1.25e-3, "drop_rate": 0.0, "prompt": "The old ferryman tied his", "text_paths": ["my.txt"],
          "context_length": 40}),
    ("--learning-rate 0.01 --seed 3 --optimizer muon --val-fraction 0.2 --max-steps 7 --drop-rate 0.1 --keep-best "
     "--prompt One\\\\nTwo", {"learning_rate": 0.01, "seed": 3, "optimizer": "muon", "val_fraction": 0.2,
                               "total_steps": 7, "drop_rate": 0.1, "keep_best": True, "prompt": "One\nTwo"})])
def test_options_of_the_training_are_saved_in_the_checkpoint(story_folder, options, expected):
    assert huggingface.main(["load", "theirs", "--text", "my.txt", *shlex.split(options)]) == 0
    run = story_llm.load_checkpoint("gpt2.pt")
    saved = {**vars(run), **vars(run.config), **vars(run.train_config)}
    assert {name: saved[name] for name in expected} == expected


def test_a_text_that_fills_no_window_gets_a_shorter_context_with_a_note(story_folder, capsys):
    (story_folder / "short.txt").write_text("The old ferryman tied his boat to the post.", encoding="utf-8")
    assert huggingface.main(["load", "theirs", "--text", "short.txt"]) == 0
    run = story_llm.load_checkpoint("gpt2.pt")
    assert f"note: the text has only {run.config.context_length + 1} tokens" in capsys.readouterr().err
    assert run.config.context_length < 40
    assert story_llm.main(["train", "--resume", "--model", "gpt2.pt", "--max-steps", "2"]) == 0


@pytest.mark.parametrize("options, words", [
    ("--text my.txt --context-length 41", "only 40 positions"), ("--text my.txt --context-length 0", "context_length"),
    ("--text my.txt --learning-rate -1", "learning_rate"), ("--text no.txt", "no.txt"),
    ("--text my.txt --model my.txt", "two things"), ("--learning-rate 0.1", "--text"),
    ("--context-length 8", "--text"), ("--prompt The", "--text"), ("--drop-rate 0.1", "--text")])
def test_wrong_options_are_refused_in_one_line_and_nothing_is_written(story_folder, capsys, options, words):
    assert words in error_of(capsys, "load", "theirs", *options.split())
    assert sorted(os.listdir()) == ["my.txt", "theirs"] and Path("my.txt").read_text(encoding="utf-8") == TEXT


def test_a_command_line_without_a_folder_or_with_one_that_is_missing_is_one_line(tmp_path, capsys):
    for folder in (tmp_path / "none", Path(STORY), tmp_path):
        assert str(folder) in error_of(capsys, "load", folder, "--model", tmp_path / "gpt2.pt")
    for arguments in (["load"], [], ["move", "x"]):
        assert huggingface.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


# save

@pytest.fixture(scope="module", params=["story", "gpt2"])
def run(request, gpt2):
    """A run that has memorized TEXT, without the biases for queries, keys and values."""
    return trained(tokenizer=request.param, emb_dim=64, context_length=40, max_steps=250, eval_every=1000,
                   val_fraction=0.0, batch_size=16, learning_rate=4e-3)


def test_transformers_continues_the_text_word_for_word(run, tmp_path):
    assert story_llm.measure_recall(run.model, run.tokenizer, TEXT) > 0.8
    huggingface.save(run, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt, _ in story_llm.recall_tests(TEXT):
        token_ids = tokenizer.encode(prompt)
        assert token_ids == run.tokenizer.encode(prompt)
        count = min(16, run.config.context_length - len(token_ids))
        expected = prompt + "".join(story_llm.generate_text(run.model, run.tokenizer, prompt, count))
        found = model.generate(torch.tensor([token_ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(found[0]) == expected and len(expected) > len(prompt) + 10


def test_the_saved_tokenizer_gives_the_same_tokens(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "out"
    huggingface.save(run, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @given(st.one_of(st.text(), st.lists(st.sampled_from(TEXT.split() + TEXTS), max_size=8).map(" ".join)))
    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    def same(text):
        assert tokenizer.encode(text) == run.tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text

    same()
    assert len(tokenizer) == run.tokenizer.vocab_size and tokenizer.eos_token_id == run.tokenizer.end_of_text


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_model_is_saved_with_equal_logits_or_refused(tmp_path, kind):
    run = lively_run(**kind)
    if run.config.position != "learned":
        with pytest.raises(story_llm.StoryError, match="without --position"):
            huggingface.save(run, tmp_path / "out")
        assert not os.listdir(tmp_path)
        return
    huggingface.save(run, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (model.config.n_layer, model.config.resid_pdrop) == (run.config.n_layers, run.config.drop_rate)
    token_ids = torch.arange(2 * run.config.context_length).view(2, -1) % run.config.vocab_size
    with torch.no_grad():
        assert run.model(token_ids).std() > 0.1
        torch.testing.assert_close(model(token_ids).logits, run.model(token_ids), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = [safetensors_torch.load_file(tmp_path / name / "model.safetensors") for name in ("out", "theirs")]
    assert ours.keys() == theirs.keys()


def test_a_setting_or_a_value_that_is_added_later_is_refused(tmp_path):
    run = lively_run()
    settings = dataclasses.asdict(run.config)
    for changes in ({"attention_window": 4}, {"gelu": "quick"}):
        run.model.config = LaterConfig(**{**settings, **changes})
        with pytest.raises(story_llm.StoryError, match=" ".join(map(str, *changes.items()))):
            huggingface.save(run, tmp_path / "out")
    run.model.config = LaterConfig(**settings)
    huggingface.save(run, tmp_path / "out")


def test_weights_that_gpt2_has_no_place_for_and_weights_that_it_needs_are_refused(tmp_path):
    run = lively_run()
    run.model.trf_blocks[0].ff.gate = torch.nn.Linear(4, 4, bias=False)
    with pytest.raises(story_llm.StoryError, match="a weight trf_blocks.0.ff.gate.weight, which is not"):
        huggingface.save(run, tmp_path / "out")
    run = lively_run()
    run.model.final_norm = torch.nn.RMSNorm(32)
    with pytest.raises(story_llm.StoryError, match="ln_f.bias is missing"):
        huggingface.save(run, tmp_path / "out")
    run = lively_run()
    for block in run.model.trf_blocks:      # a narrower feed-forward network computes, but is no GPT-2
        block.ff.expand, block.ff.project = torch.nn.Linear(32, 96), torch.nn.Linear(96, 32)
    with pytest.raises(story_llm.StoryError, match=r"mlp.c_fc.bias has the shape \(96,\)"):
        huggingface.save(run, tmp_path / "out")
    assert not os.listdir(tmp_path)


def blind_at_the_last_token(T, S, device=None):
    """A causal mask without the first token for the last of a whole context of 8."""
    mask = torch.ones(S, S, dtype=torch.bool).triu(1)
    if S == 8:
        mask[-1, 0] = True
    return mask[S - T:]


EDITS = {
    "another activation": ("FeedForward.forward", lambda ff, x: ff.project(torch.relu(ff.expand(x)))),
    "the other GELU": ("FeedForward.forward", lambda ff, x: ff.project(F.gelu(ff.expand(x), approximate="tanh"))),
    "no mask": ("causal_mask", lambda T, S, device=None: torch.zeros(T, S, dtype=torch.bool)),
    "a mask that only the last position shows": ("causal_mask", blind_at_the_last_token),
    "post-norm": ("TransformerBlock.forward", lambda block, x, cache=None: block.norm2(
        x + block.ff(block.norm1(x + block.att(x, cache))))),
    "scores that are not scaled": ("attention_weights", lambda queries, keys, mask: (
        queries @ keys.mT).masked_fill(mask, -math.inf).softmax(dim=-1)),
    "another epsilon": ("make_norm", lambda config: torch.nn.LayerNorm(config.emb_dim, eps=0.1)),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_model_whose_code_was_edited_is_refused_and_nothing_is_written(tmp_path, capsys, monkeypatch, what):
    """The weights have the names and shapes of GPT-2's, but GPT-2 would compute something else with them."""
    name, edited = EDITS[what]
    monkeypatch.setattr(f"story_llm.{name}", edited)
    story_llm.save_checkpoint(tmp_path / "model.pt", lively_run())
    assert "has been edited" in error_of(capsys, "save", "--model", tmp_path / "model.pt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["model.pt"]
    monkeypatch.undo()
    huggingface.save(lively_run(), tmp_path / "out")


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True, "qkv_bias": True, "gelu": "tanh"}], ids=str)
def test_saving_and_loading_again_and_again_keeps_the_model(tmp_path, changes):
    run = lively_run(drop_rate=0.1, **changes)
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        huggingface.save(run, folder)
        loaded = huggingface.load(folder)
        token_ids = torch.arange(run.config.context_length)[None]
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(token_ids), run.model(token_ids), rtol=0, atol=1e-5)
        assert loaded.tokenizer.tokens == run.tokenizer.tokens and loaded.tokenizer.kind == "story"
        if folder != folders[0] or changes:     # from now on, there is a qkv_bias
            assert weights_equal(loaded.model, run.model)
        run = loaded
    contents = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert contents[0] == contents[1] == contents[2]


# Mistakes

def changed_config(**changes):
    def change(folder):
        contents = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps(contents))
    return change


def changed_weights(function):
    def change(folder):
        weights = safetensors_torch.load_file(folder / "model.safetensors")
        function(weights)
        safetensors_torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return change


def changed_file(name, function):
    def change(folder):
        path = folder / name
        path.write_bytes(function(path.read_bytes()))
    return change


def pickled(contents):
    def change(folder):
        (folder / "model.safetensors").unlink()
        torch.save(contents(folder), folder / "pytorch_model.bin")
    return change


class Evil:
    """Unpickling this creates a file."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


WRONG = {
    "another architecture": (changed_config(model_type="llama"), "llama"),
    "another epsilon": (changed_config(layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
    "another number of hidden units": (changed_config(n_inner=99), "n_inner"),
    "scores scaled by layer": (changed_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by"),
    "another activation function": (changed_config(activation_function="relu"), "relu"),
    "a width that the heads cannot divide": (changed_config(n_head=5), "n_heads"),
    "more layers than weights": (changed_config(n_layer=4), "missing"),
    "a width that needs too much memory": (changed_config(n_embd=60000), "180000"),
    "a number that is a string": (changed_config(n_layer="3"), "n_layers"),
    "another vocabulary size": (changed_config(vocab_size=77), "vocab_size"),
    "an unknown kind of tokenizer": (changed_config(story_llm_tokenizer="x"), "story_llm_tokenizer"),
    "a list as config": (changed_file("config.json", lambda content: b"[]"), ""),
    "a config that is nested too deeply": (changed_file("config.json", lambda content: b"[" * 100_000), ""),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "a missing weight": (
        changed_weights(lambda weights: weights.pop("transformer.h.1.mlp.c_fc.bias")), "h.1.mlp.c_fc.bias"),
    "an unknown weight": (changed_weights(lambda weights: weights.update(strange=torch.ones(2))), "strange"),
    "a wrong shape": (
        changed_weights(lambda weights: weights.update({"transformer.ln_f.bias": torch.ones(2)})), "ln_f.bias"),
    "a truncated file": (changed_file("model.safetensors", lambda content: content[:-100]), ""),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "a pickle with code": (pickled(lambda folder: {"wte.weight": Evil(folder / "harm")}), ""),
    "a pickle of numbers": (pickled(lambda folder: {"wte.weight": 1}), "not tensors"),
    "token ids with gaps": (changed_file("vocab.json", lambda content: content.replace(b": 300,", b": 999,")), "gaps"),
    "a token that is no bytes": (
        changed_file("vocab.json", lambda content: content.replace(b'"a":', b'"\\u4e00":')), "bytes"),
    "another last token": (
        changed_file("vocab.json", lambda content: content.replace(b"<|endoftext|>", b"</s>")), "</s>"),
    "merges in another order": (
        changed_file("merges.txt", lambda content: b"\n".join(reversed(content.split(b"\n")))), "order"),
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_folder_without_a_gpt2_is_refused_in_one_line_and_nothing_is_written(make_folder, tmp_path, capsys, what):
    folder, _ = make_folder(**SHAPES[1])
    huggingface.load(folder)
    change, words = WRONG[what]
    change(folder)
    assert words in error_of(capsys, "load", folder, "--model", tmp_path / "gpt2.pt")
    assert not (tmp_path / "gpt2.pt").exists() and not (folder / "harm").exists()


def test_a_bug_in_the_model_keeps_its_traceback(make_folder, tmp_path, monkeypatch):
    """It is not reported as a mistake in the folder."""
    folder, _ = make_folder(**SHAPES[1])
    monkeypatch.setattr(story_llm.GPTModel, "forward", lambda model, token_ids: token_ids.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        huggingface.main(["load", str(folder), "--model", str(tmp_path / "gpt2.pt")])


def test_a_word_tokenizer_is_refused(tmp_path):
    with pytest.raises(story_llm.StoryError, match="word tokenizer"):
        huggingface.save(lively_run(tokenizer="word"), tmp_path / "out")
    assert not os.listdir(tmp_path)


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


def full_disk_in_rust(*arguments):
    raise sys.modules["safetensors"].SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("owner, name, failure", [(huggingface, "write_tokenizer", full_disk),
                                                  (safetensors_torch, "save_file", full_disk_in_rust)])
def test_an_existing_folder_is_kept_and_a_failure_leaves_no_folder(tmp_path, capsys, monkeypatch, owner, name, failure):
    story_llm.save_checkpoint(tmp_path / "model.pt", lively_run())
    (tmp_path / "mine").mkdir()
    assert "mine" in error_of(capsys, "save", "--model", tmp_path / "model.pt", tmp_path / "mine")
    monkeypatch.setattr(owner, name, failure)
    assert "No space" in error_of(capsys, "save", "--model", tmp_path / "model.pt", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["mine", "model.pt"] and not os.listdir(tmp_path / "mine")


def test_another_model_at_the_path_is_kept(make_folder, tmp_path, capsys):
    folder, _ = make_folder(**SHAPES[0])
    story_llm.save_checkpoint(tmp_path / "gpt2.pt", trained(max_steps=1))
    before = (tmp_path / "gpt2.pt").read_bytes()
    assert huggingface.main(["load", str(folder), "--model", str(tmp_path / "gpt2.pt")]) == 0
    assert (tmp_path / "gpt2.old.pt").read_bytes() == before and "gpt2.old.pt" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["load", "save"])
def test_a_missing_safetensors_is_named_in_one_line(make_folder, tmp_path, capsys, monkeypatch, command):
    folder, _ = make_folder(**SHAPES[0])
    story_llm.save_checkpoint(tmp_path / "model.pt", lively_run())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    where = folder if command == "load" else tmp_path / "out"
    assert "pip install safetensors" in error_of(capsys, command, where, "--model", tmp_path / "model.pt")
    shutil.rmtree(folder)


def test_the_commands_of_the_readme_work_as_they_are(make_folder, tmp_path, monkeypatch):
    text = (ROOT / "extras" / "README.md").read_text(encoding="utf-8").split("## huggingface.py")[1].split("\n## ")[0]
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("python ")]
    make_folder("gpt2", n_layer=1, n_head=2, n_embd=16, n_positions=130)
    (tmp_path / "my_story.txt").write_text(5 * TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story_llm, "count_steps", lambda steps_per_epoch, config: 2)
    printed = []
    for _, program, *arguments in commands:
        if program == "-c":
            exec(arguments[0], {"print": printed.append})
        else:
            assert {"extras/huggingface.py": huggingface, "story_llm.py": story_llm}[program].main(arguments) == 0
    assert len(commands) >= 4 and printed[0][0]["generated_text"].startswith("Once")
    assert story_llm.load_checkpoint("my_story.pt").config.context_length == 128
