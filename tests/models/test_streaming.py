"""Reading a sequence piece by piece equals reading it at once."""

import copy

import pytest
import torch

from longnet_zoo.factory import create_model
from longnet_zoo.ops.pattern import DENSE_SEGMENT, DilatedPattern
from longnet_zoo.ops.streaming import StreamingCache

from .families import PATTERN, TEXT, VOCAB_SIZE

SEQ_LEN = 101
PATTERNS = {
    "awkward": PATTERN,
    "nested": {"segment_lengths": (8, 16, 32), "dilation_rates": (1, 2, 4)},
    "block": {
        "segment_lengths": (8, 16, 32),
        "dilation_rates": (1, 2, 4),
        "head_offset": "block",
    },
    "uncovered": {"segment_lengths": (9,), "dilation_rates": (2,)},
    "many_offsets": {"segment_lengths": (5, 40), "dilation_rates": (1, 7)},
    "dense": {"segment_lengths": (DENSE_SEGMENT,), "dilation_rates": (1,)},
}
PIECES = {
    "one": [101],
    "steps": [1] * 101,
    "across_borders": [13] * 7 + [10],
    "mixed": [40, 1, 1, 1, 5, 30, 23],
    "at_borders": [32, 32, 32, 5],
}


def make(**options):
    return create_model("longnet_lm_tiny", **{**TEXT, "num_layers": 2, **PATTERN, **options}).eval()


def draw(batch=2, seq_len=SEQ_LEN):
    return torch.randint(VOCAB_SIZE, (batch, seq_len))


def assert_near(got, expected):
    assert (got - expected).abs().max() < 1e-5


POSITIONS = {4: ("xpos", "rotary", "alibi", "relative", None), 2: ("xpos",), 1: ("relative",)}


# One layer, here and below: what the layers of a cache mix up shows in tests of two layers.
@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", POSITIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_equal_one_pass(pattern, num_kv_heads):
    options = {"num_layers": 1, "num_kv_heads": num_kv_heads, **PATTERNS[pattern]}
    for position in POSITIONS[num_kv_heads]:
        model = make(position=position, **options)
        tokens = draw()
        whole = model(tokens)
        for sizes in PIECES.values():
            cache = model.make_cache(batch_size=2)
            got = [model(piece, cache=cache) for piece in tokens.split(sizes, dim=1)]
            assert_near(torch.cat(got, dim=1), whole)
        assert cache.lengths == [SEQ_LEN, SEQ_LEN]


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_at_different_positions_equal_each_alone(pattern, num_kv_heads):
    options = {"num_layers": 1, "num_kv_heads": num_kv_heads, **PATTERNS[pattern]}
    for position in ("xpos", "alibi"):
        model = make(position=position, **options)
        tokens = draw(batch=3)
        whole = model(tokens)
        cache = model.make_cache(batch_size=3)
        at = [0, 0, 0]
        # Among them: all rows alike, one token each, and rows that get none.
        for news in ([17, 50, 50], [1, 1, 1], [0, 1, 1], [3, 1, 0], *[[1, 1, 1]] * 20, [9, 9, 2]):
            piece = torch.zeros(3, max(news), dtype=torch.int64)
            for row, new in enumerate(news):
                piece[row, :new] = tokens[row, at[row] : at[row] + new]
            mask = torch.arange(max(news)) >= torch.tensor(news)[:, None]
            got = model(piece, cache=cache, key_padding_mask=mask if mask.any() else None)
            for row, new in enumerate(news):
                assert (model.forward_head(torch.zeros(24)) == got[row, new:]).all()
                if new:
                    assert_near(got[row, :new], whole[row, at[row] : at[row] + new])
                at[row] += new
            assert cache.lengths == at


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stream_as_exactly_as_one_pass(dtype):
    model = make()
    tokens = draw()
    exact = copy.deepcopy(model).double()(tokens)
    model = model.to(dtype)
    cache = model.make_cache(batch_size=2)
    got = torch.cat([model(x, cache=cache) for x in tokens.split([50, 1, 1, 49], dim=1)], dim=1)
    assert got.dtype == dtype
    error, usual = ((x - exact).abs().max() for x in (got, model(tokens)))
    assert error <= 1.5 * usual + 1e-12


