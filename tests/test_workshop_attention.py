"""Workshop: fused attention, the other kinds of positions, and attention maps, compared with naive loops."""
import cmath
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import lively_model, story_llm
from story_llm import (GPTConfig, GPTModel, KeyValueCache, MultiHeadAttention, StoryError, attention_maps,
                       attention_weights, causal_mask, fused_attention, plot_attention, rotate)

OPTIONS = [{}, {"position": "sinusoidal"}, {"position": "rotary"}, {"position": "rotary", "qkv_bias": True},
           {"n_heads": 1, "qkv_bias": True}]
T_OF_S = [(1, 1), (1, 6), (4, 6), (6, 6)]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


@pytest.fixture(autouse=True)
def same_random_numbers_in_every_test():
    torch.manual_seed(0)


@pytest.fixture
def call_with(monkeypatch):
    """call_with(fused, function, *arguments) calls it with that kind of attention and checks that this was used."""
    def call(fused, function, *arguments):
        calls = []

        def spy(*given, original=F.scaled_dot_product_attention, **named):
            calls.append(given)
            return original(*given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", spy)
            patch.setattr(story_llm, "fused_is_faster", lambda queries: fused)
            result = function(*arguments)
        assert bool(calls) == fused
        return result
    return call


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


NO_DROPOUT = nn.Dropout(0.0)


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


@pytest.mark.parametrize("T, S", T_OF_S)
def test_both_kinds_of_attention_have_the_same_gradients(T, S):
    tensors, weight = some_tensors(T, S, dtype=torch.float64), torch.randn(2, 3, T, 4, dtype=torch.double)
    gradients = []
    for function in (plain_attention, lambda *each: fused_attention(*each, NO_DROPOUT)):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        gradients.append(torch.autograd.grad((function(*leaves) * weight).sum(), leaves))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)
    assert gradients[0][2].abs().min() > 0      # every value is attended to


def test_fused_attention_drops_in_training_as_often_as_its_module_says_and_never_else():
    """With values of 1, a context is the sum of the weights that were not dropped, each divided by 1 - p."""
    queries, keys = [torch.zeros(1, 1, 300, 4) for _ in range(2)]
    values, dropout = torch.ones(1, 1, 300, 4), nn.Dropout(0.25)
    sums = fused_attention(queries, keys, values, dropout.train())[0, 0, :, 0]
    assert sums.std() > 0.02 and sums[150:].mean().item() == pytest.approx(1.0, abs=0.02)
    assert sums[0].item() == pytest.approx(0) or sums[0].item() == pytest.approx(1 / 0.75)
    torch.testing.assert_close(fused_attention(queries, keys, values, dropout.eval()), values)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_a_layer_computes_and_learns_the_same_with_both_kinds_of_attention(call_with, config, bf16):
    layer = MultiHeadAttention(GPTConfig(**{"emb_dim": 32, "n_heads": 4, "context_length": 9, **config}))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 9, 32)

    def outputs_and_gradients():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = layer(x)
        return [output.float(), *torch.autograd.grad(output.float().square().mean(), list(layer.parameters()))]

    plain, fused = call_with(False, outputs_and_gradients), call_with(True, outputs_and_gradients)
    largest = max(gradient.abs().max().item() for gradient in plain[1:])
    torch.testing.assert_close(plain[0], fused[0], rtol=0, atol=0.03 if bf16 else 1e-5)
    for one, other in zip(plain[1:], fused[1:]):
        torch.testing.assert_close(one, other, rtol=0, atol=(0.03 if bf16 else 1e-5) * largest)


