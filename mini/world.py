"""The embedded world: a drawn knowledge base and queries in Encyclopedic-VQA's own file format.

    python -m mini.world --out raw/world              # 1,200 entities and 3,300 queries, under a minute on 2 cores
    python -m mini.world --out raw/world --show 24    # and a contact sheet with the truth boxes

Two kinds of category, because knowing *when* to crop must be worth something:

* **species-like** (beetle, bird, flower ...): identity lies in the object. Siblings of a genus share shape, main colour
  and often the pattern. Most scenes are cluttered with objects of other categories: the full image is confused, a crop
  to the target is not.
* **landmark-like** (tower, castle, bridge ...): the siblings of a family share the very same building, sky and ground;
  what tells them apart stands *around* the building. Cropping to the building loses it: the full image is right.

Files, exactly as users of the real benchmark have them (so prepare.py has one reader):
    train.csv val.csv test.csv         the csv columns of Encyclopedic-VQA
    encyclopedic_kb_wiki.json          url -> title, sections, image urls, captions
    url_to_path_mapping.json           image url -> path below the root
    inat/{train,val}_id2name.json      iNaturalist id -> path below inat/ (val and test rows both use val)
    landmarks/a/b/c/<16 hex>.jpg       Google Landmarks layout
    truth.jsonl                        image, target box, kind, category: only evaluate.py opens it
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
SIBLINGS = 6      # entities of a genus / of a landmark family
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
NEIGHBOURS = ("house", "dome", "obelisk", "tree", "tank", "pyramid", "arch", "mast")
# Five questions a kind. They name the category and never the entity; no question says whether a crop would help.
QUESTIONS = {
    "species": ("Where does this {c} live?", "How large does this {c} grow?", "Who first described this {c}?",
                "In which season is this {c} seen?", "What is the conservation status of this {c}?"),
    "landmark": ("When was this {c} built?", "Who designed this {c}?", "How tall is this {c}?",
                 "In which province does this {c} stand?", "What was this {c} used for?"),
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
    shape.add_argument("--landmarks", type=float, default=0.2, help="share of landmark-like entities and queries, 0..1")
    shape.add_argument("--filled", type=float, default=0.08,
                       help="share of species queries whose target fills the frame, 0..1")
    parser.add_argument("--seed", type=int, default=0, help="everything is a function of it, 0 or more")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw, at least 1")
    parser.add_argument("--show", type=int, default=0, help="also write <out>/contact.png with this many test queries")
    return parser.parse_args(argv)


def check(args):
    """ValueError naming the flag whose value cannot be drawn. (--entities: make_entities says.)"""
    for name, least in {"images": 1, "workers": 1, "seed": 0, "train": 0, "val": 0, "test": 0, "show": 0}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: at least {least} is needed")
    for name in ("landmarks", "filled"):
        if not 0 <= getattr(args, name) <= 1:       # also catches nan
            raise ValueError(f"--{name} {getattr(args, name)}: a share between 0 and 1 is needed")
    if args.show and not args.test:
        raise ValueError(f"--show {args.show} --test 0: the contact sheet shows test queries, and there are none")


# ------------------------------------------------------------------------------------------------------------ entities


@dataclass(frozen=True)
class Entity:
    """One entity. `look` holds all that is drawn: a species' own appearance, a landmark's building and surroundings."""

    name: str
    kind: str          # "species" | "landmark"
    category: str      # "beetle", "tower" ...
    family: int        # siblings share it
    look: dict
    facts: dict

    @property
    def url(self):
        return "https://world.example/wiki/" + self.name.replace(" ", "_")


def pick(rng, options):
    # rng.choice would first make an array of the options, and numpy values of what JSON is to write.
    return options[int(rng.integers(len(options)))]


def make_entities(count, landmark_share, seed, universe="data"):
    """`count` entities in families of SIBLINGS, a function of (count, landmark_share, seed, universe).

    universe: "data" (the data set) or "pretrain" (what the stand-in models see): different random streams and names.
    ValueError for a count that does not make two or more whole families.
    """
    rng = np.random.default_rng([seed, sorted(FIRST_SYLLABLES).index(universe)])
    families, rest = divmod(count, SIBLINGS)
    if families < 2 or rest:
        raise ValueError(f"--entities {count}: a multiple of {SIBLINGS} (the size of a family), at least "
                         f"{2 * SIBLINGS}, is needed")
    names, entities = set(), []
    for family in range(families):
        kind = "landmark" if family < round(families * landmark_share) else "species"
        categories, looks_of = (LANDMARKS, landmark_family) if kind == "landmark" else (SPECIES, species_genus)
        category, looks = categories[family % len(categories)], looks_of(rng)
        genus = new_name(rng, universe, names)
        for look in looks:
            epithet = new_name(rng, universe, names)
            name = f"{epithet} {category.capitalize()}" if kind == "landmark" else f"{genus} {epithet.lower()}"
            facts = {"region": pick(rng, REGIONS), "size": int(rng.integers(2, 90)),
                     "year": int(rng.integers(1100, 1990)), "person": new_name(rng, universe, names)}
            entities.append(Entity(name, kind, category, family, look, facts))
    return entities


def new_name(rng, universe, names):
    """A made-up word that `names` does not hold yet, and is added to it."""
    while True:
        name = pick(rng, FIRST_SYLLABLES[universe])
        name += "".join(pick(rng, SYLLABLES) for _ in range(int(rng.integers(2, 5))))
        if name not in names:
            names.add(name)
            return name


def species_genus(rng):
    """The looks of one genus: shape and main colour shared; pattern, its colour and the accent tell siblings apart."""
    colours = list(COLOURS)
    shape = [round(float(v), 3) for v in rng.uniform(0, 1, 4)]
    body, pattern, second = pick(rng, colours), pick(rng, PATTERNS), pick(rng, colours)
    looks, seen = [], set()
    while len(looks) < SIBLINGS:
        # The genus' own pattern and its colour come back in about a third of the siblings: near misses, as in nature.
        look = {"shape": shape, "body": body, "pattern": pattern if rng.random() < 0.3 else pick(rng, PATTERNS),
                "second": second if rng.random() < 0.3 else pick(rng, colours), "accent": pick(rng, colours)}
        # Two siblings always differ in what a glance at the object shows: pattern and accent, or both colours.
        keys = {(look["pattern"], look["accent"]), (look["second"], look["accent"])}
        if look["second"] == body or look["accent"] == body or keys & seen:
            continue
        seen |= keys
        looks.append(look)
    return looks


def landmark_family(rng):
    """The looks of one family: the same building, sky and ground; the neighbours left, right and in front differ."""
    colours = list(COLOURS)
    shared = {"shape": [round(float(v), 3) for v in rng.uniform(0, 1, 4)],
              "wall": pick(rng, colours), "roof": pick(rng, colours),
              "sky": [int(v) for v in rng.integers(120, 250, 3)], "ground": [int(v) for v in rng.integers(40, 190, 3)],
              "ridge": int(rng.integers(1 << 30))}      # a seed: the skyline is drawn from it in every photograph
    looks, seen = [], set()
    while len(looks) < SIBLINGS:
        around = [(pick(rng, NEIGHBOURS), pick(rng, colours)) for _ in range(3)]     # left, right, in front
        # No two siblings share a neighbour at the same place: any of the three tells them apart, two may be hidden.
        keys = {("left", around[0]), ("right", around[1]), ("front", around[2])}
        if keys & seen:
            continue
        seen |= keys
        looks.append({**shared, "around": around})
    return looks


def describe(entity):
    """The entity's article as (section titles, section texts); the first is like an encyclopaedia's lead section."""
    look, facts, c = entity.look, entity.facts, entity.category
    if entity.kind == "species":
        lead = (f"{entity.name} is a {c} with a {look['body']} body, {look['pattern']} in {look['second']}, "
                f"and {look['accent']} limbs.")
        where = f"It lives in {facts['region']}."
        more = (f"It grows to {facts['size']} millimetres and was first described by "
                f"{facts['person']} in {facts['year']}.")
        return [entity.name, "Distribution", "Description"], [lead, where, more]
    (left, left_colour), (right, right_colour), (front, front_colour) = look["around"]
    lead = (f"{entity.name} is a {c} of {look['wall']} stone with a {look['roof']} roof. "
            f"A {left_colour} {left} stands to its left, a {right_colour} {right} to its right "
            f"and a {front_colour} {front} in front.")
    where = f"It stands in {facts['region']}."
    more = f"It was built in {facts['year']} by {facts['person']} and is {facts['size']} metres tall."
    return [entity.name, "Location", "History"], [lead, where, more]


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
    """Polygons -> RGBA sprite of SPRITE x SPRITE. colours: role -> RGB; pattern: (name, RGB), on the "body" parts."""
    size = SPRITE * 2                                        # drawn at twice the size, then shrunk: smooth edges
    canvas = Image.new("RGBA", (size, size))
    draw = ImageDraw.Draw(canvas)
    mask = Image.new("L", (size, size))
    mask_draw = ImageDraw.Draw(mask)
    for points, role in parts:
        xy = [tuple(p) for p in ((points * 0.94 + 1) / 2 * size)]
        if role == "hole":                                   # an arch of a bridge: see through
            draw.polygon(xy, fill=(0, 0, 0, 0))
            continue
        rgb = colours.get(role, (35, 30, 30))                # "line": dark
        draw.polygon(xy, fill=(*rgb, 255), outline=tuple(int(v * 0.55) for v in rgb) + (255,))
        mask_draw.polygon(xy, fill=255 if role == "body" else 0)     # later parts cover the body, and its pattern
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
    """One individual of a species, or the building of a landmark: RGBA, cropped to what is drawn."""
    look, parts = entity.look, PARTS[entity.category]
    if entity.kind == "landmark":       # a building is the same in every photograph, down to the pixel before scaling
        image = paint(parts(*look["shape"]), {"wall": COLOURS[look["wall"]], "roof": COLOURS[look["roof"]]})
    else:
        shape = [min(1, max(0, v + rng.normal(0, 0.06))) for v in look["shape"]]           # individuals differ a little
        roles = {"body": COLOURS[look["body"]], "accent": COLOURS[look["accent"]], "stem": (60, 120, 50)}
        image = paint(parts(*shape), roles, (look["pattern"], COLOURS[look["second"]]), int(rng.integers(99)))
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.rotate(float(rng.uniform(-25, 25)), Image.Resampling.BILINEAR, expand=True)
    # Faint edge pixels do not count: the box of an object should be what an eye would draw.
    return image.crop(image.getchannel("A").point(lambda v: 255 * (v > 60)).getbbox())


def noise(rng, cells, side, low, high):
    """Smooth colour noise [side, side, 3] between two RGB colours."""
    small = rng.random((cells, cells, 1)) * (np.asarray(high, float) - low) + low + rng.normal(0, 12, (cells, cells, 3))
    return Image.fromarray(np.clip(small, 0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def background(rng):
    """A natural backdrop: blurred noise between two muted colours."""
    low, high = rng.integers(40, 190, 3), rng.integers(60, 220, 3)
    return noise(rng, int(rng.integers(4, 14)), SIDE, low, high)


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
    """A centre (x, y) for a square of `longest` pixels that hides little of `taken`, or None after 40 tries.

    off_centre keeps the target away from the middle, where a centre crop would find it without looking.
    """
    margin = longest * 0.5
    for _ in range(40):
        x, y = rng.uniform(margin, SIDE - margin, 2)
        box = (x - margin, y - margin, x + margin, y + margin)
        central = max(abs(x - SIDE / 2), abs(y - SIDE / 2)) < 0.16 * SIDE
        if not (off_centre and central) and all(overlap(t, box) < 0.12 and overlap(box, t) < 0.25 for t in taken):
            return x, y
    return None


def finish(scene, rng):
    """Light and a touch of sensor noise, so that no two photographs are equal."""
    light, grain = rng.uniform(0.82, 1.12), rng.normal(0, 4, (SIDE, SIDE, 1)).astype(np.float32)
    return Image.fromarray(np.clip(np.asarray(scene, dtype=np.float32) * light + grain, 0, 255).astype(np.uint8))


def species_scene(rng, target, distractors, backdrop, filled):
    """A photograph of one individual. target, distractors: RGBA sprites.

    Returns (RGB image, [target box, then a box or None for each distractor]).
    """
    scene = backdrop.copy()
    if filled:
        longest = rng.uniform(0.78, 0.95) * SIDE
        box = paste(scene, target, SIDE / 2 + rng.uniform(-6, 6), SIDE / 2 + rng.uniform(-6, 6), longest)
        return finish(scene, rng), [box]
    longest = rng.uniform(0.34, 0.5) * SIDE
    x, y = place(rng, longest, [], off_centre=True)          # nothing is taken yet: 40 tries find a place
    box = (x - longest / 2, y - longest / 2, x + longest / 2, y + longest / 2)
    taken, boxes = [box], []
    for item in distractors:
        size = rng.uniform(0.3, 0.52) * SIDE
        spot = place(rng, size, taken)
        boxes.append(spot and paste(scene, item, *spot, size))                              # None: no room was left
        taken += boxes[-1:] if spot else []
    box = paste(scene, target, x, y, longest)                # last: never hidden
    return finish(scene, rng), [box] + boxes


def landmark_scene(rng, entity, building):
    """A photograph of a landmark with its surroundings. Returns (RGB image, [box of the building])."""
    look = entity.look
    scene = noise(rng, 3, SIDE, np.array(look["sky"]) - 10, np.array(look["sky"]) + 10)
    draw = ImageDraw.Draw(scene)
    horizon, middle = SIDE * (0.72 + rng.uniform(-0.03, 0.03)), SIDE * (0.5 + rng.uniform(-0.07, 0.07))
    heights = np.random.default_rng(look["ridge"]).uniform(0.02, 0.22, 9) * SIDE            # the family's skyline
    ridge = [(middle + (i - 4) * SIDE * 0.2, horizon - h) for i, h in enumerate(heights)]
    draw.polygon([(-SIDE, SIDE)] + ridge + [(2 * SIDE, SIDE)], fill=tuple(int(v * 0.75) for v in look["sky"]))
    draw.rectangle((0, horizon, SIDE, SIDE), fill=tuple(look["ground"]))
    zoom = rng.uniform(0.92, 1.08)
    longest = (0.44 if building.size[0] >= building.size[1] else 0.52) * SIDE * zoom
    # Left and right they stand clear of the building: a crop to it is to lose them.
    reach = max(0.28, longest / SIDE * building.size[0] / max(building.size) / 2 + 0.15)
    spots = ((-reach, 0.0, 0.27), (reach, 0.0, 0.27), (0.02, 0.22, 0.2))       # dx, dy, size: left, right, in front
    for (kind, colour), (dx, dy, size) in zip(look["around"], spots):
        rgb = COLOURS[colour]
        item = paint(neighbour_parts(kind), {"wall": rgb, "shade": tuple(int(v * 0.7) for v in rgb)})
        item = item.crop(item.getbbox())
        tall = size * SIDE * zoom * item.size[1] / max(item.size)
        foot = horizon + dy * SIDE + 8 - tall / 2 + rng.uniform(-3, 3)
        paste(scene, item, middle + dx * SIDE * zoom, foot, size * SIDE * zoom)
    tall = longest * building.size[1] / max(building.size)
    box = paste(scene, building, middle, horizon + 8 - tall / 2, longest)
    return finish(scene, rng), [box]


def photograph(entity, others, rng, style):
    """One photograph -> (RGB image, objects): (category, box) of all that a question can name, the target first.

    style: "reference" (knowledge base), "filled", "cluttered" or "landmark". others: entities for the distractors.
    """
    if entity.kind == "landmark":
        image, boxes = landmark_scene(rng, entity, sprite(entity, rng))
        return image, [(entity.category, boxes[0])]
    other = []
    if style == "cluttered":
        # Never of the target's own category: the question would not say which of the two is meant.
        allowed = [e for e in others if e.category != entity.category and e.kind == "species"]
        if not allowed:
            raise ValueError(f"nothing but {entity.category} species to put into a cluttered scene: use more "
                             f"--entities, a lower --landmarks or --filled 1")
        other = [pick(rng, allowed) for _ in range(int(rng.integers(1, 4)))]
    target, distractors = sprite(entity, rng), [sprite(e, rng) for e in other]
    image, boxes = species_scene(rng, target, distractors, background(rng), filled=style != "cluttered")
    return image, [(e.category, box) for e, box in zip([entity] + other, boxes) if box]


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
        by_kind = {kind: [i for i in pools[split] if entities[i].kind == kind] for kind in QUESTIONS}
        for n in range(getattr(args, split)):
            kind = "landmark" if rng.random() < args.landmarks else "species"
            if not by_kind[kind]:
                raise ValueError(f"--entities {len(entities)} --landmarks {args.landmarks}: split {split} has no "
                                 f"{kind} entity; use more entities")
            entity, question = int(pick(rng, by_kind[kind])), int(rng.integers(5))
            style = "landmark" if kind == "landmark" else "filled" if rng.random() < args.filled else "cluttered"
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
    """Draw one image file; runs in a worker process. Returns the target's box."""
    root, path, entity, others, seed, style = job
    rng = np.random.default_rng(seed)
    image, objects = photograph(entity, others, rng, style)
    target = Path(root) / path
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, quality=92)
    return objects[0][1]


