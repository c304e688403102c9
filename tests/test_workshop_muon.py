"""Muon: its steps against the singular value decomposition, what it moves, how long it trains, what is saved of it."""
import copy

import pytest
import torch
from hypothesis import given, strategies as st
from helpers import TEXT, story_llm, tiny, trained

from story_llm import (TrainingBatches, evened, load_checkpoint, measure_recall, optimizer_state, save_checkpoint,
                       start_optimizer)

MUON = {"optimizer": "muon"}


def matrices(model):
    """{name: weight} of the two-dimensional weights inside the blocks, by their names."""
    return {name: p for name, p in model.named_parameters() if name.startswith("trf_blocks") and p.dim() == 2}


def some_matrix(rows, columns, values, seed):
    """(U, V, U S V^T) with U and V at random and these singular values in S, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    U, V = [torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
            for n in (rows, columns)]
    return U, V, U @ torch.tensor(values, dtype=torch.float64).diag() @ V.T


@given(values=st.lists(st.floats(0.02, 1), min_size=2, max_size=6), size=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_a_matrix_keeps_its_directions_and_they_become_about_equally_large(values, size, seed):
    """From 0.02 of the largest bound on; the fourth root of the sum of the fourth powers is such a bound."""
    U, V, X = some_matrix(6, 9, values, seed)
    Y = evened((size * X)[None])[0]
    along = U.T @ Y @ V
    torch.testing.assert_close(U @ along.diagonal().diag() @ V.T, Y, rtol=0, atol=1e-6)     # no other directions
    shares = torch.tensor(values) / sum(value ** 4 for value in values) ** 0.25
    for share, found in zip(shares, along.diagonal()):
        assert 0.48 < found < 1.52 if share >= 0.0205 else 0 < found < 25 * share


def test_what_next_to_nothing_is_in_grows_25_times_and_nothing_stays_nothing():
    U, V, X = some_matrix(4, 4, [1.0, 1e-5], 0)
    assert (U.T @ evened(X[None])[0] @ V)[1, 1] == pytest.approx(24.3e-5, rel=0.01)
    assert torch.equal(evened(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def test_matrices_side_by_side_are_as_one_by_one_also_in_bf16():
    X = torch.stack([some_matrix(5, 8, [3.0, 1.0, 0.2], seed)[2] for seed in range(4)])
    torch.testing.assert_close(evened(X), torch.cat([evened(each[None]) for each in X]))
    assert (evened(X.bfloat16()).double() - evened(X)).abs().max() < 0.1


def test_a_step_has_the_directions_of_the_gradient_all_about_equally_large():
    """A first step is along U V^T, if U S V^T is the gradient, and as long as AdamW's usually are."""
    run, corpus = tiny(**MUON, learning_rate=0.01, warmup_steps=0, grad_clip=1e9, max_steps=100)
    start_optimizer(run)
    before, batch = copy.deepcopy(run.model), TrainingBatches(corpus, run)[0]
    story_llm.batch_loss(before, *batch).backward()
    story_llm.training_step(run, *batch)
    assert len(matrices(run.model)) == 6 * run.config.n_layers
    for name, weight in matrices(run.model).items():
        step = (matrices(before)[name] - weight).detach().double()
        U, S, Vh = torch.linalg.svd(matrices(before)[name].grad.double(), full_matrices=False)
        along = (U.T @ step @ Vh.T).diagonal() / (0.01 * story_llm.MUON_STRIDE * 0.2 * max(weight.shape) ** 0.5)
        strong = S > 0.1 * S.norm()
        assert strong.sum() > 1 and (along[strong] > 0.48).all() and (along < 1.53).all(), name
        assert S[strong].max() / S[strong].min() > along[strong].max() / along[strong].min(), name


def test_the_direction_is_a_mean_of_gradients_in_which_the_last_one_counts_once_more():
    run, _ = tiny(**MUON)
    start_optimizer(run)
    weight, gradients = run.optimizer.matrices[0], torch.randn(3, 32, 32)
    mean = 0
    for gradient in gradients:
        weight.grad = gradient
        mean = 0.9 * mean + 0.1 * gradient
        torch.testing.assert_close(run.optimizer.direction(weight), 0.9 * mean + 0.1 * gradient)


