"""Raw data -> embeddings -> retrieval index -> the fixed candidate pools that train.py and evaluate.py read.

    python prepare.py                                   # the embedded world: raw/world -> data/world, about a minute
    python prepare.py --dataset evqa --root ~/evqa --scorer FOLDER --out data/evqa

Reads Encyclopedic-VQA's own files (--root):

    {train,val,test}.csv                 questions; columns are found by name
    encyclopedic_kb_wiki.json            wikipedia url -> title, section texts, image urls
    url_to_path_mapping.json             image url -> path below the root
    inat/{train,val}_id2name.json        iNaturalist image id -> path below inat/; test rows use the val file
    landmarks/a/b/c/<id>.jpg             Google Landmarks, by the first three characters of the id

and writes the folder that load_data of scorer.py opens. Everything is embedded once, here: during training a FULL
rollout costs no image encode at all and a REGION rollout costs one. What cannot be used (a 2-hop question, a missing
image, ...) is dropped, counted under its reason, and shown; read = kept + dropped for every split. manifest.json is
written last, so a run that was killed leaves nothing that looks finished.

Simplified: the knowledge base is read whole, in one process (the world has a thousand entries, E-VQA two million).
"""
import argparse
import csv
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field

import faiss
import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from scorer import (POOL_VERSION, Query, load_data, load_scorer, normalise, read_image, replacing, scores, write_array,
                    write_json, write_pool)

COLUMNS = ("question", "question_type", "dataset_name", "dataset_image_ids", "wikipedia_url")
SINGLE_HOP = ("automatic", "templated", "multi_answer", "infoseek")  # what all prior work keeps


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("files")
    group.add_argument("--dataset", choices=("world", "evqa"), default="world",
                       help="both are in E-VQA's format; the name is noted in the manifest (default world)")
    group.add_argument("--root", default="raw/world", help="folder of the raw data (default raw/world)")
    group.add_argument("--out", default="data/world", help="folder to write (default data/world)")
    group.add_argument("--splits", default="train,val,test", help="comma list out of train, val, test (default all)")
    group.add_argument("--limit", type=int, help="read the first N rows of each csv only, N >= 1 (default all)")
    group = parser.add_argument_group("scorer (section 3.3)")
    group.add_argument("--scorer", default="mini/scorer", help="folder of an EVA-CLIP (default mini/scorer)")
    group.add_argument("--device", default="auto", help="auto (cuda if there is one; the default), cpu, cuda, cuda:1")
    group.add_argument("--batch-size", type=int, default=64, help="images or texts a forward pass, >= 1 (default 64)")
    group = parser.add_argument_group("pools (sections 3.1 and 4.1)")
    group.add_argument("--k", type=int, default=20, help="distinct entities a pool, >= 2 (default 20, the paper's)")
    group.add_argument("--text", choices=("release", "title", "lead"), default="release",
                       help="t_j of Eq. 3: title and the first three sections, cut to 500 characters (release, the "
                            "default), the title alone (title), or title and first section, cut likewise (lead)")
    group.add_argument("--candidate-image", choices=("retrieved", "first"), default="retrieved",
                       help="I_j of Eq. 3: the entity's image that matched best (the default) or its first")
    group = parser.add_argument_group("to look at")
    group.add_argument("--visualize", type=int, default=0, metavar="N", help="draw N pools to OUT/pools.png, N >= 0")
    args = parser.parse_args(argv)
    args.splits = args.splits.split(",")
    # Checked here rather than by argparse's `type`, whose message cannot name the legal values.
    if set(args.splits) - {"train", "val", "test"}:
        parser.error(f"--splits {','.join(args.splits)}: expected a comma list out of train, val, test")
    for name, least in (("k", 2), ("batch_size", 1), ("limit", 1), ("visualize", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return args


# ----------------------------------------------------------------------------------------------- reading E-VQA's files

@dataclass
class Drops:
    """Counts what is left out: reason -> how often, and the first case of each, to be looked at."""
    counts: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)

    def add(self, reason, case):
        self.counts[reason] += 1
        self.first.setdefault(reason, case)


@dataclass
class Row:
    """A question that passed the reader."""
    query_id: str
    question: str
    image: str     # path below the root
    positive: str  # wikipedia url = key of the knowledge base
    where: str     # file:line, for messages


def read_json(path):
    """The JSON object in a file; FileNotFoundError or ValueError naming it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing; --root must hold E-VQA's files (the embedded world: "
                                "`python -m mini.world --out raw/world`)")
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); was it written or copied to its end?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object of key: value")
    return content


def read_csv(path, limit=None):
    """Yield (line number, row dict) of a csv that has all COLUMNS. ValueError naming file and column or line."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing; give the splits that you have with --splits")
    csv.field_size_limit(2**31 - 1)  # `evidence` holds whole paragraphs; the default of 128 KiB is an error there
    # utf-8-sig: a byte-order mark left by a spreadsheet would become part of the first column's name.
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        # Read by name: the column order of the released files is not documented.
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path}: column {', '.join(missing)} is missing; it has {reader.fieldnames}")
        try:
            for number, row in enumerate(reader):
                if number == limit:
                    return
                # DictReader marks too many fields by a key None, too few by values None.
                if None in row or None in row.values():
                    raise ValueError(f"{path}:{reader.line_num}: this row does not have the header's "
                                     f"{len(reader.fieldnames)} fields; repair it or delete it")
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from error


