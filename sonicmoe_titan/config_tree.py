"""Typed assignment into a tree of config dataclasses, with errors that say what to write instead.

A leaf of the assigned tree is a `Given`: a value from a TOML file, already typed, or the text of a
command line argument. Tables are plain dicts.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
from torchtitan.config.override import OverrideImport, parse_cli_imports

KIND = "kind"  # the key that picks one of several classes for a table
NONE = "none"  # TOML has no null
Table = dict[str, Any]


class ConfigError(ValueError):
    """One line: where, which key, what was given, what is accepted."""


@dataclass(frozen=True)
class Given:
    """A value somebody wrote.

    Attributes:
        value: a TOML value, or the text of an argument, or None for a flag without a value.
        source: the file, or "command line".
        is_text: the value is text that its key's type has yet to be read from.
    """

    value: Any
    source: str
    is_text: bool = False


def assign(config: Any, table: Table, *, prefix: str = "") -> Any:
    """A copy of the dataclass `config` with `table` applied; `__post_init__` runs again.

    Raises ConfigError on an unknown key or a wrong type or value.
    """
    annotations = annotations_of(type(config))
    changes = {}
    for key, given in table.items():
        name = f"{prefix}{key}"
        if key not in annotations:
            raise _unknown_key(name, given, annotations, prefix)
        annotation, current = annotations[key], getattr(config, key)
        choices = kinds(annotation)
        if choices:
            changes[key] = _assign_choice(choices, current, given, name)
        elif dataclasses.is_dataclass(current):
            if isinstance(given, Given):
                raise _error(name, given, "expected a table of its keys", annotations=type(current))
            changes[key] = assign(current, given, prefix=f"{name}.")
        else:
            if isinstance(given, dict):
                if KIND in given:  # `--table.key.more` below a key that has a value already
                    raise _error(name, given[KIND], "a value, which has no keys of its own")
                given = _plain(given)
            changes[key] = convert(given, annotation, name)
    try:
        return dataclasses.replace(config, **changes)
    except ConfigError:
        raise
    except ValueError as error:  # its own validation
        table_name = "" if not prefix or prefix in str(error) else f"[{prefix[:-1]}] "
        raise ValueError(f"{table_name}{error}") from None


def kinds(annotation: Any) -> dict[str, type | None]:
    """The classes that `kind` picks from when the annotation is a tyro subcommand union."""
    found: dict[str, type | None] = {}
    for option in get_args(annotation) if _is_union(annotation) else ():
        if get_origin(option) is not Annotated:
            return {}
        base, *metadata = get_args(option)
        names = [m.name for m in metadata if hasattr(m, "name") and hasattr(m, "prefix_name")]
        found[str(names[0])] = None if base is type(None) else base
    return found


def convert(given: Given, annotation: Any, name: str) -> Any:
    """The value that `given` means for a key of this type; raises ConfigError."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    try:
        read = _from_text if given.is_text else _from_toml
        value = read(given.value, annotation)
        if isinstance(value, float) and math.isnan(value):
            raise ValueError("expected a number")
        return value
    except (ValueError, TypeError) as error:
        raise _error(name, given, str(error)) from None


