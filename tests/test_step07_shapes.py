"""Step 7: the shapes on the way through the model, and how much it learns."""
import pytest
import torch
from torch import nn

from helpers import lively_model
from story_llm import GPTConfig, GPTModel, count_parameters, trace_shapes


@pytest.mark.parametrize("config", [{}, {"qkv_bias": True}, {"tie_weights": True}, {"position": "rotary"},
                                    {"position": "sinusoidal"}], ids=str)
def test_the_counts_are_those_of_a_formula(config):
    V, T, C, L = 40, 8, 32, 2
    block = 2 * 2 * C + 3 * C * C + 3 * C * bool(config.get("qkv_bias")) + C * C + C + 4 * C * C + 4 * C + 4 * C * C + C
    learned_places = T * C if config.get("position", "learned") == "learned" else 0
    head = 0 if config.get("tie_weights") else V * C
    model = lively_model(**config)
    assert count_parameters(model) == V * C + learned_places + L * block + 2 * C + head
    parts = [model.tok_emb, model.pos_emb, *model.trf_blocks, model.final_norm, model.out_head]
    assert [count_parameters(part) for part in parts] == [V * C, learned_places, *[block] * L, 2 * C, V * C]


def test_what_is_not_learned_does_not_count():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    model[0].requires_grad_(False)
    assert count_parameters(model) == 2 * 5 + 5


def test_gpt2_small_has_its_published_size():
    """124,439,808: as in the checkpoint that OpenAI published, whose head is the token embedding."""
    with torch.device("meta"):
        model = GPTModel(GPTConfig(context_length=1024, emb_dim=768, n_heads=12, n_layers=12, qkv_bias=True,
                                   tie_weights=True))
    assert model.config.vocab_size == 50257 and count_parameters(model) == 124_439_808


@pytest.mark.parametrize("config", [{}, {"position": "rotary", "tie_weights": True}], ids=str)
@pytest.mark.parametrize("B, T", [(2, 5), (1, 8), (3, 1)])
def test_the_trace_shows_each_part_with_its_shape_in_the_order_of_the_way(config, B, T):
    shapes = trace_shapes(lively_model(**config), torch.zeros(B, T, dtype=torch.long))
    assert list(shapes.items()) == [("tok_emb", (B, T, 32)), ("pos_emb", (T, 32)), ("trf_blocks.0", (B, T, 32)),
                                    ("trf_blocks.1", (B, T, 32)), ("final_norm", (B, T, 32)), ("out_head", (B, T, 40))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("T", [5, 9])  # 9 are too many, and refused
def test_the_trace_leaves_nothing_behind(training, T):
    model = lively_model(drop_rate=0.5).train(training)
    before = torch.get_rng_state()
    try:
        trace_shapes(model, torch.zeros(2, T, dtype=torch.long))
    except ValueError:
        assert T == 9
    assert model.training is training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)
    assert not any(part._forward_hooks for part in model.modules())
