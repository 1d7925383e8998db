"""AdamW or Muon, and a learning rate that warms up and then decays by step.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; timm's implementation) orthogonalizes
the updates of matrices and leaves embeddings and vectors to AdamW. It learns more from few steps.

The schedule is a function of the optimizer step alone, so a resumed run continues on it exactly.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from recipes.muon import Muon

__all__ = [
    "OptimizationConfig",
    "WarmupDecay",
    "decay_groups",
    "layer_decay_groups",
    "learning_rate_factor",
    "muon_groups",
    "total_grad_norm",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Settings of the optimizer and of its learning rate.

    Attributes:
        optimizer: "adamw" or "muon".
        muon_adamw_lr_scale: What Muon leaves to AdamW learns at `lr` times this; None means 0.5.
            For "muon" only.
        lr: Highest learning rate, reached at the end of the warm-up.
        layer_decay: Each block learns at this times the rate of the block behind it, and the head
            at `lr`; 1 for the same rate everywhere. For "adamw" only.
        weight_decay: Decoupled weight decay of the matrices; vectors (biases, gains) get none.
        betas: AdamW's averaging factors of the gradient and of its square.
        eps: Term against division by zero.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        decay: Shape of the descent after the warm-up.
        decay_power: Exponent of the polynomial decay; 1 is a straight line.
        decay_start: Optimizer step until which `lr` is held after the warm-up; None begins the
            descent at once. A run that holds it can be made longer, and decay when it has learnt
            enough (Hu et al., arXiv 2404.06395).
        decay_steps: Optimizer step at which the descent ends, warm-up included; None means the
            length of the run.
        final_lr_factor: Part of `lr` that is left at the end, between 0 and 1.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_adamw_lr_scale: float | None = None
    lr: float = 1e-3
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup_steps: int = 0
    decay: Literal["polynomial", "cosine"] = "polynomial"
    decay_power: float = 1.0
    decay_start: int | None = None
    decay_steps: int | None = None
    final_lr_factor: float = 0.0

    def __post_init__(self) -> None:
        _require(
            self.optimizer in ("adamw", "muon"),
            "optimizer must be 'adamw' or 'muon'",
            optimizer=self.optimizer,
        )
        self._check_muon()
        _require(self.lr > 0, "lr must be positive", lr=self.lr)
        _require(
            0 < self.layer_decay <= 1, "layer_decay must be in (0, 1]", layer_decay=self.layer_decay
        )
        _require(
            self.weight_decay >= 0, "weight_decay must be 0 or more", weight_decay=self.weight_decay
        )
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas must be two numbers in [0, 1)",
            betas=tuple(self.betas),
        )
        _require(self.eps > 0, "eps must be positive", eps=self.eps)
        _require(
            self.warmup_steps >= 0, "warmup_steps must be 0 or more", warmup_steps=self.warmup_steps
        )
        _require(
            self.decay in ("polynomial", "cosine"),
            "decay must be 'polynomial' or 'cosine'",
            decay=self.decay,
        )
        _require(self.decay_power > 0, "decay_power must be positive", decay_power=self.decay_power)
        _require(
            0 <= self.final_lr_factor <= 1,
            "final_lr_factor must be in [0, 1]",
            final_lr_factor=self.final_lr_factor,
        )
        _require(
            self.decay_start is None or self.decay_start >= self.warmup_steps,
            "decay_start must be warmup_steps or more",
            decay_start=self.decay_start,
            warmup_steps=self.warmup_steps,
        )
        _require(
            self.decay_steps is None or self.decay_steps > self.decay_begin,
            "decay_steps must be greater than warmup_steps and decay_start",
            decay_steps=self.decay_steps,
            warmup_steps=self.warmup_steps,
            decay_start=self.decay_start,
        )

    @property
    def decay_begin(self) -> int:
        """Optimizer step at which the descent begins."""
        return self.warmup_steps if self.decay_start is None else self.decay_start

    def _check_muon(self) -> None:
        is_muon, scale = self.optimizer == "muon", self.muon_adamw_lr_scale
        _require(
            scale is None or is_muon,
            "muon_adamw_lr_scale is for optimizer='muon'",
            optimizer=self.optimizer,
            muon_adamw_lr_scale=scale,
        )
        _require(
            scale is None or scale > 0,
            "muon_adamw_lr_scale must be positive",
            muon_adamw_lr_scale=scale,
        )
        _require(
            self.layer_decay == 1 or not is_muon,
            "layer_decay is for optimizer='adamw'",
            optimizer=self.optimizer,
            layer_decay=self.layer_decay,
        )

    @classmethod
    def of(cls, options: "OptimizationConfig | Mapping[str, Any]") -> "OptimizationConfig":
        """Returns the settings, which a checkpoint holds as a dict."""
        return options if isinstance(options, cls) else cls(**options)

    def check_resumed(self, saved: "OptimizationConfig | Mapping[str, Any]") -> None:
        """Refuses to go on with the state of an optimizer of another kind.

        Args:
            saved: Settings of the run that wrote the checkpoint.

        Raises:
            ValueError: The optimizer is another one, or only one of the two has layer decay.
        """
        old = self.of(saved)
        for name, is_other in (
            ("optimizer", self.optimizer != old.optimizer),
            ("layer_decay", (self.layer_decay < 1) != (old.layer_decay < 1)),
        ):
            if is_other:
                now, then = getattr(self, name), getattr(old, name)
                raise ValueError(
                    "a run resumes with the kind of optimizer that it began with, got "
                    f"model.optimization.{name}={now!r} and a checkpoint of {name}={then!r}. Pass "
                    f"--model.optimization.{name} {then}, or start anew without ckpt_path."
                )

    def build(self, model: nn.Module, *, run_steps: float) -> dict[str, Any]:
        """Makes what `LightningModule.configure_optimizers` returns.

        Args:
            model: The model to train; its `no_weight_decay()`, where it has one, names parameters
                that get no weight decay.
            run_steps: Optimizer steps of the run, `inf` where only time ends it; taken where
                `decay_steps` is None.

        Returns:
            Optimizer and schedule.

        Raises:
            ValueError: Neither the decay nor the run has an end.
        """
        total_steps = run_steps if self.decay_steps is None else self.decay_steps
        if math.isinf(total_steps):
            raise ValueError(
                "the decay of the learning rate needs an end, got decay_steps=None and a run "
                "without a number of steps. Set optimization.decay_steps or trainer.max_steps."
            )
        optimizer = self._make_optimizer(model)
        schedule = WarmupDecay(optimizer, config=self, total_steps=int(total_steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def _make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            if self.layer_decay == 1:
                groups = decay_groups(model, self.weight_decay)
            else:
                groups = layer_decay_groups(model, config=self)
            return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)
        return Muon(
            muon_groups(model, self.weight_decay),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fallback_lr_scale=0.5 if self.muon_adamw_lr_scale is None else self.muon_adamw_lr_scale,
        )


def learning_rate_factor(step: int, *, config: OptimizationConfig, total_steps: int) -> float:
    """Returns the part of `config.lr` that optimizer step `step` (from 0) uses.

    It is (step + 1) / warmup_steps while that is below 1, and 1 until `decay_start`. With begin the
    end of that, p = (step - begin) / (total_steps - begin) and f = `final_lr_factor` it is then
    f + (1 - f) (1 - p)**decay_power or f + (1 - f) (1 + cos(pi p)) / 2; from `total_steps` on f.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    # A quick try may be shorter than the warm-up.
    progress = (step - config.decay_begin) / max(1, total_steps - config.decay_begin)
    progress = min(1.0, max(0.0, progress))
    if config.decay == "cosine":
        left = (1 + math.cos(math.pi * progress)) / 2
    else:
        left = (1 - progress) ** config.decay_power
    return config.final_lr_factor + (1 - config.final_lr_factor) * left


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters into those with and those without weight decay.

    Matrices decay; vectors (biases, norms) and the names in `model.no_weight_decay()` do not.
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and name not in exempt].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Adds to `decay_groups` which parameters Muon leaves to AdamW: embeddings, and no matrices."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    matrices, others = decay_groups(model, weight_decay)
    # Position tables and class tokens, which a model exempts from weight decay, are no matrices.
    groups = [{**others, "use_fallback": True}]
    for is_fallback in (True, False):
        parameters = [p for p in matrices["params"] if (id(p) in embeddings) == is_fallback]
        groups.insert(0, {**matrices, "params": parameters, "use_fallback": is_fallback})
    return [group for group in groups if group["params"]]