def read_rows(root, split, limit, drops):
    """{split}.csv -> (list of Row, number of rows read). Rows that cannot be used go to drops.

    query_id is E-VQA_{split}_{i}, i counted over the single-hop rows in file order. As in prior work i does not depend
    on which images exist, so ids of two machines agree.
    """
    path, rows, read, single_hop, names = os.path.join(root, f"{split}.csv"), [], 0, 0, None
    names_file = f"inat/{'train' if split == 'train' else 'val'}_id2name.json"  # val and test are iNaturalist's val
    for line, raw in read_csv(path, limit):
        read, where = read + 1, f"{path}:{line}"
        if raw["question_type"] not in SINGLE_HOP:
            drops.add(f"question_type {raw['question_type']!r}", where)
            continue
        # Taken before anything else can drop the row, see above.
        query_id, single_hop = f"E-VQA_{split}_{single_hop}", single_hop + 1
        image_id = raw["dataset_image_ids"].split("|")[0].strip()  # all prior work takes the first of up to five
        if raw["dataset_name"] == "inaturalist":
            # Opened at the first need: a set of landmarks alone comes without it.
            names = names if names is not None else read_json(os.path.join(root, names_file))
            image = f"inat/{names[image_id]}" if image_id in names else None
        elif raw["dataset_name"] == "landmarks":
            image = "/".join(("landmarks", *image_id[:3], f"{image_id}.jpg")) if len(image_id) >= 3 else None
        else:
            drops.add(f"dataset_name {raw['dataset_name']!r}", where)
            continue
        if image is None:
            drops.add("image id unknown", f"{where}: {raw['dataset_name']} {image_id!r}")
        elif not raw["question"].strip():
            drops.add("question empty", where)
        else:
            # The url verbatim, as all prior work compares it: decoding %C3 and the like would merge entries.
            rows.append(Row(query_id, raw["question"], image, raw["wikipedia_url"], where))
    return rows, read


def candidate_text(entry, kind):
    """t_j of Eq. 3 for a knowledge-base entry; "" when it has none. kind: see --text."""
    sections = {"release": entry["section_texts"][:3], "lead": entry["section_texts"][:1], "title": []}[kind]
    text = "\n".join([entry["title"], *sections])
    # Characters, as in the authors' release; the tokenizer then cuts to its context, often before that.
    return text[:500] if text.strip() else ""


