"""Writes what a run came to: report.html, report.png, metrics.json and a few lines to read."""

import base64
import html
import json
import os
import platform
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

import longnet_zoo as lz
from recipes.callbacks import RunClock, Throughput
from recipes.context import ContextFigures, context_marks, measure_context
from recipes.report_figure import draw_report
from recipes.run_folder import read_curves

__all__ = ["ReportCallback", "report_html"]

_CSS = """
body{font:16px/1.55 system-ui,sans-serif;color:#1f2933;background:#f5f7fa;margin:0}
main{max-width:1080px;margin:0 auto;padding:2.5rem 1.5rem 4rem}
h1{margin:0;font-size:1.9rem}h2{margin:2.4rem 0 .8rem;font-size:1.15rem}
p{margin:.3rem 0;color:#52606d}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:.9rem;
margin-top:1.6rem}
.card,figure,pre,table{background:#fff;border:1px solid #e4e7eb;border-radius:10px}
.card{padding:.9rem 1.1rem}.card b{display:block;font-size:1.7rem;line-height:1.3}
.card span{color:#7b8794;font-size:.88rem}
figure{margin:1.4rem 0 0;padding:1rem}img{width:100%;display:block}
pre{padding:1rem 1.2rem;overflow:auto;font:13.5px/1.5 ui-monospace,monospace;
white-space:pre-wrap;overflow-wrap:anywhere}
.columns{columns:400px 2;column-gap:1.4rem}section{break-inside:avoid}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.92rem}
td{padding:.38rem .9rem;border-top:1px solid #eef1f4;vertical-align:top;overflow-wrap:anywhere}
tr:first-child td{border-top:0}td:first-child{color:#7b8794;white-space:nowrap;width:1%}
"""


