"""What a policy may try on a reward instead of solving the problem: the generator of attacks that all rewards face."""

from collections.abc import Iterator

SIZE = 100_000  # characters of the huge ones
PLACES = {  # where rewards look for an answer
    "bare": "{}",
    "tags": "<reasoning>\nSo.\n</reasoning>\n<answer>\n{}\n</answer>",
    "mark": "So. #### {}",
    "box": "So \\boxed{{{}}}.",
    "everywhere": "<reasoning>\nSo.\n</reasoning>\n<answer>\n{0}\n</answer>\n#### {0}\n\\boxed{{{0}}} {0}",
}
DIGITS = {"fullwidth": 0xFF10, "Arabic": 0x660, "Devanagari": 0x966, "mathematical": 0x1D7CE}
UNITS = (  # of what a huge text is made
    *("a", "1", " ", "\n", "{", "}", "<", "\\", "`", "\t", "-", ".", ",", "\0"),
    *("\u0661", "\U0001d7d7", "\ud800", "\u200b"),  # digits of other scripts, half a character, one without width
    *("1,", "1.", "-1", "1,111,", "--", "9**", "\\frac{1}{", "\\boxed{", "\\boxed{{", "{}", "####", "#### 1\n"),
    *("<answer>", "</answer>", "<answer>1</answer>", "<reasoning>", "<reasoning>\n", "\n<answer>\n"),
    *("<reasoning>\n</reasoning>\n<answer>\n</answer>\n", "```", "```python\n", "```\n", "```python\n```\n"),
    *("a b ", "aa!", "x=1 ", "\\text{", "\\left", "(("),
)  # fmt: skip


def attacks(prompt: str, answer: str) -> Iterator[tuple[str, str]]:
    """(name, completion). The answer occurs only where it must not help: in digits that are none, among all others."""
    for name, text in [("empty", ""), ("blank", " \n\t\n"), ("a zero byte", "\0"), ("half a pair", "\ud83d")]:
        yield name, text
    numbers = [number for number in range(101) if str(number) != answer]
    listed = [*numbers[:50], int(answer), *numbers[50:]]  # the right one is among them, and not at the end
    contents = {
        "nothing": "",
        "every integer": " ".join(map(str, listed)),
        "every integer, with commas": ", ".join(map(str, listed)),
        "every integer, or": " or ".join(map(str, listed)),
        "a set": f"\\{{{', '.join(map(str, listed))}\\}}",
        "the prompt": prompt,
        "the expression": prompt.removeprefix("What is ").partition("?")[0],
        "a unit only": "\\text{apples}",
        "a variable": "x",
        "infinity": "\\infty",
        "not a number": "nan",
        "a tower": "9^{9^{9^{9}}}",
        "a division by zero": "\\frac{1}{0}",
        "a half": f"{answer}.5",
        "an exponent": "9e99999",
        "two minus signs": f"--{answer}0",
        "a wildcard": ".*",
        "another tag": "<answer>",
        "code": "__import__('os').system('true')",
    }
    for name, first in DIGITS.items():
        contents[f"{name} digits"] = "".join(chr(first + int(digit)) for digit in answer)
    contents["superscript digits"] = answer.translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    contents["a zero-width space"] = "\u200b".join(answer) + "\u200b0"
    for place, form in PLACES.items():
        for name, content in contents.items():
            yield f"{name} ({place})", form.format(content)
        yield f"each integer in turn ({place})", "\n".join(form.format(number) for number in listed)
    yield "answers within answers", "<answer>" * 50 + answer + "0" + "</answer>" * 50
    yield "tags inside out", "</answer>\n<answer>\n</reasoning>\n<reasoning>\n"
    yield "all tags at once", "<reasoning><answer></reasoning></answer>" * 20
    yield (
        "tags within tags",
        "<reasoning>\n<reasoning>\n<answer>\n1\n</answer>\n</reasoning>\n</reasoning>\n<answer>\n1\n</answer>",
    )
    yield "boxes within boxes", "\\boxed{" * 50 + "1" + "}" * 50
    yield "a box that does not close", f"\\boxed{{{answer} or 1"
    yield "empty code", "```python\n```"
    yield "code that is none", "```python\nThe answer is 36.\n```"
    for unit in UNITS:
        yield f"huge: {unit!r}", unit * (SIZE // len(unit))
        yield f"huge, with an end: {unit!r}", unit * (SIZE // len(unit)) + "!"
        yield (
            f"huge, in tags: {unit!r}",
            f"<reasoning>\n{unit * (SIZE // len(unit))}\n</reasoning>\n<answer>\n1\n</answer>",
        )
        yield f"huge, in a box: {unit!r}", f"\\boxed{{{unit * (SIZE // len(unit))}}}"
