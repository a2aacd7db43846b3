"""A run's configuration: command line over TOML file over recipe, checked key by key.

[job]
recipe = "base"           # or a file of configs/: "moe_7b"
[model]
router = "topk"
[training]
steps = 20
"""

import difflib
import logging
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sonicmoe_titan import config_registry
from sonicmoe_titan.config_text import to_toml
from sonicmoe_titan.config_tree import KIND, ConfigError, Given, Table, assign, nearest, one_of
from sonicmoe_titan.trainer import SonicTrainer

COMMAND_LINE = "command line"
JOB = "job"
KEYS = """Every key of the configuration can follow: --table.key VALUE or --table.key=VALUE, and for
true and false --table.key and --table.no-key. --print-config shows all keys with their values."""


@dataclass(frozen=True)
class Command:
    """A command line that names a run: its file (`--job.config_file` too), options, overrides."""

    config_file: str
    overrides: tuple[str, ...]
    print_config: bool = False
    num_processes: int | None = None

    @staticmethod
    def parse(argv: Sequence[str], *, usage: str, default: str | None = None) -> "Command":
        """Read `argv`; ConfigError with `usage` when it names no configuration file."""
        rest = list(argv)
        if "--help" in rest or "-h" in rest:
            print(f"{usage}\n\n{KEYS}")
            raise SystemExit(0)
        positional = rest.pop(0) if rest and not rest[0].startswith("-") else None
        config_file = pop_option(rest, "--job.config_file", usage) or positional or default
        if config_file is None:
            raise ConfigError(f"{COMMAND_LINE}: which configuration? {usage}")
        processes = pop_option(rest, "--nproc", usage)
        print_config = "--print-config" in rest
        overrides = tuple(argument for argument in rest if argument != "--print-config")
        number = None if processes is None else above_zero(processes, f"{COMMAND_LINE}: --nproc")
        return Command(config_file, overrides, print_config, number)

    def load(self) -> SonicTrainer.Config:
        """`load_config` of this command line."""
        return load_config(self.config_file, self.overrides)

    def located(self, error: ValueError) -> ConfigError:
        """The error of a validation, beginning with the place where one of its keys was written."""
        table = _tables(Path(self.config_file), self.overrides)
        return _located(str(error), table, self.config_file)

    def resolved(self, config: SonicTrainer.Config) -> str:
        """The loaded configuration as a TOML file."""
        table = _tables(Path(self.config_file), self.overrides)
        return to_toml(config, recipe=table[JOB]["recipe"].value)


def pop_option(arguments: list[str], name: str, usage: str) -> str | None:
    """Take the last `name VALUE` or `name=VALUE` out of `arguments`."""
    value = None
    for argument in list(arguments):
        key, equals, text = argument.partition("=")
        if key.replace("-", "_") != name.replace("-", "_"):
            continue
        at = arguments.index(argument)
        del arguments[at]
        if not equals:
            if at == len(arguments):
                raise ConfigError(f"{COMMAND_LINE}: {name}: expected a value. {usage}")
            text = arguments.pop(at)
        value = text
    return value


def above_zero(text: str, name: str) -> int:
    """The whole number that `text` writes; ConfigError naming `name` if it is none above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name} = {text!r}: expected a number above 0")
    return int(text)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SonicTrainer.Config:
    """The configuration that a TOML file and command line overrides describe.

    Args:
        path: the TOML file; its `[job] recipe` names the defaults.
        overrides: `--a.b value`, `--a.b=value`, `--flag` and `--no-flag` for booleans.

    Raises:
        ConfigError: (a ValueError) one line naming file, key, what was given and what is accepted.
    """
    table = _tables(Path(path), overrides)
    with _quiet():
        recipe = _recipe(table.pop(JOB, {}), str(path))
        try:
            return assign(recipe, table)
        except ConfigError:
            raise
        except ValueError as error:
            raise _located(str(error), table, str(path)) from None


def _tables(path: Path, overrides: Sequence[str]) -> Table:
    table = _read_toml(path)
    for key, given in parse_overrides(overrides):
        _merge(table, key, given)
    return table


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Given]]:
    """Dotted keys and their texts; hyphens in keys are read as underscores."""
    parsed = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            expected = "expected --table.key value or --table.key=value"
            if argument.endswith(".toml"):
                expected += "; the configuration comes first"
            raise ConfigError(f"{COMMAND_LINE}: {argument}: {expected}")
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


def _read_toml(path: Path) -> Table:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return _with_source(document, str(path))


def _nearest_file(path: Path) -> str:
    """`; did you mean X?`: this name with its suffix or among the runs, or a name like it."""
    name = path.name if path.suffix == ".toml" else f"{path.name}.toml"
    for there in (path.with_name(name), config_registry.CONFIGS / name):
        if there.is_file():
            return f"; did you mean {_shown(there)}?"
    files = {file.name: file for file in (*_tomls(config_registry.CONFIGS), *_tomls(path.parent))}
    near = difflib.get_close_matches(name, files, n=1)
    return f"; did you mean {_shown(files[near[0]])}?" if near else ""


def _tomls(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.toml"))


def _shown(path: Path) -> str:
    """As short as it can be written from here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


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


def _recipe(job: Table | Given, path: str) -> SonicTrainer.Config:
    if isinstance(job, Given):
        raise ConfigError(f"{job.source}: {JOB} = {job.value!r}: expected a table with recipe")
    for key, given in job.items():
        if key != "recipe":
            source = given.source if isinstance(given, Given) else path
            raise ConfigError(
                f"{source}: {JOB}.{key}: unknown key{nearest(key, ['recipe'])}; expected recipe"
            )
    known = config_registry.RECIPES
    given = job.get("recipe")
    if given is None:
        raise ConfigError(f'{path}: [job] recipe = "..." is missing; {one_of(known)}')
    if not isinstance(given, Given):
        raise ConfigError(f"{path}: [{JOB}.recipe]: expected a name; {one_of(known)}")
    if given.value not in known:
        near = nearest(str(given.value), known)
        raise ConfigError(
            f"{given.source}: job.recipe = {given.value!r}: unknown recipe; {one_of(known)}{near}"
        )
    return getattr(config_registry, given.value)()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of configs that are made on the way; the trainer repeats them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _located(message: str, table: Table, path: str) -> ConfigError:
    message = " ".join(message.split())
    for key, given in reversed(_leaves(table)):  # the command line's keys come last
        if key in message or message.startswith(f"[{key.rpartition('.')[0]}]"):
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
