"""Attention within and across modalities: the oracle, alignment by time, what is missing."""

from functools import partial

import pytest
import torch
from einops import rearrange

from longnet_zoo.layers import MultimodalBlock, MultimodalDilatedAttention, initialize_weights
from longnet_zoo.layers.cross_weights import cross_weights, modality_shares
from longnet_zoo.layers.timeline import Timeline
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.positions import rotary_tables
from longnet_zoo.ops.reference import dilated_attention_reference

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
# Awkward on purpose: nothing divides anything.
OWN = {
    "video": DilatedPattern(segment_lengths=(5, 13), dilation_rates=(1, 3)),
    "audio": DilatedPattern(segment_lengths=(3, 7), dilation_rates=(1, 2)),
    "text": DilatedPattern(segment_lengths=(11,), dilation_rates=(1,)),
}
ACROSS = DilatedPattern(segment_lengths=(6, 17), dilation_rates=(1, 3))
LENGTHS = {"video": 6, "audio": 19, "text": 4}
TIMES = {"video": torch.arange(6.0).double(), "audio": torch.arange(19.0).double() / 3 + 0.1}


def make(names=tuple(OWN), **options):
    layer = MultimodalDilatedAttention(
        **{
            "embed_dim": 24,
            "num_heads": 4,
            "patterns": {name: OWN[name] for name in names},
            "pattern": ACROSS,
            "time_rate": 3.0,
            **options,
        }
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def draw(batch=3, names=tuple(OWN)):
    return {name: torch.randn(batch, LENGTHS[name], 24) for name in names}


def without(layer, *missing):
    """A layer that never had some of the modalities, with the weights of one that has."""
    kept = [name for name in layer.names if name not in missing]
    other = make(kept)
    weights = {}
    for key, value in layer.state_dict().items():
        for new, name in enumerate(kept):
            mark = f".experts.{layer.names.index(name)}."
            if mark in key:
                weights[key.replace(mark, f".experts.{new}." if len(kept) > 1 else ".")] = value
        if key.startswith(
            tuple(f"{part}.{name}." for part in ("own", "own_norms") for name in kept)
        ):
            weights[key] = value
    other.load_state_dict(weights)
    return other


def assert_equal(found, expected, rows=slice(None)):
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert torch.equal(found[name][rows], x), name


def assert_close(found, expected):
    assert list(found) == list(expected)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, **CLOSE)


def dense_across(layer, x, order, positions, mask=None):
    """The attention across modalities by the dense oracle, tokens sorted one by one."""
    attention, names = layer.across, list(x)
    experts = [layer.names.index(name) for name in names for _ in range(x[name].shape[1])]
    joined = torch.cat(list(x.values()), dim=1).double()

    def each(module, tokens):
        pairs = zip(experts, tokens.unbind(1), strict=True)
        return torch.stack([module.experts[expert](token) for expert, token in pairs], dim=1)

    normed = each(layer.across_norm, joined)
    q, k, v = (
        rearrange(each(project, normed), "b n (h d) -> b n h d", d=6)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    tables = [rotary_tables(row, 6) for row in positions]
    turned = []
    for y in (q, k):
        even, odd = y[..., 0::2], y[..., 1::2]
        cos, sin = (torch.stack([t[i] for t in tables]).double()[:, :, None] for i in (0, 1))
        turned.append(torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2))
    sort = lambda y: torch.stack([row[places] for row, places in zip(y, order, strict=True)])  # noqa: E731
    out = dilated_attention_reference(
        *(sort(y) for y in (*turned, v)), ACROSS, key_padding_mask=mask
    )
    unsorted = torch.zeros_like(out)
    for row, places in enumerate(order):
        unsorted[row, places] = out[row]
    update = each(attention.out_proj, each(attention.inner_norm, unsorted.flatten(2)))
    return joined + update


@pytest.mark.parametrize("is_own", [False, True], ids=["shared_times", "times_of_each_sample"])
def test_attention_across_equals_the_oracle_after_the_same_merge(is_own):
    layer, x = make().double(), {name: y.double() for name, y in draw(2).items()}
    video, audio = (TIMES[name].expand(2, -1).clone() for name in ("video", "audio"))
    if is_own:
        video[1] = 4.0 - 0.7 * video[1]
    order, positions = [], []
    for row in range(2):
        keys = [*video[row].tolist(), *audio[row].tolist(), *[-1e9] * 4]
        order.append(torch.tensor(sorted(range(29), key=lambda i: keys[i])))
        start = min(keys[:25])
        places = [*((key - start) * 3.0 for key in keys[:25]), -4, -3, -2, -1]
        positions.append(torch.tensor(places, dtype=torch.float64))
    timeline = Timeline.merge(
        x,
        times={"video": video if is_own else video[:1], "audio": audio[:1]},
        padding_masks={},
        time_rate=3.0,
    )
    tables = layer.rotary_tables(timeline, torch.device("cpu"))
    found = layer.attend_across(x, timeline, tables)
    expected = dense_across(layer, x, order, positions)
    torch.testing.assert_close(torch.cat(list(found.values()), 1), expected, atol=1e-6, rtol=1e-6)


