"""Where in a text the answer stands: in tags, after a mark, in a box. Text in, text out; every search is linear."""

from collections.abc import Sequence


def between_tags(text: str, tag: str = "answer") -> str | None:
    """What the last <tag> ... </tag> holds, or None.

    >>> between_tags("<reasoning>2 + 3</reasoning><answer> 5 </answer>")
    '5'
    """
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end].strip() if start >= 0 else None


def after_mark(text: str, mark: str = "####") -> str | None:
    """What follows the last mark on its line, or None: how GSM8K's solutions end.

    >>> after_mark("5 * 3 = 15\\n#### 15")
    '15'
    """
    _, found, rest = text.rpartition(mark)
    return rest.split("\n")[0].strip() if found else None


LONGEST_BOX = 10_000  # characters: what is longer is no answer


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces within it balanced, or None.

    >>> boxed("so \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, start = 1, start + len("\\boxed{")
    for place in range(start, min(len(text), start + LONGEST_BOX)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place].strip()
    return None


def elements_at_start(text: str, tags: Sequence[str]) -> str | None:
    """What follows these elements, where the text begins with them, one after another, each tag of them once; or None.

    >>> elements_at_start("<reasoning>a</reasoning> <answer>b</answer> c", ("reasoning", "answer"))
    ' c'
    """
    rest = text.lstrip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1 or not rest.lstrip().startswith(opening):
            return None
        _, is_closed, rest = rest.partition(closing)
        if not is_closed:  # its closing tag stood before
            return None
    return rest


def in_tags(text: str, tags: Sequence[str]) -> bool:
    """Whether the text is these elements one after another, each once, and nothing else but white space.

    >>> in_tags("<reasoning>a</reasoning> <answer>b</answer>", ("reasoning", "answer"))
    True
    """
    rest = elements_at_start(text, tags)
    return rest is not None and not rest.strip()


def in_tag_lines(text: str, tags: Sequence[str]) -> bool:
    """The same with every tag alone on its line, no other line between the elements, and at least one within each.

    >>> in_tag_lines("<reasoning>\\na\\n</reasoning>\\n<answer>\\nb\\n</answer>\\n", ("reasoning", "answer"))
    True
    """
    lines = iter(text.removesuffix("\n").split("\n"))
    for tag in tags:
        if next(lines, None) != f"<{tag}>" or next(lines, None) in (None, f"</{tag}>"):
            return False
        if not any(line == f"</{tag}>" for line in lines):  # reads on to it
            return False
    return next(lines, None) is None and in_tags(text, tags)


def tags_in_place(text: str, tags: Sequence[str]) -> int:
    """How many of the opening and closing tags the text has once, alone on a line, behind those of them before it; and
    behind the last one, nothing.

    >>> tags_in_place("<reasoning>\\na\\n</reasoning>\\nso <answer>b</answer>", ("reasoning", "answer"))
    2
    """
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    lines = text.rstrip().split("\n")
    count, place = 0, -1
    for mark in marks:
        if text.count(mark) == 1 and mark in lines and lines.index(mark) > place:
            if mark == marks[-1] and lines[-1] != mark:
                continue
            count, place = count + 1, lines.index(mark)
    return count
