"""The table of maskers: config class to masker class, and ``type`` tag to config class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from sah_transformers.maskers.base import Masker, MaskerConfig
from sah_transformers.maskers.stack import MaskerStack
from sah_transformers.spelling import unknown_name

M = TypeVar("M", bound=type[Masker])

MOST_STACKS = 64
"""Kept at once, for calls to come."""


class MaskerRegistry:
    """All known maskers. Users register theirs with the same decorator and name it in a config at once."""

    _maskers: ClassVar[dict[type[MaskerConfig], type[Masker]]] = {}
    _configs: ClassVar[dict[str, type[MaskerConfig]]] = {}
    _stacks: ClassVar[dict[tuple[Any, ...], MaskerStack]] = {}

    @classmethod
    def register(cls, config_class: type[MaskerConfig]) -> Callable[[M], M]:
        """Class decorator: make a masker known under its config class and that config's ``type`` tag.

        Registering a tag again replaces the entry (a re-run notebook cell), but not one of this package's.

        Raises:
            ValueError: when ``config_class`` is no ``MaskerConfig`` with a ``type`` of its own, or that is taken.
        """
        if not (isinstance(config_class, type) and issubclass(config_class, MaskerConfig)):
            raise ValueError(f"config_class must be a subclass of MaskerConfig, got {config_class!r}")
        if not config_class.type or "type" not in vars(config_class):
            raise ValueError(f"{config_class.__name__}.type must be a tag of its own, got {config_class.type!r}")
        known = cls._configs.get(config_class.type)
        names = [(one.__module__, one.__qualname__) for one in (known, config_class) if one is not None]
        if known is not None and names[0] != names[1] and known.__module__.startswith(f"{__package__}."):
            raise ValueError(f"{config_class.__name__}.type: {config_class.type!r} is taken by {known.__name__}")

        def decorate(masker_class: M) -> M:
            cls._maskers[config_class] = masker_class
            cls._configs[config_class.type] = config_class
            cls._stacks.clear()
            return masker_class

        return decorate

    @classmethod
    def types(cls) -> dict[str, type[MaskerConfig]]:
        """Tag to config class of every registered masker."""
        return dict(cls._configs)

    @classmethod
    def config_class(cls, tag: object) -> type[MaskerConfig]:
        """The config class with this ``type`` tag.

        Raises:
            ValueError: naming the nearest known tag.
        """
        if not isinstance(tag, str) or tag not in cls._configs:
            hint = " (one of your own: import the module that registers it first)"
            raise ValueError(unknown_name(tag, "masker type", cls._configs) + hint)
        return cls._configs[tag]

    @classmethod
    def config_from(cls, data: MaskerConfig | Mapping[str, Any] | Masker) -> MaskerConfig:
        """A masker's config from a config, a dict with a ``type``, or a masker.

        Raises:
            ValueError: for anything else, an unknown type or field, a wrong value.
        """
        if isinstance(data, MaskerConfig):
            return data
        if isinstance(data, Masker):
            return data.config
        if not isinstance(data, Mapping):
            raise ValueError(f"a masker must be a dict with a type, a config or a masker, got {data!r}")
        if "type" not in data:
            raise ValueError(f"type is missing (a masker names one of: {', '.join(sorted(cls._configs))})")
        return cls.config_class(data["type"]).from_dict(dict(data))

    @classmethod
    def create_masker(cls, config: MaskerConfig | Mapping[str, Any] | Masker) -> Masker:
        """Build the masker of a config.

        Raises:
            ValueError: when the config's class is not registered.
        """
        if isinstance(config, Masker):
            return config
        config = cls.config_from(config)
        for config_class in type(config).__mro__:
            if config_class in cls._maskers:
                return cls._maskers[config_class].create_from_config(config)
        raise ValueError(f"{type(config).__name__} has no registered masker")

    @classmethod
    def stack_of(cls, configs: Sequence[MaskerConfig]) -> MaskerStack:
        """The maskers of ``configs``, in order; the same object again where their work depends on nothing else.

        Raises:
            ValueError: when a config's class is not registered.
        """
        values = [tuple(vars(config).values()) for config in configs]
        kind = tuple((type(config), each, *map(type, each)) for config, each in zip(configs, values, strict=True))
        try:
            known = cls._stacks.get(kind)
        except TypeError:  # a config of the user's that holds a list
            return MaskerStack(map(cls.create_masker, configs))
        if known is not None:
            return known
        stack = MaskerStack(map(cls.create_masker, configs))
        if stack.in_launches:
            if len(cls._stacks) >= MOST_STACKS:
                cls._stacks.clear()
            cls._stacks[kind] = stack
        return stack
