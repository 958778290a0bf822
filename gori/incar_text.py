"""The words of the built-in in-car task: templates, surface forms of values, synthetic names, Korean particles and
recogniser-like noise. It knows nothing of splits and of rows.

A rendered utterance is a list of pieces `(kind, text)`: `t` the template's words, `p` a particle, `c` a closed value's
surface form, `o` an open value, whose characters nothing may change.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import yaml

T = TypeVar("T")
Piece = tuple[str, str]
Node = tuple[str, Any]
Choice = tuple[Any, list[str]]
Fault = Callable[[list[Piece], random.Random], list[Piece]]

LANGUAGES = ("ko", "en")
PARTICLES = {
    "을": "를",
    "이": "가",
    "과": "와",
    "은": "는",
    "으로": "로",
    "이랑": "랑",
    "이라고": "라고",
    "이라는": "라는",
    "이면": "면",
}
SPOKEN_OFTEN = 8
"""How often a number with a word of its own is drawn again, against one draw of each other number."""
DIGIT_READINGS = "영일이삼사오육칠팔구"
SINO = ("", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구")
NATIVE = ("", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉")
NATIVE_TENS = ("", "열", "스물", "서른", "마흔", "쉰", "예순", "일흔", "여든", "아흔")
ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """A uniform draw that depends on `rng.random()` alone, so that every Python version draws the same."""
    return items[int(rng.random() * len(items))]


def with_particle(word: str, particle: str) -> str:
    """The form of `particle` (written as after a final consonant) that fits the last sound of `word`."""
    last = word[-1]
    if last.isdigit():
        last = DIGIT_READINGS[int(last)] if last != "0" or len(word) == 1 else "십"
    final = (ord(last) - 0xAC00) % 28 if "가" <= last <= "힣" else 0
    if particle == "으로" and final == 8:
        return "로"
    return particle if final else PARTICLES[particle]


def sino(number: float) -> str:
    """The Sino-Korean reading, below 1,000, with at most one decimal."""
    if number != int(number):
        whole, tenth = f"{number:.1f}".split(".")
        return f"{sino(int(whole))} 점 {DIGIT_READINGS[int(tenth)]}"
    number = int(number)
    if number == 0:
        return "영"
    hundreds, tens, ones = number // 100, number // 10 % 10, number % 10
    return "".join(
        (SINO[digit] if digit > 1 or not unit else "") + unit
        for digit, unit in ((hundreds, "백"), (tens, "십"), (ones, ""))
        if digit
    )


def native(number: int) -> str:
    """The native Korean counting form before a unit, 1 to 99."""
    if number == 20:
        return "스무"
    return NATIVE_TENS[number // 10] + NATIVE[number % 10]


def english(number: float) -> str:
    """The number in English words, below 1,000, with at most one decimal."""
    if number != int(number):
        whole, tenth = f"{number:.1f}".split(".")
        return f"{english(int(whole))} point {ONES[int(tenth)]}"
    number = int(number)
    if number >= 100:
        return f"{ONES[number // 100]} hundred" + (f" {english(number % 100)}" if number % 100 else "")
    if number < 20:
        return ONES[number]
    return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")


def number_values(spec: dict[str, Any]) -> list[float]:
    """The numbers `from`, `from + step` … `to` and those of `extra`; a whole one is an int, as it is said."""
    count = round((spec["to"] - spec["from"]) / spec["step"]) + 1
    values = [round(spec["from"] + index * spec["step"], 1) for index in range(count)]
    values += [value for value in spec.get("extra", {}) if value not in values]
    return [int(value) if value == int(value) else value for value in values]


def number_forms(value: float, spec: dict[str, Any], language: str) -> list[str]:
    """The surface forms of one number in one language."""
    whole = value == int(value)
    forms = []
    for form in spec[language].split("|"):
        if "{n}" in form and not whole:
            continue
        words = {
            "d": f"{value:g}",
            "s": sino(value),
            "w": english(value),
            "n": native(int(value)) if whole and value < 100 else "",
        }
        forms.append(form.format(**words))
    extra = spec.get("extra", {}).get(value)
    return (extra[language].split("|") * 2 + forms) if extra else forms


def clock_forms(language: str) -> list[Choice]:
    """Times of day from 06:00 to 22:30, each `HH:MM` with its surface forms."""
    rows: list[Choice] = []
    for hour, half in itertools.product(range(6, 23), (False, True)):
        twelve, noon = (hour - 1) % 12 + 1, hour >= 12
        if language == "ko":
            day = "오후" if noon else "오전"
            tails = (" 반", " 30분", " 삼십 분") if half else ("",)
            forms = [f"{day} {stem}{tail}" for stem in (f"{twelve}시", f"{native(twelve)} 시") for tail in tails]
        else:
            day, word = ("pm" if noon else "am"), ONES[twelve]
            part = "in the morning" if not noon else "in the afternoon" if hour < 18 else "in the evening"
            forms = [f"{twelve}:30 {day}", f"{word} thirty {day}", f"half past {word} {part}"]
            forms = forms if half else [f"{twelve} {day}", f"{word} {day}", f"{word} {part}"]
        rows.append((f"{hour:02d}:{30 if half else 0:02d}", forms))
    return rows


@dataclass(frozen=True)
class Line:
    """One template of one function (or of none) in one language."""

    text: str
    """As it stands in the YAML file, without mark and arguments."""
    nodes: tuple[Node, ...]
    first: tuple[Node, ...]
    """The same as the first clause of two (Korean: its last verb in the linking form)."""
    second: tuple[Node, ...]
    """The same as the second clause: without an opening such as "hey,"."""
    fixed: dict[str, Any]
    joinable: bool
    slots: tuple[str, ...]


def parse_line(source: str, macros: dict[str, str], fix: Callable[[str, str], Any]) -> Line:
    """Read one template line; `fix(parameter, word)` turns a fixed argument's word into its value."""
    text, _, arguments = source.strip().partition(" => ")
    joinable, text = not text.startswith("~"), text.lstrip("~").strip()
    linked = text[: -len("<줘>")] + "주고" if text.endswith("<줘>") else text
    bare = re.sub(r"^<(음|hey)> ", "", text)
    fixed = {name: fix(name, word) for name, word in (pair.split("=") for pair in arguments.split())}
    slots = tuple(re.findall(r"{(\w+)", text))
    return Line(text, parse(text, macros), parse(linked, macros), parse(bare, macros), fixed, joinable, slots)


