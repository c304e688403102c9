"""The workshop's inference: weights in bf16; random numbers; which device is used."""
import contextlib
import copy
import re
import types

import pytest
import torch

from helpers import KINDS, lively_model, story_llm, tiny, train_to
from story_llm import generate, prepare_inference, seeded_rng

PROMPT = torch.tensor([[3, 1, 4]])


def written_by(model, count=60):
    return torch.stack(list(generate(model, PROMPT, count)), dim=1)


def test_in_fp32_a_model_stays_as_it_is():
    model = lively_model()
    before = copy.deepcopy(model.state_dict())
    assert prepare_inference(model) is model
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_in_bf16_every_weight_is_rounded_and_the_logits_are_close(kind):
    model, rounded = lively_model(**kind), prepare_inference(lively_model(**kind), "bf16")
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    ids = torch.randint(model.config.vocab_size, (2, model.config.context_length),
                        generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(ids), rounded(ids)
    assert found.dtype == torch.bfloat16
    assert 0 < (found.float() - expected).norm() < 0.1 * expected.norm()
    assert written_by(rounded, 20).shape == (1, 20)


def test_the_command_can_use_bf16_and_is_exact_by_default(tmp_path, capsys):
    run, corpus = tiny(epochs=12)
    story_llm.save_checkpoint(tmp_path / "run.pt", train_to(run, corpus))
    prompt = "The old ferryman tied"
    for options in ([], ["--precision", "bf16"]):
        assert story_llm.main(["generate", "--model", str(tmp_path / "run.pt"), "--prompt", prompt,
                               "--max-new-tokens", "12", *options]) == 0
        written = capsys.readouterr().out
        assert written.startswith(prompt) and (options or written == run.write(prompt, 12) + "\n")
    with pytest.raises(SystemExit):
        story_llm.parse(["generate", "--help"])
    assert re.search(r"--precision \{auto,bf16,fp32\}[^-]*default:\s+fp32", capsys.readouterr().out)


# random numbers

@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_seeded_block_leaves_the_random_state_of_its_device_as_it_was(name, monkeypatch):
    """On a CPU, the GPUs of the process are not seeded; else all of them are, and their state is kept and restored."""
    calls, forked = [], []

    @contextlib.contextmanager
    def fork_rng(devices, original=torch.random.fork_rng):
        forked.extend(devices)
        with original([]):
            yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", calls.append)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), seeded_rng(7, torch.device(name)):
        drawn = torch.rand(3)
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert (forked, calls) == (([0, 1], [7]) if name == "cuda" else ([], []))


# what a GPU gets, as far as a CPU can tell

@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"),
                                                 (False, False, "cpu")])
def test_auto_takes_a_gpu_if_there_is_one(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", lambda n, device: types.SimpleNamespace(device=torch.device(device)))
    assert story_llm.choose_device("auto") == torch.device(expected)


@pytest.mark.parametrize("name", ["cuda:99", "mps", "tpu", "meta", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_with_its_name(name):
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(story_llm.StoryError, match=re.escape(repr(name))):
        story_llm.choose_device(name)
