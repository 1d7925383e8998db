"""The multimodal model: what is missing, padding, times, heads, streams, and what it saves."""

import math

import pytest
import torch

import longnet_zoo as lz
from longnet_zoo.layers import MemorySaving
from longnet_zoo.layers.cross_weights import modality_shares
from longnet_zoo.models import FeaturesModality, LongNetMultimodal, LongNetMultimodalConfig

from .small_multimodal import NAMES, draw, make

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def without(model, *missing):
    """A model that never had some of the modalities, with the weights of one that has."""
    kept = [name for name in model.names if name not in missing]
    other = make(kept, num_classes=model.num_classes, global_pool=model.config.global_pool)
    weights = model.state_dict()
    for key in other.state_dict():
        source = key
        for new, name in enumerate(kept):
            source = source.replace(f".experts.{new}.", f".experts.{{{model.names.index(name)}}}.")
        source = source.replace("{", "").replace("}", "")
        if source not in weights:  # a single modality has plain modules
            head, _, tail = source.rpartition(".")
            source = f"{head}.experts.{model.names.index(kept[0])}.{tail}"
        other.state_dict()[key].copy_(weights[source])
    return other.train(model.training)


@pytest.fixture
def model():
    return make().eval()


def test_missing_for_all_equals_a_model_that_never_had_it(model):
    inputs = draw()
    for missing in (["sound"], ["video", "tiles", "photo"], [n for n in NAMES if n != "question"]):
        kept = {name: x for name, x in inputs.items() if name not in missing}
        expected = without(model, *missing)(kept)
        assert torch.equal(model(kept), expected)
        assert torch.equal(model({**kept, **dict.fromkeys(missing)}), expected)
        absent = {name: torch.zeros(3, dtype=torch.bool) for name in missing}
        assert torch.equal(model(inputs, present=absent), expected)


@pytest.mark.parametrize("global_pool", ["avg", "query"])
def test_missing_for_some_equals_running_these_and_the_rest_by_themselves(global_pool):
    model, inputs = make(global_pool=global_pool).eval(), draw(5)
    has = {
        "sound": torch.tensor([True, False, True, False, False]),
        "tiles": torch.tensor([True, True, True, False, True]),
        "photo": torch.tensor([False] * 5),
    }
    for name, flags in has.items():
        inputs[name][~flags] = torch.nan
    times = {"tiles": torch.arange(11.0) / 9 + torch.arange(5.0)[:, None]}
    logits = model(inputs, times=times, present=has)
    features = model.forward_features(inputs, times=times, present=has)
    assert list(features) == ["video", "sound", "question", "tiles"]
    assert torch.equal(model.forward_head(features, present=has), logits)
    for rows, missing in (
        ([0, 2], ["photo"]),
        ([1, 4], ["photo", "sound"]),
        ([3], ["photo", "sound", "tiles"]),
    ):
        kept = {name: x[rows] for name, x in inputs.items() if name not in missing}
        own_times = {"tiles": times["tiles"][rows]} if "tiles" in kept else None
        other = without(model, *missing)
        assert torch.equal(logits[rows], other(kept, times=own_times))
        for name, x in other.forward_features(kept, times=own_times).items():
            assert torch.equal(features[name][rows], x), name
        for name in features.keys() - kept.keys():
            assert features[name][rows].abs().max() == 0


def test_missing_costs_no_compute(model):
    rows = dict.fromkeys(NAMES, 0)
    for name, encoder in model.encoders.items():
        encoder.register_forward_pre_hook(
            lambda module, args, name=name: rows.update({name: rows[name] + len(args[0])})
        )
    inputs = draw(4) | {"photo": None}
    model(inputs, present={"sound": [True, False, False, True], "tiles": [False] * 4})
    assert rows == {"video": 4, "sound": 2, "question": 4, "tiles": 0, "photo": 0}


def test_gradients_without_a_modality_are_none_and_never_nan():
    model, inputs = make(global_pool="query").train(), draw()
    inputs["sound"][1] = torch.nan
    out = model(inputs, present={"sound": [True, False, True], "tiles": [False] * 3})
    (out * torch.randn_like(out)).sum().backward()
    tiles = [*model.encoders["tiles"].parameters(), *model.norms["tiles"].parameters()]
    tiles += [p for block in model.blocks for p in block.parameters_of("tiles")]
    missing = set(map(id, tiles))
    for name, parameter in model.named_parameters():
        if id(parameter) in missing:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all(), name
            # The bias of keys leaves the softmax as it is.
            assert "k_proj" in name or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("global_pool", ["avg", "query"])