def parse(text: str, macros: dict[str, str]) -> tuple[Node, ...]:
    """Template text as nodes: `("t", words)`, `("s", (slot, particle))`, `("a", alternatives)`."""
    text = re.sub(r"<(\w+)>", lambda match: f"({macros[match[1]]})", text)
    nodes: list[Node] = []
    for part in re.findall(r"{[^}]*}|\([^()]*\)|[^{}()]+", text):
        if part[0] == "{":
            slot, _, particle = part[1:-1].partition(":")
            nodes.append(("s", (slot, particle)))
        elif part[0] == "(":
            nodes.append(("a", tuple(part[1:-1].split("|"))))
        else:
            nodes.append(("t", part))
    return tuple(nodes)


def line_words(line: Line) -> frozenset[str]:
    """Every whitespace token that the line's own words can give, a slot written `{}` with what touches it."""
    words: set[str] = set()
    chunk: list[tuple[str, ...]] = []
    nodes = [
        ("a", ("{}" + (f":{value[1]}" if value[1] else ""),)) if kind == "s" else (kind, value)
        for kind, value in line.nodes
    ]
    for kind, value in [*nodes, ("t", " ")]:
        options = value if kind == "a" else tuple(re.split(r"(?<= )|(?= )", value))
        for option in [options] if kind == "a" else [(piece,) for piece in options]:
            if option == (" ",):
                words.update(word for form in itertools.product(*chunk) for word in "".join(form).split())
                chunk = []
            else:
                chunk.append(option)
    return frozenset(words)


def tidy(pieces: list[Piece]) -> list[Piece]:
    """The same words with neighbouring template pieces joined, single spaces and none at the ends."""
    joined: list[Piece] = []
    for kind, text in [("t", ""), *pieces, ("t", "")]:
        if joined and kind == "t" and joined[-1][0] == "t":
            joined[-1] = ("t", joined[-1][1] + text)
        else:
            joined.append((kind, text))
    joined = [
        (kind, re.sub(" +", " ", text).replace("?,", ",").replace(" ,", ",") if kind == "t" else text)
        for kind, text in joined
    ]
    joined[0] = (joined[0][0], joined[0][1].lstrip())
    joined[-1] = (joined[-1][0], joined[-1][1].rstrip())
    return [piece for piece in joined if piece[1]]


