# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The sparsed_vllm authors
"""A checkpoint's config.json, read without its remote code, under the names that vLLM uses."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PretrainedConfig

from sparsed_vllm.models.checkpoint_files import check_files
from sparsed_vllm.models.registry import FOREIGN, MODELS, ModelSpec, find_class
from sparsed_vllm.models.rotary import ORIGINAL, is_positive, one_rotary, standard_rotary
from sparsed_vllm.models.weights_format import check_format

_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)

_OF_ANY_MODEL = frozenset(
    {
        "architectures",
        "auto_map",
        "bos_token_id",
        "compression_config",  # an older name of quantization_config
        "dtype",
        "eos_token_id",
        "head_dim",
        "model_type",
        ORIGINAL,  # which transformers puts into rope_parameters
        "pad_token_id",
        "partial_rotary_factor",
        "quantization",  # MLX's
        "quantization_config",
        "rotary_pct",  # partial_rotary_factor to vLLM
        "torch_dtype",
        "transformers_version",
    }
)
"""Keys of config.json that vLLM or transformers read of each of our models."""


@dataclass(frozen=True)
class Computed:
    """A key of config.json for which our network computes some values and no others.

    default: what the model's own code assumes where config.json is silent
    served: the values that are computed
    otherwise: what other values would need
    """

    default: Any
    served: tuple[Any, ...]
    otherwise: str


class DenoisingConfig(PretrainedConfig):
    """Base of our configuration classes: each lists every key of its model's own class.

    A key is honoured, or refused where its value is not computed (`refusals`), or harmless:
    without an effect on what an engine computes. All others are kept apart in `unread`: vLLM and
    transformers look for keys of other models (`num_kv_heads`, `text_config`, `max_seq_len`).
    """

    honoured: ClassVar[dict[str, Any]] = {}  # key -> default of the model's own class
    computed: ClassVar[dict[str, Computed]] = {}
    harmless: ClassVar[frozenset[str]] = frozenset()
    own_sizes: ClassVar[tuple[str, ...]] = ()  # keys of counts that not every model has
    settled: ClassVar[dict[str, str]] = {}  # key of the file that settles another -> that one

    if TYPE_CHECKING:  # to transformers, an annotation makes a field

        def __getattr__(self, key: str) -> Any: ...

    def __post_init__(self, **given: Any) -> None:
        """Called by transformers with all of config.json but the keys that every model has."""
        self.unread: dict[str, Any] = {}  # from_dict knows them
        given = self._without_aliases(given)
        rope = one_rotary(given, self.honoured.get("rope_theta"))
        defaults = {key: computed.default for key, computed in self.computed.items()}
        ours = {**self.honoured, **defaults, "mask_token_id": self.spec().mask_token_id}
        ours.pop("rope_theta", None)  # it is in `rope`
        for key, default in ours.items():
            setattr(self, key, given.pop(key, default))
        self.rope_parameters = rope
        for key, value in self.derived().items():
            setattr(self, key, value)
        super().__post_init__(**given)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of the class that `architectures` names, where it names one of ours.

        Models may share a model_type, by which transformers chose `cls`. Raises ValueError for
        a model that shares it and is not served.
        """
        check_format(config_dict)
        if not config_dict.get("architectures"):
            config_dict = {**config_dict, "architectures": [cls.spec().architecture]}
        named = cls
        for architecture in config_dict["architectures"]:
            if architecture in FOREIGN:
                raise ValueError(FOREIGN[architecture].refusal())
            if architecture in MODELS:
                named = find_class(MODELS[architecture].config)
        check_files(kwargs.get("name_or_path"))
        read, unread = named._split(config_dict)
        read.pop("model_type", None)  # the class knows it, and a file may not
        found = super(DenoisingConfig, named).from_dict(read, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config.unread = unread
        config._check_sizes("config.json")
        return found

    @classmethod
    def _split(cls, config_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What this class, vLLM and transformers read of a model of ours, and what nobody does."""
        known = cls.known_keys() | cls.harmless | _OF_ANY_MODEL
        return (
            {key: value for key, value in config_dict.items() if key in known},
            {key: value for key, value in config_dict.items() if key not in known},
        )

    def to_dict(self) -> dict[str, Any]:
        """Also the keys that nothing reads, for whoever saves the configuration."""
        output: dict[str, Any] = super().to_dict()
        return {**output.pop("unread", {}), **output}

    def update(self, config_dict: dict[str, Any]) -> None:
        """Take overrides (vLLM's hf_overrides). Raises ValueError for sizes that are none."""
        check_format(config_dict)
        read, unread = self._split(config_dict)
        super().update(read)
        self.unread = {**self.unread, **unread}
        self._check_sizes("config.json with --hf-overrides")

    def _check_sizes(self, source: str) -> None:
        """vLLM computes with sizes before it asks what we refuse."""
        if wrong := list(self._wrong_sizes()):
            raise ValueError(f"{source} is not served: {'; '.join(wrong)}.")

    @classmethod
    def spec(cls) -> ModelSpec:
        """The entry of the model whose configuration this is."""
        return next(spec for spec in MODELS.values() if find_class(spec.config) is cls)

    def derived(self) -> dict[str, Any]:
        """Keys that config.json may leave to others, with the values that follow from those."""
        return {}

    def __setattr__(self, key: str, value: Any) -> None:
        # Overrides (vLLM's hf_overrides) come one by one, after all else; the last one counts.
        if key in ("rope_scaling", "rope_parameters"):
            theta = self.__dict__.get("rope_parameters", {}).get("rope_theta")
            length = self.max_position_embeddings
            key, value = "rope_parameters", standard_rotary(value, theta, length)
        elif key == "rope_theta":
            key, value = "rope_parameters", {**self.rope_parameters, "rope_theta": value}
        super().__setattr__(key, value)

    @property
    def rope_theta(self) -> float | None:
        """The base of the rotary embedding; rope_parameters holds it."""
        theta: float | None = self.rope_parameters["rope_theta"]
        return theta

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return False

    @property
    def output_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return False

    @property
    def feed_forward_bias(self) -> bool:
        return False

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed, head by head, before they are rotated."""
        return False

    @property
    def logit_scale(self) -> float:
        return 1.0

    @property
    def experts(self) -> int:
        """Experts in a layer's feed-forward; 0: it is one network for all tokens."""
        return 0

    @property
    def positions(self) -> float:
        """How many positions vLLM's table of the rotary embedding has."""
        rope, length = self.rope_parameters, self.max_position_embeddings
        if rope["rope_type"] == "yarn":
            return float(rope[ORIGINAL] * rope["factor"])
        return float(length * rope["factor"] if rope["rope_type"] == "linear" else length)

    def refusals(self) -> Iterator[str]:
        """What this configuration asks for and the network does not compute, key by key."""
        if getattr(self, "quantization", None):
            yield "quantization must be absent: vLLM does not read MLX's tensors"
        if wrong := list(self._wrong_sizes()):
            yield from wrong
            return
        for key, computed in self.computed.items():
            value = getattr(self, key)
            if value not in computed.served:
                allowed = " or ".join(repr(served) for served in computed.served)
                yield f"{key} must be {allowed}, got {value!r}: {computed.otherwise}"
        yield from self._wrong_numbers()
        mask, vocab_size = self.mask_token_id, self.vocab_size
        if not (is_integer(mask) and 0 <= mask < vocab_size):
            yield (
                f"mask_token_id must be a token in [0, {vocab_size - 1}] (vocabulary), got "
                f"{mask!r}: it is what a place holds until it is filled"
            )

    @classmethod
    def known_keys(cls) -> frozenset[str]:
        """The keys that this class reads, under all their names."""
        rope = ("rope_theta", "rope_scaling", "rope_parameters", "mask_token_id")
        return frozenset({*cls.honoured, *cls.computed, *cls.attribute_map, *rope})

    def _without_aliases(self, given: dict[str, Any]) -> dict[str, Any]:
        """Every value under its key, where the file uses transformers' name for it."""
        named = dict(given)
        for alias, key in self.attribute_map.items():
            if alias not in named:
                continue
            value = named.pop(alias)
            if named.setdefault(key, value) != value:
                raise ValueError(
                    f"config.json says {key}: {named[key]!r} and {alias}: {value!r}, which are two "
                    "names of one thing. Remove one."
                )
        return named

    def _wrong_sizes(self) -> Iterator[str]:
        sizes = (*_SIZES, *self.own_sizes)
        wrong = [name for name in sizes if not is_integer(getattr(self, name), at_least=1)]
        named = {name: self.attribute_map.get(name, name) for name in sizes}
        for name in wrong:
            yield f"{named[name]} must be an integer over 0, got {getattr(self, name)!r}"
        if wrong:
            return
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        head_dim, rest = divmod(self.hidden_size, heads)
        query, outer = named["num_attention_heads"], named["hidden_size"]
        if rest or head_dim % 2:
            yield (
                f"{query} must divide {outer} into even numbers: {heads} heads must share "
                f"{self.hidden_size} dimensions evenly, two by two"
            )
        if heads % kv_heads:
            yield (
                f"{named['num_key_value_heads']} must divide {query}: {heads} query heads must "
                f"share {kv_heads} key heads evenly"
            )
        if getattr(self, "head_dim", None) not in (None, head_dim):
            yield (
                f"head_dim must be absent or {head_dim} ({self.hidden_size} / {heads}), got "
                f"{self.head_dim!r}: no model of this architecture has heads of another size"
            )

    def _wrong_numbers(self) -> Iterator[str]:
        for key in ("rope_theta", "rms_norm_eps"):
            if not is_positive(getattr(self, key)):
                yield f"{key} must be a number over 0, got {getattr(self, key)!r}"
        for key, default in self.honoured.items():
            if isinstance(default, bool) and not isinstance(getattr(self, key), bool):
                yield f"{key} must be true or false, got {getattr(self, key)!r}"
        if not all(is_integer(token) for token in _tokens(getattr(self, "eos_token_id", None))):
            yield f"eos_token_id must be a token or a list of tokens, got {self.eos_token_id!r}"
        yield from self._wrong_rotary()

    def _wrong_rotary(self) -> Iterator[str]:
        """What of the rotary embedding depends on other keys."""
        rope = self.rope_parameters
        turned = rope.get("partial_rotary_factor", 1)
        if turned > 1 or (turned != 1 and "partial_rotary_factor" not in self.honoured):
            yield f"partial_rotary_factor must be 1, got {turned!r}: heads are rotated whole"
        pairs, odd = divmod(int(self.hidden_size // self.num_attention_heads * turned), 2)
        if odd:
            yield f"partial_rotary_factor must leave pairs of dimensions to rotate, got {turned!r}"
        if rope["rope_type"] != "longrope":
            return
        for key in ("short_factor", "long_factor"):
            factors = rope[key]
            if not (isinstance(factors, list) and len(factors) == pairs):
                yield f"rope_scaling's {key} must be a list of {pairs} numbers, got {factors!r}"
            elif not all(map(is_positive, factors)):
                yield f"rope_scaling's {key} must hold numbers over 0, got {factors!r}"
        stretch = self.max_position_embeddings / rope[ORIGINAL]
        if rope.get("factor", stretch) != stretch:
            yield (
                f"rope_scaling's factor must be absent or {stretch:g} (the length over the "
                f"original one), got {rope['factor']!r}"
            )


def is_integer(value: Any, at_least: int | None = None) -> bool:
    """Whether it is an integer, which JSON's true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return at_least is None or value >= at_least


def _tokens(value: Any) -> list[Any]:
    """A file's one token, list of tokens or null as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


class ForeignConfig(PretrainedConfig):
    """config.json of a model that is refused by name, unless another plugin serves it."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from vllm.model_executor.models import ModelRegistry

        for architecture in config_dict.get("architectures") or ():
            if architecture in ModelRegistry.models:
                break
            if architecture in FOREIGN:
                raise ValueError(FOREIGN[architecture].refusal())
        return super().from_dict(config_dict, **kwargs)