def test_padded_samples_equal_shorter_ones(global_pool):
    model, inputs = make(global_pool=global_pool).eval(), draw(2)
    lengths = {"video": 2, "sound": 101, "question": 4, "tiles": 1}
    masks = {}
    for name, length in lengths.items():
        units = inputs[name].shape[1]
        masks[name] = torch.arange(units) >= torch.tensor([[units], [length]])
        inputs[name][1, length:] = 7 if name == "question" else torch.nan
    times = {"tiles": torch.arange(11.0) / 3}
    logits = model(inputs, times=times, padding_masks=masks)
    (logits * torch.randn_like(logits)).sum().backward()
    # NaN in padding reaches no weight either.
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    features = model.forward_features(inputs, times=times, padding_masks=masks)
    torch.testing.assert_close(model.forward_head(features, padding_masks=masks), logits)
    with pytest.raises(ValueError, match=r"padding_masks must be of .*got \['smell'\]"):
        model.forward_head(features, padding_masks={"smell": masks["tiles"]})
    for row, cut in ((0, {}), (1, lengths)):
        own = {k: x[row : row + 1, : cut.get(k)] for k, x in inputs.items()}
        own_times = {"tiles": times["tiles"][: cut.get("tiles")]}
        torch.testing.assert_close(logits[row : row + 1], model(own, times=own_times), **CLOSE)


def test_times_align_modalities(model):
    inputs = {name: x for name, x in draw().items() if name in ("video", "sound", "question")}
    expected = model(inputs)
    # What the config says of frames and sound, said by hand; a common delay; one of sound alone.
    by_hand = {"video": torch.arange(3.0) / 2, "sound": torch.zeros(1)}
    assert torch.equal(model(inputs, times=by_hand), expected)
    both = {name: t.double() + 64.0 for name, t in by_hand.items()}
    torch.testing.assert_close(model(inputs, times=both), expected, **CLOSE)
    late = model(inputs, times={"sound": torch.tensor([[0.0], [0.0], [0.25]])})
    assert torch.equal(late[:2], expected[:2])
    assert (late[2] - expected[2]).abs().max() > 1e-4
    # Its frames are 40 ms long.
    (_, timeline, _) = model._encode(model._check(inputs, None, None, None)[0])
    sound = timeline.split(timeline.positions)["sound"][0]
    torch.testing.assert_close(sound[:3], 10.0 * torch.tensor([0.02, 0.06, 0.10]).double())


def test_recordings_may_start_at_whole_seconds_since_1970(model):
    inputs = {name: x for name, x in draw().items() if name in ("video", "sound")}
    starts = {"video": torch.arange(3), "sound": torch.zeros(1, dtype=torch.int64)}
    late = {name: times + 1_700_000_000 for name, times in starts.items()}
    expected = model(inputs, times=starts)
    torch.testing.assert_close(model(inputs, times=late), expected, **CLOSE)
    shifted = model(inputs, times={**late, "sound": late["sound"] + 1})
    assert not torch.allclose(shifted, expected, atol=1e-5)


def test_modalities_are_dropped_in_training_only(monkeypatch):
    names = ("video", "question", "tiles", "photo")
    model = make(names, modality_dropout=0.5, num_layers=1)
    inputs = {name: x for name, x in draw(64).items() if name in names}
    seen = []
    run = model._logits
    monkeypatch.setattr(model, "_logits", lambda own: seen.append(own) or run(own))
    expected = model.eval()(inputs)
    assert [own.batch for own in seen] == [64]
    seen.clear()
    torch.manual_seed(0)
    out = model.train()(inputs, present={"photo": [False] * 64})
    sets = {tuple(own.inputs): own.batch for own in seen}
    assert sum(sets.values()) == 64
    # All sets of the others; of 8 draws the one that leaves nothing is replaced by one of one.
    assert len(sets) == 7
    assert not any("photo" in names for names in sets)
    share = sum(len(names) * count for names, count in sets.items()) / (3 * 64)
    assert abs(share - (0.5 + 1 / 24)) < 0.08
    torch.manual_seed(0)
    assert torch.equal(model(inputs, present={"photo": [False] * 64}), out)
    torch.manual_seed(1)
    changed = (model(inputs) - expected).abs().amax(dim=1) > 1e-5
    assert 64 * 0.8 < changed.sum() < 64  # 15 of 16 lack something


