"""Raw data -> features -> the fixed candidate pools that train.py and evaluate.py read.

    python prepare.py                                   # the embedded world: raw/world -> data/world, under a minute
    python prepare.py --dataset evqa --root ~/evqa --scorer BAAI/EVA-CLIP-8B --out data/evqa --limit 500   # a trial
    torchrun --nproc_per_node=8 prepare.py --dataset infoseek --root ~/infoseek --scorer FOLDER --out data/infoseek

Reads below --root, or where a flag says:

    {train,val,test}.csv                    E-VQA's questions; columns are found by name
    infoseek_{train,test}_filtered.csv      InfoSeek's in the same columns, as EchoSight gives them
    encyclopedic_kb_wiki.json               url -> title, section texts, image urls (InfoSeek: wiki_100_dict_v4.json)
    url_to_path_mapping.json                image url -> path below the root
    inat/{train,val}_id2name.json           iNaturalist image id -> path below inat/; may also lie beside inat/
    landmarks/a/b/c/<id>.jpg, oven_images/04/oven_04925844.jpg, or flat (inat/<id>.jpg, too)

tools/layouts.py makes these of what else is in use: InfoSeek's official files, iNaturalist's own lists, OMGM's tables,
images in other folders.

`prepare` is the whole stage on one screen; the sections below it are its steps. What cannot be used is dropped, counted
under one of REASONS, and shown: read = kept + dropped. An image is embedded once: its feature stays in OUT.work, so a
run that was killed, or has other settings, or one more image, embeds only what is missing. manifest.json comes last: a
killed run leaves nothing that looks whole. Of several processes each reads all and embeds its share; the first one then
searches and writes. They speak by the files of OUT.work alone.
"""
import argparse
import csv
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import faiss
import numpy as np
import PIL
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from scorer import (ARRAYS, BadSize, InputError, Lines, Query, load_scorer, lock_folder, normalise, read_image,
                    read_trec, replacing, trec_id, warn_of_idle_card, write_array, write_json, write_split)

# Every reason for which something is left out. Some end with a detail, as "question_type '2_hop'".
REASONS = (
    # a row of a question file
    "question_type", "dataset_name", "question empty", "data_id repeated",
    "entity held out for val", "entity left to train",       # InfoSeek has no third split: val is cut out of train
    "image id unknown",                                      # to iNaturalist's list, or the row has none
    "query not in the run", "too few candidates in the run",  # of --retrieved
    # the same, of train alone: a pool without the positive teaches nothing
    "positive not in the knowledge base", "positive has no image", "positive not in the pool",
    # an image, of a row or of an entry
    "image missing", "image unreadable", "image of a bad size",
    # an entry of the knowledge base, with its images
    "entry repeated", "entry beyond --limit", "entry in no pool", "entry has no image",
    "no image url of the entry is known", "no image of the entry can be read",
    # an image that an entry lists
    "image url not in", "image repeated in its entry")
FAULTS = ("", "image missing", "image unreadable", "image of a bad size")  # what a state of Features says
COLUMNS = ("question", "question_type", "dataset_name", "dataset_image_ids", "wikipedia_url")
SINGLE_HOP = ("automatic", "templated", "multi_answer", "infoseek")  # what all prior work keeps
KB_NAMES = {"infoseek": ("wiki_100_dict_v4.json", "encyclopedic_kb_wiki.json", "wiki_corpus.json"),
            "evqa": ("encyclopedic_kb_wiki.json", "wiki_corpus.json"), "world": ("encyclopedic_kb_wiki.json",)}
