"""The command line of `python -m reward_model`. Nothing here imports torch, so that --help answers at once."""

import argparse
from collections.abc import Sequence

from grpo.settings.command_line import SettingsParser
from grpo.settings.config import Config, load_config


def parse_arguments(
    description: str | None, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Config]:
    """The names of the two files, and the settings to score with. `arguments`: None = those of the process."""
    parser = SettingsParser(description or "", "--data FILE --completions FILE")
    add = parser.own.add_argument
    add("--data", metavar="FILE", required=True, help="rows as a run has them: prompts, and the columns of the rewards")
    add(
        "--completions",
        metavar="FILE",
        required=True,
        help='JSON lines with a "completion": one for each row, in order; or each with the "prompt" of its row, as '
        "samples.jsonl has them",
    )
    parsed, overrides = parser.parse(arguments)
    return parsed, load_config(parsed.config, overrides)
