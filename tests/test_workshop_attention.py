"""Workshop: fused attention and the other kinds of positions, compared with naive loops, and the picture of attention.
(Whole models with them, and the attention weights that are drawn, are compared with numpy in step 6.)"""
import cmath
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import TEXT, lively_model, tiny
from story_llm import (GPTConfig, GPTModel, MultiHeadAttention, StoryError, attention_maps, attention_weights,
                       causal_mask, fused_attention, ids_of_prompt, plot_attention, position_angles, rotate)

T_OF_S = [(1, 1), (1, 6), (4, 6), (6, 6)]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
NO_DROPOUT = nn.Dropout(0.0)


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_test():
    torch.manual_seed(0)


def naive_contexts(queries, keys, values):
    """The contexts of one head, number by number. Matrices are lists of rows."""
    contexts = []
    for t, query in enumerate(queries):
        visible = len(keys) - len(queries) + t + 1
        scores = [sum(q * k for q, k in zip(query, key)) / math.sqrt(len(query)) for key in keys[:visible]]
        powers = [math.exp(score - max(scores)) for score in scores]
        contexts.append([sum(power * value[d] for power, value in zip(powers, values)) / sum(powers)
                         for d in range(len(values[0]))])
    return contexts


def some_tensors(T, S, D=4, dtype=torch.float32):
    """Queries, keys and values of 2 windows and 3 heads."""
    return [torch.randn(2, 3, n, D).to(dtype) for n in (T, S, S)]


def plain_attention(queries, keys, values):
    return attention_weights(queries, keys, causal_mask(queries.shape[-2], keys.shape[-2])) @ values


# attention step by step or in one call

@pytest.mark.parametrize("T, S", T_OF_S)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_attention_equals_a_naive_loop(T, S, fused, dtype, tolerance):
    tensors = some_tensors(T, S, dtype=dtype)
    found = fused_attention(*tensors, NO_DROPOUT) if fused else plain_attention(*tensors)
    assert found.dtype == dtype
    queries, keys, values = [tensor.double().flatten(0, 1).tolist() for tensor in tensors]
    expected = [naive_contexts(*head) for head in zip(queries, keys, values)]
    torch.testing.assert_close(found.double().flatten(0, 1), torch.tensor(expected, dtype=torch.double),
                               rtol=0, atol=tolerance)


def test_on_the_cpu_attention_is_computed_step_by_step(monkeypatch):
    monkeypatch.delattr(F, "scaled_dot_product_attention")
    assert lively_model()(IDS).shape == (1, 6, 40)


# rotary and sinusoidal positions

