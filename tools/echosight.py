"""EchoSight's index -> a TREC run of candidates for `prepare.py --retrieved`: its vectors, our query features.

    python -m tools.echosight --dataset evqa --root ROOT --index FOLDER --scorer BAAI/EVA-CLIP-8B --split test \\
        --out test.trec
    python prepare.py --dataset evqa --root ROOT --scorer BAAI/EVA-CLIP-8B --splits test --retrieved test.trec \\
        --out data/evqa

FOLDER holds kb_index.faiss, five million image features of a knowledge base, and kb_index_ids.pkl, for each the place
of its entity in that file. So a knowledge base need not be embedded to be searched: prepare.py embeds only what the
pools hold. The pickle is read without unpickling it. All other flags are those of prepare.py (of --k entities some may
turn out to have no readable image, so a few more are written); query features go to DATA.work, where prepare.py --out
DATA finds them again.

An index tells nothing of the file and the scorer that it was made of, so it has to be shown: ids must be places in this
knowledge base, and of --confirm vectors most must be features of an image of the entity that their id names (the E-VQA
index before January 2025 had shifted ids). Which image of an entity a vector is of cannot be known, as one without
feature shifts all that follow: prepare.py chooses the image itself.
"""

import argparse
import os
import pickletools

import faiss
import numpy as np
import torch

import prepare
from scorer import InputError, load_scorer, normalise, write_trec

ALIKE = 0.98  # cosine of two features of one image: float16 and other kernels cost about .01


