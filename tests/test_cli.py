import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from longnet_zoo import cli, registry
from longnet_zoo.cli import main
from longnet_zoo.factory import list_models, model_info
from longnet_zoo.registry import PublishedWeights, find_model


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def run(*args, capsys):
    assert main(args) == 0
    return capsys.readouterr().out


def fail(*args, capsys):
    """Runs a command that must end with code 2 and one line on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_list_shows_every_model_in_80_columns(capsys):
    lines = run("list", capsys=capsys).splitlines()
    assert max(map(len, lines)) <= 80
    for name in list_models():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert ("yes" in line.split()) == bool(find_model(name).weights)
    assert "162M" in next(line for line in lines if "longnet_lm_base" in line)


def test_list_filters(capsys):
    out = run("list", "*mlm*", "--modality", "text", capsys=capsys)
    assert "longnet_mlm_tiny" in out
    assert "longnet_lm_tiny" not in out


def test_list_of_models_with_weights(capsys):
    out = run("list", "--pretrained", capsys=capsys)
    assert "longvit_small_patch32_1024" in out
    assert "longnet_lm_tiny" in out
    assert "longnet_lm_base" not in out
    out = run("list", "--no-pretrained", capsys=capsys)
    assert "longvit_small_patch32_1024" not in out
    assert "longnet_lm_tiny" not in out
    assert "longnet_lm_base" in out


def test_info_shows_what_to_know_of_each_weights(capsys, monkeypatch):
    weights = (
        PublishedWeights(tag="one", location="hf_hub:a/b", licence="MIT", note="gated"),
        PublishedWeights(
            tag="two", location="https://x/" + 90 * "y", licence="CC", sha256="f" * 64
        ),
        PublishedWeights(tag="three", location="w.pth", licence="CC", options={"dropout": 0.5}),
    )
    entry = replace(find_model("longnet_lm_tiny"), weights=weights)
    monkeypatch.setitem(registry._ENTRIES, "longnet_lm_tiny", entry)
    out = run("info", "longnet_lm_tiny", capsys=capsys)
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    assert "weights one; two; three" in words
    assert (
        "- one hf_hub:a/b licence: MIT SHA-256: none stated by the publisher note: gated" in words
    )
    assert "f" * 40 in out
    assert out.count("y") > 90
    assert "options: {'dropout': 0.5}" in words


def test_info_shows_parameters_flops_and_options(capsys):
    out = run("info", "longnet_lm_base", "--seq-len", "4096", capsys=capsys)
    assert max(map(len, out.splitlines())) <= 80
    info = model_info("longnet_lm_base", 4096)
    assert f"{info.num_params:,} (162M)" in out
    assert "for 4,096 tokens" in out
    assert "2048 4096 8192 16384 32768" in out
    assert "none published" in out
    words = " ".join(out.split())
    assert "published names bring head_offset='block' padded_keys='zero' segment" in words
    assert "2307.02486" in out


def test_info_lists_the_options_of_each_part(capsys):
    rows = [
        line.split() for line in run("info", "longnet_multimodal_tiny", capsys=capsys).splitlines()
    ]
    assert ["modalities[0].name", "video"] in rows
    assert ["modalities[1].conv_strides", "2", "2"] in rows
    assert ["modalities[2].segment_lengths", "128", "512", "2048"] in rows


def test_info_as_json_is_the_whole_info(capsys):
    info = json.loads(run("info", "longnet_lm_tiny", "--json", capsys=capsys))
    assert info["num_params"] == model_info("longnet_lm_tiny").num_params
    assert info["seq_len"] == 32768
    assert info["published_options"] == {"head_offset": "block", "padded_keys": "zero"}
    assert info["config"]["segment_lengths"] == [4096, 32768]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_pattern_writes_a_picture(suffix, tmp_path, capsys):
    path = tmp_path / f"pattern.{suffix}"
    options = "--segment-lengths 8 16 --dilation-rates 1 2 --seq-len 20 --num-heads 2 --causal"
    out = run("plot-pattern", *options.split(), "--output", str(path), capsys=capsys)
    assert out == f"wrote {path}\n"
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)


def read_plot_arguments(monkeypatch, tmp_path, *args):
    """What the command asks `plot_pattern` for."""
    calls = []
    draw = cli.plot_pattern

    def spy(pattern, **options):
        calls.append((pattern, options))
        return draw(pattern, **options)

    monkeypatch.setattr(cli, "plot_pattern", spy)
    main(["plot-pattern", *args, "--output", str(tmp_path / "p.png")])
    return calls[0]


def test_plot_pattern_of_a_model_takes_its_pattern(monkeypatch, tmp_path):
    pattern, options = read_plot_arguments(monkeypatch, tmp_path, "--model", "longnet_lm_base")
    assert pattern.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert options["seq_len"] == 32768
    assert options["num_heads"] == 12
    assert options["heads"] == range(8)
    assert options["is_causal"] is True
    assert options["title"] == "longnet_lm_base: who attends to whom"


def test_plot_pattern_options_win(monkeypatch, tmp_path):
    args = "--model longnet_lm_tiny --no-causal --num-heads 6 --heads 5 0 --seq-len 1024 --title T"
    _, options = read_plot_arguments(monkeypatch, tmp_path, *args.split())
    assert options == {
        "seq_len": 1024,
        "num_heads": 6,
        "is_causal": False,
        "heads": [5, 0],
        "title": "T",
    }
    args = "--segment-lengths 8 16 --dilation-rates 1 2 --head-offset block"
    pattern, options = read_plot_arguments(monkeypatch, tmp_path, *args.split())
    assert pattern.head_offset == "block"
    assert (options["seq_len"], options["num_heads"], options["is_causal"]) == (16, 4, False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("info longnet_lm_bas", "Did you mean 'longnet_lm_base'"),
        ("info longnet_lm_base --seq-len 0", "seq_len must be an integer of at least 1, got 0"),
        ("info longnet_lm_base --seq-len many", "argument --seq-len: invalid int value: 'many'"),
        (
            "list longnet_lm_tny",
            "no model matches 'longnet_lm_tny'. Did you mean 'longnet_lm_tiny'",
        ),
        ("list zzz*", "no model matches 'zzz*'. `longnet-zoo list` shows all."),
        ("list --modality smell", "'slide', 'text', 'vision', 'vision-language', got 'smell'"),
        (
            "list *_mlm_* --pretrained",
            "no model matches '*_mlm_*', --pretrained True. `longnet-zoo l",
        ),
        ("lst", "invalid choice: 'lst'"),
        ("", "the following arguments are required: COMMAND"),
        ("plot-pattern --output p.png", "give --segment-lengths and --dilation-rates, or --model"),
        ("plot-pattern --model longnet_lm_tiny --output p.gif", "must end in one of .png, .svg"),
        ("plot-pattern --model longnet_lm_tiny --output no/such/p.png", "no/such"),
        ("plot-pattern --model longnet_lm_tin --output p.png", "Did you mean 'longnet_lm_tiny'"),
        (
            "plot-pattern --model longnet_lm_tiny --head-offset block --output p.png",
            "--model brings its own pattern, got also --head-offset",
        ),
        (
            "plot-pattern --segment-lengths 8 4 --dilation-rates 1 2 --output p.png",
            "segment_lengths must be positive and strictly increasing, got (8, 4)",
        ),
        (
            "plot-pattern --segment-lengths 8 --dilation-rates 1 --num-heads 0 --output p.png",
            "num_heads must be an integer of at least 1, got 0",
        ),
        (
            "plot-pattern --segment-lengths 8 --dilation-rates 1 --heads 4 --output p.png",
            "between 0 and 3, got (4,)",
        ),
        ("data ecoli-k21", "no data set is called 'ecoli-k21'. Did you mean 'ecoli-k12'"),
        ("bench --is-dilated 2", "argument --is-dilated/--is_dilated: invalid choice: 2"),
        ("bench --num_heads 5", "emb_dim must be a multiple of num_heads, got emb_dim=384 and num"),
        ("bench --device gpu", "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        ("bench --backend fast", "backend must be one of ('auto', "),
        ("bench --device cpu --backend cudnn", "backend 'cudnn' needs a CUDA device, got 'cpu'"),
        ("bench --output picture.png", "it must have no suffix, got picture.png"),
        ("bench --resume", "--resume needs --output OUTPUT, got none"),
        ("bench --is-dilated 0 --backend math", "does not time, got backend='math'"),
        ("bench --device cpu --max-seq-len 1125899906842624", "are free on cpu. Take fewer tokens"),
    ],
)
def test_wrong_arguments_end_with_one_line_and_code_2(args, message, capsys):
    assert message in fail(*args.split(), capsys=capsys)


def test_bench_prints_the_lines_of_the_first_benchmark(capsys, tmp_path):
    args = "--max_seq_len 64 --num_seq_lens 2 --num-iter 1 --num_heads 2 --emb_dim 16 --device cpu"
    out = run("bench", *args.split(), "--is_dilated", "1", capsys=capsys)
    assert re.fullmatch(r"2 x 32:\n[\d.]+ ms\n1 x 64:\n[\d.]+ ms\n", out)
    output = tmp_path / "new" / "bench"
    args += f" --segment_lengths 16 32 --dilation_rates 1 2 --no-picture --output {output}"
    out = run("bench", *args.split(), capsys=capsys)
    line = r" +[\d.]+ ms +[\d.]+ ms +[\d.]+x\n"
    names = " +vanilla +dilated +advantage\n"
    written = re.escape(f"wrote {output}.json\n")
    assert re.fullmatch(f"{names}2 x 32:\n{line}1 x 64:\n{line}{written}", out)
    settings = json.loads(output.with_suffix(".json").read_text())["settings"]
    assert settings["segment_lengths"] == [16, 32]
    assert settings["is_dilated"] is None


def test_an_interrupt_is_one_line_and_code_130(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_bench", stop)
    with pytest.raises(SystemExit) as caught:
        main(["bench"])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "longnet-zoo: stopped\n"


def test_help_of_bench_names_defaults_that_are_some(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "None" not in words
    assert "one per branch (default: 1024 4096 16384)" in words


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(name, seq_len):
        raise KeyError("inside")

    monkeypatch.setattr(cli, "model_info", broken)
    with pytest.raises(KeyError, match="inside"):
        main(["info", "longnet_lm_tiny"])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0"),
        (999, "999"),
        (999_499, "999K"),
        (999_600, "1M"),
        (162_144_768, "162M"),
        (2_775_127_040, "2.78G"),
        (13_200_000_000_000, "13.2T"),
        (4 * 10**18, "4E"),
    ],
)
def test_large_numbers_have_three_digits(number, words):
    assert cli.short_number(number) == words


def test_module_runs_as_a_programme():
    done = subprocess.run(
        [sys.executable, "-m", "longnet_zoo.cli", "--version"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("longnet-zoo ")
    assert done.stderr == ""


def test_memory_that_does_not_suffice_is_said_in_one_line(monkeypatch, capsys):
    def fail(options):
        raise MemoryError("Unable to allocate 8 TiB")

    monkeypatch.setattr(cli, "_list", fail)
    with pytest.raises(SystemExit) as stop:
        main(["list"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err == "longnet-zoo: error: out of memory. Unable to allocate 8 TiB\n"
    )


def test_a_reader_may_leave():
    command = [sys.executable, "-m", "longnet_zoo.cli", "info", "longnet_lm_tiny", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1]
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
