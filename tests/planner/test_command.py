import json

import pytest

from longnet_zoo.cli import main
from longnet_zoo.planner import PlanConfig, draw_plans, plan_step

SMALL = ["plan", "--model", "longnet_lm_tiny", "--seq-len", "32768"]


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def fail(*args, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*SMALL, *args])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_table_shows_every_method_in_80_columns(capsys):
    main([*SMALL, "--gpus", "8", "--gpu", "h100", "--data-parallel-size", "2"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for text in ("dilated ring all_to_all", "predicted, not measured", "another model"):
        assert text in words
    assert "32,768 tokens, 8,192 on each of 4 ranks" in words
    assert "8 x h100, bf16-mixed, FSDP2" in words


def test_offload_shows_what_waits_in_the_memory_of_the_cpu(capsys):
    main([*SMALL, "--gpu", "H200", "--offload", "--chunk-size", "1e3"])
    words = " ".join(capsys.readouterr().out.split())
    # 4 layers of 32,768 x 192 numbers of 4 bytes.
    assert "waits in CPU memory 96 MiB 96 MiB 96 MiB" in words
    assert "32,768 tokens, on one rank, 1 sequence at a time; 1 x h200" in words
    main(SMALL)
    assert "CPU memory" not in capsys.readouterr().out


def test_nothing_fits(capsys):
    main(["plan", "--model", "longnet_lm_2b7", "--seq-len", "65536", "--gpu", "a100-40gb"])
    words = " ".join(capsys.readouterr().out.split())
    assert "(too much)" in words
    assert "longest sequence 0 - 0" in words


def test_refused_methods_are_named(capsys):
    main([*SMALL, "--gpus", "3", "--no-fsdp", "--no-memory-saving"])
    words = " ".join(capsys.readouterr().out.split())
    assert "all_to_all: cannot serve" in words
    assert "no sharding, no memory saving" in words


def test_json_is_the_whole_plan(capsys):
    args = ["--seq-len", "1e6", "--option", "segment_lengths=2048,1e6", "--json", "--offload"]
    args += ["--option", "dilation_rates=1,500", "--option", "position=rotary", "--chunk-size", "0"]
    main([*SMALL, *args, "--option", "dropout=0.1", "--option", "qk_norm=true"])
    plan = json.loads(capsys.readouterr().out)
    config = plan["config"]
    assert config["seq_len"] == 10**6
    assert config["options"] == {
        "segment_lengths": [2048, 10**6],
        "dilation_rates": [1, 500],
        "position": "rotary",
        "dropout": 0.1,
        "qk_norm": True,
    }
    assert config["memory_saving"] == {
        "chunk_size": None,
        "keep_attention": False,
        "offload": True,
    }
    assert [method["method"] for method in plan["methods"]] == ["dilated", "ring", "all_to_all"]
    assert plan["methods"][0]["memory"]["activations"] > 0


def test_picture_against_the_length(tmp_path, capsys):
    main([*SMALL, "--gpus", "4", "--output", str(tmp_path / "plan")])
    assert str(tmp_path / "plan.svg") in capsys.readouterr().out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_picture_has_a_line_for_each_method_that_serves():
    configs = [PlanConfig(model="longnet_lm_tiny", seq_len=n, gpus=3) for n in (2048, 8192, 32_768)]
    figure = draw_plans([plan_step(config, longest=False) for config in configs])
    assert len(figure.axes) == 3
    for axes in figure.axes:
        names = [line.get_label() for line in axes.get_lines()]
        assert names == ["dilated", "ring (dense)"]
        assert list(axes.get_lines()[0].get_xdata()) == [2048, 8192, 32_768]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seq-len", "1.5"], "must be an integer from 1 to 9,007,199,254,740,992, got '1.5'"),
        (["--gpus", "none"], "must be an integer from 1 to 9,007,199,254,740,992, got 'none'"),
        (["--gpus", "4", "--data-parallel-size", "3"], "gpus=4 and data_parallel_size=3"),
        (["--gpu", "h20"], "got 'h20'"),
        (["--option", "dropout"], "--option must be NAME=VALUE, got 'dropout'"),
        (["--option", "drop=1"], "no option 'drop'"),
        (["--option", "segment_lengths=9,"], "got segment_lengths=(9,) and"),
        (["--seq-len", "nan"], "must be an integer from 1 to 9,007,199,254,740,992, got 'nan'"),
        (["--seq-len", "1e18"], "got '1e18'"),
        (["--gpus", "1e9"], "gpus must be at most 4,096, got 1,000,000,000"),
        (["--option", "embed_dim=1e400"], "--option takes finite numbers, got '1e400'"),
        (["--chunk-size", "-1"], "must be an integer from 0 to 9,007,199,254,740,992, got '-1'"),
        (["--no-memory-saving", "--offload"], "--offload need --memory-saving"),
        (["--output", "plan.png"], "must have a name and no suffix, got plan.png"),
    ],
)
def test_bad_input_is_one_line(args, message, capsys):
    assert message in fail(*args, capsys=capsys)