@pytest.mark.parametrize("able, dtype", [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)])
def test_its_products_are_in_bf16_only_where_the_machine_is_made_for_it(able, dtype, monkeypatch):
    """Elsewhere a product in bf16 takes sixty times as long as one in float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    run, corpus = tiny(**MUON, precision="auto")
    start_optimizer(run)
    used = []
    monkeypatch.setattr(story_llm, "polynomial", lambda X, *_: used.append(X.dtype) or X)
    story_llm.training_step(run, *TrainingBatches(corpus, run)[0])
    assert set(used) == {dtype}


def test_weights_decay_and_those_that_are_fixed_stay():
    run, corpus = tiny(**MUON, weight_decay=0.5)
    start_optimizer(run)
    decaying, fixed = run.optimizer.matrices[:2]
    fixed.requires_grad_(False)
    before = decaying.detach().clone(), fixed.clone()
    for group in run.optimizer.param_groups:
        group["lr"] = 0.1
    decaying.grad = torch.zeros_like(decaying)
    run.optimizer.step()
    torch.testing.assert_close(decaying.data, before[0] * (1 - 0.1 * story_llm.MUON_STRIDE * 0.5))
    assert torch.equal(fixed, before[1])


def test_the_rest_is_moved_as_adamw_moves_it_at_that_learning_rate():
    changed = {"learning_rate": 0.01, "warmup_steps": 0, "max_steps": 100, "weight_decay": 0.1}
    stride = story_llm.MUON_STRIDE
    (run, corpus), (other, _) = tiny(**MUON, **changed), tiny(**{**changed, "learning_rate": 0.01 * stride})
    for each in (run, other):
        start_optimizer(each)
        story_llm.training_step(each, *TrainingBatches(corpus, each)[0])
    inside = matrices(run.model)
    for (name, one), another in zip(run.model.named_parameters(), other.model.parameters()):
        assert torch.equal(one, another) == (name not in inside), name


def test_all_weights_have_one_learning_rate_and_nothing_is_left_of_a_gradient():
    run, corpus = tiny(**MUON, max_steps=100)
    start_optimizer(run)
    story_llm.training_step(run, *TrainingBatches(corpus, run)[0])
    assert len({group["lr"] for group in run.optimizer.param_groups}) == 1
    run.optimizer.zero_grad()
    assert all(p.grad is None for p in run.model.parameters())


def test_every_learned_weight_is_moved_by_one_of_the_two():
    for changed in ({}, {"tie_weights": True}, {"position": "rotary", "qkv_bias": True}):
        run, _ = tiny(**MUON, **changed)
        start_optimizer(run)
        kept = [p for group in run.optimizer.param_groups for p in group["params"]]
        learned = {id(p) for p in run.model.parameters() if p.requires_grad}
        assert len(kept) == len(learned) and {id(p) for p in kept} == learned


def test_half_the_readings_are_usual_and_those_asked_for_are_made():
    steps = [tiny(**{"max_steps": 0, "epochs": epochs, "optimizer": name})[0].total_steps
             for epochs in (0, 7) for name in ("adamw", "muon")]
    assert steps[0] == 2 * steps[1] and steps[2] == steps[3]


def test_it_learns_the_text_in_half_the_steps_that_are_too_few_for_adamw():
    recalls = []
    for name in ("adamw", "muon"):
        run = trained(optimizer=name, emb_dim=64, epochs=26, eval_every=1000, val_fraction=0.0, batch_size=16)
        recalls.append(measure_recall(run.model, run.tokenizer, TEXT))
    assert recalls[1] == 1.0 and recalls[0] < 0.8


@pytest.mark.parametrize("name, remembered", [
    ("out_head.weight", "momentum_buffer"), ("trf_blocks.0.ff.widen.weight", "exp_avg")])
def test_a_file_with_the_other_optimizers_memory_is_refused(tmp_path, name, remembered):
    run = trained(**MUON, max_steps=2)
    assert remembered not in optimizer_state(run)[name]
    memory = {**optimizer_state(run), name: {remembered: torch.zeros_like(dict(run.model.named_parameters())[name])}}
    run.optimizer, run.optimizer_state = None, memory
    save_checkpoint(tmp_path / "model.pt", run)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_checkpoint(tmp_path / "model.pt")
