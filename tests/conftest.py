"""What the tests share: a tiny story, runs small enough for a moment's training, a machine without GPT-2's files."""
import dataclasses
import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import settings, strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import story_llm  # noqa: E402

torch.set_num_threads(1)  # the models here are too small for more
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("repeatable")

STORY = Path(story_llm.__file__).with_name("Short_Story.txt")
TEXT = """The old ferryman tied his boat to the broken post, and waited for the rain to end.
Nobody came down to the river that day, because the new king had closed the salt road.
At night a boy ran along the bank with a lamp, and he called out a name we all knew.
"Prince Aadhan has come home," he said, "and he asks who will carry him over the water."
Then every door of the village opened slowly, one after another, and people stepped into the mud.
My mother took the long oar from the wall without a word and gave it to the ferryman.
"""
# letters, marks, every kind of white space, quotes, accents, other scripts, and our own special tokens as text
some_text = st.one_of(
    st.text(), st.text(st.sampled_from("ab'’ \n\r\t\x1c\x85\xa0\u2028.,—-\"“”(<|_9é漢ह\u0301\u200d😀\0")),
    st.lists(st.sampled_from(["<|endoftext|>", "<|unk|>", "<|join|>", " ", "king", "’s", "\r\n"])).map("".join))


def split_settings(settings_of_both):
    """{"emb_dim": 8, "epochs": 1} to the part for GPTConfig and the part for TrainConfig."""
    names = {f.name for f in dataclasses.fields(story_llm.GPTConfig)}
    return ({k: v for k, v in settings_of_both.items() if k in names},
            {k: v for k, v in settings_of_both.items() if k not in names})


def tiny_run(text=TEXT, tokenizer="word", log=lambda line: None, **changed):
    """An untrained run of a moment's size."""
    config, train_config = split_settings({
        "context_length": 12, "emb_dim": 32, "n_heads": 2, "n_layers": 1, "batch_size": 8, "epochs": 4, "eval_every": 5,
        "warmup_steps": 3, "precision": "fp32", **changed})
    return story_llm.new_run(text, story_llm.GPTConfig(**config), story_llm.TrainConfig(**train_config), tokenizer,
                             vocab_size=300, log=log)


def trained_run(text=TEXT, log=lambda line: None, save=lambda run: None, stop=lambda: False, **changed):
    run = tiny_run(text, **changed)
    story_llm.train(run, text, log, save, stop)
    return run


def lively_model(seed=0, **config):
    """An untrained model with weights so large that its greedy text wanders, instead of repeating one token."""
    torch.manual_seed(seed)
    model = story_llm.GPTModel(story_llm.GPTConfig(**{
        "vocab_size": 40, "context_length": 8, "emb_dim": 32, "n_heads": 4, "n_layers": 2, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 3 + 0.1 * torch.randn_like(parameter) * (parameter.dim() == 1))
    return model.eval()


def weights_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def knows_text():
    """A run that has learned TEXT by heart. Shared: look, do not touch."""
    run = trained_run(emb_dim=64, epochs=80, eval_every=1000, val_fraction=0.0, batch_size=16)
    run.model.eval()
    return run


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's own encoding, where its files are on this machine; never from the network."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    cache = Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"))
    for name in ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"):
        if not (cache / name).is_file():
            pytest.skip(f"GPT-2's encoding is not on this machine: {cache} has no file {name}; set TIKTOKEN_CACHE_DIR")
    return story_llm.load_gpt2_encoding()


def bare_environment(cache, proxy_port):
    """Environment variables of a machine without GPT-2's files, whose network is at that local port."""
    proxy = f"http://127.0.0.1:{proxy_port}"
    return {"TIKTOKEN_CACHE_DIR": str(cache), "HTTPS_PROXY": proxy, "https_proxy": proxy, "HTTP_PROXY": proxy,
            "http_proxy": proxy, "NO_PROXY": "", "no_proxy": "", "PYTHONPATH": str(STORY.parent)}


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def bare(tmp_path_factory, monkeypatch):
    """This process, without GPT-2's files and without a network. Returns the empty cache folder."""
    cache = tmp_path_factory.mktemp("cache")
    for name, value in bare_environment(cache, closed_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    return cache
