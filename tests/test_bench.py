import importlib.util
import json
import time

import pytest
import torch
from torch import nn

from longnet_zoo.bench import (
    ComparisonConfig,
    Panel,
    alternate,
    check_matplotlib,
    choose_device,
    compare,
    comparison,
    draw,
    environment,
    measure,
    run_bench,
    save_picture,
    time_once,
)

SMALL = {
    "max_seq_len": 64,
    "num_seq_lens": 3,
    "num_iter": 2,
    "num_heads": 2,
    "emb_dim": 16,
    "segment_lengths": (16, 32),
    "dilation_rates": (1, 2),
    "device": "cpu",
}


def test_tokens_of_a_batch_are_fixed_and_both_run_in_turn():
    calls = []
    results = list(compare(ComparisonConfig(**SMALL), on_run=calls.append))
    assert [(x.batch, x.seq_len) for x in results] == [(4, 16), (2, 32), (1, 64)]
    assert calls == ["vanilla", "dilated"] * 9
    for result in results:
        for ms in result.ms.values():
            assert 0 < ms["low"] <= ms["median"] <= ms["high"]
        ratio = result.ms["vanilla"]["median"] / result.ms["dilated"]["median"]
        assert result.advantage == ratio


def test_times_are_of_one_sequence(monkeypatch):
    timing = measure.Timing(median_s=0.8, low_s=0.4, high_s=1.2)
    monkeypatch.setattr(comparison, "alternate", lambda runs, **_: dict.fromkeys(runs, timing))
    first, *_ = compare(ComparisonConfig(**SMALL))
    assert first.ms["dilated"] == pytest.approx({"median": 200, "low": 100, "high": 300})


@pytest.mark.parametrize(("is_dilated", "kind"), [(True, "dilated"), (False, "vanilla")])
def test_one_kind_alone_has_no_advantage(is_dilated, kind):
    config = ComparisonConfig(**{**SMALL, "num_seq_lens": 1}, is_dilated=is_dilated)
    (result,) = compare(config)
    assert list(result.ms) == [kind]
    assert result.advantage is None


def test_what_is_timed_is_attention_between_the_projections():
    config = ComparisonConfig(**SMALL)
    layer = comparison._Projections(config)
    x = torch.randn(2, 20, 16)
    found = layer(x, comparison._attention("vanilla", config.pattern, "auto"))
    stock = nn.MultiheadAttention(16, 2, batch_first=True)
    stock.in_proj_weight, stock.in_proj_bias = layer.qkv.weight, layer.qkv.bias
    stock.out_proj = layer.out
    mask = torch.ones(20, 20, dtype=torch.bool).triu(1)
    expected, _ = stock(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dilated", "vanilla"])
def test_a_wrong_result_is_not_timed(kind, dtype, monkeypatch):
    right = comparison._attention

    def wrong(*args):
        attend = right(*args)
        return lambda q, k, v: (
            attend(q, k, v.roll(1, dims=1)) if args[0] == kind else attend(q, k, v)
        )

    monkeypatch.setattr(comparison, "_attention", wrong)
    monkeypatch.setattr(comparison, "alternate", None)
    message = f"{kind} attention with backend='sdpa' in {dtype} is off by .* not timed"
    with pytest.raises(RuntimeError, match=message):
        next(compare(ComparisonConfig(**SMALL, backend="sdpa", dtype=dtype)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iter": 0}, "num_iter must be an integer of at least 1, got 0"),
        ({"num_heads": 2.0}, "num_heads must be an integer of at least 1, got 2.0"),
        ({"max_seq_len": 100}, "max_seq_len=100 and num_seq_lens=4. Take a power of two"),
        ({"num_heads": 7}, "emb_dim=384 and num_heads=7"),
        ({"backend": "fast"}, r"backend must be one of \('auto', .*got 'fast'"),
        ({"dtype": "int8"}, r"dtype must be one of \('float32', .*got 'int8'"),
        ({"dilation_rates": (1, 2)}, r"segment_lengths=\(1024, 4096, 16384\) and dilation_rates"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ComparisonConfig(**options)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda' or 'cuda:N', got 'cuda:x'"):
        choose_device("cuda:x")
    with pytest.raises(RuntimeError, match=r"'cuda' was asked for, and .* sees 0 GPUs. Use dev"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match=r"'cuda:2' was asked for, and .* sees 2 GPUs"):
        choose_device("cuda:2")


def test_contenders_run_in_turn():
    calls = []
    alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 4


def test_timings_are_median_and_quantiles_without_the_warm_up(monkeypatch):
    seconds = iter([60, 1, 5, 3, 2, 4])
    monkeypatch.setattr(measure, "time_once", lambda run: next(seconds))
    timing = alternate({"nap": lambda: None}, rounds=5)["nap"]
    assert timing == measure.Timing(median_s=3, low_s=2, high_s=4)


def test_time_of_one_call():
    assert 0.01 <= time_once(lambda: time.sleep(0.01)) < 5


def test_environment_says_on_what_and_with_what():
    facts = environment(torch.device("cpu"))
    assert facts["device"]
    assert facts["device_type"] == "cpu"
    assert facts["capability"] is None
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(facts)) == facts


def test_files_beside_the_lines(tmp_path):
    results = run_bench(ComparisonConfig(**SMALL), output=tmp_path / "bench")
    document = json.loads((tmp_path / "bench.json").read_text())
    assert document["settings"]["max_seq_len"] == 64
    assert [cell["advantage"] for cell in document["cells"]] == [x.advantage for x in results]
    assert (tmp_path / "bench.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_no_matplotlib_is_said_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        RuntimeError, match=r"needs matplotlib, .*pip install 'longnet-zoo\[train\]'"
    ):
        run_bench(ComparisonConfig(**SMALL), output=tmp_path / "bench")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="needs matplotlib"):
        check_matplotlib()


def test_picture_has_every_line_and_bar(tmp_path):
    panels = [
        Panel(title="times", lines={"a": [(16, 1.0), (32, 2.0)], "b": [(16, 3.0), (32, 3.5)]}),
        Panel(title="sizes", bars={"c": 1.0, "d": 20.0}),
    ]
    figure = draw(panels, title="Title", facts="facts")
    lines, bars = figure.axes
    assert [line.get_xydata().tolist() for line in lines.lines] == [
        [[16, 1], [32, 2]],
        [[16, 3], [32, 3.5]],
    ]
    assert [bar.get_width() for bar in bars.patches] == [1, 20]
    assert [text.get_text() for text in figure.texts] == ["Title", "facts"]
    first = [path.read_bytes() for path in save_picture(figure, tmp_path / "one")]
    again = draw(panels, title="Title", facts="facts")
    assert [path.read_bytes() for path in save_picture(again, tmp_path / "two")] == first
