"""Write small Python programming problems, code_tasks_{train,eval}.jsonl. The output is deterministic.

    python data/make_code_tasks.py            # rewrites the two files next to this script

Most problems ask for a function, some for a script. A row has these columns:

    prompt      the problem, with an example
    tests       asserts, or the input and expected output of a script: {"input": ..., "output": ...}
    solution    a completion that passes all tests: a fenced Python block

Every fifth problem of each table is held out for evaluation; the others are for training. The tables are ordered by
kind, so both files contain every kind. The first call of a problem is the example in the prompt. It is not a test, so
copying the example earns nothing. The solutions are run to compute the expected values.
"""

import contextlib
import copy
import io
import json
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

HOLD_OUT = 5  # every fifth problem
END = "Answer with one Python block."

Function = tuple[str, str, str, list[tuple]]  # signature, return value in words, body, arguments of some calls
Script = tuple[str, str, str, list[str]]  # input in words, output in words, code, some inputs
Row = dict[str, Any]

# fmt: off
FUNCTIONS: list[Function] = [
    # Arithmetic
    ("add(a, b)", "the sum of the numbers a and b",
     "return a + b",
     [(2, 3), (0, 0), (-4, 1), (10, -10), (7, 7), (100, 23)]),
    ("last_digit(n)", "the last decimal digit of the integer n, where n is not negative",
     "return n % 10",
     [(127,), (0,), (40,), (123456,), (19,), (5,)]),
    ("clamp(x, low, high)", "low if x is less than low, high if x is greater than high, and x otherwise",
     "return max(low, min(x, high))",
     [(15, 0, 10), (-3, 0, 10), (4, 0, 10), (10, 0, 10), (7, 8, 9), (-20, -9, -5)]),
    ("max_of_three(a, b, c)", "the largest of the three numbers a, b and c",
     "return max(a, b, c)",
     [(1, 5, 3), (2, 1, 9), (4, 4, 1), (-7, -2, -5), (0, 3, 3), (8, 6, 7)]),
    ("distance(a, b)", "the distance between the integers a and b, which is never negative",
     "return abs(a - b)",
     [(3, 8), (8, 3), (5, 5), (-2, 4), (-9, -1), (0, -6)]),
    ("is_even(n)", "True if the integer n is even, and False otherwise",
     "return n % 2 == 0",
     [(4,), (7,), (0,), (-3,), (-8,), (101,)]),
    ("sum_of_squares(a, b)", "the square of a plus the square of b",
     "return a * a + b * b",
     [(3, 4), (0, 0), (-2, 1), (5, 5), (1, -1), (0, 6)]),
    ("sign_of(n)", "1 if n is positive, -1 if n is negative, and 0 if n is zero", """
        if n > 0:
            return 1
        if n < 0:
            return -1
        return 0
        """,
     [(12,), (-5,), (0,), (-100,), (3,), (99,)]),
    ("boxes_needed(items, size)",
     "how many boxes are needed for a number of items, when one box holds at most size items",
     "return (items + size - 1) // size",
     [(10, 4), (8, 4), (0, 5), (1, 6), (7, 1), (100, 33)]),
    ("is_multiple(a, b)", "True if the integer a is a multiple of the integer b, and False otherwise. "
     "If b is 0, it returns False",
     "return b != 0 and a % b == 0",
     [(12, 4), (12, 5), (0, 3), (7, 0), (-9, 3), (3, 9)]),

    # Units and rules
    ("seconds_of(hours, minutes, seconds)", "the whole time in seconds",
     "return hours * 3600 + minutes * 60 + seconds",
     [(1, 2, 3), (0, 0, 0), (0, 1, 30), (2, 0, 5), (10, 59, 59), (0, 0, 42)]),
    ("clock_text(minutes)", 'a number of minutes as hours and two-digit minutes, in the form "H:MM"', """
        hours = minutes // 60
        rest = minutes % 60
        return f"{hours}:{rest:02d}"
        """,
     [(75,), (0,), (59,), (60,), (605,), (1439,)]),
    ("percent(part, whole)", "how many percent of whole the number part is, rounded down to an integer. "
     "If whole is 0, it returns 0", """
        if whole == 0:
            return 0
        return part * 100 // whole
        """,
     [(1, 4), (2, 3), (5, 0), (0, 9), (7, 7), (15, 10)]),
    ("is_leap_year(year)", "True if the year is a leap year of the Gregorian calendar, and False otherwise",
     "return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)",
     [(2024,), (2023,), (1900,), (2000,), (2100,), (1996,)]),
    ("price_text(cents)", 'a price in cents as dollars and two-digit cents, in the form "$D.CC"',
     'return f"${cents // 100}.{cents % 100:02d}"',
     [(1305,), (0,), (7,), (99,), (100,), (123456,)]),
    ("rectangle(width, height)", "a tuple of the area and the perimeter of a rectangle",
     "return (width * height, 2 * (width + height))",
     [(3, 4), (1, 1), (0, 5), (7, 2), (10, 10), (6, 0)]),
    ("is_triangle(a, b, c)", "True if any two of the lengths a, b and c together are longer than the third, "
     "and False otherwise",
     "return a + b > c and a + c > b and b + c > a",
     [(3, 4, 5), (1, 2, 3), (5, 5, 5), (10, 2, 3), (2, 9, 3), (7, 8, 2)]),
    ("fizz_buzz(n)", 'a list with one text for each number from 1 to n: "FizzBuzz" for multiples of 15, "Fizz" for '
     'other multiples of 3, "Buzz" for other multiples of 5, and the number as text for all others', """
        result = []
        for i in range(1, n + 1):
            if i % 15 == 0:
                result.append("FizzBuzz")
            elif i % 3 == 0:
                result.append("Fizz")
            elif i % 5 == 0:
                result.append("Buzz")
            else:
                result.append(str(i))
        return result
        """,
     [(5,), (0,), (1,), (3,), (10,), (16,)]),
    ("weekday_after(day, n)", "the number of the weekday n days after the weekday day. Weekdays are numbered from 0 "
     "to 6, and n may be negative",
     "return (day + n) % 7",
     [(5, 3), (0, 0), (6, 1), (2, 14), (1, -2), (3, 100)]),
    ("grade(score)", 'the letter "A" for a score of at least 90, "B" for at least 80, "C" for at least 70, and "F" '
     "for all others", """
        if score >= 90:
            return "A"
        if score >= 80:
            return "B"
        if score >= 70:
            return "C"
        return "F"
        """,
     [(85,), (90,), (100,), (89,), (70,), (69,), (0,)]),

    # Digits
    ("digit_sum(n)", "the sum of the decimal digits of the integer n, where n is not negative",
     "return sum(int(digit) for digit in str(n))",
     [(123,), (0,), (9,), (1000,), (99999,), (50607,)]),
    ("reverse_number(n)", "the integer n with its decimal digits in reverse order. The sign stays, and leading zeros "
     "are dropped", """
        reversed_digits = int(str(abs(n))[::-1])
        if n < 0:
            return -reversed_digits
        return reversed_digits
        """,
     [(-123,), (120,), (0,), (45,), (-900,), (1234567,)]),
    ("count_digits(n)", "the number of decimal digits of the integer n, without its sign",
     "return len(str(abs(n)))",
     [(305,), (0,), (9,), (-42,), (10000,), (-1234567,)]),
    ("digital_root(n)", "the digital root of the integer n, where n is not negative: the digits are added up again "
     "and again until one digit is left", """
        while n >= 10:
            n = sum(int(digit) for digit in str(n))
        return n
        """,
     [(987,), (0,), (10,), (38,), (99999,), (123456,)]),
    ("digit_product(n)", "the product of the decimal digits of the integer n, where n is not negative", """
        product = 1
        for digit in str(n):
            product *= int(digit)
        return product
        """,
     [(234,), (0,), (105,), (11,), (999,), (25,)]),
    ("is_mirror_number(n)", "True if the integer n reads the same from both sides, and False otherwise. "
     "A negative number does not",
     "return str(n) == str(n)[::-1]",
     [(121,), (123,), (0,), (-11,), (4554,), (10,)]),
    ("digits_of(n)", "a list of the decimal digits of the integer n as integers, where n is not negative",
     "return [int(digit) for digit in str(n)]",
     [(407,), (0,), (5,), (10,), (98765,), (1100,)]),
    ("number_of(digits)", "the integer whose decimal digits are the integers in the list digits. For an empty list it "
     "returns 0", """
        number = 0
        for digit in digits:
            number = number * 10 + digit
        return number
        """,
     [([4, 0, 7],), ([],), ([0],), ([0, 5],), ([9, 9, 9],), ([1, 0, 0, 0],)]),
    ("count_even_digits(n)", "how many decimal digits of the integer n are even, where n is not negative",
     "return sum(1 for digit in str(n) if int(digit) % 2 == 0)",
     [(1234,), (0,), (135,), (2468,), (100,), (90817,)]),
    ("largest_digit(n)", "the largest decimal digit of the integer n, which may be negative",
     "return max(int(digit) for digit in str(abs(n)))",
     [(3725,), (0,), (-48,), (111,), (90,), (-1234567,)]),

    # Number theory
    ("greatest_common_divisor(a, b)", "the greatest common divisor of the integers a and b, which are not negative. "
     "If one of them is 0, it returns the other", """
        while b:
            a, b = b, a % b
        return a
        """,
     [(12, 18), (7, 5), (0, 4), (9, 0), (100, 75), (17, 51)]),
    ("least_common_multiple(a, b)", "the least common multiple of the positive integers a and b", """
        multiple = a
        while multiple % b != 0:
            multiple += a
        return multiple
        """,
     [(4, 6), (3, 5), (7, 7), (1, 9), (12, 8), (2, 10)]),
    ("is_prime(n)", "True if the integer n is a prime number, and False otherwise", """
        if n < 2:
            return False
        for d in range(2, int(n**0.5) + 1):
            if n % d == 0:
                return False
        return True
        """,
     [(7,), (1,), (2,), (9,), (97,), (-5,), (13,)]),
    ("divisors(n)", "a sorted list of all positive divisors of the positive integer n",
     "return [d for d in range(1, n + 1) if n % d == 0]",
     [(12,), (1,), (7,), (16,), (30,), (49,)]),
    ("primes_below(n)", "a sorted list of all prime numbers less than n",
     "return [p for p in range(2, n) if all(p % d != 0 for d in range(2, p))]",
     [(10,), (0,), (2,), (3,), (20,), (31,)]),
    ("prime_factors(n)", "a list of the prime factors of the positive integer n from small to large, each as often as "
     "it divides n. For 1 it returns an empty list", """
        factors = []
        d = 2
        while n > 1:
            while n % d == 0:
                factors.append(d)
                n //= d
            d += 1
        return factors
        """,
     [(12,), (1,), (13,), (8,), (90,), (49,)]),
    ("factorial(n)", "the product of all integers from 1 to n. For 0 it returns 1", """
        result = 1
        for i in range(2, n + 1):
            result *= i
        return result
        """,
     [(4,), (0,), (1,), (3,), (6,), (10,)]),
    ("fibonacci(n)", "the Fibonacci number with index n, where the numbers with index 0 and 1 are 0 and 1, and every "
     "other one is the sum of the two before it", """
        a, b = 0, 1
        for _ in range(n):
            a, b = b, a + b
        return a
        """,
     [(7,), (0,), (2,), (3,), (10,), (30,)]),
    ("collatz_steps(n)", "how many steps it takes from the positive integer n to 1, where one step halves an even "
     "number and turns an odd number n into 3 * n + 1", """
        steps = 0
        while n != 1:
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            steps += 1
        return steps
        """,
     [(6,), (1,), (2,), (7,), (16,), (27,)]),
    ("is_perfect(n)", "True if the positive integer n is the sum of its divisors less than n, and False otherwise",
     "return n == sum(d for d in range(1, n) if n % d == 0)",
     [(6,), (28,), (12,), (1,), (496,), (8,)]),

    # Powers, sums and bases
    ("to_binary(n)", "the integer n in binary, as a text without a prefix, where n is not negative",
     "return bin(n)[2:]",
     [(5,), (0,), (1,), (8,), (255,), (100,)]),
    ("from_binary(text)", "the integer that the text of binary digits stands for",
     "return int(text, 2)",
     [("101",), ("0",), ("1",), ("0011",), ("11111111",), ("100000",)]),
    ("count_ones(n)", "how many digits 1 the integer n has in binary, where n is not negative",
     'return bin(n).count("1")',
     [(13,), (0,), (3,), (8,), (255,), (1000,)]),
    ("power(base, exponent)", "base to the power of exponent, where exponent is an integer that is not negative", """
        result = 1
        for _ in range(exponent):
            result *= base
        return result
        """,
     [(2, 5), (3, 0), (0, 4), (-2, 3), (10, 6), (7, 2)]),
    ("to_base_three(n)", "the integer n in base three, as a text, where n is not negative", """
        if n == 0:
            return "0"
        digits = ""
        while n > 0:
            digits = str(n % 3) + digits
            n //= 3
        return digits
        """,
     [(5,), (0,), (2,), (3,), (26,), (100,)]),
    ("root_floor(n)", "the largest integer whose square is at most n, where n is not negative", """
        root = 0
        while (root + 1) * (root + 1) <= n:
            root += 1
        return root
        """,
     [(10,), (0,), (2,), (9,), (15,), (10000,)]),
    ("multiples_sum(n)", "the sum of all positive integers less than n that are multiples of 3 or of 5",
     "return sum(i for i in range(n) if i % 3 == 0 or i % 5 == 0)",
     [(10,), (0,), (3,), (6,), (16,), (100,)]),
    ("choose(n, k)", "in how many ways k things can be chosen out of n things. If k is greater than n, it returns 0",
     """
        if k > n:
            return 0
        if k == 0 or k == n:
            return 1
        return choose(n - 1, k - 1) + choose(n - 1, k)
        """,
     [(5, 2), (4, 0), (3, 3), (2, 5), (6, 3), (7, 1)]),
    ("add_binary(a, b)", "the sum of two binary numbers a and b. Both are texts, and so is the sum",
     "return bin(int(a, 2) + int(b, 2))[2:]",
     [("11", "1"), ("0", "0"), ("101", "10"), ("1111", "1111"), ("1", "0"), ("1000", "111")]),
    ("is_square(n)", "True if the integer n is the square of an integer, and False otherwise", """
        root = 0
        while root * root < n:
            root += 1
        return root * root == n
        """,
     [(16,), (0,), (15,), (-4,), (1,), (1000,), (10000,)]),

    # Texts
    ("greet(name)", 'the text "Hello, " followed by the name and an exclamation mark',
     'return "Hello, " + name + "!"',
     [("Ann",), ("Bob",), ("",), ("Mr Lee",), ("world",)]),
    ("reverse_text(text)", "the text from back to front",
     "return text[::-1]",
     [("abc",), ("",), ("x",), ("hello world",), ("Noon",), ("12 3",)]),
    ("count_vowels(text)", "how many letters of the text are a, e, i, o or u, in lower or upper case",
     'return sum(1 for letter in text.lower() if letter in "aeiou")',
     [("Apple",), ("",), ("rhythm",), ("AEIOU",), ("programming",), ("banana bread",)]),
    ("is_palindrome(text)", "True if the text reads the same from both sides, and False otherwise. Upper and lower "
     "case differ",
     "return text == text[::-1]",
     [("level",), ("",), ("ab",), ("Anna",), ("abba",), ("abcba",), ("abca",)]),
    ("repeat_text(text, n)", 'the text n times, with "-" in between',
     'return "-".join([text] * n)',
     [("ab", 3), ("x", 1), ("hey", 0), ("no", 2), ("", 3), ("a", 5)]),
    ("ends_of(text)", "the first and the last letter of the text as one text. For an empty text it returns an empty "
     "text", """
        if not text:
            return ""
        return text[0] + text[-1]
        """,
     [("python",), ("",), ("a",), ("xyz",), ("hello world",), ("abca",)]),
    ("remove_vowels(text)", "the text without the letters a, e, i, o and u, in lower or upper case",
     'return "".join(letter for letter in text if letter not in "aeiouAEIOU")',
     [("banana",), ("",), ("sky",), ("AEIou",), ("Under the sea",), ("Python code",)]),
    ("count_letter(text, letter)", "how often the letter is in the text. Upper and lower case differ",
     "return text.count(letter)",
     [("banana", "a"), ("", "x"), ("Anna", "a"), ("hello", "l"), ("aaaa", "a"), ("abc", "z")]),
    ("capitalize_words(text)", "the text with the first letter of each word in upper case and all other letters as "
     "they are. Words are separated by single spaces",
     'return " ".join(word[:1].upper() + word[1:] for word in text.split(" "))',
     [("hello big world",), ("",), ("a",), ("iPhone case",), ("Already Done",), ("it's 5 pm",)]),
    ("swap_ends(text)", "the text with its first and its last letter exchanged. A text of fewer than two letters stays "
     "as it is", """
        if len(text) < 2:
            return text
        return text[-1] + text[1:-1] + text[0]
        """,
     [("python",), ("",), ("a",), ("ab",), ("hello",), ("one day",)]),

    # Texts: words and patterns
    ("is_anagram(a, b)", "True if the texts a and b have the same letters, each equally often, and False otherwise. "
     "Upper and lower case do not differ",
     "return sorted(a.lower()) == sorted(b.lower())",
     [("listen", "silent"), ("ab", "abb"), ("", ""), ("Dusty", "study"), ("aab", "abb"), ("abc", "abd")]),
    ("longest_word(text)", "the longest word of the text, the first one if there are several. Words are separated by "
     "spaces. For an empty text it returns an empty text", """
        longest = ""
        for word in text.split():
            if len(word) > len(longest):
                longest = word
        return longest
        """,
     [("the quick fox",), ("",), ("one two six",), ("a bb ccc",), ("hello",), ("tiny enormous huge",)]),
    ("shift_letters(text, n)", "the text with each lower-case letter moved n places on in the alphabet, where a "
     "follows after z. All other characters stay as they are", """
        result = ""
        for char in text:
            if "a" <= char <= "z":
                char = chr((ord(char) - ord("a") + n) % 26 + ord("a"))
            result += char
        return result
        """,
     [("abz", 1), ("", 5), ("Hi there!", 3), ("xyz", 3), ("same", 26), ("bcd", -1)]),
    ("run_lengths(text)", "each run of equal letters of the text as the letter followed by the length of the run, all "
     "in one text", """
        result = ""
        i = 0
        while i < len(text):
            j = i
            while j < len(text) and text[j] == text[i]:
                j += 1
            result += text[i] + str(j - i)
            i = j
        return result
        """,
     [("aaab",), ("",), ("z",), ("abc",), ("aabbaa",), ("wwwwwwwwwwww",)]),
    ("expand_runs(text)", "the text that is written in short as letters, each followed by one digit that says how "
     "often it is repeated", """
        result = ""
        for i in range(0, len(text), 2):
            result += text[i] * int(text[i + 1])
        return result
        """,
     [("a3b1",), ("",), ("x1",), ("a2b2a2",), ("q0r4",), ("z9",)]),
    ("acronym(text)", "the first letters of all words of the text as one text in upper case. Words are separated by "
     "spaces",
     'return "".join(word[0].upper() for word in text.split())',
     [("as soon as possible",), ("",), ("word",), ("Portable Network graphics",), ("a b c",), ("for your info",)]),
    ("count_words(text)", "the number of words of the text. Words are separated by one or more spaces",
     "return len(text.split())",
     [("one two",), ("",), ("   ",), ("hello",), (" a  b   c ",), ("to be or not to be",)]),
    ("only_digits(text)", "the digits of the text in their order, as a text",
     'return "".join(char for char in text if char.isdigit())',
     [("a1b22",), ("",), ("abc",), ("007",), ("+49 (30) 1234",), ("3.14",)]),
    ("common_prefix(a, b)", "the longest text with which both texts a and b begin", """
        prefix = ""
        for x, y in zip(a, b):
            if x != y:
                break
            prefix += x
        return prefix
        """,
     [("flower", "flow"), ("", "abc"), ("dog", "cat"), ("inside", "insect"), ("abxc", "abyc"), ("A", "a")]),
    ("is_pangram(text)", "True if every letter from a to z is in the text, in lower or upper case, and False otherwise",
     'return all(letter in text.lower() for letter in "abcdefghijklmnopqrstuvwxyz")',
     [("The quick brown fox jumps over the lazy dog",), ("",), ("abcdefghijklmnopqrstuvwxyz",), ("hello world",),
      ("Pack my box with five dozen liquor jugs!",), ("The quick brown fox jumps over the dog",)]),

    # Texts: rebuilding
    ("unique_letters(text)", "the text with only the first occurrence of each character", """
        result = ""
        for char in text:
            if char not in result:
                result += char
        return result
        """,
     [("banana",), ("",), ("aaaa",), ("abc",), ("Mississippi",), ("a b a b",)]),
    ("is_balanced(text)", "True if every opening parenthesis of the text is closed later and every closing one was "
     "opened before, and False otherwise", """
        depth = 0
        for char in text:
            if char == "(":
                depth += 1
            elif char == ")":
                depth -= 1
                if depth < 0:
                    return False
        return depth == 0
        """,
     [("(a(b))",), ("",), ("(",), (")(",), ("(x)(y)",), ("())(()",)]),
    ("reverse_words(text)", "the words of the text in reverse order, with one space in between. Words are separated by "
     "one or more spaces",
     'return " ".join(text.split()[::-1])',
     [("one two three",), ("",), ("word",), ("a  b",), ("the end is near",), (" x y ",)]),
    ("to_snake_case(name)", "the name with each upper-case letter replaced by an underscore and the letter in lower "
     "case", """
        result = ""
        for char in name:
            if char.isupper():
                result += "_" + char.lower()
            else:
                result += char
        return result
        """,
     [("myName",), ("",), ("plain",), ("getHttpCode",), ("aB",), ("itemCount2",)]),
    ("to_camel_case(name)", "the name without its underscores, and with the letter after each underscore in upper case",
     """
        first, *others = name.split("_")
        return first + "".join(part.capitalize() for part in others)
        """,
     [("my_name",), ("plain",), ("",), ("get_http_code",), ("a_b",), ("one_two_three_four",)]),
    ("top_letter(text)", "the letter that is most often in the text of lower-case letters, the first in the alphabet "
     "if there are several. For an empty text it returns an empty text", """
        best = ""
        for letter in sorted(set(text)):
            if best == "" or text.count(letter) > text.count(best):
                best = letter
        return best
        """,
     [("banana",), ("",), ("z",), ("baab",), ("mississippi",), ("hello",)]),
    ("hide_number(text)", 'the text with each character replaced by "*", but for the last four, which stay',
     'return "*" * (len(text) - 4) + text[-4:]',
     [("12345678",), ("",), ("123",), ("1234",), ("98765",), ("4000 1234 5678",)]),
    ("count_overlapping(text, part)", "at how many places of the text the text part begins. Places may overlap",
     "return sum(1 for i in range(len(text)) if text.startswith(part, i))",
     [("ababa", "aba"), ("aaaa", "aa"), ("", "a"), ("abc", "d"), ("hello hello", "lo"), ("aaa", "a")]),
    ("alternate_case(text)", "the text with the characters at even positions in upper case and those at odd positions "
     "in lower case. Positions begin at 0",
     'return "".join(c.upper() if i % 2 == 0 else c.lower() for i, c in enumerate(text))',
     [("hello",), ("",), ("a",), ("ABCD",), ("big dog",), ("Zz",)]),
    ("is_rotation(a, b)", "True if the text b is the text a with some letters moved from its beginning to its end, or "
     "a itself, and False otherwise",
     "return len(a) == len(b) and b in a + a",
     [("abcd", "cdab"), ("abcd", "acbd"), ("", ""), ("abc", "abc"), ("aab", "ab"), ("water", "terwa")]),

    # Lists
    ("total(numbers)", "the sum of the numbers in the list. For an empty list it returns 0",
     "return sum(numbers)",
     [([1, 2, 3],), ([],), ([5],), ([-1, 1],), ([10, -20, 30],), ([4, 4, 4, 4],)]),
    ("largest(numbers)", "the largest number of the list. For an empty list it returns None",
     "return max(numbers) if numbers else None",
     [([3, 9, 2],), ([],), ([-5, -3],), ([7, 7],), ([0],), ([1, 2, 30, 4],)]),
    ("count_positive(numbers)", "how many numbers of the list are greater than 0",
     "return sum(1 for number in numbers if number > 0)",
     [([3, -1, 0, 2],), ([],), ([0, 0],), ([-1, 2],), ([5, 5],), ([1, 2, 3, -4],)]),
    ("squares(numbers)", "a list of the squares of the numbers in the list",
     "return [number * number for number in numbers]",
     [([1, 2, 3],), ([],), ([-4],), ([0, 1],), ([10, -10],), ([5, 3, 5],)]),
    ("keep_even(numbers)", "a list of the even numbers of the list, in their order",
     "return [number for number in numbers if number % 2 == 0]",
     [([1, 2, 3, 4],), ([],), ([1, 3],), ([0, -2, -3],), ([8, 6, 8],), ([7, 10],)]),
    ("last_item(items)", "the last item of the list. For an empty list it returns None",
     "return items[-1] if items else None",
     [([1, 2, 3],), ([],), ([5],), (["a", "b"],), ([0, 0, 9, 0],), ([[1], [2]],)]),
    ("running_totals(numbers)", "a list that has for each number of the list the sum of all numbers up to this one", """
        totals = []
        total = 0
        for number in numbers:
            total += number
            totals.append(total)
        return totals
        """,
     [([1, 2, 3],), ([],), ([5],), ([1, -1, 1],), ([2, 0, 4],), ([10, 20, 30, 40],)]),
    ("without(items, value)", "a list of all items that are not equal to value, in their order",
     "return [item for item in items if item != value]",
     [([1, 2, 1, 3], 1), ([], 5), ([4, 4], 4), ([1, 2], 9), (["a", "b", "a"], "a"), ([0, 1, 0, 2], 0)]),
    ("unique_items(items)", "a list of the items without repeats, in the order in which they first appear", """
        result = []
        for item in items:
            if item not in result:
                result.append(item)
        return result
        """,
     [([3, 1, 3, 2],), ([],), ([1, 1, 1],), (["b", "a", "b"],), ([5, 4, 5, 4, 3],), ([2, 1],)]),
    ("second_largest(numbers)", "the second largest of the different numbers in the list. If there are fewer than two "
     "different numbers, it returns None", """
        different = sorted(set(numbers))
        if len(different) < 2:
            return None
        return different[-2]
        """,
     [([4, 9, 7],), ([],), ([5, 5],), ([1, 3, 3],), ([-1, -2, -3],), ([10, 2, 8, 10],)]),

    # Lists: order and position
    ("rotate_left(items, n)", "a list of the items with the first n of them moved to the end, one after the other. "
     "The number n may be larger than the number of items", """
        if not items:
            return []
        n %= len(items)
        return items[n:] + items[:n]
        """,
     [([1, 2, 3, 4], 1), ([], 3), ([1, 2, 3], 0), ([1, 2, 3], 4), (["a", "b"], 2), ([5, 6, 7], 2)]),
    ("interleave(a, b)", "a list of the first item of a, the first of b, the second of a, the second of b and so on. "
     "The lists a and b are equally long", """
        result = []
        for x, y in zip(a, b):
            result += [x, y]
        return result
        """,
     [([1, 3], [2, 4]), ([], []), ([1], [1]), (["a", "b", "c"], ["x", "y", "z"]), ([0, 0], [1, 1])]),
    ("chunks(items, size)", "a list of lists: the items in groups of size items, the last of which may be shorter",
     "return [items[i : i + size] for i in range(0, len(items), size)]",
     [([1, 2, 3, 4, 5], 2), ([], 3), ([1, 2], 5), ([1, 2, 3], 1), ([1, 2, 3, 4], 2), (["a", "b", "c"], 3)]),
    ("is_sorted(numbers)", "True if no number of the list is less than the one before it, and False otherwise",
     "return all(a <= b for a, b in zip(numbers, numbers[1:]))",
     [([1, 2, 3],), ([],), ([3, 2],), ([1, 1, 2],), ([1, 3, 2],), ([5],)]),
    ("index_of_smallest(numbers)", "the index of the smallest number of the list, the first one if there are several. "
     "For an empty list it returns -1", """
        if not numbers:
            return -1
        return numbers.index(min(numbers))
        """,
     [([4, 1, 3],), ([],), ([7],), ([2, 0, 0],), ([-1, -5, 3, -5],), ([9, 8, 7, 6],)]),
    ("merge_sorted(a, b)", "a sorted list of all numbers of the sorted lists a and b. Repeated numbers stay",
     "return sorted(a + b)",
     [([1, 4], [2, 3]), ([], []), ([1, 1], [1]), ([], [5, 6]), ([10, 20], [-5, 15, 30]), ([3], [2])]),
    ("flatten(lists)", "one list of all items of the lists in the list, in their order",
     "return [item for items in lists for item in items]",
     [([[1, 2], [3]],), ([],), ([[], []],), ([[5], [], [6, 7]],), ([["a"], ["b", "c"]],), ([[0, 0], [0]],)]),
    ("count_pairs(numbers, target)", "how many pairs of two positions in the list have numbers that add up to target. "
     "The order within a pair does not count", """
        count = 0
        for i in range(len(numbers)):
            for j in range(i + 1, len(numbers)):
                if numbers[i] + numbers[j] == target:
                    count += 1
        return count
        """,
     [([1, 2, 3, 4], 5), ([], 0), ([2], 4), ([1, 1, 1], 2), ([0, -1, 1], 0), ([5, 5, 3], 8)]),
    ("longest_climb(numbers)", "the length of the longest part of the list in which each number is greater than the "
     "one right before it. For an empty list it returns 0", """
        best = 0
        length = 0
        for i in range(len(numbers)):
            if i > 0 and numbers[i] > numbers[i - 1]:
                length += 1
            else:
                length = 1
            best = max(best, length)
        return best
        """,
     [([1, 2, 3, 1],), ([],), ([5],), ([3, 2, 1],), ([1, 1, 2],), ([4, 1, 2, 5, 7, 0, 1],)]),
    ("differences(numbers)", "a list that has for each number of the list, but for the first, how much more it is than "
     "the one before it",
     "return [b - a for a, b in zip(numbers, numbers[1:])]",
     [([1, 4, 9],), ([],), ([5],), ([3, 3],), ([10, 7, 8],), ([0, -1, -3, 5],)]),

    # Lists: searching and counting
    ("lower_median(numbers)", "the middle number of the list after sorting. If there are two in the middle, it returns "
     "the smaller one. The list is not empty",
     "return sorted(numbers)[(len(numbers) - 1) // 2]",
     [([5, 1, 3],), ([7],), ([4, 2],), ([1, 2, 3, 4],), ([9, 9, 1],), ([-3, 10, 0, -7, 2],)]),
    ("move_zeros(numbers)", "a list of the same numbers with all zeros moved to the end. The others keep their order",
     """
        others = [number for number in numbers if number != 0]
        return others + [0] * (len(numbers) - len(others))
        """,
     [([0, 1, 0, 3],), ([],), ([0, 0],), ([0, 2, 1],), ([0, -1],), ([5, 0, 0, 4, 0, 3],)]),
    ("find_sorted(numbers, target)", "the index of target in the sorted list of different numbers, or -1 if it is not "
     "in the list", """
        low, high = 0, len(numbers) - 1
        while low <= high:
            middle = (low + high) // 2
            if numbers[middle] == target:
                return middle
            if numbers[middle] < target:
                low = middle + 1
            else:
                high = middle - 1
        return -1
        """,
     [([1, 3, 5], 5), ([], 1), ([4], 4), ([1, 3, 5, 7], 3), ([2, 4], 3), ([-9, -2, 0, 6, 8], 6)]),
    ("missing_number(numbers)", "the one integer from 0 to n that is not in the list, where n is the length of the "
     "list and all its numbers are different",
     "return sum(range(len(numbers) + 1)) - sum(numbers)",
     [([3, 0, 1],), ([],), ([0],), ([1],), ([2, 1, 0],), ([5, 3, 0, 1, 2],)]),
    ("majority(items)", "the item that makes up more than half of the list, or None if there is none", """
        for item in items:
            if items.count(item) * 2 > len(items):
                return item
        return None
        """,
     [([1, 2, 1],), ([],), ([1, 2],), ([7],), (["a", "b", "b", "b"],), ([3, 3, 4, 4, 4],)]),
    ("tally(items)", "a dict that has for each different item how often it is in the list", """
        counts = {}
        for item in items:
            counts[item] = counts.get(item, 0) + 1
        return counts
        """,
     [(["a", "b", "a"],), ([],), ([1, 1, 1],), (["x"],), ([3, 2, 3, 2, 1],), (["A", "a"],)]),
    ("swap_keys(mapping)", "a dict in which the keys of the dict mapping are the values and its values are the keys. "
     "All its values are different",
     "return {value: key for key, value in mapping.items()}",
     [({"a": 1, "b": 2},), ({},), ({1: "x"},), ({"k": "v", "v": "w"},), ({0: 5, 5: 10, 10: 0},)]),
    ("word_counts(text)", "a dict that has for each word of the text how often it is there. Words are separated by "
     "spaces, and are counted in lower case", """
        counts = {}
        for word in text.lower().split():
            counts[word] = counts.get(word, 0) + 1
        return counts
        """,
     [("the cat the dog",), ("",), ("Hi",), ("a A a",), ("one fish two fish",), ("to be or not to be",)]),
    ("add_counts(a, b)", "a dict with all keys of the dicts a and b. The value of a key is the sum of its values in "
     "both dicts, where a missing one counts as 0",
     "return {key: a.get(key, 0) + b.get(key, 0) for key in [*a, *b]}",
     [({"x": 1}, {"x": 2, "y": 3}), ({}, {}), ({"a": 1}, {}), ({}, {"b": 4}), ({"p": 2, "q": -2}, {"q": 2}),
      ({1: 10, 2: 20}, {2: 5, 3: 7})]),
    ("group_by_length(words)", "a dict that has for each length a list of the words of this length, in their order", """
        groups = {}
        for word in words:
            groups.setdefault(len(word), []).append(word)
        return groups
        """,
     [(["a", "bb", "c"],), ([],), (["hello"],), (["", "x", ""],), (["cat", "dog", "bird"],), (["b", "a", "b"],)]),

    # Dicts, sets and tuples
    ("total_price(prices, basket)", "the sum of the prices of all items in the list basket. The dict prices has the "
     "price of each item, and an item that is not in it costs 0",
     "return sum(prices.get(item, 0) for item in basket)",
     [({"tea": 3, "jam": 5}, ["tea", "jam"]), ({}, []), ({"tea": 3}, ["tea"]), ({"tea": 3}, ["tea", "tea"]),
      ({"tea": 3}, ["egg"]), ({"a": 1, "b": 10, "c": 100}, ["c", "x", "a"])]),
    ("keys_with(mapping, value)", "a sorted list of the keys of the dict mapping that have this value",
     "return sorted(key for key in mapping if mapping[key] == value)",
     [({"b": 1, "a": 1, "c": 2}, 1), ({}, 0), ({"x": 5}, 4), ({"x": 0, "w": 0}, 0), ({3: "n", 1: "n", 2: "y"}, "n")]),
    ("common_items(a, b)", "a sorted list of all items that are both in list a and in list b, each of them once",
     "return sorted(set(a) & set(b))",
     [([3, 1, 2], [2, 3, 5]), ([], [1]), ([1, 1], [1, 1]), ([1, 2], [3]), (["b", "a"], ["a", "b"]), ([9, 0], [0])]),
    ("only_in_one(a, b)", "a set of the items that are in exactly one of the sets a and b",
     "return a ^ b",
     [({1, 2, 3}, {3, 4}), (set(), set()), ({1}, {1}), ({5, 6}, {7}), (set(), {8, 9}), ({1, 2, 3}, {2})]),
    ("best_player(scores)", "the name with the highest score in the dict scores, the first in the alphabet if there "
     "are several. For an empty dict it returns None", """
        best = None
        for name in sorted(scores):
            if best is None or scores[name] > scores[best]:
                best = name
        return best
        """,
     [({"Ann": 3, "Bob": 7},), ({},), ({"Cy": 0},), ({"Zoe": 5, "Al": 5},), ({"a": -3, "b": -1},),
      ({"p": 1, "s": 9, "r": 9, "q": 2},)]),
    ("smallest_and_largest(numbers)", "a tuple of the smallest and the largest number of the list. For an empty list "
     "it returns an empty tuple",
     "return (min(numbers), max(numbers)) if numbers else ()",
     [([3, 1, 2],), ([],), ([5],), ([-1, -9],), ([2, 2],), ([0, 10, -10, 4],)]),
    ("swap_pairs(pairs)", "a list of tuples, with the two items of each tuple of the list pairs exchanged",
     "return [(b, a) for a, b in pairs]",
     [([(1, 2), (3, 4)],), ([],), ([("a", 1)],), ([(0, 5), (5, 0)],), ([(7, 7), (8, 9)],)]),
    ("sort_by_second(pairs)", "a list of the tuples in the list pairs, sorted by their second items from small to "
     "large. Tuples with equal second items keep their order",
     "return sorted(pairs, key=lambda pair: pair[1])",
     [([("a", 3), ("b", 1)],), ([],), ([("x", 0), ("w", -1)],), ([("b", 2), ("a", 2), ("c", 1)],),
      ([(1, 9), (2, 8), (3, 7)],), ([(5, 5), (9, 1), (4, 5)],)]),
    ("make_dict(keys, values)", "a dict that has for each item of the list keys the item of the list values at the "
     "same position. Items without a partner are left out",
     "return dict(zip(keys, values))",
     [(["a", "b"], [1, 2]), ([], []), (["x"], [1, 2]), (["p", "q", "r"], [0]), ([1, 2], ["one", "two"])]),
    ("all_different(items)", "True if no item is in the list more than once, and False otherwise",
     "return len(set(items)) == len(items)",
     [([1, 2, 3],), ([],), ([1, 1],), (["a", "b", "a"],), ([0, -1, 1],), ([4, 5, 6, 4],)]),

    # Matrices: lists of rows
    ("transpose(matrix)", "the transposed matrix. A matrix is a list of rows, which are lists of equal length",
     "return [list(column) for column in zip(*matrix)]",
     [([[1, 2], [3, 4]],), ([],), ([[1, 2, 3]],), ([[1], [2]],), ([[5]],), ([[1, 2, 3], [4, 5, 6]],)]),
    ("diagonal_sum(matrix)", "the sum of the numbers on the diagonal from the upper left to the lower right of the "
     "square matrix, a list of rows",
     "return sum(matrix[i][i] for i in range(len(matrix)))",
     [([[1, 2], [3, 4]],), ([],), ([[7]],), ([[0, 9], [9, 0]],), ([[1, 2], [3, -4]],),
      ([[1, 0, 0], [0, -1, 0], [0, 0, 5]],)]),
    ("row_sums(matrix)", "a list of the sums of the rows of the matrix, a list of lists of numbers",
     "return [sum(row) for row in matrix]",
     [([[1, 2], [3, 4]],), ([],), ([[5]],), ([[1, -1], [0, 0]],), ([[1, 2, 3]],), ([[10], [20], [30]],)]),
    ("identity(n)", "the matrix with n rows and n columns that has 1 on the diagonal from the upper left to the lower "
     "right and 0 elsewhere, as a list of lists",
     "return [[1 if i == j else 0 for j in range(n)] for i in range(n)]",
     [(2,), (0,), (1,), (3,), (4,)]),
    ("rotate_right(matrix)", "the matrix turned clockwise by 90 degrees, as a list of rows. Its first row is the first "
     "column of the given matrix, read from bottom to top",
     "return [list(column) for column in zip(*matrix[::-1])]",
     [([[1, 2], [3, 4]],), ([],), ([[5]],), ([[1, 2, 3]],), ([[1], [2]],), ([[1, 2, 3], [4, 5, 6]],)]),

    # Recursion, numerals and dates
    ("to_roman(n)", "the Roman numeral of the integer n, where n is from 1 to 3999", """
        values = [1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1]
        numerals = ["M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"]
        result = ""
        for value, numeral in zip(values, numerals):
            while n >= value:
                result += numeral
                n -= value
        return result
        """,
     [(14,), (1,), (4,), (90,), (1994,), (3888,)]),
    ("nested_sum(items)", "the sum of all numbers in the list, whose items are numbers or such lists again", """
        total = 0
        for item in items:
            if isinstance(item, list):
                total += nested_sum(item)
            else:
                total += item
        return total
        """,
     [([1, [2, 3]],), ([],), ([[[]]],), ([5, [5, [5]]],), ([-1, [2]],), ([[1, 2], [3, [4, [10]]]],)]),
    ("hanoi_moves(n)", "the least number of moves for a Tower of Hanoi with n disks and three pegs", """
        if n == 0:
            return 0
        return 2 * hanoi_moves(n - 1) + 1
        """,
     [(3,), (0,), (2,), (4,), (10,)]),
    ("climb_ways(n)", "in how many ways one can climb n stairs by steps of one or two stairs. For 0 stairs it is 1 way",
     """
        if n < 2:
            return 1
        return climb_ways(n - 1) + climb_ways(n - 2)
        """,
     [(3,), (0,), (1,), (4,), (5,), (10,)]),
    ("nesting_depth(items)", "how deeply lists are nested in the list items: 1 for a list without lists in it, else 1 "
     "more than the deepest list in it", """
        depth = 0
        for item in items:
            if isinstance(item, list):
                depth = max(depth, nesting_depth(item))
        return depth + 1
        """,
     [([1, [2, 3]],), ([],), ([[[]]],), ([1, 2, 3],), ([[1], [2, [3, [4]]]],), ([[], [[]], 5],)]),
    ("days_in_month(month, year)", "the number of days of the month, from 1 to 12, in the year of the Gregorian "
     "calendar", """
        if month == 2:
            leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
            return 29 if leap else 28
        return 30 if month in (4, 6, 9, 11) else 31
        """,
     [(4, 2023), (2, 2023), (2, 2024), (12, 1999), (2, 1900), (9, 2020)]),
    ("from_roman(text)", "the integer that the Roman numeral stands for", """
        values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
        total = 0
        for i, letter in enumerate(text):
            if i + 1 < len(text) and values[text[i + 1]] > values[letter]:
                total -= values[letter]
            else:
                total += values[letter]
        return total
        """,
     [("XIV",), ("I",), ("IX",), ("XC",), ("MCMXCIV",), ("MMMDCCCLXXXVIII",)]),
    ("date_text(day, month, year)", 'the date in the form "YYYY-MM-DD", with leading zeros',
     'return f"{year:04d}-{month:02d}-{day:02d}"',
     [(3, 7, 2024), (31, 12, 1999), (1, 1, 2000), (10, 10, 2010), (29, 2, 800)]),
    ("add_minutes(time, minutes)", 'the time of day a number of minutes after time. Both times are texts of the form '
     '"HH:MM", and after "23:59" comes "00:00"', """
        hours, mins = time.split(":")
        total = (int(hours) * 60 + int(mins) + minutes) % 1440
        return f"{total // 60:02d}:{total % 60:02d}"
        """,
     [("09:50", 15), ("00:00", 0), ("23:59", 1), ("12:30", 60), ("08:05", 1440), ("22:00", 200)]),
    ("is_earlier(a, b)", "True if date a is before date b, and False otherwise. A date is a tuple of day, month and "
     "year",
     "return (a[2], a[1], a[0]) < (b[2], b[1], b[0])",
     [((5, 3, 2020), (1, 4, 2020)), ((1, 1, 2021), (31, 12, 2020)), ((2, 2, 2022), (2, 2, 2022)),
      ((9, 9, 1999), (1, 1, 2000)), ((7, 8, 2001), (6, 8, 2001)), ((6, 8, 2001), (7, 8, 2001))]),

    # Small simulations
    ("robot_position(moves)", "where a robot is that starts at (0, 0), as a tuple (x, y). The text moves has one "
     "letter a step: R adds 1 to x, L takes 1 from x, U adds 1 to y, and D takes 1 from y", """
        x = moves.count("R") - moves.count("L")
        y = moves.count("U") - moves.count("D")
        return (x, y)
        """,
     [("RRU",), ("",), ("UDLR",), ("LLL",), ("DDRUD",), ("UUUR",)]),
    ("pascal_row(n)", "the row with index n of Pascal's triangle, as a list. The row with index 0 is [1]", """
        row = [1]
        for _ in range(n):
            row = [a + b for a, b in zip([0, *row], [*row, 0])]
        return row
        """,
     [(3,), (0,), (1,), (2,), (4,), (6,)]),
    ("years_to_reach(amount, growth, target)", "after how many years an amount that grows by growth every year is at "
     "least target. The growth is positive", """
        years = 0
        while amount < target:
            amount += growth
            years += 1
        return years
        """,
     [(10, 5, 22), (0, 1, 0), (50, 10, 20), (0, 3, 9), (1, 2, 8), (7, 100, 8)]),
    ("final_balance(start, changes)", "the balance of an account after all changes in the list. It begins with start, "
     "and a change that would make it negative is left out", """
        balance = start
        for change in changes:
            if balance + change >= 0:
                balance += change
        return balance
        """,
     [(10, [-4, 5, -20]), (0, []), (4, [-1, -4]), (5, [-5, -1, 3]), (100, [-101, -100]), (1, [2, 3, -7, 8])]),
    ("coins_for(cents)", "the least number of coins that make up the cents, with coins of 25, 10, 5 and 1 cents", """
        count = 0
        for coin in [25, 10, 5, 1]:
            count += cents // coin
            cents %= coin
        return count
        """,
     [(30,), (0,), (4,), (25,), (41,), (99,)]),
]

