"""The command line: ``python -m blipdiff_train [command] key=value …``.

The only file that knows Hydra. A single run is composed in this process; ``-m`` hands the list of jobs to Hydra's
sweeper and launcher, and each job is a process of its own that runs the same command without ``-m``. Arguments are
checked before anything heavy is imported.
"""

from __future__ import annotations

import itertools
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

HELP_WORDS = ("-h", "--help", "help")

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
  data.shards=DIR               train on your own shards (see prepare); data.val_shards=DIR validates on others
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
  <command> --help              every key of a command: value, what is allowed, meaning; also `stage=2 --help`
  -m, --multirun                one job for each combination of the values given with commas
  --cfg                         print the composed configuration and stop
  --config-dir DIR              look for configuration files (experiment/…) in DIR too
"""


def config_folder(command: str = "train") -> Path:
    """The folder of the primary file of ``command``.

    Commands without groups of configuration files have theirs in ``commands/``: there ``model=FOLDER`` is a value, and
    not the choice of ``model/FOLDER.yaml``.
    """
    from blipdiff_train.common.files import configs_folder

    return configs_folder() if command in WITH_GROUPS else configs_folder() / "commands"


def quote_stage(token: str) -> str:
    """``stage=1`` as Hydra accepts it, ``stage='1'``; applied twice it changes nothing more.

    Hydra 1.3 reads the 1 as a number and refuses it as the name of a configuration file. Lists for sweeps
    (``stage=1,2``, ``stage=choice(1,2)``) and prefixes (``+stage=1``) are quoted piece by piece.
    """
    found = re.fullmatch(r"(\+{0,2}stage=(?:choice\()?)(\d+(?:\s*,\s*\d+)*)(\)?)", token)
    if not found:
        return token
    return found[1] + re.sub(r"\d+", r"'\g<0>'", found[2]) + found[3]


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command and the rest: no first word, or one that is a flag or has a ``=``, means train.

    Raises:
        ConfigError: a word that is no command.
    """
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0] or arguments[0].startswith("~"):
        return "train", list(arguments)
    word = arguments[0]
    if word not in COMMANDS:
        from blipdiff_train.config import ConfigError, Problem, nearest

        hint = nearest(word, list(COMMANDS)) or as_override(word, arguments[1:])
        raise ConfigError([Problem("", f"no command {word!r}{hint} (commands: {', '.join(COMMANDS)})")])
    return word, list(arguments[1:])


def as_override(word: str, rest: Sequence[str]) -> str:
    """A hint for ``--stage=1``, ``--stage 1`` and ``stage 1``, as other programs have them: here it is ``stage=1``."""
    key, _, value = word.lstrip("-").replace("-", "_").partition("=")
    value = value or next((item for item in rest if "=" not in item and not item.startswith("-")), "")
    return f"; write {key}={value or '…'}"


# ---- composing -----------------------------------------------------------------------------------------------------


def compose(command: str, tokens: Sequence[str], search: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration of ``command`` with the overrides ``tokens``, as plain data, after every check.

    Args:
        tokens: overrides in Hydra's grammar, without flags.
        search: further folders with configuration files.

    Raises:
        ConfigError: with every problem of syntax, names, types, limits and combinations at once.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from blipdiff_train.config import ConfigError, Problem, check_command

    def composed(overrides: Sequence[str]) -> dict[str, Any]:
        return OmegaConf.to_container(_hydra_compose(command, overrides, search), resolve=True)

    groups, values, problems = _parse(command, tokens, search)
    if any(name == "data.shards" for name, _, _ in values) and not any("data=" in choice for choice in groups):
        groups.append("data=shards")  # who names shards does not mean the toy world
    try:
        base = composed(groups)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*problems, Problem(" ".join(groups), _words(error))]) from error
    kept = []
    for name, token, must_exist in values:
        problem = _unknown(name, base, command) if must_exist else None
        if problem:
            problems.append(problem)
        else:
            kept.append((name, token))
    try:
        plain = composed(groups + [token for _, token in kept])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*problems, Problem("", _words(error))]) from error
    _, found = check_command(command, plain)
    if found:
        # with the bad values taken back, what else is wrong shows as well
        bad = {problem.key for problem in found}
        good = [token for name, token in kept if name not in bad]
        _, more = check_command(command, composed(groups + good))
        found += [problem for problem in more if problem not in found and problem.key not in bad]
    if problems or found:
        raise ConfigError(problems + found)
    return plain