@torch.no_grad()
def test_loss_and_embeddings_stream():
    model = make()
    tokens = draw()
    cache = model.make_cache(batch_size=2)
    labels = tokens.roll(-1, dims=1)
    parts = [
        model.loss(x, y, cache=cache, reduction="sum")
        for x, y in zip(tokens.split(30, dim=1), labels.split(30, dim=1), strict=True)
    ]
    torch.testing.assert_close(sum(parts), model.loss(tokens, labels, reduction="sum"))
    cache.reset()
    assert cache.lengths == [0, 0]
    embeds = model.embedding(tokens)
    got = [model(inputs_embeds=x, cache=cache) for x in embeds.split(30, dim=1)]
    assert_near(torch.cat(got, dim=1), model(tokens))


@torch.no_grad()
def test_reordered_rows_go_on_as_those_they_came_from():
    model = make(num_kv_heads=2)
    tokens = draw(batch=3)
    cache = model.make_cache(batch_size=3)
    model(tokens[:, :60], cache=cache)
    rows = torch.tensor([2, 0, 0, 1])
    cache.reorder(rows)
    got = model(tokens[rows, 60:], cache=cache)
    assert_near(got, model(tokens)[rows, 60:])
    with pytest.raises(ValueError, match=r"rows must be numbers in \[0, 4\), .* got \[4\]"):
        cache.reorder(torch.tensor([4]))
    with pytest.raises(TypeError, match=r"must be an int64 tensor of row numbers, got torch.bool"):
        cache.reorder(torch.tensor([True, False, False, True]))
    with pytest.raises(TypeError, match="must be an int64 tensor of row numbers, got list"):
        cache.reorder([0])
    early = model.make_cache()
    early.reorder(torch.zeros(3, dtype=torch.int64))
    assert_near(model(tokens, cache=early), model(tokens))