def test_one_modality_always_stays(monkeypatch):
    names = ("question", "tiles", "photo")
    model = make(names, modality_dropout=1 - 1e-12, num_layers=1)
    inputs = {name: x for name, x in draw(32).items() if name in names}
    seen = []
    run = model._logits
    monkeypatch.setattr(model, "_logits", lambda own: seen.append(own) or run(own))
    model.train()(inputs)
    sets = {tuple(own.inputs): own.batch for own in seen}
    assert set(sets) == {(name,) for name in names}
    assert min(sets.values()) > 4
    seen.clear()
    model(inputs, present={"photo": [False] * 32})
    assert {tuple(own.inputs) for own in seen} == {("question",), ("tiles",)}


def test_head_is_the_mean_of_the_means(model):
    features = model.forward_features(draw())
    pooled = torch.stack([x.mean(1) for x in features.values()]).mean(0)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model.forward_head(features), model.head(pooled))
    assert model.get_classifier() is model.head


def test_head_can_be_replaced(model):
    inputs = draw()
    model.reset_classifier(0)
    assert model(inputs).shape == (3, 24)
    model.reset_classifier(7, "query")
    assert model(inputs).shape == (3, 7)
    assert model.config.global_pool == "query"
    assert not model.query_pool.training
    pool = model.query_pool
    model.reset_classifier(4)
    assert model.query_pool is pool
    first = model(inputs)
    with torch.no_grad():
        pool.query.mul_(-1)
    assert not torch.allclose(first, model(inputs))
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', 'query', got 'max'"):
        model.reset_classifier(4, "max")


def test_query_attends_to_all_tokens_alike_when_it_is_zero():
    model = make(global_pool="query").eval()
    features = model.forward_features(draw())
    pool = model.query_pool
    with torch.no_grad():
        pool.query.zero_()
    mean = torch.cat(list(features.values()), dim=1).mean(1)
    expected = pool.out_proj(pool.v_proj(mean))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)


def test_own_modalities_are_a_matter_of_the_config(tmp_path):
    options = {"input_dim": 3, "segment_lengths": [4, 8], "dilation_rates": [1, 2]}
    model = lz.create_model(
        "longnet_multimodal_tiny",
        modalities=[
            FeaturesModality(name="radar", **options),
            {"name": "lidar", "kind": "features", **options},
        ],
        embed_dim=16,
    )
    assert model.names == ("radar", "lidar")
    inputs = {"radar": torch.randn(2, 9, 3), "lidar": torch.randn(2, 5, 3)}
    expected = model.eval()(inputs)
    model.save_pretrained(tmp_path)
    loaded = LongNetMultimodal.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(inputs), expected)
    assert model.no_weight_decay() >= {"norms.radar.weight"}


def test_positions_and_norms_do_not_decay(model):
    names = model.no_weight_decay()
    assert {"encoders.video.pos_embed", "encoders.photo.pos_embed", "norms.tiles.bias"} <= names
    model.reset_classifier(5, "query")
    assert "query_pool.query" in model.no_weight_decay()
    assert "blocks.0.attention.across.q_proj.experts.0.weight" not in names


def test_initial_gain_is_that_of_three_residuals_per_block():
    model = make(embed_dim=96, ffn_dim=384, num_layers=4)
    fc1 = model.blocks[0].feed_forwards["video"].fc1.weight
    out = model.blocks[1].attention.across.out_proj.experts[1].weight
    for weight in (fc1, out):
        xavier = math.sqrt(2 / sum(weight.shape))
        assert weight.std().item() == pytest.approx(xavier * math.sqrt(math.log(12)), rel=0.03)
    q = model.blocks[0].attention.own["video"].q_proj.weight
    assert q.std().item() == pytest.approx(math.sqrt(1 / 96), rel=0.03)


@pytest.mark.parametrize("saving", [MemorySaving(chunk_size=11, keep_attention=True), None])
def test_memory_saving_keeps_the_gradients(saving, monkeypatch):
    # Chunks draw other random numbers.
    dropout = 0.1 if saving is None else 0.0
    model, inputs = make(drop_path=0.3, dropout=dropout).train(), draw()
    present = {"sound": [True, False, True]}

    def gradients():
        torch.manual_seed(0)
        out = model(inputs, present=present)
        return out, torch.autograd.grad((out * torch.randn(out.shape)).sum(), list(parameters))

    parameters = [p for p in model.parameters() if p.requires_grad]
    expected, grads = gradients()
    if saving is None:
        model.set_grad_checkpointing()
    else:
        model.set_memory_saving(saving)
    runs = []
    attend = model.blocks[0].attention.attend
    monkeypatch.setattr(
        model.blocks[0].attention, "attend", lambda *args: runs.append(1) or attend(*args)
    )
    out, found = gradients()
    assert len(runs) == 4  # two sets of modalities, each once more in the backward pass
    torch.testing.assert_close(out, expected)
    for one, other in zip(found, grads, strict=True):
        torch.testing.assert_close(one, other)
    model.set_grad_checkpointing(False)
    assert model.blocks[0].memory_saving is None