def _hydra_compose(command: str, overrides: Sequence[str], search: Sequence[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    folders = ",".join("file://" + str(Path(item).resolve()) for item in search)
    more = [f"hydra.searchpath=[{folders}]"] if folders else []
    with initialize_config_dir(str(config_folder(command)), version_base="1.3"):
        return hydra_compose(command, [*more, *overrides])


def _parse(
    command: str, tokens: Sequence[str], search: Sequence[str]
) -> tuple[list[str], list[tuple[str, str, bool]], list[Any]]:
    """Sort overrides into choices of configuration files, values (name, token, must exist), and problems."""
    from blipdiff_train.config import Problem, nearest

    groups: list[str] = []
    values: list[tuple[str, str, bool]] = []
    overrides, problems = _read_overrides(tokens)
    for override in overrides:
        name, token = override.key_or_group, override.input_line
        if override.is_sweep_override():
            problems.append(Problem(name, "has several values; add -m to run one job for each of them"))
            continue
        if is_hydras(name):
            problems.append(Problem(name, "is a setting of sweeps, e.g. -m optim.lr=1e-4,3e-4; this is a single run"))
            continue
        choices = _choices(command, name, search)
        if choices is None:
            values.append((name, token, not (override.is_add() or override.is_force_add())))
            continue
        choice = override.value()
        if choice in choices and not override.is_delete():
            groups.append(token)
        else:
            hint = nearest(str(choice), choices)
            wanted = "null" if choice is None else repr(choice)
            problems.append(Problem(name, f"there is no {wanted}{hint} (allowed: {', '.join(choices)})"))
    return groups, values, problems


def _read_overrides(tokens: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Hydra's overrides, and the problems of what is none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from blipdiff_train.config import Problem

    parser, overrides, problems = OverridesParser.create(), [], []
    for token in tokens:
        try:
            overrides.append(parser.parse_override(token))
        except HydraException as error:
            advice = "write key=value, and quote a value with special characters: key='\"a, b\"'"
            problems.append(Problem(token, f"cannot be read ({_words(error)}); {advice}"))
    return overrides, problems


def is_hydras(name: str) -> bool:
    """Whether a key is one of Hydra's own: the launcher of sweeps and its settings."""
    return name.startswith(("hydra.", "hydra/"))


def _choices(command: str, group: str, search: Sequence[str]) -> list[str] | None:
    """The files of a configuration group, None if it is no group."""
    folders = [folder / group for folder in (config_folder(command), *map(Path, search)) if (folder / group).is_dir()]
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


def _words(error: Exception) -> str:
    """An error of Hydra's in one line, with the choices that it lists."""
    first, *more = (line.strip() for line in str(error).strip().splitlines())
    if "submitit" in first:
        return f"{first} (needs: pip install hydra-submitit-launcher)"
    starts = [number for number, line in enumerate(more) if line.startswith("Available options")]
    if not starts:
        return first
    options = itertools.takewhile(lambda line: line and not line.endswith(":"), more[starts[0] + 1 :])
    return f"{first} (allowed: {', '.join(options)})"


# ---- sweeps --------------------------------------------------------------------------------------------------------


def sweep(command: str, tokens: Sequence[str], search: Sequence[str], *, only_show: bool = False) -> int:
    """Run one job for each combination of values; each in its own process and folder, by Hydra's launcher.

    A job's folder is named after the swept values, so that the same sweep again finds its jobs: finished ones say so
    and stop, the others continue.

    Args:
        only_show: print the jobs and their configurations instead.
    """
    import hydra
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from blipdiff_train.config import ConfigError, Problem

    overrides, problems = _read_overrides(tokens)
    own = [item for item in overrides if not is_hydras(item.key_or_group)]
    hydras = [item.input_line for item in overrides if is_hydras(item.key_or_group)]
    swept = [item.key_or_group for item in own if item.is_sweep_override()]
    if not swept:
        problems.append(Problem("-m", "no key has several values, e.g. -m stage=1,2 or -m optim.lr=1e-4,3e-4"))
    try:
        _hydra_compose(command, hydras, search)
    except (HydraException, OmegaConfBaseException) as error:
        problems.append(Problem(" ".join(hydras), _words(error)))
    jobs = BasicSweeper.split_arguments(own, None)[0]
    plains = []
    for job in jobs:
        try:
            plains.append(compose(command, job_tokens(job, swept), search))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)
    print(f"{len(jobs)} job{'s' if len(jobs) > 1 else ''} over {', '.join(swept)}", flush=True)
    if only_show:
        for job, plain in zip(jobs, plains, strict=True):
            print(f"--- # {' '.join([command, *job_tokens(job, swept)])}\n{as_yaml(plain)}", end="")
        return 0

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

    folder = plains[0].get("output_dir", "outputs")
    quiet = [f"hydra.sweep.dir={folder}/.sweeps", "hydra.sweep.subdir=.", "hydra.output_subdir=null"]
    quiet += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    arguments = sys.argv
    sys.argv = [arguments[0], "--multirun", *quiet, *tokens]
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder(command)), config_name=command)(run_job)()
    finally:
        sys.argv = arguments
    failed = [(job, code) for job, code in results if code]
    print(f"{len(results) - len(failed)} of {len(jobs)} jobs finished", flush=True)
    for job, code in failed:
        print(f"  exit code {code}: {' '.join(job)}", flush=True)
    return failed[0][1] if failed else 0