SUFFIXES = (".jpg", ".JPEG", ".png", ".jpeg", ".JPG")  # of query images
NO_IMAGE, IN_NO_POOL = -1, -2  # of a positive in place of its entity
CHUNK = 1 << 18        # characters of JSON read at once
LONGEST = 1 << 28      # characters of an entry: what is longer is damaged, and would be read to its end in vain
DAMAGE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # of an .npz that a disk error cut short
PIECE = 4096           # images or texts a file of OUT.work: what a kill costs at most
HELD_OUT = 100         # InfoSeek: one entity in so many goes to val
SPARE = 5              # entities beyond K that are taken from a run, for those without a readable image
EQUAL = 5e-7           # cosines closer than this are taken for equal: float32 products differ by as much


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("files").add_argument
    add("--dataset", choices=("world", "evqa", "infoseek"), default="world", help="names to look for (default world)")
    add("--root", default="raw/world", help="folder of the raw data, below which all files lie (default raw/world)")
    add("--out", default="data/world", help="folder to write (default data/world)")
    add("--splits", default="train,val,test", help="comma list out of train, val, test (default all)")
    add("--limit", type=int, default=0, metavar="N", help="a trial: N rows a split, some N entities (default 0: all)")
    add("--kb", help="knowledge base (default: the first known name)")
    add("--kb-images", default="url_to_path_mapping.json", help="its images (default url_to_path_mapping.json)")
    add("--inat", default="inat", help="folder of iNaturalist 2021 (default inat)")
    add("--landmarks", default="landmarks", help="folder of Google Landmarks v2 train (default landmarks)")
    add("--oven", default="oven_images", help="folder of OVEN's images (default oven_images)")
    add("--query-image", choices=("first", "any", "all"), default="first", help="of a row's images the first "
        "(default), the first that is there (any), or all: a query each, with ids ID.0, ID.1 ...")
    add = parser.add_argument_group("scorer (section 3.3)").add_argument
    add("--scorer", default="mini/scorer", help="folder, Hugging Face id or open_clip:NAME/TAG (default mini/scorer)")
    add("--scorer-dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16 on CUDA, else float32")
    add("--device", default="auto", help="cpu, cuda, cuda:1, or auto: CUDA if there is any (default auto)")
    add("--batch-size", type=int, default=64, help="images or texts a forward pass (default 64)")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="they open images (default: up to 8)")
    add("--delete-features", action="store_true", help="remove OUT.work at the end; the next run then embeds all again")
    add = parser.add_argument_group("pools (sections 3.1 and 4.1)").add_argument
    add("--k", type=int, default=20, help="distinct entities a pool, >= 2 (default 20, the paper's)")
    add("--text", choices=("release", "title", "lead", "caption"), default="release", help="t_j of Eq. 3: title and "
        "three sections (release, default), title, title and first section, title and captions")
    add("--candidate-image", choices=("retrieved", "first"), default="retrieved", help="I_j of Eq. 3: the image of the "
        "entity that matched best (default), or its first")
    add("--top", choices=("entities", "images"), default="entities", help="the pool is the top K entities (default), "
        "or only those among the top K images count as found (EchoSight)")
    add("--retrieved", nargs="+", metavar="RUN", help="TREC runs of another engine, whose first K are the pools")
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
    warn_of_idle_card()
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
        lock = lock_folder(work, "--out")  # noqa: F841 (let go of when this function ends)
        if os.path.exists(old := os.path.join(args.out, "manifest.json")):
            os.remove(old)  # it would vouch for files that are about to change

    splits = [read_questions(args, name) for name in args.splits]
    find_images(args, splits)
    run = {query: ids for path in args.retrieved or () for query, ids in read_trec(path).items()}
    say("The knowledge base, after the list of its images ...")
    kb = read_kb(args, splits, run, os.path.join(work, f"kb-{rank}.jsonl"), quiet=rank > 0)

    images, texts = (Features(work, kind, scorer, rank, world) for kind in ("image", "text"))
    for split in splits:
        paths = list(dict.fromkeys(row.image for row in split.rows))  # rows share images
        split.place = embed_images(args, scorer, images, paths, f"{split.name} images")
    kb.place = embed_images(args, scorer, images, list(kb.place), "kb images")
    read = partial(read_texts, Lines(kb.draft))
    kb.text_place = embed(args, texts, np.array(kb.text_key), read, scorer.text_features, "kb texts")
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

    def add(self, reason, case, times=1):
        assert reason.startswith(REASONS), reason
        if times:
            self.counts[whole(reason)] += times
            self.first.setdefault(whole(reason), whole(case))  # it is printed, and written to the manifest

    def __str__(self):
        return f"{dict(self.counts)}; first cases: {self.first}"


