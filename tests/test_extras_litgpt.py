"""extras/litgpt.py: what it writes, computed by a GPT-NeoX of our own, and where litgpt is installed, by litgpt."""
import importlib.metadata
import importlib.util
import math
import os
import shlex
import subprocess
import sys

import pytest
import torch
from helpers import KINDS, ROOT, TEXT, lively_model, some_text, story_llm, trained
from hypothesis import HealthCheck, given, settings

yaml = pytest.importorskip("yaml")
tokenizers = pytest.importorskip("tokenizers")
sys.path.insert(0, str(ROOT / "extras"))
# The program has the name of the package, so it is imported here under another one.
PROGRAM = ROOT / "extras" / "litgpt.py"
spec = importlib.util.spec_from_file_location("litgpt_program", PROGRAM)
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)

try:
    VERSION = importlib.metadata.version("litgpt")
except importlib.metadata.PackageNotFoundError:
    VERSION = None
needs_litgpt = pytest.mark.skipif(VERSION is None, reason="litgpt is not installed")
ROTARY = [kind for kind in KINDS if kind.get("position") == "rotary"]


def lively_run(tokenizer="story", **config):
    """An untrained run of which no parameter is 0 or 1, so that mistakes in any of them are noticed."""
    tokenizer = story_llm.make_tokenizer(tokenizer, TEXT, vocab_size=300)
    model = lively_model(**{"vocab_size": tokenizer.vocab_size, "position": "rotary", **config})
    return story_llm.Run(model, tokenizer, story_llm.TrainConfig(), fingerprint="", steps_per_epoch=1, total_steps=1,
                         prompt="The old")


