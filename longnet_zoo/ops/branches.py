"""Branches beyond dilation: which keys a query sees by a block mask, by content, or by choice.

Each is one more branch in the softmax of `dilated_attention`: a key that several branches reach
counts once for each. Causal attention hides the keys behind the query, whatever the branch.

Shape legend: b batch, n seq_len, h num_heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .pattern import check_seq_len
from .seeded import draw_blocks

__all__ = [
    "BigBirdBlocks",
    "BlockSparse",
    "ConfiguredBranch",
    "ExtraBranch",
    "HashBuckets",
    "TokenSubset",
    "make_branches",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSparse:
    """Query i sees key j iff `block_mask[i // block_size, j // block_size]`.

    Attributes:
        block_mask: Bool, (num_blocks, num_blocks), or (num_heads, num_blocks, num_blocks) for masks
            by head. It may be larger than a sequence, whose last block may be short.
        block_size: Tokens per block.

    Raises:
        TypeError: If the mask is not bool, or the size no integer.
        ValueError: If the mask is not square, or the size is below 1.

    Example:
        >>> branch = BlockSparse(block_mask=torch.eye(8, dtype=torch.bool), block_size=64)
    """

    block_mask: Tensor
    block_size: int

    def __post_init__(self) -> None:
        _check_integers(self, "block_size", minimum=1)
        _check_bool("block_mask", self.block_mask)
        shape = tuple(self.block_mask.shape)
        if len(shape) not in (2, 3) or shape[-1] != shape[-2] or 0 in shape:
            raise ValueError(
                "block_mask must be (num_blocks, num_blocks) or (num_heads, num_blocks, "
                f"num_blocks), got {shape}."
            )

    def check_fits(self, seq_len: int, num_heads: int) -> None:
        """Refuses sequences that the mask does not cover, and other heads.

        Raises:
            ValueError: If it does not fit.
        """
        shape = tuple(self.block_mask.shape)
        if shape[-1] * self.block_size < seq_len:
            raise ValueError(
                f"block_mask must cover seq_len={seq_len}, got {shape[-1]} blocks of "
                f"{self.block_size} tokens. It needs {-(-seq_len // self.block_size)} blocks."
            )
        if len(shape) == 3 and shape[0] != num_heads:
            raise ValueError(
                f"block_mask must have one mask or one for each of {num_heads} heads, got {shape}."
            )

    def attended_pairs(self, seq_len: int, num_heads: int, *, is_causal: bool = False) -> int:
        """Counts the (query, key) pairs of all heads.

        Raises:
            ValueError: If `seq_len` is below 1, or the mask is too small or has other heads.
        """
        check_seq_len(seq_len)
        num_blocks = -(-seq_len // self.block_size)
        self.check_fits(seq_len, num_heads)
        mask = self.block_mask[..., :num_blocks, :num_blocks]
        queries, keys = mask.nonzero().T[-2:].cpu()
        pairs = _count_pairs(queries, keys, self.block_size, seq_len, is_causal=is_causal)
        return pairs * (num_heads if mask.ndim == 2 else 1)


@dataclass(frozen=True, kw_only=True)
class BigBirdBlocks:
    """Block masks for sequences of any length: a window, global blocks and random ones.

    The rule of BigBird (arXiv 2007.14062); without random blocks that of Longformer
    (arXiv 2004.05150). All heads share the mask, and the mask of a sequence is the corner of that
    of a longer one: a random block lies before its query, or behind it if that block drew it. Time
    and memory grow linearly with the sequence, for what is computed and for what is planned. The
    layers of a stack draw different random blocks, see `for_layer`.

    Attributes:
        block_size: Tokens per block.
        num_window: Blocks on either side, beside its own, that a query sees.
        num_global: First blocks, which all queries see and which see all keys.
        num_random: Blocks that each block draws among the earlier ones.
        seed: Seed of the draws.
        kind: `"big_bird"`, by which configs name the class.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is out of range.
    """

    block_size: int = 64
    num_window: int = 1
    num_global: int = 1
    num_random: int = 2
    seed: int = 0
    kind: Literal["big_bird"] = "big_bird"

    def __post_init__(self) -> None:
        _check_integers(self, "block_size", minimum=1)
        _check_integers(self, "num_window", "num_global", "num_random", "seed", minimum=0)
        _check_kind(self, "big_bird")

    def for_length(self, seq_len: int, device: torch.device | str = "cpu") -> BlockSparse:
        """Makes the branch for sequences of up to `seq_len` tokens."""
        num_blocks = -(-seq_len // self.block_size)
        mask = torch.zeros(num_blocks, num_blocks, dtype=torch.bool, device=device)
        mask[tuple(self.block_pairs(num_blocks).to(device))] = True
        return BlockSparse(block_mask=mask, block_size=self.block_size)

    def block_pairs(self, num_blocks: int) -> Tensor:
        """Lists which block sees which, without a mask of all pairs.

        Args:
            num_blocks: Blocks of the sequence.

        Returns:
            Numbers of query and key blocks, int64 (2, num_pairs) on the CPU, each pair once, sorted
            by query and then by key.
        """
        blocks = torch.arange(num_blocks, device="cpu")
        reach = min(self.num_window, num_blocks)
        near = blocks[:, None] + torch.arange(-reach, reach + 1, device="cpu")
        near = near.where((near >= 0) & (near < num_blocks), blocks[:, None])
        first = blocks[: self.num_global].expand(num_blocks, -1)
        drawn = draw_blocks(num_blocks, self.num_random, self.seed)
        back = torch.cat([first, drawn], dim=1)
        queries, keys = (blocks[:, None].expand_as(back), back)
        one_way = blocks[:, None] * num_blocks + near
        both_ways = [queries * num_blocks + keys, keys * num_blocks + queries]
        found = torch.cat([x.flatten() for x in (one_way, *both_ways)]).unique()
        return torch.stack([found // num_blocks, found % num_blocks])

    def for_layer(self, layer: int) -> BigBirdBlocks:
        """Makes the branch of a layer of a stack, counted from 0, with random blocks of its own."""
        return replace(self, seed=_seed_of_layer(self.seed, layer))

    def attended_pairs(self, seq_len: int, num_heads: int, *, is_causal: bool = False) -> int:
        """Counts the (query, key) pairs of all heads.

        Raises:
            ValueError: If `seq_len` is below 1.
        """
        check_seq_len(seq_len)
        queries, keys = self.block_pairs(-(-seq_len // self.block_size))
        pairs = _count_pairs(queries, keys, self.block_size, seq_len, is_causal=is_causal)
        return num_heads * pairs


@dataclass(frozen=True, kw_only=True)
class HashBuckets:
    """Query i sees key j iff their hashes are equal: attention between similar vectors.

    The hash of a vector x is the place of the largest entry of (x R, -x R), for a matrix R of
    num_buckets / 2 columns in random directions, drawn for each key head and round (cross-polytope
    hashing of Andoni et al., arXiv 1509.02897). The length of x does not matter, and vectors at a
    small angle mostly share a bucket. It hashes q and k as the op gets them, rotated by their
    positions where the layer does so, and passes no gradient. The layers of a stack hash by
    different matrices, see `for_layer`.

    Packed sequences have buckets of their own, and a bucket takes up tiles of at least 8 tokens:
    take fewer buckets than most sequences have tokens.

    Attributes:
        num_buckets: Buckets of each round, an even number.
        num_rounds: Independent hashes. Each is a branch of its own.
        seed: Seed of the matrices.
        kind: `"hash_buckets"`, by which configs name the class.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is out of range.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4096, 8, 64).unbind(0)
        >>> branches = (HashBuckets(num_buckets=32, num_rounds=2),)
        >>> out = dilated_attention(q, k, v, None, is_causal=True, extra_branches=branches)
    """

    num_buckets: int
    num_rounds: int = 1
    seed: int = 0
    kind: Literal["hash_buckets"] = "hash_buckets"

    def __post_init__(self) -> None:
        _check_integers(self, "num_buckets", minimum=2)
        _check_integers(self, "num_rounds", minimum=1)
        _check_integers(self, "seed", minimum=0)
        _check_kind(self, "hash_buckets")
        if self.num_buckets % 2:
            raise ValueError(f"num_buckets must be even, got {self.num_buckets}.")

    def for_layer(self, layer: int) -> HashBuckets:
        """Makes the branch of a layer of a stack, counted from 0, with matrices of its own."""
        return replace(self, seed=_seed_of_layer(self.seed, layer))

    def attended_pairs(self, seq_len: int, num_heads: int, *, is_causal: bool = False) -> int:
        """Estimates the (query, key) pairs of all heads, as if tokens filled buckets evenly.

        Raises:
            ValueError: If `seq_len` is below 1.
        """
        check_seq_len(seq_len)
        pairs = seq_len * (seq_len + 1) // 2 if is_causal else seq_len**2
        return num_heads * self.num_rounds * -(-pairs // self.num_buckets)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSubset:
    """Some queries see some keys; the others take no part in this branch (query/key dropping).

    As in dynamic sparse flash attention (Pagliardini et al., arXiv 2306.01160). In causal attention
    whether a token is kept must not depend on later tokens, or the future leaks.

    Attributes:
        queries: Bool, (batch, seq_len, num_heads), True at queries that take part; None: all.
        keys: Bool, (batch, seq_len, num_heads), True at keys that the queries of this head may see;
            None: all.

    Raises:
        TypeError: If a mask is not a bool tensor.
        ValueError: If there is no mask at all.

    Example:
        >>> branch = TokenSubset(keys=torch.rand(1, 4096, 8) < 0.25)
    """

    queries: Tensor | None = None
    keys: Tensor | None = None

    def __post_init__(self) -> None:
        if self.queries is None and self.keys is None:
            raise ValueError(
                "TokenSubset needs a mask of queries or of keys, got None and None. For dense "
                "attention use DilatedPattern(segment_lengths=(2**30,), dilation_rates=(1,))."
            )
        for name, mask in (("queries", self.queries), ("keys", self.keys)):
            if mask is not None:
                _check_bool(name, mask)


ConfiguredBranch = BigBirdBlocks | HashBuckets
ExtraBranch = BlockSparse | TokenSubset | ConfiguredBranch
_CONFIGURED = {"big_bird": BigBirdBlocks, "hash_buckets": HashBuckets}


def make_branches(options: object) -> tuple[ConfiguredBranch, ...]:
    """Makes the branches of a config of what YAML and JSON keep of them.

    Args:
        options: A sequence of branches, or of mappings of their fields, `kind` included.

    Raises:
        TypeError: If it is something else, or a field is unknown.
        ValueError: If the kind is unknown, or a value is out of range.
    """
    if not isinstance(options, (tuple, list)):
        raise TypeError(f"extra_branches must be a tuple of branches, got {options!r}.")
    return tuple(_make_branch(option) for option in options)


def _make_branch(option: object) -> ConfiguredBranch:
    if isinstance(option, ConfiguredBranch):
        return option
    kind = option.get("kind") if isinstance(option, Mapping) else None
    if not isinstance(kind, str) or kind not in _CONFIGURED:
        got = f"kind={kind!r}" if isinstance(option, Mapping) else type(option).__name__
        raise TypeError(
            "extra_branches of a layer or config must be BigBirdBlocks or HashBuckets, or mappings "
            f"with a kind among {tuple(_CONFIGURED)}, got {got}."
        )
    assert isinstance(option, Mapping)
    branch_class = _CONFIGURED[kind]
    known = [field.name for field in fields(branch_class)]
    unknown = [name for name in option if name not in known]
    if unknown:
        raise TypeError(f"{kind} has no fields {unknown}, it has {known}.")
    return branch_class(**option)


def _seed_of_layer(seed: int, layer: int) -> int:
    """Draws the seed of a layer; layer 0 has that of the config.

    Not seed + layer, which other branches may have. PyTorch's generator on a CPU reads the lower 32
    bits alone, and an odd stride gives every layer others.
    """
    return (seed + 0x9E3779B9 * layer) % 2**63


def _count_pairs(
    queries: Tensor, keys: Tensor, block_size: int, seq_len: int, *, is_causal: bool
) -> int:
    """Counts the tokens that see each other in pairs of blocks, (num_pairs,) each."""
    sizes = [(seq_len - block * block_size).clamp_max(block_size) for block in (queries, keys)]
    pairs = sizes[0] * sizes[1]
    if is_causal:
        diagonal = sizes[0] * (sizes[0] + 1) // 2
        pairs = torch.where(keys < queries, pairs, torch.where(keys == queries, diagonal, 0))
    return int(pairs.sum())


def _check_integers(branch: Any, *names: str, minimum: int) -> None:
    for name in names:
        value = getattr(branch, name)
        if type(value) is not int:
            raise TypeError(f"{name} must be an integer, got {value!r}.")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")
        if value >= 2**63:
            raise ValueError(f"{name} must be below 2**63, got {value}.")


def _check_bool(name: str, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, got {kind}.")


def _check_kind(branch: Any, kind: str) -> None:
    if branch.kind != kind:
        raise ValueError(
            f"kind of a {type(branch).__name__} must be {kind!r}, got {branch.kind!r}."
        )