def whole(text):
    """The text without halves of surrogate pairs (a lone \\ud83d in JSON), which no tokenizer and no file takes."""
    return text.encode("utf-8", "replace").decode()


def hash8(text):
    """64 bits of a text, never 0: among 10 million urls the odds that any two are equal are 3 in a million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


def first_file(args, names, remedy):
    """Path of the first of these names that is a file below the root; FileNotFoundError where none is."""
    for name in names:
        if os.path.isfile(path := os.path.join(args.root, name)):
            return path
    raise FileNotFoundError(f"{os.path.join(args.root, ' or '.join(names))} is missing; {remedy}")


# ---------------------------------------------------------------------------------------------------------- questions

@dataclass(slots=True)
class Row:
    """A question that passed the reader."""
    query_id: str
    question: str
    collection: str   # where its image is: inat/train, inat/val, landmarks or oven
    image_ids: list   # of the collection, at least one
    positive: str     # url of its entity
    where: str        # file:line, for messages
    image: str = ""   # path below the root


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
            raise InputError(f"{self.file}: none of {self.read} rows can be used for {self.name}: {self.drops}. Mend "
                             "that, or leave the split out with --splits" +
                             " (and train with --eval-every 0)" * (self.name == "val"))


def read_questions(args, name):
    """A split's file -> Split, with the rows that can be used; their images are not yet looked for.

    query_id is data_id for InfoSeek's questions, else E-VQA_{split}_{i}, i counted over the single-hop rows in file
    order. As in prior work i does not depend on which images exist, so ids of two machines agree.
    """
    split, single_hop, ids = Split(name, question_file(args, name)), 0, set()
    collections = {"inaturalist": f"inat/{'train' if name == 'train' else 'val'}",  # test rows use iNaturalist's val
                   "landmarks": "landmarks", "infoseek": "oven"}
    for line, raw in islice(read_csv(split.file, COLUMNS), args.limit or None):
        where, kind, collection = f"{split.file}:{line}", raw["question_type"], collections.get(raw["dataset_name"])
        image_ids = [image_id.strip() for image_id in raw["dataset_image_ids"].split("|")]
        if kind == "infoseek" and "data_id" not in raw:
            raise InputError(f"{split.file}: column data_id is missing, InfoSeek's questions are known by it")
        query_id = raw["data_id"] if kind == "infoseek" else f"E-VQA_{name}_{single_hop}"
        single_hop += kind in SINGLE_HOP
        # The url verbatim, as all prior work compares it: decoding %C3 and the like would merge entries.
        positive, cut = raw["wikipedia_url"], args.dataset == "infoseek" and name != "test"
        held_out = zlib.crc32(positive.encode()) % HELD_OUT == 0  # by entity; crc32 is the same everywhere
        flaws = {f"question_type {kind!r}": kind not in SINGLE_HOP,
                 f"dataset_name {raw['dataset_name']!r}": collection is None,
                 "image id unknown": not image_ids[0],
                 "question empty": not raw["question"].strip(),
                 "data_id repeated": query_id in ids,
                 "entity held out for val": cut and name == "train" and held_out,
                 "entity left to train": cut and name == "val" and not held_out}
        reason = next((reason for reason, holds in flaws.items() if holds), None)
        queries = [(query_id, image_ids)]
        if args.query_image == "all":
            queries = [(f"{query_id}.{n}", [image_id]) for n, image_id in enumerate(image_ids)]
        split.read += len(queries)
        if reason:
            split.drops.add(reason, f"{where}: {query_id}", len(queries))
        else:  # never question_original: it names the answer
            ids.add(query_id)
            split.rows += [Row(query, raw["question"], collection, own, positive, where) for query, own in queries]
    return split


def question_file(args, split):
    """The file that holds a split's questions."""
    if args.dataset != "infoseek":
        names, remedy = [f"{split}.csv"] + ["train_full_image_cleaned.csv"] * (split == "train"), ""
    else:  # "test" is the official val, as in everybody's numbers: the official test has no answers
        ours, theirs = ("test", "val") if split == "test" else ("train", "train")
        names, remedy = [f"infoseek_{ours}_filtered.csv"], (
            f"python -m tools.layouts infoseek --root {args.root} makes it of the official infoseek_{theirs}.jsonl; ")
    return first_file(args, names, f"{remedy}give the splits that you have with --splits")


