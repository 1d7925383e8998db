"""Loading weights strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

__all__ = ["head_cure", "load_state_dict"]

# How the names of heads begin, and the options that size them.
_HEADS = {"head", "fc_norm", "classifier"}
_HEAD_OPTIONS = ("num_classes", "num_outputs")
_POSITIONS = "pos_embed"


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, source: str = "the state dict"
) -> None:
    """Loads weights into a model; every key must be there and fit, or nothing is changed.

    Args:
        model: The model.
        state_dict: Tensors by name.
        source: What to call the state dict in an error.

    Raises:
        ValueError: If keys are missing, unexpected or of another shape, or a value is no tensor
            with data, not of a floating-point type where the model's is, or not finite; the
            message has all.
    """
    others = sorted(
        str(key)
        for key, x in state_dict.items()
        if not (isinstance(key, str) and isinstance(x, Tensor) and not x.is_meta)
    )
    if others:
        raise ValueError(
            f"{source} must map names to tensors with data, got something else at "
            f"{', '.join(others)}."
        )
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - wanted.keys())
    misshaped = [
        f"{key}: {tuple(state_dict[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in sorted(wanted.keys() & state_dict.keys())
        if state_dict[key].shape != wanted[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(problems.values()):
        listed = (
            f"{len(keys)} {kind} ({', '.join(keys)})" for kind, keys in problems.items() if keys
        )
        raise ValueError(
            f"{source} does not fit {type(model).__name__}; keys: {'; '.join(listed)}. "
            + _cure(model, state_dict, [*missing, *unexpected, *misshaped])
        )
    _check_types(wanted, state_dict, source)
    _check_finite(state_dict, source)
    model.load_state_dict(dict(state_dict))


def _check_types(
    wanted: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], source: str
) -> None:
    """Refuses what would be cut to fit: torch copies integers and complex numbers in silence."""
    wrong = [
        f"{key}: {x.dtype}"
        for key, x in sorted(state_dict.items())
        if wanted[key].is_floating_point() and not x.is_floating_point()
    ]
    if wrong:
        raise ValueError(
            f"{source} must have floating-point tensors where the model has, got "
            f"{', '.join(wrong)}. Dequantize or cast them on purpose."
        )


def _check_finite(state_dict: Mapping[str, Tensor], source: str) -> None:
    """Refuses what a training that diverged or a damaged file leaves, and all results would be."""
    wrong = sorted(key for key, x in state_dict.items() if not bool(x.isfinite().all()))
    if wrong:
        raise ValueError(
            f"{source} must have finite numbers only, got NaN or infinity in {len(wrong)} tensors "
            f"({', '.join(wrong)}). Take an earlier checkpoint."
        )


def _cure(model: nn.Module, state_dict: Mapping[str, Tensor], keys: Iterable[str]) -> str:
    config = getattr(model, "config", None)
    option = next((name for name in _HEAD_OPTIONS if hasattr(config, name)), None)
    cure = "Create the model with the options that the weights were trained with."
    names = {key.split(":")[0] for key in keys}
    if _POSITIONS in names and hasattr(model, "set_input_size"):
        cure = (
            "The image size differs: create the model with the img_size of the weights, then call "
            "set_input_size(img_size). "
        ) + cure
    if option is None or all(name.split(".")[0] not in _HEADS for name in names):
        return cure
    # The last matrix of a head makes the logits.
    sizes = [
        len(state_dict[key])
        for key in sorted(state_dict)
        if key.split(".")[0] in _HEADS and "head" in key.split(".") and state_dict[key].ndim == 2
    ]
    return f"{head_cure(option, sizes[-1] if sizes else 0)} Other keys: {cure}"


def head_cure(option: str, size: int) -> str:
    """Says how to get a model with a new head from weights with another one."""
    return (
        f"The head differs: create the model with {option}={size} as in the weights, then call "
        "reset_classifier(n) for a new head of n outputs."
    )