class Names:
    """Synthetic open values of one language, from the parts and syllables of the YAML file."""

    def __init__(self, spec: dict[str, Any], language: str) -> None:
        self.language = language
        halves = {name: text.split(" / ") for name, text in spec["parts"].items()}
        self.parts = {name: (half[0].split(), half[-1].split()) for name, half in halves.items()}
        self.patterns = {
            kind: [re.findall(r"{\w+}|[^{}]+", form) for form in forms] for kind, forms in spec["values"].items()
        }
        self.syllables = {
            name: spec[name].split() for name in ("syllables", "onsets", "nuclei", "codas") if name in spec
        }

    def draw(self, kind: str, rng: random.Random, reserved: bool = False) -> str:
        """A value of this kind; `reserved` takes the parts that training never uses."""
        pattern = pick(rng, self.patterns[kind])
        return "".join(self.part(token[1:-1], rng, reserved) if token[0] == "{" else token for token in pattern)

    def part(self, name: str, rng: random.Random, reserved: bool) -> str:
        if name == "W":
            return self.english_word(rng)
        if name[0] == "w" and name[1:].isdigit():
            return "".join(pick(rng, self.syllables["syllables"]) for _ in range(int(name[1:])))
        return pick(rng, self.parts[name][reserved]).replace("_", " ")

    def english_word(self, rng: random.Random) -> str:
        onsets, nuclei, codas = (self.syllables[name] for name in ("onsets", "nuclei", "codas"))
        word = pick(rng, onsets) + pick(rng, nuclei) + pick(rng, onsets) + pick(rng, nuclei)
        if rng.random() < 0.25:
            word += pick(rng, onsets) + pick(rng, nuclei)
        return (word + pick(rng, codas) if rng.random() < 0.75 else word).capitalize()


def noisy(pieces: list[Piece], language: str, rng: random.Random) -> list[Piece]:
    """The pieces as a speech recogniser might give them: one to three small faults, open values untouched."""
    faults = KOREAN_FAULTS if language == "ko" else ENGLISH_FAULTS
    wanted, changed = 1 + int(rng.random() * 2.4), pieces
    for _ in range(12):
        before, changed = changed, pick(rng, faults)(changed, rng)
        wanted -= before != changed
        if not wanted:
            break
    return changed


def in_words(pattern: str, new: Callable[[re.Match[str], random.Random], str]) -> Fault:
    """The fault that rewrites one randomly drawn match of `pattern` in the template's words."""

    def fault(pieces: list[Piece], rng: random.Random) -> list[Piece]:
        words = [(index, text) for index, (kind, text) in enumerate(pieces) if kind == "t"]
        found = [(index, match) for index, text in words for match in re.finditer(pattern, text)]
        if not found:
            return pieces
        index, match = pick(rng, found)
        text = match.string[: match.start()] + new(match, rng) + match.string[match.end() :]
        return [*pieces[:index], ("t", text), *pieces[index + 1 :]]

    return fault


def drop_particle(pieces: list[Piece], rng: random.Random) -> list[Piece]:
    found = [index for index, (kind, text) in enumerate(pieces) if kind == "p" and text in tuple("을를이가은는")]
    lost = pick(rng, found) if found else -1
    return [piece for index, piece in enumerate(pieces) if index != lost]


def drop_punctuation(pieces: list[Piece], rng: random.Random) -> list[Piece]:
    return [(kind, re.sub(r"[,.?!']", "", text) if kind == "t" else text) for kind, text in pieces]


def lower_case(pieces: list[Piece], rng: random.Random) -> list[Piece]:
    return [(kind, text if kind == "o" else text.lower()) for kind, text in pieces]


def swap_vowel(match: re.Match[str], rng: random.Random) -> str:
    """Confuse Korean vowels that sound alike today: ㅐ and ㅔ, ㅙ and ㅚ, ㅞ."""
    code, vowels = ord(match[0]) - 0xAC00, {1: 5, 5: 1, 10: 11, 11: 10, 15: 11}
    vowel = code // 28 % 21
    return chr(0xAC00 + code + (vowels.get(vowel, vowel) - vowel) * 28)


