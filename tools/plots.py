"""The plots and pictures of tools/report.py: Figure 2, the operating curve, the training, queries.

A plot is one panel: beside each other on a desktop, below each other on a phone. A case is a query in pictures: a
heading of words and [(caption, PIL image)]. matplotlib is a package of requirements-dev.txt.
"""

import base64
import io
from dataclasses import dataclass

import matplotlib.figure
import numpy as np
from PIL import Image, ImageDraw

from scorer import InputError, crop, read_image, scores

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#7A7A7A"  # told apart by colour-blind readers (Okabe-Ito)
PANELS = (  # name, title, y label, ((field of log.jsonl, label, colour), ...), what to see
    ("reward", "Reward", "reward", (("reward_full", "FULL", GREEN), ("reward_region", "REGION", ORANGE),
                                    ("reward", "all rollouts", BLUE)),
     "Mean reward of a step's rollouts, and of each decision's."),
    ("validation", "Validation", "", (("val_cond_r1", "CondR@1", BLUE), ("val_mrr", "MRR", ORANGE)),
     "Greedy decoding on the validation split; step 0 is the policy before training."),
    ("cropping", "How often it crops", "share", (("p_region", "p(REGION), training", BLUE),
                                                 ("val_crop_rate", "crop rate, validation", ORANGE)),
     "A policy that drifts to 0 or 1 has stopped deciding."),
    ("entropy", "Entropy of the decision", "nats", (("decision_entropy", "", BLUE),),
     "How open the decision still is; at 0 nothing is explored any more."),
    ("trouble", "Signs of trouble", "share", (("malformed_rate", "unreadable", ORANGE),
                                              ("zero_advantage", "groups without advantage", BLUE),
                                              ("clip_fraction", "clipped tokens", GREEN)),
     "Unreadable answers, groups that teach nothing, and tokens whose ratio was clipped."),
    ("gradient", "Gradient and KL", "", (("grad_norm", "gradient norm", BLUE), ("kl", "KL to the base model", ORANGE)),
     "Norm before clipping; KL is 0 where it is not part of the loss."),
)


@dataclass
class Plot:
    name: str
    png: bytes
    caption: str     # what to see; also what a screen reader says


@dataclass
class Case:
    group: str       # heading of its kind, shown where it changes
    words: str
    soft: str        # less important words
    views: list      # of (caption, PIL image); none where a picture could not be read, which `soft` then says


# -------------------------------------------------------------------------------------------------------------- plots

def draw(run, label, without=None):
    """All plots of a run, those without data left out. label: method -> its name in words.

    without: {measure: [Q]} of an ablation without the margin term, for the other half of Figure 2.
    """
    return [*margin_plots(run, without), *curve_plots(run, label), *training_plots(run)]


