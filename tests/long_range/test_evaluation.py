"""Runs taken together, tables, pictures, and the command that makes them."""

import dataclasses
import io
import json

import matplotlib.image
import pytest
from rich.console import Console

import longnet_zoo as lz
from longnet_zoo.cli import main
from longnet_zoo.long_range import (
    Cell,
    SelectiveCopying,
    accuracy_table,
    command,
    draw_accuracy,
    draw_examples,
    evaluate,
    evaluation,
    flops_per_example,
    majority,
    make_cell,
    score_model,
)
from longnet_zoo.long_range.table import rows
from tests.long_range.saved_models import OPTIONS, make_model, save_run

TASKS = [SelectiveCopying(seq_len=n, num_data_tokens=3) for n in (20, 40)]


def test_runs_of_a_label_are_one_cell_and_lengths_come_first():
    models = [
        ("a", make_model(0), {"train_flops": 1e6, "seq_len": 20}),
        ("b", make_model(1), {}),
        ("a", make_model(2), {"train_flops": 3e6, "seq_len": 20}),
    ]
    seen, begun = [], []
    cells = list(
        evaluate(
            models,
            TASKS,
            num_examples=9,
            seeds=2,
            on_start=lambda *x: begun.append(x),
            on_score=lambda *x: seen.append(x),
        )
    )
    assert begun == [
        *(("drawing examples", 20), *seen[:2]),
        *(("drawing examples", 40), *seen[2:]),
    ]
    assert [(cell.label, cell.seq_len) for cell in cells] == seen
    assert seen == [("a", 20), ("b", 20), ("a", 40), ("b", 40)]
    examples = [*draw_examples(TASKS[1], 9, seed=0), *draw_examples(TASKS[1], 9, seed=1)]
    expected = [
        score_model(model, TASKS[1], examples).accuracy(TASKS[1])
        for label, model, _ in models
        if label == "a"
    ]
    cell = cells[2]
    assert cell.accuracies == tuple(expected)
    assert (cell.low, cell.high) == (min(expected), max(expected))
    assert cell.mean == pytest.approx(sum(expected) / 2)
    assert (cell.num_examples, cell.train_flops, cell.train_seq_lens) == (18, 2e6, (20,))
    assert cell.flops == flops_per_example(models[0][1], TASKS[1])
    assert (cell.chance, cell.majority) == (1 / 14, majority(TASKS[1], examples))
    assert (cells[3].train_flops, cells[3].train_seq_lens) == (None, ())


def test_a_single_run_has_the_interval_of_its_examples():
    model, examples = make_model(0), draw_examples(TASKS[0], 9)
    (cell,) = evaluate([("a", model, {})], TASKS[:1], num_examples=9)
    score = score_model(model, TASKS[0], examples)
    assert cell.accuracies == (score.accuracy(TASKS[0]),)
    assert (cell.low, cell.high) == score.interval(TASKS[0])


def test_several_runs_have_the_worst_and_the_best():
    facts = {"seq_len": 8, "chance": 0.1, "majority": 0.5, "num_examples": 5, "flops": 7}
    cell = make_cell("a", [0.4, 0.2, 0.3], (0.35, 0.45), **facts)
    assert (cell.low, cell.high) == (0.2, 0.4)
    alone = make_cell("a", [0.4], (0.35, 0.45), **facts)
    assert (alone.low, alone.high) == (0.35, 0.45)


def test_lengths_that_do_not_fit_memory_are_said(monkeypatch):
    monkeypatch.setattr(evaluation, "available_mib", lambda device: 0.02)
    small, large = evaluate([("a", make_model(0), {})], TASKS, num_examples=1)
    # 20 numbers of 4 bytes for each of 16 channels: 0.024 MiB for 20 tokens, 0.049 for 40.
    assert small.reason.startswith("out of memory")
    assert large.reason == "out of memory: 0 MiB needed, 0 free"
    assert rows([large])[-1][2:4] == ("-", large.reason)
    monkeypatch.setattr(evaluation, "available_mib", lambda device: 0.03)
    small, large = evaluate([("a", make_model(0), {})], TASKS, num_examples=1)
    assert small.accuracies
    assert not large.accuracies


def test_what_the_training_took_is_known_without_an_accuracy(monkeypatch):
    monkeypatch.setattr(evaluation, "available_mib", lambda device: 0)
    known = {"train_flops": 2e6, "seq_len": 20}
    (cell,) = evaluate([("a", make_model(0), known)], TASKS[:1], num_examples=1)
    assert (cell.accuracies, cell.train_flops, cell.train_seq_lens) == ((), 2e6, (20,))
    assert rows([cell])[-1][-1] == "2.00e+06"