def read_kb(root, kind, entry_drops, image_drops):
    """encyclopedic_kb_wiki.json -> (entities, entries read, images read).

    entities: dicts as kb.jsonl stores them (entity_id, title, text, images below the root), in file order; images not
    yet opened. An entry without any image url goes to entry_drops, a single image without a file to image_drops.
    """
    path = os.path.join(root, "encyclopedic_kb_wiki.json")
    kb, files = read_json(path), read_json(os.path.join(root, "url_to_path_mapping.json"))
    entities, images_read = [], 0
    for url, entry in kb.items():
        # A field of another shape means another file format, not a bad entry: stop instead of dropping them all.
        for name, kind_of in (("title", str), ("section_texts", list), ("image_urls", list)):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind_of):
                raise ValueError(f"{path}: entry {url!r}: field {name!r} is missing or no {kind_of.__name__}")
        images_read += len(entry["image_urls"])
        if not entry["image_urls"]:
            entry_drops.add("entry has no image", url)
            continue
        images = {}  # an ordered set: urls do repeat
        for image_url in entry["image_urls"]:
            if image_url not in files:
                image_drops.add("image url not in url_to_path_mapping.json", f"{url}: {image_url}")
            elif files[image_url] in images:
                image_drops.add("image repeated in its entry", f"{url}: {image_url}")
            else:
                images[files[image_url]] = None
        entities.append({"entity_id": url, "title": entry["title"], "text": candidate_text(entry, kind),
                         "images": list(images)})
    return entities, len(kb), images_read


# ----------------------------------------------------------------------------------------------------------- embedding

def embed_images(scorer, root, paths, what):
    """Image files -> (float16 [P', D] un-normalised, in order, of those that can be read; {path: (reason, message)} of
    the others). A file that cannot be decoded never becomes a feature: a grey stand-in would rank like any image.
    """
    features, bad = [np.zeros((0, scorer.dim), np.float16)], {}  # the empty start gives [0, D] for no path
    with tqdm(total=len(paths), desc=what, unit="image", disable=None) as bar:
        for start in range(0, len(paths), scorer.batch_size):
            images, batch = [], paths[start:start + scorer.batch_size]
            for path in batch:
                try:
                    images.append(read_image(os.path.join(root, path)))
                except FileNotFoundError as error:
                    bad[path] = ("image missing", str(error))
                except ValueError as error:
                    bad[path] = ("image unreadable", str(error))
            # float16 halves the files; at length ~10 its steps move a cosine by about 1e-5.
            features.append(scorer.image_features(images).astype(np.float16))
            bar.update(len(batch))
    return np.concatenate(features), bad  # [P', D]


def embed_kb(scorer, root, entities, entry_drops, image_drops):
    """-> (entities that have a readable image, kb_image float16 [M, D], kb_entity int32 [M], kb_text float16 [E, D]).

    The rows of an entity are consecutive and in the order of its images; a row of zeros in kb_text means no text.
    """
    paths = list(dict.fromkeys(path for entity in entities for path in entity["images"]))  # entries may share a file
    features, bad = embed_images(scorer, root, paths, "knowledge base images")
    row_of = {path: row for row, path in enumerate(path for path in paths if path not in bad)}
    kept, rows, owners = [], [], []
    for entity in entities:
        for path in entity["images"]:
            if path in bad:
                image_drops.add(bad[path][0], f"{entity['entity_id']}: {bad[path][1]}")
        images = [path for path in entity["images"] if path in row_of]
        if not images:
            entry_drops.add("no image of the entry can be read", entity["entity_id"])
            continue
        # Only the images that have a feature are listed, so that row and path can be matched by counting.
        rows += [row_of[path] for path in images]
        owners += [len(kept)] * len(images)
        kept.append({**entity, "images": images})
    kb_text = np.zeros((len(kept), scorer.dim), np.float16)  # [E, D]
    with_text = [i for i, entity in enumerate(kept) if entity["text"]]
    batches = range(0, len(with_text), scorer.batch_size)
    for start in tqdm(batches, desc="knowledge base texts", unit="batch", disable=None):
        part = with_text[start:start + scorer.batch_size]
        kb_text[part] = scorer.text_features([kept[i]["text"] for i in part])
    return kept, features[rows], np.array(owners, np.int32), kb_text


