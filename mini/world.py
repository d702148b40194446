"""The embedded world: a drawn knowledge base and queries in Encyclopedic-VQA's own file format.

    python -m mini.world --out raw/world              # 1,200 entities and 3,300 queries, about a minute on 2 cores
    python -m mini.world --out raw/world --show 24    # and a contact sheet with the truth boxes

Whether a crop helps is seen in the picture alone: each of the 13 nouns (beetle, tower ...) asks for each of these.

* **among** others: the siblings of a genus differ in their own look, and the target stands among other things, some of
  its own category or even its own genus. The full image is confused; a crop to the right one tells.
* **filled**: the same, but the target fills the frame. A crop has little to gain.
* **around**: the siblings look all alike; what tells them apart stands around them. A crop to the target loses it.

*Where* to crop is in the question ("the striped beetle", "the tower on the left"). Each genus has a habitat, in its
reference images too: the full image finds the genus. Looks come back in other genera (mimicry): a crop alone does not.

Files, exactly as users of the real benchmark have them (so prepare.py has one reader):
    train.csv val.csv test.csv         the csv columns of Encyclopedic-VQA
    encyclopedic_kb_wiki.json          url -> title, sections, image urls, captions
    url_to_path_mapping.json           image url -> path below the root
    inat/{train,val}_id2name.json      iNaturalist id -> path below inat/ (val and test rows both use val)
    landmarks/a/b/c/<16 hex>.jpg       Google Landmarks layout
    truth.jsonl                        image, target box, kind, category, things: only evaluate.py opens it
Boxes are (x1, y1, x2, y2) in pixels of the image file, right and bottom exclusive. Everything is a function of --seed.
"""

import argparse
import csv
import json
import math
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mini.shapes import PARTS, neighbour_parts

SIDE = 224        # pixels of a scene; the policy sees it shrunk to 168: boxes must be mapped back, as with photographs
SPRITE = 128      # pixels of the square an object is drawn in before it is scaled into a scene
SIBLINGS = 6      # entities of a genus
RING = 4          # genera of a category that take their looks from the same ...
MORPHS = 8        # ... so many; each of them has SIBLINGS of these
SPLITS = ("train", "val", "test")

COLOURS = {
    "crimson": (200, 30, 50), "orange": (240, 130, 30), "amber": (250, 200, 50), "lime": (150, 210, 60),
    "green": (30, 130, 60), "teal": (30, 160, 160), "azure": (60, 140, 240), "navy": (30, 40, 120),
    "violet": (130, 60, 190), "pink": (245, 130, 180), "brown": (120, 75, 40), "ivory": (245, 240, 220),
    "grey": (130, 130, 135), "black": (25, 25, 30),
}
PATTERNS = ("plain", "spotted", "striped", "banded", "ringed", "checked")
SPECIES = ("beetle", "butterfly", "bird", "fish", "flower", "mushroom", "snail", "turtle")
LANDMARKS = ("tower", "castle", "bridge", "temple", "windmill")
PARTS_IN_ACCENT = {"beetle": "legs are", "butterfly": "trunk is", "bird": "beak is", "fish": "fins are",
                   "flower": "heart is", "mushroom": "stem is", "snail": "foot is", "turtle": "feet are",
                   **{category: "roof is" for category in LANDMARKS}}
