import json

import pytest
import torch

from benchmarks import slide_encoder
from benchmarks.measure import finish, largest_excess, peak_extra_mib
from benchmarks.pipelines import released_pipeline, usual_pipeline
from longnet_zoo.ops import DilatedPattern
from longnet_zoo.ops.reference import dilated_attention_reference


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("head_offset", ["modulo", "block"])
@pytest.mark.parametrize(
    ("seq_len", "num_heads", "segment_lengths", "dilation_rates"),
    [(32, 4, (8, 16), (1, 4)), (53, 5, (7, 16, 100), (1, 3, 2)), (5, 1, (8, 16), (1, 4))],
    ids=["even", "awkward", "short"],
)
def test_pipelines_give_the_right_output(
    seq_len, num_heads, segment_lengths, dilation_rates, head_offset, is_causal
):
    pattern = DilatedPattern(
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        head_offset=head_offset,
        padded_keys="zero",
    )
    q, k, v = torch.randn(3, 2, seq_len, num_heads, 8).unbind(0)
    expected = dilated_attention_reference(q, k, v, pattern, is_causal=is_causal)
    for pipeline in (usual_pipeline, released_pipeline):
        if pipeline is usual_pipeline or head_offset == "block":
            found = pipeline(q, k, v, pattern, is_causal=is_causal).double()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pipeline", [usual_pipeline, released_pipeline])
def test_pipelines_refuse_what_they_would_compute_otherwise(pipeline):
    pattern = DilatedPattern(segment_lengths=(8,), dilation_rates=(1,))
    q = torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match="padded_keys='zero', got 'ignore'"):
        pipeline(q, q, q, pattern, is_causal=False)
    attend = slide_encoder.as_op(pipeline)
    with pytest.raises(NotImplementedError, match="have no dropout_p"):
        attend(q, q, q, pattern, is_causal=True, bias=None, dropout_p=0.5)


def test_released_pipeline_has_its_own_head_offsets_only():
    pattern = DilatedPattern(segment_lengths=(8,), dilation_rates=(2,), padded_keys="zero")
    q = torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match="head_offset='block', got 'modulo'"):
        released_pipeline(q, q, q, pattern)


def test_memory_counts_what_is_held_at_once():
    def run():
        first = torch.ones(2**20)
        second = first + 1
        del first
        return second.sum()

    assert peak_extra_mib(run) == pytest.approx(8, abs=0.01)


def test_an_error_is_measured_in_tolerances():
    expected = torch.tensor([1.0, 100.0])
    error = torch.tensor([0.0, 1e-3])
    assert largest_excess(expected + error, expected, "float32") == pytest.approx(0.1, rel=0.01)
    assert largest_excess(expected + 1, expected, "bfloat16") == pytest.approx(1 / 2.02)
    assert not largest_excess(expected * float("nan"), expected, "float32") <= 1


def test_last_line_is_one_json_document(capsys, tmp_path, monkeypatch):
    output = tmp_path / "cpu.json"
    monkeypatch.setattr("sys.argv", ["benchmarks/slide_encoder.py", "--output", str(output)])
    finish({"ratios": {"a": 1.5}, "output": output}, output)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(output.read_text())
    assert document["ratios"] == {"a": 1.5}
    assert document["environment"]["torch"] == torch.__version__
    expected = "python -m benchmarks.slide_encoder --output benchmarks/results/cpu.json"
    assert document["command"] == expected
    assert str(tmp_path) not in output.read_text()


def test_slide_encoder_is_timed_against_the_usual_pipeline(capsys):
    arguments = ["--num-tiles", "70", "--num-layers", "1", "--rounds", "1", "--num-threads", "1"]
    assert slide_encoder.main(slide_encoder.read_options(arguments)) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["model"] == "gigapath_slide_enc12l768d"
    assert document["timings"].keys() == {"ours", "usual", "released"}
    assert all(ratio > 0 for ratio in document["ratios"].values())
    assert 0 < document["largest_difference"] < 1e-4


def test_a_wrong_slide_encoder_is_not_timed(monkeypatch):
    monkeypatch.setattr(slide_encoder, "released_pipeline", lambda q, *_, **options: q)
    with pytest.raises(AssertionError, match="not close"):
        slide_encoder.measure(num_tiles=70, num_layers=1, rounds=1)