def embed_queries(scorer, root, rows, split, drops):
    """Rows -> (rows whose image can be read, float16 [Q, D] of their full images). An image is embedded once."""
    paths = list(dict.fromkeys(row.image for row in rows))
    features, bad = embed_images(scorer, root, paths, f"{split} images")
    row_of = {path: i for i, path in enumerate(path for path in paths if path not in bad)}
    for row in rows:
        if row.image in bad:
            drops.add(bad[row.image][0], f"{row.where}: {bad[row.image][1]}")
    kept = [row for row in rows if row.image in row_of]
    return kept, features[[row_of[row.image] for row in kept]]  # [Q, D]


# ----------------------------------------------------------------------------------------------------------- retrieval

def build_index(kb_image):
    """faiss index of cosines: inner products of normalised image features [M, D]. Exact, not approximate: no luck."""
    index = faiss.IndexFlatIP(kb_image.shape[1])
    for start in range(0, len(kb_image), 1 << 16):  # in blocks: the whole in float32 would be twice the file
        index.add(normalise(kb_image[start:start + (1 << 16)]))
    return index


def retrieve(index, kb_entity, queries, k):
    """For each query [Q, D] the k distinct entities whose best image matches best.

    -> (entities [Q, k], image rows [Q, k], cosines [Q, k]), best first, equal cosines by image row. The nearest k
    images may belong to few entities, so the search goes deeper for the queries that have not found k yet.
    """
    total, depth = index.ntotal, min(index.ntotal, 4 * k)
    found = np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k))
    todo = np.arange(len(queries))
    while len(todo):
        # Only the unfinished queries search again, four times deeper each time: most are done in the first round.
        cosines, rows = index.search(normalise(queries[todo]), depth)  # [Q', depth]
        unfinished = []
        for i, cosine, row in zip(todo, cosines, rows, strict=True):
            order = np.lexsort((row, -cosine))  # faiss leaves the order of equal cosines open
            entity = kb_entity[row[order]]
            first = np.sort(np.unique(entity, return_index=True)[1])[:k]  # best image of each entity, best entity first
            if len(first) < k and depth < total:
                unfinished.append(i)
            elif len(first) < k:
                raise ValueError(f"the index holds {len(first)} entities, a pool needs {k}: lower --k")
            else:
                for array, values in zip(found, (entity, row[order], cosine[order]), strict=True):
                    array[i] = values[first]
        todo, depth = np.array(unfinished, np.int64), min(total, 4 * depth)
    return found


def make_pools(rows, found, entities, kb_entity, candidate_image):
    """Rows and what they retrieved -> list of Query; label 1 where the entity's url is the row's, verbatim."""
    first_image = np.searchsorted(kb_entity, np.arange(len(entities)))  # rows of an entity are consecutive
    queries = []
    for row, pool, image, cosine in zip(rows, *found, strict=True):
        image = image if candidate_image == "retrieved" else first_image[pool]
        labels = [int(entities[j]["entity_id"] == row.positive) for j in pool]
        queries.append(Query(row.query_id, row.image, row.question, pool.tolist(), image.tolist(), labels,
                             [round(float(c), 6) for c in cosine], [row.positive]))
    return queries


# ----------------------------------------------------------------------------------------------------------- the stage

