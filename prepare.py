"""Raw data -> embeddings -> retrieval index -> the fixed candidate pools that train.py and evaluate.py read.

    python prepare.py                                   # the embedded world: raw/world -> data/world, about a minute
    python prepare.py --dataset evqa --root ~/evqa --scorer FOLDER --out data/evqa --dry-run
    torchrun --nproc_per_node=8 prepare.py --dataset infoseek --root ~/infoseek --scorer FOLDER --out data/infoseek

Reads the benchmarks as users have them on disk. Below --root, and where other names are in use, a flag:

    {train,val,test}.csv                    E-VQA's questions; columns are found by name
    infoseek_{train,test}_filtered.csv      InfoSeek in the same columns, as EchoSight gives it, or the official files:
    infoseek_{train,val}.jsonl, infoseek_{train,val}_withkb.jsonl, and Wiki6M_ver_1_0_title_only.jsonl if it is there
    encyclopedic_kb_wiki.json               wikipedia url -> title, section texts, image urls (InfoSeek:
                                            wiki_100_dict_v4.json); 19 GB, so it is streamed
    url_to_path_mapping.json                image url -> path below the root; other sources: --kb-images
    inat/{train,val}_id2name.json           iNaturalist image id -> path below inat/; test rows use the val file
    landmarks/a/b/c/<id>.jpg, oven_images/04/oven_04925844.jpg, or flat, with any extension

and writes the folder that load_data of scorer.py opens. Everything is embedded once, here: during training a FULL
rollout costs no image encode at all and a REGION rollout costs one. What cannot be used (a 2-hop question, a missing
image, ...) is dropped, counted under its reason, and shown; read = kept + dropped for every split. manifest.json is
written last, so a run that was killed leaves nothing that looks finished; features are kept in OUT.work in shards, so
the next run, of the same or of another setting, embeds only what is not there yet.

Simplified: with several processes, process 0 alone reads, searches EchoSight's index and writes; InfoSeek, which has no
third split, gets its val from the train rows of one entity in a hundred.
"""
import argparse
import csv
import errno
import gzip
import hashlib
import importlib.util
import json
import os
import pickletools
import re
import shutil
import time
import urllib.parse
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import faiss
import numpy as np
import PIL
import torch
from PIL import Image
from tqdm import tqdm

import scorer as pool_files
from scorer import Query, hold, load_scorer, normalise, read_image, replacing, write_array, write_json

COLUMNS = ("question", "question_type", "dataset_name", "dataset_image_ids", "wikipedia_url")
SINGLE_HOP = ("automatic", "templated", "multi_answer", "infoseek")  # what all prior work keeps
KB_NAMES = {"infoseek": ("wiki_100_dict_v4.json", "encyclopedic_kb_wiki.json", "wiki_corpus.json"),
            "evqa": ("encyclopedic_kb_wiki.json", "wiki_corpus.json"), "world": ("encyclopedic_kb_wiki.json",)}
WIKIPEDIA = "https://en.wikipedia.org/wiki/"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
CHUNK = 1 << 18        # bytes of JSON parsed at once; what fits the processor's cache is read twice as fast as 4 MB
SHARD_VERSION = 1      # of the files in OUT.work; raised when a feature would come out differently
NO_IMAGE = "no image of the entry can be read"
HELD_OUT = 100         # InfoSeek: one entity in so many goes to val
EQUAL = 5e-7           # cosines closer than this are taken for equal: float32 products differ by as much


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in (file_flags, embedding_flags, pool_flags):
        add(parser)
    args = parser.parse_args(argv)
    args.splits = list(dict.fromkeys(args.splits.split(",")))  # a split named twice would count its drops twice
    # Checked here rather than by argparse's `type`, whose message cannot name the legal values.
    if set(args.splits) - {"train", "val", "test"}:
        parser.error(f"--splits {','.join(args.splits)}: expected a comma list out of train, val, test")
    for name, least in (("k", 2), ("batch_size", 1), ("limit", 1), ("shard_size", 1), ("workers", 1),
                        ("num_candidates", 2), ("probes", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 < args.similarity_tolerance <= 2:
        parser.error("--similarity-tolerance must be above 0 and at most 2")
    if args.pool == "mined":
        args.k = args.num_candidates  # K of every later stage
        if args.top == "images" or args.index != "flat" or args.echosight:
            parser.error("--pool mined compares with every entity: it goes with --index flat and none of --top, "
                         "--echosight")
    if args.echosight and (args.index != "flat" or args.candidate_image == "mean"):
        parser.error("--echosight brings its own index and image vectors: leave --index and --candidate-image mean")
    return args


def file_flags(parser):
    group = parser.add_argument_group("files")
    group.add_argument("--dataset", choices=("world", "evqa", "infoseek"), default="world",
                       help="which names to look for; the world is in E-VQA's format (default world)")
    group.add_argument("--root", default="raw/world", help="folder of the raw data (default raw/world)")
    group.add_argument("--out", default="data/world", help="folder to write (default data/world)")
    group.add_argument("--splits", default="train,val,test", help="comma list out of train, val, test (default all)")
    group.add_argument("--limit", type=int, help="read the first N rows of each split only, N >= 1 (default all)")
    group.add_argument("--kb", help="knowledge base, relative to the root (default: the first known name there)")
    group.add_argument("--kb-images", default="url_to_path_mapping.json",
                       help="where its images are, relative to the root: a .json of url -> path (the default), a "
                            "folder with OMGM's wiki_image_url_part_*_processed.csv, with AToMiC's *.parquet "
                            "(needs pyarrow; images are unpacked to ROOT/atomic_images), or with image files named "
                            "as in their urls")
    group.add_argument("--inat", default="inat", help="folder of iNaturalist 2021, relative to the root (default inat)")
    group.add_argument("--landmarks", default="landmarks", help="folder of Google Landmarks v2 train, likewise")
    group.add_argument("--oven", help="folder of OVEN's images, likewise (default oven_images if it is there, else the "
                                      "whole root)")
    group.add_argument("--query-image", choices=("first", "any"), default="first",
                       help="of a row's up to five images: the first, as all prior work (default), or the first that "
                            "is there (any)")
    group.add_argument("--dry-run", action="store_true",
                       help="read and count everything, embed and write nothing, print expected size and time")


def embedding_flags(parser):
    group = parser.add_argument_group("scorer (section 3.3)")
    group.add_argument("--scorer", default="mini/scorer", help="EVA-CLIP: folder, file, Hugging Face id; or "
                       "open_clip:NAME/TAG, local-dir:FOLDER; the README has all forms (default mini/scorer)")
    group.add_argument("--scorer-dtype", choices=("float32", "bfloat16", "float16"),
                       help="of the scorer's weights; features are normalised in float32 whatever it is (default "
                            "bfloat16 on CUDA, float32 on a CPU)")
    group.add_argument("--device", default="auto", help="auto (cuda if there is one, of several a process each; the "
                                                        "default), cpu, cuda, cuda:1")
    group.add_argument("--batch-size", type=int, default=64, help="images or texts a forward pass, >= 1 (default 64)")
    group.add_argument("--shard-size", type=int, default=4096,
                       help="images or texts a shard of OUT.work, what a kill costs at most, >= 1 (default 4096)")
    group.add_argument("--workers", type=int, default=4, help="threads that decode images, >= 1 (default 4)")
    group.add_argument("--delete-shards", action="store_true",
                       help="remove OUT.work at the end; it doubles the disk space, but other pools need no embedding")


def pool_flags(parser):
    group = parser.add_argument_group("pools (sections 3.1 and 4.1)")
    group.add_argument("--k", type=int, default=20, help="distinct entities a pool, >= 2 (default 20, the paper's)")
    group.add_argument("--text", choices=("release", "title", "lead", "caption"), default="release",
                       help="t_j of Eq. 3: title and the first three sections, cut to 500 characters (release, the "
                            "default), the title alone (title), or title and first section (lead) or image captions "
                            "(caption), cut likewise")
    group.add_argument("--candidate-image", choices=("retrieved", "first", "mean"), default="retrieved",
                       help="I_j of Eq. 3: the entity's image that matched best (the default), its first, or the mean "
                            "of all its images' features")
    group.add_argument("--top", choices=("entities", "images"), default="entities",
                       help="the pool is the top K entities (default, the paper), or only entities among the top K "
                            "images count as found (EchoSight; the rest of the pool is filled and labelled 0)")
    group.add_argument("--pool", choices=("retrieved", "mined"), default="retrieved",
                       help="retrieval (default), or the positive and hard negatives about as similar (the release)")
    group.add_argument("--similarity-tolerance", type=float, default=0.05,
                       help="mined: most difference in cosine between a negative and the positive (default 0.05)")
    group.add_argument("--num-candidates", type=int, default=5, help="mined: entities a pool, >= 2 (default 5)")
    group.add_argument("--index", choices=("flat", "blocks", "ivf", "hnsw"), default="flat",
                       help="exact: flat (faiss, in memory; the default) or blocks (from disk, without index.faiss); "
                            "approximate, with its recall measured: ivf or hnsw")
    group.add_argument("--probes", type=int, default=32, help="ivf: lists searched a query, >= 1 (default 32)")
    group.add_argument("--echosight", help="retrieve with EchoSight's index: folder of kb_index.faiss and "
                                           "kb_index_ids.pkl, made with the same scorer and knowledge base")


# ------------------------------------------------------------------------------------------------------ reading files

@dataclass
class Drops:
    """Counts what is left out: reason -> how often, and the first case of each, to be looked at."""
    counts: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)

    def add(self, reason, case, times=1):
        if times:
            self.counts[reason] += times
            self.first.setdefault(reason, whole(case))  # it is printed, and written to the manifest


def needed(path):
    """The path again; FileNotFoundError when no file is there."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing; --root must hold the benchmark's files (the embedded world: "
                                "`python -m mini.world --out raw/world`)")
    return path


def stream_json(path, closing=b"}", bar=None):
    """Yield (key, value) of a JSON object of any size, in file order; repeated keys are yielded again.

    closing: the last byte of every value, b"}" for objects (dict) or b'"' for strings. bar: a tqdm of bytes. Raises
    FileNotFoundError, or ValueError naming the byte where the file stops being UTF-8 or JSON.

    The buffer is cut at its last `}, "` and the piece is parsed whole, by the standard library: one call for a hundred
    entries. A cut inside a string or a nested object never yields valid JSON, so it shows itself, and the cut before
    is tried. json.load would need some 40 GB for the 19 GB of E-VQA.
    """
    boundary = re.compile(re.escape(closing) + rb'\s*,\s*(?=")')
    with open(needed(path), "rb") as file:
        buffer, base = _opened(path, file.read(CHUNK))
        while more := file.read(max(CHUNK, len(buffer))):  # ever more for an entry that is longer than the buffer
            if bar is not None:
                bar.update(len(more))
            buffer += more
            cut = len(buffer)
            while (cut := buffer.rfind(closing, 0, cut)) >= 0:
                match = boundary.match(buffer, cut)
                entries = match and _parse(path, base, buffer[:cut + 1], b"}")
                if entries is not None:
                    yield from entries
                    base, buffer = base + match.end(), buffer[match.end():]
                    break
    yield from _parse(path, base, buffer, b"")


def _opened(path, start):
    """First bytes of a file -> (those after the opening brace, their offset)."""
    opening = re.match(rb"(?:\xef\xbb\xbf)?\s*(\{?)", start)  # a byte-order mark may come first
    if not opening[1]:
        if start[opening.end():][:1] == b"[":
            raise ValueError(f"{path} holds a list, expected an object of key: value")
        raise ValueError(f"{path} is not JSON at byte {opening.end()}: an object starts with a brace")
    return start[opening.end():], opening.end()


def _parse(path, base, piece, end):
    """Entries of a piece of an object, or None when it was cut too early. end: b"}" when more follows, b"" at the end
    of the file, whose own brace is still there."""
    try:
        text = "{" + piece.decode("utf-8") + end.decode()
        # Objects as tuples of pairs: a dict would merge equal keys unseen, and arrays are lists.
        pairs = json.JSONDecoder(object_pairs_hook=tuple).decode(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {base + error.start} is not UTF-8; repair or copy the file again") from error
    except json.JSONDecodeError as error:
        # Cut too early, the error is at the very end or a string that began before it. Any other is in the file.
        if end and (error.msg.startswith("Unterminated string") or error.pos >= len(text) - 1):
            return None
        where = base + len(text[1:error.pos].encode()) if error.pos else base
        raise ValueError(f"{path} is not JSON at byte {where} ({error.msg}); was it written or copied to its end?"
                         ) from error
    return [(key, dict(value) if isinstance(value, tuple) else value) for key, value in pairs]


def read_csv(path, limit=None, columns=COLUMNS):
    """Yield (line number, row dict) of a csv that has all columns. ValueError naming file and column or line."""
    csv.field_size_limit(2**31 - 1)  # `evidence` holds whole paragraphs; the default of 128 KiB is an error there
    # utf-8-sig: a byte-order mark left by a spreadsheet would become part of the first column's name.
    with open(needed(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            # Read by name: the column order of the released files is not documented.
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{path}: column {', '.join(missing)} is missing; it has {reader.fieldnames}")
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
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 soon after line {reader.line_num} ({error.reason}); convert it"
                             ) from error


def read_jsonl(path, fields, limit=None):
    """Yield (line number, dict) of a file of JSON lines, plain or .gz. fields: str-valued keys that must be there."""
    for number, line in enumerate(_lines(path), 1):
        if limit is not None and number > limit:
            return
        if not line.strip():  # as after a last line that ends twice
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{number}: not a line of JSON ({error}); was it copied to its end?") from error
        if missing := [name for name in fields if not isinstance(row, dict) or not isinstance(row.get(name), str)]:
            raise ValueError(f"{path}:{number}: field {', '.join(missing)} is missing or no text; is this the file "
                             "that its name says?")
        yield number, {**row, **{name: whole(row[name]) for name in fields}}


def _lines(path):
    """Lines of a file, plain or .gz, as bytes. ValueError naming the file where a .gz is damaged or cut short."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(needed(path), "rb") as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: {error}; was it copied to its end?") from error