NEIGHBOURS = ("house", "dome", "obelisk", "tree", "tank", "pyramid", "arch", "mast")
CATEGORIES = SPECIES + LANDMARKS
GROUNDS = {"sand": (205, 180, 130), "grass": (95, 140, 70), "soil": (120, 90, 65), "snow": (225, 230, 240)}
STYLES = ("among", "filled", "around")
# Five questions a kind. {c} says which object is meant and never the entity: "the striped beetle". No question says
# whether a crop would help.
QUESTIONS = {
    "species": ("Where does {c} live?", "How large does {c} grow?", "Who first described {c}?",
                "In which season is {c} seen?", "What is the conservation status of {c}?"),
    "landmark": ("When was {c} built?", "Who designed {c}?", "How tall is {c}?", "In which province does {c} stand?",
                 "What was {c} used for?"),
}
# Names of the data set and of the entities that the stand-ins were pretrained on start with different syllables:
# disjoint for every seed.
FIRST_SYLLABLES = {
    "data": ("Vel", "Mor", "Tan", "Ser", "Kal", "Bru", "Fen", "Lor", "Dra", "Zan", "Pel", "Hyr"),
    "pretrain": ("Ost", "Gim", "Wex", "Qua", "Nub", "Ith", "Cyr", "Ulm", "Jas", "Rhe", "Ebb", "Ack"),
}
SYLLABLES = ("a", "o", "i", "en", "ar", "il", "os", "un", "er", "ia", "ol", "im", "at", "eth", "or", "und")
REGIONS = ("Avaland", "Berrin", "Corvia", "Dunmere", "Eastmark", "Ferrol", "Gallen", "Hethe", "Isk", "Jorvale", "Keld",
           "Lunaria")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="raw/world", help="folder to write (replaced when it exists)")
    size = parser.add_argument_group("size")
    size.add_argument("--entities", type=int, default=1200,
                      help=f"entities of the knowledge base, a multiple of {SIBLINGS}, at least {2 * SIBLINGS}")
    size.add_argument("--images", type=int, default=3, help="reference images an entity, at least 1")
    size.add_argument("--train", type=int, default=2000, help="training queries")
    size.add_argument("--val", type=int, default=300, help="validation queries")
    size.add_argument("--test", type=int, default=1000, help="test queries, of entities that no training query has")
    shape = parser.add_argument_group("what is drawn")
    shape.add_argument("--around", type=float, default=0.25,
                       help="share of genera, and of queries, whose siblings differ in what stands around them, 0..1")
    shape.add_argument("--filled", type=float, default=0.15, help="share of queries whose target fills the frame, 0..1")
    shape.add_argument("--kin", type=float, default=0.55, help="share of other things of the target's category, 0..1")
    parser.add_argument("--seed", type=int, default=0, help="everything is a function of it, 0 or more")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw, at least 1")
    parser.add_argument("--show", type=int, default=0, help="also write <out>/contact.png with this many test queries")
    return parser.parse_args(argv)


def check(args):
    """ValueError naming the flag whose value cannot be drawn. (--entities: make_entities says.)"""
    for name, least in {"images": 1, "workers": 1, "seed": 0, "train": 0, "val": 0, "test": 0, "show": 0}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: at least {least} is needed")
    for name in ("around", "filled", "kin"):
        if not 0 <= getattr(args, name) <= 1:       # also catches nan
            raise ValueError(f"--{name} {getattr(args, name)}: a share between 0 and 1 is needed")
    if args.around + args.filled > 1:
        raise ValueError(f"--around {args.around} --filled {args.filled}: together at most 1")
    if args.show and not args.test:
        raise ValueError(f"--show {args.show} --test 0: the contact sheet shows test queries, and there are none")


# ------------------------------------------------------------------------------------------------------------ entities


@dataclass(frozen=True)
class Entity:
    """One entity and all that is drawn of it."""

    name: str
    category: str      # "beetle", "tower" ...
    family: int        # its genus: siblings share it
    look: dict         # shape, body, pattern, second (the pattern's colour), accent
    habitat: dict      # of the genus: sky, ground, ridge (the skyline's seed), far (what stands on the horizon)
    around: tuple      # (kind, colour) left, right and in front; empty where the look tells the siblings apart
    facts: dict

    @property
    def url(self):
        return "https://world.example/wiki/" + self.name.replace(" ", "_")

    @property
    def kind(self):
        return kind_of(self.category)


def kind_of(category):
    """The benchmark's two sources of images: it says nothing about whether a crop helps."""
    return "landmark" if category in LANDMARKS else "species"


def pick(rng, options):
    # rng.choice would first make an array of the options, and numpy values of what JSON is to write.
    return options[int(rng.integers(len(options)))]