def prepare_split(split, args, scorer, index, entities, kb_entity, known):
    """Read, embed, retrieve and write one split; returns its entry in the manifest."""
    drops = Drops()
    rows, read = read_rows(args.root, split, args.limit, drops)
    rows, full = embed_queries(scorer, args.root, rows, split, drops)  # [Q, D]
    queries = make_pools(rows, retrieve(index, kb_entity, full, args.k), entities, kb_entity, args.candidate_image)
    keep = []
    for i, (row, query) in enumerate(zip(rows, queries, strict=True)):
        # Training learns from the positive's rank, so a pool without it teaches nothing. val and test keep all: there a
        # miss counts as 0, and dropping it would flatter every method.
        if split != "train" or 1 in query.labels:
            keep.append(i)
        else:
            drops.add("positive not in the pool" if row.positive in known else "positive not in the knowledge base",
                      f"{row.where}: {row.positive}")
    if not keep:
        raise ValueError(f"{args.root}/{split}.csv: none of {read} rows can be used: {dict(drops.counts)}; "
                         f"first cases: {drops.first}")
    queries = [queries[i] for i in keep]  # the same choice for both files: row i of one belongs to line i of the other
    write_array(os.path.join(args.out, f"{split}_full.npy"), full[keep])
    write_pool(os.path.join(args.out, f"{split}.jsonl"), queries)
    return {"rows_read": read, "kept": len(queries), "with_positive": sum(1 in query.labels for query in queries),
            "dropped": dict(drops.counts), "first_dropped": drops.first}


def write_kb(out, entities, kb_image, kb_entity, kb_text, index):
    with replacing(os.path.join(out, "kb.jsonl")) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(entity, ensure_ascii=False) + "\n" for entity in entities)
    for name, array in (("kb_image", kb_image), ("kb_entity", kb_entity), ("kb_text", kb_text)):
        write_array(os.path.join(out, f"{name}.npy"), array)
    with replacing(os.path.join(out, "index.faiss")) as temporary:
        faiss.write_index(index, temporary)