def neox_logits(folder, token_ids):
    """Logits (T, V) of a folder in float64. Every weight and every setting of the folder must have been used."""
    weights = torch.load(folder / "lit_model.pth", weights_only=True)
    config = yaml.safe_load((folder / "model_config.yaml").read_text(encoding="utf-8"))
    C, H, T = config.pop("n_embd"), config.pop("n_head"), len(token_ids)
    D, V, hidden = C // H, config.pop("padded_vocab_size"), config.pop("intermediate_size")
    eps, window, approximate = (config.pop(name) for name in ("norm_eps", "sliding_window_size", "gelu_approximate"))

    def take(name, *shape):
        assert weights[name].shape == shape and weights[name].dtype == torch.float32
        return weights.pop(name).double()

    def linear(x, name, inputs, outputs):
        return torch.einsum("ti,oi->to", x, take(f"{name}.weight", outputs, inputs)) + take(f"{name}.bias", outputs)

    def norm(x, name):
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
        return x * take(f"{name}.weight", C) + take(f"{name}.bias", C)

    def gelu(x):
        if approximate == "tanh":
            return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)).tanh())
        assert approximate == "none"
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))

    assert config.pop("rotary_percentage") == 1.0
    inverse_frequencies = 1 / config.pop("rope_base") ** (torch.arange(0, D, 2).double() / D)
    angles = torch.outer(torch.arange(T).double(), inverse_frequencies).repeat(1, 2)                # (T, D)

    def rotated(x):
        half = torch.cat([-x[:, D // 2:], x[:, :D // 2]], dim=-1)
        return x * angles.cos() + half * angles.sin()

    allowed = torch.tensor([[0 <= row - column < window for column in range(T)] for row in range(T)])
    x = take("transformer.wte.weight", V, C)[token_ids]
    for block in (f"transformer.h.{i}" for i in range(config.pop("n_layer"))):
        qkv = linear(norm(x, f"{block}.norm_1"), f"{block}.attn.qkv", C, 3 * C)
        heads = []
        for start in range(0, C, D):
            query, key, value = (qkv[:, offset + start:offset + start + D] for offset in (0, C, 2 * C))
            scores = rotated(query) @ rotated(key).T / math.sqrt(D)
            heads.append(torch.where(allowed, scores, -math.inf).softmax(dim=-1) @ value)
        x = x + linear(torch.cat(heads, dim=-1), f"{block}.attn.proj", C, C)
        activations = gelu(linear(norm(x, f"{block}.norm_2"), f"{block}.mlp.fc", C, hidden))
        x = x + linear(activations, f"{block}.mlp.proj", hidden, C)
    logits = norm(x, "transformer.ln_f") @ take("lm_head.weight", V, C).T
    assert not weights and config.pop("vocab_size") == V and config.pop("block_size") >= 4096
    assert config == {"name": "story_llm", "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP",
                      "parallel_residual": False, "bias": True, "lm_head_bias": False}
    return logits


@pytest.mark.parametrize("kind", ROTARY, ids=str)
def test_the_files_give_the_logits_of_the_model_over_a_whole_context(tmp_path, kind):
    run = lively_run(**kind)
    run.model.train()       # with dropout, which must not disturb the comparison before saving
    program.save(run, tmp_path / "out")
    assert run.model.training
    token_ids = torch.arange(run.config.context_length) * 7 % run.config.vocab_size
    run.model.eval()
    with torch.no_grad():
        expected = run.model(token_ids[None])[0]
    torch.testing.assert_close(neox_logits(tmp_path / "out", token_ids), expected.double(), rtol=0, atol=1e-4)
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", ["story", "gpt2"])
def test_the_saved_tokenizer_gives_the_same_tokens(gpt2, tmp_path, kind):
    run = lively_run(kind)
    program.save(run, tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    end = yaml.safe_load((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    assert theirs.token_to_id(end) == run.tokenizer.end_of_text == theirs.get_vocab_size() - 1

    @given(some_text.filter(lambda text: "<|endoftext|>" not in text))
    @settings(suppress_health_check=list(HealthCheck))
    def same(text):
        assert theirs.encode(text).ids == run.tokenizer.encode(text)
        assert theirs.decode(run.tokenizer.encode(text)) == text

    same()


def refused(tmp_path, run, words):
    with pytest.raises(story_llm.StoryError, match=words) as caught:
        program.save(run, tmp_path / "out")
    assert "\n" not in str(caught.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ROTARY], ids=str)
def test_a_model_without_rotary_positions_is_refused(tmp_path, kind):
    refused(tmp_path, lively_run(**{"position": "learned", **kind}), "with --position rotary")


def test_a_word_tokenizer_and_weights_that_litgpt_has_no_place_for_are_refused(tmp_path):
    refused(tmp_path, lively_run("word"), "word tokenizer")
    run = lively_run()
    run.model.trf_blocks[1].att.gate = torch.nn.Linear(4, 4)
    refused(tmp_path, run, "a weight trf_blocks.1.att.gate.bias")


EDITS = {
    "another activation": ("FeedForward.forward", lambda ff, x: ff.project(ff.expand(x).relu())),
    "a window of attention": ("causal_mask", lambda T, S, device=None: torch.ones(T, S).tril().triu(-4) == 0),
    "other frequencies": ("position_angles", lambda T, dim, device=None: (
        torch.arange(T)[:, None] * 500.0 ** (-torch.arange(0, dim, 2) / dim))),
    "pairs of neighbours": ("rotate", lambda x, angles: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    ).flatten(-2)),
    "positions that are added as well": ("fixed_positions", lambda config: torch.nn.Embedding(
        config.context_length, config.emb_dim)),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_model_whose_code_was_edited_is_refused(tmp_path, monkeypatch, what):
    name, edited = EDITS[what]
    monkeypatch.setattr(f"story_llm.{name}", edited)
    refused(tmp_path, lively_run(), "has been edited")
    monkeypatch.undo()
    program.save(lively_run(), tmp_path / "out")


def test_an_existing_folder_is_kept_and_a_failure_leaves_no_folder(tmp_path, capsys, monkeypatch):
    def full_disk(*arguments):
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")

    story_llm.save_checkpoint(tmp_path / "model.pt", lively_run())
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(torch, "save", full_disk)
    for folder, words in (("mine", "exists"), ("out", "file write failed")):
        assert program.main(["save", "--model", str(tmp_path / "model.pt"), str(tmp_path / folder)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert sorted(os.listdir(tmp_path)) == ["mine", "model.pt"] and not os.listdir(tmp_path / "mine")


def test_the_program_saves_without_importing_litgpt(tmp_path, capsys):
    """Here, as for a program in this folder, `import litgpt` would find the program itself."""
    story_llm.save_checkpoint(tmp_path / "model.pt", lively_run())
    folder = tmp_path / "my folder"
    assert program.main(["save", "--model", str(tmp_path / "model.pt"), f"{folder}/"]) == 0
    assert "litgpt" not in sys.modules
    command = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
    assert shlex.split(command) == ["litgpt", "generate", f"{folder}/", "--prompt", "The old", "--top_k", "1"]
    files = ["lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(folder)) == files
    for arguments in ([], ["save"], ["load", "x"]):
        assert program.main(arguments) == 2 and capsys.readouterr().err.count("\n") == 1


# litgpt itself, in processes of its own, because here its name belongs to the program

LOGITS = """
import sys, torch
from pathlib import Path
from litgpt import GPT, Config, Tokenizer
for folder in map(Path, sys.argv[1:]):
    model = GPT(Config.from_file(folder / "model_config.yaml")).eval()
    model.load_state_dict(torch.load(folder / "lit_model.pth"))
    expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"][None])[0], expected["logits"], rtol=0, atol=3e-5)
    assert Tokenizer(folder).encode(expected["text"]).tolist() == expected["text_ids"]
"""


def run_litgpt(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, encoding="utf-8",
                          env={**environment, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_litgpt
def test_litgpt_computes_the_logits_of_every_kind_of_model(tmp_path):
    for number, kind in enumerate(ROTARY):
        run, folder = lively_run(**kind), tmp_path / str(number)
        program.save(run, folder)
        ids = torch.arange(run.config.context_length) * 7 % run.config.vocab_size
        with torch.no_grad():
            logits = run.model(ids[None])[0]
        torch.save({"ids": ids, "logits": logits, "text": TEXT, "text_ids": run.tokenizer.encode(TEXT)},
                   folder / "expected.pt")
    run_litgpt(tmp_path, "-c", LOGITS, *os.listdir(tmp_path))


@needs_litgpt
def test_litgpt_continues_the_text_word_for_word_beyond_the_context(tmp_path):
    run = trained(tokenizer="story", position="rotary", emb_dim=64, context_length=24, max_steps=250, eval_every=1000,
                  val_fraction=0.0, batch_size=16, learning_rate=4e-3)
    program.save(run, tmp_path / "out")
    prompt = "The old ferryman tied his"
    printed = run_litgpt(tmp_path, "-m", "litgpt", "generate", "out", "--prompt", prompt, "--top_k", "1")
    expected = "".join(story_llm.generate_text(run.model, run.tokenizer, prompt, 50))
    assert printed.rstrip("\n").endswith(prompt + expected) and TEXT.startswith(prompt + expected)