def test_layer_is_both_attentions_with_their_norms_and_residuals():
    layer, x = make(), draw()
    timeline = Timeline.merge(
        x, times={k: t[None] for k, t in TIMES.items()}, padding_masks={}, time_rate=3.0
    )
    within = {k: y + layer.own[k](layer.own_norms[k](y)) for k, y in x.items()}
    tables = layer.rotary_tables(timeline, torch.device("cpu"))
    assert_close(layer(x, times=TIMES), layer.attend_across(within, timeline, tables))
    assert {k: layer.own[k].pattern for k in x} == OWN


def test_origin_of_time_and_order_of_the_dict_change_nothing_but_a_delay_does():
    layer, x = make(), draw()
    expected = layer(x, times=TIMES)
    later = {name: t + 1000.0 for name, t in TIMES.items()}
    assert_close(layer(x, times=later), expected)
    reordered = {name: x[name] for name in ("text", "audio", "video")}
    assert_equal(layer(reordered, times=dict(reversed(TIMES.items()))), expected)
    delayed = layer(x, times={**TIMES, "audio": TIMES["audio"] + 2.0})
    assert all((delayed[name] - y).abs().max() > 1e-2 for name, y in expected.items())
    slow = make(time_rate=0.5)
    slow.load_state_dict(layer.state_dict())
    assert (slow(x, times=TIMES)["video"] - expected["video"]).abs().max() > 1e-2


def test_a_segment_is_one_window_of_time_in_all_modalities():
    """Of 25 tokens in 6 s, sorted, a segment of 6 holds what is within about 1.5 s, and no more."""
    layer = make(
        ("video", "audio"), pattern=DilatedPattern(segment_lengths=(6,), dilation_rates=(1,))
    )
    x = draw(1, ("video", "audio"))
    timeline = Timeline.merge(
        x, times={k: t[None] for k, t in TIMES.items()}, padding_masks={}, time_rate=3.0
    )
    weights = cross_weights(layer, x, timeline, layer.rotary_tables(timeline, torch.device("cpu")))
    sees = weights["video", "audio"][0, 0] > 0
    distance = (TIMES["video"][:, None] - TIMES["audio"]).abs()
    assert sees.any(dim=1).all()
    assert distance[sees].max() < 2.0
    # Modality after modality, as without times, the first frames see no sound at all.
    unaligned = Timeline.merge(x, times={}, padding_masks={}, time_rate=3.0)
    tables = layer.rotary_tables(unaligned, torch.device("cpu"))
    weights = cross_weights(layer, x, unaligned, tables)
    assert not (weights["video", "audio"][0, 0] > 0).any()


def test_missing_for_all_equals_never_having_had_it():
    layer, x = make(), draw()
    for missing in (["audio"], ["video", "text"]):
        kept = {name: y for name, y in x.items() if name not in missing}
        expected = without(layer, *missing)(kept, times={k: TIMES[k] for k in kept if k in TIMES})
        assert_equal(layer({**x, **dict.fromkeys(missing)}, times=TIMES), expected)
        assert_equal(layer(kept, times=TIMES), expected)
        nan = {name: torch.full_like(x[name], torch.nan) for name in missing}
        absent = {name: [False] * 3 for name in missing}
        assert_equal(layer({**kept, **nan}, times=TIMES, present=absent), expected)


def test_missing_for_some_equals_running_these_and_the_rest_by_themselves():
    layer, x = make(), draw(5)
    has = {"audio": torch.tensor([True, False, True, False, False])}
    has["text"] = torch.tensor([True, True, True, False, True])
    for name, flags in has.items():
        x[name][~flags] = torch.nan
    out = layer(x, times=TIMES, present=has)
    groups = {(0, 2): [], (1, 4): ["audio"], (3,): ["audio", "text"]}
    for rows, missing in groups.items():
        rows = list(rows)
        kept = {name: y[rows] for name, y in x.items() if name not in missing}
        times = {k: TIMES[k] for k in kept if k in TIMES}
        expected = without(layer, *missing)(kept, times=times)
        assert_equal({name: out[name][rows] for name in kept}, expected)
        assert all(torch.equal(out[k][rows], torch.zeros_like(out[k][rows])) for k in missing)


