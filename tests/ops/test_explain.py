import inspect

import pytest
import torch

import longnet_zoo as lz
from longnet_zoo.ops import BackendReport
from longnet_zoo.ops.kernels import KERNELS, preference

PATTERN = lz.DilatedPattern(segment_lengths=(4, 8), dilation_rates=(1, 2))


@pytest.fixture(autouse=True)
def order_by_design(monkeypatch, tmp_path):
    (tmp_path / "preference.json").write_text("[]")
    monkeypatch.setattr(preference, "PREFERENCE_FILE", tmp_path / "preference.json")


def explain(**options):
    q, k, v = torch.randn(3, 1, 11, 4, 8).unbind(0)
    return lz.explain_backend(q, k, v, PATTERN, **options)


def write_order(folder, **orders):
    rows = [
        {
            "device": "Xeon",
            "capability": None,
            "dtype": "float32",
            "head_dim": 64,
            "pass": passed,
            "backend": name,
            "ms": ms,
        }
        for passed, names in orders.items()
        for ms, name in enumerate(names, start=1)
    ]
    preference.write_preference(rows, folder / "preference.json")


def test_takes_the_arguments_of_the_op():
    assert (
        inspect.signature(lz.explain_backend).parameters
        == inspect.signature(lz.dilated_attention).parameters
    )


def test_report_of_a_plain_call():
    report = explain()
    assert (report.forward, report.backward) == ("sdpa", "sdpa")
    assert report.reasons.keys() == KERNELS.keys()
    assert list(report.reasons)[:2] == ["sdpa", "math"]
    assert report.reasons["sdpa"] == "runs"
    assert report.reasons["math"] == "can serve, but comes later in the order"
    assert report.reasons["cudnn"] == "needs a CUDA device, got 'cpu'"
    assert report.source == "by design; float32 not measured on cpu"


def test_text_has_one_aligned_line_a_kernel():
    report = BackendReport(
        forward="sdpa",
        backward="math",
        reasons={"sdpa": "forward: runs; backward: no", "efficient": "needs a CUDA device"},
        source="measured on X",
    )
    assert str(report).splitlines() == [
        "sdpa       forward: runs; backward: no",
        "efficient  needs a CUDA device",
        "order: measured on X",
    ]


def test_what_the_kernels_do_not_support_is_named():
    mask = torch.zeros(1, 11, dtype=torch.bool)
    mask[0, 3] = True
    for options, reason in (
        ({"bias": torch.zeros(1, 1, 11, 11)}, "a bias by pairs of positions"),
        ({"bias": lambda distances: torch.zeros(4, len(distances))}, "a bias by distance"),
        ({"key_padding_mask": mask}, "padding before or between tokens"),
        ({"dropout_p": 0.1}, "attention dropout"),
    ):
        report = explain(**options)
        assert (report.forward, report.backward) == ("math", "math")
        assert report.reasons["sdpa"] == f"does not support {reason}"
    assert explain(key_padding_mask=torch.arange(11)[None] > 8).forward == "sdpa"


def test_a_gradient_through_the_lse_has_its_own_kernel():
    report = explain(return_lse=True)
    assert (report.forward, report.backward) == ("sdpa", "math")
    assert report.reasons["sdpa"] == (
        "forward: runs; backward: does not support a gradient through the LSE"
    )
    assert report.reasons["math"] == (
        "forward: can serve, but comes later in the order; backward: runs"
    )


def test_both_passes_draw_dropout_by_one_kernel(monkeypatch, tmp_path):
    # A kernel that draws dropout, is the faster one forward only, and takes no gradient of the LSE.
    refusal = "does not support a gradient through the LSE"
    monkeypatch.setattr(
        KERNELS["sdpa"], "supports", lambda call: refusal if call.has_lse_grad else None
    )
    write_order(tmp_path, forward=("sdpa", "math"), backward=("math", "sdpa"))
    report = explain()
    assert (report.forward, report.backward) == ("sdpa", "math")
    report = explain(dropout_p=0.1)
    assert (report.forward, report.backward) == ("sdpa", "sdpa")
    report = explain(dropout_p=0.1, return_lse=True)
    assert (report.forward, report.backward) == ("math", "math")


def test_a_named_backend():
    report = explain(backend="math")
    assert (report.forward, report.backward) == ("math", "math")
    assert report.reasons["sdpa"] == "can serve, but backend='math' is asked for"
    with pytest.raises(NotImplementedError, match="backend 'cudnn' needs a CUDA device"):
        explain(backend="cudnn")


def test_a_kernel_that_is_never_taken_by_itself(monkeypatch):
    monkeypatch.setattr(KERNELS["cudnn"], "supports", lambda call: None)
    expected = "can serve, but only as backend='cudnn' on this device"
    assert explain().reasons["cudnn"] == expected


def test_passes_may_have_their_own_order(tmp_path):
    write_order(tmp_path, forward=("sdpa", "math"), backward=("math", "sdpa"))
    report = explain()
    assert (report.forward, report.backward) == ("sdpa", "math")
    assert report.source == "forward measured on Xeon; backward measured on Xeon"
    assert report.reasons["math"] == (
        "forward: can serve, but comes later in the order; backward: runs"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "flash9"}, "backend must be one of .*got 'flash9'"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\), got 1.5"),
        ({"key_padding_mask": torch.zeros(1, 9, dtype=torch.bool)}, r"got \(1, 9\)"),
        ({"cu_seqlens": torch.tensor([0, 12], dtype=torch.int32)}, r"seq_len=11, got \[0, 12\]"),
        ({"bias": lambda distances: torch.zeros(3, len(distances))}, r"got \(3, 15\)"),
        ({"xpos_scale_base": 1e-3}, "scale_base"),
    ],
)
def test_refuses_what_the_op_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        explain(**options)


def test_attends_nothing_and_draws_no_random_number(monkeypatch):
    for kernel in KERNELS.values():
        monkeypatch.delattr(kernel, "forward", raising=False)
    state = torch.get_rng_state()
    q = torch.zeros(1, 11, 4, 8)
    lz.explain_backend(q, q, q, PATTERN, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)
