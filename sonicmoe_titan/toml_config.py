"""A run's configuration: command line over TOML file over recipe, checked key by key.

[job]
recipe = "debug"          # a function of config_registry
[model]
router = "topk"
[training]
steps = 20
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sonicmoe_titan import config_registry
from sonicmoe_titan.config_tree import KIND, ConfigError, Given, Table, assign, nearest, one_of
from sonicmoe_titan.trainer import SonicTrainer

COMMAND_LINE = "command line"
JOB = "job"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SonicTrainer.Config:
    """The configuration that a TOML file and command line overrides describe.

    Args:
        path: the TOML file; its `[job] recipe` names the defaults.
        overrides: `--a.b value`, `--a.b=value`, `--flag` and `--no-flag` for booleans.

    Raises:
        ConfigError: (a ValueError) one line naming file, key, what was given and what is accepted.
    """
    table = _read_toml(Path(path))
    for key, given in parse_overrides(overrides):
        _merge(table, key, given)
    recipe = _recipe(table.pop(JOB, {}), str(path))
    try:
        return assign(recipe, table)
    except ConfigError:
        raise
    except ValueError as error:
        raise _located(str(error), table, str(path)) from None


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Given]]:
    """Dotted keys and their texts; hyphens in keys are read as underscores."""
    parsed = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(
                f"{COMMAND_LINE}: {argument}: expected --table.key value or --table.key=value"
            )
        key, equals, text = argument[2:].partition("=")
        key = key.replace("-", "_")
        value: str | None = text if equals else None
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        parent, _, last = key.rpartition(".")
        if value is None and last.startswith("no_"):
            key, value = f"{parent}.{last.removeprefix('no_')}".lstrip("."), "false"
        parsed.append((key, Given(value, COMMAND_LINE, is_text=True)))
    return parsed


def recipes() -> dict[str, Any]:
    """Name -> function of every recipe."""
    return {name: getattr(config_registry, name) for name in config_registry.__all__}


def _read_toml(path: Path) -> Table:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.toml")]
        raise ConfigError(f"{path}: no such file{nearest(path.name, siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return _with_source(document, str(path))


def _with_source(table: Table, source: str) -> Table:
    return {
        key: _with_source(value, source) if isinstance(value, dict) else Given(value, source)
        for key, value in table.items()
    }


def _merge(table: Table, key: str, given: Given) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = table.setdefault(parent, {})
        if isinstance(inner, Given):
            inner = table[parent] = {KIND: inner}
        table = inner
    if last == KIND:  # another class has other keys
        table.clear()
    table[last] = given


def _recipe(job: Table, path: str) -> SonicTrainer.Config:
    for key, given in job.items():
        if key != "recipe":
            source = given.source if isinstance(given, Given) else path
            raise ConfigError(
                f"{source}: {JOB}.{key}: unknown key{nearest(key, ['recipe'])}; expected recipe"
            )
    known = recipes()
    given = job.get("recipe")
    if given is None:
        raise ConfigError(f'{path}: [job] recipe = "..." is missing; {one_of(known)}')
    if given.value not in known:
        near = nearest(str(given.value), known)
        raise ConfigError(
            f"{given.source}: job.recipe = {given.value!r}: unknown recipe; {one_of(known)}{near}"
        )
    return known[given.value]()


def _located(message: str, table: Table, path: str) -> ConfigError:
    """The error of a validation, with the place where one of its keys was written."""
    message = " ".join(message.split())
    for key, given in _leaves(table):
        if key in message:
            return ConfigError(f"{given.source}: {message}")
    return ConfigError(f"{path}: {message}")


def _leaves(table: Table, prefix: str = "") -> list[tuple[str, Given]]:
    leaves = []
    for key, item in table.items():
        if isinstance(item, Given):
            leaves.append((f"{prefix}{key}", item))
        else:
            leaves.extend(_leaves(item, f"{prefix}{key}."))
    return leaves