SCRIPTS: list[Script] = [
    ("one line with two integers, separated by a space", "their sum",
     "a, b = map(int, input().split())\nprint(a + b)",
     ["2 3", "0 0", "-7 4", "100 250", "8 -5"]),
    ("one line of text", "the text in upper case",
     "print(input().upper())",
     ["hello", "Mixed Case 1", "a", "already loud"]),
    ("one line with a positive integer n", "all integers from 1 to n, one per line", """
        n = int(input())
        for i in range(1, n + 1):
            print(i)
        """,
     ["3", "1", "2", "6", "11"]),
    ("one line with a positive integer n, and then n lines with one integer each", "the largest of these n integers",
     """
        n = int(input())
        numbers = [int(input()) for _ in range(n)]
        print(max(numbers))
        """,
     ["3\n4\n9\n2", "1\n-5", "2\n7\n7", "4\n-3\n-1\n-8\n-2", "3\n10\n20\n15"]),
    ("one line of integers, separated by spaces", "how many of them are negative", """
        numbers = [int(part) for part in input().split()]
        print(sum(1 for number in numbers if number < 0))
        """,
     ["3 -1 0 -2", "5", "-4 -5 -6", "0 0 -1", "-9 9 -8 8 7"]),
    ("one line of text", "the number of its words, which are separated by spaces",
     "print(len(input().split()))",
     ["the quick fox", "one", "to be or not to be", "a  b", "x y z w"]),
    ("one line with a positive integer n", 'n lines of stars: one "*" in the first line, and one more in each line '
     "after it", """
        n = int(input())
        for i in range(1, n + 1):
            print("*" * i)
        """,
     ["3", "1", "2", "5"]),
    ("one line of integers, separated by spaces", "the same integers from small to large in one line, separated by "
     "spaces", """
        numbers = sorted(map(int, input().split()))
        print(*numbers)
        """,
     ["3 1 2", "5", "10 9 -1", "2 2 1 1", "100 20 3"]),
    ("some lines of text, up to the end of the input", "each line from back to front", """
        import sys

        for line in sys.stdin:
            print(line.rstrip("\\n")[::-1])
        """,
     ["abc\nxy", "a", "level\nhello", "one two\nthree\nx", "12\n34\n56\n78"]),
    ("two lines of text", '"yes" if they are the same but for upper and lower case, and "no" otherwise', """
        a = input()
        b = input()
        print("yes" if a.lower() == b.lower() else "no")
        """,
     ["Hello\nhello", "a\nb", "ABC\nabc", "cat\ncats", "No Way\nno way"]),
    ("one line with a positive integer n", 'five lines of the form "n x i = p", where i goes from 1 to 5 and p is n '
     "times i", """
        n = int(input())
        for i in range(1, 6):
            print(f"{n} x {i} = {n * i}")
        """,
     ["3", "1", "7", "12"]),
    ("one line with an integer, one of the signs + - * and another integer, separated by spaces", "the result", """
        a, sign, b = input().split()
        a, b = int(a), int(b)
        if sign == "+":
            print(a + b)
        elif sign == "-":
            print(a - b)
        else:
            print(a * b)
        """,
     ["6 * 7", "1 + 2", "3 - 10", "-4 * 5", "0 - 0"]),
    ("lines of a name and an integer score, separated by a space, up to the end of the input", "the sum of all scores",
     """
        import sys

        total = 0
        for line in sys.stdin:
            name, score = line.split()
            total += int(score)
        print(total)
        """,
     ["Ann 3\nBob 4", "Cy 10", "a 0\nb 0", "x -5\ny 3\nz 1", "p 20\nq 22\np 8"]),
    ("one line with a positive integer n", "in one line, separated by spaces, all positive divisors of n from small to "
     "large", """
        n = int(input())
        print(*[d for d in range(1, n + 1) if n % d == 0])
        """,
     ["12", "1", "7", "36", "10"]),
    ("one line with a positive integer n", 'all integers from n down to 1, one per line, and then "Go!" in a line of '
     "its own", """
        n = int(input())
        for i in range(n, 0, -1):
            print(i)
        print("Go!")
        """,
     ["3", "1", "2", "5"]),
]
# fmt: on


