"""The workshop's inference: linear layers packed for a CPU, weights in bf16; and what a GPU gets."""
import contextlib
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from helpers import KINDS, PROGRAM, lively_model, story_llm, tiny, train_to
from story_llm import PackedLinear, allow_tf32, generate, prepare_inference, seeded_rng

packs = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"),
    reason="torch is built without oneDNN here")


def layers_of(model, kind):
    return [module for module in model.modules() if type(module) is kind]


@pytest.fixture
def every_size(monkeypatch):
    """Let models of every size count as large."""
    monkeypatch.setattr(story_llm, "count_parameters", lambda model: 1 << 30)


@packs
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_packed_model_computes_and_writes_the_same(kind, every_size):
    model, packed = lively_model(**kind), lively_model(**kind)
    prepare_inference(packed)
    assert len(layers_of(packed, PackedLinear)) == len(layers_of(model, nn.Linear)) > 0
    assert not layers_of(packed, nn.Linear)
    ids = torch.randint(model.config.vocab_size, (3, model.config.context_length),
                        generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids), model(ids), rtol=1e-4, atol=1e-4)
    written = [torch.stack(list(generate(each, ids[:, :3], 20))) for each in (model, packed)]
    assert torch.equal(*written) and written[0].unique().numel() > 1


@packs
def test_models_are_packed_from_four_million_parameters_on():
    small, large = (story_llm.new_model(story_llm.GPTConfig(vocab_size=V, emb_dim=256)) for V in (300, 8000))
    assert story_llm.count_parameters(small) < 4_000_000 < story_llm.count_parameters(large)
    for model in (small, large):
        prepare_inference(model)
    assert not layers_of(small, PackedLinear) and not layers_of(large, nn.Linear)
    with pytest.raises(RuntimeError, match="cannot be saved"):
        large.state_dict()          # it would lack the weights of these layers
    small.state_dict()


@pytest.mark.parametrize("lacking", ["is_available", "_reorder_linear_weight", "_linear_pointwise"])
def test_without_onednn_a_model_stays_as_it_is(lacking, every_size, monkeypatch):
    if lacking == "is_available":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        functions = {name: None for name in ("_reorder_linear_weight", "_linear_pointwise") if name != lacking}
        monkeypatch.setattr(torch, "ops", types.SimpleNamespace(mkldnn=types.SimpleNamespace(**functions)))
    model = lively_model()
    prepare_inference(model)
    monkeypatch.undo()
    assert not layers_of(model, PackedLinear) and layers_of(model, nn.Linear)


def test_in_bf16_every_weight_is_rounded_and_the_logits_are_close(every_size):
    model, rounded = lively_model(), lively_model()
    prepare_inference(rounded, "bf16")
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    ids = torch.randint(40, (2, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(ids), rounded(ids)
    assert found.dtype == torch.bfloat16
    difference = (found.float() - expected).abs().max()
    assert 0 < difference < 0.1 * expected.abs().max()


@packs
def test_the_command_writes_the_same_with_packed_layers_and_can_use_bf16(tmp_path, monkeypatch, capsys):
    run, corpus = tiny(epochs=12)
    story_llm.save_checkpoint(tmp_path / "run.pt", train_to(run, corpus))
    prepared, written = [], []
    original = story_llm.prepare_inference

    def prepare(model, precision):
        original(model, precision)
        prepared.append((model.tok_emb.weight.dtype, bool(layers_of(model, PackedLinear))))

    monkeypatch.setattr(story_llm, "prepare_inference", prepare)
    for size, options in ((0, []), (1 << 30, []), (1 << 30, ["--precision", "bf16"])):
        monkeypatch.setattr(story_llm, "count_parameters", lambda model: size)
        assert story_llm.main(["generate", "--model", str(tmp_path / "run.pt"), "--prompt", "The old ferryman tied",
                               "--max-new-tokens", "12", *options]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] and written[2].startswith("The old ferryman tied")
    assert prepared[0] == (torch.float32, False) and prepared[1] == (torch.float32, True)
    assert prepared[2][0] == torch.bfloat16


# what a GPU gets, as far as a CPU can tell

def tf32_is_allowed():
    settings = torch.backends.cuda.matmul
    return settings.fp32_precision == "tf32" if hasattr(settings, "fp32_precision") else settings.allow_tf32


def test_tf32_is_allowed_within_the_block_only():
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), allow_tf32():
            assert tf32_is_allowed()
            with allow_tf32():
                assert tf32_is_allowed()
            assert tf32_is_allowed()
            raise KeyboardInterrupt
        assert not tf32_is_allowed()


def test_the_program_trains_with_tf32_and_ends_without(tmp_path, monkeypatch):
    seen = []
    original = story_llm.training_step

    def training_step(run, *batch):
        seen.append(tf32_is_allowed())
        original(run, *batch)

    monkeypatch.setattr(story_llm, "training_step", training_step)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_text("The old ferryman tied his boat to the broken post. " * 5)
    assert story_llm.main("train --text story.txt --tokenizer word --max-steps 2 --emb-dim 8".split()) == 0
    assert seen == [True, True] and not tf32_is_allowed()


class Current:
    """Stands for torch.cuda: which device is current, and on which the seed was set."""
    def __init__(self):
        self.device, self.seeded = 0, []

    @contextlib.contextmanager
    def on(self, device):
        before, self.device = self.device, device.index or 0
        yield
        self.device = before


def test_the_seed_is_set_on_the_gpu_that_is_used(monkeypatch):
    """torch.cuda.manual_seed seeds the current GPU, which is another one if the model is on cuda:1."""
    current = Current()
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", current.on)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: current.seeded.append((current.device, seed)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: current.device == 1)
    state = torch.get_rng_state()
    for index in (1, 0):
        device = torch.device("cuda", index)
        with seeded_rng("dropout", device=device):
            pass
        assert story_llm.use_bf16(device, "auto") == (index == 1)
    torch.set_rng_state(state)
    (first, seed), (second, same_seed) = current.seeded
    assert (first, second) == (1, 0) and seed == same_seed and current.device == 0


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"),
                                                 (False, False, "cpu")])
def test_auto_takes_a_gpu_if_there_is_one(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.mps, "device_count", lambda: int(mps))
    assert story_llm.choose_device("auto") == torch.device(expected)


def test_on_an_apple_gpu_its_random_state_is_seeded_and_restored(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: "the state before")
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: calls.append(state))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: calls.append(seed))
    for names in (("dropout", 1), ("dropout", 1), ("dropout", 2)):
        with pytest.raises(KeyboardInterrupt), seeded_rng(*names, device=torch.device("mps")):
            raise KeyboardInterrupt
    (first, *_), seeds = calls, calls[::2]
    assert seeds == [first, first, seeds[2]] and seeds[2] != first
    assert calls[1::2] == ["the state before"] * 3


def test_generate_offers_precision_and_is_exact_by_default():
    shown = subprocess.run([sys.executable, PROGRAM, "generate", "--help"], capture_output=True, text=True).stdout
    text = " ".join(shown.split())
    assert "--precision {auto,bf16,fp32}" in text and "in training (default: fp32)" in text