def layer_decay_groups(model: nn.Module, *, config: OptimizationConfig) -> list[dict[str, Any]]:
    """Splits the trainable parameters by block and weight decay, each with its learning rate.

    Args:
        model: Its `group_matcher()`, in timm's form, tells the blocks from front to head.
        config: The settings.

    Returns:
        The groups; what lies d blocks before the head learns at `lr * layer_decay**d`.

    Raises:
        ValueError: The model does not say which block a parameter belongs to.
    """
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            "layer_decay below 1 needs a model with group_matcher(), got "
            f"layer_decay={config.layer_decay} and {type(model).__name__}. Pass layer_decay=1.0."
        )
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups = param_groups_layer_decay(
        model,
        weight_decay=config.weight_decay,
        no_weight_decay_list=exempt,
        layer_decay=config.layer_decay,
    )
    return [{"lr": config.lr * group.pop("lr_scale"), **group} for group in groups]


def total_grad_norm(model: nn.Module) -> Tensor:
    """Returns the norm of all gradients together, of all processes' shares where there are any."""
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    )
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class WarmupDecay(LambdaLR):
    """Warm-up and decay whose settings, and the optimizer's, survive a restored checkpoint.

    A checkpoint brings back learning rate, betas and weight decay of the run that wrote it. Only
    its position counts here: what the configuration says now goes before.

    Args:
        optimizer: A new optimizer, before a checkpoint is loaded into it.
        config: The settings.
        total_steps: Optimizer step at which the decay ends.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, config: OptimizationConfig, total_steps: int
    ) -> None:
        self._settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        super().__init__(
            optimizer,
            lambda step: learning_rate_factor(step, config=config, total_steps=total_steps),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the schedule."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the position, and puts the current settings back into the optimizer."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        for group, settings, base_lr, factor in zip(
            self.optimizer.param_groups,
            self._settings,
            self.base_lrs,
            self.lr_lambdas,
            strict=True,
        ):
            group.update(settings)
            group["initial_lr"] = base_lr
            group["lr"] = base_lr * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _require(holds: bool, rule: str, **values: Any) -> None:
    """Raises a ValueError that states the rule and the values got."""
    if not holds:
        got = ", ".join(f"{name}={value}" for name, value in values.items())
        raise ValueError(f"{rule}, got {got}.")
