"""The import path of users' code: `from grpo.config import load_config`. The settings themselves: grpo/settings/."""

from grpo.settings.config import Config, Options, load_config

__all__ = ["Config", "Options", "load_config"]
