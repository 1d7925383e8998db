"""What all models share: a config, a stack, counting, and saving to a folder or the Hub."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from longnet_zoo.layers import MemorySaving, Multiway, RelativeBias, TransformerStack

from .config import ModelConfig, ZooConfig

__all__ = ["ZooModel", "config_from_json", "make_stack", "warn_of_other_rules"]

_MODEL_KEY = "model"
ModelT = TypeVar("ModelT", bound="ZooModel")
# Options that trained weights rely on, though no shape shows them. The attention pattern is none of
# them: longer segments are how a model is taken to longer sequences.
_RULES = (
    "activation",
    "eps",
    "final_norm",
    "norm",
    "norm_eps",
    "num_heads",
    "position",
    "relative_max_distance",
    "rotary_base",
    "scale_embedding",
    "xpos_scale_base",
)


class ZooModel(nn.Module, PyTorchModelHubMixin, library_name="longnet_zoo"):
    """Base of every model: made from a config, with one or more Transformer stacks inside.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are huggingface_hub's. They keep the
    config beside the weights; loading is strict, gives a model in evaluation mode, and any option
    can be changed by keyword: `LongNetLM.from_pretrained(folder, dropout=0.1)`.

    Args:
        config: The options.

    Raises:
        TypeError: If the config is that of another family.
    """

    config_class: ClassVar[type[ZooConfig]]
    config: ZooConfig
    stack: TransformerStack  # where there is one

    def __init__(self, config: ZooConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got "
                f"{type(config).__name__}."
            )
        self.config = config

    def set_memory_saving(self, saving: MemorySaving | None) -> None:
        """Chooses how training saves memory; no part of the config or of the weights.

        Args:
            saving: The options; None: not at all, which is fastest.

        Raises:
            TypeError: If it is none of these.

        Example:
            >>> model.set_memory_saving(MemorySaving(chunk_size=8192, offload=True))
        """
        for stack in self._stacks():
            stack.set_memory_saving(saving)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Chooses whether whole blocks are computed again in the backward pass, by timm's name."""
        for stack in self._stacks():
            stack.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names the parameters for which weight decay makes no sense: norms, biases, positions."""
        names = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
        for module_name, module in self.named_modules():
            if isinstance(module, RelativeBias):
                names |= {f"{module_name}.{name}" for name, _ in module.named_parameters()}
        return names

    def num_params(self) -> int:
        """Counts the parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops(self, seq_len: int) -> int:
        """Counts the FLOPs of the stack `self.stack` over one sequence, a multiply-add as two.

        Matrix products of all linear layers, and attention by its attended pairs; norms,
        activations and softmax are left out.

        Args:
            seq_len: Number of tokens.

        Raises:
            NotImplementedError: If the model is made of several parts and does not say.
        """
        config = self.config
        if not isinstance(config, ModelConfig):
            raise NotImplementedError(f"{type(self).__name__} must define flops(seq_len).")
        attention, _ = config.pattern.flops(
            seq_len, config.num_heads, config.head_dim, is_causal=config.is_causal
        )
        return 2 * _linear_weights(self.stack) * seq_len + config.num_layers * attention

    def _stacks(self) -> list[TransformerStack]:
        return [module for module in self.modules() if isinstance(module, TransformerStack)]

    def save_pretrained(
        self, save_directory: str | Path, *, config: Any = None, **options: Any
    ) -> str | None:
        """Saves weights, config and a model card; see `huggingface_hub.ModelHubMixin`.

        Args:
            save_directory: The folder; it is made if need be.
            config: The config of this model; another one would not describe it.
            **options: Options of huggingface_hub, such as `push_to_hub=True` and `repo_id`.

        Returns:
            The address of the commit for `push_to_hub=True`, else None.

        Raises:
            ValueError: If `config` is another one than that of this model.
        """
        if config is not None and config not in (self.config, asdict(self.config)):
            raise ValueError(
                f"a model is saved with its own config, {self.config}, got config={config}. Leave "
                "it out."
            )
        # The mixin keeps the config that the model was made with; a replaced head changes it.
        self._hub_mixin_config = self.config
        return super().save_pretrained(save_directory, config=config, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        content = {_MODEL_KEY: type(self).__name__, **asdict(self.config)}
        path = save_directory / constants.CONFIG_NAME
        path.write_text(json.dumps(content, sort_keys=True, indent=2) + "\n")
        # Safetensors lets only the owner read what it writes.
        shutil.copymode(path, save_directory / constants.SAFETENSORS_SINGLE_FILE)

    @classmethod
    def from_pretrained(
        cls: type[ModelT], pretrained_model_name_or_path: str | Path, **options: Any
    ) -> ModelT:
        """Makes a model from a folder or repository; see `huggingface_hub.ModelHubMixin`.

        Args:
            pretrained_model_name_or_path: A folder that `save_pretrained` wrote, or the
                `"owner/name"` of a repository on the Hub.
            **options: Options of huggingface_hub, such as `revision` and `token`; and fields of the
                model's config that differ from the saved ones. A warning names those that make
                trained weights another model, such as `position`.

        Returns:
            The model, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such folder, or a file is missing in it.
            TypeError: If an option is unknown.
            ValueError: If the weights do not fit the config.
        """
        place = pretrained_model_name_or_path
        try:
            return super().from_pretrained(place, **options)
        except HFValidationError as error:
            raise FileNotFoundError(
                f"weights must be in a folder that save_pretrained wrote or in a repository "
                f"'owner/name' of the Hub, got {str(place)!r}, which is neither. Check the path."
            ) from error

    @classmethod
    def _from_pretrained(
        cls: type[ModelT],
        *,
        model_id: str,
        config: Mapping[str, Any] | ZooConfig | None = None,
        map_location: str = "cpu",
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **options: Any,
    ) -> ModelT:
        def find(name: str) -> Path:
            if Path(model_id).is_dir():
                return Path(model_id, name)
            path = hf_hub_download(
                model_id,
                name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
            return Path(path)

        if config is None:
            # The mixin goes on without a config whatever the reason; the Hub's own error says more.
            raise FileNotFoundError(
                f"{find(constants.CONFIG_NAME)} does not exist, so the sizes are unknown. Use "
                "longnet_zoo.create_model(name, pretrained=...), or pass config=..."
            )
        if not isinstance(config, ZooConfig):
            config = config_from_json(cls, config)
        trained = config
        unknown = sorted(options.keys() - {field.name for field in fields(config)})
        if unknown:
            raise TypeError(
                f"{cls.__name__}.from_pretrained has no options {', '.join(unknown)}. Those of the "
                f"config are {', '.join(field.name for field in fields(config))}."
            )
        weights = _read_weights(find(constants.SAFETENSORS_SINGLE_FILE))
        model = cls(trained.changed(options))
        try:
            model.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            changes = f" with the changes {options}; leave those of sizes out" if options else ""
            raise ValueError(
                f"{constants.SAFETENSORS_SINGLE_FILE} of {model_id!r} does not fit its config"
                f"{changes}. {' '.join(str(error).split())}"
            ) from error
        warn_of_other_rules(trained.options(), model.config, source=repr(model_id))
        return model.to(map_location).eval()


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} must be what save_pretrained wrote, and is no file.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Save or copy it again.") from error


def config_from_json(model_class: type[ZooModel], content: Mapping[str, Any]) -> ZooConfig:
    """Makes the config of a model from what `save_pretrained` wrote.

    Args:
        model_class: The model to make the config for.
        content: The content of `config.json`.

    Returns:
        A config of `model_class.config_class`.

    Raises:
        ValueError: If it is the config of another model, or has a field that is unknown.
    """
    known = {field.name for field in fields(model_class.config_class)}
    options = {key: value for key, value in content.items() if key != _MODEL_KEY}
    unknown = sorted(options.keys() - known)
    if content.get(_MODEL_KEY) != model_class.__name__ or unknown:
        raise ValueError(
            f"{constants.CONFIG_NAME} must be one of {model_class.__name__}, got "
            f"{_MODEL_KEY}={content.get(_MODEL_KEY)!r} and the unknown fields {unknown}. Load it "
            "with the class that saved it, or pass weights.read_state_dict(file) as pretrained to "
            "longnet_zoo.create_model."
        )
    return model_class.config_class.from_json(options)


def warn_of_other_rules(trained: Mapping[str, Any], config: ZooConfig, *, source: str) -> None:
    """Warns where weights fit a model that computes by other rules than they were trained with.

    Args:
        trained: Options that the weights were trained with, by name; `ZooConfig.options`.
        config: That of the model.
        source: What to call the weights.
    """
    differing = {
        name: value
        for name, value in config.options().items()
        if name.split(".")[-1] in _RULES and name in trained and trained[name] != value
    }
    if differing:
        had, got = (
            ", ".join(f"{name}={x[name]!r}" for name in differing) for x in (trained, differing)
        )
        warnings.warn(
            f"the weights of {source} were trained with {had}, got {got}: they fit, but the model "
            "is another one and has to be trained further. Leave these options out to have the "
            "model that was trained.",
            UserWarning,
            stacklevel=2,
        )


def make_stack(config: ModelConfig, **options: Any) -> TransformerStack:
    """Makes the stack that a config describes.

    Args:
        config: The options that all models have.
        **options: Options of `TransformerStack` that only some models have, such as `position`.
    """
    return TransformerStack(
        embed_dim=config.embed_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        ffn_dim=config.ffn_dim or 4 * config.embed_dim,
        pattern=config.pattern,
        is_causal=config.is_causal,
        num_kv_heads=config.num_kv_heads,
        norm=config.norm,
        activation=config.activation,
        qk_norm=config.qk_norm,
        bias=config.bias,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        drop_path=config.drop_path,
        eps=config.eps,
        backend=config.backend,
        **options,
    )


def _linear_weights(module: nn.Module) -> int:
    """Counts the entries of the matrices that one token is multiplied with."""
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    if isinstance(module, Multiway):  # a token takes one of the experts, all of one size
        return _linear_weights(module.experts[0])
    return sum(_linear_weights(child) for child in module.children())
