"""mini/pretrain.py: its fast forward against transformers', its targets against slow ones, and what the shipped
stand-ins do on scenes that they have never seen.

    python -m pytest tests/test_pretrain.py
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mini import pretrain as P
from mini import world
from policy import load_policy, parse
from scorer import PIXEL_MEAN, PIXEL_STD, Preprocess, crop, fuse, load_scorer, scores

MINI = Path(__file__).resolve().parent.parent / "mini"
CELL = 14                         # pixels of a patch; 12 x 12 patches, merged 2 x 2 to 36 visual tokens


@pytest.fixture(scope="module")
def stand_in():
    """The shipped policy. Eager attention is the faster one on so small a model."""
    return load_policy(str(MINI / "policy"), attention="eager")


@pytest.fixture(scope="module")
def questions():
    return P.Questions(P.build_processor())


@pytest.fixture(scope="module")
def bank():
    """40 pretraining scenes: images uint8 [40, 168, 168, 3], boxes and kinds [40, 5, 4], things [40]."""
    entities = world.make_entities(240, 0.35, 5, universe="pretrain")
    return tuple(np.stack(column) for column in zip(*(P.scene_of(i, entities, 5) for i in range(40))))


# ---------------------------------------------------------------------------------------- the forward of transformers

@torch.no_grad()
def test_see_equals_transformers(stand_in, bank):
    """From pixels to merged tokens, and the states after blocks 2 and 4, which transformers keeps in the order of its
    windows. (A still is its own second frame: the processor gives it twice, ours once.)"""
    tower = stand_in.model.model.visual
    pixels = stand_in.processor.image_processor(images=[Image.fromarray(i) for i in bank[0][:3]], return_tensors="pt")
    grid, states = pixels["image_grid_thw"], {}
    hooks = [tower.blocks[i].register_forward_hook(lambda _, __, out, i=i: states.update({i: out})) for i in (1, 3)]
    theirs = stand_in.model.model.get_image_features(pixels["pixel_values"], grid).pooler_output
    for hook in hooks:
        hook.remove()
    early, late, merged = P.see(tower, P.patches_of(bank[0][:3], "cpu"), *P.vision_tables(tower))
    assert merged.shape == (3, 36, 192)
    assert torch.allclose(merged, torch.stack(theirs), atol=1e-4), (merged - torch.stack(theirs)).abs().max()
    # A window of 112 pixels is 4 x 4 of the 6 x 6 tokens; then come the 4 x 2, 2 x 4 and 2 x 2 that are left over.
    window = [6 * row + column for top in (0, 4) for left in (0, 4)
              for row in range(top, min(top + 4, 6)) for column in range(left, min(left + 4, 6))]
    assert sorted(window) == list(range(36))
    for ours, state in ((early, states[1]), (late, states[3])):
        ours = ours.reshape(3, 36, 4, 128)[:, window].reshape(-1, 128)
        assert torch.allclose(ours, state, atol=1e-4), (ours - state).abs().max()


def answer_ids(questions, batch, i):
    """Token ids of row i's answer, up to its end of turn."""
    ids = batch["ids"][i, int(batch["answer"][i]):].tolist()
    return ids[:ids.index(questions.tokenizer.eos_token_id) + 1]


