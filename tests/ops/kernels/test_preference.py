import json

import pytest
import torch

from longnet_zoo.ops.kernels import BACKENDS, Call, preference, preferred
from longnet_zoo.ops.kernels.preference import (
    PREFERENCE_FILE,
    preference_from_rows,
    write_preference,
)


def row(backend, ms, **changes):
    fields = {
        "device": "NVIDIA H200",
        "capability": [9, 0],
        "dtype": "bfloat16",
        "head_dim": 64,
        "pass": "forward",
    }
    return {**fields, "backend": backend, "ms": ms, **changes}


def call(device_type="cuda", dtype=torch.float16, capability=(9, 0), **changes):
    fields = {"device_type": device_type, "dtype": dtype, "capability": capability}
    return Call(head_dim=64, **fields, **changes)


@pytest.fixture
def table(monkeypatch, tmp_path):
    file = tmp_path / "preference.json"
    file.write_text("[]")
    monkeypatch.setattr(preference, "PREFERENCE_FILE", file)
    yield file
    preference._measured.cache_clear()


def test_kernels_are_ranked_by_their_mean_relative_time():
    rows = [
        row("cudnn", 1.0),
        row("triton", 1.5),
        row("sdpa", 3.0),
        row("efficient", 4.0),  # not at head_dim 128, where all take longer
        row("cudnn", 40.0, head_dim=128),  # 4 times the best: 2 on the whole
        row("triton", 10.0, head_dim=128),
        row("sdpa", 20.0, head_dim=128),
        row("math", 100.0, head_dim=128),
    ]
    (found,) = preference_from_rows(rows)
    assert found == {
        "device": "sm_90",
        "dtype": "half",
        "pass": "forward",
        "order": ["triton", "cudnn", "sdpa", "efficient", "math"],
        "source": "measured on NVIDIA H200",
    }


def test_rows_are_told_apart_by_device_dtype_and_pass():
    cpu = {"device": "Xeon", "capability": None, "dtype": "float32", "date": "2026-11-02"}
    rows = [
        row("sdpa", 1.0),
        row("sdpa", 1.0, dtype="float16", device="NVIDIA H100"),
        row("efficient", 1.0, dtype="float32"),
        row("sdpa", 1.0, **{"pass": "backward"}),
        row("math", 3.0, **cpu),
        row("sdpa", 2.0, **cpu),
        row("sdpa", 4.0, **cpu),  # geometric mean 2.83, before math
    ]
    found = {
        (x["device"], x["dtype"], x["pass"]): (x["order"], x["source"])
        for x in preference_from_rows(rows)
    }
    assert found == {
        ("cpu", "float32", "forward"): (["sdpa", "math"], "measured on Xeon, 2026-11-02"),
        ("sm_90", "half", "forward"): (["sdpa"], "measured on NVIDIA H100; NVIDIA H200"),
        ("sm_90", "half", "backward"): (["sdpa"], "measured on NVIDIA H200"),
        ("sm_90", "float32", "forward"): (["efficient"], "measured on NVIDIA H200"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pass": "both"}, r"pass must be one of \('forward', 'backward'\).*got 'both' and 1.0"),
        ({"ms": 0.0}, "ms positive, got 'forward' and 0.0"),
        ({"dtype": "bf16"}, "dtype must name a dtype of torch, got 'bf16'"),
    ],
)
def test_rows_that_say_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        preference_from_rows([{**row("sdpa", 1.0), **changes}])


def test_what_was_measured_beats_the_design(table):
    design, source = preferred(call())
    assert design[:3] == ("flash3", "flash4", "cudnn")
    assert source == "by design; half not measured on sm_90"
    write_preference([row("triton", 1.0), row("cudnn", 2.0), row("math", 9.0)], table)
    order, source = preferred(call())
    # What was not measured comes before `math`, which serves everything and so hides what follows.
    rest = ("flash3", "flash4", "flash2", "sdpa", "efficient")
    assert order == ("triton", "cudnn", *rest, "math")
    assert source == "measured on NVIDIA H200"
    assert preferred(call(is_backward=True)).order == design
    assert preferred(call(dtype=torch.float32)).order == design


def test_measuring_a_kernel_that_is_never_taken_by_itself_changes_nothing(table):
    cpu = {"device": "Xeon", "capability": None}
    write_preference(
        [row("triton", 0.1, **cpu), row("math", 1, **cpu), row("sdpa", 2, **cpu)], table
    )
    assert preferred(call("cpu", capability=None)).order == ("math", "sdpa")


def test_writing_keeps_what_was_measured_elsewhere(table):
    write_preference([row("sdpa", 1.0), row("cudnn", 2.0)], table)
    write_preference([row("sdpa", 1.0, capability=[8, 0], device="NVIDIA A100")], table)
    write_preference([row("sdpa", 2.0), row("cudnn", 1.0)], table)
    found = [(x["device"], x["order"]) for x in json.loads(table.read_text())]
    assert found == [("sm_80", ["sdpa"]), ("sm_90", ["cudnn", "sdpa"])]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0), None])
def test_design_names_known_kernels_and_ends_with_the_one_that_serves_all(table, capability):
    order = preferred(call(capability=capability)).order
    assert order[-1] == "math"
    assert set(order) - {"triton"} < set(BACKENDS)
    assert preferred(call("mps", capability=None)).order == ("math",)


def test_the_table_of_the_package_is_whole():
    for found in json.loads(PREFERENCE_FILE.read_text(encoding="utf-8")):
        assert set(found["order"]) < set(BACKENDS)
        assert found["source"].startswith("measured on ")
