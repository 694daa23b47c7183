"""The base of every zcore configuration: frozen, no unknown keys, and one readable error for all that is wrong.

    file or mapping --read()--> Config, perhaps with "auto" --resolve({...})--> Config without "auto"

Sections are nested `Config` classes. A key is named by its dotted path in the user's own spelling. This file knows no
key of any wheel; the sections live beside the code that honours them.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from zcore.core.config_file import read_settings
from zcore.core.errors import ConfigError, nearest

__all__ = ["Auto", "Config", "settled"]

Auto = Literal["auto"]
"""Marks a field the program may fill: `train_batch_size: PositiveInt | Auto = "auto"`."""

T = TypeVar("T")
Location = tuple[str | int, ...]


class Config(BaseModel):
    """A configuration or a section of one; subclass it and declare the fields.

    A key in `known_unserved` is one that other tools accept and zcore does not serve; its value says why or what to do
    instead. It is refused loudly, unless it is switched off (false, null, or a section whose `enabled` is false), or
    asks by its value in `always` for what is so in any case: then leaving it out does what it says.

    >>> class Zero(Config):
    ...     stage: Literal[0, 1, 2, 3] = 0
    >>> class Training(Config):
    ...     train_batch_size: int | Auto = "auto"
    ...     zero_optimization: Zero = Zero()
    >>> Training.read({"zero_optimization": {"stage": 3}}).resolve({"train_batch_size": 32})
    Training(train_batch_size=32, zero_optimization=Zero(stage=3))
    >>> Training.read({"zero_optimization": {"stagee": 3}})
    Traceback (most recent call last):
    zcore.core.errors.ConfigError: Training: zero_optimization.stagee is not a known key; did you mean `stage`?
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)
    known_unserved: ClassVar[Mapping[str, str]] = {}
    always: ClassVar[Mapping[str, object]] = {}

    @classmethod
    def read(cls, source: "str | Path | Mapping[str, Any] | Config") -> Self:
        """The configuration in a JSON or YAML file, a mapping, or `source` itself if it is a `cls` already.

        Raises ConfigError, naming every problem by its dotted key; NotInstalledError for YAML without a YAML reader.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, Mapping):
            return cls._validate(source, name=cls.__name__)
        if isinstance(source, str | Path):
            return cls._validate(read_settings(Path(source)), name=str(source))
        raise ConfigError(
            f"Cannot read a {cls.__name__} from {type(source).__name__}; pass a path, dict or {cls.__name__}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Every setting, defaults included, as JSON types under the keys a file would have."""
        return self.model_dump(mode="json", by_alias=True, fallback=repr)

    def digest(self) -> str:
        """SHA-256 in hex of the settings: equal on two ranks exactly when their settings are, however spelled.

        >>> Config().digest()[:8]
        '44136fa3'
        """
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def auto_keys(self) -> dict[str, Location]:
        """Where "auto" still stands: each dotted key with its location, in the order of the fields."""
        return {_dotted(location): location for location in _find_auto(self.to_dict())}

    def resolve(self, values: Mapping[str, Any]) -> Self:
        """A copy in which each "auto" has its value; a value the user wrote is kept, whatever `values` holds.

        `values` maps dotted keys to values. Raises ConfigError naming each key that would still say "auto".
        """
        autos = self.auto_keys()
        if still := [key for key in autos if values.get(key, "auto") == "auto"]:
            raise ConfigError(f'{", ".join(still)}: still "auto", and nothing here can choose. Write a value for each.')
        chosen = self.model_dump(by_alias=True, exclude_unset=True)
        for key, (*parents, last) in autos.items():
            target: Any = chosen
            for parent in parents:
                target = target.setdefault(parent, {}) if isinstance(target, dict) else target[parent]
            target[last] = values[key]
        return self._validate(chosen, name=f'{type(self).__name__} with "auto" resolved')

    @classmethod
    def _validate(cls, raw: Mapping[str, Any], *, name: str) -> Self:
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            wrong: dict[Location, list[ErrorDetails]] = {}  # a union fails once for each of its members
            for detail in error.errors():
                wrong.setdefault(_spelled(detail, raw), []).append(detail)
        problems = [_describe(cls, location, details) for location, details in wrong.items()]
        listed = f" has {len(problems)} problems:\n  " if len(problems) > 1 else ": "
        raise ConfigError(f"{name}{listed}" + "\n  ".join(problems))

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, raw: object) -> object:
        if not isinstance(raw, Mapping):
            return raw
        return {
            key: value
            for key, value in raw.items()
            if key not in cls.known_unserved or not (_is_off(value) or value == cls.always.get(key))
        }

    @field_validator("*", mode="before")
    @classmethod
    def _convert_nothing_but_whole_floats(cls, value: object, info: ValidationInfo) -> object:
        """Take 5e8 where an integer is due, as files write it; refuse "16", true and 1 where pydantic would convert."""
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        plain = [kind for kind in kinds if isinstance(kind, type)]
        literals = [kind for kind in kinds if not isinstance(kind, type)]
        if not set(plain) <= {*SCALARS, NoneType} or type(value) not in SCALARS:
            return value  # a section, a list, an enum: pydantic's to judge
        if isinstance(value, float) and value.is_integer() and float not in plain:
            value = int(value)
        if type(value) in plain or (type(value) is int and float in plain):
            return value
        if any(type(literal) is type(value) and literal == value for literal in literals):
            return value
        words = _either([*(SCALARS[kind] for kind in plain if kind in SCALARS), *map(_shown, literals)])
        quoted = isinstance(value, str) and value.replace(".", "", 1).isdigit()
        raise PydanticCustomError("scalar", "{words}", {"words": words + ", written without quotes" * quoted})