@torch.no_grad()
def test_answer_loss_by_the_slow_way(stand_in, questions, bank):
    """Each of its four parts from transformers' logits and states, a row without padding at a time: so `read`, the
    rotary positions and the places of the visual tokens are transformers', too."""
    images, boxes, kinds, things = (column[:6] for column in bank)
    batch, model = questions.batch(boxes, kinds, things, np.random.default_rng(0)), stand_in.model
    torch.manual_seed(0)
    heads = P.Heads()
    tower = model.model.visual
    merged = P.see(tower, P.patches_of(images, "cpu"), *P.vision_tables(tower))[2]
    total, parts = P.answer_loss(model, heads, questions, batch, merged, "cpu")
    token, weights, decision, asked, box = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(6):
        # Lengths come from decoding, not from the padding token.
        ids = batch["ids"][i, :int(batch["answer"][i]) + len(answer_ids(questions, batch, i))][None]
        pixels = stand_in.processor.image_processor(images=[Image.fromarray(images[i])], return_tensors="pt")
        out = model(input_ids=ids, mm_token_type_ids=(ids == stand_in.processor.image_token_id).long(),
                    output_hidden_states=True, **pixels)
        logp = out.logits[0].log_softmax(-1)
        for t in range(1, ids.shape[1]):
            token -= float(batch["weight"][i, t] * logp[t - 1, ids[0, t]])
            weights += float(batch["weight"][i, t])
        at, share = int(batch["answer"][i]) + questions.decision - 1, float(batch["crop"][i])
        decision -= share * float(logp[at, questions.choices[1]]) + (1 - share) * float(logp[at, questions.choices[0]])
        x1, y1, x2, y2 = batch["asked"][i].tolist()
        for cell in range(36):
            x, y = (cell % 6 + 0.5) / 6, (cell // 6 + 0.5) / 6
            wanted = x1 <= x < x2 and y1 <= y < y2
            p = heads.asked(out.hidden_states[2][0, int(batch["start"][i]) + cell]).sigmoid().item()
            asked -= math.log(p if wanted else 1 - p)
        where = heads.box(out.hidden_states[-1][0, int(batch["digit"][i]) - 1]).sigmoid()
        box += float((where - batch["box"][i]).abs().mean())
    wanted = {"token": token / weights, "decision": decision / 6, "asked": asked / (6 * 36), "box": box / 6}
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(wanted, abs=1e-4)
    assert total.item() == pytest.approx(wanted["token"] + 0.5 * wanted["decision"] + 0.7 * wanted["asked"]
                                         + 3 * wanted["box"], abs=1e-3)


# ------------------------------------------------------------------------------------------------- targets and losses

def slow_cells(boxes, kinds, side):
    """What lies under each cell's centre, object by object: the first of the list is on top."""
    label, relative = np.zeros((len(boxes), side * side)), np.zeros((len(boxes), side * side, 4))
    look = np.full((len(boxes), side * side, 3), -1)
    for b in range(len(boxes)):
        for cell in range(side * side):
            x, y = (cell % side + 0.5) * 168 / side, (cell // side + 0.5) * 168 / side
            for (x1, y1, x2, y2), (category, *rest) in zip(boxes[b], kinds[b]):
                if category >= 0 and x1 <= x < x2 and y1 <= y < y2:
                    label[b, cell], look[b, cell] = category + 1, rest
                    relative[b, cell] = np.array([x - x1, y - y1, x2 - x, y2 - y]) / 168
                    break
    return label, look, relative


@pytest.mark.parametrize("side", [6, 12])
def test_cell_targets(bank, side):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.integers(0, 169, (30, 5, 2, 2)), 2)    # many overlaps, some boxes without area
    random = corners.reshape(30, 5, 4).astype(np.float32)        # x1, y1, x2, y2
    for boxes, kinds in ((random, rng.integers(-1, 6, (30, 5, 4))), bank[1:3]):
        label, look, relative = P.cell_targets(boxes, kinds, side)
        wanted = slow_cells(boxes, kinds, side)
        assert label.dtype == look.dtype == torch.int64 and relative.dtype == torch.float32
        assert np.array_equal(label.numpy(), wanted[0]) and np.array_equal(look.numpy(), wanted[1])
        assert np.allclose(relative.numpy(), wanted[2], atol=1e-6)
        assert 0 < (wanted[0] > 0).mean() < 1


def test_block_major_is_the_order_of_the_patches():
    """An image whose patch n (row by row) is all of grey n, so each patch says where it came from."""
    numbers = np.arange(144).reshape(12, 12)
    image = np.repeat(np.repeat(numbers, CELL, 0), CELL, 1)[None, :, :, None].repeat(3, 3).astype(np.uint8)
    red = P.patches_of(image, "cpu").view(1, 144, 3, 196)[:, :, 0]
    seen = (red * PIXEL_STD[0] + PIXEL_MEAN[0]).mean(-1) * 255
    wanted = P.block_major(torch.arange(144.0)[None])
    assert torch.allclose(seen, wanted, atol=1e-3)
    assert wanted[0, :8].tolist() == [0, 1, 12, 13, 2, 3, 14, 15]
    assert torch.equal(P.block_major(torch.arange(288.0).view(1, 144, 2))[..., 0] / 2, wanted)


def test_contrast_by_hand():
    """Unit rows a = (1, 0), (0, 1) and b = (1, 0), (.6, .8); scale 2. Logits 2 a b' = [[2, 1.2], [0, 1.6]]."""
    a, b = torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([[7.0, 0.0], [0.3, 0.4]])        # length is no matter
    rows = [math.log(math.exp(2) + math.exp(1.2)) - 2, math.log(1 + math.exp(1.6)) - 1.6]
    columns = [math.log(math.exp(2) + 1) - 2, math.log(math.exp(1.2) + math.exp(1.6)) - 1.6]
    assert P.contrast(a, b, 2.0).item() == pytest.approx((sum(rows) / 2 + sum(columns) / 2) / 2, abs=1e-6)


def test_cell_loss_by_hand():
    """Two cells, 13 categories: the first holds category 0 (label 1), its box is off by .25 at one edge of four; its
    pattern is 2 of 6, its colours are not known."""
    prediction = torch.zeros(1, 2, 14 + 6 + 14 + 14 + 4)
    prediction[0, :, 1] = 2.0                                    # both cells say: label 1
    prediction[0, 0, 14 + 2] = 3.0                               # and the first says: pattern 2
    label, relative = torch.tensor([[1, 0]]), torch.zeros(1, 2, 4)
    look = torch.tensor([[[2, -1, -1], [-1, -1, -1]]])
    relative[0, 0, 2], relative[0, 1] = 0.25, 9.0                # background boxes do not count
    loss, accuracy = P.cell_loss(prediction, label, look, relative)
    norm = math.log(13 + math.exp(2))                            # of 14 logits
    pattern = math.log(5 + math.exp(3)) - 3
    edges = (0.25 - 0.05 / 2) / 4                                # smooth L1 beyond beta = .05
    assert loss.item() == pytest.approx(((norm - 2) + norm) / 2 + 0.3 * pattern + 3 * edges, abs=1e-6)
    assert accuracy.item() == 1


@pytest.mark.parametrize("step, wanted", [(0, 1 / 50), (24, 0.5), (49, 1), (499, 1), (750, 0.5), (999, 0.002)])
def test_schedule(step, wanted):
    """1,000 steps: 50 up, flat, and from 500 down to 0: (1000 - step) / 500."""
    assert P.schedule(step, 1000) == pytest.approx(wanted)


@pytest.mark.parametrize("recolour", [0, 1])
def test_augmented_boxes_stay_on_their_objects(recolour):
    """One object on black, its extent read from the pixels after mirroring; a shuffled colour has lost its name."""
    images, boxes = np.zeros((20, 168, 168, 3), np.uint8), np.zeros((20, 5, 4), np.float32)
    kinds, rng = np.full((20, 5, 4), 3), np.random.default_rng(1)
    for i in range(20):
        (x1, y1), (x2, y2) = rng.integers(0, 80, 2), rng.integers(90, 168, 2)
        images[i, y1:y2, x1:x2], boxes[i, 0] = (200, 100, 50), (x1, y1, x2, y2)
    out, moved, named, things = P.augmented((images, boxes, kinds, np.arange(20)), np.arange(20), rng, recolour)
    shuffled = 0
    for image, box in zip(out, moved[:, 0]):
        assert Image.fromarray(image).getbbox() == tuple(box)
        x, y = (int(v) for v in box[:2])
        shuffled += not image[y, x, 0] > image[y, x, 1] > image[y, x, 2]
    assert shuffled == 0 if not recolour else shuffled > 10      # five of six orders
    mirrored = sum(not np.array_equal(a, b) for a, b in zip(boxes[:, 0], moved[:, 0]))
    assert 3 < mirrored < 17 and (named[..., :2] == 3).all() and (named[..., 2:] == (-1 if recolour else 3)).all()
    assert things.tolist() == list(range(20)) and (kinds == 3).all() and images.max() == 200     # the bank is untouched


# ----------------------------------------------------------------------------------------------------- what is asked

def test_prompt_is_the_policys(stand_in, questions):
    """Training and use see the same tokens: the stand-in's own processor and Policy.prompts give the same ids."""
    texts = P.question_texts()
    # 13 categories, 5 questions; named by 6 patterns, 14 colours, 14 accents, 2 sides, or pattern and accent.
    assert len(texts) == len(set(texts)) == 13 * 5 * (6 + 14 + 14 + 2 + 6 * 14)
    some = texts[::130]
    prompts = stand_in.prompts([Image.new("RGB", (224, 224))] * len(some), some)
    for text, prompt in zip(some, prompts):
        ids, at = questions.prompts[text]
        assert ids == prompt.ids.tolist()
        assert (prompt.mm_token_type_ids.nonzero().flatten() - at).tolist() == list(range(36))


def test_batches_carry_answers_that_the_policy_can_read(questions, bank):
    """Every answer parses; its box is, loosely, the asked object's or the largest's; weights are where they belong."""
    _, boxes, kinds, things = (np.concatenate([column] * 10) for column in bank)                 # 400 scenes
    batch, tokenizer = questions.batch(boxes, kinds, things, np.random.default_rng(3)), questions.tokenizer
    full = others = largest = doubtful = 0
    for i in range(400):
        begin, answer = int(batch["answer"][i]), answer_ids(questions, batch, i)
        end = begin + len(answer)
        text, (ids, at) = next((t, row) for t, row in questions.prompts.items()
                               if row[0] == batch["ids"][i, :begin].tolist())
        held = sum(kinds[i, :, 0] >= 0) - 1                     # the rest of the things are companions
        share = 0.06 + 0.14 * held + 0.08 * (things[i] - held)
        assert (int(batch["start"][i]), float(batch["crop"][i])) == (at, pytest.approx(share))
        assert (batch["ids"][i, end:] == questions.pad).all()
        asked, shown = (next(s for s in range(5) if kinds[i, s, 0] >= 0 and np.allclose(boxes[i, s] / 168, box))
                        for box in (batch["asked"][i].numpy(), batch["box"][i].numpy()))
        assert P.CATEGORIES[kinds[i, asked, 0]] in text and kinds[i, asked, 0] == kinds[i, shown, 0]
        same = [s for s in range(5) if kinds[i, s, 0] == kinds[i, asked, 0]]
        area = np.prod(boxes[i, :, 2:] - boxes[i, :, :2], -1)
        assert shown in (asked, max(same, key=lambda s: area[s]))
        doubtful += area[asked] < area[same].max()
        largest += shown != asked
        others += asked > 0
        action = parse(tokenizer.decode(answer[:-1]), (168, 168), (224, 224))        # seen at 168 pixels, drawn at 224
        assert answer[-1] == tokenizer.eos_token_id and action.decision in ("FULL", "REGION")
        full += action.decision == "FULL"
        if action.decision == "REGION":
            off = (np.array(action.box) * 168 / 224 - boxes[i, shown]) * (-1, -1, 1, 1)          # outwards
            sides = np.tile(boxes[i, shown, 2:] - boxes[i, shown, :2], 2)
            # Clipped at the image's edge it may lie further inwards than LOOSE says, never further outwards.
            assert (off <= P.LOOSE[1] * sides + 0.51).all() and (off >= P.LOOSE[0] * sides - 0.51).all()
        weight = batch["weight"][i]
        wanted = [3.0 if re.fullmatch("[0-9]", tokenizer.decode([token])) else 0.2 for token in answer]
        wanted[questions.decision] = 0.0                         # it has a soft target instead
        assert weight[begin:end].tolist() == pytest.approx(wanted)
        assert not weight[:begin].any() and not weight[end:].any()
        assert answer[questions.decision] in questions.choices and int(batch["digit"][i]) > begin + 2
    # 8 % of 400 = 32, within 3 * sqrt(400 * .08 * .92) = 16; other things than the target are asked for, too.
    assert 16 <= full <= 48 and others > 50
    assert doubtful > 60 and abs(largest / doubtful - P.SALIENT) < 3 * (0.24 / doubtful) ** 0.5


def test_tokenizer_is_the_shipped_one(stand_in):
    """A change of the recipe that changes the tokens must come with new weights."""
    built = P.build_processor()
    theirs = stand_in.processor.tokenizer
    assert built.tokenizer.get_vocab() == theirs.get_vocab() and built.chat_template == stand_in.processor.chat_template
    model = P.build_policy(built.tokenizer, 0)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in stand_in.model.named_parameters()}
    assert stand_in.system_prompt == P.SYSTEM_PROMPT


