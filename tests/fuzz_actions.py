"""Coverage-guided fuzzing of policy.parse against a reader that shares only json with it. Run by hand, not by pytest:

    pip install atheris
    PYTHONPATH=.:tests python tests/fuzz_actions.py -runs=1000000 -max_len=400

It stops at the first text that makes `parse` raise, or that the two readers understand differently, and saves it.
test_fuzz.py uses the same reader with texts that hypothesis makes up.
"""

import importlib
import json
import math
import sys

RESIZED, ORIGINAL = (224, 140), (331, 207)  # (width, height): no factor is 1, none are equal
SEEDS = (
    '{"Decision": "FULL"}', '{"Decision": "FULL", "Tool": null}', '{"Decision": "FULL", "Tool": ""}',
    '{"Decision": "REGION", "Tool": <tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [10, 20, 30, '
    '40], "label": "a b\\u00e9\\"}"}}</tool_call>}',
    '{"Decision":"REGION","Tool":<tool_call>{"arguments":{"bbox_2d":[-1.5e2,0.25,NaN,Infinity],"x":[{},[],true]},'
    '"name":"image_zoom_in_tool"}</tool_call>}',
)


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
        call = json.loads(call, parse_int=float)
    except (ValueError, RecursionError):
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
