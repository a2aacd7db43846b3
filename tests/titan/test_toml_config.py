"""Command line over TOML over recipe, typed, with errors that name what to write instead."""

from pathlib import Path
from typing import Any

import pytest
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from sonicmoe_titan.config_registry import CONFIGS
from sonicmoe_titan.config_tree import ConfigError
from sonicmoe_titan.toml_config import Command, load_config


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    """Writes a TOML file and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "run.toml"
        path.write_text(text if "recipe" in text else f'[job]\nrecipe = "base"\n{text}')
        return path

    return write


def error(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_command_line_goes_over_file_goes_over_recipe(toml: Any) -> None:
    path = toml("[training]\nsteps = 7\nseq_len = 64\n[model]\ntop_k = 2\n")
    config = load_config(path, ["--training.steps", "9", "--model.num_experts=8"])
    assert (config.training.steps, config.training.seq_len) == (9, 64)
    assert (config.model.top_k, config.model.num_experts) == (2, 8)
    assert config.model.expert_dim == 64  # the recipe's


def test_model_keys_reach_the_model_that_is_built(toml: Any) -> None:
    config = load_config(toml("[model]\nrouter = 'topk'\n"), ["--model.num_layers", "3"])
    config = load_config(toml("[model]\nvocab_size = 512\n"), ["--model.router=token_rounding"])
    model = config.model_spec.model
    assert model.vocab_size == model.lm_head.out_features == 512
    assert config.loss.loss_fn.global_vocab_size == 512
    assert model.layers[0].moe.routed_experts.router == "token_rounding"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--compile.enable"], True),
        (["--compile.enable", "true"], True),
        (["--compile.enable=True"], True),
        (["--compile.no-enable"], False),
        (["--compile.enable", "--compile.no_enable"], False),
    ],
)
def test_flags_read_as_booleans(toml: Any, arguments: list[str], expected: bool) -> None:
    assert load_config(toml(""), arguments).compile.enable is expected


def test_hyphens_in_keys_read_as_underscores(toml: Any) -> None:
    assert load_config(toml(""), ["--training.seq-len", "32"]).training.seq_len == 32


def test_values_take_the_type_of_their_key(toml: Any) -> None:
    path = toml(
        "[optimizer]\nlr = 1\n[compile]\ncomponents = ['loss']\n"
        "[model]\nnum_kv_heads = 'none'\n[training]\nmax_norm = 2\n"
    )
    config = load_config(path, ["--parallelism.data_parallel_shard_degree", "-1"])
    assert type(config.optimizer.lr) is float
    assert config.compile.components == ["loss"]
    assert config.model.num_kv_heads is None
    assert config.training.max_norm == 2
    config = load_config(path, ["--compile.components", "model,loss", "--model.head_dim=16"])
    assert config.compile.components == ["model", "loss"]
    assert config.model.head_dim == 16
    assert load_config(path, ["--model.num_kv_heads", "2"]).model.num_kv_heads == 2


def test_kind_picks_the_class_of_a_union(toml: Any) -> None:
    path = toml("[activation_checkpoint]\nkind = 'selective'\npreserve_rng_state = false\n")
    selective = load_config(path).activation_checkpoint
    assert isinstance(selective, SelectiveAC.Config) and not selective.preserve_rng_state
    # another kind has other keys: those of the file no longer count
    full = load_config(path, ["--activation_checkpoint.kind=full"]).activation_checkpoint
    assert isinstance(full, FullAC.Config) and full.preserve_rng_state
    assert load_config(path, ["--activation_checkpoint", "none"]).activation_checkpoint is None


def test_lists_of_tables_become_their_dataclass(toml: Any) -> None:
    path = toml(
        "[optimizer]\nlr = 'none'\n[[optimizer.param_groups]]\npattern = '.*'\n"
        "optimizer_name = 'AdamW'\noptimizer_kwargs = {lr = 1e-3, betas = [0.9, 0.99]}\n"
    )
    (group,) = load_config(path).optimizer.param_groups
    assert group.optimizer_kwargs == {"lr": 1e-3, "betas": [0.9, 0.99]}


def test_overrides_of_stock_models_carry_their_arguments(toml: Any) -> None:
    by_file = load_config(toml("[override]\nimports = ['a.b', ['c.d', {k = 1}]]\n"))
    assert by_file.override.imports == ["a.b", ("c.d", {"k": 1})]
    by_argument = load_config(toml(""), ["--override.imports", 'c.d={"k": 1}'])
    assert by_argument.override.imports == [("c.d", {"k": 1})]


def test_a_file_can_start_from_another_recipe(toml: Any) -> None:
    config = load_config(toml("[job]\nrecipe = 'moe_7b'\n[model]\nrouter = 'token_rounding'\n"))
    assert (config.model.num_layers, config.model.router) == (40, "token_rounding")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[training]\nstepz = 4", "training.stepz = 4: unknown key; did you mean training.steps?"),
        ("[trainng]\nsteps = 4", "[trainng]: unknown key; did you mean training?"),
        ("[training]\nsteps = '4'", 'training.steps = "4": expected an integer, not a string'),
        ("[training]\nsteps = true", "expected an integer, not true or false"),
        ("[training]\nsteps = 4.5", "expected an integer, not a number"),
        ("training = 3\n[job]\nrecipe = 'base'", "expected a table of its keys"),
        ("[model]\nrouter = 'topkk'", "expected one of topk, token_rounding; did you mean topk?"),
        ("[model]\nrounding_tile = 0", "model.rounding_tile = 0: expected a number above 0"),
        ("[model]\ntop_k = 17", "model.top_k = 17 is more than model.num_experts = 16"),
        ("[activation_checkpoint]\nkind = 'ful'", "did you mean full?"),
        (
            "[activation_checkpoint]\nkind='full'\nmemory_budget = 1",
            "activation_checkpoint.memory_budget = 1: unknown key",
        ),
        ("[job]\nrecipe = 'moe_8b'", "unknown recipe; expected one of base, "),
        ("[job]\nrecipes = 'base'", "job.recipes: unknown key; did you mean recipe?"),
        ("[checkpoint]\nkeep_latest_k = 1", "[checkpoint] We need to maintain at least 2"),
        ("[model_spec]\nname = 'x'", "[model_spec]: unknown key"),
        ("[[optimizer.param_groups]]\npatern = 'x'", "unknown key patern; did you mean pattern?"),
        ("[training\nsteps = 1", "not valid TOML"),
        ("job = 'recipe'", "job = 'recipe': expected a table with recipe"),
        ("[job.recipe]\nname = 'base'", "[job.recipe]: expected a name; expected one of base"),
        ("[optimizer]\nlr = nan", "optimizer.lr = NaN: expected a number"),
    ],
)
def test_mistakes_in_a_file_name_file_key_and_what_is_accepted(
    toml: Any, text: str, says: str
) -> None:
    path = toml(text)
    message = error(path)
    assert message.startswith(f"{path}: ")
    assert says in message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--training.stepz", "4"],
            'training.stepz = "4": unknown key; did you mean training.steps?',
        ),
        (["--model.router", "roundabout"], 'model.router = "roundabout": expected one of topk, '),
        (["--training.steps", "four"], 'training.steps = "four": expected an integer'),
        (["--training.steps"], "training.steps: expected a value: an integer"),
        (["--model.rounding_tile", "0"], "model.rounding_tile = 0: expected a number above 0"),
        (["--compile.enable", "maybe"], "expected true or false"),
        (["training.steps", "4"], "training.steps: expected --table.key value"),
        (
            ["--training.steps=4", "run.toml"],
            "run.toml: expected --table.key value or --table.key=",
        ),
        (["--training.steps=4", "run.toml"], "; the configuration comes first"),
        (["--training", "4"], "expected a table of its keys"),
        (["--optimizer.lr", "0"], "optimizer.lr = 0.0: expected a number above 0"),
        (["--job.recipe", "debugg"], "did you mean debug?"),
        (["--job", "debug"], "job = 'debug': expected a table with recipe"),
        (["--training.max_norm", "nan"], 'training.max_norm = "nan": expected a number'),
        (["--model.dim=64", "--model.dim.x=3"], "a value, which has no keys of its own"),
    ],
)
def test_mistakes_on_the_command_line_name_key_and_what_is_accepted(
    toml: Any, arguments: list[str], says: str
) -> None:
    message = error(toml(""), *arguments)
    assert message.startswith("command line: ")
    assert says in message


def test_missing_file_names_the_nearest_one(toml: Any) -> None:
    path = toml("")
    assert error(path.with_name("rum.toml")).endswith(f"no such file; did you mean {path}?")


@pytest.mark.parametrize("name", ["debug.toml", "debug", "debugg.toml", "elsewhere/debug.toml"])
def test_missing_file_is_looked_for_among_the_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    assert error(Path(name)) == f"{name}: no such file; did you mean configs/debug.toml?"
    monkeypatch.chdir(tmp_path)
    assert error(Path(name)).endswith(f"no such file; did you mean {CONFIGS / 'debug.toml'}?")


def test_printed_configuration_makes_the_same_run(toml: Any) -> None:
    path = toml("[activation_checkpoint]\nkind = 'selective'\n[optimizer]\neps = 1e-10\n")
    folder = ["--dump_folder", 'a "b" \\ \u00e9 \U0001f600 \x7f']
    command = Command.parse([str(path), "--training.steps", "3", *folder], usage="")
    text = command.resolved(command.load())
    again = toml(text)
    given, made = command.load().to_dict(), load_config(again).to_dict()
    given.pop("model_spec"), made.pop("model_spec")  # built from [model]; prints addresses
    assert made == given
    assert Command.parse([str(again)], usage="").resolved(load_config(again)) == text


def test_command_reads_file_options_and_overrides_in_any_order() -> None:
    command = Command.parse(
        ["--training.steps", "3", "--job.config_file", "x.toml", "--print-config", "--nproc=2"],
        usage="",
    )
    assert command == Command("x.toml", ("--training.steps", "3"), True, 2)
    assert Command.parse(["x.toml", "--nproc", "4"], usage="").num_processes == 4
    with pytest.raises(ConfigError, match="which configuration"):
        Command.parse([], usage="")