# ------------------------------------------------------------------------------------------------------------ scorer

def test_training_pictures_have_the_scorers_geometry():
    rng = np.random.default_rng(0)
    for w, h in ((224, 224), (97, 61), (60, 133), (112, 112)):
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        ours = P.to_pixels(P.shrink_to(image, 112)[None].copy(), "cpu")[0]
        assert torch.allclose(ours, Preprocess(112)(image), atol=1e-5), (w, h)


def test_views_of_both_kinds():
    entities = world.make_entities(156, 0.5, 0, universe="pretrain")
    assert {bool(e.around) for e in entities} == {True, False}
    for index in (0, next(i for i, e in enumerate(entities) if bool(e.around) != bool(entities[0].around))):
        references, queries = P.views_of(index, entities, 0, 112)
        count = 6 if entities[index].around else 2 + 6 * 3       # never cropped where the surroundings tell
        assert references.shape == (6, 112, 112, 3) and queries.shape == (count, 112, 112, 3)
        assert references.dtype == queries.dtype == np.uint8


def test_loosen_stays_near_the_box():
    """Each edge between 12 % of the side inwards and 25 % outwards, inside the image."""
    rng = np.random.default_rng(0)
    boxes = np.array([P.loosen((50, 60, 150, 110), rng) for _ in range(300)])
    low, high = np.array([25, 47.5, 138, 104]), np.array([62, 66, 175, 122.5])       # 100 and 50 pixels wide and high
    assert (boxes >= low).all() and (boxes <= high).all()
    assert (boxes.min(0) < low + 5).all() and (boxes.max(0) > high - 5).all()
    x1, y1, x2, y2 = np.array([P.loosen((0, 0, 224, 224), rng) for _ in range(50)]).T
    assert min(x1.min(), y1.min()) >= 0 and max(x2.max(), y2.max()) <= 224


