"""What the world's categories look like: each a function of four shape numbers that gives polygons.

Polygons stand in [-1, 1] x [-1, 1], y down; mini/world.py paints them. A part is (polygon [points, 2], role): its role
says which of an entity's colours it gets.
"""

import math

import numpy as np


def oval(x, y, rx, ry, turn=0.0, points=20):
    """Polygon of an ellipse, [points, 2]; turn in radians."""
    t = np.linspace(0, 2 * np.pi, points, endpoint=False)
    px, py = rx * np.cos(t), ry * np.sin(t)
    return np.stack([x + px * math.cos(turn) - py * math.sin(turn), y + px * math.sin(turn) + py * math.cos(turn)], 1)


def rect(x1, y1, x2, y2):
    return np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])


def stroke(x1, y1, x2, y2, width=0.06):
    """A thick line as a polygon."""
    dx, dy = x2 - x1, y2 - y1
    n = np.array([-dy, dx]) / max(math.hypot(dx, dy), 1e-6) * width / 2
    return np.array([(x1, y1) + n, (x2, y2) + n, (x2, y2) - n, (x1, y1) - n])


def poly(*points):
    return np.array(points)


# A category's parts as (polygon, role), back to front, for four shape numbers in 0..1 (what each does is its name; a
# category that needs three ignores one). Of a species only "body" parts carry the pattern: limbs hide it.


def beetle(width, length, head, _):
    legs = [(stroke(0, y, x, y + 0.18, 0.08), "accent") for y in (-0.3, 0.05, 0.4) for x in (-0.75, 0.75)]
    return legs + [(oval(0, -0.62 - 0.08 * length, 0.2 + 0.12 * head, 0.2), "accent"),
                   (oval(0, 0.08, 0.4 + 0.2 * width, 0.6 + 0.2 * length), "body"),
                   (stroke(0, -0.5, 0, 0.7, 0.03), "line")]


def butterfly(upper_width, upper_height, lower_width, lower_height):
    w1, h1 = 0.4 + 0.12 * upper_width, 0.3 + 0.15 * upper_height
    w2, h2 = 0.26 + 0.12 * lower_width, 0.26 + 0.2 * lower_height
    upper = [(oval(s * 0.45, -0.3, w1, h1, s * 0.6), "body") for s in (-1, 1)]
    lower = [(oval(s * 0.35, 0.4, w2, h2, -s * 0.5), "body") for s in (-1, 1)]
    feelers = [(stroke(0, -0.5, x, -0.9, 0.04), "accent") for x in (-0.3, 0.3)]
    return upper + lower + [(oval(0, 0, 0.09, 0.62), "accent")] + feelers


def bird(tail, length, height, head):
    return [(poly((-0.35, 0.1), (-0.98, -0.15 + 0.5 * tail), (-0.9, 0.4 + 0.2 * tail)), "accent"),
            (stroke(-0.05, 0.4, -0.05, 0.9), "line"), (stroke(0.15, 0.4, 0.15, 0.9), "line"),
            (oval(0, 0.1, 0.55 + 0.1 * length, 0.36 + 0.12 * height, -0.3), "body"),
            (oval(0.48, -0.4, 0.22 + 0.08 * head, 0.22 + 0.08 * head), "body"),
            (poly((0.66, -0.48), (0.98, -0.36), (0.66, -0.28)), "accent"), (oval(0.54, -0.46, 0.05, 0.05), "line")]


def fish(tail, fins, length, height):
    return [(poly((-0.4, 0), (-0.98, -0.3 - 0.25 * tail), (-0.8, 0), (-0.98, 0.3 + 0.25 * tail)), "accent"),
            (poly((-0.2, -0.2), (0.1, -0.5 - 0.3 * fins), (0.4, -0.2)), "accent"),
            (poly((-0.1, 0.2), (0.05, 0.45 + 0.2 * fins), (0.3, 0.2)), "accent"),
            (oval(0.1, 0, 0.68 + 0.1 * length, 0.3 + 0.16 * height), "body"), (oval(0.52, -0.06, 0.06, 0.06), "line")]