# ------------------------------------------------------------------------------------------- questions and their images

@dataclass(slots=True)
class Row:
    """A question that passed the reader."""
    query_id: str
    question: str
    collection: str       # where its image is: inat/train, inat/val, landmarks or oven
    image_ids: list       # of the collection, at least one
    positives: tuple      # keys of the knowledge base that it may have, the likeliest first; E-VQA: exactly one
    where: str            # file:line, for messages
    title: str = ""       # found by its title when none of the keys is there
    image: str = ""       # path below the root
    positive: str = ""    # the key


def question_file(args, split):
    """The file that holds a split's questions; FileNotFoundError naming those that would do."""
    if args.dataset == "infoseek":
        # "test" of EchoSight's and everybody's numbers is the official val; the official test has no answers.
        names = {"test": ("infoseek_test_filtered.csv", "infoseek_val.jsonl")}.get(
            split, ("infoseek_train_filtered.csv", "infoseek_train.jsonl"))
    else:
        names = (f"{split}.csv", "train_full_image_cleaned.csv")[:1 + (split == "train")]
    for name in names:
        if os.path.isfile(path := os.path.join(args.root, name)):
            return path
    others = f" (or {names[1]})" if names[1:] else ""
    raise FileNotFoundError(f"{os.path.join(args.root, names[0])}{others} is missing; give the splits that you have "
                            "with --splits")


def read_rows(args, split, drops):
    """A split's questions -> (list of Row, number of rows read). Rows that cannot be used go to drops."""
    path = question_file(args, split)
    rows, read = (read_infoseek if path.endswith(".jsonl") else read_evqa)(path, split, args.limit, drops)
    if args.dataset != "infoseek" or split == "test":
        return rows, read
    kept = []
    for row in rows:
        # By entity, so that no question about a val entity is trained on; crc32 is the same everywhere.
        if (zlib.crc32(row.positives[0].encode()) % HELD_OUT == 0) == (split == "val"):
            kept.append(row)
        else:
            drops.add("entity held out for val" if split == "train" else "entity left to train", row.where)
    return kept, read


def read_evqa(path, split, limit, drops):
    """A csv in E-VQA's columns -> (list of Row, rows read).

    query_id is data_id for InfoSeek's questions, else E-VQA_{split}_{i}, i counted over the single-hop rows in file
    order. As in prior work i does not depend on which images exist, so ids of two machines agree.
    """
    rows, read, single_hop, ids = [], 0, 0, set()
    collections = {"inaturalist": f"inat/{'train' if split == 'train' else 'val'}",  # val and test: iNaturalist's val
                   "landmarks": "landmarks", "infoseek": "oven"}
    for line, raw in read_csv(path, limit):
        read, where = read + 1, f"{path}:{line}"
        if raw["question_type"] not in SINGLE_HOP:
            drops.add(f"question_type {raw['question_type']!r}", where)
            continue
        # Taken before anything else can drop the row, see above.
        query_id, single_hop = f"E-VQA_{split}_{single_hop}", single_hop + 1
        if raw["question_type"] == "infoseek":
            if "data_id" not in raw:
                raise ValueError(f"{path}: column data_id is missing, InfoSeek's questions are known by it")
            query_id = raw["data_id"]
        image_ids = [name.strip() for name in raw["dataset_image_ids"].split("|")]
        if raw["dataset_name"] not in collections:
            drops.add(f"dataset_name {raw['dataset_name']!r}", where)
        elif not image_ids[0]:
            drops.add("image id unknown", f"{where}: {raw['dataset_name']} ''")
        elif not raw["question"].strip():
            drops.add("question empty", where)
        elif query_id in ids:
            drops.add("data_id repeated", f"{where}: {query_id}")
        else:
            ids.add(query_id)
            # The url verbatim, as all prior work compares it: decoding %C3 and the like would merge entries. And never
            # question_original: it names the answer.
            rows.append(Row(query_id, raw["question"], collections[raw["dataset_name"]], image_ids,
                            (raw["wikipedia_url"],), where))
    return rows, read


def read_infoseek(path, split, limit, drops):
    """The official infoseek_*.jsonl with its withkb file -> (list of Row, rows read).

    These files name an entity by its Wikidata id and title, the knowledge base by its url. The title is that of Wiki6M
    if its file is there (titles change), else of withkb; keys_of turns it into urls.
    """
    folder, name = os.path.split(path)
    entities = {row["data_id"]: (row["entity_id"], row["entity_text"]) for _, row in read_jsonl(
        os.path.join(folder, name.replace(".jsonl", "_withkb.jsonl")), ("data_id", "entity_id", "entity_text"))}
    titles = wiki6m_titles(folder, {entity for entity, _ in entities.values()})
    rows, read, ids, keys = [], 0, set(), {}
    for line, raw in read_jsonl(path, ("data_id", "image_id", "question"), limit):
        read, where = read + 1, f"{path}:{line}"
        if raw["data_id"] not in entities:
            drops.add("data_id not in the withkb file", f"{where}: {raw['data_id']}")
        elif not raw["question"].strip():
            drops.add("question empty", where)
        elif raw["data_id"] in ids:
            drops.add("data_id repeated", f"{where}: {raw['data_id']}")
        else:
            ids.add(raw["data_id"])
            entity, text = entities[raw["data_id"]]
            title = titles.get(entity, text)
            keys.setdefault(title, keys_of(title))  # one tuple for the many rows of an entity
            rows.append(Row(raw["data_id"], raw["question"], "oven", [raw["image_id"]], keys[title], where, title))
    return rows, read


def wiki6m_titles(folder, wanted):
    """{Wikidata id: title} of the wanted ids, from Wiki6M's file if there is one; else {}."""
    for name in ("Wiki6M_ver_1_0_title_only.jsonl", "Wiki6M_ver_1_0.jsonl", "Wiki6M_ver_1_0.jsonl.gz"):
        if os.path.isfile(path := os.path.join(folder, name)):
            rows = (row for _, row in read_jsonl(path, ("wikidata_id", "wikipedia_title")))
            return {row["wikidata_id"]: row["wikipedia_title"] for row in rows if row["wikidata_id"] in wanted}
    return {}


def keys_of(title):
    """Urls under which a knowledge base may have a title: as is, percent-encoded, and both with a capital."""
    name = title.strip().replace(" ", "_")
    names = [name, name[:1].upper() + name[1:]]
    return tuple(dict.fromkeys(WIKIPEDIA + form for name in names
                               for form in (name, urllib.parse.quote(name, safe="/:,()!*'@;~$"))))


def find_files(root, folder, wanted):
    """{stem: path below the root} of the wanted stems, by one walk of a folder: sharded or flat, any extension.

    A stem ends at the first dot (some have <id>.img.jpg). Of several files the first by path is taken. No stat is paid
    a row and extension, and nothing is kept for the millions of files that no row wants.
    """
    found = {}
    for entry in files_below(os.path.join(root, folder)):
        if (stem := entry.name.split(".")[0]) in wanted:
            path = os.path.relpath(entry.path, root).replace(os.sep, "/")
            if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES and path < found.get(stem, "\U0010ffff"):
                found[stem] = path
    return found


def files_below(folder):
    """Yield an os.DirEntry of each file below a folder, in any order. Links to folders are followed, as whole disks are
    linked in; a link to a folder that it lies in, which would lead round in a circle for ever, is not."""
    folders = [(folder, ())]
    while folders:
        path, above = folders.pop()
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in above:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # a link to itself: no folder
                    folders.append((entry.path, (*above, here)))
                else:
                    yield entry


def find_images(args, collection, wanted):
    """Image ids of a collection -> ({id: path below the root}, the reason for those that are not in it)."""
    if not collection.startswith("inat"):
        folder = args.landmarks if collection == "landmarks" else args.oven
        if folder is None:
            folder = "oven_images" if os.path.isdir(os.path.join(args.root, "oven_images")) else "."
        if not os.path.isdir(os.path.join(args.root, folder)):
            raise FileNotFoundError(f"{os.path.join(args.root, folder)} is missing; say where the images of "
                                    f"{collection} are with --{collection}")
        return find_files(args.root, folder, wanted), "image missing"
    split = collection.split("/")[1]
    by_name = os.path.join(args.root, args.inat, f"{split}_id2name.json")
    official = os.path.join(args.root, args.inat, f"{split}.json")
    if os.path.isfile(by_name):
        names = _checked(by_name, stream_json(by_name, b'"'))
        return {i: f"{args.inat}/{name}" for i, name in names if i in wanted}, "image id unknown"
    if os.path.isfile(official):
        return inat_names(official, args.inat, wanted), "image id unknown"
    # Renamed flat to <id>.jpg: ids of train and val do not meet.
    folder = os.path.join(args.root, args.inat)
    if os.path.isdir(folder) and (found := find_files(args.root, args.inat, wanted)):
        return found, "image missing"
    needed(by_name)  # says what is missing
    return {}, "image missing"