def canvas(title, xlabel, ylabel):
    """(figure, axes) of one panel."""
    # A Figure of its own and no pyplot: nothing is shared between plots, and no display is looked for.
    figure = matplotlib.figure.Figure(figsize=(4.6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def drawn(figure, name, caption, legend=False):
    if legend:  # below the axes: inside them it would sooner or later lie on the data
        figure.legend(loc="outside lower center", ncol=3, frameon=False, fontsize=9, handlelength=1.4,
                      columnspacing=1.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170, metadata={"Software": None})  # no version: equal rows, equal bytes
    return Plot(name, buffer.getvalue(), caption)


def margin_plots(run, without):
    """Figure 2: margin of the full image against that of the crop, without and with the margin term."""
    shown = [("figure2_without", "without the margin term", without),
             ("figure2", "learned policy", run.study.values.get("policy"))]
    before, points = run.study.values["full"]["margin"], {}
    for name, title, values in shown:
        kept = (values["crop"] == 1) & ~np.isnan(before + values["margin"]) if values else np.zeros(len(before), bool)
        if kept.any():
            points[name] = title, before[kept], values["margin"][kept]
    # One diagonal for both, and so the same axes: what is to be compared is where the points lie.
    every = np.concatenate([both for _, x, y in points.values() for both in (x, y)] or [[0.0]])
    ends, plots = [every.min(), every.max()], []
    for name, (title, x, y) in points.items():
        better = y > x
        figure, axes = canvas(f"{title}: {100 * better.mean():.0f} % of {len(x)} crops gain",
                              "margin of the full image", "margin of the crop")
        for inside, colour, mark in ((better, BLUE, "o"), (~better, ORANGE, "x")):  # two marks: colour is not all
            axes.scatter(x[inside], y[inside], s=12, color=colour, marker=mark, alpha=0.55, linewidths=0.8)
        axes.plot(ends, ends, color="black", linewidth=1)
        axes.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
        axes.axvline(0, color=GREY, linewidth=0.8, linestyle=":")
        plots.append(drawn(figure, name, f"Figure 2, {title}. A point is a cropped query; above the line (blue dots) "
                           "the crop widened the distance between the best positive and the best negative. Upper left: "
                           f"a wrong first place was put right. Mean gain {np.mean(y - x):+.3f}."))
    return plots


def curve_plots(run, label):
    """The operating curve: MRR and CondR@1 against crop rate as the threshold on p(REGION | x) moves."""
    plots = []
    if not run.curve.get("policy"):
        run.notes.append("no operating curve: run evaluate.py with `always` among its methods, in the grammar")
        return []
    for measure in ("MRR", "CondR@1"):
        figure, axes = canvas(f"{measure} against crop rate", "queries with a positive that are cropped, %", measure)
        for name, colour, style in (("zeroshot", GREY, "--"), ("policy", BLUE, "-")):
            points = sorted((p["crop_rate"], p[measure]) for p in run.curve.get(name) or () if not np.isnan(p[measure]))
            if points:
                x, y = np.array(points).T
                axes.plot(x * 100, y, color=colour, linestyle=style, marker=".", markersize=4, label=label(name))
            if points and name in run.rows:
                axes.plot(run.study.mean(name, "crop") * 100, run.study.mean(name, measure), "o", color=colour,
                          markersize=9, markeredgecolor="white")
        if "best16" in run.rows and not np.isnan(best := run.study.mean("best16", measure)):
            axes.plot(run.study.mean("best16", "crop") * 100, best, "*", color=GREEN, markersize=14, label="best of 16")
        axes.set_xlim(-3, 103)
        if not axes.lines:  # no query has a positive in its pool
            continue
        plots.append(drawn(figure, f"curve_{measure.replace('@', '').lower()}",
                           f"Operating curve, {measure}: queries are cropped where p(REGION) is above a threshold that "
                           "moves from 1 (left) to 0 (right, always crop). Large dots: the policies' own choice, the "
                           f"learned one's at threshold {run.metrics.get('threshold', 0.5)}, the base's at 0.5. A "
                           "policy that knows when to crop rises steeply, then falls; a stretch without points joins "
                           "queries of equal p.", legend=True))
    return plots


def training_plots(run):
    """Curves of log.jsonl, smoothed over a window of a twelfth of the run with the raw steps behind.

    Step k of the log is drawn at k + 1, after which its validation came; at 0 stands the policy before training.
    """
    plots, window = [], max(1, len(run.log) // 12)
    for name, title, ylabel, lines, caption in PANELS:
        figure, axes = canvas(title, "step", ylabel)
        for key, text, colour in lines:
            points = [(row["step"] + 1, row[key]) for row in run.log if row.get(key) is not None]
            x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
            # Values of every step are smoothed; the few of a validation are shown as they are.
            if len(points) > len(run.log) // 2 and window > 1:
                axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.8)
                sums, counts = (np.convolve(v, np.ones(window), mode="same") for v in (y, np.ones(len(y))))
                axes.plot(x, sums / counts, color=colour, label=text)
            elif points:
                axes.plot(x, y, color=colour, marker="o", markersize=5, label=text)
        if ylabel == "share":  # the whole range: a line at 0 must look like one
            axes.set_ylim(-0.03, 1.03)
        if axes.lines:
            plots.append(drawn(figure, f"training_{name}", f"{title}. {caption}", legend=len(lines) > 1))
    return plots


# ------------------------------------------------------------------------------------------------- queries in pictures

def pick(run, count):
    """[(heading, [rows])] of queries to look at: successes of both decisions, then failures, `count` of each kind."""
    if "policy" not in run.rows:
        return []
    found, before = run.study.values["policy"], run.study.values["full"]["rank"]
    cropped, held, rank = found["crop"] == 1, ~np.isnan(found["CondR@1"]), found["rank"]
    kinds = [("A crop put the positive first", held & cropped & (rank == 1) & (before > 1))]
    if "always" in run.rows:
        lost = run.study.values["always"]["rank"] > 1
        kinds.append(("The full image was kept, and a crop would have lost the first place",
                      held & ~cropped & (before == 1) & lost))
    kinds += [("A crop did harm", held & cropped & (rank > before)),
              ("Still wrong", held & (rank > 1) & (rank <= before))]
    # Evenly spaced over the split, not the best ones: what is shown is what is typical.
    return [(f"{heading}: {int(group.sum())} of {int(held.sum())}", spread(np.flatnonzero(group), count))
            for heading, group in kinds]


def spread(rows, count):
    """At most `count` of `rows`, evenly spaced."""
    take = min(count, len(rows))
    return [int(rows[k * len(rows) // take]) for k in range(take)]


def places(run, i):
    """Pool places of query i: first before, first after, the positive that comes first after."""
    before, after = (np.array(run.rows[name][i]["scores"]) for name in ("full", "policy"))  # [K] each
    right = np.where(run.rows["full"][i]["labels"], after, -np.inf)  # [K]
    return tuple(int(found.argmax()) for found in (before, after, right))  # the first of equals: the pool's order


def title_of(data, i, k):
    """Title of candidate k of query i, or its place in the pool where the data are not at hand."""
    return f"candidate {k + 1}" if data is None else data.entity(int(data.pool[i, k]))["title"]


def candidate(data, i, k):
    return read_image(data.candidate_image_path(int(data.pool_image[i, k])))


def marked(image, box, colour=(255, 200, 0)):
    """A copy with the box drawn on it, a light line in a dark one: it shows on any picture."""
    shown = image.copy()
    width = max(2, max(image.size) // 90)
    x1, y1, x2, y2 = (round(v) for v in box)
    pen = ImageDraw.Draw(shown)
    pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline="black", width=width + max(1, width // 2))
    pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
    return shown


def cases(run, data, count):
    """Table 3 in pictures, of Case. A picture that cannot be read is named in its place and stops nothing."""
    return [safely(lambda i=i, group=group: case(run, data, i, group), group, data.queries[i].query_id)
            for group, chosen in pick(run, count) for i in chosen]


def safely(make, group, name):
    try:
        return make()
    except (FileNotFoundError, InputError) as error:
        return Case(group, name, str(error), [])


def case(run, data, i, group):
    """Query i: what was asked and chosen, what was scored, and who came first before and after."""
    row, full, always = run.rows["policy"][i], run.rows["full"][i], run.rows.get("always")
    image = data.open_image(i)
    true = run.rows["truth"][i]["box"] if run.rows.get("truth") else None  # not every query may have one
    framed = marked(image, true, "lime") if true else image
    target = " (green: true box)" if framed is not image else ""
    if row["decision"] == "REGION":
        views = [(f"query, box chosen{target}", marked(framed, row["box"])),
                 ("what was scored", crop(image, row["box"]))]
    else:
        views = [(f"query, scored as it is{target}", framed)]
        if always and always[i]["box"]:
            views.append((f"the crop it did not take: rank {run.study.values['always']['rank'][i]:.0f}",
                          crop(image, always[i]["box"])))
    first_before, first_after, positive = places(run, i)
    roles = {first_before: ["first before"]}  # of a place in the pool: one picture each, however many it plays
    roles.setdefault(first_after, []).append("after" if first_after == first_before else "first after")
    roles.setdefault(positive, ["best positive"])
    for k, words in roles.items():
        sign = "right" if row["labels"][k] else "wrong"
        score = " → ".join(dict.fromkeys(f"{found['scores'][k]:.3f}" for found in (full, row)))
        views.append((f"{' and '.join(words)} ({sign}): {title_of(data, i, k)}, {score}", candidate(data, i, k)))
    sure = "" if row.get("p_region") is None else f", p(REGION) {row['p_region']:.2f}"
    ranks = " → ".join(f"{run.study.values[name]['rank'][i]:.0f}" for name in ("full", "policy"))
    return Case(group, row["question"], f"{row['decision']}{sure}, rank {ranks} · {row['query_id']}", views)


def pools(run, data, count, negatives=4):
    """What the pools hold, of Case: a query, its positive, and the negatives that the full image ranks first."""
    seen = {i for _, chosen in pick(run, count) for i in chosen}  # in `cases`: nobody wants to see them twice
    held = [i for i in np.flatnonzero(~np.isnan(run.study.values["full"]["CondR@1"])) if i not in seen]
    return [safely(lambda i=i: pool(data, i, negatives), "", data.queries[i].query_id) for i in spread(held, count)]


def pool(data, i, negatives):
    found = scores(np.asarray(data.full[i], dtype=np.float32), data.candidates(i))  # [K] Eq. 4
    order = np.argsort(-found, kind="stable").tolist()  # ties in pool order
    chosen = [k for k in order if data.labels[i, k]][:1] + [k for k in order if not data.labels[i, k]][:negatives]
    views = [(f"{'positive' if data.labels[i, k] else 'negative'}, rank {order.index(k) + 1}: {title_of(data, i, k)}, "
              f"{found[k]:.3f}", candidate(data, i, k)) for k in chosen]
    query = data.queries[i]
    return Case("", query.question, query.query_id, [("query", data.open_image(i)), *views])


def data_uri(content):
    """PNG bytes, or a PIL image as a small JPEG, as an address that carries them: the page stays one file."""
    if isinstance(content, Image.Image):
        small, buffer = content.convert("RGB"), io.BytesIO()
        small.thumbnail((260, 260))
        small.save(buffer, format="jpeg", quality=82)
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
