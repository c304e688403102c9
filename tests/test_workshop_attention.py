"""Workshop: the fused attention, the other positions, and what attention looks at: all held against naive loops."""
import cmath
import math

import pytest
import torch
from torch.nn import functional as F

from helpers import lively_model, story_llm
from story_llm import (GPTConfig, GPTModel, KeyValueCache, MultiHeadAttention, attend, attention_maps, causal_mask, plot_attention,
                       rotate)

POSITIONS = ("learned", "sinusoidal", "rotary")
OPTIONS = [{}, {"position": "sinusoidal"}, {"position": "rotary"}, {"position": "rotary", "qkv_bias": True},
           {"n_heads": 1, "qkv_bias": True}]
T_OF_S = [(1, 1), (1, 6), (4, 6), (6, 6)]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])


@pytest.fixture(autouse=True)
def same_numbers_in_each_test():
    torch.manual_seed(0)


@pytest.fixture
def either_way(monkeypatch):
    """either_way(fused, function) calls it with that kind of attention, and sees that it was really that kind."""
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


def attend_naively(queries, keys, values):
    """Number by number, for one head: tables as lists of rows."""
    gathered = []
    for t, query in enumerate(queries):
        visible = len(keys) - len(queries) + t + 1
        scores = [sum(q * k for q, k in zip(query, key)) / math.sqrt(len(query)) for key in keys[:visible]]
        powers = [math.exp(score - max(scores)) for score in scores]
        gathered.append([sum(power * value[d] for power, value in zip(powers, values)) / sum(powers)
                         for d in range(len(values[0]))])
    return gathered


def some(T, S, D=4, dtype=torch.float32):
    """Queries, keys and values of 2 windows and 3 heads."""
    return [torch.randn(2, 3, n, D).to(dtype) for n in (T, S, S)]


# written out or in one call

@pytest.mark.parametrize("T, S", T_OF_S)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_attention_equals_a_naive_loop(either_way, T, S, fused, dtype, tolerance):
    tensors = some(T, S, dtype=dtype)
    found = either_way(fused, attend, *tensors, causal_mask(T, S))
    assert found.dtype == dtype
    queries, keys, values = [tensor.double().flatten(0, 1).tolist() for tensor in tensors]
    expected = [attend_naively(*head) for head in zip(queries, keys, values)]
    torch.testing.assert_close(found.double().flatten(0, 1), torch.tensor(expected, dtype=torch.double),
                               rtol=0, atol=tolerance)


@pytest.mark.parametrize("T, S", T_OF_S)
def test_both_kinds_of_attention_have_the_same_gradients(either_way, T, S):
    tensors, weight = some(T, S, dtype=torch.float64), torch.randn(2, 3, T, 4, dtype=torch.double)

    def gradients():
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        return torch.autograd.grad((attend(*leaves, causal_mask(T, S)) * weight).sum(), leaves)

    written, fused = either_way(False, gradients), either_way(True, gradients)
    for one, other in zip(written, fused):
        torch.testing.assert_close(one, other)
    assert written[2].abs().min() > 0  # each value is seen by someone


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_both_kinds_of_layer_give_the_same_and_learn_the_same(either_way, config, bf16):
    layer = MultiHeadAttention(GPTConfig(**{"emb_dim": 32, "n_heads": 4, "context_length": 9, **config}))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 9, 32)

    def outputs_and_gradients():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = layer(x)
        return [output.float(), *torch.autograd.grad(output.float().square().mean(), list(layer.parameters()))]

    written, fused = either_way(False, outputs_and_gradients), either_way(True, outputs_and_gradients)
    largest = max(gradient.abs().max().item() for gradient in written[1:])
    torch.testing.assert_close(written[0], fused[0], rtol=0, atol=0.03 if bf16 else 1e-5)
    for one, other in zip(written[1:], fused[1:]):
        torch.testing.assert_close(one, other, rtol=0, atol=(0.03 if bf16 else 1e-5) * largest)