@pytest.fixture(scope="module")
def data_entities():
    return world.make_entities(1200, 0.25, 0)                    # the data set's defaults


def first_among_siblings(scorer, entities, views):
    """Share of entities (whole families, in order) whose view scores higher with them than with all 5 siblings."""
    rng = np.random.default_rng(8)
    references = [world.photograph(entity, (), rng, "reference")[0] for entity in entities]
    texts = ["\n".join([entity.name, *world.describe(entity)[1]])[:500] for entity in entities]     # as prepare.py
    candidates = fuse(scorer.image_features(references), scorer.text_features(texts)).reshape(-1, 1, 6, scorer.dim)
    queries = scorer.image_features(views).reshape(-1, 6, scorer.dim)                               # (F, 6, D)
    ranked = scores(queries, candidates.repeat(6, 1))                                               # (F, 6, 6)
    return (ranked.argmax(-1) == np.arange(6)).mean()


@pytest.mark.parametrize("name, crops", [("scorer", .85), ("scorer2", .8)])  # the second is trained for less long
def test_shipped_scorer_ranks_siblings(data_entities, name, crops):
    """On entities, names and looks that it has never seen. Chance is 1 of 6."""
    scorer, rng = load_scorer(str(MINI / name)), np.random.default_rng(4)
    shares = {}
    for style in ("among", "around"):
        chosen = [i for i, e in enumerate(data_entities) if bool(e.around) == (style == "around")][:60]
        entities = [data_entities[i] for i in chosen]
        pictures = [world.photograph(e, world.some_others(data_entities, i, rng), rng, style)
                    for i, e in zip(chosen, entities)]
        shares[style, "full"] = first_among_siblings(scorer, entities, [image for image, _, _ in pictures])
        cropped = [crop(image, objects[0][1]) for image, objects, _ in pictures]
        shares[style, "crop"] = first_among_siblings(scorer, entities, cropped)
    # What the world is made for: a crop finds the one among others, and loses what stands around.
    assert shares["among", "crop"] >= crops and shares["among", "full"] <= shares["among", "crop"] - 0.2, shares
    assert shares["around", "full"] >= 0.75 and shares["around", "crop"] <= shares["around", "full"] - 0.4, shares


