"""A configuration as the TOML file that makes it again."""

import dataclasses
import json
import math
from typing import Any

from sonicmoe_titan.config_tree import KIND, NONE, annotations_of, kinds


def to_toml(config: Any, *, recipe: str) -> str:
    """The resolved `config` as TOML text, every key written out.

    Values that only a recipe can set (functions) become comments.
    """
    lines = ["[job]", f"recipe = {json.dumps(recipe)}", ""]
    plain, tables = _split(config)
    lines = [*plain, "", *lines] if plain else lines
    for name, table, table_kinds in tables:
        lines += _table(name, table, table_kinds)
    return "\n".join(lines).rstrip() + "\n"


def _table(name: str, config: Any, choices: dict[str, type | None]) -> list[str]:
    lines = [f"[{name}]"]
    if choices:
        chosen = {cls: kind for kind, cls in choices.items()}
        lines.append(f"{KIND} = {json.dumps(chosen[type(config) if config is not None else None])}")
    if config is None:
        return [*lines, ""]
    plain, tables = _split(config)
    lines += [*plain, ""]
    for key, table, table_kinds in tables:
        lines += _table(f"{name}.{key}", table, table_kinds)
    return lines


def _split(config: Any) -> tuple[list[str], list[tuple[str, Any, dict[str, type | None]]]]:
    """`key = value` lines, and the (key, dataclass, kinds) of the tables below."""
    plain, tables = [], []
    for key, annotation in annotations_of(type(config)).items():
        value, choices = getattr(config, key), kinds(annotation)
        if choices or dataclasses.is_dataclass(value):
            tables.append((key, value, choices))
            continue
        try:
            plain.append(f"{key} = {_value(value)}")
        except TypeError:
            plain.append(f"# {key} is set by the recipe: {type(value).__qualname__}")
    return plain, tables


def _value(value: Any) -> str:
    if value is None:
        return json.dumps(NONE)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        # of JSON's escapes TOML lacks the pairs that stand for characters above U+FFFF
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        items = (f"{_value(str(key))} = {_value(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    raise TypeError(type(value))