def flower(petals, long, wide, heart):
    n = 5 + int(petals * 3.99)
    ring = [(oval(0.5 * math.cos(t), -0.3 + 0.5 * math.sin(t), 0.3 + 0.1 * long, 0.14 + 0.1 * wide, t), "body")
            for t in np.arange(n) * 2 * math.pi / n]
    r = 0.2 + 0.1 * heart
    return [(stroke(0, -0.2, 0, 1.0, 0.09), "stem"), *ring, (oval(0, -0.3, r, r), "accent")]


def mushroom(width, height, stem, foot):
    cap = oval(0, -0.15, 0.6 + 0.3 * width, 0.5 + 0.25 * height)
    cap[:, 1] = np.minimum(cap[:, 1], 0.02)         # flat below
    w, f = 0.14 + 0.14 * stem, 0.12 * foot
    return [(poly((-w, -0.1), (w, -0.1), (w + f, 0.9), (-w - f, 0.9)), "accent"), (cap, "body")]


def snail(shell, foot, head, stretch):
    r = 0.46 + 0.14 * shell
    horns = [(stroke(0.75, 0.5, 0.8 + dx, 0.05, 0.05), "accent") for dx in (0.0, 0.15)]
    return horns + [(oval(0.05, 0.68, 0.85, 0.16 + 0.08 * foot), "accent"),
                    (oval(0.72, 0.5, 0.16, 0.2 + 0.08 * head), "accent"),
                    (oval(-0.1, 0.0, r + 0.1 * stretch, r), "body"), (oval(-0.1, 0.0, 0.12, 0.12), "line")]


def turtle(feet, head, width, length):
    corners = ((-0.5, -0.45, 0.7), (0.5, -0.45, -0.7), (-0.5, 0.5, -0.7), (0.5, 0.5, 0.7))      # x, y, turn
    return [(oval(x, y, 0.2, 0.14 + 0.08 * feet, turn), "accent") for x, y, turn in corners] + [
        (oval(0, -0.78, 0.17 + 0.06 * head, 0.2), "accent"), (poly((-0.08, 0.6), (0.08, 0.6), (0, 0.98)), "accent"),
        (oval(0, 0, 0.5 + 0.16 * width, 0.58 + 0.1 * length), "body")]


# Buildings and their neighbours stand on y = 1, so that a scene can put them on its ground.


def tower(width, height, windows, _):
    w, top = 0.2 + 0.12 * width, -0.45 - 0.2 * height
    rows = np.linspace(top + 0.2, 0.7, 3 + int(3 * windows))
    return [(rect(-w, top, w, 1), "wall"), (rect(-w - 0.08, top - 0.05, w + 0.08, top + 0.08), "roof"),
            (poly((-w, top), (0, -0.98), (w, top)), "roof")] + [(rect(-0.05, y, 0.05, y + 0.14), "line") for y in rows]


def castle(wall, turrets, roofs, _):
    top = -0.1 - 0.3 * wall
    turret = top - 0.25 - 0.2 * turrets
    merlons = [(rect(x, top - 0.12, x + 0.11, top + 0.02), "wall") for x in np.arange(-0.55, 0.5, 0.22)]
    sides = [(rect(x - 0.15, turret, x + 0.15, 1), "wall") for x in (-0.7, 0.7)]
    caps = [(poly((x - 0.2, turret), (x, -0.75 - 0.2 * roofs), (x + 0.2, turret)), "roof") for x in (-0.7, 0.7)]
    gate = [(oval(0, 0.75, 0.16, 0.3), "line"), (rect(-0.16, 0.75, 0.16, 1), "line")]
    return [(rect(-0.6, top, 0.6, 1), "wall")] + merlons + sides + caps + gate


