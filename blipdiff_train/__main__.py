"""The command line: ``python -m blipdiff_train [command] key=value …``.

The only file that knows Hydra. A single run is composed in this process; ``-m`` hands the list of jobs to Hydra's
sweeper and launcher, and each job is a process of its own that runs the same command without ``-m``. Arguments are
checked before anything heavy is imported.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMANDS = {
    "train": "train stage 1 or stage 2 (the default: the word may be left out)",
    "prepare": "turn a folder of photographs into annotated shards",
    "generate": "make pictures of a subject from a prompt",
    "evaluate": "measure a trained model",
    "export": "write a trained model in another layout",
    "doctor": "check data, batch arithmetic and machine before a run",
}

WITH_GROUPS = ("train", "doctor")

HELP = """\
blipdiff_train: train BLIP-Diffusion.   python -m blipdiff_train [command] key=value …

commands (each runs on the embedded toy world and models when given nothing else)
{commands}

the keys used most
  stage=1 | stage=2             what to train
  name=my-run                   runs live in outputs/stage<n>/<name>; the same command again continues the run
  trainer.devices=8             GPUs; trainer.accelerator=cpu trainer.devices=2 runs two CPU processes
  global_batch_size=256         samples a step over all devices; micro-batch and accumulation follow from it
  total_steps=1000              optimizer steps
  optim.lr=1e-4                 peak learning rate
  data=shards data.shards=DIR   train on your own shards (see prepare)
  model=sd15                    CLIP ViT-L/14, BERT-base and Stable Diffusion 1.5 instead of the toy models
  logger=wandb | tensorboard    besides metrics.csv
  resume=never                  start over instead of continuing (resume=auto); or resume=PATH

examples
  python -m blipdiff_train stage=1
  python -m blipdiff_train stage=2 trainer.devices=8
  python -m blipdiff_train -m stage=1,2
  python -m blipdiff_train -m stage=1 optim.lr=1e-4,3e-4
  python -m blipdiff_train prepare input=photos output=shards
  python -m blipdiff_train generate model=outputs/stage2/default/model subject=dog image=dog.jpg prompt="on the beach"

flags
  <command> --help              every key of a command with its value and meaning
  -m, --multirun                one job for each combination of the values given with commas
  --cfg                         print the composed configuration and stop
  --config-dir DIR              look for configuration files (experiment/…) in DIR too
"""


def config_folder(command: str = "train") -> Path:
    """``configs/``: inside the package when installed from a wheel, beside it in a checkout.

    Commands without groups of configuration files have theirs in ``commands/`` below it: there ``model=FOLDER`` is a
    value, and not the choice of ``model/FOLDER.yaml``.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder if command in WITH_GROUPS else folder / "commands"
    raise FileNotFoundError(f"no configs/ in {package} or beside it: the installation is incomplete")


def quote_stage(token: str) -> str:
    """``stage=1`` as Hydra accepts it, ``stage='1'``; applied twice it changes nothing more.

    Hydra 1.3 reads the 1 as a number and refuses it as the name of a configuration file. Lists for sweeps
    (``stage=1,2``) and prefixes (``+stage=1``) are quoted piece by piece.
    """
    found = re.fullmatch(r"(\+{0,2}stage=)(\d+(?:,\d+)*)", token)
    if not found:
        return token
    return found[1] + ",".join(f"'{number}'" for number in found[2].split(","))


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command and the rest: no first word, or one that is a flag or has a ``=``, means train.

    Raises:
        ConfigError: a word that is no command.
    """
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0] or arguments[0].startswith("~"):
        return "train", list(arguments)
    if arguments[0] not in COMMANDS:
        from blipdiff_train.config import ConfigError, Problem, nearest

        hint = nearest(arguments[0], list(COMMANDS))
        raise ConfigError(
            [Problem("", f"no command {arguments[0]!r}{hint} (commands: {', '.join(COMMANDS)})")]
        )
    return arguments[0], list(arguments[1:])


# ---- composing -----------------------------------------------------------------------------------------------------


def compose(command: str, tokens: Sequence[str], search: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration of ``command`` with the overrides ``tokens``, as plain data, after every check.

    Args:
        tokens: overrides in Hydra's grammar, without flags.
        search: further folders with configuration files.

    Raises:
        ConfigError: with every problem of syntax, names, types, limits and combinations at once.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from blipdiff_train.config import ConfigError, Problem, check_command

    def composed(overrides: Sequence[str]) -> dict[str, Any]:
        with initialize_config_dir(str(config_folder(command)), version_base="1.3"):
            config = hydra_compose(command, list(overrides))
        return OmegaConf.to_container(config, resolve=True)

    extra = [
        f"hydra.searchpath=[{','.join('file://' + str(Path(item).resolve()) for item in search)}]"
    ] * bool(search)
    groups, values, problems = _parse(command, tokens, search)
    base = composed(extra + groups)
    kept = []
    for name, token, must_exist in values:
        problem = _unknown(name, base, command) if must_exist else None
        if problem:
            problems.append(problem)
        else:
            kept.append((name, token))
    try:
        plain = composed(extra + groups + [token for _, token in kept])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*problems, Problem("", _first_line(error))]) from error
    _, found = check_command(command, plain)
    if found:
        # with the bad values taken back, what else is wrong shows as well
        bad = {problem.key for problem in found}
        good = [token for name, token in kept if name not in bad]
        _, more = check_command(command, composed(extra + groups + good))
        found += [problem for problem in more if problem not in found and problem.key not in bad]
    if problems or found:
        raise ConfigError(problems + found)
    return plain


def _parse(
    command: str, tokens: Sequence[str], search: Sequence[str]
) -> tuple[list[str], list[tuple[str, str, bool]], list[Any]]:
    """Sort overrides into choices of configuration files, values (name, token, must exist), and problems."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from blipdiff_train.config import Problem, nearest

    parser = OverridesParser.create()
    groups: list[str] = []
    values: list[tuple[str, str, bool]] = []
    problems: list[Problem] = []
    for token in tokens:
        try:
            override = parser.parse_override(token)
        except HydraException as error:
            advice = "write key=value, and quote a value with special characters: key='\"a, b\"'"
            problems.append(Problem(token, f"cannot be read ({_first_line(error)}); {advice}"))
            continue
        name = override.key_or_group
        if override.is_sweep_override():
            problems.append(Problem(name, "has several values; add -m to run one job for each of them"))
            continue
        choices = _choices(command, name, search)
        if choices is None:
            if not name.startswith("hydra."):
                values.append((name, token, not (override.is_add() or override.is_force_add())))
            continue
        choice = override.value()
        if override.is_delete() or choice is None or choice in choices:
            groups.append(token)
        else:
            hint = nearest(str(choice), choices)
            problems.append(Problem(name, f"there is no {choice!r}{hint} (allowed: {', '.join(choices)})"))
    return groups, values, problems