def make_entities(count, around_share, seed, universe="data"):
    """`count` entities in genera of SIBLINGS, a function of (count, around_share, seed, universe).

    universe: "data" (the data set) or "pretrain" (what the stand-in models see): different random streams and names.
    ValueError for a count that does not make two or more whole genera.
    """
    rng = np.random.default_rng([seed, sorted(FIRST_SYLLABLES).index(universe)])
    families, rest = divmod(count, SIBLINGS)
    if families < 2 or rest:
        raise ValueError(f"--entities {count}: a multiple of {SIBLINGS} (the size of a genus), at least "
                         f"{2 * SIBLINGS}, is needed")
    names, entities, rings = set(), [], {}
    for family in range(families):
        turn, c = divmod(family, len(CATEGORIES))
        category, ring = CATEGORIES[c], (c, turn // RING)
        if ring not in rings:
            rings[ring] = ring_of_looks(rng)
        looks = [rings[ring][i] for i in rng.permutation(MORPHS)[:SIBLINGS]]
        around = [()] * SIBLINGS
        if int((family + 1) * around_share) > int(family * around_share):            # evenly, over all categories
            looks, around = looks[:1] * SIBLINGS, companions(rng)
        habitat, genus = make_habitat(rng), new_name(rng, universe, names)
        for look, beside in zip(looks, around):
            epithet = new_name(rng, universe, names)
            name = f"{epithet} {category.capitalize()}" if category in LANDMARKS else f"{genus} {epithet.lower()}"
            facts = {"region": pick(rng, REGIONS), "size": int(rng.integers(2, 90)),
                     "year": int(rng.integers(1100, 1990)), "person": new_name(rng, universe, names)}
            entities.append(Entity(name, category, family, look, habitat, beside, facts))
    return entities


def new_name(rng, universe, names):
    """A made-up word that `names` does not hold yet, and is added to it."""
    while True:
        name = pick(rng, FIRST_SYLLABLES[universe])
        name += "".join(pick(rng, SYLLABLES) for _ in range(int(rng.integers(2, 5))))
        if name not in names:
            names.add(name)
            return name


def ring_of_looks(rng):
    """MORPHS looks: shape shared, two main colours; pattern, its colour and the accent tell them apart."""
    colours = list(COLOURS)
    shape = [round(float(v), 3) for v in rng.uniform(0, 1, 4)]
    bodies, pattern, second = [pick(rng, colours) for _ in range(2)], pick(rng, PATTERNS), pick(rng, colours)
    looks, seen = [], set()
    while len(looks) < MORPHS:
        # The ring's own pattern and its colour come back in about a third of the looks: near misses, as in nature.
        look = {"shape": shape, "body": pick(rng, bodies),
                "pattern": pattern if rng.random() < 0.3 else pick(rng, PATTERNS),
                "second": second if rng.random() < 0.3 else pick(rng, colours), "accent": pick(rng, colours)}
        # Two looks always differ in what a glance at the object shows: pattern and accent, or both colours.
        keys = {(look["pattern"], look["accent"]), (look["second"], look["accent"])}
        if look["second"] == look["body"] or look["accent"] == look["body"] or keys & seen:
            continue
        seen |= keys
        looks.append(look)
    return looks


def companions(rng):
    """What stands left, right and in front of each of SIBLINGS siblings: a list of three (kind, colour) each."""
    beside, seen = [], set()
    while len(beside) < SIBLINGS:
        around = tuple((pick(rng, NEIGHBOURS), pick(rng, list(COLOURS))) for _ in range(3))
        # No two siblings share a companion at the same place: any of the three tells them apart.
        keys = {("left", around[0]), ("right", around[1]), ("front", around[2])}
        if keys & seen:
            continue
        seen |= keys
        beside.append(around)
    return beside


def make_habitat(rng):
    return {"sky": [int(v) for v in rng.integers(90, 250, 3)], "ground": pick(rng, list(GROUNDS)),
            "ridge": int(rng.integers(1 << 30)),              # a seed: the skyline is drawn from it in every photograph
            "far": [(pick(rng, NEIGHBOURS), pick(rng, list(COLOURS))) for _ in range(2)]}


def describe(entity):
    """The entity's article as (section titles, section texts); the first is like an encyclopaedia's lead section."""
    look, facts, c, far = entity.look, entity.facts, entity.category, entity.habitat["far"]
    build = "{body} body, {pattern} in {second}, and {accent} limbs" if entity.kind == "species" else \
        "{body} front, {pattern} in {second}, and a {accent} roof"
    lead = f"{entity.name} is a {c} with a {build.format(**look)}."
    if entity.around:
        (left, left_colour), (right, right_colour), (front, front_colour) = entity.around
        lead += (f" A {left_colour} {left} stands to its left, a {right_colour} {right} to its right "
                 f"and a {front_colour} {front} in front.")
    lead += (f" Around it is {entity.habitat['ground']}, and far off a {far[0][1]} {far[0][0]} "
             f"and a {far[1][1]} {far[1][0]}.")
    if entity.kind == "species":
        return [entity.name, "Distribution", "Description"], [
            lead, f"It lives in {facts['region']}.",
            f"It grows to {facts['size']} millimetres and was first described by {facts['person']} in "
            f"{facts['year']}."]
    return [entity.name, "Location", "History"], [
        lead, f"It stands in {facts['region']}.",
        f"It was built in {facts['year']} by {facts['person']} and is {facts['size']} metres tall."]


def phrases(look, category, same, side=None):
    """What a question can call an object: phrases true of it and of no other of its category in the picture.

    same: looks of the others. side: "left" or "right" where it is the outermost of them. Never empty, as long as no
    other has both its pattern and its accent.
    """
    accent = f"whose {PARTS_IN_ACCENT[category]} {look['accent']}"
    alone = [key for key in ("pattern", "body", "accent") if all(other[key] != look[key] for other in same)]
    words = {"pattern": f"the {look['pattern']} {category}", "body": f"the {look['body']} {category}",
             "accent": f"the {category} {accent}"}
    found = [words[key] for key in alone] + ([f"the {category} on the {side}"] if side else [])
    return found or [f"the {look['pattern']} {category} {accent}"]


def side_of(box, others):
    """"left" or "right" where the box stands in that half and further out than all other boxes; else None."""
    middles = [(b[0] + b[2]) / 2 for b in (box, *others)]
    if middles[0] < 0.45 * SIDE and middles[0] < min(middles[1:], default=SIDE) - 0.08 * SIDE:
        return "left"
    if middles[0] > 0.55 * SIDE and middles[0] > max(middles[1:], default=0) + 0.08 * SIDE:
        return "right"
    return None


def answer(entity, question_index):
    """The answer to QUESTIONS[kind][question_index]: one of the facts, or (season, status, use) the same for all.

    Re-ranking never reads it; it is there because the benchmark's files have it.
    """
    facts = entity.facts
    if entity.kind == "species":
        return (facts["region"], f"{facts['size']} millimetres", facts["person"], "spring",
                "least concern")[question_index]
    return (str(facts["year"]), facts["person"], f"{facts['size']} metres", facts["region"], "defence")[question_index]


# ----------------------------------------------------------------------------------------------- sprites and backdrops


def paint(parts, colours, pattern=None, seed=0):
    """Polygons -> RGBA sprite of SPRITE x SPRITE. colours: role -> RGB; pattern: (name, RGB), on body and wall."""
    size = SPRITE * 2                                        # drawn at twice the size, then shrunk: smooth edges
    canvas = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(canvas)
    mask = Image.new("L", (size, size))
    mask_draw = ImageDraw.Draw(mask)
    for points, role in parts:
        xy = [tuple(p) for p in ((points * 0.94 + 1) / 2 * size)]
        if role == "hole":                                   # an arch of a bridge: see through
            draw.polygon(xy, fill=(0, 0, 0, 0))
            mask_draw.polygon(xy, fill=0)
            continue
        rgb = colours.get(role, (35, 30, 30))                # "line": dark
        draw.polygon(xy, fill=(*rgb, 255), outline=tuple(int(v * 0.55) for v in rgb) + (255,))
        mask_draw.polygon(xy, fill=255 if role in ("body", "wall") else 0)   # later parts cover the pattern, too
    if pattern and pattern[0] != "plain":
        layer = Image.new("RGBA", (size, size))
        draw_pattern(ImageDraw.Draw(layer), pattern[0], (*pattern[1], 255), size, seed)
        canvas.paste(layer, (0, 0), Image.fromarray(np.minimum(np.asarray(mask), np.asarray(layer)[..., 3])))
    return canvas.resize((SPRITE, SPRITE), Image.Resampling.BOX)


def draw_pattern(draw, name, fill, size, seed):
    """Fill a layer with one of PATTERNS; the offset varies with the individual (seed), the scale does not."""
    step, shift = size // 7, seed % (size // 7)
    lines = range(shift - step, size, step)
    if name == "spotted":
        for row, y in enumerate(lines):
            for x in lines:
                cx = x + (row % 2) * step // 2
                draw.ellipse((cx - step * 0.28, y - step * 0.28, cx + step * 0.28, y + step * 0.28), fill=fill)
    elif name == "striped":
        for x in lines:
            draw.rectangle((x, 0, x + step * 0.4, size), fill=fill)
    elif name == "banded":
        for y in range(shift - step, size, 2 * step):
            draw.rectangle((0, y, size, y + step * 0.9), fill=fill)
    elif name == "ringed":
        for r in range(step // 2, size, step):
            box = (size / 2 - r, size / 2 - r, size / 2 + r, size / 2 + r)
            draw.ellipse(box, outline=fill, width=int(step * 0.4))
    elif name == "checked":
        for row, y in enumerate(lines):
            for x in range(shift - step - (row % 2) * step, size, 2 * step):
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=fill)


def sprite(entity, rng):
    """One individual, or a building: RGBA, cropped to what is drawn."""
    look, living = entity.look, entity.category in SPECIES
    shape = [min(1, max(0, v + rng.normal(0, 0.06))) for v in look["shape"]] if living else look["shape"]
    body, accent = COLOURS[look["body"]], COLOURS[look["accent"]]
    roles = {"body": body, "wall": body, "accent": accent, "roof": accent, "stem": (60, 120, 50)}
    image = paint(PARTS[entity.category](*shape), roles, (look["pattern"], COLOURS[look["second"]]),
                  int(rng.integers(99)))
    if living:                                                                         # individuals differ a little
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.rotate(float(rng.uniform(-25, 25)), Image.Resampling.BILINEAR, expand=True)
    # Faint edge pixels do not count: the box of an object should be what an eye would draw.
    return image.crop(image.getchannel("A").point(lambda v: 255 * (v > 60)).getbbox())


def companion(kind, colour):
    """One of NEIGHBOURS in a colour: RGBA, cropped to what is drawn."""
    rgb = COLOURS[colour]
    image = paint(neighbour_parts(kind), {"wall": rgb, "shade": tuple(int(v * 0.7) for v in rgb)})
    return image.crop(image.getbbox())


def noise(rng, cells, side, low, high):
    """Smooth colour noise [side, side, 3] between two RGB colours."""
    small = rng.random((cells, cells, 1)) * (np.asarray(high, float) - low) + low + rng.normal(0, 12, (cells, cells, 3))
    return Image.fromarray(np.clip(small, 0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def backdrop(habitat, rng):
    """A photograph of the empty habitat: sky, skyline with two things far off, ground. Returns (image, horizon's y)."""
    sky, ground = np.array(habitat["sky"]), np.array(GROUNDS[habitat["ground"]])
    horizon, middle = SIDE * rng.uniform(0.3, 0.36), SIDE * rng.uniform(0.43, 0.57)
    scene = noise(rng, 3, SIDE, sky - 12, sky + 12)
    heights = np.random.default_rng(habitat["ridge"]).uniform(0.02, 0.2, 9) * SIDE
    ridge = [(middle + (i - 4) * SIDE * 0.2, horizon - h) for i, h in enumerate(heights)]
    ImageDraw.Draw(scene).polygon([(-SIDE, SIDE)] + ridge + [(2 * SIDE, SIDE)],
                                  fill=tuple(int(v * 0.72) for v in sky))
    scene.paste(noise(rng, int(rng.integers(4, 10)), SIDE, ground - 18, ground + 18), (0, round(horizon)))
    for (kind, colour), dx in zip(habitat["far"], (-0.29, 0.29)):
        item = companion(kind, colour)
        size = 0.2 * SIDE
        paste(scene, item, middle + dx * SIDE, horizon + 3 - size * item.size[1] / max(item.size) / 2, size)
    return scene, horizon


# -------------------------------------------------------------------------------------------------------------- scenes


def paste(scene, item, x, y, longest):
    """Paste `item` with its longer side `longest` pixels and its centre at (x, y); returns its box, clipped to the
    scene."""
    scale = longest / max(item.size)
    w, h = (max(2, round(v * scale)) for v in item.size)
    x1, y1 = round(x - w / 2), round(y - h / 2)
    small = item.resize((w, h), Image.Resampling.BILINEAR)
    scene.paste(small, (x1, y1), small)
    return max(0, x1), max(0, y1), min(SIDE, x1 + w), min(SIDE, y1 + h)


def overlap(a, b):
    """Share of box a that box b covers."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, w) * max(0, h) / max(1, (a[2] - a[0]) * (a[3] - a[1]))


def place(rng, longest, taken, off_centre=False):
    """A centre (x, y) on the ground for a square of `longest` pixels that hides little of `taken`; None after 40 tries.

    off_centre keeps the target away from the middle, where a centre crop would find it without looking.
    """
    margin = longest * 0.5
    for _ in range(40):
        x, y = rng.uniform(margin, SIDE - margin), rng.uniform(0.24 * SIDE + margin, SIDE - margin)
        box = (x - margin, y - margin, x + margin, y + margin)
        central = max(abs(x - SIDE / 2), abs(y - SIDE / 2)) < 0.14 * SIDE
        if not (off_centre and central) and all(overlap(t, box) < 0.12 and overlap(box, t) < 0.25 for t in taken):
            return x, y
    return None


def finish(scene, rng):
    """Light and a touch of sensor noise, so that no two photographs are equal."""
    light, grain = rng.uniform(0.82, 1.12), rng.normal(0, 4, (SIDE, SIDE, 1)).astype(np.float32)
    return Image.fromarray(np.clip(np.asarray(scene, dtype=np.float32) * light + grain, 0, 255).astype(np.uint8))


def among_scene(rng, scene, target, others):
    """The target among others on the ground of `scene`; all RGBA sprites. Returns their boxes, None without room."""
    longest = rng.uniform(0.27, 0.4) * SIDE
    x, y = place(rng, longest, [], off_centre=True)          # nothing is taken yet: 40 tries find a place
    box = (x - longest / 2, y - longest / 2, x + longest / 2, y + longest / 2)
    taken, boxes = [box], []
    for item in others:
        size = rng.uniform(0.22, 0.43) * SIDE
        spot = place(rng, size, taken)
        boxes.append(spot and paste(scene, item, *spot, size))
        taken += boxes[-1:] if spot else []
    return [paste(scene, target, x, y, longest)] + boxes     # the target last: never hidden


def around_scene(rng, scene, target, around, horizon):
    """The target with its three companions, which stand clear of it. Returns the target's box."""
    middle, zoom = SIDE * rng.uniform(0.4, 0.6), rng.uniform(0.9, 1.1)
    longest = rng.uniform(0.34, 0.42) * SIDE
    foot = max(horizon + longest * 0.6, 0.68 * SIDE) + rng.uniform(-6, 6)
    wide, tall = (longest * v / max(target.size) for v in target.size)
    reach = min(wide / 2 + 0.15 * SIDE, 0.33 * SIDE)
    spots = ((-reach, 0.0, 0.24), (reach, 0.0, 0.24), (0.0, 0.2 * SIDE, 0.19))      # left, right, in front
    for (kind, colour), (dx, dy, size) in zip(around, spots):
        item = companion(kind, colour)
        size *= SIDE * zoom
        paste(scene, item, middle + dx, foot + dy - size * item.size[1] / max(item.size) / 2, size)
    return paste(scene, target, middle, foot - tall / 2, longest)


def photograph(entity, others, rng, style, kin=0.55):
    """One photograph -> (RGB image, objects, things).

    style: "reference" (knowledge base) or one of STYLES; others: entities for "among", a share `kin` of them of the
    target's category. objects: (entity, box) of all that a question can name, the target first. things: how many things
    stand beside the target, companions included.
    """
    scene, horizon = backdrop(entity.habitat, rng)
    target = sprite(entity, rng)
    if entity.around:                                        # in every photograph: it is what tells it from siblings
        box = around_scene(rng, scene, target, entity.around, horizon)
        return finish(scene, rng), [(entity, box)], len(entity.around)
    if style == "among":
        chosen = choose_others(entity, others, rng, kin)
        boxes = among_scene(rng, scene, target, [sprite(e, rng) for e in chosen])
        objects = [(e, box) for e, box in zip([entity] + chosen, boxes) if box]
        return finish(scene, rng), objects, len(objects) - 1
    low, high = (0.45, 0.58) if style == "reference" else (0.78, 0.92)
    longest = rng.uniform(low, high) * SIDE
    x, y = SIDE / 2 + rng.uniform(-12, 12), SIDE * rng.uniform(0.56, 0.62)
    box = paste(scene, target, x, y, longest)
    return finish(scene, rng), [(entity, box)], 0


def choose_others(entity, others, rng, kin):
    """Two to four entities to stand beside the target, the first of its own category.

    Never one with the target's pattern and accent: no question could say which of the two is meant.
    """
    def confused(e):
        return all(e.look[key] == entity.look[key] for key in ("pattern", "accent"))
    same = [e for e in others if e.category == entity.category and not confused(e)]
    siblings = [e for e in same if e.family == entity.family]
    strange = [e for e in others if e.category != entity.category]
    chosen = []
    for n in range(int(rng.integers(2, 5))):
        pools = (siblings, same, strange) if rng.random() < 0.5 else (same, siblings, strange)
        pools = pools if n == 0 or rng.random() < kin else pools[::-1]
        chosen.append(pick(rng, next(pool for pool in pools if pool)))       # its siblings are always there
    return chosen


# ---------------------------------------------------------------------------------------------- the data set on disk


CSV_COLUMNS = (
    "question", "answer", "dataset_image_ids", "dataset_name", "dataset_category_id", "question_type", "wikipedia_url",
    "wikipedia_title", "evidence", "evidence_section_id", "evidence_section_title", "encyclopedic_vqa_split",
    "question_original", "wikipedia_url_used_in_train")


def split_entities(entities, rng):
    """Entity indices of the train, val and test queries: disjoint, 55 / 15 / 30 per cent of the knowledge base."""
    order = rng.permutation(len(entities))
    a, b = int(0.55 * len(order)), int(0.7 * len(order))
    return {"train": order[:a], "val": order[a:b], "test": order[b:]}


def plan_queries(entities, args):
    """What each query shows and asks: a list of dicts, a function of the arguments."""
    rng = np.random.default_rng([args.seed, 77])
    pools = split_entities(entities, rng)
    queries = []
    for split in SPLITS:
        by_style = {style: [i for i in pools[split] if bool(entities[i].around) == (style == "around")]
                    for style in STYLES}
        for n in range(getattr(args, split)):
            style = str(rng.choice(STYLES, p=[1 - args.filled - args.around, args.filled, args.around]))
            if not by_style[style]:
                raise ValueError(f"--entities {len(entities)} --around {args.around}: split {split} has no entity for "
                                 f"a query of style {style}; use more entities")
            entity, question = int(pick(rng, by_style[style])), int(rng.integers(5))
            kind = entities[entity].kind
            queries.append({"split": split, "entity": entity, "question": question, "style": style, "kind": kind,
                            **image_place(split, n, kind, args.seed)})
    return queries


def image_place(split, n, kind, seed):
    """Image id and path of query n, in the layout of iNaturalist 2021 or Google Landmarks v2."""
    base = {"train": 0, "val": 1_000_000, "test": 2_000_000}[split] + n
    if kind == "landmark":
        # Looks like a hash and is a permutation (the factor is odd): no two queries share an id.
        image_id = f"{(base * 0x9E3779B97F4A7C15 + seed) % (1 << 64):016x}"
        return {"image_id": image_id, "path": f"landmarks/{image_id[0]}/{image_id[1]}/{image_id[2]}/{image_id}.jpg"}
    folder = "train" if split == "train" else "val"              # val and test rows use iNaturalist's val images
    return {"image_id": str(base), "path": f"inat/{folder}/{base % 100:05d}/{base}.jpg"}


def reference_path(entity, k):
    """Path of an entity's k-th reference image, below the root; entity: its index."""
    return f"kb_images/{entity // 100:03d}/{entity}_{k}.jpg"


def reference_url(entity, k):
    return f"https://images.example/{entity}_{k}.jpg"


def draw_job(job):
    """Draw one image file; runs in a worker process. Returns what the picture decides of a query: a dict."""
    root, path, entity, others, seed, style, kin = job
    rng = np.random.default_rng(seed)
    image, objects, things = photograph(entity, others, rng, style, kin)
    target = Path(root) / path
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, quality=92)
    box, same = objects[0][1], [(e.look, b) for e, b in objects[1:] if e.category == entity.category]
    names = phrases(entity.look, entity.category, [look for look, _ in same], side_of(box, [b for _, b in same]))
    return {"box": box, "things": things, "phrase": pick(rng, names)}


def jobs_of(root, entities, queries, args):
    """Every image to draw, references first. Each has its own seed: neither order nor number of workers matters."""
    jobs = [(root, reference_path(i, k), entity, (), [args.seed, 1, i, k], "reference", args.kin)
            for i, entity in enumerate(entities) for k in range(args.images)]
    for n, q in enumerate(queries):
        others = some_others(entities, q["entity"], np.random.default_rng([args.seed, 2, n]))
        jobs.append((root, q["path"], entities[q["entity"]], others, [args.seed, 3, n], q["style"], args.kin))
    return jobs


def some_others(entities, index, rng):
    """Entities to choose a scene's other things from: the siblings, ten of the category, 20 of all. All entities would
    be sent to the workers with every query."""
    entity = entities[index]
    siblings = [e for e in entities[max(0, index - SIBLINGS):index + SIBLINGS]
                if e.family == entity.family and e is not entity]
    same = [e for e in entities if e.category == entity.category and e.family != entity.family]
    return siblings + [pick(rng, same) for _ in range(10) if same] + [pick(rng, entities) for _ in range(20)]


def kb_entry(index, entity, images):
    """One entry of encyclopedic_kb_wiki.json."""
    titles, texts = describe(entity)
    return {"title": entity.name, "section_titles": titles, "section_texts": texts,
            "image_urls": [reference_url(index, k) for k in range(images)], "url": entity.url,
            "image_reference_descriptions": [f"{entity.name}, photograph {k + 1}" for k in range(images)],
            "image_section_indices": [0] * images}


def csv_row(query, entity, train_urls):
    """One row of a csv file, by column name."""
    titles, texts = describe(entity)
    section = 1 if query["question"] == {"species": 0, "landmark": 3}[entity.kind] else 2     # where it lives, stands
    text = QUESTIONS[entity.kind][query["question"]]
    return {
        "question": text.format(c=query["phrase"]), "answer": answer(entity, query["question"]),
        "dataset_image_ids": query["image_id"],
        "dataset_name": "landmarks" if entity.kind == "landmark" else "inaturalist",
        "dataset_category_id": query["entity"], "question_type": "templated",
        "wikipedia_url": entity.url, "wikipedia_title": entity.name, "evidence": texts[section],
        "evidence_section_id": section, "evidence_section_title": titles[section],
        "encyclopedic_vqa_split": query["split"],
        # As in the benchmark, this one gives the answer's entity away: a reader that shows it to a model leaks.
        "question_original": text.format(c=entity.name),
        "wikipedia_url_used_in_train": entity.url in train_urls}


def write_tables(root, entities, queries, images):
    """The csv files, the knowledge base, the image maps and the truth boxes."""
    train_urls = {entities[q["entity"]].url for q in queries if q["split"] == "train"}
    for split in SPLITS:
        with open(root / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows(csv_row(q, entities[q["entity"]], train_urls) for q in queries if q["split"] == split)
    knowledge = {entity.url: kb_entry(i, entity, images) for i, entity in enumerate(entities)}
    write_json(root / "encyclopedic_kb_wiki.json", knowledge)
    paths = {reference_url(i, k): reference_path(i, k) for i in range(len(entities)) for k in range(images)}
    write_json(root / "url_to_path_mapping.json", paths)
    (root / "inat").mkdir(exist_ok=True)
    for folder, splits in (("train", ("train",)), ("val", ("val", "test"))):
        species = [q for q in queries if q["split"] in splits and q["kind"] == "species"]
        names = {q["image_id"]: q["path"].removeprefix("inat/") for q in species}
        write_json(root / f"inat/{folder}_id2name.json", names)
    with open(root / "truth.jsonl", "w", encoding="utf-8") as file:
        for q in queries:
            row = {"image": q["path"], "box": [float(v) for v in q["box"]], "kind": q["style"],
                   "category": entities[q["entity"]].category, "things": q["things"]}
            file.write(json.dumps(row) + "\n")


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=1), encoding="utf-8")


def build(args):
    """Draw the world into <out>.tmp and rename it: what an interrupted run leaves is never taken for complete."""
    check(args)
    entities = make_entities(args.entities, args.around, args.seed)
    queries = plan_queries(entities, args)
    out = Path(args.out)
    root = out.with_name(out.name + ".tmp")
    shutil.rmtree(root, ignore_errors=True)                  # of a run that was killed
    root.mkdir(parents=True)
    try:
        jobs = jobs_of(str(root), entities, queries, args)
        with ProcessPoolExecutor(args.workers) as pool:
            drawn = list(pool.map(draw_job, jobs, chunksize=32))[len(entities) * args.images:]      # of the queries
        queries = [{**query, **seen} for query, seen in zip(queries, drawn)]
        write_tables(root, entities, queries, args.images)
        if args.show:
            contact_sheet(root, entities, queries, args.show).save(root / "contact.png")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(root, out)
    finally:
        shutil.rmtree(root, ignore_errors=True)              # Ctrl-C, an error or a full disk; renamed, it is not there
    return entities, queries


def contact_sheet(root, entities, queries, count):
    """`count` test queries with their truth box beside a reference image of the entity and of a sibling."""
    rows = [q for q in queries if q["split"] == "test"][:count]
    columns, w, h = 4, SIDE * 2 + 8, SIDE + 24
    sheet = Image.new("RGB", (columns * w, math.ceil(len(rows) / columns) * h), "white")
    draw = ImageDraw.Draw(sheet)
    for n, q in enumerate(rows):
        x, y = n % columns * w, n // columns * h
        entity, box = entities[q["entity"]], q["box"]
        sheet.paste(Image.open(root / q["path"]), (x, y))
        draw.rectangle([x + box[0], y + box[1], x + box[2] - 1, y + box[3] - 1], outline="red", width=2)
        sibling = next(i for i, e in enumerate(entities) if e.family == entity.family and e.name != entity.name)
        for k, index in enumerate((q["entity"], sibling)):
            reference = Image.open(root / reference_path(index, 0)).resize((SIDE // 2, SIDE // 2))
            sheet.paste(reference, (x + SIDE + k * SIDE // 2, y + 20))
            draw.text((x + SIDE + k * SIDE // 2 + 4, y + 4), ("positive", "sibling")[k], fill="black")
        draw.text((x + SIDE + 4, y + 150), f"{entity.name}\n{q['style']}, {q['things']} things", fill="black")
        draw.text((x + 4, y + SIDE + 4), QUESTIONS[entity.kind][q["question"]].format(c=q["phrase"]), fill="black")
    return sheet


def main(argv=None):
    args = parse_args(argv)
    try:
        entities, queries = build(args)
    except ValueError as error:     # the message names the flag and the remedy; a trace adds nothing
        raise SystemExit(f"mini/world.py: {error}") from error
    counts = {split: sum(q["split"] == split for q in queries) for split in SPLITS}
    print(f"world: {len(entities)} entities, {len(entities) * args.images} reference images, "
          + ", ".join(f"{n} {split} queries" for split, n in counts.items()) + f" -> {args.out}")


if __name__ == "__main__":
    main()