def test_attention_weights_are_those_of_each_block(model):
    inputs = draw(2)
    weights = model.attention_weights(inputs, times={"tiles": torch.arange(11.0)})
    assert len(weights) == 2
    assert weights[0]["question", "sound"].shape == (2, 4, 9, 9)
    for block in weights:
        shares = modality_shares(block)
        assert shares.shape == (2, 5, 5)
        torch.testing.assert_close(shares.sum(-1), torch.ones(2, 5).double())
    assert not torch.equal(weights[0]["question", "sound"], weights[1]["question", "sound"])
    with pytest.raises(RuntimeError, match=r"does not train. Call eval\(\)"):
        model.train().attention_weights(inputs)


def test_flops_are_those_of_the_matrices(model):
    assert model.flops_of({"tiles": 0}) == 2 * 24 * 5
    lengths = {"tiles": 11}
    linear = 5 * 24 + 2 * (8 * 24 * 24 + 2 * 24 * 31)
    part = model.config.parts[3]
    pairs = (
        model.config.pattern_of(part).flops(11, 4, 6)[0] + model.config.pattern.flops(11, 4, 6)[0]
    )
    assert model.flops_of(lengths) == 2 * 11 * linear + 2 * pairs + 2 * 24 * 5
    # A modality with blocks of its own costs more.
    assert model.flops_of({"question": 11}) > model.flops_of(lengths)
    assert model.flops(55) == model.flops_of(dict.fromkeys(NAMES, 11))
    with pytest.raises(ValueError, match=r"lengths must be of the modalities .*got \['smell'\]"):
        model.flops_of({"smell": 3})
    assert lz.model_info("longnet_multimodal_tiny").flops > 1e8


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (
            {"video": torch.zeros(2, 3, 8, 8)},
            {},
            ValueError,
            r"\(batch, frames, in_chans, .*got \(2, 3",
        ),
        ({"photo": torch.zeros(2, 3, 8, 8)}, {}, ValueError, r"in_chans=2, got \(2, 3, 8, 8\)"),
        ({"photo": torch.zeros(2, 8, 8)}, {}, ValueError, r"\(batch, in_chans, .*got \(2, 8, 8\)"),
        ({"tiles": torch.zeros(2, 4, 6)}, {}, ValueError, r"input_dim=5, got \(2, 4, 6\)"),
        ({"tiles": torch.ones(2, 4, 5).long()}, {}, ValueError, r"got \(2, 4, 5\) of torch.int64"),
        ({"question": torch.full((2, 3), 61)}, {}, ValueError, "vocab_size=61, got values from 61"),
        ({"sound": torch.full((2, 90), torch.nan)}, {}, ValueError, "nan"),
        ({"sound": torch.zeros(90)}, {}, ValueError, r"waveform must be .*got \(90,\)"),
        ({"smell": torch.zeros(2)}, {}, ValueError, r"inputs must be of .*got \['smell'\]"),
        (
            {"tiles": torch.zeros(2, 4, 5)},
            {"times": {"x": 0}},
            ValueError,
            r"times must be of .*'x'",
        ),
        (
            {"sound": torch.zeros(2, 90)},
            {"times": {"sound": torch.zeros(90)}},
            ValueError,
            r"times of 'sound' must be \(1,\) or \(2 or 1, 1\), .*got \(90,\)",
        ),
        (
            {"tiles": torch.zeros(2, 4, 5)},
            {"padding_masks": {"tiles": torch.zeros(2, 3, dtype=torch.bool)}},
            ValueError,
            r"padding_masks\['tiles'\] must be \(2, 4\), got \(2, 3\)",
        ),
        (
            {"question": torch.zeros(2, 3, dtype=torch.int64)},
            {"padding_masks": {"question": torch.tensor([[False] * 3, [True] * 3])}},
            ValueError,
            r"padding_masks\['question'\] must leave something .*padding in 1 of 2",
        ),
        (
            {"sound": torch.zeros(2, 3)},
            {"padding_masks": {"sound": torch.tensor([[False, True, False], [False] * 3])}},
            ValueError,
            r"must have padding on the right, .*in the rows \[0\]",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, inputs, options, error, message):
    with pytest.raises(error, match=message):
        model(inputs, **options)


def test_config_of_another_family_is_refused():
    with pytest.raises(TypeError, match="takes a LongNetMultimodalConfig, got LongNetLMConfig"):
        LongNetMultimodal(lz.model_info("longnet_lm_tiny").config)
    assert isinstance(make().config, LongNetMultimodalConfig)
