"""The benchmark of branches counts what is attended, checks before it times, and keeps cells."""

import json

import pytest
import torch

from benchmarks import branch_recall, branches
from benchmarks.contenders import PASSES
from benchmarks.tables import TABLES
from longnet_zoo.ops import TokenSubset
from longnet_zoo.ops.reference import dilated_attention_reference

ARGUMENTS = "--seq-lens 96 --recall-len 256 --num-heads 2 --head-dim 16 --block-size 8 --rounds 1"


def run(*extra):
    options = branches.read_options([*ARGUMENTS.split(), "--device", "cpu", *map(str, extra)])
    return branches.main(options)


def small_size():
    return branches.Size(
        seq_len=96,
        num_heads=2,
        head_dim=16,
        block_size=8,
        dtype="float32",
        device=torch.device("cpu"),
    )


def test_every_contender_has_figures(tmp_path, capsys):
    output = tmp_path / "branches.json"
    assert run("--output", output) == 0
    document = json.loads(output.read_text())
    assert document == json.loads(capsys.readouterr().out.splitlines()[-1])
    speed = [cell for cell in document["cells"] if cell["part"] == "speed"]
    names = set(branches.branches_of(small_size()))
    assert {cell["contender"] for cell in speed} == names | {branches.DENSE, branches.MASKED}
    for cell in speed:
        for passed in PASSES:
            figures = cell[passed]
            assert figures["median_ms"] > 0
            assert figures["ratios"].keys() == {"speed_over_dense", "speed_over_masked"}
    dense = speed[0]
    assert dense["pairs"] == 2 * 96 * 97 // 2
    assert all(cell["pairs"] < dense["pairs"] for cell in speed[2:])
    assert dense["forward"]["ratios"]["speed_over_dense"] == 1
    lines = TABLES["branches"](document)
    assert any("| 64 hash buckets |" in line for line in lines)
    assert any("| 2 rounds of 64 hash buckets |" in line for line in lines)
    assert run("--output", output, "--resume") == 0
    assert json.loads(output.read_text())["cells"] == document["cells"]


def test_a_long_sequence_gets_no_mask_of_all_pairs(capsys):
    assert run("--max-mask-len", 95) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    cells = [cell for cell in document["cells"] if cell["part"] == "speed"]
    assert branches.MASKED not in {cell["contender"] for cell in cells}
    assert cells[0]["forward"]["ratios"] == {"speed_over_dense": 1.0}


def test_a_wrong_branch_is_not_timed(monkeypatch, capsys):
    right = branches.attend
    monkeypatch.setattr(branches, "attend", lambda *x, branch: 1.01 * right(*x, branch=branch))
    assert run() == 1
    assert "not timed: wrong: output of blocks, 1/4 of them is off by" in capsys.readouterr().out


@pytest.mark.parametrize("name", branches.branches_of(small_size()))
def test_pairs_are_those_that_the_oracle_sees(name):
    size = small_size()
    branch = branches.branches_of(size)[name]
    q, k = size.draw(), size.draw()
    # With equal logits, exp(LSE) is the number of keys.
    options = {"is_causal": True, "scale": 0.0, "return_lse": True, "extra_branches": (branch,)}
    _, lse = dilated_attention_reference(q, k, k, None, **options)
    assert branches.count_pairs(branch, q, k) == round(lse.exp().sum().item())


def test_mask_of_dense_attention_shows_what_the_branch_shows():
    size = small_size()
    branch = branches.branches_of(size)["blocks, 1/16 of them"]
    q, k, v = (size.draw() for _ in range(3))
    masked = branches.dense(q, k, v, mask=branches.added_mask(size, branch))
    torch.testing.assert_close(masked, branches.attend(q, k, v, branch=branch))
    everything = torch.ones(1, 96, 2, dtype=torch.bool)
    dense = branches.attend(q, k, v, branch=TokenSubset(keys=everything))
    torch.testing.assert_close(branches.dense(q, k, v), dense)


def test_hashes_find_planted_keys_where_fixed_patterns_do_not():
    cells = branch_recall.measure_recall(1024, 2, 64, torch.device("cpu"))
    found = {cell["branches"]: cell for cell in cells}
    fixed = [found["dilated"], found["blocks: window, global, random"]]
    hashed = found["2 rounds of 64 hash buckets"]
    assert hashed["keys_per_query"] < 1.4 * min(cell["keys_per_query"] for cell in fixed)
    assert hashed["planted"] > 0.7
    assert hashed["mass"] > 4 * max(cell["mass"] for cell in fixed)


def test_dense_attention_finds_the_planted_keys():
    q, k, planted = branch_recall.plant(512, 2, 64, torch.device("cpu"))
    assert planted.max() < 128
    logits = torch.einsum("nhd,mhd->hnm", q, k).tril() / 8
    best = logits[:, 256:].argmax(-1)
    assert (best == planted[256:].T).float().mean() > 0.95
