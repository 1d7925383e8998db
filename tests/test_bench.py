import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from longnet_zoo.bench import (
    ComparisonConfig,
    Panel,
    alternate,
    check_matplotlib,
    choose_device,
    command,
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
        (
            {"is_dilated": False, "backend": "math"},
            "which is_dilated=False does not time, got backend='math'",
        ),
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
    advantages = [cell["advantage"] for cell in document["cells"]]
    assert advantages == pytest.approx([x.advantage for x in results], rel=1e-4)
    assert document["is_complete"]
    assert document["command"] == (
        "longnet-zoo bench --max-seq-len 64 --num-seq-lens 3 --num-iter 2 --num-heads 2 --emb-dim "
        "16 --segment-lengths 16 32 --dilation-rates 1 2 --device cpu --output bench"
    )
    assert (tmp_path / "bench.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_keeps_its_lengths_and_goes_on(tmp_path, monkeypatch, capsys):
    timed = []

    def stop_at_third(runs, **options):
        if len(timed) == 2:
            raise KeyboardInterrupt
        timed.append(list(runs))
        return alternate(runs, **options)

    config, output = ComparisonConfig(**SMALL), tmp_path / "new" / "bench"
    monkeypatch.setattr(comparison, "alternate", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run_bench(config, output=output, picture=False)
    file = output.with_suffix(".json")
    before = json.loads(file.read_text())
    assert [cell["seq_len"] for cell in before["cells"]] == [16, 32]
    assert not before["is_complete"]
    monkeypatch.setattr(comparison, "alternate", alternate)
    capsys.readouterr()
    results = run_bench(config, output=output, picture=False, resume=True)
    after = json.loads(file.read_text())
    assert after["cells"][:2] == before["cells"]
    assert [x.seq_len for x in results] == [cell["seq_len"] for cell in after["cells"]]
    assert capsys.readouterr().out.count("advantage") == 1
    monkeypatch.setattr(comparison, "alternate", None)
    assert len(run_bench(config, output=output, picture=False, resume=True)) == 3
    with pytest.raises(ValueError, match=r"same programme.*'num_iter': 2.*'num_iter': 3"):
        run_bench(ComparisonConfig(**{**SMALL, "num_iter": 3}), output=output, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": ""}, r"must have a name and it must have no suffix, got \."),
        ({"output": "file/bench"}, "must be a file that can be written, got '.*/file/bench.json'"),
        ({"resume": True}, "--resume needs --output OUTPUT, got none"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_runs(
    options, message, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "compare", None)
    if options.get("output"):
        options = {**options, "output": tmp_path / options["output"]}
    elif "output" in options:
        options = {**options, "output": Path("")}
    with pytest.raises(ValueError, match=message):
        run_bench(ComparisonConfig(**SMALL), picture=False, **options)


def test_a_batch_that_does_not_fit_is_refused():
    config = ComparisonConfig(**{**SMALL, "max_seq_len": 2**50})
    with pytest.raises(ValueError, match=r"max_seq_len=1125899906842624 and emb_dim=16 in float32"):
        next(compare(config))


def test_the_named_backend_is_timed(monkeypatch):
    backends, attend = [], comparison.dilated_attention

    def spy(*args, backend, **options):
        backends.append(backend)
        return attend(*args, backend=backend, **options)

    monkeypatch.setattr(comparison, "dilated_attention", spy)
    list(compare(ComparisonConfig(**SMALL, backend="math")))
    # A check, then a warm-up and two timed calls at three lengths.
    assert backends == ["math"] * (1 + 3 * 3)


def test_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(comparison, "_attention", lambda *_: lambda q, k, v: q * float("nan"))
    with pytest.raises(RuntimeError, match=r"vanilla attention .* is off by nan"):
        next(compare(ComparisonConfig(**SMALL)))


def test_commit_says_whether_files_differ(monkeypatch):
    said = {"rev-parse": "abc1234", "status": None}
    monkeypatch.setattr(measure, "_git", lambda root, verb, *_: said[verb])
    assert measure._commit() == "abc1234"
    said["status"] = "M setup.py"
    assert measure._commit() == "abc1234-dirty"
    said["rev-parse"] = None
    assert measure._commit() is None


def test_version_of_triton_is_that_of_the_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="9.9"))
    assert environment(torch.device("cpu"))["triton"] == "9.9"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert environment(torch.device("cpu"))["triton"] is None


def test_a_linear_axis_starts_at_zero():
    lines = {"a": [(16, 5.0), (32, 6.0)]}
    panels = [Panel(title=y, lines=lines, y_scale=y) for y in ("linear", "log")]
    linear, log = draw(panels, title="Title", facts="facts").axes
    assert linear.get_ylim()[0] == 0
    assert log.get_ylim()[0] > 1


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