def parse_args(argv=None):
    """(our arguments, prepare.py's)"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, epilog="Further flags: python prepare.py --help")
    parser.add_argument("--index", required=True, help="folder of kb_index.faiss and kb_index_ids.pkl")
    parser.add_argument("--split", default="test", help="train, val or test (default test)")
    parser.add_argument("--out", required=True, help="TREC run to write")
    parser.add_argument("--data", help="folder that prepare.py will write as its --out (default data/DATASET)")
    parser.add_argument("--confirm", type=int, default=100, metavar="N",
                        help="vectors to compare with their entity's images, 0 = none (default 100)")
    args, rest = parser.parse_known_args(argv)
    if args.confirm < 0:
        parser.error("--confirm must be at least 0")
    flags = prepare.parse_args([*rest, "--splits", args.split])
    flags.out = args.data or f"data/{flags.dataset}"
    return args, flags


# ------------------------------------------------------------------------------------------------------- their files

def read_ids(path):
    """A pickled flat list of whole numbers -> list. Nothing is unpickled: its opcodes are read, and one that could
    build or call anything else is refused. InputError naming it."""
    numbers = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG"}
    around = {"PROTO", "FRAME", "MARK", "APPEND", "APPENDS", "STOP", "BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"}
    values, lists = [], 0
    with open(path, "rb") as file:
        try:
            for opcode, argument, at in pickletools.genops(file):
                if opcode.name in numbers and type(argument) is int:  # INT may also spell a bool
                    values.append(argument)
                elif opcode.name in ("EMPTY_LIST", "LIST") and not lists:
                    lists = 1
                elif opcode.name not in around:
                    raise ValueError(f"opcode {opcode.name} at byte {at} is not that of a flat list of numbers")
        except ValueError as error:  # of genops, too, where the file is cut
            raise InputError(f"{path}: {error}; it is not read, as it could run code") from error
    if not lists:
        raise InputError(f"{path} holds no list of numbers")
    return values


def read_index(folder, dim):
    """EchoSight's folder -> (faiss index, whose memory these vectors are: float32 [M, D], of each the place of its
    entity in the knowledge base [M])."""
    path, ids_path = (os.path.join(folder, name) for name in ("kb_index.faiss", "kb_index_ids.pkl"))
    for name in (path, ids_path):
        if not os.path.isfile(name):
            raise FileNotFoundError(f"{name} is missing; --index must be EchoSight's folder, unzipped")
    try:
        index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)  # mapped, not loaded: E-VQA's has 26 GB
    except RuntimeError as error:
        raise InputError(f"{path}: faiss cannot read it ({' '.join(str(error).split())}); fetch it again") from error
    if not isinstance(index, faiss.IndexFlatIP):
        raise InputError(f"{path} is no flat index of inner products, as EchoSight's is")
    ids = read_ids(ids_path)
    if index.d != dim or index.ntotal != len(ids):
        raise InputError(f"{path}: {index.ntotal} vectors of {index.d} numbers, but {len(ids)} ids and a scorer of "
                         f"{dim}: these files do not belong together")
    # Copied out of faiss it would be in memory; as an array it can be searched as prepare.py searches, also on CUDA.
    vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    return index, vectors, ids


def read_entities(flags, ids, confirm):
    """Stream the knowledge base -> (keys of its entries, {place: image urls} of the entries in confirm)."""
    path, keys, urls = prepare.kb_file(flags), [], {}
    for key, entry in prepare.stream_json(path, "knowledge base"):
        prepare.check_entry(path, key, entry, "release")
        if len(keys) in confirm:
            urls[len(keys)] = entry["image_urls"]
        keys.append(prepare.whole(key))
    if ids and not 0 <= min(ids) <= max(ids) < len(keys):
        raise InputError(f"ids of the index must be places in {path}, 0 to {len(keys) - 1}; {min(ids)} to {max(ids)} "
                         "are those of another knowledge base (--kb)")
    return keys, urls


# --------------------------------------------------------------------------------------------------------- features

def embed_images(flags, scorer, paths, desc):
    """Paths below the root -> (those that can be read, their features float16 [n, D]). Features stay in DATA.work."""
    work = os.path.normpath(flags.out) + ".work"
    os.makedirs(work, exist_ok=True)
    features = prepare.Features(work, "image", scorer)
    place = prepare.embed_images(flags, scorer, features, paths, desc)
    there = [path for path in paths if not features.fault(place[path], path)]
    return there, features.take(np.array([place[path] for path in there], np.int64))


def embed_queries(flags, scorer):
    """Rows of a split whose image can be read -> (list of Row, float16 [images, D], number of its image [rows])."""
    split = prepare.read_questions(flags, flags.splits[0])
    prepare.find_images(flags, [split])
    paths = list(dict.fromkeys(row.image for row in split.rows))  # rows share images
    there, full = embed_images(flags, scorer, paths, f"{split.name} images")
    number = {path: n for n, path in enumerate(there)}
    split.rows = [row for row in split.rows if row.image in number]
    split.check()
    return split.rows, full, [number[row.image] for row in split.rows]


def confirm_vectors(flags, scorer, vectors, ids, sample, urls):
    """InputError unless most vectors of the sample are features of an image of the entity that their id names."""
    files = prepare.image_files(flags)
    images = {j: [files[key] for key in map(prepare.hash8, urls[j]) if key in files] for j in urls}
    paths = list(dict.fromkeys(path for own in images.values() for path in own))
    feature = dict(zip(*embed_images(flags, scorer, paths, "images to confirm the index")))
    near = asked = 0
    for m in sample:
        own = [feature[path] for path in images[ids[m]] if path in feature]
        asked += bool(own)
        near += bool(own) and bool((normalise(own) @ normalise(vectors[m])).max() > ALIKE)
    if near < 0.8 * asked or not asked:  # some images of theirs may be missing here
        raise InputError(f"{near} of {asked} vectors looked at are features of an image of the entity that their id "
                         "names; the index is of another scorer or knowledge base, or its ids are shifted (the E-VQA "
                         "index before January 2025 was)")
    print(f"{near} of {asked} vectors are features of an image of the entity that their id names")


# ---------------------------------------------------------------------------------------------------------- the run

def retrieve(args, flags):
    """Write the run; returns the number of queries."""
    device = flags.device if flags.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    scorer = load_scorer(flags.scorer, device, flags.scorer_dtype)
    scorer.batch_size = flags.batch_size
    index, vectors, ids = read_index(args.index, scorer.dim)  # noqa: F841 (kept: without it the vectors are gone)
    draw = np.random.default_rng(0)
    sample = np.sort(draw.choice(len(ids), min(args.confirm, len(ids)), replace=False)).tolist()
    keys, urls = read_entities(flags, ids, {ids[m] for m in sample})
    if args.confirm:
        confirm_vectors(flags, scorer, vectors, ids, sample, urls)
    rows, full, image = embed_queries(flags, scorer)
    owner = np.array(ids, np.int32)
    k = min(flags.k + prepare.SPARE, len(np.unique(owner)))
    entities, _, cosines = prepare.nearest_entities(vectors, owner, full, k, device)  # [images, k]
    write_trec(args.out, ((row.query_id, [keys[j] for j in entities[i]], cosines[i]) for row, i in zip(rows, image)),
               "echosight")
    return len(rows)


def main(argv=None):
    args, flags = parse_args(argv)
    try:
        queries = retrieve(args, flags)
    except (InputError, OSError) as error:
        raise SystemExit(f"tools.echosight: {error}") from error
    print(f"{args.out}: {queries} queries")


if __name__ == "__main__":
    main()
