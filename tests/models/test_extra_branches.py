"""Branches beside those of the pattern in text models: config, saving, FLOPs, refusals."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from torch._dynamo.testing import CompileCounterWithBackend

import longnet_zoo as lz
from longnet_zoo.interop.transformers import LongNetForCausalLM
from longnet_zoo.models import LongNetLM, LongNetLMConfig
from longnet_zoo.ops.branches import BigBirdBlocks, HashBuckets

BRANCHES = (HashBuckets(num_buckets=8, num_rounds=2, seed=5), BigBirdBlocks(block_size=8))
SIZES = {"vocab_size": 31, "embed_dim": 32, "num_layers": 2, "num_heads": 4}
PATTERN = {"segment_lengths": (8, 32), "dilation_rates": (1, 4)}


def make_model(**options) -> LongNetLM:
    config = LongNetLMConfig(
        **{**SIZES, **PATTERN, "position": "rotary", "extra_branches": BRANCHES, **options}
    )
    torch.manual_seed(0)
    return LongNetLM(config).eval()


def test_branches_survive_saving(tmp_path):
    model = make_model()
    tokens = torch.randint(31, (2, 70))
    model.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())["extra_branches"]
    assert kept[0] == {"kind": "hash_buckets", "num_buckets": 8, "num_rounds": 2, "seed": 5}
    loaded = LongNetLM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens), model(tokens))


def test_options_of_a_recipe_name_branches():
    text = """
        position: rotary
        extra_branches:
          - {kind: hash_buckets, num_buckets: 8, num_rounds: 2, seed: 5}
          - {kind: big_bird, block_size: 8}
    """
    model = lz.create_model("longnet_lm_tiny", **yaml.safe_load(text))
    assert model.config.extra_branches == BRANCHES
    for layer, block in enumerate(model.stack.blocks):
        assert block.attention.extra_branches == tuple(x.for_layer(layer) for x in BRANCHES)


def test_layers_see_by_draws_of_their_own():
    first, second = (block.attention for block in make_model().stack.blocks)
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 200, 32)
    assert not torch.allclose(first(x), second(x))
    second.extra_branches = first.extra_branches
    assert torch.equal(first(x), second(x))


def test_branches_change_the_logits_and_leak_nothing():
    model, tokens = make_model(), torch.randint(31, (1, 200))
    plain = make_model(extra_branches=())
    plain.load_state_dict(model.state_dict())
    logits = model(tokens)
    assert not torch.allclose(logits, plain(tokens))
    changed = tokens.clone()
    changed[:, 101] = (changed[:, 101] + 1) % 31
    assert torch.equal(model(changed)[:, :101], logits[:, :101])
    assert not torch.equal(model(changed)[:, 101:], logits[:, 101:])


def test_compiled_model_equals_the_eager_one():
    model, tokens = make_model(), torch.randint(31, (1, 60))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


@torch.no_grad()
@torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True)
def test_layers_compiled_one_by_one_share_a_graph():
    model, tokens = make_model(num_layers=5), torch.randint(31, (1, 60))
    expected = model(tokens)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.stack.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model(tokens), expected)
    assert counter.frame_count <= 2  # one for the first seed, one for all others


def test_flops_count_the_pairs_of_branches():
    model, plain = make_model(), make_model(extra_branches=())
    pairs = [
        sum(x.for_layer(layer).attended_pairs(100, 4, is_causal=True) for x in BRANCHES)
        for layer in range(2)
    ]
    assert pairs[0] != pairs[1]
    assert model.flops(100) - plain.flops(100) == 4 * 8 * sum(pairs)


def test_cache_and_generation_are_refused():
    model = make_model()
    words = "keeps no cache, .* got extra_branches=.*HashBuckets"
    with pytest.raises(NotImplementedError, match=words):
        model.make_cache()
    with pytest.raises(NotImplementedError, match=words):
        model.generate(torch.randint(31, (1, 4)), max_new_tokens=2)


@torch.no_grad()
def test_text_is_written_without_a_cache_as_the_error_says():
    model, tokens = make_model(), torch.randint(31, (1, 20))
    with pytest.raises(NotImplementedError, match=r"from_zoo\(model\).generate\(.*use_cache=False"):
        model.generate(tokens, max_new_tokens=2)
    theirs = LongNetForCausalLM.from_zoo(model)
    got = theirs.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False)
    for _ in range(5):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, tokens)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"position": "xpos"}, NotImplementedError, "got position='xpos' and dropout=0.0"),
        ({"attention_dropout": 0.2}, NotImplementedError, "'rotary' and dropout=0.2"),
        ({"extra_branches": ({"kind": "mamba"},)}, TypeError, "got kind='mamba'"),
        ({"extra_branches": "big_bird"}, TypeError, "tuple of branches, got 'big_bird'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        replace(make_model().config, **options)