def inat_names(path, folder, wanted):
    """{image id: path} of the wanted ids from iNaturalist's own train.json or val.json (COCO's form: read whole)."""
    with open(path, encoding="utf-8") as file:
        try:
            return {str(image["id"]): folder + "/" + image["file_name"] for image in json.load(file)["images"]
                    if str(image["id"]) in wanted}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not iNaturalist's file of images with id and file_name "
                             f"({type(error).__name__}: {error}); was it copied to its end?") from error


def inside_root(args, path, where):
    """The path of a query's image again; ValueError where no pool file can name it, now and not after a day of
    embedding: write_pool refuses paths out of the root, and such as are no UTF-8."""
    if os.path.isabs(path) or ".." in path.replace("\\", "/").split("/") or "\0" in path or whole(path) != path:
        raise ValueError(f"{where}: its image {path!r} is not inside {args.root}, or its name is not UTF-8. Pools name "
                         "images below the root: make a link there to a folder that lies elsewhere (ln -s)")
    return path


def resolve_images(args, rows, drops):
    """Give each Row its image; rows and drops: {split: ...}. Returns {split: rows that have one}."""
    wanted = {}
    for row in (row for split in rows.values() for row in split):
        wanted.setdefault(row.collection, set()).update(row.image_ids)
    found = {collection: find_images(args, collection, ids) for collection, ids in wanted.items()}
    kept = {split: [] for split in rows}
    for split, row in ((split, row) for split in rows for row in rows[split]):
        paths, reason = found[row.collection]
        ids = row.image_ids if args.query_image == "any" else row.image_ids[:1]
        if len(ids) > 1:  # iNaturalist's json names files that may not be there; if none is, embed says "image missing"
            ids = [i for i in ids if i in paths and os.path.isfile(os.path.join(args.root, paths[i]))] or ids
        if there := [paths[i] for i in ids if i in paths]:
            row.image = inside_root(args, there[0], row.where)
            kept[split].append(row)
        else:
            drops[split].add(reason, f"{row.where}: {row.collection} {row.image_ids[0]!r}")
    return kept


# ------------------------------------------------------------------------------------------------- the knowledge base

def hash8(text):
    """64 bits of a text: among 10 million urls the odds that any two are equal are 3 in a million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


class ImageFiles:
    """Image url -> path below the root, for millions of urls: 16 bytes and the path each, where a dict takes 400.

    pairs: (url, path). name: of the source, for messages. by_name: urls are looked up by the stem of their file name,
    for a folder of files. A path is addressed by its number, -1 = not there; of equal urls the first counts.
    """

    def __init__(self, pairs, name, by_name=False):
        self.name, self.by_name = name, by_name
        hashes, starts, blob = array("Q"), array("Q", [0]), bytearray()
        for url, path in pairs:
            hashes.append(hash8(url))
            blob += path.encode("utf-8", "surrogatepass")  # file names need not be UTF-8
            starts.append(len(blob))
        order = np.argsort(np.frombuffer(hashes, np.uint64), kind="stable") if hashes else np.zeros(0, np.int64)
        self._numbers = order.astype(np.int32)
        # An array, not numpy's: bisect reads it without making an object of numpy at each of its 22 steps.
        self._hashes, self._starts, self._paths = array("Q", (np.array(hashes)[order]).tobytes()), starts, bytes(blob)

    def __len__(self):
        return len(self._hashes)

    def number(self, url):
        if self.by_name:
            url = file_stem(url)
        wanted = hash8(url)
        at = bisect_left(self._hashes, wanted)
        return int(self._numbers[at]) if at < len(self._hashes) and self._hashes[at] == wanted else -1

    def path(self, number):
        return self._paths[self._starts[number]:self._starts[number + 1]].decode("utf-8", "surrogatepass")


def file_stem(url):
    """https://a.b/c/Caf%C3%A9_1.JPG?x=1 -> Café_1"""
    return os.path.splitext(urllib.parse.unquote(url.split("?")[0].rsplit("/", 1)[-1]))[0]


def image_files(args, kb):
    """The ImageFiles that --kb-images names. kb: path of the knowledge base (AToMiC unpacks only what it lists)."""
    source = os.path.normpath(os.path.join(args.root, args.kb_images))
    name = os.path.basename(source)
    if not os.path.isdir(source):
        return ImageFiles(_checked(source, stream_json(source, b'"')), name)
    for folder in (source, os.path.join(source, "output")):
        tables = sorted(file for file in os.listdir(folder) if re.fullmatch(r"wiki_image_url_part_\d+_processed\.csv",
                                                                           file)) if os.path.isdir(folder) else []
        if tables:  # OMGM's; its paths start at the folder above output/
            start = os.path.relpath(os.path.dirname(source) if name == "output" else source, args.root)
            rows = (row for table in tables for _, row in read_csv(os.path.join(folder, table),
                                                                  columns=("image_URL", "img_path")))
            return ImageFiles(((row["image_URL"], os.path.normpath(os.path.join(start, row["img_path"])))
                               for row in rows if row["img_path"]), "OMGM's csv")
    if parts := sorted(file for file in os.listdir(source) if file.endswith(".parquet")):
        return ImageFiles(unpack_atomic(args.root, source, parts, kb, args.dry_run), "AToMiC")
    paths = sorted(os.path.relpath(entry.path, args.root).replace(os.sep, "/") for entry in files_below(source))
    return ImageFiles(((os.path.splitext(os.path.basename(path))[0], path) for path in paths), f"{name}/", by_name=True)


def _checked(source, pairs):
    for url, path in pairs:
        if not isinstance(path, str):
            raise ValueError(f"{source}: {url!r} has a {type(path).__name__}, expected the path of its image; is this "
                             "the file that its name says?")
        yield url, path


def unpack_atomic(root, source, parts, kb, dry_run=False):
    """AToMiC's parquet files -> (url, path) of the images that the knowledge base lists, written below
    ROOT/atomic_images. A part that was finished before is not read again: its list of pairs lies beside the images.
    dry_run: the same pairs, from the urls alone, and nothing is written."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{source} holds parquet files, which need one more package: pip install pyarrow")
    parquet, wanted = importlib.import_module("pyarrow.parquet"), None
    for part in parts:
        done = os.path.join(root, "atomic_images", f"{part}.json")
        if not os.path.isfile(done):
            if wanted is None:
                urls = array("Q", (hash8(url) for url in urls_of(kb)))
                wanted = np.unique(np.frombuffer(urls, np.uint64))
            pairs = {}
            for batch in parquet.ParquetFile(os.path.join(source, part)).iter_batches(
                    batch_size=256,  # few at once: images are megabytes
                    columns=["image_url"] if dry_run else ["image_url", "image"]):
                batch_urls = batch.column("image_url").to_pylist()
                hashes = np.array([hash8(url or "") for url in batch_urls], np.uint64)
                for i in np.flatnonzero(np.isin(hashes, wanted)):
                    path = f"atomic_images/{hashes[i] % 256:02x}/{hashes[i]:016x}.jpg"
                    pairs[batch_urls[i]] = path
                    if not dry_run:
                        write_image(os.path.join(root, path), batch.column("image")[int(i)].as_py())
            if dry_run:
                yield from pairs.items()
                continue
            os.makedirs(os.path.dirname(done), exist_ok=True)
            write_json(done, pairs)
        yield from stream_json(done, b'"')


def urls_of(kb):
    """Yield the image urls of a knowledge base."""
    for url, entry in stream_json(kb):
        check_entry(kb, url, entry, "release")
        yield from entry["image_urls"]


def write_image(path, value):
    """Write an image of AToMiC: its bytes, or a dict that holds them."""
    content = value["bytes"] if isinstance(value, dict) else value
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content or b"")  # empty: counted as unreadable


def candidate_text(entry, kind):
    """t_j of Eq. 3 for a knowledge-base entry; "" when it has none. kind: see --text."""
    if kind == "caption":
        parts = [caption for caption in entry["image_reference_descriptions"] if caption]
    else:
        parts = {"release": entry["section_texts"][:3], "lead": entry["section_texts"][:1], "title": []}[kind]
    text = "\n".join([entry["title"], *parts])
    # Characters, as in the authors' release; the tokenizer then cuts to its context, often before that.
    return whole(text[:500]) if text.strip() else ""


def whole(text):
    """The text without halves of surrogate pairs (a lone \\ud83d in JSON), which no tokenizer and no file takes."""
    return text.encode("utf-8", "replace").decode()


@dataclass
class Scan:
    """What a pass over the knowledge base leaves in memory; its entities are lines of work/kb.jsonl, their images
    (each once) of work/kb_image.jsonl. E entities that list an image file, P images."""
    entries_read: int = 0
    images_read: int = 0
    position: array = field(default_factory=lambda: array("i"))  # [E] number of the entry in the file
    count: array = field(default_factory=lambda: array("i"))     # [E] images of the entity
    image: array = field(default_factory=lambda: array("i"))     # [sum of count] line in kb_image.jsonl
    images: int = 0                                              # P
    known: dict = field(default_factory=dict)                    # key that some row wants -> entity
    titles: dict = field(default_factory=dict)                   # title that some row wants -> key, None = several


def scan_kb(args, rows, work, entry_drops, image_drops):
    """Stream the knowledge base once -> Scan, with work/kb.jsonl (as kb.jsonl, images not yet opened) and
    work/kb_image.jsonl (paths). rows: all Rows, whose keys are to be known. work None: write nothing (--dry-run)."""
    path = kb_file(args)
    files = image_files(args, path)
    wanted = {key for row in rows for key in row.positives}
    titles = {row.title for row in rows if row.title}
    scan, seen = Scan(), set()
    row_of = np.full(len(files), -1, np.int32)  # number of an image file -> its line, once it has one
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=os.path.getsize(path), desc="knowledge base", unit="B", unit_scale=True,
                                       disable=None))
        kb_lines, image_lines = (stack.enter_context(line_writer(work, name)) for name in ("kb", "kb_image"))
        for url, entry in stream_json(path, bar=bar):
            check_entry(path, url, entry, args.text)
            url, title = whole(url), whole(entry["title"])
            position, scan.entries_read = scan.entries_read, scan.entries_read + 1
            scan.images_read += len(entry["image_urls"])
            if url in seen:
                entry_drops.add("entry repeated", url)
                image_drops.add("entry repeated", url, len(entry["image_urls"]))
                continue
            seen.add(url)
            if title in titles:  # an entry without images makes a title ambiguous too
                scan.titles[title] = None if title in scan.titles else url
            if not (numbers := entry_images(files, url, entry["image_urls"], image_drops)):
                entry_drops.add(NO_IMAGE if entry["image_urls"] else "entry has no image", url)
                continue
            for number in numbers:
                if row_of[number] < 0:  # entries share images (flags, maps, logos): each is embedded once
                    row_of[number], scan.images = scan.images, scan.images + 1
                    image_lines(files.path(number))
            if url in wanted or title in titles:
                scan.known[url] = len(scan.count)
            scan.image.extend(row_of[numbers].tolist())
            scan.count.append(len(numbers))
            scan.position.append(position)
            kb_lines({"entity_id": url, "title": title, "text": candidate_text(entry, args.text),
                      "images": [files.path(number) for number in numbers]})
    return scan


def kb_file(args):
    """Path of the knowledge base: --kb, or the first known name below the root."""
    names = (args.kb,) if args.kb else KB_NAMES[args.dataset]
    paths = [os.path.join(args.root, name) for name in names]
    return needed(next((path for path in paths if os.path.isfile(path)), paths[0]))


def check_entry(path, url, entry, text):
    """ValueError when a field has another shape: that means another file format, not a bad entry to be dropped."""
    wanted = [("title", str), ("section_texts", list), ("image_urls", list)]
    wanted += [("image_reference_descriptions", list)] if text == "caption" else []
    for name, kind in wanted:
        if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
            raise ValueError(f"{path}: entry {url!r}: field {name!r} is missing or no {kind.__name__}")
    for name in ("section_texts", "image_urls"):
        if not all(isinstance(value, str) for value in entry[name]):
            raise ValueError(f"{path}: entry {url!r}: field {name!r} holds something that is no text")
    if text == "caption" and not all(value is None or isinstance(value, str)
                                     for value in entry["image_reference_descriptions"]):
        raise ValueError(f"{path}: entry {url!r}: field 'image_reference_descriptions' holds something that is no text")


def entry_images(files, url, image_urls, image_drops):
    """Numbers of an entry's image files, in order and distinct (urls do repeat)."""
    numbers, paths = [], set()
    for image_url in image_urls:
        if (number := files.number(image_url)) < 0:
            image_drops.add(f"image url not in {files.name}", f"{url}: {image_url}")
        elif (path := files.path(number)) in paths:
            image_drops.add("image repeated in its entry", f"{url}: {image_url}")
        else:
            paths.add(path)
            numbers.append(number)
    return numbers


