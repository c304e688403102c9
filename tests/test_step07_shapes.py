"""Step 7: the shapes of a batch on its way through the model, and how many parameters the model has."""
import pytest
import torch
from torch import nn

from helpers import KINDS, lively_model
from story_llm import GPTConfig, GPTModel, StoryError, count_parameters, module_outputs


def output_shapes(model, token_ids):
    """{name: shape of the output} of the parts that the command `model` shows."""
    names = ["tok_emb", "pos_emb", *(f"trf_blocks.{i}" for i in range(model.config.n_layers)), "final_norm", "out_head"]
    outputs = module_outputs(model, [model.get_submodule(name) for name in names], token_ids)
    return {name: tuple(output.shape) for name, output in zip(names, outputs)}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_numbers_of_parameters_are_those_of_a_formula(kind):
    model = lively_model(**kind)
    config = model.config
    V, T, C, L = config.vocab_size, config.context_length, config.emb_dim, config.n_layers
    norms, qkv_biases = 2 * 2 * C, 3 * C * config.qkv_bias
    attention, feed_forward = 3 * C * C + qkv_biases + C * C + C, 4 * C * C + 4 * C + 4 * C * C + C
    block = norms + attention + feed_forward
    positions = T * C if config.position == "learned" else 0
    head = 0 if config.tie_weights else V * C
    assert count_parameters(model) == V * C + positions + L * block + 2 * C + head
    parts = [model.tok_emb, model.pos_emb, *model.trf_blocks, model.final_norm, model.out_head]
    assert [count_parameters(part) for part in parts] == [V * C, positions, *[block] * L, 2 * C, V * C]


def test_parameters_that_training_cannot_change_do_not_count():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    model[0].requires_grad_(False)
    assert count_parameters(model) == 2 * 5 + 5


def test_gpt2_small_has_its_published_size():
    """The checkpoint that OpenAI published has 124,439,808 parameters. Its output head is the token embedding."""
    with torch.device("meta"):
        model = GPTModel(GPTConfig(context_length=1024, emb_dim=768, n_heads=12, n_layers=12, qkv_bias=True,
                                   tie_weights=True))
    assert model.config.vocab_size == 50257 and count_parameters(model) == 124_439_808


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_part_is_listed_with_the_shape_of_its_output(kind):
    model = lively_model(**kind)
    V, C, blocks = model.config.vocab_size, model.config.emb_dim, range(model.config.n_layers)
    for B, T in ((1, model.config.context_length), (3, 1)):
        assert output_shapes(model, torch.zeros(B, T, dtype=torch.long)) == {
            "tok_emb": (B, T, C), "pos_emb": (T, C), **{f"trf_blocks.{number}": (B, T, C) for number in blocks},
            "final_norm": (B, T, C), "out_head": (B, T, V)}


def test_looking_at_the_shapes_changes_nothing_even_if_it_fails():
    model = lively_model(drop_rate=0.5)
    before = torch.get_rng_state()
    output_shapes(model, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(StoryError):
        output_shapes(model, torch.zeros(2, 9, dtype=torch.long))
    assert not model.training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)
    assert not any(part._forward_hooks for part in model.modules())