def test_different_models_under_one_label_are_refused():
    other = lz.create_model("longnet_lm_tiny", **{**OPTIONS, "embed_dim": 24}).eval()
    words = "got 'a' with embed_dim=16 and with embed_dim=24. Give them labels of their own"
    with pytest.raises(ValueError, match=words):
        list(evaluate([("a", make_model(0), {}), ("a", other, {})], TASKS))
    masked = lz.create_model("longnet_mlm_tiny", **OPTIONS).eval()
    with pytest.raises(ValueError, match=r"with model='LongNetLM'.* and with model='LongNetMLM'"):
        list(evaluate([("a", make_model(0), {}), ("a", masked, {})], TASKS))


def test_memory_that_cannot_be_told_is_no_limit(monkeypatch):
    monkeypatch.setattr(evaluation, "available_mib", lambda device: float("inf"))
    (cell,) = evaluate([("a", make_model(0), {})], TASKS[:1], num_examples=1)
    assert cell.accuracies


def test_memory_that_runs_out_on_the_way_is_said_and_bugs_are_raised(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError(words)

    monkeypatch.setattr(evaluation, "score_model", fail)
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    (cell,) = evaluate([("a", make_model(0), {})], TASKS[:1], num_examples=1)
    assert (cell.reason, cell.accuracies) == ("out of memory", ())
    words = "shapes differ"
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(evaluate([("a", make_model(0), {})], TASKS[:1], num_examples=1))


@pytest.mark.parametrize("name", ["num_examples", "seeds"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        list(evaluate([("a", make_model(0), {})], TASKS, **{name: 0}))


def cells():
    facts = {"chance": 0.25, "majority": 0.3, "num_examples": 50, "flops": 12345}
    return [
        Cell(label="dilated", seq_len=1024, accuracies=(0.5, 0.75), low=0.5, high=0.75, **facts),
        Cell(label="dense", seq_len=1024, accuracies=(1.0, 1.0), low=1.0, high=1.0, **facts),
        Cell(label="dense", seq_len=4096, reason="out of memory", train_flops=2e12, **facts),
    ]


def test_table_has_guesses_and_models_by_length():
    assert rows(cells()) == [
        ("1,024", "chance", "25.0", "", "", "", ""),
        ("", "constant", "30.0", "", "", "", ""),
        ("", "dilated", "62.5", "50.0, 75.0", "2", "1.23e+04", ""),
        ("", "dense", "100.0", "100.0, 100.0", "2", "1.23e+04", ""),
        ("4,096", "chance", "25.0", "", "", "", ""),
        ("", "constant", "30.0", "", "", "", ""),
        ("", "dense", "-", "out of memory", "", "1.23e+04", "2.00e+12"),
    ]
    table = accuracy_table(cells(), title="mqar")
    assert table.row_count == 7
    assert "most frequent in training examples" in table.caption


def test_caption_is_true_of_tables_with_single_and_with_several_runs():
    several = cells()[0]
    single = dataclasses.replace(several, label="one", accuracies=(0.6,))
    for mixed in ([several, single], [single], [several]):
        caption = accuracy_table(mixed, title="mqar").caption
        assert "each of several runs, of a single one the 95 % interval" in caption


def shown(cells):
    console = Console(width=80, file=io.StringIO())
    console.print(accuracy_table(cells, title="mqar"))
    return console.file.getvalue()


def test_a_long_label_folds_and_leaves_the_figures_whole():
    label = "/runs" + "/model" * 30
    text = shown([dataclasses.replace(cell, label=label) for cell in cells()])
    assert max(map(len, text.splitlines())) == 80
    for words in ("1,024", "62.5", "50.0, 75.0", "1.23e+04", "out of memory", "2.00e+12"):
        assert words in text
    assert text.count("/model") > 40


def test_labels_are_no_markup():
    text = shown([dataclasses.replace(cells()[0], label=label) for label in ("[/b]x", "[red]")])
    assert "[/b]x" in text
    assert "[red]" in text


def test_a_rare_chance_is_not_shown_as_never():
    rare = Cell(
        label="a", seq_len=8, accuracies=(0.0,), chance=2e-5, majority=0.0, num_examples=1, flops=1
    )
    assert [row[2] for row in rows([rare])] == ["0.002", "0.0", "0.0"]


def test_picture_has_a_panel_a_task_with_lines_spread_and_guesses():
    figure = draw_accuracy({"mqar": cells(), "passkey": cells()[:1]}, title="t", facts="f")
    first, second = figure.axes
    names = [text.get_text() for text in first.get_legend().get_texts()]
    assert names == ["dilated", "dense", "chance", "constant"]
    lines = {line.get_label(): line for line in first.get_lines()}
    assert lines["dilated"].get_xydata().tolist() == [[1024, 62.5]]
    assert lines["chance"].get_linestyle() == ":"
    assert lines["constant"].get_linestyle() == "--"
    ends = {tuple(bar.get_segments()[0][:, 1]) for bar in first.collections}
    assert ends == {(50.0, 75.0), (100.0, 100.0)}
    assert second.get_title(loc="left") == "passkey: accuracy in %"


def test_picture_shows_labels_that_matplotlib_would_hide_or_read(tmp_path):
    labels = ["_seed", "$x", "$\\no$", "runs/long_range/selective_copying/model"]
    figure = draw_accuracy(
        {"mqar": [dataclasses.replace(cells()[0], label=label) for label in labels]},
        title="t",
        facts="f",
    )
    figure.savefig(tmp_path / "a.png")
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    path = "\u2026range/selective_copying/model"
    assert names == [" _seed", r"\$x", r"\$\no\$", path, "chance", "constant"]
    assert len(path) == 30


def test_command_prints_writes_and_draws(tmp_path, capsys):
    for seed in (0, 1):
        save_run(tmp_path / f"seed{seed}", seed, train_flops=1e9, seq_len=40)
    arguments = [
        *("evaluate", "--task", "selective_copying", "--option", "num_data_tokens=3"),
        *("--lengths", "40", "20", "--examples", "6", "--device", "cpu"),
        *("--models", f"ours={tmp_path}/seed*", f"other={tmp_path}/seed1"),
        *("--output", str(tmp_path / "found.json"), "--picture"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "selective_copying" in printed
    assert "1.00e+09" in printed
    document = json.loads((tmp_path / "found.json").read_text())
    found = document["cells"]
    assert [(cell["label"], cell["seq_len"]) for cell in found] == [
        *(("ours", 20), ("other", 20)),
        *(("ours", 40), ("other", 40)),
    ]
    assert found[0]["accuracies"][1] == found[1]["accuracies"][0]
    assert document["command"].startswith("longnet-zoo evaluate --task selective_copying --models")
    assert matplotlib.image.imread(tmp_path / "found.png").std() > 0.05
    assert (tmp_path / "found.svg").read_text().count("<path") > 10


def test_figures_are_written_before_they_are_printed(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise KeyError("printing")

    monkeypatch.setattr(command, "_print", fail)
    folder, output = save_run(tmp_path / "model", 0), tmp_path / "found.json"
    task = ["--task", "selective_copying", "--lengths", "40", "--examples", "2"]
    with pytest.raises(KeyError, match="printing"):
        main(["evaluate", *task, "--models", f"[/b]={folder}", "--output", str(output)])
    assert json.loads(output.read_text())["cells"][0]["label"] == "[/b]"


def test_what_was_found_before_an_interruption_stays(tmp_path, monkeypatch, capsys):
    def stop(model, task, examples, **options):
        if task.seq_len == 40:
            raise KeyboardInterrupt
        return score_model(model, task, examples, **options)

    monkeypatch.setattr(evaluation, "score_model", stop)
    folder, output = save_run(tmp_path / "model", 0), tmp_path / "found.json"
    task = ["--task", "selective_copying", "--lengths", "32", "40", "--examples", "2"]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *task, "--models", f"ours={folder}", "--output", str(output)])
    assert stopped.value.code == 130
    (cell,) = json.loads(output.read_text())["cells"]
    assert (cell["label"], cell["seq_len"]) == ("ours", 32)
    assert "ours" in capsys.readouterr().out


def test_labels_are_no_markup_of_the_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    folder = save_run(tmp_path / "model", 0)
    task = ["--task", "selective_copying", "--lengths", "40", "--examples", "2"]
    assert main(["evaluate", *task, "--models", f"[/b]x={folder}"]) == 0
    captured = capsys.readouterr()
    assert "[/b]x" in captured.out
    assert "[/b]x 40" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "copying"], "task must be one of mqar"),
        (["--option", "seq_len=9"], "--option takes no seq_len, got 'seq_len=9'. Where"),
        (["--option", "name=x"], "--option takes no name, got 'name=x'"),
        (["--lengths", "16777217"], "seq_len must be 16,777,216 or less, got 16777217"),
        (["--seeds", "16777217"], "seeds must be 16,777,216 or less, got 16777217"),
        (["--option", "size=9"], "has no options size"),
        (["--task", "passkey", "--option", "depth=abc"], "depth must be a number, got 'abc'"),
        (
            ["--task", "mqar", "--option", "num_pairs=abc"],
            "num_pairs must be an integer, got 'abc'",
        ),
        (["--task", "mqar"], "got a with 16. Pass --option vocab_size=16, train one with recipes"),
        (["--picture"], "got no --output"),
        (["--output", "a.txt"], "--output must end in .json, got a.txt"),
        (["--task", "passkey"], "passkey needs a model of at least 259 token ids, got a with 16"),
        (["--task", "pathfinder"], "pathfinder needs a model of at least 258"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, arguments, words):
    folder = save_run(tmp_path / "model", 0)
    usual = ["--task", "selective_copying", "--models", f"a={folder}"]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *usual, *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
