"""The report: right figures, one file that needs no other, and nothing lost on the way."""

import base64
import io
import json
import math
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from recipes.checkpoints import last_checkpoint
from recipes.context import ContextCurve, ContextFigures, measure_context
from recipes.report import ReportCallback, report_html
from recipes.report_figure import draw_report
from recipes.sequence_parallel import SequenceParallelStrategy
from recipes.text_data import TextDataModule
from recipes.text_lm import TextLM, main
from recipes.text_mlm import main as main_mlm
from tests.recipes.text_runs import arguments, last_checkpoint_every, model_options


def report_every_option(**options):
    return [
        "--trainer.callbacks+=recipes.report.ReportCallback",
        *(f"--trainer.callbacks.{name}={value}" for name, value in options.items()),
    ]


def make_task(corpus, **options):
    data = TextDataModule(source=str(corpus), **{"seq_len": 64, "batch_size": 3, **options})
    data.setup("fit")
    task = TextLM(model_options=model_options()).eval()
    task.attach_tokenizer(data.tokenizer)
    return task, data


# Figures ------------------------------------------------------------------------------------------


def test_whole_context_is_the_validation_and_short_context_is_one_by_one(corpus):
    task, data = make_task(corpus)
    batches = list(data.val_dataloader())
    figures = measure_context(task, batches, seq_len=64, short_context=24, near=8, far=20)

    nats, short_nats, num_bytes = (torch.zeros(64).double() for _ in range(3))
    for batch in batches:
        for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
            nats += task.token_losses(tokens[None], labels[None])[0].detach()
            num_bytes += labels < 256
            # 24 does not divide 64: the last piece is shorter.
            for piece in (slice(0, 24), slice(24, 48), slice(48, 64)):
                losses = task.token_losses(tokens[None, piece], labels[None, piece])
                short_nats[piece] += losses[0].detach()

    def bits(values, part=slice(None)):
        return float(values[part].sum()) / math.log(2) / float(num_bytes[part].sum())

    assert figures.full.between() == pytest.approx(bits(nats), rel=1e-6)
    assert figures.short.between() == pytest.approx(bits(short_nats), rel=1e-6)
    assert figures.full.between(0, 8) == pytest.approx(bits(nats, slice(0, 8)), rel=1e-6)
    assert figures.full.between(20) == pytest.approx(bits(nats, slice(20, None)), rel=1e-6)
    assert figures.num_windows == sum(len(batch["tokens"]) for batch in batches)
    assert len(figures.short.nats) == 24
    # A context that begins anew repeats position 0 three times.
    assert float(figures.short.num_bytes[0]) == float(num_bytes[[0, 24, 48]].sum())
    assert figures.to_dict()["beyond_20"] == figures.full.between(20)


def test_confined_documents_have_their_own_positions(corpus):
    task, data = make_task(corpus, confine_to_document=True, batch_size=2)
    batches = list(data.val_dataloader())
    figures = measure_context(task, batches, seq_len=64, short_context=16)
    total = short = firsts = 0.0
    for batch in batches:
        edges = batch["cu_seqlens"].tolist()
        for start, stop in pairwise(edges):
            part = batch["tokens"][:, start:stop], batch["labels"][:, start:stop]
            total += float(task.token_losses(*part).sum().detach())
            firsts += float(task.token_losses(*part)[0, 0].detach())
            for tokens, labels in zip(*(x.split(16, dim=1) for x in part), strict=True):
                short += float(task.token_losses(tokens, labels).sum().detach())
    # Some windows hold the end of a document.
    assert any(len(batch["cu_seqlens"]) > 3 for batch in batches)
    assert float(figures.full.nats.sum()) == pytest.approx(total, rel=1e-6)
    assert float(figures.full.nats[0]) == pytest.approx(firsts, rel=1e-6)
    assert float(figures.short.nats.sum()) == pytest.approx(short, rel=1e-6)


def test_default_marks_are_shares_of_the_context(corpus):
    task, data = make_task(corpus)
    figures = measure_context(task, list(data.val_dataloader())[:1], seq_len=64)
    assert (figures.short_context, figures.near, figures.far) == (4, 2, 16)


@pytest.mark.parametrize("name", ["short_context", "near", "far"])
def test_marks_outside_the_context_are_refused(corpus, name):
    task, data = make_task(corpus)
    with pytest.raises(ValueError, match=f"{name} must be .*, got {name}=64 and seq_len=64"):
        measure_context(task, data.val_dataloader(), seq_len=64, **{name: 64})


def test_no_window_at_all_is_refused():
    with pytest.raises(ValueError, match="max_windows must be None or 1 or more, got 0"):
        ReportCallback(max_windows=0)


def test_processes_that_share_a_sequence_are_refused_before_training(corpus):
    task, data = make_task(corpus)
    strategy = SequenceParallelStrategy(sequence_parallel_size=1)
    trainer = SimpleNamespace(strategy=strategy, fast_dev_run=False, datamodule=data)
    with pytest.raises(ValueError, match=r"got trainer\.strategy=SequenceParallelStrategy, which"):
        ReportCallback().on_fit_start(trainer, task)