def jobs_of(root, entities, queries, args):
    """Every image to draw, references first. Each has its own seed: neither order nor number of workers matters."""
    jobs = [(root, reference_path(i, k), entity, (), [args.seed, 1, i, k], "reference")
            for i, entity in enumerate(entities) for k in range(args.images)]
    for n, q in enumerate(queries):
        rng = np.random.default_rng([args.seed, 2, n])
        # The distractors are drawn from these 40: all entities would be sent to the workers with every query.
        others = [entities[int(j)] for j in rng.integers(len(entities), size=40)]
        jobs.append((root, q["path"], entities[q["entity"]], others, [args.seed, 3, n], q["style"]))
    return jobs


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
    text = QUESTIONS[entity.kind][query["question"]].format(c=entity.category)
    return {
        "question": text, "answer": answer(entity, query["question"]), "dataset_image_ids": query["image_id"],
        "dataset_name": "landmarks" if entity.kind == "landmark" else "inaturalist",
        "dataset_category_id": query["entity"], "question_type": "templated",
        "wikipedia_url": entity.url, "wikipedia_title": entity.name, "evidence": texts[section],
        "evidence_section_id": section, "evidence_section_title": titles[section],
        "encyclopedic_vqa_split": query["split"],
        # As in the benchmark, this one gives the answer's entity away: a reader that shows it to a model leaks.
        "question_original": text.replace(f"this {entity.category}", entity.name),
        "wikipedia_url_used_in_train": entity.url in train_urls}