def bridge(arches, height, span, posts):
    n, deck = 2 + int(2.99 * arches), 0.1 - 0.2 * height
    holes = [(oval(x, 1.0, 0.75 / n, 0.72 - 0.1 * span), "hole") for x in (np.arange(n) + 0.5) * 2 / n - 1]
    pylons = [(rect(x - 0.07, deck - 0.35 - 0.25 * posts, x + 0.07, deck), "roof") for x in (-0.8, 0.8)]
    return [(rect(-1, deck, 1, 1), "wall")] + pylons + [(rect(-1, deck - 0.06, 1, deck + 0.06), "roof")] + holes


def temple(columns, height, gable, _):
    n, top = 4 + int(2.99 * columns), -0.15 - 0.2 * height
    row = [(rect(x - 0.07, top, x + 0.07, 0.85), "wall") for x in np.linspace(-0.72, 0.72, n)]
    return [(rect(-0.75, top, 0.75, 0.85), "line"), *row, (rect(-0.95, 0.82, 0.95, 1), "wall"),
            (rect(-0.88, top - 0.1, 0.88, top + 0.05), "wall"),
            (poly((-0.92, top - 0.1), (0, -0.65 - 0.3 * gable), (0.92, top - 0.1)), "roof")]


def windmill(width, foot, _, sails):
    w, f, turn = 0.2 + 0.1 * width, 0.2 * foot, sails * math.pi / 2
    angles = [turn + k * math.pi / 2 for k in range(4)]
    arms = [(stroke(0, -0.3, 0.65 * math.cos(t), -0.3 + 0.65 * math.sin(t), 0.13), "roof") for t in angles]
    return [(poly((-w, -0.35), (w, -0.35), (w + f, 1), (-w - f, 1)), "wall"), (oval(0, -0.38, w + 0.04, 0.2), "roof"),
            (rect(-0.08, 0.6, 0.08, 1), "line")] + arms


PARTS = {"beetle": beetle, "butterfly": butterfly, "bird": bird, "fish": fish, "flower": flower, "mushroom": mushroom,
         "snail": snail, "turtle": turtle,
         "tower": tower, "castle": castle, "bridge": bridge, "temple": temple, "windmill": windmill}


def neighbour_parts(kind):
    """A small structure beside a landmark, all in its one colour ("wall") with dark details."""
    return {
        "house": [(rect(-0.8, 0, 0.8, 1), "wall"), (poly((-1, 0), (0, -0.8), (1, 0)), "wall"),
                  (rect(-0.2, 0.4, 0.2, 1), "line")],
        "dome": [(rect(-0.7, 0.2, 0.7, 1), "wall"), (oval(0, 0.2, 0.8, 0.8), "wall"),
                 (stroke(0, -0.6, 0, -1, 0.1), "line")],
        "obelisk": [(poly((-0.3, 1), (-0.18, -0.7), (0, -1), (0.18, -0.7), (0.3, 1)), "wall"),
                    (rect(-0.5, 0.85, 0.5, 1), "line")],
        "tree": [(rect(-0.12, 0.3, 0.12, 1), "line"), (oval(0, -0.2, 0.75, 0.7), "wall")],
        "tank": [(rect(-0.6, -0.5, 0.6, 1), "wall"), (oval(0, -0.5, 0.6, 0.22), "line")],
        "pyramid": [(poly((-1, 1), (0, -0.7), (1, 1)), "wall"), (poly((0, -0.7), (0.25, 1), (1, 1)), "shade")],
        "arch": [(rect(-0.9, -0.6, 0.9, 1), "wall"), (oval(0, 0.5, 0.45, 0.7), "line"),
                 (rect(-0.45, 0.5, 0.45, 1), "line")],
        "mast": [(stroke(0, 1, 0, -1, 0.16), "line"), (poly((0.05, -1), (0.95, -0.65), (0.05, -0.3)), "wall"),
                 (rect(-0.4, 0.85, 0.4, 1), "wall")],
    }[kind]
