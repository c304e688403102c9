import cmath
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import lively_model
from story_llm import GPTConfig, GPTModel, MultiHeadAttention, attention, count_parameters, inference, trace_shapes

POSITIONS = ("learned", "sinusoidal", "rotary")


# attention

@pytest.mark.parametrize("queries_of", [7, 3, 1])
def test_attention_by_hand_equals_the_fused_one(queries_of):
    """The queries are the last ones: with fewer of them than keys, the mask is the lower rows of the square one."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 4, 7, 8)
    expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    contexts, weights = attention(queries[..., -queries_of:, :], keys, values)
    torch.testing.assert_close(contexts, expected[..., -queries_of:, :])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 4, queries_of))
    future = torch.ones(7, 7).triu(diagonal=1)[-queries_of:].bool()
    assert (weights[..., future] == 0).all() and (weights[..., ~future] > 0).all()


def test_attention_drops_the_share_of_weights_it_is_told_to():
    torch.manual_seed(0)
    keys = torch.randn(1, 200, 8)
    _, weights = attention(keys, keys, keys, drop_rate=0.25)
    kept = (weights[0] > 0).sum() / (200 * 201 / 2)
    assert 0.70 < kept < 0.80


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_multi_head_attention_equals_torchs_own(qkv_bias):
    torch.manual_seed(0)
    ours = MultiHeadAttention(GPTConfig(emb_dim=32, n_heads=4, context_length=9, qkv_bias=qkv_bias))
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias if qkv_bias else torch.zeros(96))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 9, 32)
    expected, _ = theirs(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(9), need_weights=False)
    torch.testing.assert_close(ours(x), expected)


def test_rotary_attention_is_that_of_complex_numbers_turned_by_place():
    torch.manual_seed(0)
    T, D = 5, 8
    ours = MultiHeadAttention(GPTConfig(emb_dim=D, n_heads=1, context_length=T, position="rotary")).double()
    x = torch.randn(1, T, D, dtype=torch.double)
    queries, keys, values = (x[0] @ ours.qkv.weight.T).split(D, dim=-1)

    def turned(row, place):
        row = row.tolist()
        return [complex(row[i], row[i + D // 2]) * cmath.exp(1j * place * 10000 ** (-2 * i / D)) for i in range(D // 2)]

    expected = []
    for t in range(T):
        products = [[(q * k.conjugate()).real for q, k in zip(turned(queries[t], t), turned(keys[s], s))]
                    for s in range(t + 1)]
        scores = [sum(product) / math.sqrt(D) for product in products]
        weights = torch.tensor(scores, dtype=torch.double).softmax(0)
        expected.append(weights @ values[:t + 1])
    torch.testing.assert_close(ours(x)[0], ours.out_proj(torch.stack(expected)), rtol=1e-5, atol=1e-6)


def test_rotary_attention_depends_on_distances_alone():
    torch.manual_seed(0)
    layer = MultiHeadAttention(GPTConfig(emb_dim=32, n_heads=2, context_length=40, position="rotary"))
    x = torch.randn(1, 6, 32)
    torch.testing.assert_close(layer(x), layer(x, start=29), rtol=1e-3, atol=1e-5)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(layer(x)[:, -1], layer(swapped)[:, -1], atol=1e-5)


# the model

def test_a_block_equals_torchs_own_pre_norm_layer():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=9, context_length=6, emb_dim=32, n_heads=4, n_layers=1, qkv_bias=True)
    block = GPTModel(config).trf_blocks[0]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, norm_first=True, batch_first=True, activation="gelu")
    names = {"att.qkv.": "self_attn.in_proj_", "att.out_proj.": "self_attn.out_proj.", "ff.layers.0.": "linear1.",
             "ff.layers.2.": "linear2.", "norm1.": "norm1.", "norm2.": "norm2."}
    theirs.load_state_dict({new + name.removeprefix(old): value for name, value in block.state_dict().items()
                            for old, new in names.items() if name.startswith(old)})
    x = torch.randn(2, 6, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    torch.testing.assert_close(block(x), theirs(x, src_mask=mask, is_causal=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_a_changed_token_leaves_all_earlier_logits_alone_and_changes_its_own(position):
    model = lively_model(position=position)
    token_ids = torch.randint(40, (1, 8))
    before = model(token_ids)
    for place in range(8):
        changed = token_ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 40
        after = model(changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=1e-5)
        assert ((after - before)[:, place:].abs().amax(dim=-1) > 1e-4).all()


@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_earlier_tokens_matters(position):
    model = lively_model(position=position, n_layers=1)  # in one layer without places it would not
    last = [model(torch.tensor([ids]))[0, -1] for ids in ([1, 2, 3, 4, 5], [2, 1, 3, 4, 5])]
    assert (last[0] - last[1]).abs().max() > 1e-3


def test_windows_of_a_batch_do_not_see_each_other():
    model = lively_model()
    batch = torch.randint(40, (3, 8))
    torch.testing.assert_close(model(batch), torch.cat([model(row[None]) for row in batch]), rtol=1e-4, atol=1e-5)


def test_sinusoidal_places_are_the_papers_sines_and_cosines_and_are_not_learned():
    """Up to one factor for the whole table; the sines first, then the cosines."""
    model = GPTModel(GPTConfig(vocab_size=9, context_length=12, emb_dim=16, n_heads=2, n_layers=1,
                               position="sinusoidal"))
    expected = [[f(place / 10000 ** (2 * i / 16)) for f in (math.sin, math.cos) for i in range(8)]
                for place in range(12)]
    factors = model.pos_emb.weight / torch.tensor(expected)
    factors = factors[torch.tensor(expected).abs() > 1e-3]
    torch.testing.assert_close(factors, factors[0].expand_as(factors), rtol=1e-4, atol=0.0)
    assert factors[0] > 0 and not model.pos_emb.weight.requires_grad


def test_rotary_adds_nothing_to_the_token():
    assert not lively_model(position="rotary").pos_emb.weight.any()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("tie_weights", [False, True])
def test_an_untrained_model_is_about_as_wrong_as_a_blind_guess(position, tie_weights):
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=300, context_length=16, emb_dim=64, n_layers=2, position=position,
                               tie_weights=tie_weights))
    token_ids = torch.randint(300, (16, 17))
    loss = F.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten()).item()
    assert abs(loss - math.log(300)) < 0.4


@pytest.mark.parametrize("position", POSITIONS)
def test_one_batch_can_be_overfitted(position):
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=50, context_length=8, emb_dim=32, n_heads=2, n_layers=1, position=position))
    token_ids = torch.randint(50, (4, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = F.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_every_weight_that_is_to_be_learned_gets_a_gradient():
    for position in POSITIONS:
        model = lively_model(position=position, qkv_bias=True)
        model(torch.randint(40, (2, 8))).square().mean().backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad
                   and (p.grad is None or not p.grad.any())]
        assert not missing


def test_dropout_changes_the_logits_in_training_only():
    model = lively_model(drop_rate=0.5)
    token_ids = torch.randint(40, (1, 8))
    assert torch.equal(model(token_ids), model(token_ids))
    model.train()
    assert not torch.allclose(model(token_ids), model(token_ids))


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="9.*8"):
        lively_model()(torch.zeros(1, 9, dtype=torch.long))


# counting and tracing

@pytest.mark.parametrize("config", [{}, {"qkv_bias": True}, {"tie_weights": True}, {"position": "rotary"},
                                    {"position": "sinusoidal"}])
def test_the_counts_are_those_of_a_formula(config):
    V, T, C, L = 40, 8, 32, 2
    block = 2 * 2 * C + 3 * C * C + 3 * C * bool(config.get("qkv_bias")) + C * C + C + 4 * C * C + 4 * C + 4 * C * C + C
    learned_places = T * C if config.get("position", "learned") == "learned" else 0
    head = 0 if config.get("tie_weights") else V * C
    counts = count_parameters(lively_model(**config))
    assert sum(counts.values()) == V * C + learned_places + L * block + 2 * C + head
    assert counts["trf_blocks"] == L * block and counts["tok_emb"] == V * C


def test_tied_weights_are_one_and_the_same():
    model = lively_model(tie_weights=True)
    assert model.out_head.weight is model.tok_emb.weight


def test_gpt2_small_has_its_published_size():
    """124,439,808: as in the checkpoint that OpenAI published, whose head is the token embedding."""
    with torch.device("meta"):
        model = GPTModel(GPTConfig(vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=12,
                                   qkv_bias=True, tie_weights=True))
    assert sum(count_parameters(model).values()) == 124_439_808


def test_the_trace_shows_each_part_once_with_its_shape_and_leaves_nothing_behind():
    model = lively_model(drop_rate=0.1).train()
    shapes = trace_shapes(model, torch.zeros(2, 5, dtype=torch.long))
    names = [name for name, _ in shapes]
    assert len(names) == len(set(names)) and [shape for _, shape in shapes][0] == (2, 5) and shapes[-1][1] == (2, 5, 40)
    assert dict(shapes)["tok_emb"] == dict(shapes)["trf_blocks.1"] == (2, 5, 32)
    assert model.training and not any(part._forward_hooks for part in model.modules())


def test_inference_keeps_no_gradients_and_leaves_the_mode_as_it_was_even_after_an_error():
    for training in (True, False):
        model = lively_model().train(training)
        with pytest.raises(KeyError), inference(model):
            assert not model.training and not torch.is_grad_enabled()
            raise KeyError
        assert model.training is training and torch.is_grad_enabled()
