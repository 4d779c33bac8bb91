"""docs/SETTINGS.md as text, generated from config.yaml: every setting with its default and meaning.

python -m grpo.settings.page > docs/SETTINGS.md
"""

from grpo.settings.config import documented_sections

HEAD = """# Settings

This page is generated from `config.yaml` by `python -m grpo.settings.page`. Every setting is also a flag:
`python train_grpo.py --learning_rate 1e-4`. The value of a flag is parsed as YAML. A settings file for `--config` holds
only what differs from the defaults. If a description starts with `grpo:`, the default is `null`, and the text after
`grpo:` is the value that the algorithm `grpo` fills in. Steps [1] to [7] are those of the loop in `train_grpo.py`."""


def settings_page() -> str:
    """The whole page, in Markdown."""
    lines = [HEAD, "", "## Settings to learn GRPO with"]
    was_advanced = False
    for section in documented_sections():
        if section.is_advanced and not was_advanced:
            lines += ["", "## Advanced settings", ""]
            lines += ["Most runs keep these defaults. `--help` does not show them; `--help_all` does."]
        was_advanced = section.is_advanced
        lines += ["", f"### {section.title}", ""]
        if section.description:
            lines += [section.description, ""]
        lines += [f"- **`{key}`** (`{default}`): {comment}" for key, (default, comment) in section.settings.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(settings_page(), end="")
