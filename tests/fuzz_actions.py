"""Coverage-guided fuzzing of policy.parse against a reader that shares no line with it. Run by hand, not by pytest:

    pip install atheris
    PYTHONPATH=.:tests python tests/fuzz_actions.py -runs=1000000 -max_len=400

It stops at the first text that makes `parse` raise, or that the two readers understand differently, and saves it.
test_fuzz.py uses the same reader with texts that hypothesis makes up.
"""

import importlib
import math
import sys

RESIZED, ORIGINAL = (224, 140), (331, 207)  # (width, height): no factor is 1, none are equal
SPACE = " \t\n\r"  # JSON's; between the parts of an answer any white space will do
SEEDS = (
    '{"Decision": "FULL"}', '{"Decision": "FULL", "Tool": null}', '{"Decision": "FULL", "Tool": ""}',
    '{"Decision": "REGION", "Tool": <tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 30, '
    '40], "label": "a b\\u00e9\\"}"}}</tool_call>}',
    '{"Decision":"REGION","Tool":<tool_call>{"arguments":{"bbox_2d":[-1.5e2,0.25,NaN,Infinity],"x":[{},[],true]},'
    '"name":"image_zoom_in_tool"}</tool_call>}',
)


class NotJson(Exception):
    pass


class Slow:
    """A JSON reader, a character at a time: what Python's own accepts (NaN and Infinity; of equal keys the last)."""

    def __init__(self, text):
        self.text, self.at = text, 0

    def peek(self):
        return self.text[self.at:self.at + 1]

    def skip(self):
        while self.peek() and self.peek() in SPACE:
            self.at += 1

    def take(self, word):
        if not self.text.startswith(word, self.at):
            raise NotJson
        self.at += len(word)

    def document(self):
        value = self.value(0)
        if self.at < len(self.text):
            raise NotJson
        return value

    def value(self, depth):
        """One value and the white space around it."""
        if depth > 200:  # as deep as that nothing is an answer, whichever reader gives up first
            raise NotJson
        self.skip()
        kind = self.peek()
        if kind == "{":
            found = dict(self.entries(depth, "}", pairs=True))
        elif kind == "[":
            found = list(self.entries(depth, "]", pairs=False))
        elif kind == '"':
            found = self.string()
        else:
            found = self.word()
        self.skip()
        return found

    def entries(self, depth, end, pairs):
        self.at += 1
        self.skip()
        if self.peek() == end:
            self.at += 1
            return
        while True:
            if pairs:
                self.skip()
                key = self.string()
                self.skip()
                self.take(":")
                yield key, self.value(depth + 1)
            else:
                yield self.value(depth + 1)
            if self.peek() == end:
                self.at += 1
                return
            self.take(",")

    def string(self):
        self.take('"')
        letters = []
        while True:
            letter = self.peek()
            if not letter or letter < " ":
                raise NotJson
            self.at += 1
            if letter == '"':
                return "".join(letters)
            if letter == "\\":
                escape = self.peek()
                self.at += 1
                digits = self.text[self.at:self.at + 4]
                if escape == "u":
                    if len(digits) < 4 or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                        raise NotJson
                    self.at += 4
                elif not escape or escape not in '"\\/bfnrt':
                    raise NotJson
                letter = "?"  # no key or name that matters has an escape in it ... unless it spells one
                if escape == "u":
                    letter = chr(int(digits, 16))
                elif escape in '"\\/':
                    letter = escape
            letters.append(letter)

    def word(self):
        for word, value in (("null", None), ("true", True), ("false", False), ("NaN", math.nan),
                            ("Infinity", math.inf), ("-Infinity", -math.inf)):
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return value
        return self.number()

    def digits(self):
        start = self.at
        while self.peek() and self.peek() in "0123456789":
            self.at += 1
        return self.text[start:self.at]

    def number(self):
        start = self.at
        if self.peek() == "-":
            self.at += 1
        whole = self.digits()
        if not whole:
            raise NotJson
        if whole[0] == "0" and len(whole) > 1:
            raise NotJson
        for mark in (".", "eE"):
            before = self.at
            if self.peek() and self.peek() in mark:
                self.at += 1
                if mark == "eE" and self.peek() and self.peek() in "+-":
                    self.at += 1
                if not self.digits():
                    self.at = before  # what follows the number is then no part of a document
                    break
        return float(self.text[start:self.at])


