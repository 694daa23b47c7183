"""Settings out of a JSON or YAML file, as plain data: strict about what a reader would overlook, with the line number.

Refused: a repeated key (of two values one would silently win), comments and trailing commas in JSON. In YAML `1e-5` is
a number, as YAML 1.2 says; PyYAML alone would make it a string.
"""

import json
import re
from pathlib import Path
from typing import Any

from zcore.core.errors import ConfigError, NotInstalledError

__all__ = ["read_settings"]

JSON_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]')  # in sound JSON, enough to know the keys of each object
YAML_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in `path`, YAML by its suffix and JSON otherwise.

    Raises ConfigError if the file cannot be read or is not a sound object; NotInstalledError for YAML without PyYAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no configuration file {str(path)!r}. Pass a JSON or YAML file, or a dict."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the configuration {str(path)!r}: {error}. Pass a JSON or YAML file.") from error
    settings = _parse_yaml(text, path) if path.suffix in {".yaml", ".yml"} else _parse_json(text, path)
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds a {type(settings).__name__}; expected settings by name, as in {{...}}.")
    return settings


def _parse_json(text: str, path: Path) -> object:
    try:
        settings: object = json.loads(text)
    except json.JSONDecodeError as error:
        before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
        reason = error.msg
        if after.startswith(("//", "#", "/*")):
            reason = "JSON has no comments; remove it, or write YAML"
        elif (before + after[:1]).endswith((",", ",}", ",]")) and after.lstrip(", \n\r\t")[:1] in {"}", "]"}:
            reason = "a comma after the last entry is not JSON; remove it"
        raise ConfigError(f"{path}, line {error.lineno}: {reason}.") from error
    objects: list[dict[str, int]] = []  # the open objects, each with the line of each of its keys
    for token in JSON_TOKEN.finditer(text):
        if token[0] == "{":
            objects.append({})
        elif token[0] == "}":
            objects.pop()
        elif token[2]:
            _note_key(objects[-1], json.loads(token[1]), text.count("\n", 0, token.start()) + 1, path)
    return settings


def _parse_yaml(text: str, path: Path) -> object:
    try:
        import yaml  # type: ignore[import-untyped] # PyYAML ships no types
    except ModuleNotFoundError as error:
        raise NotInstalledError(f"{path} is YAML, which needs PyYAML: pip install 'zcore-core[yaml]'") from error
    loader_class: Any = type("Loader", (yaml.SafeLoader,), {})  # so that the resolver is ours alone
    loader_class.add_implicit_resolver("tag:yaml.org,2002:float", YAML_FLOAT, list("-+0123456789"))
    loader = loader_class(text)
    try:
        node = loader.get_single_node()
        _refuse_repeated_yaml_keys(node, path)
        return loader.construct_document(node) if node else {}
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{path}, line {error.problem_mark.line + 1}: {error.problem}.") from error


def _refuse_repeated_yaml_keys(node: Any, path: Path) -> None:
    lines: dict[str, int] = {}
    for item in node.value if node and isinstance(node.value, list) else ():
        key, value = item if isinstance(item, tuple) else (None, item)
        if key is not None:
            _note_key(lines, str(key.value), key.start_mark.line + 1, path)
        _refuse_repeated_yaml_keys(value, path)


def _note_key(lines: dict[str, int], key: str, line: int, path: Path) -> None:
    if key in lines:
        raise ConfigError(f'{path}, line {line}: "{key}" stands on line {lines[key]} already; keep one of the two.')
    lines[key] = line