def read_csv(path, columns):
    """Yield (line number, row dict) of a csv that has all columns. InputError naming file and column or line."""
    csv.field_size_limit(2**31 - 1)  # `evidence` holds whole paragraphs; the default of 128 KiB is an error there
    # utf-8-sig: a byte-order mark left by a spreadsheet would become part of the first column's name.
    with open(path, encoding="utf-8-sig", newline="") as file:
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
            if len(there) > 1:  # iNaturalist's list names files that may not be there
                there = [path for path in there if os.path.isfile(os.path.join(args.root, path))] or there
            if there:
                row.image = there[0]
                split.rows.append(row)
            else:
                split.drops.add(reason, f"{row.where}: {row.collection} {row.image_ids[0]!r}")
        split.check()


def find_ids(args, collection, wanted):
    """Image ids of a collection -> ({id: path below the root}, the reason for those that are not in it)."""
    flag, _, split = collection.partition("/")  # a split of iNaturalist's alone
    folder, name = inside_root(args, vars(args)[flag], f"--{flag}"), f"{split or flag}_id2name.json"
    for path in (os.path.join(args.root, folder, name), os.path.join(args.root, name)):
        if os.path.isfile(path):
            return {i: image for i, image in read_paths(args, path, folder) if i in wanted}, "image id unknown"
    found = {}
    for i in filter(re.compile(r"\w+").fullmatch, wanted):  # what has a slash could lead out of the root
        shard = {"landmarks": "/".join(i[:3]), "oven": i[5:7]}.get(flag, "")
        for image in (os.path.join(folder, start, i + suffix) for start in (shard, "") for suffix in SUFFIXES):
            if os.path.isfile(os.path.join(args.root, image)):
                found[i] = image
                break
    if not found:
        tool = "inat (of iNaturalist's own list) or ids" if split else "ids"
        raise FileNotFoundError(f"{os.path.join(args.root, folder)} is missing, or has neither {name} nor one of the "
                                f"images by its id; say where those of {collection} are with --{flag}, or have them "
                                f"listed: python -m tools.layouts {tool} --root {args.root}. A list of {{}} drops them")
    return found, "image missing"


def read_paths(args, file, folder=""):
    """Yield (key, path below the root) of a JSON object whose values are paths below a folder."""
    for key, name in stream_json(file):
        if not isinstance(name, str):
            raise InputError(f"{file}: {key!r} has a {type(name).__name__}, expected the path of its image; is it the "
                             "right file?")
        yield key, inside_root(args, os.path.join(folder, name), f"{file}: {key!r}")


def inside_root(args, path, where):
    """A path below the root again. InputError where no pool file can name it: now, and not after a day of embedding."""
    if os.path.isabs(path) or ".." in path.replace("\\", "/").split("/"):
        raise InputError(f"{where}: {path!r} is not inside {args.root}. Pools name images below the root: make a link "
                         "there to a folder that lies elsewhere (ln -s)")
    return path


# ------------------------------------------------------------------------------------------------- the knowledge base

@dataclass
class KB:
    """The knowledge base. Its E entities that list an image file are lines of `draft`, as kb.jsonl, images unopened."""
    file: str
    draft: str                                    # path of a .jsonl
    entries_read: int = 0
    images_read: int = 0
    place: dict = field(default_factory=dict)     # path of an image -> its place in Features, in order of appearance
    text_key: array = field(default_factory=lambda: array("Q"))  # [E] hash8 of its text, 0 = no text
    known: dict = field(default_factory=dict)     # url of a positive -> entity (line of draft), NO_IMAGE or IN_NO_POOL
    listed: dict = field(default_factory=dict)    # id that a run names -> entity
    drops: Drops = field(default_factory=Drops)
    image_drops: Drops = field(default_factory=Drops)
    text_place: object = None                     # [E] those of the texts
    line: object = None                           # [E] line in kb.jsonl, NO_IMAGE where no image can be read

    def check(self, args, kept):
        """InputError when fewer entities are left than a pool needs."""
        if kept < args.k:
            raise InputError(f"{self.file}: {kept} of {self.entries_read} entries have a readable image, a pool needs "
                             f"{args.k}: lower --k or restore images; left out: {self.drops}; of their images: "
                             f"{self.image_drops}")


