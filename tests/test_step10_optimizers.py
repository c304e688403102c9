"""The optimizers: AdamW compared with torch's, Muon with a singular value decomposition, and what both leave alone."""
import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from helpers import TEXT, story_llm, tiny, train_to, trained, weights_equal
from story_llm import (AdamW, Muon, TrainConfig, load_checkpoint, make_optimizer, measure_recall, newton_schulz,
                       save_checkpoint, training_batches)

OPTIMIZERS = ("adamw", "muon")


def is_block_matrix(name, p):
    return name.startswith("trf_blocks") and p.dim() == 2


def torchs_own(parameters, weight_decay):
    """torch's AdamW with our betas, and weight decay for matrices only."""
    decays, others = [[p for p in parameters if (p.dim() >= 2) == is_matrix] for is_matrix in (True, False)]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def take_step(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if p.requires_grad else None


def close(model, other, **tolerance):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text: f"{name}: {text}", **tolerance)


# AdamW

@pytest.mark.parametrize("kind", [{}, {"qkv_bias": True, "tie_weights": True}, {"position": "sinusoidal"}], ids=str)
def test_adamw_equals_torchs_own_over_50_steps(kind):
    """In 64-bit numbers and with gradients of real batches, each from its own model. A rounding error in a gradient
    that should be 0, as that of the key biases, is small beside the 1e-8 in the formula."""
    run, corpus = tiny(weight_decay=0.1, max_steps=50, **kind)
    ours, theirs = run.model.double(), copy.deepcopy(run.model)
    own = AdamW(ours.named_parameters(), weight_decay=0.1)
    other = torchs_own([p for p in theirs.parameters() if p.requires_grad], weight_decay=0.1)
    for batch in training_batches(run, corpus):
        for model, optimizer in ((ours, own), (theirs, other)):
            optimizer.zero_grad()
            story_llm.batch_loss(model, *batch).backward()
        lr = story_llm.learning_rate(run.step, 50, TrainConfig(learning_rate=0.01))
        own.step(lr)
        take_step(other, lr)
        run.step += 1
    close(ours, theirs, rtol=0, atol=1e-9)
    assert not weights_equal(ours, tiny(**kind)[0].model.double()) and run.step == 50