def _choices(command: str, group: str, search: Sequence[str]) -> list[str] | None:
    """The files of a configuration group, None if it is no group."""
    folders = [
        folder / group for folder in (config_folder(command), *map(Path, search)) if (folder / group).is_dir()
    ]
    if group.startswith("hydra/"):
        folders = folders or [Path()]
        return ["basic", *sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")}) if folders else None


def _unknown(name: str, base: Mapping[str, Any], command: str) -> Any:
    """The problem of a key that the composed configuration does not have, None if it has it."""
    from blipdiff_train.config import schema_of, unknown_key

    node: Any = base
    for part in name.split("."):
        if isinstance(node, Mapping) and part in node:
            node = node[part]
        else:
            return unknown_key(name, schema_of(command, base))
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


# ---- sweeps --------------------------------------------------------------------------------------------------------


def sweep(command: str, tokens: Sequence[str], search: Sequence[str]) -> int:
    """Run one job for each combination of values; each in its own process and folder, by Hydra's launcher.

    A job's folder is named after the swept values, so that the same sweep again finds its jobs: finished ones say so
    and stop, the others continue.
    """
    import hydra
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from blipdiff_train.config import ConfigError, Problem

    overrides = OverridesParser.create().parse_overrides(list(tokens))
    swept = [override.key_or_group for override in overrides if override.is_sweep_override()]
    if not swept:
        raise ConfigError(
            [Problem("-m", "no key has several values, e.g. -m stage=1,2 or -m optim.lr=1e-4,3e-4")]
        )
    jobs = BasicSweeper.split_arguments(
        [item for item in overrides if item.key_or_group != "hydra/launcher"], None
    )[0]
    problems: list[Problem] = []
    for job in jobs:
        try:
            compose(command, job_tokens(job, swept), search)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)
    print(f"{len(jobs)} jobs over {', '.join(swept)}", flush=True)

    results: list[tuple[list[str], int]] = []

    def run_job(config: Any) -> int:
        if results and results[-1][1] == INTERRUPTED:
            return INTERRUPTED
        here = [command, *job_tokens(list(HydraConfig.get().overrides.task), swept)]
        here += [item for folder in search for item in ("--config-dir", folder)]
        print(f"job {len(results) + 1}: {' '.join(here)}", flush=True)
        code = _run_child([sys.executable, "-m", "blipdiff_train", *here])
        results.append((here, code))
        if code and HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":
            raise RuntimeError(f"the job ended with exit code {code}: {' '.join(here)}")
        return code

    folder = compose(command, job_tokens(jobs[0], swept), search).get("output_dir", "outputs")
    quiet = [f"hydra.sweep.dir={folder}/.sweeps", "hydra.sweep.subdir=.", "hydra.output_subdir=null"]
    quiet += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    arguments = sys.argv
    sys.argv = [arguments[0], "--multirun", *quiet, *tokens]
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder(command)), config_name=command)(
            run_job
        )()
    finally:
        sys.argv = arguments
    failed = [(job, code) for job, code in results if code]
    print(f"{len(results) - len(failed)} of {len(jobs)} jobs finished", flush=True)
    for job, code in failed:
        print(f"  exit code {code}: {' '.join(job)}", flush=True)
    return failed[0][1] if failed else 0


