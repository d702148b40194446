"""Other layouts of the benchmarks' files -> those that prepare.py reads. Convert, then prepare:

    python -m tools.layouts infoseek --root ~/infoseek
    python prepare.py --dataset infoseek --root ~/infoseek ...

    what       below the root                                                    it writes
    infoseek   the official infoseek_{train,val}.jsonl with their *_withkb       infoseek_{train,test}_filtered.csv
    inat       iNaturalist's own {train,val}.json, in inat/ or beside it         {train,val}_id2name.json beside them
    ids        --images FOLDER with query images called by their ids, anywhere   FOLDER/oven_id2name.json, landmarks_,
               in it, with any extension; --collection says whose they are       train_ or val_ (for prepare.py --oven,
                                                                                 --landmarks or --inat FOLDER)
    omgm       --images FOLDER with wiki_image_url_part_*_processed.csv          url_to_path_mapping.json
    names      --images FOLDER with image files that are named as in their urls  url_to_path_mapping.json

InfoSeek's official files name an entity by its Wikidata id and title, the knowledge base by its url. The title is that
of Wiki6M (Wiki6M_ver_1_0_title_only.jsonl, or the whole file, .gz or not) if it is there, as titles change, else of
withkb. Its urls are tried in this order: as is, percent-encoded, both with a capital; then the one entry with that
title. A row whose entity the knowledge base lacks keeps the first of them, and prepare.py counts it as a miss. Val is
"test", as in everybody's numbers. EchoSight's csv has the urls: prefer it for numbers to compare.

What is read, kept and dropped is printed, with the first case of each reason. A file that is there is never replaced.
"""

import argparse
import csv
import gzip
import json
import os
import re
import urllib.parse
import zlib
from collections import Counter

import prepare
from scorer import InputError, replacing

WIKIPEDIA = "https://en.wikipedia.org/wiki/"
WIKI6M = ("Wiki6M_ver_1_0_title_only.jsonl", "Wiki6M_ver_1_0.jsonl", "Wiki6M_ver_1_0.jsonl.gz")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # what is taken for an image
BAD_LINE = (json.JSONDecodeError, UnicodeDecodeError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error)
TABLE = re.compile(r"wiki_image_url_part_\d+_processed\.csv$")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("infoseek", "inat", "ids", "omgm", "names"), help="the layout that is there")
    parser.add_argument("--root", required=True, help="folder of the benchmark's files, prepare.py's --root")
    parser.add_argument("--kb", help="for infoseek and names: knowledge base below the root (default: the first of "
                                     f"{', '.join(prepare.KB_NAMES['infoseek'])})")
    parser.add_argument("--inat", default="inat", help="for inat: folder of iNaturalist below the root (default inat)")
    parser.add_argument("--collection", choices=("oven", "landmarks", "train", "val"), help="for ids: whose images")
    parser.add_argument("--images", help="for ids, omgm and names: folder below the root")
    parser.add_argument("--out", default="url_to_path_mapping.json", help="for omgm and names: file to write below the "
                        "root (default url_to_path_mapping.json; another needs prepare.py's --kb-images)")
    args = parser.parse_args(argv)
    args.dataset = "infoseek"  # whose names of a knowledge base are all that there are
    if args.what in ("ids", "omgm", "names") and not args.images:
        parser.error(f"{args.what} needs --images, the folder of the images below the root")
    if args.what == "ids" and not args.collection:
        parser.error("ids needs --collection, whose images these are")
    return args


class Counts:
    """What became of the rows of a file: read = kept + dropped."""

    def __init__(self):
        self.read, self.drops, self.first = 0, Counter(), {}

    def drop(self, reason, case):
        self.drops[reason] += 1
        self.first.setdefault(reason, prepare.whole(case))

    def say(self, path, more=""):
        print(f"{path}: {self.read} read, {self.read - self.drops.total()} kept, {self.drops.total()} dropped{more}")
        for reason, count in self.drops.items():
            print(f"  dropped {count}: {reason} (first: {self.first[reason]})")


def new_file(path):
    """The path again; InputError where a file is there: it may be somebody else's, of more rows or images."""
    if os.path.exists(path):
        raise InputError(f"{path} is there already: remove it, if it is to be made again")
    return path


def write_pairs(out, pairs, counts):
    """Write the kept pairs as a JSON object and say what became of all. InputError where none is left."""
    if not pairs:
        raise InputError(f"{out} would be empty: {counts.read} read, {dict(counts.drops)}; first cases: {counts.first}")
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(pairs, file, indent=0)  # in ASCII: file names need not be UTF-8
    counts.say(out)


def entries(kb):
    """Yield (url, entry) of a knowledge base."""
    for url, entry in prepare.stream_json(kb, "knowledge base"):
        prepare.check_entry(kb, url, entry, "release")
        yield prepare.whole(url), entry


