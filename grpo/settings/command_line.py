"""The command line of the scripts: --config, one flag per key of config.yaml, and the options of the script."""

import argparse
import dataclasses
import functools
import re
import signal
import typing
from collections.abc import Sequence
from typing import Any

from grpo.algorithms import ALGORITHMS, CRITIC_SCRIPT, plain_table
from grpo.errors import InputError, exit_with
from grpo.settings.config import (
    TYPES,
    Config,
    Options,
    check_data_files,
    documented_sections,
    load_config,
    resumed_config,
)
from grpo.settings.rules import one_of
from grpo.settings.synonyms import suggestion


class SettingsParser(argparse.ArgumentParser):
    """A command line with --config and one flag per key of config.yaml.

    --help shows the settings in the first half of config.yaml, --help_all shows all of them. A wrong command line ends
    the process with one line on stderr and exit status 2.
    """

    def __init__(self, description: str, usage: str) -> None:
        super().__init__(
            usage=f"%(prog)s {usage} [--config FILE] [--KEY VALUE …]",  # argparse's own usage would name every key
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--help_all", action=_HelpAll, nargs=0, help="show this help with every setting and exit")
        self.add_argument("--config", metavar="FILE", help="YAML file with the settings that differ from config.yaml")
        self.own = self.add_argument_group("this command")
        self.shows_advanced = False
        self._advanced_groups = []
        for section in documented_sections():
            group = self.add_argument_group(section.title, section.description or None)
            if section.is_advanced:
                self._advanced_groups.append(group)
            for key, (default, comment) in section.settings.items():
                # argparse expands % in help texts
                group.add_argument(f"--{key}", metavar="X", help=f"{comment} (default: {default})".replace("%", "%%"))
        self._pointer = self.add_argument_group("advanced settings", "--help_all lists every setting.")

    def format_help(self) -> str:
        """The text of --help, or of --help_all if `shows_advanced`."""
        every_group = self._action_groups
        hidden = [self._pointer] if self.shows_advanced else self._advanced_groups
        self._action_groups = [group for group in every_group if group not in hidden]
        try:
            return super().format_help()
        finally:
            self._action_groups = every_group

    def allow_only(self, choices: dict[str, str]) -> None:
        """Let the help of these settings say that only one value is allowed."""
        for action in self._actions:
            if (choice := choices.get(action.dest)) is not None:
                action.help = f"only {choice} works with this script"

    def error(self, message: str) -> typing.NoReturn:
        missing = re.fullmatch(r"argument (--\w+): expected one argument", message)
        if missing:
            flag = missing[1]
            message = f"{flag}: the value is missing. Write {flag} VALUE, or {flag}=VALUE if VALUE starts with -."
        exit_with(InputError(message))

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """The arguments, and those that are settings as overrides for `load_config`."""
        known, unknown = self.parse_known_args(arguments)
        if arguments is None:
            # The slow imports come next. Ctrl-C during them should not print a traceback; see `errors_explained`.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-"):
                self.error(f"{unknown[0]}: not a flag. Put a value with spaces in quotes: --rewards '[math, format]'")
            names = [option.lstrip("-") for option in self._option_string_actions]
            hint = suggestion(flag.lstrip("-"), names, prefix="--")
            self.error(f"{flag}: not a setting{hint or '; --help_all lists every setting'}")
        return known, [f"{key}={getattr(known, key)}" for key in TYPES if getattr(known, key) is not None]


class _HelpAll(argparse.Action):
    """--help with the advanced settings."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, SettingsParser)
        parser.shows_advanced = True
        parser.print_help()
        parser.exit()


def parse_command_line(
    description: str, arguments: Sequence[str] | None = None, *, has_critic: bool = False
) -> tuple[Config, Options]:
    """The settings and options of a training script. Wrong input ends the process with exit status 2.

    Args:
        description: the text above the list of flags in --help.
        arguments: None = those of the process.
        has_critic: the script trains a critic. Its algorithm is ppo, also if no flag or file says so.
    """
    parser = SettingsParser(description, "[--dry_run | --preflight | --resume | --overwrite]")
    if has_critic:
        parser.allow_only({"algorithm": "ppo", "advantage_baseline": "critic"})
    parser.epilog = f"algorithms: the values that each one gives to settings that are null\n\n{plain_table()}"
    add = functools.partial(parser.own.add_argument, action="store_true")
    add("--dry_run", help="print what the settings amount to and one rendered prompt, then stop")
    add("--preflight", help="sample some groups from the base model, print what there is to learn from, then stop")
    add("--resume", help="continue the run in --output_dir from its newest checkpoint, with the settings of that run")
    add("--overwrite", help="delete the run in --output_dir and start a new one")
    known, overrides = parser.parse(arguments)
    options = Options(**{field.name: getattr(known, field.name) for field in dataclasses.fields(Options)})
    chosen = [f"--{name}" for name, is_chosen in dataclasses.asdict(options).items() if is_chosen]
    try:
        if len(chosen) > 1:
            raise InputError(f"{' and '.join(chosen)} cannot be combined. Use one of them.")
        if options.resume:
            config = resumed_config(known.config, overrides)
        else:
            config = load_config(known.config, overrides, recorded={"algorithm": "ppo"} if has_critic else None)
        if has_critic != (config.advantage_baseline == "critic"):
            raise InputError(f'algorithm: "{config.algorithm}" {_WRONG_SCRIPT[has_critic]}')
        check_data_files(config)
        return config, options
    except InputError as error:
        exit_with(error)


_WRONG_SCRIPT = {  # has_critic -> the end of the error message about an algorithm of the other script
    False: f"trains a critic, which this script does not. Run python {CRITIC_SCRIPT}, or use "
    + one_of(name for name, row in ALGORITHMS.items() if row["advantage_baseline"] != "critic")
    + ".",
    True: "has no critic, which this script trains. Run python train_grpo.py, or use ppo.",
}