@pytest.mark.parametrize("resumed_at", [None, 1, 25])
def test_a_training_equals_that_with_torchs_adamw_also_if_it_is_resumed_from_a_file(resumed_at, tmp_path):
    """In 32-bit numbers, rounding errors grow during the 50 steps, but without its averages a resumed run would differ
    by about the learning rate."""
    settings = {"weight_decay": 0.1, "max_steps": 50, "learning_rate": 0.005}
    run, corpus = tiny(**settings)
    if resumed_at:
        save_checkpoint(tmp_path / "run.pt", train_to(run, corpus, resumed_at))
        run = load_checkpoint(tmp_path / "run.pt")
    train_to(run, corpus)
    reference, _ = tiny(**settings)
    optimizer = torchs_own(list(reference.model.parameters()), weight_decay=0.1)
    for batch in training_batches(reference, corpus):
        optimizer.zero_grad()
        story_llm.batch_loss(reference.model, *batch).backward()
        nn.utils.clip_grad_norm_(reference.model.parameters(), 1.0)
        take_step(optimizer, story_llm.learning_rate(reference.step, 50, reference.train_config))
        reference.step += 1
    close(run.model, reference.model, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_a_gradient_is_left_alone(name):
    run, _ = tiny(weight_decay=0.1, position="sinusoidal")
    optimizer = make_optimizer(run.model, TrainConfig(optimizer=name, weight_decay=0.1, precision="fp32"))
    for step in range(2):
        give_gradients(run.model, step)
        run.model.out_head.weight.grad = run.model.trf_blocks[0].att.key.weight.grad = None
        before = copy.deepcopy(run.model)
        optimizer.step(0.01)
    unchanged = {name for name, p in run.model.named_parameters() if torch.equal(p, before.get_parameter(name))}
    assert unchanged == {"out_head.weight", "trf_blocks.0.att.key.weight", "pos_emb.weight"}
    optimizer.zero_grad()
    assert all(p.grad is None for p in run.model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [{}, {"tie_weights": True}, {"position": "rotary", "qkv_bias": True}], ids=str)
def test_every_learned_weight_has_averages_once_and_a_block_matrix_one_less_with_muon(name, kind):
    run, _ = tiny(optimizer=name, **kind)
    learned = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(run.model, run.train_config)
    assert (type(optimizer), optimizer.averages.keys()) == ({"adamw": AdamW, "muon": Muon}[name], learned.keys())
    for n, averages in optimizer.averages.items():
        assert len(averages) == (1 if name == "muon" and is_block_matrix(n, learned[n]) else 2), n
        assert all(average.shape == learned[n].shape and not average.any() for average in averages)


# Muon

def equalized(X):
    """What `newton_schulz` should compute: two polynomials of the singular values, divided by a bound on them."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    S = S / math.sqrt(1.04 * math.sqrt((S ** 4).sum()))
    for a, b, c in ((7.711, -22.114, 16.249), (3.215, -2.411, 0.501)):
        S = a * S + b * S ** 3 + c * S ** 5
    return U @ S.diag() @ Vh


@given(values=st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda values: max(values) > 0.01),
       size=st.floats(1e-4, 1e6), seed=st.integers(0, 99), shape=st.sampled_from([(6, 9), (9, 6), (6, 6)]))
def test_singular_vectors_stay_and_singular_values_become_about_equal(values, size, seed, shape):
    """From 0.02 of the bound on, they are between 0.48 and 1.52. Smaller ones grow as well, but not so far."""
    generator = torch.Generator().manual_seed(seed)
    U, V = [torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0] for n in shape]
    X = size * U @ torch.tensor(values, dtype=torch.float64).diag() @ V.T
    Y, = newton_schulz(X[None])
    torch.testing.assert_close(Y, equalized(X), rtol=0, atol=1e-6)
    shares = torch.tensor(values) / sum(value ** 4 for value in values) ** 0.25
    for share, found in zip(shares, (U.T @ Y @ V).diagonal()):
        assert 0.48 < found < 1.52 if share >= 0.0205 else -1e-9 < found < 25 * share + 1e-9


def test_a_gradient_of_0_gives_no_step_and_bf16_about_the_same_one():
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))
    X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = newton_schulz(X.bfloat16())
    assert found.dtype == torch.bfloat16 and (found.double() - newton_schulz(X)).abs().max() < 0.1


@pytest.mark.parametrize("kind", [{}, {"qkv_bias": True, "tie_weights": True}], ids=str)
def test_muon_moves_block_matrices_as_written_by_hand_and_all_others_as_adamw_does_at_the_rate_given(kind):
    """The moving average covers ten gradients, and the last one counts once more (Nesterov momentum)."""
    run, _ = tiny(**kind)
    ours, theirs = run.model.double(), copy.deepcopy(run.model)
    muon = Muon(ours, TrainConfig(optimizer="muon", weight_decay=0.3, precision="fp32"))
    blocks = {name: p for name, p in theirs.named_parameters() if is_block_matrix(name, p)}
    others = torchs_own([p for name, p in theirs.named_parameters() if name not in blocks], weight_decay=0.3)
    means = dict.fromkeys(blocks, 0.0)
    for step in range(6):
        lr = 0.02 / (step + 1)
        for model in (ours, theirs):
            give_gradients(model, step)
        muon.step(lr)
        take_step(others, lr)
        with torch.no_grad():
            for name, p in blocks.items():
                means[name] = 0.9 * means[name] + 0.1 * p.grad
                update = equalized(0.1 * p.grad + 0.9 * means[name])
                p.copy_(p * (1 - lr * 0.3) - lr * 0.2 * math.sqrt(max(p.shape)) * update)
    close(ours, theirs, rtol=0, atol=1e-6)
    assert len(blocks) == 6


@pytest.mark.parametrize("capabilities, dtype", [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)])
def test_matrix_products_are_in_bf16_only_where_the_hardware_makes_that_fast(capabilities, dtype, monkeypatch):
    """Elsewhere a product in bf16 takes many times as long as one in float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    run, _ = tiny(optimizer="muon", precision="auto")
    used = []
    monkeypatch.setattr(story_llm, "newton_schulz", lambda X: used.extend(m.dtype for m in X) or X)
    give_gradients(run.model, 0)
    make_optimizer(run.model, run.train_config).step(0.01)
    assert used == [dtype] * 6 and {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_muon_memorizes_a_text_in_a_number_of_steps_that_is_too_small_for_adamw():
    recalls = []
    for name, learning_rate in (("adamw", 2.5e-3), ("muon", 0.01)):
        run = trained(optimizer=name, learning_rate=learning_rate, emb_dim=64, epochs=26, eval_every=1000,
                      val_fraction=0.0, batch_size=16)
        recalls.append(measure_recall(run.model, run.tokenizer, TEXT))
    assert recalls[1] == 1.0 and recalls[0] < 0.8