def test_an_interrupted_call_spoils_the_cache_until_its_reset():
    model = make()
    tokens = draw()

    def fail(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        whole = model(tokens)
        cache = model.make_cache(2)
        model(tokens[:, :50], cache=cache)
        hook = model.stack.blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(tokens[:, 50:90], cache=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match=r"was interrupted .* Call cache.reset\(\)"):
            model(tokens[:, 50:70], cache=cache)
        cache.reset()
        assert_near(model(tokens, cache=cache), whole)


def test_inference_mode_may_come_and_go():
    model = make()
    tokens = draw()
    cache = model.make_cache(2)
    got = []
    for number, piece in enumerate(tokens.split([50, 1, 20, 1, 29], dim=1)):
        with torch.inference_mode(number % 2 == 0), torch.no_grad():
            got.append(model(piece, cache=cache).clone())
            cache.reorder(torch.arange(2))
    with torch.no_grad():
        assert_near(torch.cat(got, dim=1), model(tokens))


@torch.no_grad()
def test_autocast_streams():
    model = make()
    tokens = draw()
    cache = model.make_cache(2)
    with torch.autocast("cpu", torch.bfloat16):
        got = [model(x, cache=cache) for x in tokens.split([50, 1, 50], dim=1)]
        usual = (model(tokens) - model(tokens.clone())).abs().max() + 0.1
        assert (torch.cat(got, dim=1) - model(tokens)).abs().max() < usual
    with pytest.raises(ValueError, match=r"goes on as it began, with .*bfloat16.* got .*float32"):
        model(tokens, cache=cache)


@torch.no_grad()
def test_a_reset_cache_serves_another_model_of_its_kind():
    cache = make(xpos_scale_base=16.0, num_kv_heads=2).make_cache(2)
    tokens = draw()
    make(xpos_scale_base=16.0, num_kv_heads=2)(tokens, cache=cache)
    other = make()
    with pytest.raises(ValueError, match=r"'xpos_scale_base': 16.0.* got .*512.0"):
        other(tokens, cache=cache)
    cache.reset()
    assert_near(other(tokens, cache=cache), other(tokens))


@torch.no_grad()
def test_nan_of_an_earlier_segment_reaches_no_row():
    model = make(position=None, num_layers=1, segment_lengths=(8,), dilation_rates=(1,))
    embeds = torch.randn(2, 40, 24)
    embeds[:, 5] = torch.nan
    cache = model.make_cache(2)
    mask = torch.arange(14) >= torch.tensor([[14], [9]])
    model(inputs_embeds=embeds[:, :14], cache=cache, key_padding_mask=mask)
    for step in range(4):
        new = torch.stack([embeds[0, 14 + step], embeds[1, 9 + step]])[:, None]
        assert model(inputs_embeds=new, cache=cache).isfinite().all()


@torch.no_grad()
def test_compiled_model_makes_no_graph_per_step():
    torch.compiler.reset()
    model = make(num_layers=1)
    tokens = draw()
    compiled = torch.compile(model, backend="eager")
    cache = model.make_cache(2)
    steps = tokens[:, :12].split(1, dim=1)
    got = [compiled(step, cache=cache) for step in steps[:3]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += [compiled(step, cache=cache) for step in steps[3:]]
    assert_near(torch.cat(got, dim=1), model(tokens[:, :12]))


@torch.no_grad()
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_memory_ends_growing_at_the_rows_that_heads_reach(num_kv_heads):
    segment_lengths, rates = (1024, 2048, 4096), (1, 2, 4)
    model = make(segment_lengths=segment_lengths, dilation_rates=rates, num_kv_heads=num_kv_heads)
    cache = model.make_cache()
    sizes = []
    for _ in range(9):
        model.forward_features(draw(1, 1000), cache=cache)
        sizes.append(cache.num_bytes)
    # Keys and values, 4 bytes, 2 layers. Branches with rate 1 keep one copy for heads that share.
    rows = [num_kv_heads * 1024, 4 * 2048 // 2, 4 * 4096 // 4]
    assert sizes[3:] == [2 * 4 * 2 * sum(rows) * model.config.head_dim] * 6


@torch.no_grad()
def test_xpos_reaches_as_far_as_in_one_pass():
    model = make(segment_lengths=(2000,), dilation_rates=(1,), xpos_scale_base=16.0)
    cache = model.make_cache()
    tokens = draw(1, 1900)
    whole = model(tokens)
    got = [model(x, cache=cache) for x in tokens.split([900, 1, 999], dim=1)]
    assert_near(torch.cat(got, dim=1), whole)
    with pytest.raises(ValueError, match=r"xPos with scale_base=16.0 overflows"):
        model(draw(1, 100), cache=cache)
    model(draw(1, 80), cache=cache)
    assert cache.lengths == [1980]
    with pytest.raises(ValueError, match=r"xPos with scale_base=16.0 overflows"):
        [model(draw(1, 1), cache=cache) for _ in range(20)]


def test_what_cannot_stream_is_refused():
    model = make()
    tokens = draw()
    with pytest.raises(ValueError, match="only a causal model reads piece by piece, got LongNetM"):
        create_model("longnet_mlm_tiny", **TEXT, **PATTERN).make_cache()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.make_cache(0)
    with pytest.raises(TypeError, match=r"num_layers must be an integer, got 2.0"):
        StreamingCache(DilatedPattern(**PATTERN), num_layers=2.0)
    with pytest.raises(TypeError, match="pattern must be a DilatedPattern, got tuple"):
        StreamingCache((7, 1), num_layers=2)
    with pytest.raises(TypeError, match="cache must be a StreamingCache, got dict"):
        model(tokens, cache={})
    with pytest.raises(ValueError, match="for a batch of 1, got 2 sequences"):
        model(tokens, cache=model.make_cache())
    with pytest.raises(ValueError, match=r"with 2 layers .* got one with 1 layers"):
        model(tokens, cache=make(num_layers=1).make_cache(2))
    boundaries = torch.tensor([0, SEQ_LEN], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"got cu_seqlens=\[0, 101\]"):
        model(tokens[:1], cache=model.make_cache(), cu_seqlens=boundaries)
    with pytest.raises(ValueError, match="no gradient flows through a cache"):
        model(tokens, cache=model.make_cache(2))
    model.embedding.requires_grad_(False)
    with pytest.raises(ValueError, match="no gradient flows through a cache"):
        model(inputs_embeds=torch.randn(2, 5, 24), cache=model.make_cache(2))
    (stretch,) = model.make_cache().plan([3])
    op = model.make_cache().attention_ops(stretch)[0]
    heads = [torch.randn(1, 3, 4, 6) for _ in range(3)]
    options = {"bias": None, "xpos_scale_base": None, "backend": "auto", "dropout_p": 0.0}
    with pytest.raises(ValueError, match=r"stream has no attention dropout, got dropout_p=0.1"):
        op(*heads, model.config.pattern, is_causal=True, **{**options, "dropout_p": 0.1})
    with pytest.raises(ValueError, match="and is_causal=False"):
        op(*heads, model.config.pattern, is_causal=False, **options)
    with pytest.raises(ValueError, match="in evaluation mode, got one in training mode"):
        model.train()(tokens, cache=model.make_cache(2))
    mask = torch.zeros(2, SEQ_LEN, dtype=torch.bool)
    mask[0, 0] = True
    with torch.no_grad(), pytest.raises(ValueError, match=r"behind padding in rows \[0\]"):
        model.eval()(tokens, cache=model.make_cache(2), key_padding_mask=mask)