def kb_file(args):
    return first_file(args, (args.kb,) if args.kb else KB_NAMES[args.dataset], "--root must hold the benchmark's files "
                      "(the embedded world: `python -m mini.world --out raw/world`)")


def read_kb(args, splits, run, draft, quiet=False):
    """Stream the knowledge base once -> KB. run: of --retrieved, or {}."""
    wanted = {row.positive for split in splits for row in split.rows}
    listed = {entity for ids in run.values() for entity in ids[:args.k + SPARE]}
    enough = max(args.limit, 10 * args.k) if args.limit else float("inf")  # entries
    kb, files, seen = KB(kb_file(args), draft), image_files(args), set()
    with open(draft, "w", encoding="utf-8", errors="surrogatepass") as lines:
        for url, entry in stream_json(kb.file, "" if quiet else "knowledge base"):
            check_entry(kb.file, url, entry, args.text)
            if kb.entries_read >= enough and len(kb.known) == len(wanted):
                break  # a trial has all that it needs
            url, image_urls = whole(url), entry["image_urls"]
            kb.entries_read, kb.images_read = kb.entries_read + 1, kb.images_read + len(image_urls)
            name = url if not run or url in listed else trec_id(url)  # how a run may call it
            reason = ("entry repeated" if url in seen else
                      "entry beyond --limit" if kb.entries_read > enough and url not in wanted else
                      "entry in no pool" if run and name not in listed else "")
            if url in wanted and url not in seen:
                kb.known[url] = IN_NO_POOL if reason else NO_IMAGE
            seen.add(url)
            if reason:
                kb.drops.add(reason, url)
                kb.image_drops.add(reason, url, len(image_urls))
            elif not (paths := entry_images(args, kb, files, url, image_urls)):
                kb.drops.add("no image url of the entry is known" if image_urls else "entry has no image", url)
            else:
                if url in wanted:
                    kb.known[url] = len(kb.text_key)
                if run:
                    kb.listed[name] = len(kb.text_key)
                text = candidate_text(entry, args.text)
                kb.text_key.append(hash8(text) if text else 0)
                kb.place.update(dict.fromkeys(paths))  # places come later; entries share images (flags, maps, logos)
                lines.write(json.dumps({"entity_id": url, "title": whole(entry["title"]), "text": text,
                                        "images": paths}, ensure_ascii=False) + "\n")
    kb.check(args, len(kb.text_key))  # now, and not after a day of embedding
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


def entry_images(args, kb, files, url, image_urls):
    """Paths of an entry's image files, in order and distinct (urls do repeat)."""
    paths = []
    for image_url in image_urls:
        path = files.get(hash8(image_url))
        if path is None:
            kb.image_drops.add(f"image url not in {os.path.basename(args.kb_images)}", f"{url}: {image_url}")
        elif path in paths:
            kb.image_drops.add("image repeated in its entry", f"{url}: {image_url}")
        else:
            paths.append(path)
    return paths


def image_files(args):
    """hash8 of an image url -> path below the root: millions of urls themselves would take twice as much memory."""
    file = first_file(args, (args.kb_images,), "it must be a .json of image url -> path. OMGM's tables, and images "
                      "named as in their urls, become one by python -m tools.layouts omgm (or names) --root "
                      f"{args.root} --images FOLDER, AToMiC's parquet files by python -m tools.atomic")
    files = {}
    for url, path in read_paths(args, file):
        files.setdefault(hash8(url), path)
    return files