def write_tables(root, entities, queries, boxes, images):
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
        for q, box in zip(queries, boxes):
            row = {"image": q["path"], "box": [float(v) for v in box], "kind": q["kind"],
                   "category": entities[q["entity"]].category, "style": q["style"]}
            file.write(json.dumps(row) + "\n")


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=1), encoding="utf-8")


def build(args):
    """Draw the world into <out>.tmp and rename it: what an interrupted run leaves is never taken for complete."""
    check(args)
    entities = make_entities(args.entities, args.landmarks, args.seed)
    queries = plan_queries(entities, args)
    out = Path(args.out)
    root = out.with_name(out.name + ".tmp")
    shutil.rmtree(root, ignore_errors=True)                  # of a run that was killed
    root.mkdir(parents=True)
    try:
        jobs = jobs_of(str(root), entities, queries, args)
        with ProcessPoolExecutor(args.workers) as pool:
            boxes = list(pool.map(draw_job, jobs, chunksize=32))[len(entities) * args.images:]      # of the queries
        write_tables(root, entities, queries, boxes, args.images)
        if args.show:
            contact_sheet(root, entities, queries, boxes, args.show).save(root / "contact.png")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(root, out)
    finally:
        shutil.rmtree(root, ignore_errors=True)              # Ctrl-C, an error or a full disk; renamed, it is not there
    return entities, queries


