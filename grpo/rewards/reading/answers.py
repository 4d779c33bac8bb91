"""Find the answer in a text: in tags, after a mark or in a box. Every search takes linear time."""

from collections.abc import Sequence


def between_tags(text: str, tag: str = "answer") -> str | None:
    """The content of the last <tag> ... </tag>; None if there is none.

    >>> between_tags("<reasoning>2 + 3</reasoning><answer> 5 </answer>")
    '5'
    """
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end].strip() if start >= 0 else None


def after_mark(text: str, mark: str = "####") -> str | None:
    """The rest of the line after the last mark; None if there is no mark. GSM8K's solutions end like this.

    >>> after_mark("5 * 3 = 15\\n#### 15")
    '15'
    """
    _, found, rest = text.rpartition(mark)
    return rest.split("\n")[0].strip() if found else None


LONGEST_BOX = 10_000  # characters; a longer box is not read


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, with balanced braces; None if there is no box or it is not closed.

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
    """The text after these elements, if the text begins with them in order and contains each tag once; else None.

    >>> elements_at_start("<reasoning>a</reasoning> <answer>b</answer> c", ("reasoning", "answer"))
    ' c'
    """
    rest = text.lstrip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if text.count(opening) != 1 or text.count(closing) != 1 or not rest.lstrip().startswith(opening):
            return None
        _, is_closed, rest = rest.partition(closing)
        if not is_closed:  # the closing tag is before the opening tag
            return None
    return rest


def in_tags(text: str, tags: Sequence[str]) -> bool:
    """Whether the text consists of these elements in order, each once, and of white space.

    >>> in_tags("<reasoning>a</reasoning> <answer>b</answer>", ("reasoning", "answer"))
    True
    """
    rest = elements_at_start(text, tags)
    return rest is not None and not rest.strip()


def in_tag_lines(text: str, tags: Sequence[str]) -> bool:
    """`in_tags`, with every tag alone on its line, no line between the elements, and at least one line in each element.

    >>> in_tag_lines("<reasoning>\\na\\n</reasoning>\\n<answer>\\nb\\n</answer>\\n", ("reasoning", "answer"))
    True
    """
    lines = iter(text.removesuffix("\n").split("\n"))
    for tag in tags:
        if next(lines, None) != f"<{tag}>" or next(lines, None) in (None, f"</{tag}>"):
            return False
        if not any(line == f"</{tag}>" for line in lines):  # advances the iterator past the closing tag
            return False
    return next(lines, None) is None and in_tags(text, tags)


def tags_in_place(text: str, tags: Sequence[str]) -> int:
    """The number of tags in place. A tag is in place if it occurs once, alone on its line, after the tags that precede
    it. The last tag is in place only if nothing follows it.

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