def stream_json(path, desc=""):
    """Yield (key, value) of a JSON object of any size, in file order; repeated keys are yielded again.

    Values are objects or strings. desc: of a bar of bytes, "" = none. InputError naming the last whole entry. json.load
    would need some 40 GB for the 19 GB of E-VQA.
    """
    buffer, at, last = "", 0, None
    bar = tqdm(total=os.path.getsize(path), desc=desc, unit="B", unit_scale=True, disable=None if desc else True)
    with bar, open(path, encoding="utf-8-sig") as file:  # a byte-order mark may come first
        try:
            while True:
                if entry := next_entry(buffer, at, "{" if last is None else ","):
                    last, value, at = entry
                    yield last, value
                    continue
                more = file.read(max(CHUNK, len(buffer) - at))  # ever more for an entry that is longer
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
    start = re.compile(rf'\s*{mark}\s*("(?:[^"\\]|\\.)*")\s*:\s*').match(buffer, at)
    try:
        return start and (json.loads(start[1]), *json.JSONDecoder().raw_decode(buffer, start.end()))
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
        names = {name for name in os.listdir(self.work) if re.fullmatch(rf"{self.kind}-\w+\.npz", name)}
        keys, states = [self.keys], [self.state]
        for name in sorted(names - self.seen):
            path = os.path.join(self.work, name)
            try:
                with np.load(path) as piece:  # reads an array when it is asked for
                    self.seen.add(name)
                    if str(piece["dtype"]) == self.dtype and piece["fingerprint"].shape == (self.dim,) and (
                            piece["fingerprint"] @ self.fingerprint >= 0.999):
                        states.append(piece["state"])
                        keys.append(piece["keys"])
                        self.files.append(path)
                        self.starts.append(self.starts[-1] + len(keys[-1]))
            except DAMAGE:
                os.remove(path)  # its items are embedded again, into a piece of the same name
                self.seen.discard(name)
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
            except DAMAGE as error:  # as its checksum says
                raise InputError(f"{self.files[number]} is damaged ({error}); remove it and run again") from error
        return out  # [n, D]

    def fault(self, place, path):
        """The reason why an image has no feature, or "". A place of -1: there is no such file."""
        reason, suffix = FAULTS[self.state[place] if place >= 0 else 1], os.path.splitext(path)[1].lower()
        odd = reason == "image unreadable" and suffix in (".svg", ".gif", ".tif", ".tiff")
        return f"{reason} ({suffix[1:]})" if odd else reason


def embed(args, features, keys, read, encode, desc):
    """Embed what Features has not, of items with keys uint64 [N] (0 = nothing to embed) -> places int64 [N], -1 for 0.

    read(list of item numbers): (state [B], what could be read), in worker processes; encode: that -> features [b, D].
    Pieces are cut before what is there already is left out. So they are the same, in the same batches, for any number
    of processes and after a kill, and the same bytes come out. Every process takes its share of them; the first one
    waits for the others'.
    """
    todo = np.flatnonzero((keys != 0) & (features.find(keys) < 0))
    pieces = np.split(todo, np.searchsorted(todo, range(PIECE, len(keys), PIECE)))
    own = [piece for piece in pieces[features.rank::features.world] if len(piece)]
    batches = [piece[i:i + args.batch_size] for piece in own for i in range(0, len(piece), args.batch_size)]
    workers = args.workers if len(batches) > 8 else 0  # few items are not worth starting them
    # Forked, they start at once; they open pictures and never touch CUDA.
    loader = iter(DataLoader(range(len(keys)), batch_sampler=batches, collate_fn=read, num_workers=workers,
                             multiprocessing_context="fork" if workers and sys.platform == "linux" else None))
    with tqdm(total=sum(map(len, own)), desc=f"embed {desc}", disable=True if features.rank else None) as bar:
        for piece in own:
            states, vectors = [], np.zeros((len(piece), features.dim), np.float32)
            while len(states) < len(piece):
                state, inputs = next(loader)
                if len(inputs):
                    vectors[len(states) + np.flatnonzero(state == 0)] = encode(inputs)  # [b, D]
                states.extend(state)
                bar.update(len(state))
            features.add(keys[piece], np.array(states), vectors)
    features.refresh()
    while features.rank == 0 and features.world > 1 and ((keys != 0) & (features.find(keys) < 0)).any():
        time.sleep(1)
        features.refresh()
    return features.find(keys)


