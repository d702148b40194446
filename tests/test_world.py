"""mini/world.py: the same seed draws the same bytes, the files are E-VQA's, the boxes are true, and nothing leaks.

    python -m pytest tests/test_world.py
"""

import csv
import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mini import world

ROOT = Path(__file__).resolve().parent.parent
# 12 genera; 2 reference images an entity. All styles are in every split at this seed.
SIZE = ["--entities", "72", "--around", "0.4", "--images", "2", "--train", "24", "--val", "8", "--test", "16"]
SPLITS = {"train": 24, "val": 8, "test": 16}
# The header of Encyclopedic-VQA's csv files.
COLUMNS = ["question", "answer", "dataset_image_ids", "dataset_name", "dataset_category_id", "question_type",
           "wikipedia_url", "wikipedia_title", "evidence", "evidence_section_id", "evidence_section_title",
           "encyclopedic_vqa_split", "question_original", "wikipedia_url_used_in_train"]


def command(out, *flags):
    return [sys.executable, "-m", "mini.world", "--out", str(out), *SIZE, *flags]


def draw(out, *flags):
    """Run `python -m mini.world` as a user does; returns the finished process."""
    return subprocess.run(command(out, *flags), cwd=ROOT, capture_output=True, text=True)


def digests(folder):
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def read_rows(folder, split):
    with open(folder / f"{split}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small world on disk, drawn by one process; tests read it and change nothing. -> (folder, what was printed)"""
    folder = tmp_path_factory.mktemp("raw") / "world"
    process = draw(folder, "--workers", "1", "--show", "5")
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


@pytest.fixture(scope="module")
def folder(drawn):
    return drawn[0]


@pytest.fixture(scope="module")
def plan():
    """(args, entities, queries) of the world on disk, made anew in this process."""
    args = world.parse_args(SIZE)
    entities = world.make_entities(args.entities, args.around, args.seed)
    return args, entities, world.plan_queries(entities, args)


# --------------------------------------------------------------------------------------------------- the same again

def test_same_seed_same_bytes_for_any_number_of_workers(folder, tmp_path):
    process = draw(tmp_path / "again", "--workers", "3", "--show", "5")
    assert process.returncode == 0, process.stderr
    assert digests(tmp_path / "again") == digests(folder)
    assert os.listdir(tmp_path) == ["again"]                     # and no temporary folder beside it


def test_another_seed_draws_another_world(plan):
    args, entities, queries = plan
    other = world.parse_args([*SIZE, "--seed", "1"])
    others = world.make_entities(other.entities, other.around, other.seed)
    assert not {e.name for e in entities} & {e.name for e in others}
    assert [q["entity"] for q in queries] != [q["entity"] for q in world.plan_queries(others, other)]
    # Also where the entity is the same, the photograph is not.
    seeds = [tuple(map(str, job[4])) for job in world.jobs_of("", entities, queries, args)]
    seeds += [tuple(map(str, job[4])) for job in world.jobs_of("", others, queries, other)]
    assert len(set(seeds)) == len(seeds) == 2 * (72 * 2 + 48)


# ----------------------------------------------------------------------------------------------------- files of E-VQA

def test_every_file_and_no_other(drawn):
    folder, printed = drawn
    assert printed == (f"world: 72 entities, 144 reference images, 24 train queries, 8 val queries, 16 test queries "
                       f"-> {folder}\n")
    names = {"train.csv", "val.csv", "test.csv", "encyclopedic_kb_wiki.json", "url_to_path_mapping.json",
             "inat/train_id2name.json", "inat/val_id2name.json", "truth.jsonl", "contact.png"}
    images = set(read_json(folder / "url_to_path_mapping.json").values())
    images |= {json.loads(line)["image"] for line in open(folder / "truth.jsonl", encoding="utf-8")}
    assert len(images) == 72 * 2 + 24 + 8 + 16                   # no image serves twice
    assert set(digests(folder)) == names | images
    for path in images:
        with Image.open(folder / path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (224, 224))


@pytest.mark.parametrize("split", SPLITS)
def test_csv(folder, split):
    with open(folder / f"{split}.csv", newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == COLUMNS
    rows, knowledge = read_rows(folder, split), read_json(folder / "encyclopedic_kb_wiki.json")
    assert len(rows) == SPLITS[split]
    for row in rows:
        entry = knowledge[row["wikipedia_url"]]                  # the positive is in the knowledge base
        assert entry["title"] == row["wikipedia_title"]
        section = int(row["evidence_section_id"])
        assert entry["section_texts"][section] == row["evidence"]
        assert entry["section_titles"][section] == row["evidence_section_title"]
        assert row["answer"] and row["question_type"] == "templated" and row["encyclopedic_vqa_split"] == split
        assert row["dataset_name"] in ("inaturalist", "landmarks")
        assert row["wikipedia_url_used_in_train"] == str(split == "train")


@pytest.mark.parametrize("split", SPLITS)
def test_image_ids_lead_to_the_drawn_query(folder, plan, split):
    """By the id maps of iNaturalist (val's for val and test) and by the folders of Google Landmarks."""
    args, entities, queries = plan
    names = read_json(folder / f"inat/{'train' if split == 'train' else 'val'}_id2name.json")
    jobs = {job[1]: job for job in world.jobs_of("", entities, queries, args)}
    for row in read_rows(folder, split):
        i = row["dataset_image_ids"]
        if row["dataset_name"] == "inaturalist":
            path = "inat/" + names[i]
            assert path.startswith("inat/train/" if split == "train" else "inat/val/")
        else:
            assert len(i) == 16 and set(i) <= set("0123456789abcdef") and i not in names
            path = f"landmarks/{i[0]}/{i[1]}/{i[2]}/{i}.jpg"
        _, _, entity, others, seed, style, kin = jobs[path]
        assert entity.url == row["wikipedia_url"]
        image, _, _ = world.photograph(entity, others, np.random.default_rng(seed), style, kin)
        stored = np.asarray(Image.open(folder / path), dtype=float)
        assert np.abs(stored - np.asarray(image, dtype=float)).mean() < 6        # grey levels of 255; JPEG's loss


def test_id_maps_hold_the_species_queries_alone(folder):
    for name, splits in (("train", ("train",)), ("val", ("val", "test"))):
        rows = [row for split in splits for row in read_rows(folder, split)]
        ids = [row["dataset_image_ids"] for row in rows if row["dataset_name"] == "inaturalist"]
        assert set(read_json(folder / f"inat/{name}_id2name.json")) == set(ids) and len(set(ids)) == len(ids) > 0
        assert len(ids) < len(rows)                              # both kinds are there


def test_landmark_ids_are_unique():
    ids = [world.image_place(split, n, "landmark", 5)["image_id"] for split in SPLITS for n in range(3000)]
    assert len(set(ids)) == len(ids) == 9000


def test_knowledge_base(folder):
    knowledge = read_json(folder / "encyclopedic_kb_wiki.json")
    paths = read_json(folder / "url_to_path_mapping.json")
    assert len(knowledge) == 72 and len({entry["title"] for entry in knowledge.values()}) == 72
    for url, entry in knowledge.items():
        assert set(entry) == {"title", "section_titles", "section_texts", "image_urls", "image_reference_descriptions",
                              "image_section_indices", "url"}
        assert entry["url"] == url and entry["title"].replace(" ", "_") in url
        assert len(entry["section_titles"]) == len(entry["section_texts"]) == 3
        assert len(entry["image_urls"]) == len(entry["image_reference_descriptions"]) == 2
        assert entry["image_section_indices"] == [0, 0]
        assert all((folder / paths[image]).is_file() for image in entry["image_urls"])
    urls = [image for entry in knowledge.values() for image in entry["image_urls"]]
    assert sorted(urls) == sorted(paths) and len(set(paths.values())) == 144


def test_question_never_names_the_entity(folder):
    """E-VQA's question_original does, and a policy that reads it would be told the answer."""
    for split in SPLITS:
        for row in read_rows(folder, split):
            category = next(c for c in world.CATEGORIES if c in row["question"])
            words = [word.lower() for word in row["wikipedia_title"].split() if word.lower() != category]
            assert words and not any(word in row["question"].lower() for word in words)
            assert row["wikipedia_title"] in row["question_original"]
            assert row["question_original"] != row["question"] and " the " in row["question"]


def test_splits_share_no_entity(folder, plan):
    asked = {split: {row["wikipedia_url"] for row in read_rows(folder, split)} for split in SPLITS}
    assert not asked["train"] & asked["test"] and not asked["train"] & asked["val"] and not asked["val"] & asked["test"]
    # The same for every seed and every number of queries: already the entities to choose from are disjoint.
    pools = world.split_entities(plan[1], np.random.default_rng(3))
    assert sorted(i for pool in pools.values() for i in pool) == list(range(72))
    assert [len(pools[split]) for split in SPLITS] == [39, 11, 22]           # .55 * 72 = 39.6, .7 * 72 = 50.4, both cut


def test_contact_sheet(folder):
    """Five queries, four a row: each is 456 x 248 pixels, the scene with its truth box on the left."""
    sheet = np.asarray(Image.open(folder / "contact.png"))
    assert sheet.shape == (2 * 248, 4 * 456, 3)
    truth = [json.loads(line) for line in open(folder / "truth.jsonl", encoding="utf-8")]
    first = [row for row, split in zip(truth, ["train"] * 24 + ["val"] * 8 + ["test"] * 16) if split == "test"][0]
    x1, y1, x2, y2 = (int(v) for v in first["box"])
    assert (sheet[y1, x1:x2] == (255, 0, 0)).all() and (sheet[y1:y2, x2 - 1] == (255, 0, 0)).all()


# ------------------------------------------------------------------------------------------------------- truth boxes

def test_truth_is_the_box_that_was_drawn(folder, plan):
    args, entities, queries = plan
    truth = [json.loads(line) for line in open(folder / "truth.jsonl", encoding="utf-8")]
    jobs = world.jobs_of("", entities, queries, args)[72 * 2:]   # references come first
    assert len(truth) == len(jobs) == 48
    for row, query, (_, path, entity, others, seed, style, kin) in zip(truth, queries, jobs):
        _, objects, things = world.photograph(entity, others, np.random.default_rng(seed), style, kin)
        assert (row["image"], row["kind"], row["category"]) == (path, query["style"], entity.category)
        assert (row["things"], tuple(row["box"])) == (things, objects[0][1])
        x1, y1, x2, y2 = row["box"]
        assert 0 <= x1 and x1 + 20 < x2 <= 224 and 0 <= y1 and y1 + 20 < y2 <= 224


def without_target(monkeypatch, entity, others, seed, style):
    """(photograph, the same without its target, objects). The target is what is pasted last: nothing may hide it."""
    image, objects, _ = world.photograph(entity, others, np.random.default_rng(seed), style)
    pasted = []
    paste = world.paste

    def invisible(scene, item, *where):
        pasted.append(item)
        if len(pasted) == count:
            item = Image.new("RGBA", item.size)
        return paste(scene, item, *where)

    for count in (-1, None):                                     # first count the pastes, then leave the last one out
        count = count or len(pasted)
        pasted.clear()
        with monkeypatch.context() as patch:
            patch.setattr(world, "paste", invisible)
            bare, same, _ = world.photograph(entity, others, np.random.default_rng(seed), style)
    assert same == objects                                       # all else is equal, to the last random draw
    return np.asarray(image, dtype=int), np.asarray(bare, dtype=int), objects


def of_style(entities, style):
    return [e for e in entities if bool(e.around) == (style == "around")]


@pytest.mark.parametrize("style", [*world.STYLES, "reference"])
def test_box_is_the_extent_of_the_target(monkeypatch, plan, style):
    for n, entity in enumerate(of_style(plan[1], style)[::3]):
        image, bare, objects = without_target(monkeypatch, entity, plan[1], n, style)
        shown, (x1, y1, x2, y2) = objects[0]
        assert shown is entity
        rows, columns = np.nonzero(np.abs(image - bare).sum(-1) > 0)
        assert (x1, y1, x2, y2) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)    # right exclusive


def test_a_target_among_others_can_be_named_and_is_not_in_the_middle(plan):
    seen, kin = [], []
    for n in range(60):
        index = [i for i, e in enumerate(plan[1]) if not e.around][n % 40]
        rng = np.random.default_rng([9, n])
        _, objects, things = world.photograph(plan[1][index], world.some_others(plan[1], index, rng), rng, "among")
        (entity, target), *rest = objects
        same = [(e.look, box) for e, box in rest if e.category == entity.category]
        assert all((look["pattern"], look["accent"]) != (entity.look["pattern"], entity.look["accent"])
                   for look, _ in same)                          # so that phrases() finds words for it
        assert all(0 <= b[0] < b[2] <= 224 and 0 <= b[1] < b[3] <= 224 for _, b in objects)
        centre = (target[0] + target[2]) / 2, (target[1] + target[3]) / 2
        # Away from the middle by .14 * 224 = 31.4 in x or y, up to a pixel of rounding: no centre crop finds it.
        assert max(abs(v - 112) for v in centre) > 30
        assert things == len(rest)
        seen.append(things)
        kin.append(len(same))
    assert set(seen) >= {2, 3, 4} and seen.count(0) < 3          # two to four others; rarely there is no room
    assert sum(n > 0 for n in kin) > 50                          # the noun alone does not say which is meant


def test_phrases_by_hand():
    """True of the asked one and of no other of its category."""
    asked, other = ({"pattern": p, "body": b, "accent": a} for p, b, a in
                    (("striped", "navy", "pink"), ("striped", "lime", "grey")))
    assert world.phrases(asked, "bird", [other]) == ["the navy bird", "the bird whose beak is pink"]
    assert world.phrases(asked, "tower", [], "left") == ["the striped tower", "the navy tower",
                                                         "the tower whose roof is pink", "the tower on the left"]
    third = {"pattern": "plain", "body": "navy", "accent": "pink"}
    assert world.phrases(asked, "fish", [other, third]) == ["the striped fish whose fins are pink"]


def test_sides_by_hand():
    """Outermost by .08 * 224 = 18 pixels and in that half."""
    left, middle, right = (10, 0, 50, 40), (60, 0, 140, 40), (160, 0, 220, 40)           # centres 30, 100, 190
    assert world.side_of(left, [middle, right]) == "left" and world.side_of(right, [left, middle]) == "right"
    assert world.side_of(middle, [left, right]) is None and world.side_of(middle, []) == "left"      # 100 < .45 * 224
    assert world.side_of(left, [(20, 100, 60, 140)]) is None     # ten pixels further out: no eye would say so


def test_overlap_by_hand():
    assert world.overlap((0, 0, 10, 10), (5, 6, 20, 20)) == 5 * 4 / 100
    assert world.overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0                   # they touch
    assert world.overlap((2, 2, 4, 4), (0, 0, 100, 100)) == 1


def test_paste_returns_the_box_inside_the_scene():
    scene, item = Image.new("RGB", (224, 224)), Image.new("RGBA", (10, 20), "white")
    assert world.paste(scene, item, 100, 50, 40) == (90, 30, 110, 70)            # 20 x 40 about (100, 50)
    assert Image.fromarray(np.asarray(scene)).getbbox() == (90, 30, 110, 70)
    assert world.paste(scene, item, 5, 220, 40) == (0, 200, 15, 224)             # -5..15, 200..240, clipped


# ---------------------------------------------------------------------------------------------------------- entities

def genera(around, count=780, share=0.4, seed=7):
    """Those whose siblings differ in what stands around them, or the others: lists of entities."""
    found = {}
    for entity in world.make_entities(count, share, seed):
        found.setdefault(entity.family, []).append(entity)
    return [members for members in found.values() if bool(members[0].around) == around]


def differ(siblings, *keys):
    """Do all siblings differ in what the keys of their looks hold, taken together?"""
    return len({json.dumps([e.look[key] for key in keys]) for e in siblings}) == len(siblings)


@pytest.mark.parametrize("around", [False, True])
def test_siblings_share_what_they_should(around):
    """The habitat always; then either the surroundings or the look tells siblings apart, in the text, too."""
    for siblings in genera(around):
        assert len(siblings) == 6 and len({e.category for e in siblings}) == 1 and len({e.name for e in siblings}) == 6
        assert len({world.describe(e)[1][0].replace(e.name, "") for e in siblings}) == 6
        assert len({json.dumps(e.habitat) for e in siblings}) == 1
        assert all(e.look["body"] not in (e.look["second"], e.look["accent"]) for e in siblings)      # it can be seen
        if around:
            assert len({json.dumps(e.look) for e in siblings}) == 1
            for place in range(3):                               # left, right, in front
                assert len({e.around[place] for e in siblings}) == 6
        else:
            assert len({json.dumps(e.look["shape"]) for e in siblings}) == 1
            assert differ(siblings, "pattern", "accent") and differ(siblings, "second", "accent")


def test_the_noun_does_not_say_whether_a_crop_helps():
    assert {s[0].category for s in genera(True)} == {s[0].category for s in genera(False)} == set(world.CATEGORIES)


def test_looks_come_back_in_other_genera():
    """Mimicry: who sees the object alone cannot tell the genus."""
    owners = {}
    for siblings in genera(False, count=1200, share=0.25):
        for entity in siblings:
            owners.setdefault(json.dumps(entity.look), set()).add(entity.family)
    assert np.median([len(families) for families in owners.values()]) >= 2


def test_siblings_of_one_look_differ_only_around_it(monkeypatch):
    """What knowing *when* to crop is worth: two siblings in the same light are equal wherever the object stands."""
    for siblings in genera(True)[:5]:
        first, bare, objects = without_target(monkeypatch, siblings[0], (), 3, "around")
        second, _, same = without_target(monkeypatch, siblings[1], (), 3, "around")
        assert same[0][1] == objects[0][1]
        target = np.abs(first - bare).sum(-1) > 60               # not its soft edge: what is behind shines through
        apart = np.abs(first - second).sum(-1) > 60
        assert target.mean() > 0.02 and apart.mean() > 0.02
        assert not (apart & target).any()


@pytest.mark.parametrize("around", [False, True])
def test_articles_say_what_is_drawn(around):
    for entity in [siblings[0] for siblings in genera(around)]:
        look, (titles, texts) = entity.look, world.describe(entity)
        said = [look["body"], look["pattern"], look["second"], look["accent"], entity.habitat["ground"],
                *(word for pair in (*entity.around, *entity.habitat["far"]) for word in pair)]
        assert titles[0] == entity.name and all(word in texts[0] for word in [*said, entity.category])
        facts = entity.facts
        assert all(str(fact) in " ".join(texts[1:]) for fact in facts.values())
        for question in range(5):
            assert world.answer(entity, question)


@pytest.mark.parametrize("category", world.SPECIES + world.LANDMARKS)
def test_each_shape_number_changes_the_drawing(category):
    """Or fewer shapes tell genera and families apart than it seems. A parameter named _ is one that is not used."""
    colours = {role: (200, 30, 50) for role in ("body", "accent", "stem", "wall", "roof")}
    for i, name in enumerate(inspect.signature(world.PARTS[category]).parameters):
        # Not up to 1, where a windmill's sails stand as at 0.
        low, high = ([0.5] * i + [v] + [0.5] * (3 - i) for v in (0.0, 0.6))
        images = [np.asarray(world.paint(world.PARTS[category](*shape), colours), dtype=int) for shape in (low, high)]
        changed = (np.abs(images[0] - images[1]).sum(-1) > 100).mean()
        assert changed == 0 if name == "_" else changed > 0.001, name


def test_patterns_are_distinct_and_on_the_body_alone():
    roles = {"body": (200, 30, 50), "accent": (30, 160, 160)}
    parts = world.PARTS["fish"](0.5, 0.5, 0.5, 0.5)
    drawings = {name: np.asarray(world.paint(parts, roles, (name, (255, 255, 255))), dtype=int)
                for name in world.PATTERNS}
    body = np.asarray(world.paint([part for part in parts if part[1] == "body"], roles))[..., 3] > 0
    names = list(drawings)
    for i, a in enumerate(names):
        for b in names[:i]:
            changed = np.abs(drawings[a] - drawings[b]).sum(-1) > 100
            assert changed[body].mean() > 0.1 and not changed[~body].any(), (a, b)


def test_universes_share_no_name_and_no_look():
    """What the stand-in models were pretrained on is not in the data set, whatever its seed."""
    syllables = world.FIRST_SYLLABLES
    assert not any(a.startswith(b) or b.startswith(a) for a in syllables["data"] for b in syllables["pretrain"])
    pretrain = [world.make_entities(1800, 0.35, 0, universe="pretrain")]         # as mini/pretrain.py makes them
    data = [world.make_entities(1200, 0.25, seed) for seed in range(3)]

    def words(worlds):
        names = [f"{e.name} {e.facts['person']}" for entities in worlds for e in entities]
        return {word.lower() for name in names for word in name.split()} - set(world.LANDMARKS)

    assert len(words(data)) > 3000 and not words(data) & words(pretrain)
    looks = [{json.dumps(e.look) for entities in worlds for e in entities} for worlds in (data, pretrain)]
    shapes = [{json.dumps(e.look["shape"]) for entities in worlds for e in entities} for worlds in (data, pretrain)]
    assert len(looks[0]) > 400 and not looks[0] & looks[1] and not shapes[0] & shapes[1]


# ------------------------------------------------------------------------------------------------- sizes and mistakes

def test_shares_by_flags():
    """2,000 draws: a share of .25 is met within 3 * sqrt(.25 * .75 / 2000) = .029."""
    args = world.parse_args(["--entities", "780", "--filled", "0.25"])
    entities = world.make_entities(780, args.around, 0)
    assert sum(bool(e.around) for e in entities) == 192          # 10 genera a category: two or three of each, 32 of 130
    train = [q for q in world.plan_queries(entities, args) if q["split"] == "train"]
    for style, share in (("around", 0.25), ("filled", 0.25), ("among", 0.5)):
        assert abs(sum(q["style"] == style for q in train) / 2000 - share) < 0.034
    assert all(bool(entities[q["entity"]].around) == (q["style"] == "around") for q in train)
    assert {q["question"] for q in train} == set(range(5))
    for share, styles in ((0.0, {"among", "filled"}), (1.0, {"around"})):
        args = world.parse_args(["--around", str(share), "--filled", "0" if share else "0.1"])
        entities = world.make_entities(48, share, 0)
        assert {q["style"] for q in world.plan_queries(entities, args)} == styles


@pytest.mark.parametrize("flags, message", [
    (["--entities", "6"], "--entities 6: a multiple of 6"),      # one family: no distractor of another category
    (["--entities", "74"], "--entities 74: a multiple of 6"),    # would quietly become 72
    (["--entities", "-12"], "--entities -12"),
    (["--images", "0"], "--images 0: at least 1"),               # a knowledge base without pictures
    (["--train", "-1"], "--train -1: at least 0"),
    (["--workers", "0"], "--workers 0"),
    (["--seed", "-1"], "--seed -1"),
    (["--around", "1.5"], "--around 1.5: a share"),
    (["--around", "0.7", "--filled", "0.5"], "together at most 1"),
    (["--filled", "nan"], "--filled nan: a share"),
    (["--test", "0", "--show", "4"], "--show 4 --test 0"),
    (["--entities", "12", "--around", "0.1"], "has no entity for a query of style around; use more entities"),
])
def test_bad_sizes(tmp_path, flags, message):
    with pytest.raises(SystemExit) as error:
        world.main(["--out", str(tmp_path / "world"), *SIZE, *flags])
    assert message in str(error.value) and list(tmp_path.iterdir()) == []        # said before anything is drawn


# -------------------------------------------------------------------------------------------------------- interrupted

def test_interrupted_build_leaves_no_folder(monkeypatch, tmp_path):
    """Stopped after all images are drawn: no folder is left, and one from before stays as it was."""
    small = [*SIZE[:4], "--images", "1", "--train", "2", "--val", "1", "--test", "1", "--workers", "1"]

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "write_tables", stop)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "train.csv").write_text("as it was")
    for name in ("new", "old"):
        with pytest.raises(KeyboardInterrupt):
            world.build(world.parse_args(["--out", str(tmp_path / name), *small]))
    assert digests(tmp_path) == {"old/train.csv": hashlib.sha256(b"as it was").hexdigest()}
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_killed_build_is_not_taken_for_complete(folder, tmp_path):
    """kill -9 in the middle of drawing; then the same command again makes the whole world."""
    out = tmp_path / "world"
    flags = ["--workers", "1", "--show", "5"]
    process = subprocess.Popen(command(out, *flags), cwd=ROOT, start_new_session=True)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("world.tmp/kb_images/*/*.jpg")):
        assert process.poll() is None and time.monotonic() < end, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)                       # with its worker, as when a machine goes down
    process.wait()
    assert not out.exists() and (tmp_path / "world.tmp").exists()
    assert draw(out, *flags).returncode == 0
    assert digests(out) == digests(folder) and os.listdir(tmp_path) == ["world"]
