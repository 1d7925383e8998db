"""What retrieval is judged by, and what it is compared with: chance, and a bag of pixels.

Shapes: n pairs, d channels of a feature, v words.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_zoo.ops.retrieval import retrieval_metrics
from recipes.image_text_loader import NO_PAIR

__all__ = [
    "KS",
    "BagOfPixels",
    "Gallery",
    "chance_scores",
    "embed_bag_of_pixels",
    "retrieval_scores",
]

KS = (1, 5, 10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
    """Features of held-out pairs, of length 1, and what belongs together.

    Attributes:
        image_features: (n, d).
        text_features: (n, d).
        image_ids: Which images are the same, (n,).
        text_ids: Which captions are the same, (n,).
        labels: Class of each pair, (n,).
    """

    image_features: Tensor
    text_features: Tensor
    image_ids: Tensor
    text_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.image_ids)

    def pairs(self) -> "Gallery":
        """Returns the pairs without those that only stand in for missing ones."""
        is_pair = self.image_ids != NO_PAIR
        return Gallery(
            **{field.name: getattr(self, field.name)[is_pair] for field in dataclasses.fields(self)}
        )

    def keys(self, rows: Tensor) -> list[tuple[int, int]]:
        """Returns image and text id of some pairs, which name them on all processes.

        Args:
            rows: Numbers of pairs, (number,).
        """
        ids = torch.stack([self.image_ids[rows], self.text_ids[rows]], dim=1)
        return [(image, text) for image, text in ids.tolist()]

    def sample(self, number: int) -> Tensor:
        """Returns the numbers of pairs with different captions, by hash and so always the same.

        Args:
            number: How many at most.
        """
        chosen = {text: row for row, text in reversed(list(enumerate(self.text_ids.tolist())))}
        rows = [chosen[text] for text in sorted(chosen)[:number]]
        return torch.tensor(rows, dtype=torch.int64, device=self.text_ids.device)

    @property
    def similarity(self) -> Tensor:
        """Cosine of each image (rows) and each text, (n, n)."""
        return self.image_features.float() @ self.text_features.float().T

    @property
    def positives(self) -> Tensor:
        """Which of them belong together, bool (n, n): all with the same image or caption."""
        same_image = self.image_ids[:, None] == self.image_ids
        return same_image | (self.text_ids[:, None] == self.text_ids)


def retrieval_scores(similarity: Tensor, positives: Tensor) -> dict[str, float]:
    """Returns recall and median rank in both directions, and the mean recall of the two.

    Args:
        similarity: Of images (rows) and texts, (n, n).
        positives: Which belong together, bool (n, n).
    """
    found = retrieval_metrics(similarity, positives, KS)
    scores = {name.replace("/", "_"): value for name, value in found.items()}
    return scores | _means(scores)


def chance_scores(positives: Tensor) -> dict[str, float]:
    """Returns the recall that an order drawn at random has on average.

    A query with p right ones among n misses with k tries with probability
    prod_{i < k} (n - p - i) / (n - i).

    Args:
        positives: Which belong together, bool (n, n).
    """
    scores: dict[str, float] = {}
    for direction, right in (("image_to_text", positives), ("text_to_image", positives.T)):
        number, counts = right.shape[1], right.sum(1).double()
        missed = torch.ones_like(counts)
        for k in range(1, max(KS) + 1):
            tried = k - 1
            missed = missed * ((number - counts - tried) / max(1, number - tried)).clamp(min=0)
            if k in KS:
                scores[f"{direction}_recall@{k}"] = float((1 - missed).mean())
    return scores | _means(scores)


class BagOfPixels:
    """Words of a caption by ridge regression from a small grey image; no neural network.

    A caption is its set of words, each weighed by log(pairs / pairs with it), and scaled to length
    1. Images and captions are compared by the cosine of these vectors.

    Args:
        batches: Training pairs.
        side: Pixels of a side of the small image.
        ridge: Penalty on the squared weights, as a share of the pixels' mean sum of squares.
    """

    def __init__(
        self, batches: Iterable[dict[str, Any]], *, side: int = 16, ridge: float = 0.03
    ) -> None:
        self._side = side
        pixels, captions = [], []
        for batch in batches:
            is_pair = batch["image_ids"] != NO_PAIR
            pixels.append(self._pixels(batch["images"][is_pair]))
            captions += [
                caption
                for caption, is_one in zip(batch["captions"], is_pair.tolist(), strict=True)
                if is_one
            ]
        counts = collections.Counter(word for text in captions for word in set(text.split()))
        self._words = {word: number for number, word in enumerate(sorted(counts))}
        frequencies = torch.tensor([counts[word] for word in self._words], dtype=torch.float32)
        self._idf = torch.log(len(captions) / frequencies)
        x, y = torch.cat(pixels), self.texts(captions)
        self._x_mean, self._y_mean = x.mean(0), y.mean(0)
        x, y = x - self._x_mean, y - self._y_mean
        gram = x.T @ x
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
        self._weights = torch.linalg.solve(gram, x.T @ y)

    def images(self, images: Tensor) -> Tensor:
        """Returns the words that images should have, (n, v), of length 1.

        Args:
            images: Normalised images, (n, 3, height, width).
        """
        words = (self._pixels(images) - self._x_mean) @ self._weights + self._y_mean
        return F.normalize(words, dim=1)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Returns the words of captions, (n, v), of length 1; unknown ones count for nothing."""
        words = torch.zeros(len(captions), len(self._words))
        for row, caption in zip(words, captions, strict=True):
            row[[self._words[word] for word in caption.split() if word in self._words]] = 1
        return F.normalize(words * self._idf, dim=1)

    def _pixels(self, images: Tensor) -> Tensor:
        grey = images.float().cpu().mean(1, keepdim=True)
        return F.adaptive_avg_pool2d(grey, self._side).flatten(1)


def embed_bag_of_pixels(bag: BagOfPixels, batches: Iterable[dict[str, Any]]) -> Gallery:
    """Returns the held-out pairs as the bag of pixels sees them.

    Args:
        bag: The baseline.
        batches: Held-out pairs.
    """
    parts = [
        {
            "image_features": bag.images(batch["images"]),
            "text_features": bag.texts(batch["captions"]),
            **{name: batch[name] for name in ("image_ids", "text_ids", "labels")},
        }
        for batch in batches
    ]
    return Gallery(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}).pairs()


def _means(scores: dict[str, float]) -> dict[str, float]:
    directions = ("image_to_text", "text_to_image")
    return {
        f"recall@{k}": sum(scores[f"{name}_recall@{k}"] for name in directions) / len(directions)
        for k in KS
    }