def resolve_positives(rows, scan):
    """Decide the positive of each Row: the first of its keys that the knowledge base has, else the key of the one
    entry with its title, else its first key, which is then no entity's. E-VQA's rows have one key, taken verbatim."""
    for row in rows:
        found = next((key for key in row.positives if key in scan.known), None)
        row.positive = found or scan.titles.get(row.title) or row.positives[0]


# ----------------------------------------------------------------------------------------------------- files of lines

@contextmanager
def line_writer(work, name):
    """Yield a function that writes a value as one line of work/{name}.jsonl, replaced at the end. work None: nowhere"""
    if work is None:
        yield lambda value: None
        return
    with replacing(os.path.join(work, f"{name}.jsonl")) as temporary, open(temporary, "w", encoding="utf-8",
                                                                           errors="surrogatepass") as file:
        yield lambda value: file.write(json.dumps(value, ensure_ascii=False) + "\n")


class Lines:
    """work/{name}.jsonl with the start of each line, so that a shard reads its own and the file stays on disk."""

    def __init__(self, work, name):
        self.path = os.path.join(work, f"{name}.jsonl")
        with open(self.path, "rb") as file:
            self._starts = np.cumsum(np.fromiter((len(line) for line in file), np.int64))

    def __len__(self):
        return len(self._starts)

    def __getitem__(self, part):
        start, stop, _ = part.indices(len(self))
        with open(self.path, "rb") as file:
            file.seek(int(self._starts[start - 1]) if start else 0)
            return [json.loads(file.readline().decode("utf-8", "surrogatepass")) for _ in range(start, stop)]

    def __iter__(self):
        with open(self.path, "rb") as file:
            for line in file:
                yield json.loads(line.decode("utf-8", "surrogatepass"))


# ---------------------------------------------------------------------------------------------------------- embedding

