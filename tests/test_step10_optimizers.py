"""Muon: its step compared with a singular value decomposition, which weights it moves, and how fast it learns."""
import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st

from helpers import TEXT, story_llm, tiny, train_to, trained, weights_equal
from story_llm import make_optimizer, measure_recall, newton_schulz, start_optimizer, training_batches, training_step

MUON = {"optimizer": "muon"}


def matrices(model):
    """{name: weight} of the two-dimensional weights inside the blocks."""
    return {name: p for name, p in model.named_parameters() if name.startswith("trf_blocks") and p.dim() == 2}


def started(**changed):
    """(a run with its optimizer, the batch of its first step)"""
    run, corpus = tiny(**{**MUON, "max_steps": 100, **changed})
    start_optimizer(run)
    return run, next(training_batches(run, corpus))


def some_matrix(rows, columns, values, seed):
    """(U, V, U S V^T) with random U and V and these singular values in S, in float64."""
    generator = torch.Generator().manual_seed(seed)
    U, V = [torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64))[0]
            for n in (rows, columns)]
    return U, V, U @ torch.tensor(values, dtype=torch.float64).diag() @ V.T


# the matrix iteration

@given(values=st.lists(st.floats(0.02, 1), min_size=2, max_size=6), size=st.floats(1e-6, 1e6), seed=st.integers(0, 99),
       shape=st.sampled_from([(6, 9), (9, 6), (6, 6)]))
def test_singular_vectors_stay_and_singular_values_become_about_equal(values, size, seed, shape):
    """This holds from 0.02 of the norm on, by which the matrix is divided. It is the fourth root of the sum of the
    fourth powers of the singular values. Smaller ones grow as well, but not so far."""
    U, V, X = some_matrix(*shape, values, seed)
    Y = newton_schulz(size * X)
    along = U.T @ Y @ V
    torch.testing.assert_close(U @ along.diagonal().diag() @ V.T, Y, rtol=0, atol=1e-6)     # no other directions
    shares = torch.tensor(values) / sum(value ** 4 for value in values) ** 0.25
    for share, found in zip(shares, along.diagonal()):
        assert 0.48 < found < 1.52 if share >= 0.0205 else 0 < found < 25 * share


