"""Table 7: does a crop show what the question is about? From the rows of an evaluation, without a policy.

    python -m tools.crop_quality --run runs/world                                                        # true boxes
    python -m tools.crop_quality --run runs/evqa --proxy groundingdino=IDEA-Research/grounding-dino-base
    python -m tools.crop_quality --run runs/evqa --judge http://127.0.0.1:8000/v1 --judge-model NAME

For each crop of zeroshot, zeroshot2, always and policy: IoU with a target box, and containment, which is 1 where the
crop shows the whole target. Targets are the true boxes where the data has them, or what GroundingDINO finds for the
question's keyword (Sec. 4.4). A judge is a vision-language model behind an OpenAI-compatible address, which is asked of
the policy's crops whether they can answer the question; the crops are sent there. Answers are kept in a file as they
come, so that a killed run goes on. Writes <split>.<method>.quality.jsonl, a line a crop. Where the data names kinds of
queries, it also prints what every method does with each kind.
"""

import argparse
import base64
import http.client
import io
import json
import math
import os
import re
import time
import urllib.error
import urllib.request

import torch
from tqdm import tqdm

from evaluate import Answers, cells, iou, mean, read_truth, write_rows
from scorer import InputError, crop, lock_folder
from tools.rows import add_flags, finish, open_rows

METHODS = ("zeroshot", "zeroshot2", "always", "policy")
KEYWORD_AFTER = re.compile(r"\b(?:this|these|that|those)\s+((?:[^\W\d_]|-)+)", re.IGNORECASE)
NO_KEYWORD = frozenset("""a an the of in on at to for from by with and or is are was were be been does do did has have
    had can could will would what which who whose whom where when why how many much long old it its he she they his her
    their this that these those there""".split())


def keyword(question):
    """The noun that a question asks about: the word after this/these, else its last word that can be one; or None.

    "Where does this beetle live?" -> "beetle". The paper extracts "the most important keyword" and does not say how
    (Sec. 4.4); the questions of both benchmarks name the target's category after `this`.
    """
    if found := KEYWORD_AFTER.search(question):
        return found.group(1).lower()
    words = [word for word in re.findall(r"[^\W\d_]+", question.lower()) if word not in NO_KEYWORD]
    return words[-1] if words else None


def load_detector(name, device):
    """GroundingDINO by Hugging Face id or folder -> function(image, word) -> best box in image pixels, or None."""
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor  # here: nothing else needs a detector
    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForZeroShotObjectDetection.from_pretrained(name).to(device).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"--proxy groundingdino={name}: {error}") from error

    @torch.inference_mode()
    def detect(image, word):
        # Phrases in lower case, each ended by a full stop, is how GroundingDINO was trained.
        inputs = processor(images=image, text=f"{word}.", return_tensors="pt").to(device)
        # Boxes below the processor's own threshold of confidence are none.
        found = processor.post_process_grounded_object_detection(model(**inputs), inputs["input_ids"],
                                                                 target_sizes=[(image.height, image.width)])[0]
        if len(found["scores"]) == 0:
            return None
        x1, y1, x2, y2 = found["boxes"][found["scores"].argmax()].tolist()
        box = (max(0., x1), max(0., y1), min(float(image.width), x2), min(float(image.height), y2))
        return box if box[0] < box[2] and box[1] < box[3] else None
    return detect


def proxy_targets(data, actions, detect, answers):
    """Target boxes by a detector for the queries that a policy crops by itself -> ({query row: box}, {why none: n})."""
    rows = sorted({i for name, listed in actions.items() if name != "always"
                   for i, action in enumerate(listed) if action.decision == "REGION"})
    without, targets = {"no keyword": 0, "nothing detected": 0}, {}
    for i in tqdm(rows, desc="detect", unit="query", disable=None):
        word = keyword(data.queries[i].question)
        if word and ("detect", i) not in answers:
            answers.add({("detect", i): detect(data.open_image(i), word)})
        if word and answers["detect", i]:
            targets[i] = tuple(answers["detect", i])
        else:
            without["nothing detected" if word else "no keyword"] += 1
    return targets, without


