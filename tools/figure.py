"""The README's picture of the loop: one real query, a group of rollouts, their crops, rankings, rewards, advantages.

    python -m tools.figure --data data/world --split val --query 12 --out figures/loop.png

Nothing is drawn by hand: the policy of `--policy` answers, the scorer ranks, rewards.py and rgrpo.py give the numbers.
Without `--query` the first query is taken on which the group's boxes earn the most different rewards. matplotlib is a
package of requirements-dev.txt.
"""

import argparse
import io
import os

import numpy as np
import torch
from matplotlib import patches
from matplotlib.figure import Figure
from PIL import Image

import rgrpo
from policy import load_policy
from rewards import reward
from scorer import InputError, crop, load_data, load_scorer, read_image, replacing, same_scorer, scores

PLAN = ["FULL"] + ["REGION"] * 4  # N = 8: the four FULL rollouts are one and the same answer
COUNT = [4, 1, 1, 1, 1]
GREEN, RED, GREY, BLUE, ORANGE = "#1b7f4d", "#b3382c", "#6b7280", "#2563a8", "#c26a12"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/world", help="folder that prepare.py wrote")
    parser.add_argument("--split", default="val", help="train, val or test")
    parser.add_argument("--policy", default="mini/policy", help="model id or folder; as it is before training")
    parser.add_argument("--scorer", help="default: the one of the data")
    parser.add_argument("--query", type=int, help="row of the split, from 0; default: the most telling of the first 60")
    parser.add_argument("--seed", type=int, default=0, help="of the rollouts")
    parser.add_argument("--out", default="figures/loop.png", help="picture to write")
    return parser.parse_args(argv)


def roll(data, policy, scorer, i, seed):
    """Query i -> its group: dict of image, actions [n], scores of the full image [K] and of each view [n, K], reward
    totals [n], decision and box advantages [n]; n = 5 answers that stand for N = 8 rollouts."""
    image, query = data.open_image(i), data.queries[i]
    prompts = policy.prompts([image], [query.question])
    actions = [c.action for c in policy.rollout(prompts, [PLAN], seeds=[(seed, i)])[0]]
    full = scores(np.asarray(data.full[i], dtype=np.float32), data.candidates(i))                   # [K]
    views = scorer.image_features([crop(image, a.box) for a in actions[1:]])                        # [n - 1, D]
    seen = np.concatenate([full[None], scores(views, data.candidates(i))])                          # [n, K]
    total = reward(PLAN, seen, full, np.asarray(data.labels[i], dtype=int))["total"]                               # [n]
    codes = torch.tensor([[rgrpo.CODES[d] for d in PLAN]])                                          # [1, n]
    decision, box = rgrpo.advantages(torch.tensor(total)[None], codes, weights=torch.tensor([COUNT]).float())
    return {"i": i, "image": image, "actions": actions, "full": full, "seen": seen, "total": total,
            "decision": decision[0].numpy(), "box": box[0].numpy()}


def most_telling(data, policy, scorer, seed):
    """The group, among the first 60 queries whose full image misses, with the widest spread of REGION rewards."""
    best = None
    for i in range(min(60, len(data))):
        full = scores(np.asarray(data.full[i], dtype=np.float32), data.candidates(i))               # [K]
        if data.labels[i].any() and not data.labels[i, int(np.argmax(full))]:
            group = roll(data, policy, scorer, i, seed)
            if best is None or np.ptp(group["total"][1:]) > np.ptp(best["total"][1:]):
                best = group
    if best is None:
        raise InputError(f"{data.folder}: the full image is right on all of the first 60 queries; name a --query")
    return best


def show(axes, image, title="", colour="black", frame=GREY, width=1.0):
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9, color=colour, pad=3)
    for spine in axes.spines.values():
        spine.set(edgecolor=frame, linewidth=width)


def draw_query(figure, place, group, question):
    """The image with every box of the group, and the question."""
    axes = figure.add_axes(place)
    show(axes, group["image"])
    for n, action in enumerate(group["actions"][1:], 1):
        x1, y1, x2, y2 = action.box
        axes.add_patch(patches.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=1.8, ec=ORANGE))
        # Each label a little further right, or boxes that nearly agree would hide each other's.
        axes.text(x1 + 3 + 14 * (n - 1), y1 + 3, str(n), color="white", fontsize=8, va="top",
                  bbox=dict(fc=ORANGE, ec="none", pad=1.2))
    figure.text(place[0], place[1] - 0.05, "“" + question + "”", fontsize=10, style="italic", va="top", wrap=True)
    sure = group["actions"][0].p_region
    figure.text(place[0], place[1] - 0.13, f"pi(REGION | x) = {sure:.2f}", fontsize=9, color=GREY, va="top")


