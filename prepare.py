"""Raw data -> features -> the fixed candidate pools that train.py and evaluate.py read.

    python prepare.py                                   # the embedded world: raw/world -> data/world, under a minute
    python prepare.py --dataset evqa --root ~/evqa --scorer BAAI/EVA-CLIP-8B --out data/evqa --limit 500   # a trial
    torchrun --nproc_per_node=8 prepare.py --dataset infoseek --root ~/infoseek --scorer FOLDER --out data/infoseek

Reads the benchmarks as users have them. Below --root, and where other names are in use, a flag:

    {train,val,test}.csv                    E-VQA's questions; columns are found by name
    infoseek_{train,test}_filtered.csv      InfoSeek in the same columns, as EchoSight gives it, or the official files:
    infoseek_{train,val}.jsonl, infoseek_{train,val}_withkb.jsonl, and Wiki6M_ver_1_0_title_only.jsonl if it is there
    encyclopedic_kb_wiki.json               url -> title, section texts, image urls (InfoSeek: wiki_100_dict_v4.json)
    url_to_path_mapping.json                image url -> path below the root; other sources: --kb-images
    inat/{train,val}_id2name.json           iNaturalist image id -> path below inat/; may also lie beside inat/
    landmarks/a/b/c/<id>.jpg, oven_images/04/oven_04925844.jpg, or flat, with any extension

`prepare` is the whole stage on one screen. Below it, in its order:

    read_questions    the rows of a split             question_file, official_infoseek, read_csv, read_jsonl
    find_images       their image ids -> files        find_ids, find_files
    read_kb           entities and their images       stream_json; image_files: image url -> file
    embed             features, each made once        Features (on disk), embed_images, embed_texts
    write_kb          the knowledge base's features
    write_pools       K candidates a query            nearest_entities (exact), listed_entities (--retrieved)
    write_manifest    what was done and left out      table

What cannot be used is dropped, counted under one of REASONS, and shown: read = kept + dropped. An image is embedded
once: its feature stays in OUT.work, so a run that was killed, or has other settings, or one more image, embeds only
what is missing. manifest.json comes last: a killed run leaves nothing that looks whole. Of several processes each reads
all and embeds its share; the first one then searches and writes. They speak by the files of OUT.work alone.
"""
import argparse
import csv
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import time
import urllib.parse
import zipfile
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

import faiss
import numpy as np
import PIL
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from scorer import (ARRAYS, InputError, Lines, Query, TooLarge, hold, load_scorer, normalise, read_image, read_trec,
                    replacing, trec_id, write_array, write_json, write_split)

# Every reason for which something is left out. Some are counted apart by a detail, as "question_type '2_hop'".
REASONS = (
    # a row of a question file
    "question_type", "dataset_name", "question empty", "data_id repeated", "data_id not in the withkb file",
    "entity held out for val", "entity left to train",       # InfoSeek has no third split: val is cut out of train
    "image id unknown",                                      # to iNaturalist's list, or the row has none
    "query not in the run", "too few candidates in the run",  # of --retrieved
    # the same, of train alone: a pool without the positive teaches nothing
    "positive not in the knowledge base", "positive has no image", "positive not in the pool",
    # an image, of a row or of an entry
    "image missing", "image unreadable", "image too large",
    # an entry of the knowledge base, with its images
    "entry repeated", "entry beyond --limit", "entry in no pool", "entry has no image",
    "no image of the entry can be read",
    # an image that an entry lists
    "image url not in", "image name ambiguous", "image repeated in its entry")
FAULTS = ("", "image missing", "image unreadable", "image too large")  # what a state of Features says
COLUMNS = ("question", "question_type", "dataset_name", "dataset_image_ids", "wikipedia_url")
SINGLE_HOP = ("automatic", "templated", "multi_answer", "infoseek")  # what all prior work keeps
KB_NAMES = {"infoseek": ("wiki_100_dict_v4.json", "encyclopedic_kb_wiki.json", "wiki_corpus.json"),
            "evqa": ("encyclopedic_kb_wiki.json", "wiki_corpus.json"), "world": ("encyclopedic_kb_wiki.json",)}
