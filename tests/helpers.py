"""What the tests share: a tiny story, runs that train in a moment, kinds of models, a machine without a network."""
import contextlib
import dataclasses
import io
import os
import socket
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"     # the models here are too small for more; processes that tests start inherit it
import torch  # noqa: E402
from hypothesis import settings, strategies as st  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import story_llm  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("repeatable")

PROGRAM = ROOT / "story_llm.py"
STORY = ROOT / "Short_Story.txt"
TEXT = """The old ferryman tied his boat to the broken post, and waited for the rain to end.
Nobody came down to the river that day, because the new king had closed the salt road.
At night a boy ran along the bank with a lamp, and he called out a name we all knew.
"Prince Aadhan has come home," he said, "and he asks who will carry him over the water."
Then every door of the village opened slowly, one after another, and people stepped into the mud.
My mother took the long oar from the wall without a word and gave it to the ferryman.
"""
# letters, marks, every kind of white space, quotes, accents, other scripts, and our special tokens as text
some_text = st.one_of(
    st.text(), st.text(st.sampled_from("ab'’ \n\r\t\x1c\x85\xa0\u2028.,—-\"“”(<|_9é漢ह\u0301\u200d😀\0")),
    st.lists(st.sampled_from(["<|endoftext|>", "<|unk|>", " ", "king", "’s", "\r\n"])).map("".join))
GPT2_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")


def split_settings(both):
    """Split settings such as {"emb_dim": 8, "epochs": 1} into those of GPTConfig and those of TrainConfig."""
    names = {f.name for f in dataclasses.fields(story_llm.GPTConfig)}
    return ({name: value for name, value in both.items() if name in names},
            {name: value for name, value in both.items() if name not in names})


def tiny(text=TEXT, tokenizer="word", **changed):
    """An untrained run that can be trained in a moment, and its corpus."""
    config, train_config = split_settings({
        "context_length": 12, "emb_dim": 32, "n_heads": 2, "n_layers": 1, "batch_size": 8, "epochs": 4,
        "eval_every": 5, "warmup_steps": 3, "precision": "fp32", **changed})
    config, train_config = story_llm.GPTConfig(**config), story_llm.TrainConfig(**train_config)
    corpus = story_llm.corpus_from_text(text, tokenizer, train_config, vocab_size=300)
    return story_llm.new_run(corpus, config, train_config), corpus


def train_to(run, corpus, step=None):
    """Train a run to a step or, by default, to its end. Return the run."""
    for _ in story_llm.training_steps(run, corpus):
        if run.step == step:
            break
    return run


def trained(text=TEXT, **changed):
    """The run of `tiny`, trained to its end."""
    return train_to(*tiny(text, **changed))


def lively_model(seed=0, **config):
    """An untrained model with weights so large that its greedy text varies, instead of repeating one token."""
    model = story_llm.new_model(story_llm.GPTConfig(**{
        "vocab_size": 40, "context_length": 8, "emb_dim": 32, "n_heads": 4, "n_layers": 2, **config}), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * 3 + noise * (parameter.dim() == 1))
    return model.eval()


# Kinds of models, as settings for `lively_model`. They have every value of every setting of GPTConfig, and what must be
# true of any model is tested with each of them.
KINDS = [
    {}, {"vocab_size": 7}, {"context_length": 1}, {"context_length": 13}, {"emb_dim": 24}, {"n_heads": 1},
    {"n_heads": 32}, {"n_layers": 1}, {"n_layers": 3}, {"drop_rate": 0.1}, {"qkv_bias": True}, {"tie_weights": True},
    {"gelu": "tanh"}, {"position": "sinusoidal"}, {"position": "rotary"}, {"position": "rotary", "context_length": 1},
    {"position": "rotary", "n_heads": 1, "n_layers": 1},
    {"position": "sinusoidal", "tie_weights": True, "drop_rate": 0.2},
    {"position": "rotary", "qkv_bias": True, "tie_weights": True, "gelu": "tanh", "n_layers": 3, "drop_rate": 0.1}]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterConfig(story_llm.GPTConfig):
    """A GPTConfig with a setting and a value that this version does not have."""
    attention_window: int = story_llm.setting(0, "tokens that a token attends to (0: all)")
    gelu: str = story_llm.setting("exact", "activation function", choices=("exact", "tanh", "quick"))


def weights_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(a, b):
    """Equality of nested dictionaries, lists and plain values, bit for bit in their tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def bare_environment(cache, proxy_port=None):
    """Environment variables of a machine without GPT-2's files, whose network is at that local port."""
    proxy = f"http://127.0.0.1:{proxy_port or closed_port()}"
    return {"TIKTOKEN_CACHE_DIR": str(cache), "HTTPS_PROXY": proxy, "https_proxy": proxy, "HTTP_PROXY": proxy,
            "http_proxy": proxy, "NO_PROXY": "", "no_proxy": "", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}


def note_questions(monkeypatch, run):
    """Return a list to which "backward", "step" and the names of methods that turn tensors into Python numbers are
    appended as they are called."""
    events = []

    def noting(owner, name):
        original = getattr(owner, name)

        def noted(*args, **kwargs):
            events.append(name)
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, name, noted)

    for name in ("backward", "item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
        noting(torch.Tensor, name)
    noting(run.optimizer, "step")
    return events


def printed_in(folder, command):
    """What a command prints when it runs in this process, in a folder. It must succeed and write nothing to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = story_llm.main(command)
    assert (status, err.getvalue()) == (0, ""), command
    return out.getvalue()