@dataclass
class Workers:
    """The processes that torchrun started: this one's rank of world. Rank 0 reads and writes; all embed and search."""
    rank: int = 0
    world: int = 1

    def barrier(self):
        if self.world > 1:
            torch.distributed.barrier()

    def broadcast(self, array=None):
        """Rank 0's float32 or int64 [n, m], in every process."""
        head = torch.zeros(3, dtype=torch.int64)
        if self.rank == 0:
            head[:] = torch.tensor([*array.shape, array.dtype == np.int64])
        torch.distributed.broadcast(head, 0)
        rows, columns, whole = head.tolist()
        body = (torch.from_numpy(np.ascontiguousarray(array)) if self.rank == 0 else
                torch.empty(rows, columns, dtype=torch.int64 if whole else torch.float32))
        torch.distributed.broadcast(body, 0)
        return body.numpy()

    def gather(self, array):
        """Arrays of one shape and dtype -> on rank 0 the list of all processes', elsewhere None."""
        own = torch.from_numpy(np.ascontiguousarray(array))
        parts = [torch.empty_like(own) for _ in range(self.world)] if self.rank == 0 else None
        torch.distributed.gather(own, parts)
        return parts and [part.numpy() for part in parts]

    def share(self, kb_entity):
        """(first, end) of the rows of the knowledge base that this process searches: about M / world, whole entities.
        """
        first, end = (len(kb_entity) * rank // self.world for rank in (self.rank, self.rank + 1))
        return tuple(int(np.searchsorted(kb_entity, kb_entity[at])) if at < len(kb_entity) else at
                     for at in (first, end))


def join_workers(alone=False):
    """Workers from torchrun's environment; outside of it, one. alone: rank 0 searches by itself."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        # gloo, as little is sent (queries and what was found); and a week, as the others wait while rank 0 reads.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        # torchrun gives each process one thread unless told otherwise; those of a machine search at the same time.
        if os.environ.get("OMP_NUM_THREADS") == "1":
            together = 1 if alone else int(os.environ.get("LOCAL_WORLD_SIZE", world))
            faiss.omp_set_num_threads(max(1, (os.cpu_count() or 1) // together))
    return Workers(int(os.environ.get("RANK", 0)), world)


def work_folder(args):
    """Where lines and shards are: beside the data folder and not in it, as who copies that needs only the result."""
    return os.path.normpath(args.out) + ".work"


def device_of(args, workers):
    if args.device not in ("auto", "cuda") or (args.device == "cuda" and workers.world == 1):
        return args.device
    if args.device == "auto" and not torch.cuda.is_available():
        return "cpu"
    # Plain "cuda" too: of several processes each would put its 16 GB of weights on the first card.
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if workers.world > 1 else "cuda"


class Shards:
    """Float16 features [n, D] of the lines of work/{name}.jsonl, shard-size rows a file. bad: {row: (reason, message)}
    of images that cannot be decoded; their rows are zero and nobody reads them (a grey stand-in would rank)."""

    def __init__(self, work, name, count, size, dim):
        self.work, self.name, self.count, self.size, self.dim = work, name, count, size, dim
        self.bad = {}

    def __len__(self):
        return -(-self.count // self.size)

    def file(self, number, suffix):
        return os.path.join(self.work, f"{self.name}-{number:06d}.{suffix}")

    def key(self, number):
        """Key that a finished shard was made under, None if it is not there or a disk error left it cut or damaged."""
        try:
            with open(self.file(number, "json"), encoding="utf-8") as file:
                content = json.load(file)
            key, bad = content["key"], content["bad"]
            features = np.load(self.file(number, "npy"), mmap_mode="r")  # mapped: the header and the file's size are looked at
        except (OSError, ValueError, KeyError, TypeError):  # such a shard is made again
            return None
        rows = min(self.size, self.count - number * self.size)
        intact = features.shape == (rows, self.dim) and features.dtype == np.float16 and isinstance(bad, dict)
        return key if intact else None

    def write(self, number, key, features, bad):
        """The json is what says that a shard is whole: gone before, and back after, the features are replaced."""
        if os.path.exists(self.file(number, "json")):
            os.remove(self.file(number, "json"))
        write_array(self.file(number, "npy"), features)
        write_json(self.file(number, "json"), {"key": key, "bad": bad})

    def read_bad(self):
        for number in range(len(self)):
            with open(self.file(number, "json"), encoding="utf-8") as file:
                self.bad.update({number * self.size + int(i): tuple(v) for i, v in json.load(file)["bad"].items()})
        return self

    def take(self, rows):
        """Rows (integers [n], any order) -> float16 [n, D]."""
        rows, out = np.asarray(rows, np.int64), np.empty((len(rows), self.dim), np.float16)
        for number in np.unique(rows // self.size):
            mine = rows // self.size == number
            out[mine] = np.load(self.file(number, "npy"), mmap_mode="r")[rows[mine] - number * self.size]
        return out  # [n, D]


def embed(args, scorer, workers, name):
    """Lines of work/{name}.jsonl -> Shards, this process embedding those of its rank that are not there yet.

    Called by all processes in the same order. A shard is reused when its key is the same: scorer, its dtype, kind of
    device, and for each image path, size and time of change, for each text the text.
    """
    workers.barrier()  # rank 0 has written the lines
    work = work_folder(args)
    lines = Lines(work, name)
    shards = Shards(work, name, len(lines), args.shard_size, scorer.dim)
    encode = partial(embed_texts, scorer) if name == "kb" else partial(embed_images, args, scorer)
    own = range(workers.rank, len(shards), workers.world)
    total = sum(min(args.shard_size, len(lines) - number * args.shard_size) for number in own)
    with tqdm(total=total, desc=f"embed {name}", unit="row", disable=None if workers.rank == 0 else True) as bar:
        for number in own:
            items = lines[number * args.shard_size:(number + 1) * args.shard_size]
            items = [item["text"] for item in items] if name == "kb" else items
            key = shard_key(args, scorer, items, images=name != "kb")
            if shards.key(number) == key:
                bar.total -= len(items)  # so that rate and remaining time are those of what is left
                bar.refresh()
                continue
            shards.write(number, key, *encode(items, bar))
    workers.barrier()  # all shards are there
    return shards.read_bad()


def shard_key(args, scorer, items, images):
    """Names all that the features of a shard depend on."""
    # The identity is that of the files: the same weights in bfloat16 give features that differ in the third digit.
    digest = hashlib.blake2b(f"{SHARD_VERSION} {scorer.name} {torch.device(scorer.device).type} {scorer.dtype}"
                             .encode(), digest_size=16)
    for item in items:
        if images:
            try:
                stat = os.stat(os.path.join(args.root, item))
                item = f"{item}\0{stat.st_size}\0{stat.st_mtime_ns}"
            except (OSError, ValueError):  # not there; also a name too long for a file system, or with a zero byte
                item = f"{item}\0missing"
        digest.update(item.encode("utf-8", "surrogatepass") + b"\0\0")
    return digest.hexdigest()


def embed_images(args, scorer, paths, bar):
    """Image files -> (float16 [n, D] un-normalised, {row: (reason, message)} of those that cannot be read)."""
    features, bad, coming = np.zeros((len(paths), scorer.dim), np.float16), {}, []  # coming: rows of each batch

    def batches(pool):
        """Lists of images that can be read. The scorer asks for one list while it encodes the one before."""
        for start in range(0, len(paths), scorer.batch_size):
            opened = list(enumerate(pool.map(partial(open_image, args.root), paths[start:start + scorer.batch_size]),
                                    start))
            bad.update({i: image for i, image in opened if isinstance(image, tuple)})
            coming.append([i for i, image in opened if not isinstance(image, tuple)])
            bar.update(len(opened))
            yield [image for _, image in opened if not isinstance(image, tuple)]
    with ThreadPoolExecutor(args.workers) as pool:
        for batch in map(scorer.image_features, batches(pool)):  # [B, D]
            # float16 halves the files; at length ~10 its steps move a cosine by about 1e-5.
            features[coming.pop(0)] = batch
    return features, bad


def open_image(root, path):
    """PIL image, or (reason, message)."""
    try:
        return read_image(os.path.join(root, path))
    except FileNotFoundError as error:
        return "image missing", whole(str(error))  # file names need not be UTF-8, and this is written to a shard
    except ValueError as error:
        suffix = os.path.splitext(path)[1].lower()
        kind = f" ({suffix[1:]})" if suffix in (".svg", ".gif", ".tif", ".tiff") else ""
        return f"image unreadable{kind}", whole(str(error))


def embed_texts(scorer, texts, bar):
    """Texts -> (float16 [n, D] un-normalised, zeros where there is no text, {})."""
    features = np.zeros((len(texts), scorer.dim), np.float16)
    with_text = [i for i, text in enumerate(texts) if text]
    for start in range(0, len(with_text), scorer.batch_size):
        part = with_text[start:start + scorer.batch_size]
        features[part] = scorer.text_features([texts[i] for i in part])  # [B, D]
        bar.update(len(part))
    bar.update(len(texts) - len(with_text))
    return features, {}


# ---------------------------------------------------------------------------------------- the knowledge base's features

def write_rows(path, blocks, shape):
    """Write blocks of float16 rows as one .npy of a shape, atomically: np.save would need all of it in memory, and a
    memory map on a full disk kills the process where a write raises OSError."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for block in blocks:
            file.write(np.ascontiguousarray(block, "<f2").tobytes())


def write_kb(args, scan, images, texts, entry_drops, image_drops):
    """Shards and scan -> kb.jsonl, kb_image.npy, kb_entity.npy, kb_text.npy; returns int [E of the scan]: the
    line of each in kb.jsonl, or -1.

    Of an entity the images that have a feature are listed, so that row and path can be matched by counting; an entity
    without any is left out. Rows of an entity are consecutive, in the order of its images; zeros in kb_text: no text.
    """
    rows, owners, kept, start = array("i"), array("i"), [], 0
    numbers = np.array(scan.image)
    with replacing(os.path.join(args.out, "kb.jsonl")) as temporary:
        with open(temporary, "w", encoding="utf-8", errors="surrogatepass") as file:
            for j, entity in enumerate(Lines(work_folder(args), "kb")):
                own, start = numbers[start:start + scan.count[j]].tolist(), start + scan.count[j]
                for number in own:
                    if number in images.bad:
                        image_drops.add(images.bad[number][0], f"{entity['entity_id']}: {images.bad[number][1]}")
                good = [n for n, number in enumerate(own) if number not in images.bad]
                if not good:
                    entry_drops.add(NO_IMAGE, entity["entity_id"])
                    continue
                rows.extend(own[n] for n in good)
                owners.extend([len(kept)] * len(good))
                kept.append(j)
                line = {**entity, "images": [entity["images"][n] for n in good]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        check_size(args, scan, len(kept), entry_drops, image_drops)
    for name, shards, chosen in (("kb_image", images, np.array(rows)), ("kb_text", texts, np.array(kept))):
        blocks = (shards.take(chosen[i:i + (1 << 16)]) for i in range(0, len(chosen), 1 << 16))
        write_rows(os.path.join(args.out, f"{name}.npy"), blocks, (len(chosen), shards.dim))  # [M, D] and [E, D]
    write_array(os.path.join(args.out, "kb_entity.npy"), np.array(owners, np.int32))  # [M]
    entity_of = np.full(len(scan.count), -1, np.int64)
    entity_of[kept] = np.arange(len(kept))
    return entity_of


def check_size(args, scan, kept, entry_drops, image_drops):
    """ValueError when fewer entities are left than a pool needs."""
    if kept < args.k:
        raise ValueError(f"{kb_file(args)}: {kept} of {scan.entries_read} entries have a readable image, a pool needs "
                         f"{args.k}: lower --k or restore images; left out: "
                         f"{dict(entry_drops.counts + image_drops.counts)}; first cases: "
                         f"{ {**entry_drops.first, **image_drops.first} }")


def average_images(out, kb_entity):
    """--candidate-image mean: replace kb_image.npy [M, D] by its mean an entity [E, D], and kb_entity.npy to match.
    Done after retrieval, which matches single images. The mean of un-normalised features: Eq. 3 adds those."""
    kb_image = np.load(os.path.join(out, "kb_image.npy"), mmap_mode="r")
    starts = np.flatnonzero(np.diff(kb_entity, prepend=-1))  # [E]
    bounds = [*starts.tolist(), len(kb_entity)]

    def blocks(size=4096):
        for first in range(0, len(starts), size):
            last = min(first + size, len(starts))
            part = kb_image[bounds[first]:bounds[last]].astype(np.float32)
            sums = np.add.reduceat(part, starts[first:last] - bounds[first])  # [e, D]
            yield sums / np.diff(bounds[first:last + 1])[:, None]
    write_rows(os.path.join(out, "kb_image.npy"), blocks(), (len(starts), kb_image.shape[1]))
    write_array(os.path.join(out, "kb_entity.npy"), np.arange(len(starts), dtype=np.int32))


# ---------------------------------------------------------------------------------------------------------- retrieval

class BlockSearch:
    """Exact search as faiss's flat index does it, block by block, on any device: features stay on disk as float16, and
    the whole knowledge base is read once a search. The way on CUDA, where faiss-cpu cannot go, and where the flat
    index does not fit into memory."""

    def __init__(self, kb_image, device, block=1 << 15):
        self.kb_image, self.device, self.block, self.ntotal = kb_image, device, block, len(kb_image)

    def search(self, queries, depth, at_once=4096):
        """Normalised float32 [Q, D] -> (cosines [Q, depth] descending, rows [Q, depth])."""
        queries = torch.from_numpy(np.ascontiguousarray(queries)).to(self.device)
        best = torch.full((len(queries), depth), -2.0, device=self.device)
        rows = torch.full((len(queries), depth), -1, dtype=torch.int64, device=self.device)
        for start in range(0, self.ntotal, self.block):
            block = torch.from_numpy(normalise(self.kb_image[start:start + self.block])).to(self.device)  # [n, D]
            for first in range(0, len(queries), at_once):
                part = slice(first, first + at_once)
                cosines, columns = nearest(queries[part], block, min(depth, len(block)))  # [q, <= depth]
                cosines, columns = torch.cat([best[part], cosines], 1), torch.cat([rows[part], columns + start], 1)
                best[part], order = cosines.topk(depth, dim=1)  # [q, depth]
                rows[part] = columns.gather(1, order)
        return best.cpu().numpy(), rows.cpu().numpy()


def nearest(queries, block, depth):
    """Largest products of queries [q, D] with a block [n, D] -> (products [q, depth], rows [q, depth]), descending."""
    if queries.device.type == "cpu":  # faiss looks at the products while they are in the cache: 2.5 times as fast
        found = faiss.knn(queries.numpy(), block.numpy(), depth, metric=faiss.METRIC_INNER_PRODUCT)
        return tuple(torch.from_numpy(values) for values in found)
    return (queries @ block.T).topk(depth, dim=1)  # [q, n] -> [q, depth]


class Shared:
    """A search of the knowledge base that the processes of torchrun share: each looks through rows of its own. Rank 0
    asks and keeps the best of all, the others `serve` until it says `close`. One process just searches.

    find(depth, *arrays [Q, .]) -> (values [Q, depth] descending, numbers [Q, depth]) of the process's own rows. The
    best `depth` of all are among the best `depth` of each, so where each is exact, all are.
    """

    def __init__(self, find, workers, ntotal):
        self.find, self.workers, self.ntotal = find, workers, ntotal

    def ask(self, depth, *arrays):
        """Rank 0: arrays float32 or int64 [Q, .] -> (values, numbers) [Q, depth] over all rows."""
        if self.workers.world > 1:
            self.workers.broadcast(np.array([[depth, len(arrays)]]))
            for values in arrays:
                self.workers.broadcast(values)
        return self._best(depth, arrays)

    def search(self, queries, depth):
        """As an index of faiss has it: normalised float32 [Q, D] -> (cosines, rows) [Q, depth]."""
        return self.ask(depth, queries)

    def serve(self):
        """The other ranks: answer until rank 0 closes."""
        while True:
            depth, count = self.workers.broadcast()[0].tolist()
            if not depth:
                return
            self._best(depth, [self.workers.broadcast() for _ in range(count)])

    def close(self):
        """Rank 0: nothing more will be asked."""
        if self.workers.world > 1:
            self.workers.broadcast(np.zeros((1, 2), np.int64))

    def _best(self, depth, arrays):
        values, numbers = self.find(depth, *arrays)  # [Q, depth] each
        if self.workers.world == 1:
            return values, numbers
        # Some queries at a time: an image that thousands share takes the search deep, and `world` times that is much.
        for start in range(0, len(values), step := max(1, (1 << 22) // (self.workers.world * max(1, depth)))):
            part = slice(start, start + step)
            near, owners = self.workers.gather(values[part]), self.workers.gather(numbers[part])
            if self.workers.rank == 0:
                near, owners = np.concatenate(near, 1), np.concatenate(owners, 1)  # [step, world depth]
                order = np.argsort(-near, axis=1, kind="stable")[:, :depth]
                values[part], numbers[part] = (np.take_along_axis(x, order, 1) for x in (near, owners))
        return None if self.workers.rank else (values, numbers)


def find_in(index, first, depth, queries):
    """Shared's find: an index of the rows from `first` on. -inf and -1 where it finds fewer than depth."""
    values = np.full((len(queries), depth), -np.inf, np.float32)
    numbers, own = np.full((len(queries), depth), -1), min(depth, index.ntotal)
    if own:
        values[:, :own], rows = search(index, queries, own)
        numbers[:, :own] = np.where(rows < 0, -1, rows + first)
    return values, numbers


def search(index, queries, depth):
    """index.search; of a graph, as widely as it takes to find so many."""
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = max(256, 2 * depth)
    return index.search(queries, depth)


def build_index(kb_image, kind="flat", probes=32):
    """faiss index of cosines: inner products of normalised image features [M, D]. flat is exact: no luck. ivf looks
    into the `probes` nearest of 4 sqrt(M) lists; hnsw walks a graph. Both find most of what flat finds, sooner."""
    m, d = kb_image.shape
    if m == 0:  # the share of a process where there are more of them than entities
        return faiss.IndexFlatIP(d)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(d, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 128
    elif kind == "ivf":
        lists = max(1, min(int(4 * m ** 0.5), m // 39))  # 39: points a list that faiss asks for to train it
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
        sample = np.sort(np.random.default_rng(0).choice(m, min(m, 128 * lists), replace=False))
        index.train(normalise(kb_image[sample]))
        index.nprobe = min(probes, lists)
    else:
        index = faiss.IndexFlatIP(d)
    for start in range(0, m, 1 << 16):  # in blocks: the whole in float32 would be twice the file
        index.add(normalise(kb_image[start:start + (1 << 16)]))
    return index


def retrieve(index, kb_entity, queries, k, at_once=1 << 14):
    """For each query [Q, D] the k distinct entities whose best image matches best.

    -> (entities [Q, k], image rows [Q, k], cosines [Q, k], places [Q, k] of those images among all), best first, equal
    cosines by image row. kb_entity [M] may hold -1 for images of no entity. The nearest k images may belong to few
    entities, so the search goes deeper for the queries that have not found k yet.
    """
    found = tuple(np.zeros((len(queries), k), kind) for kind in (np.int64, np.int64, np.float64, np.int64))
    for start in range(0, len(queries), at_once):  # the results of a million queries would take gigabytes
        todo, depth = np.arange(start, min(start + at_once, len(queries))), min(index.ntotal, 4 * k)
        while len(todo):
            # Only the unfinished queries search again, four times deeper each time: most are done in the first round.
            cosines, rows = search(index, normalise(queries[todo]), depth)  # [Q', depth]
            todo, depth = pick_entities(found, todo, cosines, rows, kb_entity, depth, index.ntotal), depth * 4
            depth = min(index.ntotal, depth)
    return found


def nearest_entities(kb_image, kb_entity, queries, k, device="cpu"):
    """The k distinct entities whose best image is nearest to each query [Q, D], exactly -> (entities, image rows,
    cosines) [Q, k], best first."""
    entities, rows, cosines, _ = retrieve(BlockSearch(kb_image, device), kb_entity, queries, k)
    return entities, rows, cosines


def pick_entities(found, todo, cosines, rows, kb_entity, depth, total):
    """Write the results of the queries `todo` that hold k entities into found; returns the other queries."""
    k, unfinished = found[0].shape[1], []
    for i, cosine, row in zip(todo, cosines, rows, strict=True):
        # faiss leaves the order of equal cosines open, and those of one image may differ in the last bits: its products
        # depend on where in a block a row lies, so also on the number of processes.
        order = np.flatnonzero(row >= 0)  # an approximate index fills up with -1
        order = order[np.argsort(-cosine[order], kind="stable")]
        best = cosine[order]
        order = order[np.lexsort((row[order], np.cumsum(np.diff(-best, prepend=-best[:1]) > EQUAL)))]
        place = np.flatnonzero(kb_entity[row[order]] >= 0)  # counted among all images, also those of no entity
        order = order[place]
        entity = kb_entity[row[order]]
        first = np.sort(np.unique(entity, return_index=True)[1])[:k]  # best image of each entity, best entity first
        # An image that thousands of entities share (a map, a flag) ties with itself: unless the search saw all of them,
        # which ones it saw is chance, and differs between faiss, the blocks and CUDA.
        if depth < total and (len(first) < k or cosine[order[first[-1]]] <= cosine.min() + EQUAL):
            unfinished.append(i)
        elif len(first) < k:
            raise ValueError(f"the index holds {len(np.unique(kb_entity[kb_entity >= 0]))} entities, a pool needs {k} "
                             f"and {len(first)} were found: lower --k (or raise --probes)")
        else:
            for array_, values in zip(found, (entity, row[order], cosine[order], place), strict=True):
                array_[i] = values[first]
    return np.array(unfinished, np.int64)


def recall(found, exact):
    """Share of the exact entities [Q, k] that are among those found [Q, k], averaged over queries."""
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]))


def best_images(kb_image, kb_entity, queries, pools):
    """Of each entity of pools [Q, K] the image that matches query [Q, D] best -> (rows [Q, K], cosines [Q, K])."""
    starts = np.append(np.flatnonzero(np.diff(kb_entity, prepend=-1)), len(kb_entity))  # [E + 1]
    rows, cosines = np.zeros(pools.shape, np.int64), np.zeros(pools.shape)
    for i, query in enumerate(normalise(queries)):
        spans = [np.arange(starts[j], starts[j + 1]) for j in pools[i]]
        own = normalise(kb_image[np.concatenate(spans)]) @ query  # [all images of the pool]
        for n, (span, values) in enumerate(zip(spans, np.split(own, np.cumsum([len(s) for s in spans])[:-1]),
                                               strict=True)):
            rows[i, n], cosines[i, n] = span[values.argmax()], values.max()
    return rows, cosines


def cosines_of(kb_image, queries, rows, at_once=256):
    """Cosines of queries [Q, D] with images, rows [Q, K], in float64 [Q, K]. Those of a search differ in the last bits
    with blocks, threads and processes, and so would pools that are otherwise the same."""
    found = np.zeros(rows.shape)
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        images, query = (np.asarray(x, np.float64) for x in (kb_image[rows[part]], queries[part]))  # [q, K, D], [q, D]
        lengths = np.sqrt(np.einsum("qkd,qkd->qk", images, images) * np.einsum("qd,qd->q", query, query)[:, None])
        found[part] = np.einsum("qkd,qd->qk", images, query) / lengths
    return found


def mine(kb, queries, positives, k, tolerance):
    """The release's pools: the positive and the k - 1 other entities whose best image is the nearest to it in cosine
    with the query, at most `tolerance` away. queries [Q, D], positives int [Q].

    -> (found as retrieve returns it, bool [Q]: there were that many). Exact, in one pass over the knowledge base.
    """
    target = best_images(kb.image, kb.entity, queries, positives[:, None])[1].astype(np.float32)  # [Q, 1]
    near, chosen = kb.index.ask(k - 1, normalise(queries), target, positives[:, None])  # [Q, k - 1]
    enough = (-near <= tolerance).all(1)
    pools = np.concatenate([positives[:, None], np.maximum(chosen, 0)], 1)  # [Q, k]
    rows, cosines = best_images(kb.image, kb.entity, queries, pools)
    order = np.argsort(-cosines, axis=1, kind="stable")  # best first, as retrieval has it
    pools, rows, cosines = (np.take_along_axis(x, order, 1) for x in (pools, rows, cosines))
    return (pools, rows, cosines, np.zeros_like(rows)), enough


def find_as_near(kb_image, kb_entity, device, depth, queries, target, positives, block=1 << 15):
    """Shared's find for `mine`: in these rows the entities other than the positive [Q, 1] whose best cosine is nearest
    to the positive's, target [Q, 1] -> (minus the gap [Q, depth], entity [Q, depth]). Of equal gaps the first entities:
    an image that many share would else leave it to chance, to blocks and to processes whose names are in the pool."""
    query, target, gold = (torch.from_numpy(x).to(device) for x in (queries, target, positives))
    gaps = torch.full((len(query), depth), float("inf"), device=device)
    chosen = torch.full((len(query), depth), -1, dtype=torch.int64, device=device)
    first = 0
    while first < len(kb_entity):
        # Whole entities a block; at the end of the array there is nothing to cut.
        end = int(np.searchsorted(kb_entity, kb_entity[min(first + block, len(kb_entity)) - 1], side="right"))
        cosines = query @ torch.from_numpy(normalise(kb_image[first:end])).to(device).T  # [Q, n]
        owner = torch.from_numpy(kb_entity[first:end].astype(np.int64)).to(device)
        entities, local = owner.unique_consecutive(return_inverse=True)  # [e], [n]
        best = cosines.new_full((len(query), len(entities)), -2).scatter_reduce(
            1, local.expand(len(query), -1), cosines, "amax")  # [Q, e]
        gap = (best - target).abs()
        gap[entities[None] == gold] = float("inf")
        gap = torch.cat([gaps, gap], 1)  # [Q, depth + e]
        names = torch.cat([chosen, entities.expand(len(query), -1)], 1)  # ascending
        last = gap.topk(depth, dim=1, largest=False).values[:, -1:]  # [Q, 1]
        sure, equal = gap < last, gap == last
        keep = sure | (equal & (equal.cumsum(1) <= depth - sure.sum(1, keepdim=True)))  # depth a query
        gaps, chosen, first = gap[keep].view(-1, depth), names[keep].view(-1, depth), end
    gaps, order = gaps.sort(dim=1, stable=True)
    return -gaps.cpu().numpy(), chosen.gather(1, order).cpu().numpy()


# -------------------------------------------------------------------------------------------------- EchoSight's index

def read_ids(path):
    """A pickled flat list of whole numbers or texts -> list. Nothing is unpickled: its opcodes are read, and one that
    could build or call anything else is refused. ValueError naming it."""
    ints = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG"}
    texts = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
    puts, gets = {"BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"}, {"BINGET", "LONG_BINGET", "GET"}
    frame = {"PROTO", "FRAME", "MARK", "APPEND", "APPENDS", "STOP"}
    values, memo, lists = [], {}, 0
    with open(needed(path), "rb") as file:
        try:
            for opcode, argument, at in pickletools.genops(file):
                name = opcode.name
                if name in ints and type(argument) is int or name in texts:  # INT may also spell a bool
                    values.append(argument)
                elif name in puts:  # the list itself comes first, before any value
                    memo[len(memo) if name == "MEMOIZE" else argument] = values[-1] if values else None
                elif name in gets and memo.get(argument) is not None:
                    values.append(memo[argument])
                elif name in ("EMPTY_LIST", "LIST") and not lists:
                    lists = 1
                elif name not in frame:
                    raise ValueError(f"opcode {name} at byte {at} is not that of a flat list of numbers or texts")
        except ValueError as error:
            raise ValueError(f"{path}: {error}; it is not read, as it could run code") from error
    if not lists:
        raise ValueError(f"{path} holds no list of numbers or texts")
    return values


def echosight_index(args, dim, scan):
    """EchoSight's folder -> (faiss index, ids [M]: of each vector, the place of its entity in the knowledge base)."""
    path = needed(os.path.join(args.echosight, "kb_index.faiss"))
    # Mapped, not loaded: E-VQA's is 26 GB.
    try:
        index = faiss.read_index(path, getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP))
    except RuntimeError as error:
        raise ValueError(f"{path}: faiss cannot read it ({error}); fetch it again") from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:  # of distances the largest would rank first
        raise ValueError(f"{path} is no index of inner products, as EchoSight's is")
    ids = read_ids(os.path.join(args.echosight, "kb_index_ids.pkl"))
    if index.d != dim or index.ntotal != len(ids):
        raise ValueError(f"{path}: {index.ntotal} vectors of {index.d} numbers, but {len(ids)} ids and a scorer of "
                         f"{dim}: these files do not belong together")
    if any(not isinstance(i, int) or not 0 <= i < scan.entries_read for i in set(ids)):
        raise ValueError(f"{args.echosight}/kb_index_ids.pkl: ids must be places in {kb_file(args)}, 0 to "
                         f"{scan.entries_read - 1}; this index is of another knowledge base")
    return index, np.array(ids)


def owners_of(ids, scan, rows):
    """Entity of each vector, -1 = none: ids are places in the knowledge base, rows [E] the number of each entity."""
    entity_at = np.full(scan.entries_read, -1, np.int32)
    entity_at[np.array(scan.position)] = rows
    return entity_at[ids]


def restrict(args, scan, keep, entry_drops, image_drops):
    """Reduce a scan and its lines to the entities of keep (sorted), so that only what a pool holds is embedded."""
    work = work_folder(args)
    lines, left = Lines(work, "kb"), Scan(scan.entries_read, scan.images_read, titles=scan.titles)
    row_of, new = {}, {int(j): i for i, j in enumerate(keep)}
    with line_writer(work, "kb_image") as image_line, line_writer(work, "kb") as kb_line:
        for j, entity in enumerate(lines):
            if j not in new:
                entry_drops.add("entity in no pool", entity["entity_id"])
                image_drops.add("entity in no pool", entity["entity_id"], scan.count[j])
                continue
            for path in entity["images"]:
                if path not in row_of:
                    row_of[path] = len(row_of)
                    image_line(path)
                left.image.append(row_of[path])
            left.count.append(scan.count[j])
            left.position.append(scan.position[j])
            kb_line(entity)
    left.images, left.known = len(row_of), {key: new[j] for key, j in scan.known.items() if j in new}
    return left


def check_echosight(args, index, entities, kb_image, kb_entity):
    """Refuse an index whose vectors are not those of the entities that its ids name.

    entities [M']: of each vector of the index, by lines of kb.jsonl. Counting cannot align vectors and images (an
    image that had no feature, or came twice, shifts all that follow), so the content must: a vector has to be that of
    one of its entity's images. The pool's images are then our own best match, and no alignment is taken on trust.
    """
    vectors = np.flatnonzero(entities >= 0)
    vectors = np.sort(np.random.default_rng(0).choice(vectors, min(2000, len(vectors)), replace=False))
    starts = np.append(np.flatnonzero(np.diff(kb_entity, prepend=-1)), len(kb_entity))
    near = 0
    for vector in vectors.tolist():
        own = normalise(kb_image[starts[entities[vector]]:starts[entities[vector] + 1]])  # [images, D]
        near += (own @ normalise(index.reconstruct(vector))).max() > 0.98  # float16 and other kernels cost about .01
    if near < 0.8 * len(vectors):  # some images of theirs may be missing here
        raise ValueError(f"{args.echosight}: {near} of {len(vectors)} vectors looked at are features of an image of "
                         "the entity that their id names; the index is of another scorer or knowledge base, or its "
                         "ids are shifted (the E-VQA index before January 2025 was)")
    return near / len(vectors)


# -------------------------------------------------------------------------------------------------------------- pools

class Pools:
    """A split's queries as a sequence of Query, each made when asked for: a million at once would take gigabytes.
    rows: list of Row; found: as retrieve returns it; labels, images: int [Q, K]; keep: the queries to be seen."""

    def __init__(self, rows, found, labels, images, keep):
        self.rows, self.found, self.labels, self.images, self.keep = rows, found, labels, images, keep

    def __len__(self):
        return len(self.keep)

    def __getitem__(self, n):
        if n >= len(self.keep):
            raise IndexError(n)  # ends a loop over it
        i, row = self.keep[n], self.rows[self.keep[n]]
        return Query(row.query_id, row.image, row.question, [row.positive])


def find_pools(args, split, kb, full, positives):
    """Pools of a split by --pool -> (found as retrieve returns it, bool [Q]: usable). positives [Q]: entity or -1."""
    usable = np.ones(len(full), bool)
    if args.pool == "mined":
        usable = positives >= 0
        found = tuple(np.zeros((len(full), args.k), kind) for kind in (np.int64, np.int64, np.float64, np.int64))
        parts = np.flatnonzero(usable)
        for start in range(0, len(parts), 1 << 10):  # times 32,768 images a block: 134 MB of cosines
            part = parts[start:start + (1 << 10)]
            mined, usable[part] = mine(kb, full[part], positives[part], args.k, args.similarity_tolerance)
            for every, some in zip(found, mined, strict=True):
                every[part] = some
        return found, usable
    if kb.pools is None:
        entities, rows, _, places = retrieve(kb.index, kb.entity, full, args.k)
        return (entities, rows, cosines_of(kb.image, full, rows), places), usable
    return kb.pools[split], usable


def make_pools(args, split, kb, rows, full, drops):
    """Rows with their full-image features [Q, D] -> Pools; label 1 where the entity is the row's positive."""
    positives = np.array([kb.known.get(row.positive, -1) for row in rows], np.int64)
    found, usable = find_pools(args, split, kb, full, positives)
    labels = (found[0] == positives[:, None]).astype(np.int64)  # [Q, K]
    if args.top == "images":
        # EchoSight takes the top K images and their entities, fewer than K. Every pool here has K, so the rest is the
        # next entities, but a positive among those is a miss, as it is there.
        labels[found[3] >= args.k] = 0
    if args.candidate_image == "retrieved":
        images = found[1]
    elif args.candidate_image == "mean":
        images = found[0]  # average_images leaves a row an entity
    else:
        images = np.searchsorted(kb.entity, np.arange(kb.entity[-1] + 1))[found[0]]  # rows of an entity: consecutive
    keep = []
    for i, row in enumerate(rows):
        # Training learns from the positive's rank, so a pool without it teaches nothing. val and test keep all: there a
        # miss counts as 0, and dropping it would flatter every method. Mined pools have their positive or are none.
        if usable[i] and (split != "train" or labels[i].any()):
            keep.append(i)
        elif positives[i] < 0 and row.positive not in kb.unused:
            drops.add("positive not in the knowledge base", f"{row.where}: {row.positive}")
        else:
            drops.add("positive not in the pool" if usable[i] else "too few negatives as similar as the positive",
                      f"{row.where}: {row.positive}")
    return Pools(rows, found, labels, images, keep)


# ---------------------------------------------------------------------------------------------------------- the stage

@dataclass
class KB:
    """The knowledge base as written, and what retrieval needs."""
    image: np.ndarray            # float16 [M, D], memory-mapped
    entity: np.ndarray           # int32 [M]
    known: dict                  # key of an entity that some row wants -> entity
    device: str
    index: Shared | None = None  # what --index or --pool mined asks for
    pools: dict | None = None    # EchoSight's: {split: found}
    unused: set = frozenset()    # EchoSight's: keys of entities that are there, but in no pool, so not embedded
    notes: dict = field(default_factory=dict)  # about the index, for the manifest


@dataclass
class Questions:
    """A split as read: its Rows, of those with an image, and what was left out."""
    rows: list
    read: int
    drops: Drops


def read_questions(args, work):
    """All splits -> {split: Questions}, and work/query-{split}.jsonl with the distinct images of each."""
    drops, read, rows = {split: Drops() for split in args.splits}, {}, {}
    for split in args.splits:
        rows[split], read[split] = read_rows(args, split, drops[split])
    rows = resolve_images(args, rows, drops)
    for split in args.splits:
        with line_writer(work, f"query-{split}") as line:
            for path in dict.fromkeys(row.image for row in rows[split]):
                line(path)
    return {split: Questions(rows[split], read[split], drops[split]) for split in args.splits}


def read_all(args, work, entry_drops, image_drops):
    """Everything but images -> ({split: Questions}, Scan), and the lines of all that is to be embedded in work."""
    questions = read_questions(args, work)
    for split in args.splits:
        check_rows(args, split, questions[split], questions[split].rows)
    rows = [row for split in questions.values() for row in split.rows]
    scan = scan_kb(args, rows, work, entry_drops, image_drops)
    resolve_positives(rows, scan)
    return questions, scan


def check_rows(args, split, questions, kept):
    """ValueError when nothing is left of a split."""
    if not len(kept):
        raise ValueError(f"{question_file(args, split)}: none of {questions.read} rows can be used for {split}: "
                         f"{dict(questions.drops.counts)}; first cases: {questions.drops.first}. Mend that, or leave the "
                         "split out with --splits" + " (and train with --eval-every 0)" * (split == "val"))


def with_features(questions, shards):
    """Questions whose image can be read -> (list of Row, float16 [Q, D]). The others go to their drops."""
    number = {}
    for row in questions.rows:
        number.setdefault(row.image, len(number))  # the order in which read_questions wrote them
    kept = []
    for row in questions.rows:
        if number[row.image] in shards.bad:
            reason, message = shards.bad[number[row.image]]
            questions.drops.add(reason, f"{row.where}: {message}")
        else:
            kept.append(row)
    return kept, shards.take([number[row.image] for row in kept])  # [Q, D]


def search_echosight(args, dim, scan, questions, queries, drops):
    """Retrieve all splits with EchoSight's index and keep only what was found -> (index, ids, found of each split by
    entities of the old scan, those entities sorted, the reduced scan)."""
    index, ids = echosight_index(args, dim, scan)
    owners = owners_of(ids, scan, np.arange(len(scan.count)))
    # A few more than k, for entities whose images turn out unreadable.
    k = min(args.k + 5, len(np.unique(owners[owners >= 0])))
    if k < args.k:
        raise ValueError(f"{args.echosight}: the index holds {k} usable entities, a pool needs {args.k}: lower --k")
    found = [retrieve(index, owners, with_features(Questions(questions[split].rows, 0, Drops()), queries[split])[1], k)
             for split in args.splits]
    keep = np.unique(np.concatenate([entities.ravel() for entities, *_ in found]))
    return index, ids, found, keep, restrict(args, scan, keep, *drops)


def echosight_pools(args, kb, echo, scan, entity_of, questions, queries):
    """What search_echosight found -> kb.pools, in entities of kb.jsonl and with images chosen by our own features."""
    index, ids, found, keep, _ = echo
    kb.notes["vectors_confirmed"] = check_echosight(args, index, owners_of(ids, scan, entity_of), kb.image, kb.entity)
    kb.pools = {}
    for split, (entities, _, cosines, places) in zip(args.splits, found, strict=True):
        full = with_features(Questions(questions[split].rows, 0, Drops()), queries[split])[1]
        entities = entity_of[np.searchsorted(keep, entities)]  # [Q, k + 5]
        if ((entities >= 0).sum(1) < args.k).any():
            raise ValueError(f"{split}: of the {entities.shape[1]} entities retrieved for a query fewer than {args.k} "
                             "have a readable image; restore images or lower --k")
        first = np.argsort(entities < 0, axis=1, kind="stable")[:, :args.k]
        entities, cosines, places = (np.take_along_axis(x, first, 1) for x in (entities, cosines, places))
        kb.pools[split] = (entities, best_images(kb.image, kb.entity, full, entities)[0], cosines, places)


def index_files(args, world):
    """Names of the index files that are written: one of all rows, or, under torchrun, one of each process's."""
    # Not with mean: average_images replaces the rows that the index was made of, so its numbers would name others.
    return []


def make_index(args, kb, workers, queries):
    """Set kb.index to what --pool and --index ask for, of this process's rows; write its file; measure an approximate
    one. queries: Shards to measure with."""
    first, end = workers.share(kb.entity)
    image, shared = kb.image[first:end], partial(Shared, workers=workers, ntotal=len(kb.image))
    if args.pool == "mined":
        kb.index = shared(partial(find_as_near, image, kb.entity[first:end], kb.device))
        return
    blocks, kb.notes = shared(partial(find_in, BlockSearch(image, kb.device), first)), {"kind": args.index}
    kb.index = blocks
    if args.index == "blocks":
        return
    index = build_index(image, args.index, args.probes)
    if files := index_files(args, workers.world):
        kb.notes |= {} if workers.world == 1 else {"shards": workers.world}
        with replacing(os.path.join(args.out, files[workers.rank])) as temporary:
            try:
                faiss.write_index(index, temporary)
            except RuntimeError as error:  # faiss has no error of its own for a full disk
                raise OSError(errno.ENOSPC, f"{files[workers.rank]} cannot be written ({error})") from error
    if args.index == "flat" and torch.device(kb.device).type == "cuda":
        return  # faiss-cpu's flat index and the blocks find the same
    kb.index = shared(partial(find_in, index, first))
    if args.index != "flat":
        measure_recall(args, kb, blocks, queries)


def measure_recall(args, kb, exact, queries):
    """What an approximate kb.index finds of the pools that an exact one makes, into kb.notes of rank 0.

    queries: Shards, of which the first 256 that can be read are asked."""
    if kb.index.workers.rank:
        exact.serve()
        kb.index.serve()
        return
    queries = queries.take([i for i in range(queries.count) if i not in queries.bad][:256])
    wanted = retrieve(exact, kb.entity, queries, args.k)[0]  # [Q, k]
    exact.close()  # before the other is asked, or its queries would be answered by this one
    found = retrieve(kb.index, kb.entity, queries, args.k)[0]
    kb.index.close()
    kb.notes.update(recall=round(recall(found, wanted), 4), measured_on=len(queries))


def write_split(args, split, kb, questions, shards):
    """Retrieve and write one split; returns its entry in the manifest."""
    rows, full = with_features(questions, shards)
    pools = make_pools(args, split, kb, rows, full, questions.drops) if rows else []
    check_rows(args, split, questions, pools)
    pool_files.write_split(args.out, split, pools, pool=pools.found[0][pools.keep], pool_image=pools.images[pools.keep],
                           labels=pools.labels[pools.keep], retrieval=pools.found[2][pools.keep],
                           full=full[pools.keep])
    return {"file": os.path.basename(question_file(args, split)), "rows_read": questions.read, "kept": len(pools),
            "with_positive": int(pools.labels[pools.keep].sum()),
            "positive_in_kb": sum(rows[i].positive in kb.known or rows[i].positive in kb.unused for i in pools.keep),
            "dropped": dict(questions.drops.counts), "first_dropped": questions.drops.first}


def describe(path):
    """Size and sha256 of a written file: load_data compares the size, and a run's identity rests on the hash."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return {"bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def expected_bytes(args, dim, scan, questions):
    """{what: bytes} that a run writes."""
    rows = sum(len(split.rows) for split in questions.values())
    images, texts = len(scan.image), len(scan.count)
    graph = 300 * images if args.index == "hnsw" else 0  # 32 to 64 neighbours of 4 bytes, and their bookkeeping
    return {"shards": 2 * dim * (scan.images + texts + rows), "kb_image.npy": 2 * dim * images,
            "kb_text.npy": 2 * dim * texts, "index.faiss": 4 * dim * images + graph if index_files(args, 1) else 0,
            "kb.jsonl": 2 * 800 * texts,  # and its copy in work; 500 characters of text and the image paths
            "queries": rows * (2 * dim + 1000)}


def check_disk(args, dim, scan, questions):
    """ValueError when the disk cannot hold the result: hours later it would be found out the hard way."""
    there = sum(entry.stat().st_size for entry in os.scandir(work_folder(args)))
    sizes, free = expected_bytes(args, dim, scan, questions), shutil.disk_usage(args.out).free
    if sum(sizes.values()) - there > free:
        raise ValueError(f"{args.out}: about {sum(sizes.values()) / 1e9:.1f} GB will be written "
                         f"({', '.join(f'{name} {size / 1e9:.1f}' for name, size in sizes.items())}) and "
                         f"{free / 1e9:.1f} GB are free; choose another --out")


def prepare(args):
    """The whole stage; returns the manifest, or None in the processes of torchrun that only embed and search."""
    workers = join_workers(alone=bool(args.echosight))
    scorer = load_scorer(args.scorer, device_of(args, workers), args.scorer_dtype)
    scorer.batch_size = args.batch_size
    if args.dry_run:
        return None if workers.rank else dry_run(args, scorer)
    work, kb_drops, scan, questions, echo = work_folder(args), (Drops(), Drops()), None, None, None
    os.makedirs(args.out, exist_ok=True)
    os.makedirs(work, exist_ok=True)
    if workers.rank == 0:
        lock = hold(work, "--out")  # noqa: F841 (let go of when this function ends)
        clear(args, workers)
        questions, scan = read_all(args, work, *kb_drops)
        check_size(args, scan, len(scan.count), *kb_drops)  # now, and not after a day of embedding
        check_disk(args, scorer.dim, scan, questions)
    queries = {split: embed(args, scorer, workers, f"query-{split}") for split in args.splits}
    if args.echosight and workers.rank == 0:
        listed = set(scan.known)
        echo = search_echosight(args, scorer.dim, scan, questions, queries, kb_drops)
        scan = echo[-1]
    images, texts = embed(args, scorer, workers, "kb_image"), embed(args, scorer, workers, "kb")
    entity_of = None if workers.rank else write_kb(args, scan, images, texts, *kb_drops)
    workers.barrier()  # the knowledge base is written
    kb = KB(np.load(os.path.join(args.out, "kb_image.npy"), mmap_mode="r"),
            np.load(os.path.join(args.out, "kb_entity.npy")), {}, str(scorer.device))
    if not args.echosight:
        make_index(args, kb, workers, queries[args.splits[-1]])
        workers.barrier()  # index files are written
    if workers.rank:
        if kb.index:  # EchoSight's is searched by rank 0 alone
            kb.index.serve()
        return None
    kb.known = {key: int(entity_of[j]) for key, j in scan.known.items() if entity_of[j] >= 0}
    if echo:
        kb.unused = listed - scan.known.keys()
        echosight_pools(args, kb, echo, scan, entity_of, questions, queries)
    splits = {split: write_split(args, split, kb, questions[split], queries[split]) for split in args.splits}
    if kb.index:
        kb.index.close()
    return finish(args, workers, scorer, scan, kb, splits, *kb_drops)


def clear(args, workers):
    """Remove what must not lie there while files change: an old manifest would vouch for new ones, and index files of
    another way, or of another number of processes, whole or cut short by a kill, would lie beside them."""
    kept = index_files(args, workers.world)
    for name in os.listdir(args.out):
        index = re.fullmatch(r"index(-\d{5}-of-\d{5})?\.faiss(\.tmp)?", name)
        if name == "manifest.json" or (index and name not in kept):
            os.remove(os.path.join(args.out, name))


def finish(args, workers, scorer, scan, kb, splits, entry_drops, image_drops):
    """Write the manifest, last of all: what a later stage would otherwise have to be told again, or would guess."""
    if args.candidate_image == "mean":
        average_images(args.out, kb.entity)
        image_drops.add("averaged with others of its entity", "every entity of several images",
                        len(kb.entity) - len(np.unique(kb.entity)))
    images = int(np.load(os.path.join(args.out, "kb_image.npy"), mmap_mode="r").shape[0])
    kb_counts = {"file": os.path.basename(kb_file(args)), "entries_read": scan.entries_read,
                 "kept": int(kb.entity[-1]) + 1, "dropped": dict(entry_drops.counts),
                 "images_read": scan.images_read, "images": images, "images_dropped": dict(image_drops.counts),
                 "first_dropped": {**entry_drops.first, **image_drops.first}}
    names = ["kb.jsonl", "kb_image.npy", "kb_entity.npy", "kb_text.npy",
             *index_files(args, workers.world),
             *(name for split in args.splits for name in (f"{split}.jsonl", *(
                 f"{split}_{part}.npy" for part in pool_files.ARRAYS)))]
    manifest = {
        "version": 2, "dataset": args.dataset, "args": vars(args),
        "root": os.path.relpath(args.root, args.out),  # so that raw/ and data/ can move together
        "scorer": {"name": scorer.name, "dtype": str(scorer.dtype).removeprefix("torch."),
                   "fingerprint": scorer.fingerprint().tolist()}, "K": args.k, "dim": scorer.dim,
        "splits": splits, "kb": kb_counts, "index": kb.notes,
        "files": {name: describe(os.path.join(args.out, name)) for name in names},
        "packages": {module.__name__: module.__version__ for module in (torch, faiss, np, PIL)}}
    write_json(os.path.join(args.out, "manifest.json"), manifest)
    if args.delete_shards:
        shutil.rmtree(work_folder(args))
    return manifest


def dry_run(args, scorer):
    """Read and count everything, embed nothing but a trial batch, write nothing; returns the report as text."""
    entry_drops, image_drops = Drops(), Drops()
    questions, scan = read_all(args, None, entry_drops, image_drops)
    rows = [row for split in questions.values() for row in split.rows]
    groups = [("kb", scan.entries_read, len(scan.count), ""), ("images", scan.images_read, len(scan.image), "")]
    groups += [(split, part.read, len(part.rows), f"{sum(row.positive in scan.known for row in part.rows)} in the kb")
               for split, part in questions.items()]
    dropped = [("kb", entry_drops), ("images", image_drops)]
    dropped += [(split, part.drops) for split, part in questions.items()]
    images = scan.images + sum(len({row.image for row in part.rows}) for part in questions.values())
    per_image, per_text = trial(args, scorer, [row.image for row in rows[:args.batch_size]])
    seconds = images * per_image + len(scan.count) * per_text
    sizes = expected_bytes(args, scorer.dim, scan, questions)
    lines = [count_table(groups, [(name, part.counts, part.first) for name, part in dropped], "positive"),
             f"To embed: {images} images and {len(scan.count)} texts (files not opened yet), about "
             f"{seconds / 3600:.2f} hours on one {scorer.device} ({1 / per_image:.0f} images, {1 / per_text:.0f} texts "
             "a second)",
             f"To write: {sum(sizes.values()) / 1e9:.2f} GB ("
             f"{', '.join(f'{name} {size / 1e9:.2f}' for name, size in sizes.items())}); "
             f"free: {shutil.disk_usage(next_folder(args.out)).free / 1e9:.1f} GB"]
    return "\n".join(lines)


def next_folder(path):
    """The path or, where it does not exist yet, the nearest folder above it that does."""
    path = os.path.abspath(path)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def trial(args, scorer, paths):
    """Seconds an image and a text, reading included, each from the second of two equal batches."""
    images = [image for image in (open_image(args.root, path) for path in paths) if not isinstance(image, tuple)]
    texts, times = ["A made-up text of some words, as long as a title and the start of an article. " * 6] * 16, []
    for work in (lambda: scorer.image_features(images or [Image.new("RGB", (224, 224))]),
                 lambda: scorer.text_features(texts)):
        work()  # the first is slower
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times[0] / max(1, len(images)), times[1] / len(texts)


def table(manifest):
    """The counts that a reader should see, as text."""
    kb = manifest["kb"]
    groups = [("kb", kb["entries_read"], kb["kept"], ""), ("images", kb["images_read"], kb["images"], "")]
    groups += [(name, split["rows_read"], split["kept"],
                f"{split['with_positive']} = {split['with_positive'] / split['kept']:.3f}")
               for name, split in manifest["splits"].items()]
    dropped = [("kb", kb["dropped"], kb["first_dropped"]), ("images", kb["images_dropped"], kb["first_dropped"])]
    dropped += [(name, split["dropped"], split["first_dropped"]) for name, split in manifest["splits"].items()]
    recall = manifest["index"].get("recall")
    note = "" if recall is None else (f"\n{manifest['index']['kind']} index: finds {recall:.4f} of the exact pools "
                                      f"({manifest['index']['measured_on']} images of queries)")
    return count_table(groups, dropped, "positive in pool") + note


def count_table(groups, dropped, last):
    """groups: (name, read, kept, text); dropped: (name, {reason: count}, {reason: first case})."""
    lines = [f"{'':>8}{'read':>9}{'kept':>9}{'dropped':>9}{last:>18}"]
    lines += [f"{name:>8}{read:>9}{kept:>9}{read - kept:>9}{text:>18}" for name, read, kept, text in groups]
    lines += [f"{name:>8} dropped {count}: {reason} (first: {first[reason]})"
              for name, counts, first in dropped for reason, count in counts.items()]
    return "\n".join(lines)


def main(argv=None):
    args = parse_args(argv)
    try:
        result = prepare(args)
        if isinstance(result, dict):
            print(table(result))
        elif result:  # a dry run's report
            print(result)
    except (OSError, ValueError) as error:  # the messages name file, row and remedy; a trace adds nothing
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f": the disk is full; what was embedded stays in {work_folder(args)}, so make room and run again"
        raise SystemExit(f"prepare.py: {error}{remedy if full else ''}") from error


if __name__ == "__main__":
    main()