def settled(value: T | Auto) -> T:
    """The value of a resolved field, which the type checker cannot know to be settled.

    >>> settled(16)
    16
    """
    if isinstance(value, str) and value == "auto":
        raise ConfigError(
            'A setting still says "auto" where its value is needed; call resolve() on the configuration first.'
        )
    return value


# What is wrong, in words

SCALARS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}

# Some of pydantic's error types, as said after "expected"; the others keep pydantic's words.
EXPECTED = {
    "model_type": "a section, as in {...}",
    "model_attributes_type": "a section, as in {...}",
    "dict_type": "a section, as in {...}",
    "greater_than": "more than ",
    "greater_than_equal": "at least ",
    "less_than": "less than ",
    "less_than_equal": "at most ",
}


def _describe(root: type[Config], location: Location, details: list[ErrorDetails]) -> str:
    """One sentence or two about what is wrong at `location`."""
    path, first = _dotted(location), details[0]
    if first["type"] == "extra_forbidden":
        return _describe_unknown(root, location, first["input"])
    if first["type"] == "missing":
        return f"{path} is missing; it has no default."
    if first["type"] in {"value_error", "assertion_error"}:
        reason = str(first["ctx"]["error"])
        return f"{path}: {reason}" if path else reason
    expected = [
        EXPECTED[detail["type"]] + str(next(iter(detail["ctx"].values())) if "than" in detail["type"] else "")
        if detail["type"] in EXPECTED
        else detail["msg"].removeprefix("Input should be ").replace("'", '"')
        for detail in details
    ]
    return f"{path} is {_shown(first['input'])}; expected {_either(list(dict.fromkeys(expected)))}."


def _describe_unknown(root: type[Config], location: Location, value: object) -> str:
    """Where an unknown key belongs, or which key is nearest: first in its own section, then in all."""
    path, parents, key = _dotted(location), _dotted(location[:-1]), str(location[-1])
    sections = dict(_walk(root))
    here = sections.get(parents, root)
    if key in here.known_unserved:
        refusal = (
            f"{path} is a known DeepSpeed key that zcore does not serve yet; {_shown(value)} would have no effect."
        )
        return f"{refusal} {here.known_unserved[key]}"
    if owners := [
        f"in `{owner}`" if owner else "at the top level" for owner in sections if key in _keys(sections[owner])
    ]:
        where = f"in `{parents}`" if parents else "at the top level"
        return f"`{key}` stands {where}; it belongs {_either(owners)}."
    near = nearest(key, _keys(here))
    if near is None:
        elsewhere = {name: f"{owner}.{name}".strip(".") for owner in sections for name in _keys(sections[owner])}
        found = nearest(key, elsewhere)
        near = elsewhere[found] if found else None
    advice = f"did you mean `{near}`?" if near else f"expected {_either(_keys(here)) or 'none'}."
    return f"{path} is not a known key; {advice}"


def _spelled(detail: ErrorDetails, raw: Any) -> Location:
    """The location in the user's keys: pydantic's own marks, such as which member of a union it tried, left out."""
    location: list[str | int] = []
    for part in detail["loc"]:
        if part in raw if isinstance(raw, Mapping) else isinstance(raw, list | tuple) and isinstance(part, int):
            raw = raw[part]
            location.append(part)
    return (*location, detail["loc"][-1]) if detail["type"] == "missing" else tuple(location)


def _shown(value: object) -> str:
    shown = json.dumps(value, default=repr)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _dotted(location: Location) -> str:
    return ".".join(map(str, location))


# The shape of a configuration


def _kinds(annotation: Any) -> list[Any]:
    """The plain types and the literal values an annotation is made of, in its order."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) is Literal or not get_args(annotation):
        return list(get_args(annotation)) or [annotation]
    return [kind for part in get_args(annotation) for kind in _kinds(part)]


def _keys(section: type[Config]) -> list[str]:
    """Every spelling of every field."""
    return [key for name, field in section.model_fields.items() for key in dict.fromkeys((field.alias or name, name))]


def _walk(section: type[Config], path: str = "") -> Iterator[tuple[str, type[Config]]]:
    """`section` and all sections inside it, each with its dotted path."""
    yield path, section
    for name, field in section.model_fields.items():
        for kind in _kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Config):
                yield from _walk(kind, f"{path}.{field.alias or name}".removeprefix("."))


def _find_auto(value: object, location: Location = ()) -> Iterator[Location]:
    """Where a plain value says "auto"; free-form parts, such as optimizer parameters, included."""
    if value == "auto":
        yield location
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _find_auto(inner, (*location, key))


def _is_off(value: object) -> bool:
    """Whether a setting asks for nothing; "auto" asks for what is at hand."""
    if isinstance(value, Mapping):
        return value.get("enabled") in (False, "auto") or value.get("device", ...) in (None, "none")
    return value in (None, False, "auto")
