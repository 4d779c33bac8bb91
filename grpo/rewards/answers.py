"""Where in a text the answer stands: in tags, after a mark, in a box. Text in, text out; every search is linear."""


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
    return rest.strip().split("\n")[0].strip() if found else None


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces within it balanced, or None.

    >>> boxed("so \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, start = 1, start + len("\\boxed{")
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place].strip()
    return None


def in_tags(text: str, tags: tuple[str, ...]) -> bool:
    """Whether the text is these elements one after another, each once, and nothing else but white space.

    >>> in_tags("<reasoning>a</reasoning> <answer>b</answer>", ("reasoning", "answer"))
    True
    """
    rest = text.strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if rest.count(opening) != 1 or rest.count(closing) != 1 or not rest.startswith(opening):
            return False
        rest = rest.partition(closing)[2].lstrip()
    return not rest
