"""The command line of the scripts: --config, a flag for every key of config.yaml, and what a script adds."""

import argparse
import dataclasses
import functools
import signal
import typing
from collections.abc import Sequence

from grpo.algorithms import ALGORITHMS, CRITIC_SCRIPT, plain_table
from grpo.errors import InputError, did_you_mean, exit_with
from grpo.settings.config import TYPES, Config, Options, documented_defaults, load_config, resumed_config


class SettingsParser(argparse.ArgumentParser):
    """A command line with --config and a flag for every key. What is wrong with it is one line, exit status 2."""

    def __init__(self, description: str, usage: str) -> None:
        super().__init__(
            usage=f"%(prog)s {usage} [--config FILE] [--KEY VALUE …]",  # argparse's own would name every key
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--config", metavar="FILE", help="YAML file with the settings that differ from config.yaml")
        self.own = self.add_argument_group("this command")
        settings = self.add_argument_group("settings, each a key of config.yaml")
        for key, (default, comment) in documented_defaults().items():
            # argparse expands % in help texts
            settings.add_argument(f"--{key}", metavar="X", help=f"{comment} (default: {default})".replace("%", "%%"))

    def allow_only(self, choices: dict[str, str]) -> None:
        """Say of these settings that there is no choice."""
        for action in self._actions:
            if (choice := choices.get(action.dest)) is not None:
                action.help = f"{choice}: nothing else is allowed here"

    def error(self, message: str) -> typing.NoReturn:
        exit_with(InputError(message))

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
        """The arguments, and what they say of settings as overrides for `load_config`."""
        known, unknown = self.parse_known_args(arguments)
        if (
            arguments is None
        ):  # the slow imports come next, and Ctrl-C there shall be no traceback; see errors_explained
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if unknown:
            flag = unknown[0].partition("=")[0]
            names = [option.lstrip("-") for option in self._option_string_actions]
            nearest = did_you_mean(flag.lstrip("-"), names, prefix="--")
            self.error(f"{flag}: not a setting{nearest}; --help lists them all")
        return known, [f"{key}={getattr(known, key)}" for key in TYPES if getattr(known, key) is not None]


def parse_command_line(
    description: str, arguments: Sequence[str] | None = None, *, has_critic: bool = False
) -> tuple[Config, Options]:
    """Settings and options of a training script. --help lists every key; wrong input ends the process with status 2.

    `has_critic`: the script learns a baseline, and its algorithm is ppo where nobody says otherwise.
    """
    parser = SettingsParser(description, "[--dry_run | --preflight | --resume | --overwrite]")
    if has_critic:
        parser.allow_only({"algorithm": "ppo", "advantage_baseline": "critic"})
    parser.epilog = f"algorithms: what each makes of the settings that are null\n\n{plain_table()}"
    add = functools.partial(parser.own.add_argument, action="store_true")
    add("--dry_run", help="print what the settings amount to and one rendered prompt, then stop")
    add("--preflight", help="sample some groups from the base, say what there is to learn from, then stop")
    add("--resume", help="go on with the run in --output_dir from its newest checkpoint, with its own settings")
    add("--overwrite", help="delete the run in --output_dir and start anew")
    known, overrides = parser.parse(arguments)
    options = Options(**{field.name: getattr(known, field.name) for field in dataclasses.fields(Options)})
    chosen = [f"--{name}" for name, is_chosen in dataclasses.asdict(options).items() if is_chosen]
    try:
        if len(chosen) > 1:
            raise InputError(f"got {' and '.join(chosen)}, allowed: one of them")
        if options.resume:
            config = resumed_config(known.config, overrides)
        else:
            config = load_config(known.config, overrides, recorded={"algorithm": "ppo"} if has_critic else None)
        if has_critic != (config.advantage_baseline == "critic"):
            raise InputError(f"algorithm: got {config.algorithm}, {_WRONG_SCRIPT[has_critic]}")
        return config, options
    except InputError as error:
        exit_with(error)


_WRONG_SCRIPT = {  # has_critic -> what is wrong with the algorithm
    False: f"which learns a critic: python {CRITIC_SCRIPT}; allowed here: "
    + " | ".join(name for name, row in ALGORITHMS.items() if row["advantage_baseline"] != "critic"),
    True: "which has no critic: python train_grpo.py; allowed here: ppo",
}