def test_missing_costs_no_compute(monkeypatch):
    layer, x = make(), draw(4)
    rows = dict.fromkeys(x, 0)
    for name in x:
        count = lambda module, inputs, name=name: rows.update({name: rows[name] + len(inputs[0])})  # noqa: E731
        layer.own[name].register_forward_pre_hook(count)
    tokens = [0] * 3
    for i, expert in enumerate(layer.across.q_proj.experts):
        expert.register_forward_pre_hook(
            lambda module, inputs, i=i: tokens.__setitem__(i, tokens[i] + inputs[0][..., 0].numel())
        )
    layer(x, times=TIMES, present={"audio": [True, False, False, False], "text": [False] * 4})
    assert rows == {"video": 4, "audio": 1, "text": 0}
    assert tokens == [4 * 6, 19, 0]


def test_gradients_of_what_is_missing_are_none_and_never_nan():
    layer, x = make(), draw()
    x["audio"][1] = torch.nan
    for y in x.values():
        y.requires_grad_()
    present = {"audio": [True, False, True], "text": [False] * 3}
    out = layer(x, times=TIMES, present=present)
    assert list(out) == ["video", "audio"]
    sum((y * torch.randn_like(y)).sum() for y in out.values()).backward()
    assert x["audio"].grad[1].abs().max() == 0
    assert x["text"].grad is None
    text = set(map(id, layer.parameters_of("text")))
    for name, parameter in layer.named_parameters():
        if id(parameter) in text:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
    everything = {id(p) for name in layer.names for p in layer.parameters_of(name)}
    assert everything == set(map(id, layer.parameters()))
    alone = make(("text",))
    assert set(map(id, alone.parameters_of("text"))) == set(map(id, alone.parameters()))


def test_padding_equals_shorter_sequences():
    layer, x = make(), draw()
    lengths = {"video": [6, 2, 5], "audio": [19, 8, 1]}
    masks = {k: torch.arange(LENGTHS[k]) >= torch.tensor(n)[:, None] for k, n in lengths.items()}
    padded = {k: y.masked_fill(masks[k][..., None], 7.0) if k in masks else y for k, y in x.items()}
    out = layer(padded, times=TIMES, padding_masks=masks)
    for row in range(3):
        own = {k: y[row : row + 1, : lengths.get(k, [99] * 3)[row]] for k, y in x.items()}
        times = {k: t[: lengths[k][row]] for k, t in TIMES.items()}
        expected = layer(own, times=times)
        assert_close(
            {k: out[k][row : row + 1, : y.shape[1]] for k, y in expected.items()}, expected
        )


def test_options_reach_both_attentions():
    layer = make(num_kv_heads=2, qk_norm=True, sub_ln=False, bias=False, eps=1e-3, backend="math")
    for attention in (*layer.own.values(), layer.across):
        assert attention.num_kv_heads == 2
        assert attention.backend == "math"
    shapes = {key: tuple(p.shape) for key, p in layer.named_parameters()}
    assert shapes["own.audio.k_proj.weight"] == (12, 24)
    assert shapes["across.k_norm.experts.2.weight"] == (6,)
    assert not any("inner_norm" in key or "proj.bias" in key for key in shapes)
    assert layer.across_norm.experts[0].eps == layer.own_norms["text"].eps == 1e-3
    x = draw()
    torch.manual_seed(1)
    dropped = make(attention_dropout=0.5)(x)
    torch.manual_seed(1)
    assert not torch.equal(dropped["text"], make()(x)["text"])
    # Dropped altogether, both attentions leave what was there.
    for options in ({"dropout": 1 - 1e-9}, {"drop_path": 1 - 1e-9}):
        assert_equal(make(**options)(x), x)
        assert not torch.equal(make(**options).eval()(x)["text"], x["text"])