def describe(path):
    """Size and sha256 of a written file: load_data compares the size, and a run's identity rests on the hash."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def prepare(args):
    """The whole stage; returns the manifest. args: see parse_args."""
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    scorer = load_scorer(args.scorer, device)
    scorer.batch_size = args.batch_size
    os.makedirs(args.out, exist_ok=True)
    manifest_file = os.path.join(args.out, "manifest.json")
    if os.path.exists(manifest_file):
        os.remove(manifest_file)  # before the first file changes: an old manifest must not vouch for new files
    entry_drops, image_drops = Drops(), Drops()
    entities, entries_read, images_read = read_kb(args.root, args.text, entry_drops, image_drops)
    entities, kb_image, kb_entity, kb_text = embed_kb(scorer, args.root, entities, entry_drops, image_drops)
    if len(entities) < args.k:
        raise ValueError(f"{args.root}/encyclopedic_kb_wiki.json: {len(entities)} of {entries_read} entries have a "
                         f"readable image, a pool needs {args.k}: lower --k or restore images; left out: "
                         f"{dict(entry_drops.counts + image_drops.counts)}")
    index = build_index(kb_image)
    write_kb(args.out, entities, kb_image, kb_entity, kb_text, index)
    kb = {"entries_read": entries_read, "kept": len(entities), "dropped": dict(entry_drops.counts),
          "images_read": images_read, "images": len(kb_image), "images_dropped": dict(image_drops.counts),
          "first_dropped": {**entry_drops.first, **image_drops.first}}
    known = {entity["entity_id"] for entity in entities}
    # One split after the other, so that only one split's features are in memory.
    splits = {split: prepare_split(split, args, scorer, index, entities, kb_entity, known) for split in args.splits}
    names = ["kb.jsonl", "kb_image.npy", "kb_entity.npy", "kb_text.npy", "index.faiss",
             *(name for split in args.splits for name in (f"{split}.jsonl", f"{split}_full.npy"))]
    # Everything that a later stage would otherwise have to be told again, or would guess.
    manifest = {
        "version": POOL_VERSION, "dataset": args.dataset, "args": vars(args),
        "root": os.path.relpath(args.root, args.out),  # so that raw/ and data/ can move together
        "scorer": scorer.identity, "scorer_name": scorer.name, "K": args.k, "dim": scorer.dim,
        "splits": splits, "kb": kb,
        "files": {name: describe(os.path.join(args.out, name)) for name in names},
        "packages": {module.__name__: module.__version__ for module in (torch, faiss, np, PIL)}}
    write_json(manifest_file, manifest)
    return manifest


def table(manifest):
    """The counts that a reader should see, as text."""
    kb, lines = manifest["kb"], [f"{'':>8}{'read':>9}{'kept':>9}{'dropped':>9}{'positive in pool':>18}"]
    groups = [("kb", kb["entries_read"], kb["kept"], ""), ("images", kb["images_read"], kb["images"], "")]
    groups += [(name, split["rows_read"], split["kept"],
                f"{split['with_positive']} = {split['with_positive'] / split['kept']:.3f}")
               for name, split in manifest["splits"].items()]
    lines += [f"{name:>8}{read:>9}{kept:>9}{read - kept:>9}{positive:>18}" for name, read, kept, positive in groups]
    dropped = [("kb", kb["dropped"], kb["first_dropped"]), ("images", kb["images_dropped"], kb["first_dropped"])]
    dropped += [(name, split["dropped"], split["first_dropped"]) for name, split in manifest["splits"].items()]
    lines += [f"{name:>8} dropped {count}: {reason} (first: {first[reason]})"
              for name, counts, first in dropped for reason, count in counts.items()]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- to look at

def draw_pools(out, count, cell=128, negatives=6):
    """OUT/pools.png: one line a query: its image, the positive (green), and the negatives that score best with the full
    image (Eq. 4), each with its rank and score. Reads what was written, so it also shows that it can be read."""
    with open(os.path.join(out, "manifest.json"), encoding="utf-8") as file:
        splits = list(json.load(file)["splits"])
    data = load_data(out, "val" if "val" in splits else splits[0])  # val: test is not to choose by
    with_positive = [i for i, query in enumerate(data.queries) if 1 in query.labels]
    # Spread over the file: its first rows are often of one species.
    chosen = [with_positive[n * len(with_positive) // count] for n in range(min(count, len(with_positive)))]
    sheet = Image.new("RGB", ((2 + negatives) * (cell + 8), max(1, len(chosen)) * (cell + 54)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, i in enumerate(chosen):
        query, top = data.queries[i], line * (cell + 54)
        full = scores(data.full[i], data.candidates(i))  # [K]
        order = np.argsort(-full, kind="stable")  # ties in pool order, as the metrics break them
        ranked = list(enumerate(order.tolist(), 1))
        shown = [(r, k) for r, k in ranked if query.labels[k]][:1] + [(r, k) for r, k in ranked if not query.labels[k]]
        pen.text((4, top + 2), f"{query.query_id}  {query.question}", fill="black")
        sheet.paste(ImageOps.contain(data.open_image(i), (cell, cell)), (4, top + 20))
        for column, (rank, k) in enumerate(shown[:1 + negatives], 1):
            left, entity = column * (cell + 8), data.entity(query.pool[k])
            image = ImageOps.contain(read_image(data.candidate_image_path(query.pool_image[k])), (cell, cell))
            sheet.paste(image, (left, top + 20))
            if query.labels[k]:
                frame = (left - 2, top + 18, left + image.width + 1, top + 21 + image.height)
                pen.rectangle(frame, outline="green", width=2)
            pen.text((left, top + cell + 22), f"{rank}: {full[k]:.3f}\n{entity['title'][:20]}", fill="black")
    path = os.path.join(out, "pools.png")
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def main(argv=None):
    args = parse_args(argv)
    try:
        print(table(prepare(args)))
        if args.visualize:
            print(f"pools drawn to {draw_pools(args.out, args.visualize)}")
    except (FileNotFoundError, ValueError) as error:  # the messages name file, row and remedy; a trace adds nothing
        raise SystemExit(f"prepare.py: {error}") from error


if __name__ == "__main__":
    main()
