"""Step 6: attention, the blocks and the whole model, held against torch's own layers and against formulas."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import lively_model, story_llm, weights_equal
from story_llm import GPTConfig, GPTModel, KeyValueCache, MultiHeadAttention, attend, causal_mask, new_model

POSITIONS = ("learned", "sinusoidal", "rotary")
OPTIONS = [{}, {"position": "sinusoidal"}, {"position": "rotary"}, {"tie_weights": True, "qkv_bias": True}]


@pytest.fixture(autouse=True)
def same_numbers_in_each_test():
    torch.manual_seed(0)


def shares_of(queries, keys, drop_rate=0.0):
    """What is gathered of values that are a 1 in a column of their own: the shares themselves."""
    T, S = queries.shape[-2], keys.shape[-2]
    ones = torch.eye(S).expand(*keys.shape[:-2], S, S)
    return attend(queries, keys, ones, causal_mask(T, S), drop_rate)


# attention

@pytest.mark.parametrize("T, S", [(1, 1), (1, 5), (3, 5), (5, 5)])
def test_the_mask_forbids_just_the_keys_after_a_query(T, S):
    expected = [[key > S - T + query for key in range(S)] for query in range(T)]
    assert causal_mask(T, S).tolist() == expected


@pytest.mark.parametrize("queries_of", [7, 3, 1])
def test_attention_equals_torchs_own(queries_of):
    """The queries are the last ones: with fewer of them than keys, they see as much as they did among all."""
    queries, keys, values = torch.randn(3, 2, 4, 7, 8)
    expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)[..., -queries_of:, :]
    found = attend(queries[..., -queries_of:, :], keys, values, causal_mask(queries_of, 7))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("queries_of", [7, 3, 1])
def test_shares_add_up_to_1_and_later_tokens_get_none(queries_of):
    queries, keys = torch.randn(2, 2, 4, 7, 8)
    shares = shares_of(queries[..., -queries_of:, :], keys)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(2, 4, queries_of))
    future = torch.ones(7, 7).triu(diagonal=1)[-queries_of:].bool()
    assert (shares[..., future] == 0).all() and (shares[..., ~future] > 0).all()


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_multi_head_attention_equals_torchs_own(qkv_bias):
    ours = MultiHeadAttention(GPTConfig(emb_dim=32, n_heads=4, context_length=9, qkv_bias=qkv_bias))
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    three = (ours.query, ours.key, ours.value)
    assert all((layer.bias is not None) == qkv_bias for layer in three)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in three]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in three]) if qkv_bias else torch.zeros(96))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 9, 32)
    expected, _ = theirs(x, x, x, attn_mask=nn.Transformer.generate_square_subsequent_mask(9), need_weights=False)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_drops_the_share_it_is_told_to_and_makes_the_others_larger_by_as_much():
    keys = torch.randn(1, 100, 8)
    all_shares, shares = shares_of(keys, keys), shares_of(keys, keys, drop_rate=0.25)
    kept = shares > 0
    assert kept.sum() / (100 * 101 / 2) == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(shares[kept], all_shares[kept] / 0.75)


@pytest.mark.parametrize("fused", [False, True])
def test_the_layer_drops_shares_in_training_only(monkeypatch, fused):
    """A layer whose heads attend to all alike, and whose output are the shares of its one head."""
    monkeypatch.setattr(story_llm, "fused_is_faster", lambda queries: fused)
    layer = MultiHeadAttention(GPTConfig(emb_dim=64, n_heads=1, context_length=64, drop_rate=0.4))
    with torch.no_grad():
        for part in (layer.query, layer.key):
            part.weight.zero_()
        for part in (layer.value, layer.out_proj):
            part.weight.copy_(torch.eye(64))
    even = torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]
    with torch.no_grad():
        dropped = layer.train()(torch.eye(64)[None])[0]
        torch.testing.assert_close(layer.eval()(torch.eye(64)[None])[0], even)
    kept = dropped > 0
    assert kept.sum() / (64 * 65 / 2) == pytest.approx(0.6, abs=0.05)
    torch.testing.assert_close(dropped[kept], even[kept] / 0.6)


# a block, and the whole model

def test_a_block_equals_torchs_own_pre_norm_layer():
    config = GPTConfig(vocab_size=9, context_length=6, emb_dim=32, n_heads=4, n_layers=1, qkv_bias=True)
    block = GPTModel(config).trf_blocks[0]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, norm_first=True, batch_first=True, activation="gelu")
    ours = block.state_dict()
    names = {"att.out_proj.": "self_attn.out_proj.", "ff.widen.": "linear1.", "ff.narrow.": "linear2.",
             "norm1.": "norm1.", "norm2.": "norm2."}
    state = {new + kind: ours[old + kind] for old, new in names.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        three = [ours[f"att.{part}.{kind}"] for part in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(three)
    theirs.load_state_dict(state)
    x = torch.randn(2, 6, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    torch.testing.assert_close(block(x), theirs(x, src_mask=mask, is_causal=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_the_model_is_the_sum_of_both_embeddings_the_blocks_a_norm_and_the_head(config):
    model = lively_model(**config)
    token_ids = torch.randint(40, (2, 6))
    weights = model.state_dict()
    x = weights["tok_emb.weight"][token_ids] + weights["pos_emb.weight"][:6]
    for block in model.trf_blocks:
        x = block(x)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    x = x * weights["final_norm.weight"] + weights["final_norm.bias"]
    head = weights["tok_emb.weight" if config.get("tie_weights") else "out_head.weight"]
    torch.testing.assert_close(model(token_ids), x @ head.T, rtol=1e-4, atol=1e-4)


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
    torch.testing.assert_close(model(batch), torch.cat([model(row[None]) for row in batch]), rtol=0, atol=1e-3)


def test_more_tokens_than_the_context_are_refused_those_in_the_cache_count():
    model, cache = lively_model(), KeyValueCache()
    with pytest.raises(ValueError, match="9.*8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    model(torch.zeros(1, 6, dtype=torch.long), cache)
    with pytest.raises(ValueError, match="9.*8"):
        model(torch.zeros(1, 3, dtype=torch.long), cache)
    assert model(torch.zeros(1, 2, dtype=torch.long), cache).shape == (1, 1, 40)


# dropout

def test_dropout_changes_the_logits_in_training_only():
    model = lively_model(drop_rate=0.5)
    token_ids = torch.randint(40, (1, 8))
    assert torch.equal(model(token_ids), model(token_ids))
    model.train()
    assert not torch.allclose(model(token_ids), model(token_ids))


@pytest.mark.parametrize("training", [True, False])
def test_the_embedding_and_both_sums_of_every_block_drop_their_share(training):
    model = lively_model(drop_rate=0.3, emb_dim=64).train(training)
    dropped = []
    dropouts = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    for part in dropouts:
        part.register_forward_hook(lambda part, given, got: dropped.append((got == 0).float().mean().item()))
    model(torch.randint(40, (8, 8)))
    assert dropped == pytest.approx([0.3 if training else 0.0] * (1 + 2 * 2), abs=0.04)


# weights

@pytest.mark.parametrize("C, n_layers, tie_weights", [(64, 8, False), (96, 2, True), (192, 1, False)])
def test_initial_weights_have_gpt2s_spread_and_what_goes_into_the_sum_less(C, n_layers, tie_weights):
    model = GPTModel(GPTConfig(vocab_size=200, context_length=200, emb_dim=C, n_heads=4, n_layers=n_layers,
                               qkv_bias=True, tie_weights=tie_weights))
    usual, matrices = 0.02 * math.sqrt(768 / C), 0
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            into_sum = name.endswith(("att.out_proj.weight", "ff.narrow.weight"))
            matrices += into_sum
            assert weight.std().item() == pytest.approx(usual / math.sqrt(2 * n_layers) if into_sum else usual,
                                                        rel=0.06), name
            assert abs(weight.mean().item()) < 0.1 * usual, name
        else:
            assert torch.equal(weight, torch.full_like(weight, "norm" in name and "weight" in name)), name
    assert matrices == 2 * n_layers


def test_the_same_seed_makes_the_same_weights_whatever_torchs_own_chance():
    config = GPTConfig(vocab_size=20, context_length=4, emb_dim=16, n_layers=1)
    first = new_model(config, seed=5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert weights_equal(first, new_model(config, seed=5)) and torch.equal(torch.get_rng_state(), before)
    assert not weights_equal(first, new_model(config, seed=6))


def test_tied_weights_are_one_and_the_same():
    model = lively_model(tie_weights=True)
    assert model.out_head.weight is model.tok_emb.weight
    assert lively_model().out_head.weight is not lively_model().tok_emb.weight


# learning

@pytest.mark.parametrize("position", POSITIONS)
def test_every_weight_that_is_to_be_learned_gets_a_gradient(position):
    model = lively_model(position=position, qkv_bias=True)
    model(torch.randint(40, (2, 8))).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # A key's bias adds the same to all scores of a query, so without turning it changes no share.
    assert not [name for name in without if position == "rotary" or not name.endswith("key.bias")]


@pytest.mark.parametrize("config", OPTIONS, ids=str)
def test_one_batch_can_be_overfitted(config):
    model = GPTModel(GPTConfig(vocab_size=50, context_length=8, emb_dim=32, n_heads=2, n_layers=1, **config))
    token_ids = torch.randint(50, (4, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = story_llm.batch_loss(model, token_ids[:, :-1], token_ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("tie_weights", [False, True])
def test_an_untrained_model_is_about_as_wrong_as_a_blind_guess(position, tie_weights):
    model = GPTModel(GPTConfig(vocab_size=300, context_length=16, emb_dim=64, n_layers=2, position=position,
                               tie_weights=tie_weights))
    token_ids = torch.randint(300, (16, 17))
    loss = F.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten()).item()
    assert abs(loss - math.log(300)) < 0.4