def test_tiny_singular_values_grow_25_times_and_0_stays_0():
    U, V, X = some_matrix(4, 4, [1.0, 1e-5], 0)
    assert (U.T @ newton_schulz(X) @ V)[1, 1] == pytest.approx(24.3e-5, rel=0.01)
    assert torch.equal(newton_schulz(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_in_bf16_the_result_is_about_the_same():
    X = some_matrix(5, 8, [3.0, 1.0, 0.2], 0)[2]
    found = newton_schulz(X.bfloat16())
    assert found.dtype == torch.bfloat16 and (found.double() - newton_schulz(X)).abs().max() < 0.1


# one step

def test_a_first_step_has_the_singular_vectors_of_the_gradient_and_about_equal_singular_values():
    """If the gradient is U S V^T, the step is along U V^T, and about as long as a step of AdamW."""
    run, batch = started(learning_rate=0.01, warmup_steps=0, grad_clip=1e9)
    before = copy.deepcopy(run.model)
    story_llm.batch_loss(before, *batch).backward()
    training_step(run, *batch)
    assert len(matrices(run.model)) == 6 * run.config.n_layers
    for name, weight in matrices(run.model).items():
        step = (matrices(before)[name] - weight).detach().double()
        U, S, Vh = torch.linalg.svd(matrices(before)[name].grad.double(), full_matrices=False)
        along = (U.T @ step @ Vh.T).diagonal() / (4 * 0.01 * 0.2 * max(weight.shape) ** 0.5)
        strong = S > 0.1 * S.norm()
        assert strong.sum() > 1 and (along[strong] > 0.48).all() and (along < 1.53).all(), name
        assert S[strong].max() / S[strong].min() > along[strong].max() / along[strong].min(), name


def test_the_step_of_a_matrix_is_that_written_by_hand():
    """The moving average covers ten gradients, and the last one counts once more (Nesterov momentum)."""
    run, _ = started(weight_decay=0.3)
    name, weight = next(iter(matrices(run.model).items()))
    expected, mean = weight.detach().clone(), torch.zeros(32, 32)
    for step in range(4):
        for p in run.model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        for group in run.optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        mean = 0.9 * mean + 0.1 * weight.grad
        lr = 4 * 0.01 / (step + 1)
        update = newton_schulz(0.1 * weight.grad + 0.9 * mean)
        expected = expected * (1 - lr * 0.3) - lr * 0.2 * math.sqrt(32) * update
        run.optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_leaves_the_learning_rate_as_the_caller_has_set_it(optimizer):
    """Two steps with the learning rate set once are those with the learning rate set each time."""
    weights = []
    for set_each_time in (True, False):
        run, _ = started(optimizer=optimizer, learning_rate=0.01)
        for step in range(3):
            for p in run.model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            for group in run.optimizer.param_groups:
                assert group["lr"] == 0.01
                if set_each_time:
                    group["lr"] = 0.01
            groups = len(run.optimizer.param_groups)
            run.optimizer.step()
            assert len(run.optimizer.param_groups) == groups
        weights.append(run.model)
    assert weights_equal(*weights)


def test_an_interrupted_step_leaves_all_weights_in_the_optimizer(monkeypatch):
    """While AdamW takes its step, the matrices are not in its groups. They must return even if the step is interrupted,
    for example in a notebook, because otherwise they would never be trained again."""
    run, batch = started()
    training_step(run, *batch)
    held = [len(group["params"]) for group in run.optimizer.param_groups]

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            training_step(run, *batch)
    assert [len(group["params"]) for group in run.optimizer.param_groups] == held
    before = copy.deepcopy(run.model)
    training_step(run, *batch)
    assert not any(torch.equal(p, q) for p, q in zip(matrices(run.model).values(), matrices(before).values()))


@pytest.mark.parametrize("capabilities, dtype", [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)])
def test_matrix_products_are_in_bf16_only_where_the_hardware_makes_that_fast(capabilities, dtype, monkeypatch):
    """Elsewhere a product in bf16 takes many times as long as one in float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    run, batch = started(precision="auto")
    used = []
    monkeypatch.setattr(story_llm, "newton_schulz", lambda X: used.append(X.dtype) or X)
    training_step(run, *batch)
    assert len(used) == 6 and set(used) == {dtype}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_matrices_decay_and_biases_do_not():
    """If all gradients are 0, only weight decay moves the weights."""
    run, _ = started(weight_decay=0.5, learning_rate=0.1, qkv_bias=True)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(1.0)
            p.grad = torch.zeros_like(p)
    before = copy.deepcopy(run.model)
    run.optimizer.step()
    for p, old in zip(run.model.parameters(), before.parameters()):
        torch.testing.assert_close(p, old * (1 - 4 * 0.1 * 0.5) if p.dim() > 1 else old)


def test_all_other_weights_are_moved_as_adamw_moves_them_with_four_times_the_learning_rate():
    changed = {"warmup_steps": 0, "weight_decay": 0.1}
    (run, batch), (other, _) = [started(**changed, optimizer=name, learning_rate=lr)
                                for name, lr in (("muon", 0.01), ("adamw", 0.04))]
    for each in (run, other):
        training_step(each, *batch)
    inside = matrices(run.model)
    for (name, one), another in zip(run.model.named_parameters(), other.model.parameters()):
        assert torch.equal(one, another) == (name not in inside), name


def test_no_gradient_is_left_after_zero_grad():
    run, batch = started()
    training_step(run, *batch)
    run.optimizer.zero_grad()
    assert all(p.grad is None for p in run.model.parameters())


def test_every_learned_weight_is_in_the_optimizer_once():
    for changed in ({}, {"tie_weights": True}, {"position": "rotary", "qkv_bias": True}):
        run, _ = started(**changed)
        groups = [group["params"] for group in run.optimizer.param_groups]
        held = sum(groups, [])
        learned = {id(p) for p in run.model.parameters() if p.requires_grad}
        assert {id(p) for p in held if p.requires_grad} == learned and len(held) == len({id(p) for p in held})
        assert {id(p) for p in run.optimizer.matrices} == {id(p) for p in matrices(run.model).values()}


def test_fixed_positions_stay_fixed():
    run, corpus = tiny(**MUON, position="sinusoidal", weight_decay=0.5)
    before = run.model.pos_emb.weight.clone()
    train_to(run, corpus)
    assert torch.equal(run.model.pos_emb.weight, before) and before.abs().sum() > 0


# a whole training

def test_by_default_a_training_with_muon_has_half_as_many_steps():
    steps = [tiny(**{"max_steps": 0, "epochs": epochs, "optimizer": name})[0].total_steps
             for epochs in (0, 7) for name in ("adamw", "muon")]
    assert steps[0] == 2 * steps[1] and steps[2] == steps[3]


def test_muon_memorizes_a_text_in_a_number_of_steps_that_is_too_small_for_adamw():
    recalls = []
    for name in ("adamw", "muon"):
        run = trained(optimizer=name, emb_dim=64, epochs=26, eval_every=1000, val_fraction=0.0, batch_size=16)
        recalls.append(measure_recall(run.model, run.tokenizer, TEXT))
    assert recalls[1] == 1.0 and recalls[0] < 0.8


def test_the_state_of_muon_is_restored_into_a_new_optimizer():
    run, corpus = tiny(**MUON)
    train_to(run, corpus, 3)
    other = make_optimizer(run.model, run.train_config)
    other.load_state_dict(run.optimizer.state_dict())
    for p in run.model.parameters():
        assert run.optimizer.state[p].keys() == other.state[p].keys()
        for name, value in run.optimizer.state[p].items():
            assert torch.equal(value, other.state[p][name])
    for weight in matrices(run.model).values():
        assert run.optimizer.state[weight]["momentum"].abs().sum() > 0