def literal(value: Any) -> str:
    """The value as Python text. The items of a set are sorted, because `repr` does not guarantee their order.

    >>> literal(({"b", "a"},))
    "({'a', 'b'},)"
    """
    if isinstance(value, set):
        return "{" + ", ".join(sorted(map(literal, value))) + "}" if value else "set()"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(literal, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def as_block(code: str) -> str:
    return f"```python\n{code}\n```"


def clean(code: str) -> str:
    return textwrap.dedent(code).strip()


def function_row(problem: Function) -> Row:
    """Turn a problem of FUNCTIONS into a row."""
    signature, returned, body, calls = problem
    name = signature.partition("(")[0]
    code = f"def {signature}:\n{textwrap.indent(clean(body), '    ')}"
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 (the table's own code)
    written = [f"{name}({', '.join(map(literal, arguments))})" for arguments in calls]
    results = [literal(names[name](*copy.deepcopy(arguments))) for arguments in calls]
    example = f"For example, {written[0]} returns {results[0]}."
    return {
        "prompt": f"Write a Python function {signature} that returns {returned}. {example} {END}",
        "tests": [f"assert {call} == {result}" for call, result in zip(written[1:], results[1:], strict=True)],
        "solution": as_block(code),
    }


def script_row(problem: Script) -> Row:
    """Turn a problem of SCRIPTS into a row."""
    read, printed, code, inputs = problem
    code = clean(code)

    def output_for(text: str) -> str:
        with mock.patch.object(sys, "stdin", io.StringIO(text)), contextlib.redirect_stdout(io.StringIO()) as written:
            exec(code, {"__name__": "__main__"})  # noqa: S102 (the table's own code)
        return written.getvalue()

    example, *tests = [{"input": f"{text}\n", "output": output_for(f"{text}\n")} for text in inputs]
    asked = f"Write a Python program that reads from standard input {read}. It prints {printed}."
    return {
        "prompt": f"{asked}\n\nExample input:\n{example['input']}\nExample output:\n{example['output']}\n{END}",
        "tests": tests,
        "solution": as_block(code),
    }


def all_rows() -> dict[str, list[Row]]:
    """The rows of the two files."""
    rows: dict[str, list[Row]] = {"train": [], "eval": []}
    for table in (list(map(function_row, FUNCTIONS)), list(map(script_row, SCRIPTS))):
        for number, row in enumerate(table, start=1):
            rows["eval" if number % HOLD_OUT == 0 else "train"].append(row)
    return rows


def main() -> None:
    for name, rows in all_rows().items():
        path = Path(__file__).parent / f"code_tasks_{name}.jsonl"
        path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())
        print(f"{path.name}: {len(rows)} problems")


if __name__ == "__main__":
    main()