def slip(match: re.Match[str], rng: random.Random) -> str:
    """Lose a letter inside an English word, or swap it with the next."""
    word, at = match[0], 1 + int(rng.random() * (len(match[0]) - 3))
    return word[:at] + (word[at + 1 :] if rng.random() < 0.5 else word[at + 1] + word[at] + word[at + 2 :])


def filler(*words: str) -> tuple[Fault, Fault]:
    """Hesitations before the utterance and inside it."""

    def begin(pieces: list[Piece], rng: random.Random) -> list[Piece]:
        return [("t", pick(rng, words) + " "), *pieces]

    return begin, in_words(INNER_SPACE, lambda match, rng: f" {pick(rng, words)} ")


INNER_SPACE = r"(?<=\S) (?=\S)"
DOUBLE = in_words(r"(?<!\S)[^\s,?]+(?= )", lambda match, rng: f"{match[0]} {match[0]}")
DROP_SPACE = in_words(INNER_SPACE, lambda match, rng: "")
KOREAN_FAULTS: tuple[Fault, ...] = (
    *(drop_particle, DROP_SPACE, DROP_SPACE, DOUBLE, drop_punctuation),
    in_words(r"(?<=[가-힣]{2})[을를](?= )", lambda match, rng: ""),
    *(in_words(r"[해내세대재새매배제때계메네되돼왜]", swap_vowel), *filler("음", "어", "그", "저", "아", "그러니까")),
)
ENGLISH_FAULTS: tuple[Fault, ...] = (
    *(lower_case, lower_case, DOUBLE, drop_punctuation, in_words(r"\b[a-z]{5,}\b", slip)),
    *(in_words(r"(?<!\S)(the|a|to) ", lambda match, rng: ""), *filler("uh", "um", "er", "like", "well")),
)


@dataclass(frozen=True)
class Function:
    """One function of the car, or none (name "")."""

    name: str
    params: dict[str, dict[str, Any]]
    lines: dict[str, list[Line]]
    choices: dict[str, dict[str, list[Choice]]]
    """Of each closed parameter in each language: the values and their surface forms."""
    weight: float


@dataclass(frozen=True)
class Task:
    functions: dict[str, Function]
    none: Function
    names: dict[str, Names]


@functools.cache
def source() -> dict[str, Any]:
    text = resources.files("gori").joinpath("incar.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded


@functools.cache
def task() -> Task:
    """The YAML file, parsed."""
    spec = source()
    functions = {name: read_function(name, spec["functions"][name], spec) for name in spec["functions"]}
    names = {language: Names(spec["names"][language], language) for language in LANGUAGES}
    return Task(functions, read_function("", spec["none"], spec), names)


def read_function(name: str, entry: dict[str, Any], spec: dict[str, Any]) -> Function:
    params = entry["params"]

    def fix(parameter: str, word: str) -> Any:
        return word if "enum" in params[parameter] else word == "true"

    lines: dict[str, list[Line]] = {}
    choices: dict[str, dict[str, list[Choice]]] = {}
    for language in LANGUAGES:
        lines[language] = [parse_line(row, spec["macros"][language], fix) for row in entry[language].splitlines()]
        closed = {key: param for key, param in params.items() if not is_open(param)}
        choices[language] = {key: closed_choices(param, spec, language) for key, param in closed.items()}
    return Function(name, params, lines, choices, entry.get("weight", 1.0))


def is_open(param: dict[str, Any]) -> bool:
    return "open" in param


def closed_choices(param: dict[str, Any], spec: dict[str, Any], language: str) -> list[Choice]:
    """The values of a closed parameter with their surface forms in one language."""
    if "num" in param:
        numbers = spec["numbers"][param["num"]]
        choices = [(value, number_forms(value, numbers, language)) for value in number_values(numbers)]
        often = [c for c in choices if c[0] in numbers.get("extra", {})]
        return choices + often * SPOKEN_OFTEN  # half a window is asked for more often than 70 percent of one
    if "clock" in param:
        return clock_forms(language)
    lexicon = spec["lexicons"].get(param.get("enum") or param.get("flag"), {})
    forms = {value: entry[language].split("|") for value, entry in lexicon.items()}
    return [(value == "on" if "flag" in param else value, form) for value, form in forms.items()]
