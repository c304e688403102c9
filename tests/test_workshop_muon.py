"""Muon: its steps against the singular value decomposition, what it moves, how long it trains, what is saved of it."""
import copy

import pytest
import torch
from helpers import TEXT, story_llm, tiny, trained

from story_llm import TrainingBatches, load_checkpoint, measure_recall, optimizer_state, save_checkpoint, start_optimizer

MUON = {"optimizer": "muon"}


def matrices(model):
    """{name: weight} of the two-dimensional weights inside the blocks, by their names."""
    return {name: p for name, p in model.named_parameters() if name.startswith("trf_blocks") and p.dim() == 2}


def test_a_step_has_the_directions_of_the_gradient_all_about_equally_large():
    """A first step is along U V^T, if U S V^T is the gradient: three rounds take S near 1 where it is not too small."""
    run, corpus = tiny(**MUON, learning_rate=0.01, warmup_steps=0, grad_clip=1e9, max_steps=100)
    start_optimizer(run)
    before = copy.deepcopy(run.model)
    story_llm.training_step(run, *TrainingBatches(corpus, run)[0])
    assert len(matrices(run.model)) == 6 * run.config.n_layers
    for name, weight in matrices(run.model).items():
        step = (matrices(before)[name] - weight).detach().double()
        U, S, Vh = torch.linalg.svd(weight.grad.double(), full_matrices=False)
        along = (U.T @ step @ Vh.T).diagonal() / (0.01 * story_llm.MUON_STRIDE * 0.2 * max(weight.shape) ** 0.5)
        strong = S > 0.1 * S.norm()
        assert strong.sum() > 1 and (along[strong] > 0.6).all() and (along < 1.4).all(), name
        assert S[strong].max() / S[strong].min() > 1.5 * along[strong].max() / along[strong].min(), name


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
        run = trained(optimizer=name, emb_dim=64, epochs=35, eval_every=1000, val_fraction=0.0, batch_size=16)
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