def contact_sheet(root, entities, queries, boxes, count):
    """`count` test queries with their truth box beside a reference image of the entity and of a sibling."""
    rows = [(q, b) for q, b in zip(queries, boxes) if q["split"] == "test"][:count]
    columns, w, h = 4, SIDE * 2 + 8, SIDE + 24
    sheet = Image.new("RGB", (columns * w, math.ceil(len(rows) / columns) * h), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (q, box) in enumerate(rows):
        x, y = n % columns * w, n // columns * h
        entity = entities[q["entity"]]
        sheet.paste(Image.open(root / q["path"]), (x, y))
        draw.rectangle([x + box[0], y + box[1], x + box[2] - 1, y + box[3] - 1], outline="red", width=2)
        sibling = next(i for i, e in enumerate(entities) if e.family == entity.family and e.name != entity.name)
        for k, index in enumerate((q["entity"], sibling)):
            reference = Image.open(root / reference_path(index, 0)).resize((SIDE // 2, SIDE // 2))
            sheet.paste(reference, (x + SIDE + k * SIDE // 2, y + 20))
            draw.text((x + SIDE + k * SIDE // 2 + 4, y + 4), ("positive", "sibling")[k], fill="black")
        draw.text((x + SIDE + 4, y + 150), f"{entity.name}\n{entity.category}, {q['style']}", fill="black")
        question = QUESTIONS[entity.kind][q["question"]].format(c=entity.category)
        draw.text((x + 4, y + SIDE + 4), question, fill="black")
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
