r"""What a trained language model of bytes is worth: bits per byte of held-out files by context.

Windows spread evenly over the held-out text are cut into pieces of each context that cannot see
each other, so every context scores the same bytes; it has to divide the longest one. Beside the
models stands `xz -9e` (LZMA2, without the header of a file): on the same pieces, each by itself,
and on all held-out text at once, which is much more than any context here. A model named `random`
is the same network untrained.

    python -m benchmarks.pretrained --model longnet_lm_tiny --pretrained shipped=pystdlib \
        dense=runs/pretrain_pystdlib_dense/checkpoints/last.ckpt \
        --output benchmarks/results/pretrained-cpu.json
"""

from __future__ import annotations

import argparse
import lzma
import math
import platform
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import at_least_1, choose_device, make_parser
from benchmarks.record import Cell, Record, reason_of, run_programme, stop_if_broken
from longnet_zoo.bench import make_progress
from longnet_zoo.factory import create_model
from longnet_zoo.models.text_decoder import LongNetLM
from longnet_zoo.tokenizers import load_tokenizer
from recipes.text_corpus import Corpus
from recipes.text_files import PACKAGES
from recipes.text_splits import pack_splits

TOKENIZER = load_tokenizer("bytes")
RANDOM, XZ = "random", "xz -9e"
_XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


def main(options: argparse.Namespace) -> int:
    """Scores every model and xz; returns 1 if one failed."""
    device = choose_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    sources = dict(_named(text) for text in options.pretrained)
    longest = max(options.contexts)
    if odd := [context for context in options.contexts if longest % context]:
        raise ValueError(
            f"every context must divide the longest, so that all score the same bytes, got {odd} "
            f"with {longest}. Choose others in --contexts."
        )
    tokens, corpus = held_out_tokens(options.source)
    if len(tokens) <= longest:
        raise ValueError(
            f"the held-out text must fill a window of {longest:,} tokens, got {len(tokens):,} from "
            f"--source {options.source}. Shorten --contexts."
        )
    names = ("model", "source", "contexts", "num_windows")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"pretrained": sources, "corpus": corpus, "held_out_bytes": _bytes_of(tokens)}
    record = Record(
        "pretrained", settings, device=device, output=options.output, resume=options.resume
    )
    windows = spread_windows(tokens, longest, options.num_windows)
    compress(record, tokens, windows, options.contexts)
    for label, source in {**sources, RANDOM: False}.items():
        torch.manual_seed(0)
        model = create_model(options.model, pretrained=source).to(device).eval()
        for context in options.contexts:
            score(record, label, model, windows, context)
    record.complete()
    return int(record.has_failed)


def _named(text: str) -> tuple[str, str]:
    label, separator, source = text.partition("=")
    if not separator or not label or not source or label in (RANDOM, XZ):
        raise ValueError(
            f"--pretrained must be LABEL=SOURCE with a label of its own, got {text!r}."
        )
    return label, source