@pytest.mark.parametrize("config", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", [[8], [1] * 8, [3, 1, 4], [5, 3]], ids=str)
def test_both_kinds_of_model_say_the_same_with_and_without_a_cache(either_way, config, parts):
    model, token_ids = lively_model(**config), torch.randint(40, (2, 8))

    def in_parts():
        cache = KeyValueCache()
        with torch.no_grad():
            return torch.cat([model(part, cache) for part in token_ids.split(parts, dim=1)], dim=1)

    with torch.no_grad():
        whole = either_way(False, model, token_ids)
        torch.testing.assert_close(either_way(True, model, token_ids), whole, rtol=0, atol=1e-3)
    ends = torch.tensor(parts).cumsum(0) - 1
    torch.testing.assert_close(either_way(True, in_parts), whole[:, ends], rtol=0, atol=1e-3)


def test_on_the_cpu_attention_is_written_out(monkeypatch):
    monkeypatch.delattr(F, "scaled_dot_product_attention")
    assert lively_model()(IDS).shape == (1, 6, 40)


# rotary positions

def turned(rows):
    """Rows of one head, from place 0 on, as complex numbers turned by their places; Python's own numbers."""
    D = len(rows[0])
    return [[complex(row[i], row[i + D // 2]) * cmath.exp(1j * place * 10000 ** (-2 * i / D)) for i in range(D // 2)]
            for place, row in enumerate(rows)]


def numbers(complex_rows):
    """Those rows as a tensor of real numbers, in the order of `rotate`."""
    return torch.tensor([[z.real for z in row] + [z.imag for z in row] for row in complex_rows], dtype=torch.double)


@pytest.mark.parametrize("T, S", T_OF_S)
def test_rotation_is_that_of_complex_numbers_by_their_places(T, S):
    keys = torch.randn(2, 3, S, 8)
    queries = torch.randn(2, 3, S, 8)
    found_queries, found_keys = rotate(queries[..., S - T:, :], keys)
    for given, found, first in ((queries, found_queries, S - T), (keys, found_keys, 0)):
        expected = [numbers(turned(rows))[first:] for rows in given.flatten(0, 1).tolist()]
        torch.testing.assert_close(found.flatten(0, 1).double(), torch.stack(expected), rtol=0, atol=1e-5)


def test_rotation_is_exact_in_bf16_too():
    """Only the result is rounded: to the nearest of 8 bits. An angle of 300 in bf16 would be off by a whole turn."""
    S, D = 300, 16
    given = torch.randn(2, 1, 1, S, D).bfloat16()
    for found, rows in zip(rotate(*given), given[:, 0, 0].tolist()):
        assert found.dtype == torch.bfloat16
        exact = numbers(turned(rows))
        unavoidable = (exact.bfloat16().double() - exact).abs()
        assert ((found[0, 0].double() - exact).abs() <= unavoidable + 2e-4).all()


def test_rotary_attention_is_that_of_the_turned_queries_and_keys():
    T, D = 5, 8
    layer = MultiHeadAttention(GPTConfig(emb_dim=D, n_heads=1, context_length=T, position="rotary")).double()
    x = torch.randn(1, T, D, dtype=torch.double)
    queries, keys, values = [part(x)[0] for part in (layer.query, layer.key, layer.value)]
    gathered = attend_naively(numbers(turned(queries.tolist())).tolist(), numbers(turned(keys.tolist())).tolist(),
                              values.tolist())
    expected = layer.out_proj(torch.tensor(gathered, dtype=torch.double))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-5, atol=1e-6)


def test_rotary_scores_depend_on_distances_alone():
    queries, keys = torch.randn(2, 1, 1, 6, 16)
    before = torch.randn(1, 1, 29, 16)
    scores = []
    for further in (before[:, :, :0], before):      # the same six, with nothing before them, or with 29 tokens
        q, k = rotate(queries, torch.cat([further, keys], dim=2))
        scores.append(q @ k[:, :, -6:].transpose(-2, -1))
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)
    assert not torch.allclose(scores[0], queries @ keys.transpose(-2, -1), atol=0.1)


def test_rotary_adds_nothing_to_the_token_and_learns_no_places():
    model = lively_model(position="rotary")
    assert not model.pos_emb.weight.any() and not model.pos_emb.weight.requires_grad


def test_sinusoidal_places_are_the_papers_sines_and_cosines_and_are_not_learned():
    """As loud as the tokens, by one factor for the whole table; the sines first, then the cosines."""
    model = GPTModel(GPTConfig(vocab_size=9, context_length=12, emb_dim=16, n_heads=2, n_layers=1,
                               position="sinusoidal"))
    expected = [[f(place / 10000 ** (2 * i / 16)) for f in (math.sin, math.cos) for i in range(8)]
                for place in range(12)]
    torch.testing.assert_close(model.pos_emb.weight, 0.02 * math.sqrt(768 / 16) * torch.tensor(expected))
    assert not model.pos_emb.weight.requires_grad


# what attention looks at

def inputs_and_outputs(model, token_ids):
    """What went into and came out of the attention of each layer."""
    seen = []
    hooks = [block.att.register_forward_hook(lambda part, given, output: seen.append((given[0], output)))
             for block in model.trf_blocks]
    with torch.no_grad():
        model(token_ids)
    for hook in hooks:
        hook.remove()
    return seen


def heads(layer, x, part):
    """(H, T, D) of x (1, T, C), cut by hand."""
    rows = F.linear(x[0], part.weight, part.bias)
    return torch.stack(rows.split(rows.shape[1] // layer.config.n_heads, dim=1))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_attention_maps_are_the_softmax_of_queries_times_keys(either_way, config, fused):
    model = lively_model(**config)
    maps = either_way(fused, attention_maps, model, IDS)
    H = model.config.n_heads
    assert maps.shape == (2, H, 6, 6) and maps.dtype == torch.float32 and not maps.requires_grad
    later = torch.ones(6, 6, dtype=torch.bool).triu(1)
    assert (maps[:, :, later] == 0).all() and maps.std() > 0.05
    with torch.no_grad():
        for layer_maps, block, (x, _) in zip(maps, model.trf_blocks, inputs_and_outputs(model, IDS)):
            queries, keys = [heads(block.att, x, part) for part in (block.att.query, block.att.key)]
            if model.config.position == "rotary":
                queries, keys = [torch.stack([numbers(turned(rows)).float() for rows in each.tolist()])
                                 for each in (queries, keys)]
            scores = torch.einsum("htd,hsd->hts", queries, keys) / math.sqrt(queries.shape[-1])
            expected = F.softmax(scores.masked_fill(later, -math.inf), dim=-1)
            torch.testing.assert_close(layer_maps, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_attention_maps_are_the_shares_that_the_model_used(either_way, config, fused):
    """The values, mixed by the maps and put through the last Linear, are what each layer gave."""
    model = lively_model(**config)
    maps = either_way(fused, attention_maps, model, IDS)
    with torch.no_grad():
        for shares, block, (x, output) in zip(maps, model.trf_blocks, inputs_and_outputs(model, IDS)):
            mixed = shares @ heads(block.att, x, block.att.value)
            torch.testing.assert_close(block.att.out_proj(torch.cat(list(mixed), dim=1)), output[0],
                                       rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_one_token_looks_at_itself(either_way, fused):
    assert torch.equal(either_way(fused, attention_maps, lively_model(), IDS[:, :1]), torch.ones(2, 4, 1, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("T", [8, 9])  # 9 are too many, and refused
def test_attention_maps_drop_nothing_and_leave_nothing_behind(training, T):
    model, token_ids = lively_model(drop_rate=0.5), torch.arange(T)[None]
    expected = attention_maps(model.eval(), token_ids[:, :8])
    model.train(training)
    before = torch.get_rng_state()
    if T == 8:
        assert torch.equal(attention_maps(model, token_ids), expected)
    else:
        with pytest.raises(ValueError):
            attention_maps(model, token_ids)
    assert model.training is training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)
    assert not any(part._forward_hooks for part in model.modules())


# the picture

@pytest.mark.parametrize("layers, heads", [(2, 4), (1, 3), (2, 1), (1, 1)])
def test_each_head_is_drawn_with_its_own_shares(layers, heads):
    maps, names = torch.rand(layers, heads, 3, 3), ["␣a", "$b$", "漢"]
    figure = plot_attention(maps, names)
    panels = [axes for axes in figure.axes if axes.get_title()]
    titles = [f"layer {layer + 1}, head {head + 1}" for layer in range(layers) for head in range(heads)]
    assert [axes.get_title() for axes in panels] == titles
    for axes, shares in zip(panels, maps.flatten(0, 1).tolist()):
        image, = axes.images
        assert image.get_array().tolist() == shares and image.get_clim() == (0, 1)
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == names
    assert [label.get_text() for label in panels[0].get_yticklabels()] == names


def test_a_picture_of_many_heads_and_tokens_is_no_larger_than_memory_allows():
    figure = plot_attention(torch.zeros(8, 1, 100, 100), ["a"] * 100)
    assert max(figure.get_size_inches()) < 70 and len(figure.axes) == 8 + 1


def test_the_picture_is_written_whatever_the_names(tmp_path):
    names = ["a", "$b$", "$", "d_", "$\\e{$", "␣f^{"]
    plot_attention(attention_maps(lively_model(n_layers=1, n_heads=1), IDS), names, tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and min(width, height) > 200


@pytest.mark.parametrize("path", ["one.txt", "one", "folder.png", "missing/one.png"])
def test_a_path_that_is_no_picture_is_refused(tmp_path, path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=path.split("/")[-1].replace(".", r"\.")):
        plot_attention(torch.ones(1, 1, 1, 1), ["a"], tmp_path / path)