# ----------------------------------------------------------------------------------------------------------- InfoSeek

def infoseek(args):
    """Both official files, where they are there, -> EchoSight's csv in E-VQA's columns."""
    splits = {"train": "train", "val": "test"}
    there = [name for name in splits if os.path.isfile(os.path.join(args.root, f"infoseek_{name}.jsonl"))]
    if not there:
        raise FileNotFoundError(f"{args.root} holds neither infoseek_train.jsonl nor infoseek_val.jsonl")
    outs = {name: new_file(os.path.join(args.root, f"infoseek_{splits[name]}_filtered.csv")) for name in there}
    kb, entity_of = prepare.kb_file(args), {}
    for name in there:
        entity_of[name] = {row["data_id"]: (row["entity_id"], row["entity_text"]) for _, row in read_jsonl(
            os.path.join(args.root, f"infoseek_{name}_withkb.jsonl"), ("data_id", "entity_id", "entity_text"))}
    titles = wiki6m_titles(args.root, {entity for rows in entity_of.values() for entity, _ in rows.values()})
    for name in there:  # each row's entity becomes its title
        entity_of[name] = {row: titles.get(entity, text) for row, (entity, text) in entity_of[name].items()}
    urls = find_urls(kb, {title for rows in entity_of.values() for title in rows.values()})
    for name in there:
        write_questions(os.path.join(args.root, f"infoseek_{name}.jsonl"), outs[name], entity_of[name], urls, kb)


def read_jsonl(path, fields):
    """Yield (line number, dict) of a file of JSON lines, plain or .gz. fields: texts that each must have."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing; --root must hold InfoSeek's official files")
    number = 0
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():  # a last line may end twice
                    row = json.loads(line.decode("utf-8"))
                    if missing := [name for name in fields if type(row) is not dict or type(row.get(name)) is not str]:
                        raise InputError(f"{path}:{number}: field {', '.join(missing)} is missing or no text; is this "
                                         "the file that its name says?")
                    yield number, {**row, **{name: prepare.whole(row[name]) for name in fields}}
        except BAD_LINE as error:
            raise InputError(f"{path}:{number}: not a line of JSON ({error}); was it copied to its end?") from error


def wiki6m_titles(root, wanted):
    """Wikidata id -> title of the wanted entities, from the first of Wiki6M's files that is there; {} without any."""
    for path in (os.path.join(root, name) for name in WIKI6M):
        if os.path.isfile(path):
            return {row["wikidata_id"]: row["wikipedia_title"] for _, row in read_jsonl(
                path, ("wikidata_id", "wikipedia_title")) if row["wikidata_id"] in wanted}
    return {}


def title_urls(title):
    """The urls that an entity of this title may have, the likeliest first."""
    name = title.strip().replace(" ", "_")
    return list(dict.fromkeys(WIKIPEDIA + form for name in (name, name[:1].upper() + name[1:])
                              for form in (name, urllib.parse.quote(name, safe="/:,()!*'@;~$"))))


def find_urls(kb, titles):
    """title -> (url of its entity, whether the knowledge base has it)."""
    forms = {title: title_urls(title) for title in titles}
    wanted, there, of_title = {url for urls in forms.values() for url in urls}, set(), {}
    for url, entry in entries(kb):
        title = prepare.whole(entry["title"])
        if title and title in titles and of_title.setdefault(title, url) != url:
            of_title[title] = None  # two pages, one title: nobody's
        if url in wanted:
            there.add(url)
    found = {title: next((url for url in urls if url in there), of_title.get(title)) for title, urls in forms.items()}
    return {title: (found[title] or urls[0], found[title] is not None) for title, urls in forms.items()}


def write_questions(path, out, title_of, urls, kb):
    """One official file -> csv."""
    counts, missing = Counts(), 0
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*prepare.COLUMNS, "data_id", "wikipedia_title"])
        for line, row in read_jsonl(path, ("data_id", "image_id", "question")):
            counts.read += 1
            title = title_of.get(row["data_id"])
            if title is None:
                counts.drop("data_id not in the withkb file", f"{path}:{line}: {row['data_id']}")
                continue
            url, there = urls[title]
            missing += not there
            writer.writerow([row["question"], "infoseek", "infoseek", row["image_id"], url, row["data_id"], title])
    counts.say(out, f"; of the kept {missing} are about an entity that {os.path.basename(kb)} lacks")


# ------------------------------------------------------------------------------------------------------ query images