@pytest.mark.parametrize("config", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", [[8], [1] * 8, [3, 1, 4], [5, 3]], ids=str)
def test_a_model_predicts_the_same_with_both_kinds_of_attention_with_and_without_a_cache(call_with, config, parts):
    model, token_ids = lively_model(**config), torch.randint(40, (2, 8))

    def in_parts():
        cache = KeyValueCache()
        with torch.no_grad():
            return torch.cat([model(part, cache) for part in token_ids.split(parts, dim=1)], dim=1)

    with torch.no_grad():
        whole = call_with(False, model, token_ids)
        torch.testing.assert_close(call_with(True, model, token_ids), whole, rtol=0, atol=1e-3)
    ends = torch.tensor(parts).cumsum(0) - 1
    torch.testing.assert_close(call_with(True, in_parts), whole[:, ends], rtol=0, atol=1e-3)


def test_on_the_cpu_attention_is_computed_step_by_step(monkeypatch):
    monkeypatch.delattr(F, "scaled_dot_product_attention")
    assert lively_model()(IDS).shape == (1, 6, 40)


# rotary and sinusoidal positions

def rotated_naively(rows):
    """Rows of one head, from position 0 on, as complex numbers rotated by their positions, in Python's numbers."""
    D = len(rows[0])
    return [[complex(row[i], row[i + D // 2]) * cmath.exp(1j * position * 10000 ** (-2 * i / D)) for i in range(D // 2)]
            for position, row in enumerate(rows)]


def real_numbers(complex_rows):
    """These rows as a tensor of real numbers, in the order in which `rotate` has them."""
    return torch.tensor([[z.real for z in row] + [z.imag for z in row] for row in complex_rows], dtype=torch.double)


@pytest.mark.parametrize("T, S", T_OF_S)
def test_rotation_is_that_of_complex_numbers_by_their_positions(T, S):
    keys = torch.randn(2, 3, S, 8)
    queries = torch.randn(2, 3, S, 8)
    found_queries, found_keys = rotate(queries[..., S - T:, :], keys)
    for given, found, first in ((queries, found_queries, S - T), (keys, found_keys, 0)):
        expected = [real_numbers(rotated_naively(rows))[first:] for rows in given.flatten(0, 1).tolist()]
        torch.testing.assert_close(found.flatten(0, 1).double(), torch.stack(expected), rtol=0, atol=1e-5)


def test_rotation_is_exact_in_bf16_too():
    """Only the result is rounded, to the nearest of 8 bits. An angle of 300 in bf16 would be wrong by a whole turn."""
    S, D = 300, 16
    given = torch.randn(2, 1, 1, S, D).bfloat16()
    for found, rows in zip(rotate(*given), given[:, 0, 0].tolist()):
        assert found.dtype == torch.bfloat16
        exact = real_numbers(rotated_naively(rows))
        unavoidable = (exact.bfloat16().double() - exact).abs()
        assert ((found[0, 0].double() - exact).abs() <= unavoidable + 2e-4).all()


def test_rotary_attention_is_attention_with_rotated_queries_and_keys():
    T, D = 5, 8
    layer = MultiHeadAttention(GPTConfig(emb_dim=D, n_heads=1, context_length=T, position="rotary")).double()
    x = torch.randn(1, T, D, dtype=torch.double)
    queries, keys, values = [part(x)[0].tolist() for part in (layer.query, layer.key, layer.value)]
    queries, keys = [real_numbers(rotated_naively(rows)).tolist() for rows in (queries, keys)]
    expected = layer.out_proj(torch.tensor(naive_contexts(queries, keys, values), dtype=torch.double))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-5, atol=1e-6)


def test_rotary_scores_depend_on_distances_alone():
    queries, keys = torch.randn(2, 1, 1, 6, 16)
    earlier = torch.randn(1, 1, 29, 16)
    scores = []
    for more in (earlier[:, :, :0], earlier):       # the same six tokens, first at the beginning, then after 29 others
        q, k = rotate(queries, torch.cat([more, keys], dim=2))
        scores.append(q @ k[:, :, -6:].transpose(-2, -1))
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)
    assert not torch.allclose(scores[0], queries @ keys.transpose(-2, -1), atol=0.1)


def test_with_rotary_positions_nothing_is_added_to_the_tokens_and_nothing_is_learned():
    model = lively_model(position="rotary")
    assert not model.pos_emb.weight.any() and not model.pos_emb.weight.requires_grad


def test_sinusoidal_positions_are_the_sines_and_cosines_of_the_paper_and_are_not_learned():
    """The sines come first, then the cosines. All are scaled like the token embeddings."""
    model = GPTModel(GPTConfig(vocab_size=9, context_length=12, emb_dim=16, n_heads=2, n_layers=1,
                               position="sinusoidal"))
    expected = [[f(position / 10000 ** (2 * i / 16)) for f in (math.sin, math.cos) for i in range(8)]
                for position in range(12)]
    torch.testing.assert_close(model.pos_emb.weight, 0.02 * math.sqrt(768 / 16) * torch.tensor(expected))
    assert not model.pos_emb.weight.requires_grad


# attention maps

def inputs_and_outputs(model, token_ids):
    """[(input, output)] of the attention layers."""
    seen = []
    hooks = [block.att.register_forward_hook(lambda part, given, output: seen.append((given[0], output)))
             for block in model.trf_blocks]
    with torch.no_grad():
        model(token_ids)
    for hook in hooks:
        hook.remove()
    return seen


def split_by_hand(layer, x, part):
    """(H, T, D) of x (1, T, C), cut by hand."""
    rows = F.linear(x[0], part.weight, part.bias)
    return torch.stack(rows.split(rows.shape[1] // layer.config.n_heads, dim=1))


@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_attention_maps_are_the_softmax_of_the_scaled_scores(config):
    model = lively_model(**config)
    maps = attention_maps(model, IDS)
    H = model.config.n_heads
    assert maps.shape == (2, H, 6, 6) and maps.dtype == torch.float32 and not maps.requires_grad
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    assert (maps[:, :, later] == 0).all() and maps.std() > 0.05
    with torch.no_grad():
        for layer_maps, block, (x, _) in zip(maps, model.trf_blocks, inputs_and_outputs(model, IDS)):
            queries, keys = [split_by_hand(block.att, x, part) for part in (block.att.query, block.att.key)]
            if model.config.position == "rotary":
                queries, keys = [torch.stack([real_numbers(rotated_naively(rows)).float() for rows in each.tolist()])
                                 for each in (queries, keys)]
            scores = torch.einsum("htd,hsd->hts", queries, keys) / math.sqrt(queries.shape[-1])
            expected = F.softmax(scores.masked_fill(later, -math.inf), dim=-1)
            torch.testing.assert_close(layer_maps, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_attention_maps_are_the_weights_that_the_model_used(config):
    """The values, summed with these weights and sent through the last linear layer, are the output of each layer."""
    model = lively_model(**config)
    maps = attention_maps(model, IDS)
    with torch.no_grad():
        for weights, block, (x, output) in zip(maps, model.trf_blocks, inputs_and_outputs(model, IDS)):
            contexts = weights @ split_by_hand(block.att, x, block.att.value)
            torch.testing.assert_close(block.att.out_proj(torch.cat(list(contexts), dim=1)), output[0],
                                       rtol=1e-3, atol=1e-4)


def test_a_single_token_attends_to_itself():
    assert torch.equal(attention_maps(lively_model(), IDS[:, :1]), torch.ones(2, 4, 1, 1))


@pytest.mark.parametrize("T", [8, 9])  # 9 are too many, and refused
def test_attention_maps_use_no_dropout_and_leave_nothing_behind(T):
    model, token_ids = lively_model(drop_rate=0.5), torch.arange(T)[None]
    expected = attention_maps(lively_model(), token_ids[:, :8])
    before = torch.get_rng_state()
    if T == 8:
        assert torch.equal(attention_maps(model, token_ids), expected)
    else:
        with pytest.raises(StoryError):
            attention_maps(model, token_ids)
    assert not model.training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)
    assert not any(part._forward_hooks for part in model.modules())


# the picture

@pytest.mark.parametrize("layers, heads", [(2, 4), (1, 3), (2, 1), (1, 1)])
def test_every_head_is_drawn_with_its_own_weights(layers, heads):
    maps, names = torch.rand(layers, heads, 3, 3), ["␣a", "$b$", "漢"]
    figure = plot_attention(maps, names)
    panels = [axes for axes in figure.axes if axes.get_title()]
    titles = [f"block {layer + 1}, head {head + 1}" for layer in range(layers) for head in range(heads)]
    assert [axes.get_title() for axes in panels] == titles
    for axes, weights in zip(panels, maps.flatten(0, 1).tolist()):
        image, = axes.images
        assert image.get_array().tolist() == weights and image.get_clim() == (0, 1)       # one scale
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == names
    assert [label.get_text() for label in panels[0].get_yticklabels()] == names


def test_a_picture_of_many_heads_and_tokens_is_not_too_large_for_the_memory():
    figure = plot_attention(torch.zeros(8, 1, 100, 100), ["a"] * 100)
    assert max(figure.get_size_inches()) < 70 and len(figure.axes) == 8 + 1


def test_the_picture_is_saved_whatever_the_names_of_the_tokens(tmp_path):
    names = ["a", "$b$", "$", "d_", "$\\e{$", "␣f^{"]
    plot_attention(attention_maps(lively_model(n_layers=1, n_heads=1), IDS), names, tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and min(width, height) > 200


@pytest.mark.parametrize("path", ["one.txt", "one", "folder.png", "missing/one.png"])
def test_a_path_that_is_no_picture_is_refused(tmp_path, path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StoryError, match=path.split("/")[-1].replace(".", r"\.")):
        plot_attention(torch.ones(1, 1, 1, 1), ["a"], tmp_path / path)