def test_ranges_of_positions_grow_and_leave_nothing_out():
    curve = ContextCurve(nats=torch.arange(100.0).double(), num_bytes=torch.ones(100).double())
    steps = curve.steps(per_octave=2, smallest=8)
    assert [(start, stop) for start, stop, _ in steps] == [
        *((0, 8), (8, 11), (11, 16), (16, 23), (23, 32), (32, 45), (45, 64), (64, 91), (91, 100)),
    ]
    assert steps[1][2] == pytest.approx(9 / math.log(2))
    short = ContextCurve(nats=torch.ones(3).double(), num_bytes=torch.ones(3).double())
    assert [(start, stop) for start, stop, _ in short.steps()] == [(0, 3)]


# The report ---------------------------------------------------------------------------------------


def test_a_run_ends_with_a_report(corpus, tmp_path, capsys):
    args = arguments(corpus, tmp_path, trainer__limit_val_batches=1.0, trainer__max_steps=10)
    options = report_every_option(title="Tiny <run>", short_context=16, near=8, far=32)
    main(["fit", *args, *last_checkpoint_every(5), *options])
    printed = capsys.readouterr().out

    record = json.loads((tmp_path / "metrics.json").read_text())
    metrics = record["metrics"]
    # All windows, so the same tokens as the validation after the last step.
    assert metrics["context_64"] == pytest.approx(metrics["val_bits_per_byte"], rel=1e-6)
    assert metrics["context_16"] != metrics["context_64"]
    assert metrics["steps"] == 10
    assert metrics["train_seconds"] > 0
    assert record["corpus"]["fingerprint"] in (tmp_path / "report.html").read_text()
    assert record["settings"]["model_options.embed_dim"] == 16
    assert record["versions"]["torch"] == torch.__version__

    page = (tmp_path / "report.html").read_text()
    assert "Tiny &lt;run&gt;" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    picture = base64.b64decode(re.findall(r"data:image/png;base64,([^\"]+)", page)[0])
    assert picture == (tmp_path / "report.png").read_bytes()
    assert Image.open(io.BytesIO(picture)).size == (1800, 1209)

    assert "import os\n\n\ndef " in printed
    for name in ("context_64", "context_16", "first_8", "beyond_32"):
        assert f"{metrics[name]:.3f}" in printed
    for name in ("report.html", "metrics.csv", "checkpoints/last.ckpt"):
        assert str(tmp_path / name) in printed
    # The last checkpoint is that of the model in the report.
    assert last_checkpoint(tmp_path) is not None


def test_the_masked_recipe_reports_too(corpus, tmp_path, capsys):
    args = arguments(corpus, tmp_path, data__objective="masked", trainer__max_steps=2)
    main_mlm(["fit", *args, *report_every_option(max_windows=4)])
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["num_windows"] == 4
    assert "def __in" in capsys.readouterr().out


def test_without_held_out_text_there_is_no_report_but_a_reason(corpus, tmp_path, capsys):
    args = arguments(corpus, tmp_path, data__val_fraction=0, trainer__max_steps=2)
    args = [arg for arg in args if "val_check_interval" not in arg]
    main(["fit", *args, *report_every_option()])
    assert "No report: there is no held-out text" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()


def test_report_leaves_the_model_in_training_mode_and_its_weights_alone(corpus, tmp_path):
    args = [*arguments(corpus, tmp_path / "a", trainer__max_steps=4), *last_checkpoint_every(4)]
    main(["fit", *args, *report_every_option()])
    args = [*arguments(corpus, tmp_path / "b", trainer__max_steps=4), *last_checkpoint_every(4)]
    main(["fit", *args])
    weights = [
        torch.load(last_checkpoint(tmp_path / name), weights_only=True)["state_dict"]
        for name in ("a", "b")
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


def figures_of(nats):
    size = len(nats)
    ones = torch.ones(size).double()
    return ContextFigures(
        full=ContextCurve(nats=torch.tensor(nats).double(), num_bytes=ones),
        short=ContextCurve(nats=ones[:2], num_bytes=ones[:2]),
        short_context=2,
        near=1,
        far=3,
        num_windows=1,
    )


def test_picture_needs_neither_validation_nor_many_steps():
    png = draw_report(title="t", curves={}, figures=figures_of([1.0, 2.0, 3.0, 4.0]))
    assert png.startswith(b"\x89PNG")
    curves = {"train_bits_per_byte": [(1, 5.0)], "tokens_per_second": [(1, 100.0)]}
    assert draw_report(title="t", curves=curves, figures=figures_of([1.0] * 4)) != png


def test_text_of_the_model_cannot_become_markup():
    page = report_html(
        title="t",
        metrics={"train_seconds": 90.0, "steps": 1200},
        figures=figures_of([1.0, 2.0, 3.0, 4.0]),
        png=b"",
        sample="<script>alert(1)</script>",
        tables={"Settings": {"a<b": "&"}},
    )
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<td>a&lt;b</td><td>&amp;</td>" in page
    assert "1.5 min" in page
    assert "of training, 1,200 steps" in page