def nearest(name: str, accepted: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no accepted name is near."""
    near = difflib.get_close_matches(name, list(accepted), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(accepted: Iterable[object]) -> str:
    """`expected one of a, b`"""
    return "expected one of " + ", ".join(str(option) for option in accepted)


def _assign_choice(
    choices: dict[str, type | None], current: Any, given: Table | Given, name: str
) -> Any:
    table = {KIND: given} if isinstance(given, Given) else dict(given)
    picked = table.pop(KIND, None)
    if picked is not None:
        if picked.value not in choices:
            near = nearest(str(picked.value), choices)
            raise _error(f"{name}.{KIND}", picked, one_of(choices) + near)
        chosen = choices[picked.value]
        if type(current) is not (chosen or type(None)):
            current = chosen() if chosen else None
    if current is None:
        if table:
            key, value = next(iter(table.items()))
            raise _error(f"{name}.{key}", value, f'{name}.{KIND} is "none", which has no keys')
        return None
    return assign(current, table, prefix=f"{name}.")


def _from_toml(value: Any, annotation: Any) -> Any:
    if annotation is Any or isinstance(annotation, typing.TypeVar):
        return value
    if annotation == list[OverrideImport]:
        return _override_imports(value)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        if value in arguments and type(value) in {type(option) for option in arguments}:
            return value
        raise ValueError(one_of(arguments) + nearest(str(value), map(str, arguments)))
    if _is_union(annotation):
        return _first_that_fits(value, arguments)
    if annotation is type(None):
        if value == NONE:
            return None
        raise ValueError(f'expected "{NONE}"')
    if annotation is float and type(value) is int:
        return float(value)
    if dataclasses.is_dataclass(annotation) and isinstance(value, dict):
        return _construct(annotation, value)
    if origin in (list, tuple) and isinstance(value, list):
        inner = arguments[0] if arguments else Any
        return (origin or list)(_from_toml(item, inner) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _from_toml(item, arguments[1]) for key, item in value.items()}
    wanted = origin or annotation
    if isinstance(wanted, type) and type(value) is wanted:
        return value
    raise ValueError(f"expected {_describe(annotation)}, not {_describe(type(value))}")


def _from_text(text: str | None, annotation: Any) -> Any:
    if text is None:  # a flag without a value
        text = "true"
        if bool not in (annotation, *get_args(annotation)):
            raise ValueError(f"expected a value: {_describe(annotation)}")
    if annotation == list[OverrideImport]:
        return parse_cli_imports([text])
    if _is_union(annotation):
        return _first_that_fits(text, get_args(annotation), read=_from_text)
    origin = get_origin(annotation)
    if annotation is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError("expected true or false")
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            raise ValueError(f"expected {_describe(annotation)}") from None
    if origin is Literal:
        readings = {str(option): option for option in get_args(annotation)}
        if text in readings:
            return readings[text]
        raise ValueError(one_of(readings) + nearest(text, readings))
    if origin in (list, tuple, dict) or dataclasses.is_dataclass(annotation):
        return _from_toml(_toml_value(text, as_list=origin in (list, tuple)), annotation)
    if annotation is type(None) or annotation is str:
        return _from_toml(text, annotation)
    raise ValueError(f"a value of type {_describe(annotation)} cannot be given on a command line")


def _toml_value(text: str, *, as_list: bool) -> Any:
    """`[...]` and `{...}` as TOML writes them; a list also as a,b,c."""
    if text.lstrip()[:1] in ("[", "{"):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"expected a TOML value: {error}") from None
    if as_list:
        return text.split(",") if text else []
    raise ValueError('expected a TOML table such as {key = "value"}')


def _first_that_fits(value: Any, options: tuple[Any, ...], *, read: Any = _from_toml) -> Any:
    # exact types before None and float, so that "none" stays None and 1 stays an int
    problems = []
    for option in sorted(options, key=lambda option: option is not type(None)):
        try:
            return read(value, option)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(" or ".join(problem.removeprefix("expected ") for problem in problems))


def _override_imports(value: Any) -> list[OverrideImport]:
    if not isinstance(value, list):
        raise ValueError('expected a list such as ["module.function", ["module.other", {key = 1}]]')
    imports: list[OverrideImport] = []
    for item in value:
        if isinstance(item, str):
            imports.extend(parse_cli_imports([item]))
        elif isinstance(item, list) and len(item) == 2 and isinstance(item[1], dict):
            imports.append((str(item[0]), item[1]))
        else:
            raise ValueError(
                f'{item!r}: expected "module.function" or ["module.function", {{...}}]'
            )
    return imports


def _construct(cls: Any, value: Table) -> Any:
    annotations = annotations_of(cls)
    for key in value:
        if key not in annotations:
            raise ValueError(f"unknown key {key}{nearest(key, annotations)}")
    try:
        return cls(**{key: _from_toml(item, annotations[key]) for key, item in value.items()})
    except TypeError as error:
        raise ValueError(str(error).split("__init__() ")[-1]) from None


def annotations_of(cls: type) -> dict[str, Any]:
    """Field name -> annotation, without the fields that only code may set."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(cls)
        if field.init and not field.name.startswith("_") and not _is_suppressed(hints[field.name])
    }


def _is_suppressed(annotation: Any) -> bool:
    return get_origin(annotation) is Annotated and any(
        option is tyro.conf.Suppress for option in get_args(annotation)[1:]
    )


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _plain(given: Table | Given) -> Given:
    """A table that is one value, such as a key of type dict."""
    if isinstance(given, Given):
        return given
    leaves = {key: _plain(item) for key, item in given.items()}
    source = next(iter(leaves.values())).source if leaves else ""
    return Given({key: leaf.value for key, leaf in leaves.items()}, source)


def _describe(annotation: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    names |= {list: "a list", dict: "a table", type(None): f'"{NONE}"'}
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) in (list, tuple):
        return "a list of " + " or ".join(_describe(item) for item in get_args(annotation)[:1])
    if get_origin(annotation) is dict:
        return "a table"
    return getattr(annotation, "__qualname__", str(annotation))


def _unknown_key(name: str, given: Table | Given, accepted: Iterable[str], prefix: str) -> Any:
    near = nearest(name.removeprefix(prefix), accepted)
    near = near.replace("did you mean ", f"did you mean {prefix}")
    listed = f"; {one_of(accepted)}" if not near else ""
    return _error(name, given, f"unknown key{near}{listed}")


def _error(
    name: str, given: Table | Given, problem: str, *, annotations: Any = None
) -> ConfigError:
    if isinstance(given, dict):
        leaf = _plain(given)
        return ConfigError(f"{leaf.source}: [{name}]: {problem}")
    shown = "" if given.value is None else f" = {json.dumps(given.value, default=str)}"
    return ConfigError(f"{given.source}: {name}{shown}: {problem}")
