"""Ranks of right candidates against a plain sort."""

import pytest
import torch

from longnet_zoo.ops.retrieval import positive_ranks, recall_at, retrieval_metrics

from .largest_tensor import LargestTensor


def draw(queries=13, candidates=29):
    """Few different values, so that there are ties; one to several right candidates each."""
    similarity = torch.randint(-3, 4, (queries, candidates)).double()
    positives = torch.rand(queries, candidates) < 0.1
    positives[torch.arange(queries), torch.randint(candidates, (queries,))] = True
    positives[torch.randint(queries, (candidates,)), torch.arange(candidates)] = True
    return similarity, positives


def plain_ranks(similarity, positives):
    """Sorts each row, wrong candidates first where they are as similar as right ones."""
    ranks = []
    for row, right in zip(similarity.tolist(), positives.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        ranks.append(1 + next(place for place, j in enumerate(order) if right[j]))
    return ranks


@pytest.mark.parametrize("chunk_size", [1, 5, 13, 1000])
def test_ranks_are_those_of_a_sort_with_ties_against_the_model(chunk_size):
    similarity, positives = draw()
    ranks = positive_ranks(similarity, positives, chunk_size=chunk_size)
    assert ranks.dtype == torch.int64
    assert ranks.tolist() == plain_ranks(similarity, positives)
    assert len(set(ranks.tolist())) > 2


def test_recall_is_the_share_of_queries_with_a_hit():
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    positives = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]).bool()
    assert recall_at(similarity, positives, (1, 2, 3)) == {1: 0.25, 2: 0.75, 3: 1.0}
    assert list(recall_at(similarity, positives)) == [1, 5, 10]


@pytest.mark.parametrize("constant", [0.5, float("nan"), float("inf"), float("-inf")])
def test_a_collapsed_model_recalls_nothing(constant):
    positives = torch.eye(20).bool()
    found = recall_at(torch.full((20, 20), constant), positives, (1, 19, 20))
    assert found == {1: 0.0, 19: 0.0, 20: 1.0}


def test_nan_counts_against_the_model():
    similarity = torch.tensor([[2.0, float("nan"), 1.0, 0.0], [float("nan"), 1.0, 2.0, 3.0]])
    positives = torch.tensor([[True, False, False, False]] * 2)
    assert positive_ranks(similarity, positives).tolist() == [2, 4]


def test_metrics_look_in_both_directions():
    similarity, positives = draw()
    found = retrieval_metrics(similarity, positives, (1, 5), chunk_size=4)
    for name, rows, right in (
        ("image_to_text", similarity, positives),
        ("text_to_image", similarity.T, positives.T),
    ):
        ranks = torch.tensor(plain_ranks(rows, right)).double()
        assert found[f"{name}/recall@1"] == (ranks <= 1).double().mean()
        assert found[f"{name}/recall@5"] == (ranks <= 5).double().mean()
        assert found[f"{name}/median_rank"] == ranks.quantile(0.5)
    assert len(found) == 6
    assert found["image_to_text/recall@5"] != found["text_to_image/recall@5"]


def test_median_of_an_even_number_lies_between_the_middle_two():
    found = retrieval_metrics(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2).bool())
    assert found["image_to_text/median_rank"] == 1.5
    assert found["text_to_image/median_rank"] == 2.0  # ties


def test_rows_are_compared_in_chunks():
    similarity, positives = draw(queries=40)
    with LargestTensor() as largest:
        positive_ranks(similarity, positives, chunk_size=3)
    assert largest.numel <= 3 * 29


def test_bad_input_is_refused():
    similarity, positives = draw()
    with pytest.raises(TypeError, match=r"got torch.int64 and torch.bool"):
        positive_ranks(similarity.long(), positives)
    with pytest.raises(TypeError, match=r"got torch.float64 and torch.int64"):
        positive_ranks(similarity, positives.long())
    with pytest.raises(ValueError, match=r"got \(13, 29\) and \(29, 13\)"):
        positive_ranks(similarity, positives.T)
    with pytest.raises(ValueError, match=r"got \(0, 29\) and \(0, 29\)"):
        positive_ranks(similarity[:0], positives[:0])
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        positive_ranks(similarity, positives, chunk_size=0)
    with pytest.raises(ValueError, match=r"ks must be numbers of at least 1, got \(1, 0\)"):
        recall_at(similarity, positives, (1, 0))
    with pytest.raises(ValueError, match=r"ks must be numbers of at least 1, got \(\)"):
        recall_at(similarity, positives, ())
    positives[[3, 7]] = False
    with pytest.raises(ValueError, match=r"got none in 2 of 13 rows, the first is row 3"):
        positive_ranks(similarity, positives)