def held_out_tokens(source: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Ids of the test split that the recipe holds out by default, and what the corpus holds."""
    corpus = Corpus(source=source)
    packed = pack_splits(corpus, ["test"], TOKENIZER)["test"]
    sizes: Counter[str] = Counter()
    for file in corpus.files["train"]:
        sizes[file.key.split("/")[0]] += file.path.stat().st_size
    versions = {"stdlib": platform.python_version()} if "stdlib" in sizes else {}
    versions |= {name: version(name) for name in PACKAGES if name in sizes}
    facts = {
        "fingerprint": corpus.summary.fingerprint,
        "num_documents": corpus.summary.num_documents,
        "num_bytes": corpus.summary.num_bytes,
        "bytes_of": {name: sizes[name] for name in versions},
        "versions": versions,
    }
    return packed.tokens, facts


def spread_windows(tokens: np.ndarray, seq_len: int, num_windows: int) -> Tensor:
    """Windows spread evenly over the text, (windows, seq_len + 1); as many as fit side by side."""
    fitting = min(num_windows, (len(tokens) - 1) // seq_len)
    starts = np.linspace(0, len(tokens) - seq_len - 1, fitting).astype(np.int64)
    rows = [tokens[start : start + seq_len + 1].astype(np.int64) for start in starts]
    return torch.from_numpy(np.stack(rows))


def compress(record: Record, tokens: np.ndarray, windows: Tensor, contexts: list[int]) -> None:
    """Records what xz needs for the pieces of each context, and for the whole text."""
    for context in (*contexts, None):
        if record.find(way=XZ, context=context) is not None:
            continue
        rows = tokens[None] if context is None else windows[:, 1:].numpy()
        bits = [
            8 * sum(len(_xz(_text(piece))) for piece in _pieces(row, context or len(row)))
            for row in rows
        ]
        add(record, XZ, context, bits, [len(_text(row)) for row in rows])


@torch.no_grad()
def score(record: Record, label: str, model: LongNetLM, windows: Tensor, context: int) -> None:
    """Records what a model needs for the windows, cut into pieces of a context."""
    if record.find(way=label, context=context) is not None:
        return
    device = next(model.parameters()).device
    bits = []
    try:
        with make_progress() as progress:
            task = progress.add_task(f"{label}, {context:,}", total=len(windows))
            for window in windows.to(device):
                inputs, labels = (row.view(-1, context) for row in (window[:-1], window[1:]))
                loss = model.loss(inputs, labels, reduction="sum")
                bits.append(float(loss) / math.log(2))
                progress.advance(task)
    except RuntimeError as error:
        record.add([{"way": label, "context": context, "reason": reason_of(error)}])
        stop_if_broken(label, error)
        return
    add(record, label, context, bits, [_bytes_of(row[1:]) for row in windows.numpy()])


def add(
    record: Record, way: str, context: int | None, bits: list[float], num_bytes: list[int]
) -> None:
    """Adds a cell: the mean over all bytes, and its standard error from window to window."""
    mean = sum(bits) / sum(num_bytes)
    deviations = [b - mean * n for b, n in zip(bits, num_bytes, strict=True)]
    error = math.sqrt(sum(x * x for x in deviations)) / sum(num_bytes)
    cell: Cell = {
        "way": way,
        "context": context,
        "bits_per_byte": mean,
        "standard_error": error if len(bits) > 1 else None,
        "num_bytes": sum(num_bytes),
    }
    record.add([cell])
    print(line_of(cell), flush=True)


def line_of(cell: Cell) -> str:
    """One line of the table."""
    context = "all at once" if cell["context"] is None else f"{cell['context']:,}"
    return f"{cell['way']:20}{context:>12}{cell['bits_per_byte']:9.4f} bits per byte"


def _pieces(row: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(row) // size * size, size):
        yield row[start : start + size]


def _xz(text: bytes) -> bytes:
    return lzma.compress(text, format=lzma.FORMAT_RAW, filters=_XZ_FILTERS)


def _text(tokens: np.ndarray) -> bytes:
    """The bytes that tokens stand for; ends of documents are none."""
    return tokens[tokens < 256].astype(np.uint8).tobytes()


def _bytes_of(tokens: np.ndarray) -> int:
    return int((tokens < 256).sum())


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="longnet_lm_tiny", help="a causal model of bytes")
    parser.add_argument(
        "--pretrained",
        nargs="+",
        required=True,
        metavar="LABEL=SOURCE",
        help="its weights, each under a name: a tag, a folder or a recipe's checkpoint",
    )
    parser.add_argument("--source", default="python", help="the corpus: python, stdlib, a folder")
    parser.add_argument(
        "--contexts",
        type=at_least_1,
        nargs="+",
        default=[512, 1024, 2048, 4096, 8192, 16384, 32768],
        help="tokens that a piece has",
    )
    parser.add_argument("--num-windows", type=at_least_1, default=32, help="of the longest context")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_programme(main, read_options())
