"""Step 6: attention, the blocks and the whole model, compared with numpy, with torch's own layers and with formulas."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import KINDS, lively_model, story_llm, weights_equal
from story_llm import (GPTConfig, GPTModel, KeyValueCache, MultiHeadAttention, StoryError, attention_maps,
                       causal_mask, fused_attention, generate, generate_text_simple, new_model)

POSITIONS = ("learned", "sinusoidal", "rotary")
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@pytest.fixture(autouse=True)
def same_numbers_in_each_test():
    torch.manual_seed(0)


@pytest.fixture
def fused(monkeypatch):
    """fused() lets all attention layers compute as they do on a GPU. Returns a list that grows with each call."""
    def switch():
        calls = []

        def average(layer, *tensors):
            calls.append(layer)
            return fused_attention(*tensors, layer.dropout)
        monkeypatch.setattr(MultiHeadAttention, "average", average)
        return calls
    return switch


def some_ids(model, rows, length=None):
    """Random token ids for a model, a full window of them unless `length` is given."""
    return torch.randint(model.config.vocab_size, (rows, length or model.config.context_length))


# attention

@pytest.mark.parametrize("T, S", [(1, 1), (1, 5), (3, 5), (5, 5)])
def test_the_mask_is_true_just_for_the_keys_after_a_query(T, S):
    assert causal_mask(T, S).tolist() == [[key > S - T + query for key in range(S)] for query in range(T)]


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_attention_weights_are_dropped_in_training_only(fused, on_a_gpu):
    """The layer attends to all tokens alike, and its output is made of the attention weights of its only head."""
    if on_a_gpu:
        fused()
    layer = MultiHeadAttention(GPTConfig(emb_dim=64, n_heads=1, context_length=64, drop_rate=0.4))
    even = torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]
    with torch.no_grad():
        for part in (layer.query, layer.key):
            part.weight.zero_()
        for part in (layer.value, layer.out_proj):
            part.weight.copy_(torch.eye(64))
        dropped = layer.train()(torch.eye(64)[None])[0]
        torch.testing.assert_close(layer.eval()(torch.eye(64)[None])[0], even)
    kept = dropped > 0
    assert kept.sum() / (64 * 65 / 2) == pytest.approx(0.6, abs=0.05)
    torch.testing.assert_close(dropped[kept], even[kept] / 0.6)


def test_a_block_equals_torchs_own_pre_norm_layer():
    config = GPTConfig(vocab_size=9, context_length=6, emb_dim=32, n_heads=4, n_layers=1, qkv_bias=True)
    block = GPTModel(config).trf_blocks[0]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, norm_first=True, batch_first=True, activation="gelu")
    ours = block.state_dict()
    names = {"att.out_proj.": "self_attn.out_proj.", "ff.expand.": "linear1.", "ff.project.": "linear2.",
             "norm1.": "norm1.", "norm2.": "norm2."}
    state = {new + kind: ours[old + kind] for old, new in names.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        three = [ours[f"att.{part}.{kind}"] for part in ("query", "key", "value")]
        state[f"self_attn.in_proj_{kind}"] = torch.cat(three)
    theirs.load_state_dict(state)
    x = torch.randn(2, 6, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    torch.testing.assert_close(block(x), theirs(x, src_mask=mask, is_causal=True), rtol=1e-4, atol=1e-5)


# the whole model in numpy

def in_numpy(model, token_ids):
    """The logits (T, V) of one window, and the attention weights (blocks, H, T, T), in numpy's 64-bit numbers. A pair
    of rotary dimensions is a complex number, which is rotated by an angle that grows with the position."""
    w = {name: value.numpy().astype(np.float64) for name, value in model.state_dict().items()}
    config, T = model.config, len(token_ids)
    D, maps = config.emb_dim // config.n_heads, []

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[name + ".weight"] + w[name + ".bias"]

    def turned(x):
        angles = np.arange(T)[:, None] * 10000.0 ** (-2 * np.arange(D // 2) / D)
        z = (x[:, :D // 2] + 1j * x[:, D // 2:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], axis=-1)

    def attend(x, name):
        queries, keys, values = [np.split(linear(x, f"{name}.{part}"), config.n_heads, axis=-1)
                                 for part in ("query", "key", "value")]
        if config.position == "rotary":
            queries, keys = map(turned, queries), map(turned, keys)
        scores = [q @ k.T / math.sqrt(D) + np.triu(np.full((T, T), -np.inf), 1) for q, k in zip(queries, keys)]
        maps.append([np.exp(s) / np.exp(s).sum(-1, keepdims=True) for s in scores])
        contexts = [weights @ v for weights, v in zip(maps[-1], values)]
        return linear(np.concatenate(contexts, axis=-1), name + ".out_proj")

    def activate(x):
        if config.gelu == "tanh":
            return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))) / 2
        return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2

    x = w["tok_emb.weight"][token_ids] + w["pos_emb.weight"][:T]
    for i in range(config.n_layers):
        x = x + attend(norm(x, f"trf_blocks.{i}.norm1"), f"trf_blocks.{i}.att")
        hidden = activate(linear(norm(x, f"trf_blocks.{i}.norm2"), f"trf_blocks.{i}.ff.expand"))
        x = x + linear(hidden, f"trf_blocks.{i}.ff.project")
    head = "tok_emb" if config.tie_weights else "out_head"
    return norm(x, "final_norm") @ w[head + ".weight"].T, np.array(maps)


@every_kind
def test_the_model_and_its_attention_weights_equal_those_computed_in_numpy(kind):
    """In 64-bit numbers. Only the angles of rotary positions are computed in 32 bits, and are off by about 1e-6."""
    model = lively_model(**kind).double()
    token_ids = some_ids(model, 1)
    logits, maps = in_numpy(model, token_ids[0].tolist())
    tolerance = {"rtol": 0, "atol": 1e-4 if kind.get("position") == "rotary" else 1e-9}
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids)[0], torch.tensor(logits), **tolerance)
    torch.testing.assert_close(attention_maps(model, token_ids), torch.tensor(maps), **tolerance)
    assert kind.get("context_length") == 1 or maps.std() > 0.05


# any kind of model

def test_the_kinds_of_models_have_every_value_of_every_setting():
    """Whoever adds a setting to GPTConfig adds it to KINDS in helpers.py."""
    for f in dataclasses.fields(GPTConfig):
        used = {kind.get(f.name, f.default) for kind in KINDS}
        expected = f.metadata.get("choices", (True, False) if f.type is bool else ())
        assert len(used) > 1 and used >= {f.default, *expected}, f.name


@every_kind
def test_a_changed_token_leaves_all_earlier_logits_alone_and_changes_its_own_and_all_later_ones(kind):
    model = lively_model(**kind).double()
    with torch.no_grad():
        for block in model.trf_blocks:
            block.att.query.weight *= 0.1       # with smaller scores, each token attends to all earlier ones
    token_ids = some_ids(model, 1)
    before = model(token_ids)
    for position in range(token_ids.shape[1]):
        changed = token_ids.clone()
        changed[0, position] = (changed[0, position] + 1) % model.config.vocab_size
        after = model(changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-9)
        assert ((after - before)[:, position:].abs().amax(dim=-1) > 1e-4).all()


@every_kind
@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_a_text_in_parts_with_a_cache_has_the_logits_of_the_whole_text(fused, kind, on_a_gpu):
    model = lively_model(**kind).double()
    token_ids = some_ids(model, 2)
    T = token_ids.shape[1]
    with torch.no_grad():
        whole = model(token_ids)
        if on_a_gpu:
            fused()
        for lengths in ([T], [1] * T, [1, T - 1], [(T + 1) // 2, T // 2]):
            cache, end = KeyValueCache(), 0
            for part in token_ids.split([length for length in lengths if length], dim=1):
                start, end = end, end + part.shape[1]
                torch.testing.assert_close(model(part, cache), whole[:, start:end], rtol=0, atol=1e-9)
                assert cache.length == end


@every_kind
def test_cached_generation_equals_the_simple_one_within_and_past_the_context(kind):
    model = lively_model(**kind)
    for length in (1, model.config.context_length, 20):
        prompt = some_ids(model, 3, length)
        before = prompt.clone()
        expected = generate_text_simple(model, prompt, 25, model.config.context_length)[:, length:]
        assert torch.equal(torch.stack(list(generate(model, prompt, 25)), dim=1), expected)
        assert torch.equal(prompt, before)


@every_kind
def test_fused_attention_gives_the_same_logits_and_gradients(fused, kind):
    """In 64-bit numbers, rounding explains no more than 1e-9, also where a gradient should be 0."""
    model = lively_model(**kind).double()
    token_ids, parameters = some_ids(model, 2), [p for p in model.parameters() if p.requires_grad]

    def logits_and_gradients():
        logits = model(token_ids)
        return [logits.detach(), *torch.autograd.grad(logits.square().mean(), parameters)]

    plain, calls = logits_and_gradients(), fused()
    for one, other in zip(plain, logits_and_gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert len(calls) == model.config.n_layers


# positions and windows

@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_earlier_tokens_matters(position):
    """In a single block without positions, it would not. With smaller scores, the last token attends to all of them."""
    model = lively_model(position=position, n_layers=1).double()
    with torch.no_grad():
        model.trf_blocks[0].att.query.weight *= 0.1
    last = [model(torch.tensor([ids]))[0, -1] for ids in ([1, 2, 3, 4, 5], [2, 1, 3, 4, 5])]
    assert (last[0] - last[1]).abs().max() > 1e-3


def test_windows_of_a_batch_do_not_see_each_other():
    model = lively_model().double()
    batch = torch.randint(40, (3, 8))
    torch.testing.assert_close(model(batch), torch.cat([model(row[None]) for row in batch]), rtol=0, atol=1e-9)


def test_more_tokens_than_the_context_length_are_refused_and_those_in_the_cache_count():
    model, cache = lively_model(), KeyValueCache()
    with pytest.raises(StoryError, match="9.*8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    model(torch.zeros(1, 6, dtype=torch.long), cache)
    with pytest.raises(StoryError, match="9.*8"):
        model(torch.zeros(1, 3, dtype=torch.long), cache)
    assert model(torch.zeros(1, 2, dtype=torch.long), cache).shape == (1, 2, 40)


# dropout

@pytest.mark.parametrize("training", [True, False])
def test_the_embeddings_and_in_each_block_attention_weights_and_both_outputs_are_dropped(training):
    model = lively_model(drop_rate=0.3, emb_dim=64).train(training)
    dropped = []

    def note_dropped(module, inputs, output):
        dropped.append((output[inputs[0] != 0] == 0).float().mean().item())

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(note_dropped)
    model(torch.randint(40, (8, 8)))
    assert dropped == pytest.approx([0.3 if training else 0.0] * (1 + 2 * 3), abs=0.04)


# weights

@pytest.mark.parametrize("C, n_layers, tie_weights", [(64, 8, False), (96, 2, True), (192, 1, False)])
def test_initial_weights_have_gpt2s_standard_deviation_and_those_added_to_x_a_smaller_one(C, n_layers, tie_weights):
    model = GPTModel(GPTConfig(vocab_size=200, context_length=200, emb_dim=C, n_heads=4, n_layers=n_layers,
                               qkv_bias=True, tie_weights=tie_weights))
    usual, matrices = 0.02 * math.sqrt(768 / C), 0
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            added_to_x = name.endswith(("att.out_proj.weight", "ff.project.weight"))
            matrices += added_to_x
            expected = usual / math.sqrt(2 * n_layers) if added_to_x else usual
            assert weight.std().item() == pytest.approx(expected, rel=0.06), name
            assert abs(weight.mean().item()) < 0.1 * usual, name
        else:
            assert torch.equal(weight, torch.full_like(weight, "norm" in name and "weight" in name)), name
    assert matrices == 2 * n_layers


def test_the_same_seed_gives_the_same_weights_whatever_the_state_of_torchs_generator():
    config = GPTConfig(vocab_size=20, context_length=4, emb_dim=16, n_layers=1)
    first = new_model(config, seed=5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert weights_equal(first, new_model(config, seed=5)) and torch.equal(torch.get_rng_state(), before)
    assert not weights_equal(first, new_model(config, seed=6))


def test_tied_weights_are_a_single_parameter():
    assert [model.out_head.weight is model.tok_emb.weight
            for model in (lively_model(tie_weights=True), lively_model())] == [True, False]


# learning

@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.get("context_length") != 1], ids=str)
def test_every_parameter_that_can_be_trained_gets_a_gradient(kind):
    """In a window of one token, that token has an attention weight of 1, whatever its query and key are."""
    model = lively_model(**kind)
    model(some_ids(model, 2)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # The bias of the key layer adds the same number to all scores of a query, and softmax does not notice that. With
    # rotary positions, these numbers differ.
    rotary = model.config.position == "rotary"
    assert [name for name in without if rotary or not name.endswith("key.bias")] == []


@every_kind
def test_one_batch_can_be_overfitted(kind):
    small = {"vocab_size": 50, "context_length": 8, "emb_dim": 32, "n_heads": 2, "n_layers": 1}
    model = GPTModel(GPTConfig(**{**small, **kind}))
    token_ids = some_ids(model, 4, model.config.context_length + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = story_llm.batch_loss(model, token_ids[:, :-1], token_ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert story_llm.batch_loss(model.eval(), token_ids[:, :-1], token_ids[:, 1:]) < 0.1


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("tie_weights", [False, True])
def test_the_loss_of_an_untrained_model_is_about_that_of_a_uniform_guess(position, tie_weights):
    model = GPTModel(GPTConfig(vocab_size=300, context_length=16, emb_dim=64, n_layers=2, position=position,
                               tie_weights=tie_weights))
    token_ids = torch.randint(300, (16, 17))
    loss = F.cross_entropy(model(token_ids[:, :-1]).flatten(0, 1), token_ids[:, 1:].flatten()).item()
    assert abs(loss - math.log(300)) < 0.4