WIKIPEDIA = "https://en.wikipedia.org/wiki/"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
NO_IMAGE, IN_NO_POOL = -1, -2  # of a positive in place of its entity
CHUNK = 1 << 18        # characters of JSON read at once
LONGEST = 1 << 28      # characters of an entry: what is longer is damaged, and would be read to its end in vain
PIECE = 4096           # images or texts a file of OUT.work: what a kill costs at most
HELD_OUT = 100         # InfoSeek: one entity in so many goes to val
SPARE = 5              # entities beyond K that are taken from a run, for those without a readable image
EQUAL = 5e-7           # cosines closer than this are taken for equal: float32 products differ by as much


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("files").add_argument
    add("--dataset", choices=("world", "evqa", "infoseek"), default="world", help="names to look for (default world)")
    add("--root", default="raw/world", help="folder of the raw data (default raw/world)")
    add("--out", default="data/world", help="folder to write (default data/world)")
    add("--splits", default="train,val,test", help="comma list out of train, val, test (default all)")
    add("--limit", type=int, default=0, metavar="N", help="a trial: the first N rows of each split, and of the "
        "knowledge base their positives and the first N (or 10 K) entries: easier than the real pools (default 0: all)")
    add("--kb", help="knowledge base, relative to the root (default: the first known name there)")
    add("--kb-images", default="url_to_path_mapping.json", help="where its images are, relative to the root: a .json "
        "of url -> path (default), a folder with OMGM's wiki_image_url_part_*_processed.csv, or one with image files "
        "called as in their urls (AToMiC's parquet: tools/atomic.py)")
    add("--inat", default="inat", help="folder of iNaturalist 2021, relative to the root (default inat)")
    add("--landmarks", default="landmarks", help="folder of Google Landmarks v2 train, likewise (default landmarks)")
    add("--oven", help="folder of OVEN's images, likewise (default oven_images if it is there, else the whole root)")
    add("--query-image", choices=("first", "any", "all"), default="first", help="of a row's up to five images the "
        "first, as prior work (default), the first that is there (any), or all: a query each, with ids ID.0, ID.1 ...")
    add = parser.add_argument_group("scorer (section 3.3)").add_argument
    add("--scorer", default="mini/scorer", help="folder, Hugging Face id or open_clip:NAME/TAG (default mini/scorer)")
    add("--scorer-dtype", choices=("float32", "bfloat16", "float16"),
        help="of its weights (default bfloat16 on CUDA, float32 on a CPU)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, or auto: CUDA if there is any (default auto)")
    add("--batch-size", type=int, default=64, help="images or texts a forward pass (default 64)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that open images; 0: none, for a "
        "small /dev/shm (default: as many as cores, at most 8)")
    add("--delete-features", action="store_true", help="remove OUT.work at the end; the next run then embeds all again")
    add = parser.add_argument_group("pools (sections 3.1 and 4.1)").add_argument
    add("--k", type=int, default=20, help="distinct entities a pool, >= 2 (default 20, the paper's)")
    add("--text", choices=("release", "title", "lead", "caption"), default="release", help="t_j of Eq. 3, at most 500 "
        "characters: title and three sections (release, default), title, title and first section, title and captions")
    add("--candidate-image", choices=("retrieved", "first"), default="retrieved",
        help="I_j of Eq. 3: the entity's image that matched best (default), or its first")
    add("--top", choices=("entities", "images"), default="entities", help="the pool is the top K entities (default, "
        "the paper), or only those among the top K images count as found (EchoSight; the rest is labelled 0)")
    add("--retrieved", nargs="+", metavar="RUN", help="TREC runs of another engine (tools/echosight.py, mine.py, "
        "runs.py): their first K entities are the pools, and only these are embedded")
    args = parser.parse_args(argv)
    args.splits = list(dict.fromkeys(args.splits.split(",")))  # a split named twice would count its drops twice
    if set(args.splits) - {"train", "val", "test"}:
        parser.error(f"--splits {','.join(args.splits)}: expected a comma list out of train, val, test")
    for name, least in (("k", 2), ("batch_size", 1), ("limit", 0), ("workers", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if args.retrieved and args.top == "images":
        parser.error("--top images counts images, but a run of --retrieved ranks entities")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        manifest = prepare(args)
    except (InputError, OSError) as error:  # the message names file, row and remedy
        full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
        remedy = f": the disk is full; what was embedded stays in {args.out}.work, so make room and run again" * full
        raise SystemExit(f"prepare.py: {error}{remedy}") from error
    if manifest:
        print(table(manifest))


def prepare(args):
    """The whole stage; returns the manifest, or None in the processes of torchrun that only embed."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = tqdm.write if rank == 0 else (lambda text: None)
    say(f"Loading {args.scorer}, then the questions and the names of their images ...")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # or all would put 16 GB of weights on the first card
    scorer = load_scorer(args.scorer, device, args.scorer_dtype)
    scorer.batch_size = args.batch_size
    work = os.path.normpath(args.out) + ".work"  # beside the data folder: who copies that needs only the result
    for folder in (args.out, work):
        os.makedirs(folder, exist_ok=True)
    if rank == 0:
        lock = hold(work, "--out")  # noqa: F841 (let go of when this function ends)
        if os.path.exists(old := os.path.join(args.out, "manifest.json")):
            os.remove(old)  # it would vouch for files that are about to change

    splits = [read_questions(args, name) for name in args.splits]
    find_images(args, splits)
    run = {query: ids for path in args.retrieved or () for query, ids in read_trec(path).items()}
    say("The knowledge base, after the list of its images ...")
    kb = read_kb(args, splits, run, os.path.join(work, f"kb-{rank}.jsonl"), quiet=rank > 0)

    images, texts = (Features(work, kind, scorer, rank, world) for kind in ("image", "text"))
    for split in splits:
        paths = list(dict.fromkeys(row.image for row in split.rows))
        split.place = dict(zip(paths, embed_images(args, scorer, images, paths, str, f"{split.name} images").tolist()))
    kb.place = embed_images(args, scorer, images, kb.distinct, kb.files.path, "kb images")
    kb.text_place = embed_texts(scorer, texts, kb)
    manifest = None
    if rank == 0:
        if world > 1:  # torchrun gives each process one thread, and the others have ended
            faiss.omp_set_num_threads(os.cpu_count() or 1)
        write_kb(args, kb, images, texts)
        counts = {split.name: write_pools(args, split, kb, images, run, device) for split in splits}
        manifest = write_manifest(args, scorer, kb, counts)
    os.remove(kb.draft)
    if rank == 0 and args.delete_features:
        shutil.rmtree(work)
    return manifest


class Drops:
    """Counts what is left out: reason -> how often, and the first case of each, to be looked at."""

    def __init__(self):
        self.counts, self.first = Counter(), {}

    def add(self, reason, case, detail="", times=1):
        assert reason in REASONS, reason
        if times:
            reason = whole(f"{reason} {detail}".strip())
            self.counts[reason] += times
            self.first.setdefault(reason, whole(case))  # it is printed, and written to the manifest


def whole(text):
    """The text without halves of surrogate pairs (a lone \\ud83d in JSON), which no tokenizer and no file takes."""
    return text.encode("utf-8", "replace").decode()


def hash8(text):
    """64 bits of a text, never 0: among 10 million urls the odds that any two are equal are 3 in a million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


# ---------------------------------------------------------------------------------------------------------- questions

@dataclass(slots=True)
class Row:
    """A question that passed the reader."""
    query_id: str
    question: str
    collection: str       # where its image is: inat/train, inat/val, landmarks or oven
    image_ids: list       # of the collection, at least one
    positives: tuple      # urls that its entity may have, the likeliest first; E-VQA: exactly one
    title: str            # finds its entity where none of the urls is there; "" in E-VQA
    where: str            # file:line, for messages
    image: str = ""       # path below the root
    positive: str = ""    # url of the entity


@dataclass
class Split:
    name: str
    file: str
    read: int = 0                              # rows; with --query-image all, images of rows
    rows: list = field(default_factory=list)   # of Row
    drops: Drops = field(default_factory=Drops)
    place: dict = field(default_factory=dict)  # path of an image -> its place in Features

    def check(self):
        """InputError when nothing is left of the split."""
        if not self.rows:
            raise InputError(f"{self.file}: none of {self.read} rows can be used for {self.name}: "
                             f"{dict(self.drops.counts)}; first cases: {self.drops.first}. Mend that, or leave the "
                             "split out with --splits" + " (and train with --eval-every 0)" * (self.name == "val"))


def read_questions(args, name):
    """A split's file -> Split, with the rows that can be used; their images are not yet looked for.

    query_id is data_id for InfoSeek's questions, else E-VQA_{split}_{i}, i counted over the single-hop rows in file
    order. As in prior work i does not depend on which images exist, so ids of two machines agree.
    """
    split, single_hop, ids = Split(name, question_file(args, name)), 0, set()
    lines = official_infoseek(split.file) if split.file.endswith(".jsonl") else read_csv(split.file, COLUMNS)
    collections = {"inaturalist": f"inat/{'train' if name == 'train' else 'val'}",  # test rows use iNaturalist's val
                   "landmarks": "landmarks", "infoseek": "oven"}
    for line, raw in islice(lines, args.limit or None):
        where, kind, collection = f"{split.file}:{line}", raw["question_type"], collections.get(raw["dataset_name"])
        # The url verbatim, as all prior work compares it: decoding %C3 and the like would merge entries.
        urls = raw["urls"] if "urls" in raw else (raw["wikipedia_url"],)
        image_ids = [image_id.strip() for image_id in raw["dataset_image_ids"].split("|")]
        if kind == "infoseek" and "data_id" not in raw:
            raise InputError(f"{split.file}: column data_id is missing, InfoSeek's questions are known by it")
        query_id, detail = raw["data_id"] if kind == "infoseek" else f"E-VQA_{name}_{single_hop}", ""
        single_hop += kind in SINGLE_HOP
        if kind not in SINGLE_HOP:
            reason, detail = "question_type", repr(kind)
        elif collection is None:
            reason, detail = "dataset_name", repr(raw["dataset_name"])
        elif not urls:
            reason = "data_id not in the withkb file"
        elif not image_ids[0]:
            reason = "image id unknown"
        elif not raw["question"].strip():
            reason = "question empty"
        elif query_id in ids:
            reason = "data_id repeated"
        elif args.dataset == "infoseek" and name != "test" and (name == "val") != (
                zlib.crc32(urls[0].encode()) % HELD_OUT == 0):  # by entity; crc32 is the same everywhere
            reason = "entity held out for val" if name == "train" else "entity left to train"
        else:
            reason = ""
            ids.add(query_id)
        queries = [(query_id, image_ids)]
        if args.query_image == "all":
            queries = [(f"{query_id}.{n}", [image_id]) for n, image_id in enumerate(image_ids)]
        split.read += len(queries)
        if reason:
            split.drops.add(reason, f"{where}: {query_id}", detail, len(queries))
        else:  # never question_original: it names the answer
            split.rows += [Row(query, raw["question"], collection, ids_, urls, raw.get("title", ""), where)
                           for query, ids_ in queries]
    return split


def question_file(args, split):
    """The file that holds a split's questions; FileNotFoundError naming those that would do."""
    if args.dataset == "infoseek":  # "test" is the official val, as in everybody's numbers: test has no answers
        names = ("infoseek_test_filtered.csv", "infoseek_val.jsonl") if split == "test" else (
            "infoseek_train_filtered.csv", "infoseek_train.jsonl")
    else:
        names = (f"{split}.csv", "train_full_image_cleaned.csv")[:1 + (split == "train")]
    for name in names:
        if os.path.isfile(path := os.path.join(args.root, name)):
            return path
    raise FileNotFoundError(f"{os.path.join(args.root, names[0])}{''.join(f' (or {name})' for name in names[1:])} is "
                            "missing; give the splits that you have with --splits")


def official_infoseek(path):
    """Yield (line number, row in E-VQA's columns) of infoseek_*.jsonl; urls empty where its withkb file has no entity.

    The official files name an entity by its Wikidata id and title, the knowledge base by its url. The title is that of
    Wiki6M if its file is there (titles change), else of withkb. Its urls: as is, percent-encoded, both with a capital.
    """
    titles, urls, folder = {}, {"": ()}, os.path.dirname(path)
    entity_of = {row["data_id"]: (row["entity_id"], row["entity_text"]) for _, row in read_jsonl(
        path.replace(".jsonl", "_withkb.jsonl"), ("data_id", "entity_id", "entity_text"))}
    wanted = {entity for entity, _ in entity_of.values()}
    for name in ("Wiki6M_ver_1_0_title_only.jsonl", "Wiki6M_ver_1_0.jsonl", "Wiki6M_ver_1_0.jsonl.gz"):
        if os.path.isfile(file := os.path.join(folder, name)) and not titles:
            titles = {row["wikidata_id"]: row["wikipedia_title"] for _, row in read_jsonl(
                file, ("wikidata_id", "wikipedia_title")) if row["wikidata_id"] in wanted}
    for line, row in read_jsonl(path, ("data_id", "image_id", "question")):
        entity, text = entity_of.get(row["data_id"], ("", ""))
        title = titles.get(entity, text)
        if title not in urls:  # one tuple for the many rows of an entity
            name = title.strip().replace(" ", "_")
            urls[title] = tuple(dict.fromkeys(WIKIPEDIA + form for name in (name, name[:1].upper() + name[1:])
                                              for form in (name, urllib.parse.quote(name, safe="/:,()!*'@;~$"))))
        yield line, {"data_id": row["data_id"], "question": row["question"], "question_type": "infoseek",
                     "dataset_name": "infoseek", "dataset_image_ids": row["image_id"], "title": title,
                     "urls": urls[title]}


def needed(path):
    """The path again; FileNotFoundError when no file is there."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing; --root must hold the benchmark's files (the embedded world: "
                                "`python -m mini.world --out raw/world`)")
    return path


def read_csv(path, columns):
    """Yield (line number, row dict) of a csv that has all columns. InputError naming file and column or line."""
    csv.field_size_limit(2**31 - 1)  # `evidence` holds whole paragraphs; the default of 128 KiB is an error there
    # utf-8-sig: a byte-order mark left by a spreadsheet would become part of the first column's name.
    with open(needed(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            # Read by name: the column order of the released files is not documented.
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise InputError(f"{path}: column {', '.join(missing)} is missing; it has {reader.fieldnames}")
            for row in reader:
                if None in row or None in row.values():  # how DictReader marks too many fields, and too few
                    raise InputError(f"{path}:{reader.line_num}: this row does not have the header's "
                                     f"{len(reader.fieldnames)} fields; repair it or delete it")
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: no csv in UTF-8 soon after line {reader.line_num} ({error})") from error


def read_jsonl(path, fields):
    """Yield (line number, dict) of a file of JSON lines, plain or .gz. fields: texts that each must have."""
    number = 0
    with (gzip.open if path.endswith(".gz") else open)(needed(path), "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():  # a last line may end twice
                    row = json.loads(line.decode("utf-8"))
                    if missing := [name for name in fields if type(row) is not dict or type(row.get(name)) is not str]:
                        raise InputError(f"{path}:{number}: field {', '.join(missing)} is missing or no text; is this "
                                         "the file that its name says?")
                    yield number, {**row, **{name: whole(row[name]) for name in fields}}
        except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}:{number}: not a line of JSON ({error}); was it copied to its end?") from error


# ---------------------------------------------------------------------------------------------- images of questions

def find_images(args, splits):
    """Give each Row its image; rows without one go to their split's drops."""
    wanted = {}
    for row in (row for split in splits for row in split.rows):
        wanted.setdefault(row.collection, set()).update(row.image_ids)
    found = {collection: find_ids(args, collection, ids) for collection, ids in wanted.items()}
    for split in splits:
        rows, split.rows = split.rows, []
        for row in rows:
            paths, reason = found[row.collection]
            ids = row.image_ids if args.query_image == "any" else row.image_ids[:1]
            there = [paths[i] for i in ids if i in paths]
            if len(there) > 1:  # iNaturalist's json names files that may not be there
                there = [path for path in there if os.path.isfile(os.path.join(args.root, path))] or there
            if there:
                row.image = inside_root(args, there[0], row.where)
                split.rows.append(row)
            else:
                split.drops.add(reason, f"{row.where}: {row.collection} {row.image_ids[0]!r}")
        split.check()


def inside_root(args, path, where):
    """A path below the root again. InputError where no pool file can name it: now, and not after a day of embedding."""
    if not isinstance(path, str):
        raise InputError(f"{where} has a {type(path).__name__}, expected the path of its image; is it the right file?")
    if os.path.isabs(path) or ".." in path.replace("\\", "/").split("/"):
        raise InputError(f"{where}: its image {path!r} is not inside {args.root}. Pools name images below the root: "
                         "make a link there to a folder that lies elsewhere (ln -s)")
    return path


def find_ids(args, collection, wanted):
    """Image ids of a collection -> ({id: path below the root}, the reason for those that are not in it)."""
    folder = {"landmarks": args.landmarks, "oven": args.oven}.get(collection, args.inat)
    if folder is None:
        folder = "oven_images" if os.path.isdir(os.path.join(args.root, "oven_images")) else "."
    split = collection.removeprefix("inat/")
    for name in (f"{folder}/{split}_id2name.json", f"{split}_id2name.json", f"{folder}/{split}.json", f"{split}.json"):
        if collection.startswith("inat/") and os.path.isfile(path := os.path.join(args.root, name)):
            names = stream_json(path) if "_id2name" in name else inat_names(path)
            return {i: f"{folder}/{inside_root(args, name, f'{path}: {i!r}')}" for i, name in names if i in wanted}, \
                "image id unknown"
    found = find_files(args.root, folder, wanted) if os.path.isdir(os.path.join(args.root, folder)) else {}
    if not found and (split in ("train", "val") or not os.path.isdir(os.path.join(args.root, folder))):
        lists = f" (or {split}_id2name.json, or {split}.json)" * collection.startswith("inat/")
        raise FileNotFoundError(f"{os.path.join(args.root, folder)}{lists} is missing, or has none of the images; say "
                                f"where those of {collection} are with --{collection.split('/')[0]}")
    return found, "image missing"


def inat_names(path):
    """(image id, path) of iNaturalist's own train.json or val.json (COCO's form: read whole)."""
    with open(path, encoding="utf-8") as file:
        try:
            return [(str(image["id"]), image["file_name"]) for image in json.load(file)["images"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is not iNaturalist's file of images with id and file_name "
                             f"({type(error).__name__}: {error}); was it copied to its end?") from error


def find_files(root, folder, wanted):
    """{stem: path below the root} of the wanted stems, by one walk of a folder: sharded or flat, any extension.

    A stem ends at the first dot (some have <id>.img.jpg). Of several files the first by path is taken. Nothing is kept
    for the millions of files that no row wants.
    """
    found = {}
    for path in files_below(root, folder):
        if (stem := os.path.basename(path).split(".")[0]) in wanted:
            if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES and path < found.get(stem, "\U0010ffff"):
                found[stem] = path
    return found


def files_below(root, folder, above=()):
    """Yield the path below the root of each file in a folder, in any order. Links to folders are followed, as whole
    disks are linked in; a link to a folder that it lies in, which would lead round in a circle for ever, is not."""
    status = os.stat(os.path.join(root, folder))
    if (here := (status.st_dev, status.st_ino)) not in above:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = os.path.normpath(os.path.join(folder, entry.name)).replace(os.sep, "/")
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # a link to itself: no folder
                    yield from files_below(root, path, (*above, here))
                else:
                    yield path


# ------------------------------------------------------------------------------------------------- the knowledge base

@dataclass
class KB:
    """The knowledge base. Its E entities that list an image file are lines of `draft`, as kb.jsonl, images unopened."""
    file: str
    files: object                                 # ImageFiles
    draft: str                                    # path of a .jsonl
    entries_read: int = 0
    images_read: int = 0
    count: array = field(default_factory=lambda: array("i"))     # [E] images of the entity
    image: array = field(default_factory=lambda: array("i"))     # [sum of count] their numbers in files
    text_key: array = field(default_factory=lambda: array("Q"))  # [E] hash8 of its text, 0 = no text
    known: dict = field(default_factory=dict)     # url of a positive -> entity (line of draft), NO_IMAGE or IN_NO_POOL
    titles: dict = field(default_factory=dict)    # title of a positive -> url, None = several
    listed: dict = field(default_factory=dict)    # id that a run names -> entity
    drops: Drops = field(default_factory=Drops)
    image_drops: Drops = field(default_factory=Drops)
    distinct: object = None                       # [P] numbers in files of the distinct images, in order of appearance
    place: object = None                          # [P] their places in Features
    text_place: object = None                     # [E] those of the texts
    line: object = None                           # [E] line in kb.jsonl, NO_IMAGE where no image can be read

    def check(self, args, kept):
        """InputError when fewer entities are left than a pool needs."""
        if kept < args.k:
            raise InputError(f"{self.file}: {kept} of {self.entries_read} entries have a readable image, a pool needs "
                             f"{args.k}: lower --k or restore images; left out: "
                             f"{dict(self.drops.counts + self.image_drops.counts)}; first cases: "
                             f"{ {**self.drops.first, **self.image_drops.first} }")


def read_kb(args, splits, run, draft, quiet=False):
    """Stream the knowledge base once -> KB, and decide the positive of every row. run: of --retrieved, or {}."""
    names = (args.kb,) if args.kb else KB_NAMES[args.dataset]
    paths = [os.path.join(args.root, name) for name in names]
    path = needed(next((path for path in paths if os.path.isfile(path)), paths[0]))
    rows = [row for split in splits for row in split.rows]
    wanted, titles = {url for row in rows for url in row.positives}, {row.title for row in rows if row.title}
    listed = {entity for ids in run.values() for entity in ids[:args.k + SPARE]}
    enough = max(args.limit, 10 * args.k) if args.limit else float("inf")  # entries
    kb, seen = KB(path, image_files(args), draft), set()
    bar = tqdm(total=os.path.getsize(path), desc="knowledge base", unit="B", unit_scale=True, disable=quiet or None)
    with bar, open(draft, "w", encoding="utf-8", errors="surrogatepass") as lines:
        for url, entry in stream_json(path, bar):
            check_entry(path, url, entry, args.text)
            if kb.entries_read >= enough and len(kb.known) == len(wanted) and not titles:
                break  # a trial has all that it needs
            url, title, image_urls = whole(url), whole(entry["title"]), entry["image_urls"]
            kb.entries_read, kb.images_read = kb.entries_read + 1, kb.images_read + len(image_urls)
            name = url if not run or url in listed else trec_id(url)  # how a run may call it
            positive = url in wanted or title in titles
            reason = ("entry repeated" if url in seen else
                      "entry beyond --limit" if kb.entries_read > enough and not positive else
                      "entry in no pool" if run and name not in listed else "")
            if positive and url not in seen:
                kb.known[url] = IN_NO_POOL if reason else NO_IMAGE
                if title in titles:  # an entry without images makes a title ambiguous too
                    kb.titles[title] = None if title in kb.titles else url
            seen.add(url)
            if reason:
                kb.drops.add(reason, url)
                kb.image_drops.add(reason, url, times=len(image_urls))
            elif not (numbers := entry_images(kb, url, image_urls)):
                kb.drops.add("no image of the entry can be read" if image_urls else "entry has no image", url)
            else:
                if positive:
                    kb.known[url] = len(kb.count)
                if run:
                    kb.listed[name] = len(kb.count)
                text = candidate_text(entry, args.text)
                kb.count.append(len(numbers))
                kb.image.extend(numbers)
                kb.text_key.append(hash8(text) if text else 0)
                lines.write(json.dumps({"entity_id": url, "title": title, "text": text, "images": [
                    kb.files.path(number) for number in numbers]}, ensure_ascii=False) + "\n")
    kb.check(args, len(kb.count))  # now, and not after a day of embedding
    numbers, first = np.unique(np.array(kb.image), return_index=True)  # entries share images (flags, maps, logos)
    kb.distinct = numbers[np.argsort(first)]  # [P]
    for row in rows:
        row.positive = next((url for url in row.positives if url in kb.known),
                            kb.titles.get(row.title) or row.positives[0])
    return kb


def check_entry(path, url, entry, text):
    """InputError when a field has another shape: that means another file format, not a bad entry to be dropped."""
    fields = {"title": str, "section_texts": list, "image_urls": list}
    for name, kind in {**fields, **({"image_reference_descriptions": list} if text == "caption" else {})}.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            raise InputError(f"{path}: entry {url!r}: field {name!r} is missing or no {kind.__name__}")
        if kind is list and not all(isinstance(value, str) or value is None and name not in fields
                                    for value in entry[name]):  # a caption may be null
            raise InputError(f"{path}: entry {url!r}: field {name!r} holds something that is no text")


def candidate_text(entry, kind):
    """t_j of Eq. 3 for a knowledge-base entry; "" when it has none. kind: see --text."""
    parts = ([caption for caption in entry["image_reference_descriptions"] if caption] if kind == "caption" else
             entry["section_texts"][:{"release": 3, "lead": 1, "title": 0}[kind]])
    text = "\n".join([entry["title"], *parts])
    # Characters, as in the authors' release; the tokenizer then cuts to its context, often before that.
    return whole(text[:500]) if text.strip() else ""


def entry_images(kb, url, image_urls):
    """Numbers of an entry's image files, in order and distinct (urls do repeat)."""
    numbers, paths = [], set()
    for image_url in image_urls:
        number, reason = kb.files.number(image_url)
        if reason:
            kb.image_drops.add(reason, f"{url}: {image_url}", kb.files.name)
        elif (path := kb.files.path(number)) in paths:
            kb.image_drops.add("image repeated in its entry", f"{url}: {image_url}")
        else:
            paths.add(path)
            numbers.append(number)
    return numbers


class ImageFiles:
    """Image url -> path below the root, for millions of urls: 20 bytes and the path each, where a dict takes 400.

    pairs: (keys, path) of each file, whose number is its place among them. A url is its own key. With by_name, files
    are known by their name and their stem: a url finds the file of its name or else, as thumbnails have another
    extension, of its stem, where there is only one.
    """

    def __init__(self, pairs, name, by_name=False):
        self.name, self.by_name = name, by_name
        hashes, numbers, self.starts, blob = array("Q"), array("i"), array("Q", [0]), bytearray()
        for number, (keys, path) in enumerate(pairs):
            hashes.extend(hash8(key) for key in keys)
            numbers.extend([number] * len(keys))
            blob += path.encode("utf-8", "surrogatepass")  # file names need not be UTF-8
            self.starts.append(len(blob))
        order = np.argsort(np.array(hashes, np.uint64), kind="stable")
        # An array, not numpy's: bisect reads it without making an object of numpy at each of its 22 steps.
        self.hashes = array("Q", np.array(hashes, np.uint64)[order].tobytes())
        self.numbers, self.blob = np.array(numbers, np.int32)[order], bytes(blob)

    def __len__(self):
        return len(self.starts) - 1

    def number(self, url):
        """(number, "") or (None, reason)."""
        keys = [url]
        if self.by_name:  # https://a.b/c/Caf%C3%A9_1.JPG?x=1 -> Café_1.JPG and Café_1
            keys = file_keys(urllib.parse.unquote(url.split("?")[0]))
        for key in keys:
            wanted = hash8(key)
            at = bisect_left(self.hashes, wanted)
            if self.hashes[at:at + 1] == array("Q", [wanted]):
                # Of equal urls the first counts.
                several = self.by_name and self.hashes[at + 1:at + 2] == array("Q", [wanted])
                return (None, "image name ambiguous") if several else (int(self.numbers[at]), "")
        return None, "image url not in"

    def path(self, number):
        return self.blob[self.starts[number]:self.starts[number + 1]].decode("utf-8", "surrogatepass")


def file_keys(path):
    name = path.rsplit("/", 1)[-1]
    return [f"name {name}", f"stem {os.path.splitext(name)[0]}"]


def image_files(args):
    """The ImageFiles that --kb-images names. InputError for a path outside of the root."""
    source = os.path.normpath(os.path.join(args.root, args.kb_images))
    name = os.path.basename(source)
    if not os.path.isdir(source):
        return ImageFiles((([url], inside_root(args, path, f"{source}: {url!r}")) for url, path in stream_json(source)),
                          name)
    paths = sorted(files_below(args.root, args.kb_images))
    if tables := [path for path in paths if re.search(r"wiki_image_url_part_\d+_processed\.csv$", path)]:
        # OMGM's, in output/; their paths start at the folder above it.
        start = os.path.relpath(os.path.dirname(source) if name == "output" else source, args.root)
        rows = ((table, *pair) for table in tables
                for pair in read_csv(os.path.join(args.root, table), ("image_URL", "img_path")))
        pairs = ((row["image_URL"], os.path.normpath(os.path.join(start, row["img_path"])), f"{table}:{line}")
                 for table, line, row in rows if row["img_path"])
        return ImageFiles((([url], inside_root(args, path, where)) for url, path, where in pairs), "OMGM's csv")
    if any(path.endswith(".parquet") for path in paths):
        raise InputError(f"{source} holds AToMiC's parquet files: unpack them with python -m tools.atomic --root "
                         f"{args.root} --atomic {source}, and leave --kb-images out")
    return ImageFiles(((file_keys(path), inside_root(args, path, source)) for path in paths), f"{name}/", by_name=True)


def stream_json(path, bar=None):
    """Yield (key, value) of a JSON object of any size, in file order; repeated keys are yielded again.

    Values are objects or strings. bar: a tqdm of bytes. FileNotFoundError, or InputError naming the last whole entry.
    json.load would need some 40 GB for the 19 GB of E-VQA.
    """
    buffer, at, last = "", 0, None
    with open(needed(path), encoding="utf-8-sig") as file:  # a byte-order mark may come first
        try:
            while True:
                if entry := next_entry(buffer, at, "{" if last is None else ","):
                    last, value, at = entry
                    yield last, value
                    continue
                more = file.read(max(CHUNK, len(buffer) - at))  # ever more for an entry that is longer
                if bar is not None:
                    bar.update(file.buffer.tell() - bar.n)
                if not more and re.fullmatch(r"\s*{\s*}\s*" if last is None else r"\s*}\s*", buffer[at:]):
                    return
                buffer, at = buffer[at:] + more, 0
                if not more or len(buffer) > LONGEST or last is None and not buffer.lstrip().startswith("{"):
                    raise InputError(f"{path} is not an object of JSON to its end: bad after entry {last!r}; was it "
                                     "written or copied whole?")
        except (UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{path}: bad soon after entry {last!r} ({error}); repair or copy it again") from error


def next_entry(buffer, at, mark):
    """(key, value, end) of the entry at `at`, after mark; None where the buffer ends inside it, or is bad."""
    decode, start = json.JSONDecoder().raw_decode, re.compile(rf'\s*{mark}\s*(?=")').match(buffer, at)
    try:
        key, end = decode(buffer, start.end()) if start else ("", at)
        colon = re.compile(r"\s*:\s*").match(buffer, end)
        return (key, *decode(buffer, colon.end())) if start and colon else None
    except json.JSONDecodeError:
        return None


# ---------------------------------------------------------------------------------------------------------- embedding

class Features:
    """Float16 features [N, D] on disk, in pieces (.npz) that are written once and found by the keys of their items.

    An item's place is its row when all pieces are put one after the other. Its state is 0, or a number of FAULTS where
    an image has no feature. Pieces of another scorer or dtype lie beside ours and are not seen. This process is
    `rank` of `world`.
    """

    def __init__(self, work, kind, scorer, rank=0, world=1):
        self.work, self.kind, self.dim, self.rank, self.world = work, kind, scorer.dim, rank, world
        self.dtype, self.fingerprint = str(scorer.dtype).removeprefix("torch."), scorer.fingerprint()
        self.seen, self.files, self.starts = set(), [], [0]  # starts: first place of each file, and the end
        self.keys, self.state = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        self.refresh()

    def refresh(self):
        """Look for pieces that were added, by this process or by others."""
        names = [name for name in os.listdir(self.work) if re.fullmatch(rf"{self.kind}-\w+\.npz", name)]
        keys, states = [self.keys], [self.state]
        for name in sorted(set(names) - self.seen):
            self.seen.add(name)
            try:
                with np.load(os.path.join(self.work, name)) as piece:  # reads an array when it is asked for
                    if str(piece["dtype"]) != self.dtype or piece["fingerprint"].shape != (self.dim,) or (
                            piece["fingerprint"] @ self.fingerprint < 0.999):
                        continue
                    keys.append(piece["keys"])
                    states.append(piece["state"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # cut short by a disk error
                os.remove(os.path.join(self.work, name))  # its items are embedded again, into a piece of the same name
                self.seen.remove(name)
                continue
            self.files.append(os.path.join(self.work, name))
            self.starts.append(self.starts[-1] + len(keys[-1]))
        self.keys, self.state = np.concatenate(keys), np.concatenate(states)
        self.order = np.argsort(self.keys, kind="stable")

    def find(self, keys):
        """uint64 [n] -> places int64 [n], -1 = not there."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        at = np.searchsorted(self.keys, keys, sorter=self.order).clip(max=len(self.keys) - 1)
        return np.where(self.keys[self.order[at]] == keys, self.order[at], -1)

    def add(self, keys, state, vectors):
        """Write a piece; `refresh` makes it seen. ValueError for a feature that has no direction."""
        normalise(vectors[state == 0])
        content = keys.tobytes() + self.fingerprint.tobytes() + self.dtype.encode()
        name = f"{self.kind}-{hashlib.blake2b(content, digest_size=8).hexdigest()}.npz"
        with replacing(os.path.join(self.work, name)) as temporary, open(temporary, "wb") as file:
            # float16 halves the files; at length ~10 its steps move a cosine by about 1e-5.
            np.savez(file, keys=keys, state=state, vectors=vectors.astype(np.float16), dtype=np.array(self.dtype),
                     fingerprint=self.fingerprint)

    def take(self, places):
        """Places [n], any order -> float16 [n, D]; zeros for -1."""
        out = np.zeros((len(places), self.dim), np.float16)
        of_file = np.searchsorted(self.starts, places, side="right") - 1  # [n]
        for number in np.unique(of_file[of_file >= 0]):
            mine = of_file == number
            try:
                with np.load(self.files[number]) as piece:
                    out[mine] = piece["vectors"][places[mine] - self.starts[number]]
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # as its checksum says
                raise InputError(f"{self.files[number]} is damaged ({error}); remove it and run again") from error
        return out  # [n, D]

    def fault(self, place, path):
        """(reason, detail) why an image has no feature, or None. A place of -1: there is no such file."""
        reason, suffix = FAULTS[self.state[place] if place >= 0 else 1], os.path.splitext(path)[1].lower()
        odd = reason == "image unreadable" and suffix in (".svg", ".gif", ".tif", ".tiff")
        return (reason, f"({suffix[1:]})" if odd else "") if reason else None


def embed(features, keys, encode, desc):
    """Embed what Features has not, of items with keys uint64 [N] (0 = nothing to embed) -> places int64 [N], -1 for 0.

    encode(pieces, bar): yields (state [n], vectors [n, D]) of each piece, an array of items. Pieces are cut before what
    is there already is left out. So they are the same, in the same batches, for any number of processes and after a
    kill, and the same bytes come out. Every process takes its share of them; the first one waits for the others'.
    """
    todo = np.flatnonzero((keys != 0) & (features.find(keys) < 0))
    pieces = np.split(todo, np.searchsorted(todo, range(PIECE, len(keys), PIECE)))
    own = [items for items in pieces[features.rank::features.world] if len(items)]
    with tqdm(total=sum(map(len, own)), desc=f"embed {desc}", disable=True if features.rank else None) as bar:
        for items, (state, vectors) in zip(own, encode(own, bar)):
            features.add(keys[items], state, vectors)
    features.refresh()
    while features.rank == 0 and features.world > 1 and ((keys != 0) & (features.find(keys) < 0)).any():
        time.sleep(1)
        features.refresh()
    return features.find(keys)


class Pictures:
    """Image files as a data set: (state, pixels float32 [3, H, W] or None). In a DataLoader, worker processes open
    *and* preprocess: of a 12-megapixel photograph only 600 KB come out, and each holds one decoded at a time."""

    def __init__(self, root, names, path_of, preprocess):
        self.root, self.names, self.path_of, self.preprocess = root, names, path_of, preprocess

    def __getitem__(self, i):
        try:
            return 0, self.preprocess(read_image(os.path.join(self.root, self.path_of(self.names[i]))))
        except FileNotFoundError:
            return FAULTS.index("image missing"), None
        except InputError as error:
            return FAULTS.index("image too large" if isinstance(error, TooLarge) else "image unreadable"), None


def collate(items):
    """[(state, pixels or None)] -> (state uint8 [B], pixels float32 [b, 3, H, W] of those that could be read)."""
    pixels = [pixels for _, pixels in items if pixels is not None]
    return np.array([state for state, _ in items], np.uint8), torch.stack(pixels) if pixels else None


def embed_images(args, scorer, features, names, path_of, desc):
    """Features of the image files path_of(name) -> places int64 [N], -1 where there is no such file."""
    def key(name):  # a file and its content, as far as size and time of change tell
        try:
            status = os.stat(os.path.join(args.root, path_of(name)))
        except (OSError, ValueError):  # also a name too long for a file system, or with a zero byte
            return 0
        return hash8(f"{path_of(name)}\0{status.st_size}\0{status.st_mtime_ns}")

    def encode(pieces, bar):
        batches = [items[i:i + scorer.batch_size] for items in pieces for i in range(0, len(items), scorer.batch_size)]
        workers = args.workers if len(batches) > 8 else 0  # few images are not worth starting them
        # Forked, they start at once; they open pictures and never touch CUDA.
        loader = iter(DataLoader(Pictures(args.root, names, path_of, scorer.preprocess), batch_sampler=batches,
                                 num_workers=workers, collate_fn=collate,
                                 multiprocessing_context="fork" if workers and sys.platform == "linux" else None))
        for items in pieces:
            states, vectors = [], np.zeros((len(items), scorer.dim), np.float32)
            while len(states) < len(items):
                state, pixels = next(loader)
                if pixels is not None:
                    vectors[len(states) + np.flatnonzero(state == 0)] = scorer.encode(pixels)  # [b, D]
                states.extend(state)
                bar.update(len(state))
            yield np.array(states), vectors

    bar = tqdm(names, desc=f"look at {desc}", disable=True if features.rank else None, leave=False)
    return embed(features, np.fromiter(map(key, bar), np.uint64, len(names)), encode, desc)


def embed_texts(scorer, features, kb):
    """Features of the draft's texts -> places int64 [E], -1 where there is no text."""
    lines = Lines(kb.draft)

    def encode(pieces, bar):
        for items in pieces:
            vectors = []
            for start in range(0, len(items), scorer.batch_size):
                texts = [lines[i]["text"] for i in items[start:start + scorer.batch_size].tolist()]
                vectors.append(scorer.text_features(texts))  # [B, D]
                bar.update(len(texts))
            yield np.zeros(len(items), np.uint8), np.concatenate(vectors)
    return embed(features, np.array(kb.text_key), encode, "kb texts")


# --------------------------------------------------------------------------------------- the knowledge base's features

def write_kb(args, kb, images, texts):
    """Draft and Features -> kb.jsonl, kb_image.npy, kb_entity.npy, kb_text.npy, and kb.line.

    Of an entity the images that have a feature are listed, so that row and path can be matched by counting; an entity
    without any is left out. Rows of an entity are consecutive, in the order of its images; zeros in kb_text: no text.
    """
    place = np.full(len(kb.files), -1)  # of each image file
    place[kb.distinct] = kb.place
    rows, owners, kept, start = array("q"), array("i"), array("i"), 0
    with replacing(os.path.join(args.out, "kb.jsonl")) as temporary, open(
            temporary, "w", encoding="utf-8", errors="surrogatepass") as file, open(
            kb.draft, encoding="utf-8", errors="surrogatepass") as draft:
        for j, line in enumerate(draft):
            own, entity, good = place[kb.image[start:start + kb.count[j]]], json.loads(line), []
            start += kb.count[j]
            for at, path in zip(own.tolist(), entity["images"]):
                if fault := images.fault(at, path):
                    kb.image_drops.add(fault[0], f"{entity['entity_id']}: {path}", fault[1])
                else:
                    good.append(path)
                    rows.append(at)
                    owners.append(len(kept))
            if good:
                kept.append(j)
                file.write(json.dumps({**entity, "images": good}, ensure_ascii=False) + "\n")
            else:
                kb.drops.add("no image of the entry can be read", entity["entity_id"])
        kb.check(args, len(kept))
    write_features(os.path.join(args.out, "kb_image.npy"), images, np.array(rows))  # [M, D]
    write_features(os.path.join(args.out, "kb_text.npy"), texts, kb.text_place[np.array(kept)])  # [E, D]
    write_array(os.path.join(args.out, "kb_entity.npy"), np.array(owners))  # [M]
    kb.line = np.full(len(kb.count), NO_IMAGE)
    kb.line[np.array(kept)] = np.arange(len(kept))


def write_features(path, features, places):
    """Write features as one .npy, atomically and some at a time: np.save would need all of it in memory, and a memory
    map on a full disk kills the process where a write raises OSError."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        shape = (len(places), features.dim)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for start in range(0, len(places), 1 << 16):
            file.write(features.take(places[start:start + (1 << 16)]).tobytes())


# ---------------------------------------------------------------------------------------------------------- retrieval

def nearest_entities(kb_image, kb_entity, queries, k, device="cpu"):
    """For each query [Q, D] the k distinct entities whose best image matches best, exactly.

    kb_image [M, D], may be memory-mapped; kb_entity [M]. -> (entities [Q, k], image rows [Q, k], cosines [Q, k]), best
    first, equal cosines by image row. The nearest images may belong to few entities, so the search goes deeper for the
    queries that have not found k yet. InputError where there are fewer than k entities.
    """
    if (there := len(np.unique(kb_entity))) < k:
        raise InputError(f"the knowledge base holds {there} entities, a pool needs {k}: lower --k")
    rows = np.zeros((len(queries), k), np.int64)
    for start in range(0, len(queries), 1 << 14):  # the results of a million queries would take gigabytes
        todo, depth = np.arange(start, min(start + (1 << 14), len(queries))), min(4 * k, len(kb_image))
        while len(todo):
            found = zip(*nearest_images(kb_image, queries[todo], depth, device))
            best = [best_of_each(kb_entity, *one, k, depth == len(kb_image)) for one in found]
            for i, chosen in zip(todo, best):
                if chosen is not None:
                    rows[i] = chosen
            # Most queries are done in the first round.
            todo, depth = todo[[chosen is None for chosen in best]], min(4 * depth, len(kb_image))
    return kb_entity[rows], rows, cosines_of(kb_image, queries, rows)


def best_of_each(kb_entity, cosines, rows, k, complete):
    """The best image of each of the k best entities, from a query's nearest images (cosines and rows [depth]) -> rows
    [k], or None: go deeper. complete: these are all images."""
    order = np.argsort(-cosines, kind="stable")
    cosines, rows = cosines[order], rows[order]
    # Products of one and the same image differ in the last bits with its place in a block: equal ones go by row.
    order = np.lexsort((rows, np.cumsum(np.diff(-cosines, prepend=-cosines[0]) > EQUAL)))
    first = np.sort(np.unique(kb_entity[rows[order]], return_index=True)[1])[:k]  # best image of each, best first
    # An image that thousands of entities share (a map, a flag) ties with itself: unless the search saw all of them,
    # which ones it saw is chance.
    if not complete and (len(first) < k or cosines[order[first[-1]]] <= cosines[-1] + EQUAL):
        return None
    return rows[order[first]]


def nearest_images(kb_image, queries, depth, device="cpu", block=1 << 15, at_once=4096):
    """Exact search: queries [Q, D] -> (cosines float32 [Q, depth] descending, rows int64 [Q, depth]).

    In blocks, so features stay on disk as float16, and the whole knowledge base is read once. On a CPU by faiss, which
    looks at the products while they are in the cache: 2.5 times as fast as a product and a topk.
    """
    queries = torch.from_numpy(normalise(queries)).to(device)
    best = torch.full((len(queries), depth), -2.0, device=device)
    rows = torch.full((len(queries), depth), -1, device=device)
    for start in range(0, len(kb_image), block):
        features = torch.from_numpy(np.array(kb_image[start:start + block])).to(device).float()  # [n, D]
        features = torch.nn.functional.normalize(features, dim=1)  # on the card: here it takes longer than the product
        some = min(depth, len(features))
        for first in range(0, len(queries), at_once):
            part = slice(first, first + at_once)
            if queries.device.type == "cpu":
                cosines, columns = map(torch.from_numpy, faiss.knn(
                    queries[part].numpy(), features.numpy(), some, metric=faiss.METRIC_INNER_PRODUCT))
            else:
                cosines, columns = (queries[part] @ features.T).topk(some, dim=1)  # [q, n] -> [q, some]
            best[part], order = torch.cat([best[part], cosines], 1).topk(depth, dim=1)  # [q, depth]
            rows[part] = torch.cat([rows[part], columns + start], 1).gather(1, order)
    return best.cpu().numpy(), rows.cpu().numpy()


def cosines_of(kb_image, queries, rows):
    """Cosines of queries [Q, D] with images, rows [Q, K], in float64 [Q, K]. Those of a search differ in the last bits
    with blocks and threads, and so would pools that are otherwise the same."""
    found = np.zeros(rows.shape)
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        images, query = (np.asarray(x, np.float64) for x in (kb_image[rows[part]], queries[part]))  # [q, K, D], [q, D]
        lengths = np.sqrt(np.einsum("qkd,qkd->qk", images, images) * np.einsum("qd,qd->q", query, query)[:, None])
        found[part] = np.einsum("qkd,qd->qk", images, query) / lengths
    return found


def listed_entities(args, split, kb, run):
    """The pools of --retrieved -> entities int [Q, K] in the run's order; rows without one leave the split."""
    rows, split.rows, pools = split.rows, [], []
    for row in rows:
        ids = run.get(row.query_id, run.get(trec_id(row.query_id)))
        entities = [int(kb.line[kb.listed[name]]) for name in (ids or ())[:args.k + SPARE] if name in kb.listed]
        pool = [j for j in dict.fromkeys(entities) if j >= 0][:args.k]
        if len(pool) == args.k:
            split.rows.append(row)
            pools.append(pool)
        else:
            split.drops.add("query not in the run" if ids is None else "too few candidates in the run",
                            f"{row.where}: {row.query_id} has {len(pool)}")
    split.check()
    return np.array(pools)


def best_images(kb_image, kb_entity, queries, pool):
    """Of each entity of pool [Q, K] the image that matches query [Q, D] best -> rows [Q, K]."""
    first, end = (np.searchsorted(kb_entity, pool, side) for side in ("left", "right"))  # [Q, K]
    rows = first.copy()
    for i, query in enumerate(normalise(queries)):
        for n in range(pool.shape[1]):
            rows[i, n] += (normalise(kb_image[first[i, n]:end[i, n]]) @ query).argmax()
    return rows


# -------------------------------------------------------------------------------------------------------------- pools

def write_pools(args, split, kb, images, run, device):
    """Retrieve and write one split; returns its entry in the manifest."""
    kb_image = np.load(os.path.join(args.out, "kb_image.npy"), mmap_mode="r")  # [M, D]
    kb_entity = np.load(os.path.join(args.out, "kb_entity.npy"))  # [M]
    rows, split.rows = split.rows, []
    for row in rows:
        if fault := images.fault(split.place[row.image], row.image):
            split.drops.add(fault[0], f"{row.where}: {row.image}", fault[1])
        else:
            split.rows.append(row)
    split.check()
    pool = listed_entities(args, split, kb, run) if args.retrieved else None
    # Rows share images: each is searched once.
    places, image_of = np.unique([split.place[row.image] for row in split.rows], return_inverse=True)
    full = images.take(places)  # [distinct images, D]
    tqdm.write(f"The candidates of {len(full)} images of {split.name}, among {len(kb_image)} ...")
    if args.retrieved:
        pool_image = best_images(kb_image, kb_entity, full[image_of], pool)
        retrieval = cosines_of(kb_image, full[image_of], pool_image)
    else:
        pool, pool_image, retrieval = (x[image_of] for x in nearest_entities(kb_image, kb_entity, full, args.k, device))

    known = np.array([kb.known.get(row.positive, NO_IMAGE) for row in split.rows])
    positive = np.where(known >= 0, kb.line[known], known)  # [Q] line in kb.jsonl, or NO_IMAGE, or IN_NO_POOL
    labels = pool == positive[:, None]  # [Q, K]
    if args.top == "images":
        # EchoSight takes the top K images and their entities, fewer than K. Every pool here has K, so the rest is the
        # next entities, but a positive among those is a miss, as it is there.
        top = nearest_images(kb_image, full, args.k, device)[1][image_of]  # [Q, K] rows
        labels &= np.stack([np.isin(*pair) for pair in zip(pool_image, top)])
    if args.candidate_image == "first":
        pool_image = np.searchsorted(kb_entity, pool)  # rows of an entity are consecutive
    # Training learns from the positive's rank, so a pool without it teaches nothing. val and test keep all: there a
    # miss counts as 0, and dropping it would flatter every method.
    keep = labels.any(1) | (split.name != "train")  # [Q]
    for row, j in ((split.rows[i], positive[i]) for i in np.flatnonzero(~keep)):
        split.drops.add("positive not in the knowledge base" if row.positive not in kb.known else
                        "positive has no image" if j == NO_IMAGE else "positive not in the pool",
                        f"{row.where}: {row.positive}")
    split.rows = [row for row, kept in zip(split.rows, keep) if kept]
    split.check()
    queries = (Query(row.query_id, row.image, row.question, [row.positive]) for row in split.rows)
    write_split(args.out, split.name, queries, pool=pool[keep], pool_image=pool_image[keep], labels=labels[keep],
                retrieval=retrieval[keep], full=full[image_of[keep]])
    return {"file": os.path.basename(split.file), "rows_read": split.read, "kept": len(split.rows),
            "with_positive": int(labels[keep].sum()), "positive_in_kb": int((positive[keep] != NO_IMAGE).sum()),
            "dropped": dict(split.drops.counts), "first_dropped": split.drops.first}


def write_manifest(args, scorer, kb, splits):
    """Write manifest.json, last of all: what a later stage would otherwise have to be told again, or would guess."""
    names = ["kb.jsonl", "kb_image.npy", "kb_entity.npy", "kb_text.npy"]
    names += [name for split in splits for name in (f"{split}.jsonl", *(f"{split}_{part}.npy" for part in ARRAYS))]
    files = {}
    for name in names:  # the identity of the pools rests on the hashes
        digest = hashlib.sha256()
        with open(path := os.path.join(args.out, name), "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        files[name] = {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}
    manifest = {
        "version": 2, "dataset": args.dataset, "args": vars(args),
        "root": os.path.relpath(args.root, args.out),  # so that raw/ and data/ can move together
        "scorer": {"name": scorer.name, "dtype": str(scorer.dtype).removeprefix("torch."),
                   "fingerprint": scorer.fingerprint().tolist()},
        "K": args.k, "dim": scorer.dim, "splits": splits, "kb": {
            "file": os.path.basename(kb.file), "entries_read": kb.entries_read, "kept": int((kb.line >= 0).sum()),
            "dropped": dict(kb.drops.counts), "images_read": kb.images_read,
            "images": kb.images_read - kb.image_drops.counts.total(), "images_dropped": dict(kb.image_drops.counts),
            "first_dropped": {**kb.drops.first, **kb.image_drops.first}},
        "files": files, "packages": {module.__name__: module.__version__ for module in (torch, faiss, np, PIL)}}
    write_json(os.path.join(args.out, "manifest.json"), manifest)
    return manifest


def table(manifest):
    """The counts that a reader should see, as text."""
    kb, lines = manifest["kb"], [f"{'':>8}{'read':>9}{'kept':>9}{'dropped':>9}{'positive in pool':>18}"]
    splits, images = manifest["splits"], {**kb, "rows_read": kb["images_read"], "kept": kb["images"],
                                          "dropped": kb["images_dropped"]}
    parts = {"kb": {**kb, "rows_read": kb["entries_read"]}, "images": images, **splits}
    for name, part in parts.items():
        hits = f"{part['with_positive']} = {part['with_positive'] / part['kept']:.3f}" if name in splits else ""
        lines.append(f"{name:>8}{part['rows_read']:>9}{part['kept']:>9}{part['rows_read'] - part['kept']:>9}{hits:>18}")
    return "\n".join(lines + [f"{name:>8} dropped {count}: {reason} (first: {part['first_dropped'][reason]})"
                              for name, part in parts.items() for reason, count in part["dropped"].items()])


if __name__ == "__main__":
    main()