def contains(box, target):
    """1.0 if the crop shows the whole target, else 0.0: the paper's containment rate is the mean of it."""
    # The crop takes whole pixels, rounded outward (scorer.crop), so that is what contains.
    return float(math.floor(box[0]) <= target[0] and math.floor(box[1]) <= target[1]
                 and target[2] <= math.ceil(box[2]) and target[3] <= math.ceil(box[3]))


def ask_judge(url, model, key, image, question, patience=(1, 5, 20)):
    """Does the picture hold what is needed to answer the question? -> True, False, or None for another answer.

    patience: seconds to wait before each new try where the server is busy or silent. InputError, with the server's own
    words, when it refuses the request or stays silent.
    """
    text = ("The picture is a crop of a larger one. Question about it: " + question + "\nDoes the crop show enough to "
            "answer the question, given access to an encyclopaedia? Answer with one word, YES or NO.")
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    picture = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    # Neither temperature nor a token limit: servers differ in which of them they take, and one word needs none.
    body = {"model": model, "messages": [{"role": "user", "content": [
        {"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": picture}}]}]}
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    address = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for wait in (*patience, None):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                said = json.load(answer)["choices"][0]["message"]["content"] or ""
            words = set(re.findall(r"\b(yes|no)\b", said.lower()))
            return words == {"yes"} if len(words) == 1 else None
        except urllib.error.HTTPError as error:
            problem = f"{error.code} {error.reason}: {error.read(300).decode('utf-8', 'replace')}"
            if error.code < 500 and error.code not in (408, 429):  # a wrong key or model gets no better by waiting
                break
        # Of the server: no connection (URLError is an OSError), an answer that breaks off, or one of another form.
        except (OSError, http.client.HTTPException, LookupError, TypeError, AttributeError, ValueError) as error:
            problem = f"{type(error).__name__}: {error}"
        if wait is not None:
            time.sleep(wait)
    raise InputError(f"--judge {url}: {problem}")