def rotated_naively(rows):
    """Rows of one head, from position 0 on, as complex numbers rotated by their positions, in Python's numbers."""
    D = len(rows[0])
    turned = [[complex(row[i], row[i + D // 2]) * cmath.exp(1j * position * 10000 ** (-2 * i / D))
               for i in range(D // 2)] for position, row in enumerate(rows)]
    return torch.tensor([[z.real for z in row] + [z.imag for z in row] for row in turned], dtype=torch.double)


def test_rotation_is_that_of_complex_numbers_by_their_positions_and_exact_in_bf16_too():
    """In bf16, only the result is rounded, to the nearest of 8 bits. An angle of 300 would be wrong by a whole turn."""
    S, D = 300, 16
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.randn(2, 3, S, D).to(dtype)
        found = rotate(given, position_angles(S, D))
        assert found.dtype == dtype
        exact = torch.stack([rotated_naively(rows) for rows in given.flatten(0, 1).tolist()])
        unavoidable = (exact.to(dtype).double() - exact).abs()
        assert ((found.flatten(0, 1).double() - exact).abs() <= unavoidable + 2e-4).all()


def test_rotary_scores_depend_on_distances_alone():
    """The same six tokens, first at the beginning of a text, then after 29 others."""
    x, earlier = torch.randn(1, 6, 16), torch.randn(1, 29, 16)
    layer = MultiHeadAttention(GPTConfig(emb_dim=16, n_heads=1))
    queries, keys = layer.split_heads(x), layer.split_heads(torch.cat([earlier, x], dim=1))
    angles = position_angles(35, 16)
    first = rotate(queries, angles[:6]) @ rotate(queries, angles[:6]).mT
    later = rotate(queries, angles[29:]) @ rotate(keys, angles)[:, :, 29:].mT
    torch.testing.assert_close(first, later, rtol=0, atol=1e-4)
    assert not torch.allclose(first, queries @ queries.mT, atol=0.1)


def test_with_rotary_positions_nothing_is_added_to_the_tokens_and_nothing_is_learned():
    model = lively_model(position="rotary")
    assert not model.pos_emb.weight.any() and not model.pos_emb.weight.requires_grad


@pytest.mark.parametrize("C", [16, 15])
def test_sinusoidal_positions_are_the_sines_and_cosines_of_the_paper_and_are_not_learned(C):
    """The sines come first, then the cosines. All are scaled like the token embeddings."""
    model = GPTModel(GPTConfig(vocab_size=9, context_length=12, emb_dim=C, n_heads=1, n_layers=1,
                               position="sinusoidal"))
    expected = [[f(position / 10000 ** (2 * i / C)) for f in (math.sin, math.cos) for i in range(8)][:C]
                for position in range(12)]
    torch.testing.assert_close(model.pos_emb.weight, 0.02 * math.sqrt(768 / C) * torch.tensor(expected))
    assert not model.pos_emb.weight.requires_grad


# attention maps

@pytest.mark.parametrize("T", [8, 9])  # 9 are too many, and refused
def test_attention_maps_use_no_dropout_and_leave_nothing_behind(T):
    model, token_ids = lively_model(drop_rate=0.5), torch.arange(T)[None]
    before = torch.get_rng_state()
    if T == 8:
        assert torch.equal(attention_maps(model, token_ids), attention_maps(lively_model(), token_ids))
    else:
        with pytest.raises(StoryError):
            attention_maps(model, token_ids)
    assert not model.training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)
    assert not any(part._forward_hooks for part in model.modules())


# the picture

@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("layers, heads", [(2, 4), (1, 3), (2, 1)])
def test_every_head_is_drawn_with_its_own_weights_and_the_tokens_beside_them(layers, heads):
    run, _ = tiny(n_layers=layers, n_heads=heads, emb_dim=12 * heads)
    prompt = "The old ferryman tied his"
    maps = attention_maps(run.model, ids_of_prompt(run, prompt))
    figure = plot_attention(run, prompt)
    panels = [axes for axes in figure.axes if axes.get_title()]
    titles = [f"block {layer + 1}, head {head + 1}" for layer in range(layers) for head in range(heads)]
    assert [axes.get_title() for axes in panels] == titles
    for axes, weights in zip(panels, maps.flatten(0, 1).tolist()):
        image, = axes.images
        assert image.get_array().tolist() == weights and image.get_clim() == (0, 1)       # one scale
    for labels in (panels[-1].get_xticklabels(), panels[0].get_yticklabels()):
        assert [label.get_text() for label in labels] == ["The", "␣old", "␣ferryman", "␣tied", "␣his"]


def test_of_a_long_prompt_the_last_window_is_drawn_and_a_picture_of_much_fits_into_memory(no_warnings):
    run, _ = tiny(context_length=80, n_layers=8, n_heads=1, emb_dim=8)
    assert ids_of_prompt(run, TEXT)[0].tolist() == run.tokenizer.encode(TEXT)[-80:]
    figure = plot_attention(run, TEXT)
    assert max(figure.get_size_inches()) < 70 and len(figure.axes) == 8 + 1


def test_the_picture_is_saved_whatever_the_names_of_the_tokens(tmp_path, no_warnings):
    """matplotlib would read $...$ as a formula."""
    text = "a $b$ $ d_ $\\e{$ f^{ and so on " * 3
    run, _ = tiny(text)
    plot_attention(run, text[:25], tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and min(width, height) > 200