def read_slowly(text):
    """What Sec. 3.2's answer in Table 10's form says: ("FULL", None), ("REGION", four floats in resized pixels) or
    ("MALFORMED", None). Float overflow of a whole number is infinity, as for any other number."""
    malformed, rest = ("MALFORMED", None), text.strip()
    if not rest.startswith("{") or not rest.endswith("}"):
        return malformed
    rest = rest[1:].lstrip()
    for word in ('"Decision"', ":"):
        if not rest.startswith(word):
            return malformed
        rest = rest[len(word):].lstrip()
    decision = next((name for name in ("FULL", "REGION") if rest.startswith(f'"{name}"')), None)
    if decision is None:
        return malformed
    rest = rest[len(decision) + 2:].lstrip()
    if rest == "}":
        return ("FULL", None) if decision == "FULL" else malformed
    for word in (",", '"Tool"', ":"):
        if not rest.startswith(word):
            return malformed
        rest = rest[len(word):].lstrip()
    tool = rest[:-1].rstrip()
    if decision == "FULL":
        return ("FULL", None) if tool in ("null", '""') else malformed
    if not (tool.startswith("<tool_call>") and tool.endswith("</tool_call>") and len(tool) >= 23):
        return malformed
    box = box_of(tool[11:-12])
    return malformed if box is None else ("REGION", box)


def box_of(call):
    """The four finite numbers of a tool call's JSON, or None."""
    try:
        call = Slow(call).document()
    except NotJson:
        return None
    if not isinstance(call, dict) or call.get("name") != "image_zoom_in_tool":
        return None
    arguments = call.get("arguments")
    box = arguments.get("bbox_2d") if isinstance(arguments, dict) else None
    if not isinstance(box, list) or len(box) != 4 or not isinstance(arguments.get("label", ""), str):
        return None
    sound = all(isinstance(x, float) and math.isfinite(x) for x in box)
    return box if sound else None


def check(text, parse, resized=RESIZED, original=ORIGINAL):
    """AssertionError unless `parse` understands `text` as `read_slowly` does. Returns the decision."""
    action = parse(text, resized, original, 0.25)
    decision, numbers = read_slowly(text)
    if numbers is not None:
        (w, h), (wide, high) = resized, original
        box = [numbers[0] / w * wide, numbers[1] / h * high, numbers[2] / w * wide, numbers[3] / h * high]
        box = [sorted((0.0, x, float(limit)))[1] for x, limit in zip(box, (wide, high, wide, high))]
        # A hair's breadth is left to the order in which floats are multiplied.
        thin = min(box[2] - box[0], box[3] - box[1])
        assert abs(thin) < 1e-9 or (action.decision == "REGION") == (thin > 0), text
        if action.decision == "REGION":
            assert all(abs(a - b) < 1e-9 * max(wide, high) for a, b in zip(action.box, box)), text
            x1, y1, x2, y2 = action.box
            assert 0 <= x1 < x2 <= wide and 0 <= y1 < y2 <= high, text
        else:
            assert action.decision == "MALFORMED", text
    else:
        assert action.decision == decision, text
    assert (action.box is None) == (action.decision != "REGION")
    assert action.p_region == 0.25 and action.text == text
    return action.decision


def main():
    atheris = importlib.import_module("atheris")  # optional, and none of the project's requirements
    with atheris.instrument_imports(include=["policy", "json", "json.decoder", "json.scanner"]):
        parse = importlib.import_module("policy").parse
    counts = {}

    def one(content):
        # Half of the inputs are put where a box stands, so that the fuzzer need not find the frame first.
        text = content.decode("utf-8", errors="surrogateescape" if content[:1] == b"\xff" else "replace")
        framed = ('{"Decision": "REGION", "Tool": <tool_call>{"name": "image_zoom_in_tool", "arguments": {' + text
                  + "}}</tool_call>}")
        for each in (text, framed):
            decision = check(each, parse)
            counts[decision] = counts.get(decision, 0) + 1
        if sum(counts.values()) % 200_000 == 0:
            print(counts, file=sys.stderr)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