def judge_crops(data, actions, args, answers):
    """YES/NO by a judge for the policy's crops -> {query row: True, False, or None for neither}."""
    rows = [i for i, action in enumerate(actions) if action.decision == "REGION"]
    if args.judge_limit and len(rows) > args.judge_limit:  # evenly spaced: a split may be sorted
        rows = [rows[k * len(rows) // args.judge_limit] for k in range(args.judge_limit)]
    for i in tqdm([i for i in rows if ("judge", i) not in answers], desc="judge", unit="crop", disable=None):
        view = crop(data.open_image(i), actions[i].box)
        answers.add({("judge", i): ask_judge(args.judge, args.judge_model, os.environ.get(args.judge_key_env), view,
                                             data.queries[i].question)})
    return {i: answers["judge", i] for i in rows}


def quality(data, actions, targets, verdicts):
    """A dict for each crop of one method; None where there is no target, or no judge was asked."""
    return [{"query_id": data.queries[i].query_id, "box": list(action.box), "target": targets.get(i),
             "iou": iou(action.box, targets[i]) if i in targets else None,
             "containment": contains(action.box, targets[i]) if i in targets else None, "judge": verdicts.get(i)}
            for i, action in enumerate(actions) if action.decision == "REGION"]


def kind_table(rows):
    """Lines: what each method does with each kind of query, of those whose pool holds the positive (IoU: where the full
    image does not rank it first); none where the data names no kinds."""
    kinds, lines = sorted({row["kind"] for row in rows["full"]} - {None}), []
    for name, listed in rows.items():
        lines.append(f"{name:16}")
        for kind in kinds:
            held = [row for row in listed if row["kind"] == kind and any(row["labels"])]
            lines[-1] += (cells([mean(row["rank"] == 1 for row in held)], 9, ".3f")
                          + cells([mean(row["decision"] == "REGION" for row in held)], 9, "%")
                          + cells([mean(row["iou"] for row in held if row["full_rank"] > 1)], 9, ".2f")
                          + cells([mean(row["rank"] < row["full_rank"] for row in held),
                                   mean(row["rank"] > row["full_rank"] for row in held)], 9, "%"))
    n = {kind: sum(row["kind"] == kind and any(row["labels"]) for row in rows["full"]) for kind in kinds}
    head = [f"{'by kind':16}" + "".join(f"{f'{kind}, n = {n[kind]}':^46}" for kind in kinds),
            f"{'':16}" + cells(("CondR@1", "crop %", "IoU", "help %", "hurt %"), 9, "") * len(kinds)]
    return ["", *head, *lines] if kinds else []


def run(args):
    """Everything asked for, to its files -> Table 7 as lines."""
    data, _, rows, every = open_rows(args, needed=("policy",) if args.judge else ())
    actions = {name: every[name] for name in METHODS if name in every}
    if not actions:
        raise InputError(f"{args.out} has the rows of no policy: run evaluate.py with one of {', '.join(METHODS)}")
    boxes = {name: [action.box for action in listed] for name, listed in actions.items()}
    with lock_folder(args.out, "--out"):
        asked = Answers(os.path.join(args.out, f"{args.split}.quality.part"), {
            "pools": data.identity, "proxy": args.proxy, "judge": [args.judge, args.judge_model], "boxes": boxes})
        name, lines, without = "true boxes", [], {}
        if args.proxy:
            name, detect = args.proxy, load_detector(args.proxy.partition("=")[2], args.device)
            targets, without = proxy_targets(data, actions, detect, asked)
        else:
            targets = {i: fact["box"] for i, fact in read_truth(data).items()}
        verdicts = judge_crops(data, actions["policy"], args, asked) if args.judge else {}
        for method, chosen in actions.items():
            listed = quality(data, chosen, targets, verdicts if method == "policy" else {})
            write_rows(os.path.join(args.out, f"{args.split}.{method}.quality.jsonl"), listed)
            aimed = [row for row in listed if row["target"]]
            if aimed:
                lines.append(f"{method:16}{len(aimed):>8}{mean(row['iou'] for row in aimed):8.2f}"
                             f"{mean(row['containment'] for row in aimed):13.2f}")
        os.remove(asked.path)
    head = f"{'Table 7':16}{'crops':>8}{'IoU':>8}{'containment':>13}   target: {name}"
    lines = [head, *lines] if lines else ["Table 7: no crop has a target: the data names no true boxes, see --proxy"]
    lines += [f"{count} queries without a target: {reason}" for reason, count in without.items() if count]
    if args.judge:
        clear = [verdict for verdict in verdicts.values() if verdict is not None]
        rate = f"{sum(clear) / len(verdicts):.2f}" if verdicts else "-"
        lines.append(f"Table 7, judge {args.judge_model}: YES for {rate} of {len(verdicts)} crops of the policy, "
                     f"{len(verdicts) - len(clear)} answers neither YES nor NO")
    return [*lines, *kind_table(rows)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--proxy", metavar="groundingdino=NAME",
                        help="target boxes by this detector, a Hugging Face id or folder; default: the true boxes")
    parser.add_argument("--judge", metavar="URL", help="OpenAI-compatible address (http://host:port/v1) to ask")
    parser.add_argument("--judge-model", default="default", help="name of the model to ask for at --judge")
    parser.add_argument("--judge-key-env", default="OPENAI_API_KEY", metavar="VARIABLE",
                        help="environment variable that holds the key for --judge; none is sent where it is empty")
    parser.add_argument("--judge-limit", type=int, default=200, help="crops to ask about, evenly spaced; 0 = all")
    args = parser.parse_args(argv)
    if args.proxy and not re.fullmatch(r"groundingdino=.+", args.proxy):
        parser.error(f"--proxy {args.proxy}: groundingdino=NAME is the one kind there is")
    if args.judge and not re.match(r"https?://", args.judge) or args.judge_limit < 0:
        parser.error("--judge is an address that begins with http:// or https://, --judge-limit 0 or more")
    return args


def main(argv=None):
    finish("crop_quality", run, parse_args(argv))


if __name__ == "__main__":
    main()