def test_block_feeds_each_modality_by_its_own_network():
    make_block = partial(MultimodalBlock, embed_dim=24, ffn_dim=31)
    block, x = make_block(attention=make()), draw()
    initialize_weights(block, gain=1.0)
    timeline = Timeline.merge(x, times={}, padding_masks={}, time_rate=3.0)
    tables = block.attention.rotary_tables(timeline, torch.device("cpu"))
    attended = block.attention(x)
    expected = {k: y + block.feed_forwards[k](block.ffn_norms[k](y)) for k, y in attended.items()}
    assert_close(block(x, timeline, tables), expected)
    assert {id(p) for name in x for p in block.parameters_of(name)} == {
        id(p) for p in block.parameters()
    }
    for options in ({"dropout": 1 - 1e-9}, {"drop_path": 1 - 1e-9}):
        other = make_block(attention=make(), **options)
        assert_equal(other(x, timeline, tables), other.attention(x))


def test_weights_of_the_softmax_make_the_output():
    layer, x = make(num_kv_heads=2).double(), {k: y.double() for k, y in draw(2).items()}
    masks = {"audio": torch.arange(19) >= torch.tensor([19, 5])[:, None]}
    timeline = Timeline.merge(
        x, times={k: t[None] for k, t in TIMES.items()}, padding_masks=masks, time_rate=3.0
    )
    tables = layer.rotary_tables(timeline, torch.device("cpu"))
    weights = cross_weights(layer, x, timeline, tables)
    assert {pair: w.shape[2:] for pair, w in weights.items()} == {
        (q, k): (LENGTHS[q], LENGTHS[k]) for q in x for k in x
    }
    attention = layer.across
    values = {
        name: rearrange(
            attention.v_proj.experts[i](layer.across_norm.experts[i](y)),
            "b n (h d) -> b h n d",
            d=6,
        ).repeat_interleave(2, dim=1)
        for i, (name, y) in enumerate(x.items())
    }
    out = layer.attend_across(x, timeline, tables)
    for i, name in enumerate(x):
        attended = sum(weights[name, key] @ values[key] for key in x)
        normed = attention.inner_norm.experts[i](rearrange(attended, "b h n d -> b n (h d)"))
        expected = x[name] + attention.out_proj.experts[i](normed)
        is_real = ~masks.get(name, torch.zeros(2, LENGTHS[name], dtype=torch.bool))
        torch.testing.assert_close(out[name][is_real], expected[is_real], atol=1e-6, rtol=1e-6)
    shares = modality_shares(weights)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    text_to_audio = weights["text", "audio"].sum(-1).mean((1, 2))
    torch.testing.assert_close(shares[:, 2, 1], text_to_audio)
    assert weights["text", "audio"][1, :, :, 5:].abs().max() == 0
    # Padded queries see nothing, and do not count.
    audio = weights["audio", "video"][1, :, :5].sum(-1).mean()
    torch.testing.assert_close(shares[1, 1, 0], audio)


def test_weights_of_long_sequences_are_refused():
    layer = make(("text",))
    x = {"text": torch.zeros(1, 4097, 24)}
    timeline = Timeline.merge(x, times={}, padding_masks={}, time_rate=1.0)
    with pytest.raises(ValueError, match="for at most 4096 tokens, got 4097"):
        cross_weights(layer, x, timeline, layer.rotary_tables(timeline, torch.device("cpu")))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"inputs": {"video": torch.zeros(2, 6, 23)}},
            ValueError,
            r"embed_dim=24 .*got \(2, 6, 23\)",
        ),
        ({"inputs": {"video": torch.zeros(2, 0, 24)}}, ValueError, r"got \(2, 0, 24\)"),
        ({"times": {"smell": TIMES["video"]}}, ValueError, r"times must be of .*got \['smell'\]"),
        ({"times": {"video": torch.zeros(5)}}, ValueError, r"must be \(6,\) .*got \(5,\)"),
        ({"padding_masks": {"x": 0}}, ValueError, r"padding_masks must be of .*got \['x'\]"),
        (
            {"padding_masks": {"video": torch.zeros(3, 6)}},
            TypeError,
            "must be bool, got torch.float",
        ),
        (
            {"padding_masks": {"video": torch.zeros(3, 5, dtype=torch.bool)}},
            ValueError,
            r"padding_masks\['video'\] must be \(3, 6\), got \(3, 5\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, error, message):
    options = {"inputs": draw(), **change}
    with pytest.raises(error, match=message):
        make()(options.pop("inputs"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": {}}, r"at least one, got \[\]"),
        ({"patterns": {"a.b": ACROSS}}, r"got \['a\.b'\]"),
        ({"patterns": {"keys": ACROSS}}, r"got \['keys'\]"),
        ({"time_rate": 0.0}, "time_rate must be a positive number, got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