INTERRUPTED = 85
"""Exit code of a command that a signal stopped, with what is finished saved: run the same command again."""


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
    except (ValueError, OSError) as error:
        if os.environ.get("BLIPDIFF_DEBUG"):
            raise
        of_file = isinstance(error, OSError) and error.filename is not None
        words = f"{error.filename}: {error.strerror}" if of_file else error
        print(f"stopped: {words}\n(BLIPDIFF_DEBUG=1 shows where)", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"stopped: {str(stop) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED


def command_help(command: str, tokens: Sequence[str], search: Sequence[str]) -> str:
    """Every key of a command with its value under the overrides ``tokens``, what is allowed, and its meaning."""
    import typing
    from dataclasses import fields, is_dataclass

    from blipdiff_train.config import allowed, schema_of

    plain = compose(command, tokens, search)

    def lines(schema: type, values: Mapping[str, Any], prefix: str) -> list[str]:
        hints = typing.get_type_hints(schema)
        found = []
        for item in fields(schema):
            if is_dataclass(hints[item.name]):
                found += lines(hints[item.name], values[item.name], f"{prefix}{item.name}.")
            else:
                value = "null" if values[item.name] is None else values[item.name]
                value = str(value).lower() if isinstance(value, bool) else value
                may_be = allowed(hints[item.name], item.metadata)
                found.append(f"  {prefix}{item.name}={value}    ({may_be})\n      {item.metadata['meaning']}")
        return found

    parts = [f"python -m blipdiff_train {command} key=value …    {COMMANDS[command]}"]
    files = _files(command, search)
    if files:
        parts.append("files, each of which sets many of the keys below (--cfg shows the result)\n" + "\n".join(files))
    parts.append("keys\n" + "\n".join(lines(schema_of(command, plain), plain, "")))
    return "\n\n".join(parts)


def _files(command: str, search: Sequence[str]) -> list[str]:
    """A line for each configuration file that can be chosen, with the first line of its comment."""
    if command not in WITH_GROUPS:
        return []
    found = []
    for group in ("stage", "model", "data", "trainer", "logger", "experiment"):
        for choice in _choices(command, group, search) or []:
            folders = [config_folder(command), *map(Path, search)]
            file = next(path for folder in folders if (path := folder / group / f"{choice}.yaml").is_file())
            comments = (line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
            found.append(f"  {f'{group}={choice}':24}  {next((line for line in comments if line[0] != '@'), '')}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: the arguments are wrong)."""
    from blipdiff_train.config import ConfigError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) > 1 and arguments[0] in HELP_WORDS:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in HELP_WORDS:
        show(HELP.format(commands="\n".join(f"  {name:10}{meaning}" for name, meaning in COMMANDS.items())))
        return 0
    try:
        command, rest = split_command(arguments)
        flags, tokens, search = _flags(rest)
        if "--help" in flags:
            show(command_help(command, tokens, search))
            return 0
        if "--multirun" in flags:
            return sweep(command, tokens, search, only_show="--cfg" in flags)
        plain = compose(command, tokens, search)
    except ConfigError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            count = len(error.problems)
            print(f"{count} problem{'s' if count > 1 else ''} with the arguments:\n{error}", file=sys.stderr)
        return 2
    if "--cfg" in flags:
        show(as_yaml(plain).rstrip("\n"))
        return 0
    return run(command, plain)


def show(text: str) -> None:
    """Print; a reader such as ``head`` may have enough before the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_yaml(plain: Mapping[str, Any]) -> str:
    """A composed configuration as it would stand in one file."""
    import yaml

    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _flags(tokens: Sequence[str]) -> tuple[set[str], list[str], list[str]]:
    """Flags, overrides, and the folders given with ``--config-dir``."""
    from blipdiff_train.config import ConfigError, Problem, nearest

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
        elif token.partition("=")[0] in ("--config-dir", "-cd"):
            folder = token.partition("=")[2] or next(rest, None)
            if folder is None or not Path(folder).is_dir():
                problems.append(Problem("--config-dir", f"{folder!r} is not a folder"))
            else:
                search.append(folder)
        elif token.startswith("-"):
            hint = nearest(token, [*names, "--config-dir"]) or as_override(token, tokens[tokens.index(token) + 1 :])
            allowed = "--help, --multirun or -m, --cfg, --config-dir"
            problems.append(Problem(token, f"no such flag{hint} (allowed: {allowed})"))
        else:
            overrides.append(quote_stage(token))
    if problems:
        raise ConfigError(problems)
    return flags, overrides, search


if __name__ == "__main__":
    sys.exit(main())
