"""Branches beside those of the pattern in text models: config, saving, FLOPs, refusals."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

import longnet_zoo as lz
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
    assert model.stack.blocks[0].attention.extra_branches == BRANCHES


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


def test_flops_count_the_pairs_of_branches():
    model, plain = make_model(), make_model(extra_branches=())
    pairs = sum(branch.attended_pairs(100, 4, is_causal=True) for branch in BRANCHES)
    assert model.flops(100) - plain.flops(100) == 2 * 4 * 8 * pairs


def test_cache_and_generation_are_refused():
    model = make_model()
    words = "keeps no cache, .* got extra_branches=.*HashBuckets"
    with pytest.raises(NotImplementedError, match=words):
        model.make_cache()
    with pytest.raises(NotImplementedError, match=words):
        model.generate(torch.randint(31, (1, 4)), max_new_tokens=2)


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
