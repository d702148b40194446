"""Tables of the report: numbers as text in one form each, and a table as text, Markdown and LaTeX.

MRR, NDCG and recalls are fractions, rates (crop, help, hurt ...) are in per cent: a measure has one form, in whatever
table it stands.
"""

import html
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

FORMS = {  # measure: (times, digits); the rest are fractions with three digits
    **dict.fromkeys(("crop", "help", "hurt", "same", "bad"), (100, 1)),
    **dict.fromkeys(("iou", "containment", "judge", "encodes", "d_z"), (1, 2)), "steps": (1, 0)}
HEADS = {"same": "no change", "iou": "IoU", "bad": "bad text", "seconds": "s a query", "encodes": "encodes a query"}


@dataclass
class Table:
    """Cells are texts. The first column names the row and is set left, all others right, unless `wordy` says so."""
    name: str        # table1: also the file's name
    title: str
    head: list
    rows: list
    caption: str     # what to see
    wordy: bool = False


def form(measure):
    """(times, digits) of a measure's numbers: "CondR@1" is of the kind CondR, "crop >1" of the kind crop."""
    return FORMS.get(re.split("[@ ]", measure)[0], (1, 3))


def shown(value, measure="", sign=False):
    """A number for a cell, in its measure's form; a dash where it is not defined."""
    times, digits = form(measure)
    return "-" if value is None or not np.isfinite(value) else f"{value * times:{'+' if sign else ''}.{digits}f}"


def span(bounds, measure="", sign=False):
    """An interval for a cell: [low, high]."""
    return "-" if np.isnan(bounds[0]) else f"[{shown(bounds[0], measure, sign)}, {shown(bounds[1], measure, sign)}]"


def ranged(values, measure=""):
    """Mean and range of one number a run: 0.905 (0.900-0.918); a run without it is left out, and counted."""
    kept = np.array([value for value in values if not np.isnan(value)])
    if not kept.size:
        return "-"
    ends = f" ({shown(kept.min(), measure)}-{shown(kept.max(), measure)})" if len(kept) > 1 else ""
    lost = f", {len(values) - len(kept)} without" if len(kept) < len(values) else ""
    return shown(kept.mean(), measure) + ends + lost


def p_text(p):
    """A p value for a cell. Below 0.001 its digits depend on the number of flips more than on the data."""
    return "-" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def head(column):
    """What stands above a column: its measure with its unit, or what an interval is."""
    kind, *more = re.split("[@ ]", column, maxsplit=1)
    name = HEADS.get(kind, f"{kind}@{more[0]}" if "@" in column else kind)
    return "95 %" if column.startswith("95 ") else f"{name} %" if form(column)[0] == 100 else name


def plain(value):
    """Any text on one line, without what steers a terminal or cannot be written as UTF-8."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def as_text(table):
    """A table for the terminal: columns as wide as their cells."""
    lines = [table.head, *([plain(cell) for cell in line] for line in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.head))]
    drawn = ["  ".join(cell.ljust(w) if i == 0 or table.wordy else cell.rjust(w)
                       for i, (cell, w) in enumerate(zip(line, widths))).rstrip() for line in lines]
    return "\n".join([table.title, drawn[0], "-" * (sum(widths) + 2 * len(widths) - 2), *drawn[1:]])


def as_markdown(table):
    """A table in GitHub's Markdown, with its caption."""
    def line(cells):
        # What a question may hold must not end a cell or become a tag: Markdown passes HTML on.
        safe = (html.escape(plain(cell), quote=False).replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(safe) + " |"
    rule = "|" + "|".join(["---"] + ["---" if table.wordy else "---:"] * (len(table.head) - 1)) + "|"
    return "\n".join([f"**{table.title}.** {html.escape(table.caption, quote=False)}", "", line(table.head), rule,
                      *map(line, table.rows)])


def tex(text):
    """Text for LaTeX, every character that means something there escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
               "±": r"$\pm$", "|": "$|$", **{c: "\\" + c for c in "&%$#_{}"}}
    return "".join(special.get(c, c) for c in plain(text))


def as_latex(table):
    """A table environment (booktabs), to be \\input by a paper."""
    frame = pd.DataFrame([[tex(cell) for cell in line] for line in table.rows], columns=list(map(tex, table.head)))
    return frame.to_latex(index=False, escape=False, column_format="l" + "lr"[not table.wordy] * (len(table.head) - 1),
                          caption=f"{tex(table.title)}. {tex(table.caption)}", label=f"tab:{table.name}")