def inat(args):
    """COCO's form, {"images": [{"id", "file_name"}]}, read whole -> {id: file name}."""
    places = {split: [os.path.join(args.root, folder, f"{split}.json") for folder in (args.inat, "")]
              for split in ("train", "val")}
    files = [next(filter(os.path.isfile, paths)) for paths in places.values() if any(map(os.path.isfile, paths))]
    if not files:
        raise FileNotFoundError(f"{places['val'][0]} (or train.json, or these in {args.root}) is missing; say where "
                                "iNaturalist's own files are with --inat")
    outs = [new_file(path.replace(".json", "_id2name.json")) for path in files]
    for path, out in zip(files, outs):
        counts, names = Counts(), {}
        for image_id, name in inat_names(path):
            counts.read += 1
            if image_id in names:
                counts.drop("id repeated", f"{path}: {image_id}")
            else:
                names[image_id] = name
        write_pairs(out, names, counts)


def inat_names(path):
    """[(image id, path of the image)] of iNaturalist's own train.json or val.json."""
    with open(path, encoding="utf-8") as file:
        try:
            return [(str(image["id"]), image["file_name"]) for image in json.load(file)["images"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is not iNaturalist's file of images with id and file_name "
                             f"({type(error).__name__}: {error}); was it copied to its end?") from error


def ids(args):
    """Image files anywhere in a folder -> {id: path below the folder}.

    An id ends at the first dot (some have <id>.img.jpg). Of several files the first by path is taken.
    """
    out, counts, found = new_file(os.path.join(args.root, args.images, f"{args.collection}_id2name.json")), Counts(), {}
    for path in sorted(files_of(args)):
        counts.read += 1
        image_id = os.path.basename(path).split(".")[0]
        if os.path.splitext(path)[1].lower() not in IMAGE_SUFFIXES:
            counts.drop("not called as an image", path)
        elif image_id in found:
            counts.drop("id repeated", path)
        else:
            found[image_id] = os.path.relpath(path, args.images)
    write_pairs(out, found, counts)


# ---------------------------------------------------------------------------------- images of the knowledge base

def omgm(args):
    """OMGM's tables, in FOLDER or its output/ -> url_to_path_mapping.json; their paths start at the folder above
    output/."""
    out, counts, pairs = new_file(os.path.join(args.root, args.out)), Counts(), {}
    start = os.path.normpath(args.images)
    start = os.path.dirname(start) if os.path.basename(start) == "output" else start
    tables = sorted(filter(TABLE.search, files_of(args)))
    if not tables:
        raise FileNotFoundError(f"{os.path.join(args.root, args.images)} holds no wiki_image_url_part_*_processed.csv")
    for table in tables:
        for line, row in prepare.read_csv(os.path.join(args.root, table), ("image_URL", "img_path")):
            where, url = f"{table}:{line}", row["image_URL"]
            counts.read += 1
            if not row["img_path"]:
                counts.drop("no img_path", f"{where}: {url}")
            elif url in pairs:
                counts.drop("url repeated", f"{where}: {url}")
            else:
                pairs[url] = prepare.inside_root(args, os.path.normpath(os.path.join(start, row["img_path"])), where)
    write_pairs(out, pairs, counts)


def names(args):
    """Image files that are called as in their urls -> url_to_path_mapping.json of the knowledge base's urls.

    https://a.b/c/Caf%C3%A9_1.JPG?x=1 finds Café_1.JPG or else, as thumbnails have another extension, Café_1 with any.
    One of which there are two is nobody's.
    """
    out, kb, counts, pairs = new_file(os.path.join(args.root, args.out)), prepare.kb_file(args), Counts(), {}
    by_name, by_stem = {}, {}
    for path in files_of(args):
        name = os.path.basename(path)
        for known, key in ((by_name, name), (by_stem, os.path.splitext(name)[0])):
            known[key] = None if key in known else path
    for url, entry in entries(kb):
        for image in entry["image_urls"]:
            counts.read += 1
            name = urllib.parse.unquote(image.split("?")[0]).rsplit("/", 1)[-1]
            path = by_name.get(name, by_stem.get(os.path.splitext(name)[0], ""))
            if image in pairs:
                counts.drop("url repeated", f"{url}: {image}")
            elif path:
                pairs[image] = path
            else:
                counts.drop("no file of that name" if path == "" else "several files of that name", f"{url}: {image}")
    write_pairs(out, pairs, counts)


def files_of(args):
    """Paths below the root of the files in --images."""
    if not os.path.isdir(folder := os.path.join(args.root, prepare.inside_root(args, args.images, "--images"))):
        raise FileNotFoundError(f"{folder} is missing; --images must be a folder below the root")
    return files_below(args.root, args.images)


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


def main(argv=None):
    args = parse_args(argv)
    try:
        {"infoseek": infoseek, "inat": inat, "ids": ids, "omgm": omgm, "names": names}[args.what](args)
    except (InputError, OSError) as error:
        raise SystemExit(f"tools.layouts: {error}") from error


if __name__ == "__main__":
    main()