def draw_rollout(figure, data, group, n, top, height):
    """A line: the view, the four best candidates, reward and advantages of answer n."""
    labels, order = data.labels[group["i"]].tolist(), np.argsort(-group["seen"][n], kind="stable")
    action = group["actions"][n]
    name = "FULL   x 4" if n == 0 else f"REGION {n}"
    figure.text(0.285, top + height / 2, name, fontsize=10, weight="bold", va="center",
                color=BLUE if n == 0 else ORANGE)
    view = group["image"] if n == 0 else crop(group["image"], action.box)
    width = height * 0.5
    show(figure.add_axes([0.365, top, width, height]), view, frame=BLUE if n == 0 else ORANGE, width=1.8)
    for place, k in enumerate(order[:4]):
        axes = figure.add_axes([0.465 + place * (width + 0.014), top, width, height])
        right = labels[k] == 1
        image = read_image(data.candidate_image_path(int(data.pool_image[group["i"], k])))
        show(axes, image, frame=GREEN if right else "#d1d5db", width=3.2 if right else 0.8)
    rank = 1 + [labels[k] for k in order].index(1)
    figure.text(0.835, top + height / 2, str(rank), ha="center", va="center", fontsize=11,
                color=GREEN if rank == 1 else "black", weight="bold" if rank == 1 else "normal")
    cells = [(0.875, group["total"][n]), (0.928, group["decision"][n])] + ([(0.98, group["box"][n])] if n else [])
    for x, value in cells:
        figure.text(x, top + height / 2, f"{value:+.2f}", ha="center", va="center", fontsize=10,
                    color=GREEN if value > 1e-6 else RED if value < -1e-6 else GREY)


def draw(data, group):
    """The whole picture as a matplotlib figure."""
    figure = Figure(figsize=(12.8, 6.4), dpi=110, facecolor="white")
    question = data.queries[group["i"]].question
    heads = [(0.02, "query x = (image, question)", "left"), (0.285, "policy: a balanced group", "left"),
             (0.465, "frozen scorer: the pool re-ranked, best four", "left"), (0.835, "rank", "center"),
             (0.875, "r", "center"), (0.928, "A of d", "center"), (0.98, "A of b", "center")]
    notes = [(0.285, "Sec. 3.2, 3.4", "left"), (0.465, "Eq. 1-4; green frame: the right answer", "left"),
             (0.875, "Eq. 7, 8", "center"), (0.955, "Eq. 9", "center")]
    for x, text, side in heads:
        figure.text(x, 0.965, text, fontsize=10.5, weight="bold", ha=side, va="top")
    for x, text, side in notes:
        figure.text(x, 0.925, text, fontsize=9, color=GREY, ha=side, va="top")
    draw_query(figure, [0.02, 0.36, 0.235, 0.50], group, question)
    height, gap = 0.145, 0.022
    for n in range(len(PLAN)):
        draw_rollout(figure, data, group, n, 0.735 - n * (height + gap), height)
    figure.text(0.02, 0.03, "The decision token is moved by how its reward compares with the whole group, the box "
                "tokens by how it compares with the other boxes.", fontsize=9.5, color=GREY)
    return figure


def main(argv=None):
    args = parse_args(argv)
    try:
        data = load_data(args.data, args.split)
        then = data.manifest["scorer"]
        scorer = load_scorer(args.scorer or then["name"], dtype=then["dtype"])
        same_scorer(args.data, data.manifest, scorer)
        try:
            policy = load_policy(args.policy)
        except ValueError as error:  # of a model that is not there or is none
            raise InputError(str(error)) from error
        if args.query is None:
            group = most_telling(data, policy, scorer, args.seed)
        elif 0 <= args.query < len(data) and data.labels[args.query].any():
            group = roll(data, policy, scorer, args.query, args.seed)
        else:
            raise InputError(f"--query {args.query}: a row from 0 to {len(data) - 1} whose pool holds the right answer")
    except (InputError, FileNotFoundError) as error:
        raise SystemExit(f"tools.figure: {error}") from error
    buffer = io.BytesIO()
    draw(data, group).savefig(buffer, format="png")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with replacing(args.out) as temporary:
        # 128 colours are enough for drawings, and a quarter of the bytes.
        picture = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        picture.save(temporary, format="png", optimize=True)
    print(f"wrote {args.out}: query {group['i']}, {data.queries[group['i']].query_id}")


if __name__ == "__main__":
    main()