INTERRUPTED = 85
"""Exit code of a run that a signal stopped after saving: run the same command again."""


def job_tokens(overrides: Sequence[str], swept: Sequence[str]) -> list[str]:
    """The overrides of one job of a sweep, with a ``name`` that holds the swept values.

    ``stage`` and ``name`` are part of the run's folder already: a sweep over stages alone continues the runs that
    single commands made.
    """
    tokens = [quote_stage(token) for token in overrides]
    values = dict(token.lstrip("+").split("=", 1) for token in tokens if "=" in token)
    parts = [f"{key}={values[key]}" for key in swept if key in values and key not in ("stage", "name")]
    if not parts:
        return tokens
    part = re.sub(r"[^\w.=,+-]+", "_", ",".join(parts))
    name = values.get("name", "default").strip("'\"")
    return [token for token in tokens if not token.startswith("name=")] + [f"name='{name}/{part}'"]


def _run_child(arguments: list[str]) -> int:
    """Run a job in its own process, passing on the signals that ask it to save and stop."""
    child = subprocess.Popen(arguments)
    previous = {
        number: signal.signal(number, lambda got, _: child.send_signal(got))
        for number in (signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        return child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ---- commands ------------------------------------------------------------------------------------------------------


def run(command: str, plain: dict[str, Any]) -> int:
    """Run a command on its checked configuration; the heavy imports happen here."""
    from blipdiff_train.config import check_command

    config = check_command(command, plain)[0]
    if command == "train":
        from blipdiff_train.train import run as train

        return train(config, plain)
    from blipdiff_train import commands

    try:
        return getattr(commands, command)(config, plain)
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("BLIPDIFF_DEBUG"):
            raise
        print(f"stopped: {error}\n(BLIPDIFF_DEBUG=1 shows where)", file=sys.stderr)
        return 1


def command_help(command: str, search: Sequence[str]) -> str:
    """Every key of a command with its value in the default configuration, and its meaning."""
    import typing
    from dataclasses import fields, is_dataclass

    from blipdiff_train.config import schema_of

    plain = compose(command, [], search)

    def lines(schema: type, values: Mapping[str, Any], prefix: str) -> list[str]:
        hints = typing.get_type_hints(schema)
        found = []
        for item in fields(schema):
            if is_dataclass(hints[item.name]):
                found += lines(hints[item.name], values[item.name], f"{prefix}{item.name}.")
            else:
                value = "null" if values[item.name] is None else values[item.name]
                value = str(value).lower() if isinstance(value, bool) else value
                found.append(f"  {prefix}{item.name}={value}\n      {item.metadata['meaning']}")
        return found

    title = f"python -m blipdiff_train {command} key=value …    {COMMANDS[command]}\n\n"
    return title + "\n".join(lines(schema_of(command, plain), plain, ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: the arguments are wrong)."""
    from blipdiff_train.config import ConfigError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:10}{meaning}" for name, meaning in COMMANDS.items())))
        return 0
    try:
        command, rest = split_command(arguments)
        flags, tokens, search = _flags(rest)
        if "--help" in flags:
            print(command_help(command, search))
            return 0
        if "--multirun" in flags:
            return sweep(command, tokens, search)
        plain = compose(command, tokens, search)
    except ConfigError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            count = len(error.problems)
            print(f"{count} problem{'s' if count > 1 else ''} with the arguments:\n{error}", file=sys.stderr)
        return 2
    if "--cfg" in flags:
        import yaml

        print(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), end="")
        return 0
    return run(command, plain)


def _flags(tokens: Sequence[str]) -> tuple[set[str], list[str], list[str]]:
    """Flags, overrides, and the folders given with ``--config-dir``."""
    from blipdiff_train.config import ConfigError, Problem

    names = {
        "-m": "--multirun",
        "--multirun": "--multirun",
        "-h": "--help",
        "--help": "--help",
        "--cfg": "--cfg",
    }
    flags: set[str] = set()
    overrides: list[str] = []
    search: list[str] = []
    problems: list[Problem] = []
    rest = iter(tokens)
    for token in rest:
        if token in names:
            flags.add(names[token])
        elif token in ("--config-dir", "-cd"):
            folder = next(rest, None)
            if folder is None or not Path(folder).is_dir():
                problems.append(Problem("--config-dir", f"{folder!r} is not a folder"))
            else:
                search.append(folder)
        elif token.startswith("-"):
            problems.append(
                Problem(token, "no such flag (allowed: --help, --multirun or -m, --cfg, --config-dir)")
            )
        else:
            overrides.append(quote_stage(token))
    if problems:
        raise ConfigError(problems)
    return flags, overrides, search


if __name__ == "__main__":
    sys.exit(main())