class ReportCallback(RunClock):
    """Scores held-out text when training ends, and writes a report into the run folder.

    Args:
        title: Heading of the report; None takes the name of the model.
        max_windows: Held-out windows to score on each process; None takes all.
        short_context: Tokens of the short context to compare with; None takes seq_len / 16.
        near: Positions at the start of the context to average over; None takes seq_len / 32.
        far: Position from which on to average; None takes seq_len / 4.
    """

    def __init__(
        self,
        *,
        title: str | None = None,
        max_windows: int | None = 64,
        short_context: int | None = None,
        near: int | None = None,
        far: int | None = None,
    ) -> None:
        super().__init__()
        if max_windows is not None and max_windows < 1:
            raise ValueError(f"max_windows must be None or 1 or more, got {max_windows}.")
        self._title = title
        self._max_windows = max_windows
        self._marks = {"short_context": short_context, "near": near, "far": far}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock, and checks the positions before hours of training, not after."""
        super().on_fit_start(trainer, pl_module)
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "the report reads whole contexts on one device, got trainer.strategy="
                f"{type(trainer.strategy).__name__}, which splits them. Leave the callback out, "
                "and evaluate by validate or test."
            )
        if not trainer.fast_dev_run:
            context_marks(trainer.datamodule.seq_len, **self._marks)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures on all processes, writes on the first."""
        if trainer.fast_dev_run:
            return
        was_training = pl_module.training
        pl_module.eval()
        with trainer.precision_plugin.forward_context():
            figures = self._measure(trainer, pl_module)
            sample = pl_module.sample(pl_module.prompts[0])
        pl_module.train(was_training)
        if trainer.is_global_zero and figures is not None:
            self._write(trainer, pl_module, figures, sample)

    def _measure(self, trainer: L.Trainer, task: L.LightningModule) -> ContextFigures | None:
        data = trainer.datamodule
        loader = data.val_dataloader()
        if not len(loader):
            print("No report: there is no held-out text (data.val_fraction is 0).")
            return None
        windows = len(loader) * data.batch_size if self._max_windows is None else self._max_windows
        return measure_context(
            task,
            islice(loader, max(1, windows // data.batch_size)),
            seq_len=data.seq_len,
            strategy=trainer.strategy,
            **self._marks,
        )

    def _write(
        self, trainer: L.Trainer, task: L.LightningModule, figures: ContextFigures, sample: str
    ) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        metrics_file = folder / "metrics.csv"
        curves = read_curves(metrics_file)
        metrics = self._metrics(trainer, figures)
        title = self._title or task.hparams["model_name"]
        png = draw_report(title=title, curves=curves, figures=figures)
        (folder / "report.png").write_bytes(png)
        tables = {
            "Settings": _settings(trainer, task),
            "Corpus": _corpus(trainer.datamodule),
            "Machine": _machine(trainer),
            "Versions": _versions(),
        }
        document = report_html(
            title=title, metrics=metrics, figures=figures, png=png, sample=sample, tables=tables
        )
        (folder / "report.html").write_text(document, encoding="utf-8")
        record = {"metrics": metrics, **{name.lower(): rows for name, rows in tables.items()}}
        (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
        print(_summary(folder, metrics, figures, sample))

    def _metrics(self, trainer: L.Trainer, figures: ContextFigures) -> dict[str, float | None]:
        throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))
        logged = trainer.callback_metrics
        names = ("train_bits_per_byte", "val_loss", "val_bits_per_byte", "tokens_per_second")
        return {
            **{name: float(logged[name]) for name in names if name in logged},
            **figures.to_dict(),
            "steps": trainer.global_step,
            "train_seconds": round(throughput.train_seconds, 1),
            "total_seconds": round(self.seconds, 1),
        }


def report_html(
    *,
    title: str,
    metrics: Mapping[str, float],
    figures: ContextFigures,
    png: bytes,
    sample: str,
    tables: Mapping[str, Mapping[str, Any]],
) -> str:
    """Returns the report as one page that needs no other file.

    Args:
        title: Heading.
        metrics: Figures of the run, by name.
        figures: Scores of the held-out windows.
        png: The picture.
        sample: Text that the model wrote.
        tables: Further facts: heading, then name and value of each row.
    """
    minutes = metrics["train_seconds"] / 60
    full, short = figures.full.between(), figures.short.between()
    cards = [
        (f"{full:.3f}", f"bits per byte, context {figures.context:,}"),
        (f"{short:.3f}", f"same tokens, context cut to {figures.short_context:,}"),
        (f"{figures.full.between(0, figures.near):.3f}", f"in the first {figures.near:,} tokens"),
        (f"{figures.full.between(figures.far):.3f}", f"beyond position {figures.far:,}"),
        (f"{minutes:.1f} min", f"of training, {metrics['steps']:,} steps"),
    ]
    body = [
        f"<h1>{html.escape(title)}</h1>",
        "<p>Held-out text was never seen in training. Lower is better.</p>",
        '<div class="cards">',
        *(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for value, name in cards),
        "</div>",
        '<figure><img alt="Loss, bits per byte against position, throughput and comparison" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>',
        "<h2>What it writes</h2>",
        f"<pre>{html.escape(sample)}</pre>",
        '<div class="columns">',
        *(f"<section><h2>{name}</h2>{_table(rows)}</section>" for name, rows in tables.items()),
        "</div>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table>{cells}</table>"


def _settings(trainer: L.Trainer, task: L.LightningModule) -> dict[str, Any]:
    data, settings = trainer.datamodule, dict(task.hparams)
    options = settings.pop("model_options") or {}
    optimization = settings.pop("optimization")
    model = {
        "model_name": settings.pop("model_name"),
        **{f"model_options.{name}": value for name, value in options.items()},
        "parameters": f"{task.model.num_params():,}",
    }
    run = {
        "seq_len": data.seq_len,
        "batch_size": f"{data.batch_size} x {trainer.world_size} processes "
        f"x {trainer.accumulate_grad_batches} accumulated",
        "max_steps": trainer.max_steps,
        "precision": trainer.precision,
        "gradient_clip_val": trainer.gradient_clip_val,
    }
    return {**model, **settings, **optimization, **run}


def _corpus(data: L.LightningDataModule) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "source": data.source,
        "tokenizer": f"{type(data.tokenizer).__name__}, {data.vocab_size:,} ids",
        "fingerprint": data.fingerprint,
    }
    if data.summary is not None:
        for split, count in data.summary.num_documents.items():
            megabytes = data.summary.num_bytes[split] / 1e6
            facts[split] = f"{count:,} documents, {megabytes:.2f} MB"
    return facts


def _machine(trainer: L.Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "system": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    return {
        "longnet_zoo": lz.__version__,
        "torch": torch.__version__,
        "lightning": L.__version__,
        "python": platform.python_version(),
    }


def _summary(
    folder: Path, metrics: Mapping[str, float], figures: ContextFigures, sample: str
) -> str:
    rule = "-" * 78
    near, far = figures.full.between(0, figures.near), figures.full.between(figures.far)
    full, short = figures.full.between(), figures.short.between()
    return "\n".join(
        [
            f"{rule}\nA sample of what the model writes:\n\n{sample}\n{rule}",
            f"Held-out bits per byte            {full:.3f}   "
            f"({figures.num_windows} windows of {figures.context:,} tokens)",
            f"  context cut to {figures.short_context:<6,}           {short:.3f}   "
            f"the whole context saves {short - full:+.3f}",
            f"  first {figures.near:<6,} positions           {near:.3f}",
            f"  beyond position {figures.far:<6,}          {far:.3f}   "
            f"{far - near:+.3f} against the first {figures.near:,}",
            f"{metrics['steps']:,} steps in {metrics['train_seconds'] / 60:.1f} minutes, "
            f"{metrics['total_seconds'] / 60:.1f} with validation and report",
            f"Report       {folder / 'report.html'}",
            f"Checkpoint   {folder / 'checkpoints' / 'last.ckpt'}",
            f"Curves       {folder / 'metrics.csv'}, tensorboard --logdir {folder}",
            rule,
        ]
    )