def embed_images(args, scorer, features, paths, desc):
    """Features of image files below the root -> {path: place}, -1 where there is no such file."""
    def key(path):  # a file and its content, as far as size and time of change tell
        try:
            status = os.stat(os.path.join(args.root, path))
        except (OSError, ValueError):  # also a name too long for a file system, or with a zero byte
            return 0
        return hash8(f"{path}\0{status.st_size}\0{status.st_mtime_ns}")

    bar = tqdm(paths, desc=f"look at {desc}", disable=True if features.rank else None, leave=False)
    keys = np.fromiter(map(key, bar), np.uint64, len(paths))
    read = partial(read_pictures, args.root, paths, scorer.preprocess)
    return dict(zip(paths, embed(args, features, keys, read, scorer.encode, desc).tolist()))


def read_pictures(root, paths, preprocess, items):
    """Open *and* preprocess some of the paths -> (state uint8 [B], pixels float32 [b, 3, H, W] of those that could be
    read). Of a 12-megapixel photograph only 600 KB leave a worker process, and it holds one decoded at a time."""
    state, pixels = np.zeros(len(items), np.uint8), []
    for n, i in enumerate(items):
        try:
            pixels.append(preprocess(read_image(os.path.join(root, paths[i]))))
        except FileNotFoundError:
            state[n] = FAULTS.index("image missing")
        except InputError as error:
            state[n] = FAULTS.index("image of a bad size" if isinstance(error, BadSize) else "image unreadable")
    return state, torch.stack(pixels) if pixels else ()


def read_texts(lines, items):
    """As read_pictures, for `embed`: texts can all be read."""
    return np.zeros(len(items), np.uint8), [lines[i]["text"] for i in items]


# --------------------------------------------------------------------------------------- the knowledge base's features

def write_kb(args, kb, images, texts):
    """Draft and Features -> kb.jsonl, kb_image.npy, kb_entity.npy, kb_text.npy, and kb.line.

    Of an entity the images that have a feature are listed, so that row and path can be matched by counting; an entity
    without any is left out. Rows of an entity are consecutive, in the order of its images; zeros in kb_text: no text.
    """
    rows, owners, kept = array("q"), array("i"), array("i")
    with replacing(os.path.join(args.out, "kb.jsonl")) as temporary, open(
            temporary, "w", encoding="utf-8", errors="surrogatepass") as file, open(
            kb.draft, encoding="utf-8", errors="surrogatepass") as draft:
        for j, line in enumerate(draft):
            entity, good = json.loads(line), []
            for path in entity["images"]:
                if fault := images.fault(kb.place[path], path):
                    kb.image_drops.add(fault, f"{entity['entity_id']}: {path}")
                else:
                    good.append(path)
                    rows.append(kb.place[path])
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
    kb.line = np.full(len(kb.text_key), NO_IMAGE)
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
            cosines, found = nearest_images(kb_image, queries[todo], depth, device)  # [q, depth]
            left, last = [], cosines[:, -1] + EQUAL
            # Products of one image differ in the last bits with its place in a block: equal ones go by row.
            steps = np.diff(-cosines, axis=1, prepend=-cosines[:, :1]) > EQUAL
            order = np.lexsort((found, steps.cumsum(1)))
            cosines, found = (np.take_along_axis(x, order, 1) for x in (cosines, found))
            for n, i in enumerate(todo):
                first = np.sort(np.unique(kb_entity[found[n]], return_index=True)[1])[:k]  # best image of each entity
                # An image that thousands of entities share (a map, a flag) ties with itself: unless the search saw all
                # of them, which ones it saw is chance.
                if depth == len(kb_image) or len(first) == k and cosines[n, first[-1]] > last[n]:
                    rows[i] = found[n, first]
                else:
                    left.append(i)
            todo, depth = np.array(left), min(4 * depth, len(kb_image))  # most queries are done in the first round
    return kb_entity[rows], rows, cosines_of(kb_image, queries, rows)


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
            split.drops.add(fault, f"{row.where}: {row.image}")
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
