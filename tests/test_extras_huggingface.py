"""extras/huggingface.py against transformers itself: small folders with random weights, there and back."""
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, STORY, TEXT, story_llm, trained, weights_equal
from hypothesis import HealthCheck, given, settings, strategies as st

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
sys.path.insert(0, str(ROOT / "extras"))
import huggingface  # noqa: E402

SHAPES = [{"n_layer": 1, "n_head": 1, "n_embd": 16}, {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 9},
          {"n_layer": 2, "n_head": 2, "n_embd": 24, "tie_word_embeddings": False},
          {"n_layer": 1, "n_head": 2, "n_embd": 32, "activation_function": "gelu", "n_inner": 128}]
TEXTS = [TEXT, "  two  spaces\n\n\tand\r\nlines 12345 it's I'LL", "漢字 日本語 தமிழ் हिन्दी عربي ไทย 😀👩‍👩‍👧", "naïve café — “quotes” x\u200dy\u200c", ""]


@pytest.fixture(scope="module")
def vocabulary():
    """Byte strings of a learned vocabulary, <|endoftext|> not among them."""
    return story_llm.learn_byte_pairs(Path(STORY).read_text(encoding="utf-8"), 400)


@pytest.fixture
def make_folder(tmp_path, vocabulary):
    """make_folder(**settings of GPT2Config) gives a folder as transformers writes it, and its model."""
    def make(name="theirs", **shape):
        torch.manual_seed(0)
        config = transformers.GPT2Config(**{"vocab_size": len(vocabulary) + 1, "n_positions": 12, **shape})
        model = transformers.GPT2LMHeadModel(config).eval()
        for weight in model.parameters():       # else biases are 0, norms 1, and nobody would notice a mistake
            weight.data.add_(0.1 * torch.randn_like(weight))
        folder = tmp_path / name
        model.save_pretrained(folder)
        letters = [huggingface.in_letters(token) for token in vocabulary]
        ids = {token: i for i, token in enumerate([*letters, "<|endoftext|>"])}
        merges = [list(map(huggingface.in_letters, last_pair(token, vocabulary))) for token in vocabulary[256:]]
        (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")
        return folder, model
    return make


def last_pair(token, vocabulary):
    """The two that a token is joined from, if the joins before it are made: GPT-2 lists one pair for each token."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [left + right for left, right in zip(parts, parts[1:])]
        place = min(range(len(joined)), key=lambda i: vocabulary.index(joined[i]) if joined[i] in vocabulary else 1e9)
        parts[place:place + 2] = [joined[place]]
    return parts


def greedy(model, token_ids, count, context_length):
    """The tokens that transformers' model chooses; it sees the last ones, as ours does."""
    token_ids = torch.tensor([token_ids])
    for _ in range(count):
        with torch.no_grad():
            logits = model(token_ids[:, -context_length:]).logits
        token_ids = torch.cat([token_ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return token_ids[0].tolist()


def mistake(capsys, *arguments):
    capsys.readouterr()
    assert huggingface.main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 500
    return err


# in

@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_greedy_tokens_are_those_of_transformers_past_the_context_too(make_folder, tmp_path, shape):
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


def test_a_pickle_of_tensors_names_without_prefix_half_numbers_and_old_masks_are_read_too(make_folder):
    folder, theirs = make_folder(**SHAPES[1])
    expected = huggingface.load(folder)
    weights = {name.removeprefix("transformer."): weight for name, weight in theirs.state_dict().items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 9, 9)
    weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert weights_equal(huggingface.load(folder).model, expected.model)
    torch.save({name: weight.half() for name, weight in weights.items()}, folder / "pytorch_model.bin")
    for one, other in zip(huggingface.load(folder).model.parameters(), expected.model.parameters()):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)


def test_what_transformers_writes_of_a_tokenizer_is_read_too(make_folder):
    """transformers itself writes tokenizer.json alone."""
    folder, _ = make_folder(**SHAPES[0])
    expected = huggingface.load(folder).tokenizer
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    theirs.save_pretrained(folder)
    assert not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists()
    assert huggingface.load(folder).tokenizer.tokens == expected.tokens


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_the_same_tokens(make_folder, text):
    folder, _ = make_folder(**SHAPES[0])
    ours, theirs = huggingface.load(folder).tokenizer, transformers.GPT2Tokenizer.from_pretrained(folder)
    assert ours.encode(text) == theirs.encode(text) and ours.decode(ours.encode(text)) == text


def test_the_commands_work_on_it(make_folder, tmp_path, monkeypatch, capsys):
    folder, _ = make_folder(**SHAPES[1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    for command in (["generate", "--prompt", "The old", "--max-new-tokens", "20"], ["next", "--prompt", "The old"],
                    ["attention", "--prompt", "The old"], ["evaluate", "--text", "my.txt"]):
        huggingface.main(["load", str(folder)])
        assert story_llm.main([*command, "--model", "gpt2.pt"]) == 0, capsys.readouterr().err
    assert story_llm.main(["train", "--start", "gpt2.pt", "--text", "my.txt", "--max-steps", "2"]) == 0
    assert story_llm.load_checkpoint("story_llm.pt").step == 2


# out

@pytest.fixture(scope="module", params=["story", "gpt2"])
def run(request, gpt2):
    """A run that has learned TEXT by heart, without the biases that GPT-2 has."""
    return trained(tokenizer=request.param, emb_dim=64, context_length=40, epochs=150, eval_every=1000, val_fraction=0.0, batch_size=16,
                   learning_rate=4e-3)


def test_without_our_code_it_continues_the_text_word_for_word(run, tmp_path):
    assert story_llm.measure_recall(run.model, run.tokenizer, TEXT) > 0.8
    huggingface.save(run, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for prompt, answer in story_llm.recall_exercises(TEXT):
        token_ids = tokenizer.encode(prompt)
        assert token_ids == run.tokenizer.encode(prompt)
        count = min(16, run.config.context_length - len(token_ids))
        expected = prompt + "".join(story_llm.generate_text(run.model, run.tokenizer, prompt, count))
        found = model.generate(torch.tensor([token_ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(found[0]) == expected and len(expected) > len(prompt) + 10


def test_its_tokens_are_ours(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "out"
    huggingface.save(run, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @given(st.one_of(st.text(), st.lists(st.sampled_from(TEXT.split() + TEXTS), max_size=8).map(" ".join)))
    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    def same(text):
        assert tokenizer.encode(text) == run.tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text

    same()
    assert len(tokenizer) == run.tokenizer.vocab_size and tokenizer.eos_token_id == run.tokenizer.end_of_text


@pytest.mark.parametrize("changed", [{}, {"tie_weights": True, "qkv_bias": True, "gelu": "tanh"}], ids=str)
def test_out_and_in_is_the_same_model_and_in_out_in_the_same_bits(tmp_path, changed):
    run = trained(tokenizer="story", drop_rate=0.1, max_steps=3, **changed)
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        huggingface.save(run, folder)
        back = huggingface.load(folder)
        token_ids = torch.arange(run.config.context_length)[None]
        with torch.no_grad():
            torch.testing.assert_close(back.model(token_ids), run.model(token_ids), rtol=0, atol=1e-5)
        assert back.tokenizer.tokens == run.tokenizer.tokens and back.tokenizer.kind == "story"
        if folder != folders[0] or changed:
            assert weights_equal(back.model, run.model)
        run = back
    contents = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert contents[0] == contents[1] == contents[2]


# what cannot be taken in, or said

def changed_config(**changed):
    def change(folder):
        settings = {**json.loads((folder / "config.json").read_text()), **changed}
        (folder / "config.json").write_text(json.dumps(settings))
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


def evil_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Evil(folder / "harm")}, folder / "pytorch_model.bin")


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


WRONG = {
    "another architecture": (changed_config(model_type="llama"), "model_type"),
    "no type": (changed_config(model_type=None), "model_type"),
    "another epsilon": (changed_config(layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
    "another width inside": (changed_config(n_inner=99), "n_inner"),
    "scaled by layer": (changed_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by"),
    "not scaled": (changed_config(scale_attn_weights=False), "scale_attn_weights"),
    "another activation": (changed_config(activation_function="relu"), "relu"),
    "a width that heads cannot share": (changed_config(n_head=5), "n_heads"),
    "more layers than weights": (changed_config(n_layer=4), "missing"),
    "fewer layers than weights": (changed_config(n_layer=2), "no weight"),
    "a width for which there is no memory": (changed_config(n_embd=60000), "60000"),
    "a number that is a text": (changed_config(n_layer="3"), "n_layers"),
    "another size of vocabulary": (changed_config(vocab_size=77), "vocab_size"),
    "an unknown split": (changed_config(story_llm_tokenizer="x"), "story_llm_tokenizer"),
    "no json": (changed_file("config.json", lambda content: content[:-9]), ""),
    "a list": (changed_file("config.json", lambda content: b"[]"), ""),
    "a missing weight": (changed_weights(lambda weights: weights.pop("transformer.h.1.mlp.c_fc.bias")), "ff.widen.bias"),
    "one too many": (changed_weights(lambda weights: weights.update(strange=torch.ones(2))), ""),
    "one too many in a part": (changed_weights(lambda weights: weights.update({"h.0.x.weight": torch.ones(2)})), "h.0.x"),
    "a wrong shape": (changed_weights(lambda weights: weights.update({"transformer.ln_f.bias": torch.ones(2)})), "final_norm"),
    "a truncated file": (changed_file("model.safetensors", lambda content: content[:-100]), ""),
    "an empty file": (changed_file("model.safetensors", lambda content: b""), ""),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "a pickle with code": (evil_pickle, ""),
    "ids with gaps": (changed_file("vocab.json", lambda content: content.replace(b": 300,", b": 999,")), ""),
    "a token of no bytes": (changed_file("vocab.json", lambda content: content.replace(b'"a":', b'"\\u4e00":')), ""),
    "another end": (changed_file("vocab.json", lambda content: content.replace(b"<|endoftext|>", b"</s>")), "</s>"),
    "merges in another order": (changed_file("merges.txt", lambda content: b"\n".join(reversed(content.split(b"\n")))), ""),
    "merges that lack some": (changed_file("merges.txt", lambda content: content[:len(content) // 2]), "joined"),
    "no merges": (lambda folder: (folder / "merges.txt").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_gpt2_of_ours_is_one_line_and_no_file(make_folder, tmp_path, capsys, what):
    folder, _ = make_folder(**SHAPES[1])
    huggingface.load(folder)
    change, name = WRONG[what]
    change(folder)
    assert name in mistake(capsys, "load", folder, "--model", tmp_path / "gpt2.pt")
    assert not (tmp_path / "gpt2.pt").exists() and not (folder / "harm").exists()


def test_no_folder_is_one_line(tmp_path, capsys):
    for folder in (tmp_path / "none", Path(STORY), tmp_path):
        assert str(folder) in mistake(capsys, "load", folder, "--model", tmp_path / "gpt2.pt")


@pytest.mark.parametrize("changed, name", [({"tokenizer": "word"}, "words"), ({"position": "rotary"}, "rotary"),
                                           ({"position": "sinusoidal"}, "sinusoidal")])
def test_what_gpt2_cannot_say_is_refused_with_the_reason(tmp_path, capsys, changed, name):
    story_llm.save_checkpoint(tmp_path / "model.pt", trained(**{"tokenizer": "story", **changed}, max_steps=1))
    assert name in mistake(capsys, "save", "--model", tmp_path / "model.pt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_folder_that_exists_stays_and_a_failure_leaves_none(tmp_path, capsys, monkeypatch):
    story_llm.save_checkpoint(tmp_path / "model.pt", trained(tokenizer="story", max_steps=1))
    (tmp_path / "mine").mkdir()
    assert "mine" in mistake(capsys, "save", "--model", tmp_path / "model.pt", tmp_path / "mine")

    def full(run):
        raise OSError("No space left on device")

    monkeypatch.setattr(huggingface, "tokenizer_files", full)
    assert "No space" in mistake(capsys, "save", "--model", tmp_path / "model.pt", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["mine", "model.pt"] and not os.listdir(tmp_path / "mine")


def test_the_model_that_stood_there_is_kept_beside(make_folder, tmp_path, capsys):
    folder, _ = make_folder(**SHAPES[0])
    story_llm.save_checkpoint(tmp_path / "gpt2.pt", trained(max_steps=1))
    before = (tmp_path / "gpt2.pt").read_bytes()
    assert huggingface.main(["load", str(folder), "--model", str(tmp_path / "gpt2.pt")]) == 0
    assert (tmp_path / "gpt2.old.pt").read_bytes() == before and "gpt2.old.pt" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["load", "save"])
def test_without_safetensors_one_line_names_it(make_folder, tmp_path, capsys, monkeypatch, command):
    folder, _ = make_folder(**SHAPES[0])
    story_llm.save_checkpoint(tmp_path / "model.pt", trained(tokenizer="story", max_steps=1))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    where = folder if command == "load" else tmp_path / "out"
    assert "safetensors" in mistake(capsys, command, where, "--model", tmp_path / "model.pt")
    shutil.rmtree(folder)


def test_the_readmes_commands_work_as_they_stand(make_folder, tmp_path, monkeypatch):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Start from GPT-2")[1].split("\n## ")[0]
    commands = [shlex.split(line) for line in section.splitlines() if line.startswith("python ")]
    make_folder("gpt2", n_layer=1, n_head=2, n_embd=16, n_positions=130)
    (tmp_path / "my_story.txt").write_text(5 * TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(story_llm, "FEWEST_STEPS", 2)
    monkeypatch.setattr(story_llm, "USUAL_EPOCHS", 1)
    printed = []
    for _, program, *arguments in commands:
        if program == "-c":
            exec(arguments[0], {"print": printed.append})
        else:
            assert {"extras/huggingface.py": huggingface, "story_llm.py": story_llm}[program].main(arguments) == 0
    assert len(commands) == 4 and printed[0][0]["generated_text"].startswith("Once")
    assert story_llm.load_checkpoint("my_story.pt").config.context_length == 128