# ------------------------------------------------------------------------------------------------------------ policy

@pytest.fixture(scope="module")
def seen(stand_in, data_entities):
    """60 scenes of the data set's entities, 40 among others, 12 around, 8 filled -> dict of arrays and lists."""
    rng, out = np.random.default_rng(6), {"image": [], "question": [], "box": [], "largest": [], "things": []}
    for n, style in enumerate(["among"] * 40 + ["around"] * 12 + ["filled"] * 8):
        i = world.pick(rng, [i for i, e in enumerate(data_entities) if bool(e.around) == (style == "around")])
        entity = data_entities[i]
        image, objects, things = world.photograph(entity, world.some_others(data_entities, i, rng), rng, style)
        same = [(e.look, box) for e, box in objects[1:] if e.category == entity.category]
        name = world.pick(rng, world.phrases(entity.look, entity.category, [look for look, _ in same],
                                             world.side_of(objects[0][1], [box for _, box in same])))
        area = [(b[2] - b[0]) * (b[3] - b[1]) for b in (objects[0][1], *(box for _, box in same))]
        row = (image, world.QUESTIONS[entity.kind][n % 5].format(c=name), objects[0][1], area[0] == max(area), things)
        for column, value in zip(out.values(), row):
            column.append(value)
    out = {name: column if name in ("image", "question") else np.array(column) for name, column in out.items()}
    out["forced"] = stand_in.act(out["image"], out["question"], force="REGION", batch_size=60)
    return out


def iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, w) * max(0, h)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def test_shipped_policy_points_at_what_catches_the_eye(seen):
    """At the target where it is the largest of its category; elsewhere r-GRPO has to learn to read the question."""
    values = np.array([iou(action.box, box) for action, box in zip(seen["forced"], seen["box"])])
    assert values[seen["largest"]].mean() >= 0.6 and values[~seen["largest"]].mean() <= 0.4
    assert 0.4 <= values.mean() <= 0.7


def test_shipped_policy_wants_to_crop_where_much_is_seen(seen):
    """Whether it is of use is for r-GRPO to find out."""
    p = np.array([action.p_region for action in seen["forced"]])
    few, many = p[seen["things"] <= 1], p[seen["things"] >= 3]
    assert few.mean() < 0.25 < many.mean() < 0.7 and p.max() < 0.95


@pytest.mark.parametrize("force", [None, "REGION"])
def test_shipped_policy_is_well_formed(stand_in, seen, force):
    """Free greedy decoding, no grammar: with 60 answers, 99 % means every one."""
    actions = stand_in.act(seen["image"], seen["question"], decode="free", force=force, batch_size=60)
    decisions = [action.decision for action in actions]
    assert "MALFORMED" not in decisions, [action.text for action in actions if action.decision == "MALFORMED"]
    if force:
        assert decisions == ["REGION"] * 60
        # The grammar forbids nothing that the stand-in wants to say.
        assert np.mean([iou(a.box, b.box) for a, b in zip(actions, seen["forced"])]) > 0.95
    else:
        assert 3 <= decisions.count("REGION") <= 24              # 5-40 %


# ----------------------------------------------------------------------------------------------------------- leakage

@pytest.mark.parametrize("second", [False, True])
def test_no_name_of_the_data_set_in_the_pretraining_corpus(data_entities, second):
    """All text that any stand-in was trained on, at the recipe's own seeds and sizes."""
    args = P.second_scorer(P.parse_args([])) if second else P.parse_args([])
    assert (args.seed, args.scorer_steps) == ((1, 500) if second else (0, 1100))
    entities = world.make_entities(args.entities, P.AROUND_SHARE, args.seed, universe="pretrain")
    rng = np.random.default_rng([args.seed, 12])                 # as train_scorer
    texts = [P.article(entity, rng) for entity in entities for _ in range(4)]
    for i, entity in enumerate(entities):                        # nor the pretraining names: they are made of letters
        assert not any(entity.name in text for text in texts[4 * i:4 * i + 4])
    texts += P.question_texts() + [P.SYSTEM_PROMPT, P.FULL, P.REGION]
    corpus = {word.lower() for text in texts for word in re.findall("[A-Za-z]+", text)}
    assert {"beetle", "crimson", "spotted", "lives", "where", "region"} <= corpus            # it does hold the texts
    categories = {category.capitalize() for category in P.CATEGORIES}
    for seed in range(3):
        data = world.make_entities(1200, 0.25, seed)
        names = {word for entity in data for word in entity.name.split() + [entity.facts["person"]]} - categories
        assert len(names) > 2400 and not {name.lower() for name in names} & corpus
