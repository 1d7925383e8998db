import json
import lzma
import math
import random

import numpy as np
import pytest
import torch

from benchmarks import model_card, pretrained
from benchmarks.performance import page
from longnet_zoo.factory import create_model

WORDS = ["import", "return", "self", "value", "for", "in", "range", "print"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of few words: many, so that some are held out."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for index in range(150):
        text = " ".join(draw.choice(WORDS) for _ in range(150))
        (folder / f"{index}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "model"
    torch.manual_seed(1)
    create_model("longnet_lm_tiny").save_pretrained(folder)
    return folder


def options_of(corpus, weights, *extra):
    flags = ["--device=cpu", "--source", corpus, "--contexts", 16, 64, "--num-windows", 4]
    given = [*flags, "--pretrained", f"mine={weights}", *extra]
    return pretrained.read_options(list(map(str, given)))


@pytest.fixture(scope="module")
def result(corpus, weights, tmp_path_factory):
    output = tmp_path_factory.mktemp("pretrained") / "pretrained-test.json"
    assert pretrained.main(options_of(corpus, weights, "--output", output)) == 0
    return output


def cell_of(document, way, context):
    (cell,) = [x for x in document["cells"] if (x["way"], x["context"]) == (way, context)]
    return cell


def test_a_model_is_scored_on_pieces_that_cannot_see_each_other(result, corpus, weights):
    document = json.loads(result.read_text())
    tokens, _ = pretrained.held_out_tokens(str(corpus))
    windows = pretrained.spread_windows(tokens, 64, 4)
    model = create_model("longnet_lm_tiny", pretrained=weights).eval()
    nats, num_bytes = 0.0, 0
    for window in windows:
        for start in range(0, 64, 16):
            piece = window[start : start + 17]
            with torch.no_grad():
                logits = model(piece[None, :-1])[0].double()
            nats += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
            num_bytes += int((piece[1:] < 256).sum())
    cell = cell_of(document, "mine", 16)
    assert cell["num_bytes"] == num_bytes
    assert cell["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)
    assert 0 < cell["standard_error"] < 1
    assert cell_of(document, "random", 64)["num_bytes"] == num_bytes
    assert cell_of(document, "random", 64)["bits_per_byte"] != cell["bits_per_byte"]


def test_xz_packs_pieces_and_all_at_once(result, corpus):
    document = json.loads(result.read_text())
    tokens, _ = pretrained.held_out_tokens(str(corpus))
    text = tokens[tokens < 256].astype(np.uint8).tobytes()
    whole = cell_of(document, "xz -9e", None)
    assert whole["num_bytes"] == document["settings"]["held_out_bytes"] == len(text)
    assert whole["standard_error"] is None
    # A file has a header and a check of a few dozen bytes around the same stream.
    stored = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert stored - 8 * 100 / len(text) < whole["bits_per_byte"] < stored
    by_piece = [cell_of(document, "xz -9e", context)["bits_per_byte"] for context in (16, 64)]
    assert by_piece[0] > by_piece[1] > whole["bits_per_byte"]


def test_windows_spread_over_the_text():
    tokens = np.arange(100)
    windows = pretrained.spread_windows(tokens, 10, 3)
    assert windows[:, 0].tolist() == [0, 44, 89]
    assert windows.shape == (3, 11)
    assert len(pretrained.spread_windows(tokens, 10, 50)) == 9


def test_finished_cells_are_kept(result, corpus, weights, monkeypatch):
    before = json.loads(result.read_text())
    monkeypatch.setattr(pretrained, "add", None)  # nothing is left to add
    options = options_of(corpus, weights, "--output", result, "--resume")
    assert pretrained.main(options) == 0
    assert json.loads(result.read_text())["cells"] == before["cells"]


def test_page_has_a_column_for_each_model(result):
    document = json.loads(result.read_text())
    text = page({"pretrained-test": document})
    assert "| context | xz -9e | mine | random |" in text
    bits = cell_of(document, "mine", 64)["bits_per_byte"]
    (row,) = [line for line in text.splitlines() if line.startswith("| 64 |")]
    assert f"| {bits:.3f} ± " in row
    size = document["settings"]["held_out_bytes"] / 1e6
    assert f"| all {size:.1f} MB at once |" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pretrained", "x"], "--pretrained must be LABEL=SOURCE .* got 'x'"),
        (["--pretrained", "random=a"], "LABEL=SOURCE with a label of its own, got 'random=a'"),
        (["--contexts", "48", "64"], r"must divide the longest, .* got \[48\] with 64"),
        (["--contexts", "99999"], "fill a window of 99,999 tokens, got"),
    ],
)
def test_wrong_options_are_refused(corpus, weights, flags, message):
    with pytest.raises(ValueError, match=message):
        pretrained.main(options_of(corpus, weights, *flags))


def document_of(own, whole):
    """What `main` writes, with figures that can be told apart."""
    cells = [
        {"way": "xz -9e", "context": 64, "bits_per_byte": 3.5},
        {"way": "xz -9e", "context": None, "bits_per_byte": whole},
        {"way": "shipped", "context": 16, "bits_per_byte": 2.25},
        {"way": "shipped", "context": 64, "bits_per_byte": own},
        {"way": "random", "context": 64, "bits_per_byte": 8.125},
    ]
    corpus = {
        "fingerprint": "abc",
        "num_bytes": {"train": 4_000_000, "val": 2_000_000, "test": 1_000_000},
        "bytes_of": {"stdlib": 5_000_000, "torch": 2_000_000},
        "versions": {"stdlib": "3.11.1", "torch": "2.9"},
    }
    settings = {"model": "longnet_lm_tiny", "contexts": [16, 64], "corpus": corpus}
    return {
        "command": "python -m benchmarks.pretrained",
        "settings": settings,
        "environment": {"python": "3.11.1", "cores": 2, "device": "some CPU"},
        "cells": [{"standard_error": 0.01, "num_bytes": 1e6, **cell} for cell in cells],
    }


def run_of(steps, tokens, device):
    """What `benchmarks.pretraining` writes."""
    facts = {"steps": steps, "tokens": tokens, "flops": 2.5e14, "hours": 1.5, "lr": 0.01}
    facts |= {"start": 16, "seq_len": 64, "precision": "32-true", "optimizer": "muon"}
    return {"settings": facts, "environment": {"cores": 2, "device": device}}


@pytest.mark.parametrize(
    ("own", "whole", "words"),
    [(1.5, 1.25, "0.250 more than `xz -9e`"), (1.0, 1.25, "0.250 fewer than `xz -9e`")],
)
def test_card_says_whether_xz_is_beaten(own, whole, words):
    text = " ".join(model_card.card(document_of(own, whole), run_of(30, 2e6, "A")).split())
    assert f"they fall from 2.250 to {own:.3f}. That is {words} needs for all" in text
    assert f"and {3.5 - own:.3f} fewer than it needs with the same context" in text
    assert "the network needs 8.12" in text


def test_card_tells_data_training_and_size():
    text = model_card.card(document_of(1.5, 1.25), run_of(30, 2e6, "some CPU"))
    assert "| torch | 2.9 | BSD-3-Clause | 2.0 MB |" in text
    assert "| stdlib | 3.11.1 | PSF-2.0 | 5.0 MB |" in text
    words = " ".join(text.split())
    assert "30 steps, 2.0 million bytes (the files have 4), 2.50e+14 FLOPs, 1.5 hours" in words
    assert "on 2 cores (some CPU) with other work beside it; precision 32-true, muon" in words
    assert "dense attention" not in words
    assert "2.0 MB for validation while training, 1.0 MB for the test" in text
    assert f"{create_model('longnet_lm_tiny').num_params():,} parameters" in text
    assert "| 64 | 3.500 ± 0.010 | 1.500 ± 0.010 | 8.125 ± 0.010 |" in text
    assert "    python -m benchmarks.pretrained\n" in text


def test_card_compares_with_dense_attention_once_that_is_trained():
    document = document_of(1.5, 1.25)
    for context, bits in ((16, 2.75), (64, 1.75)):
        cell = {"way": "dense", "context": context, "bits_per_byte": bits}
        document["cells"].append({"standard_error": 0.01, "num_bytes": 1e6, **cell})
    text = model_card.card(document, run_of(30, 2e6, "A"), run_of(7, 5e5, "A"))
    assert "2.50e+14 FLOPs read 0.5 million bytes in 7 steps, with a context of up to 64" in text
    assert ": 2.750 at 16 bytes, 1.750 at 64, which is 0.250 more than dilated." in text
