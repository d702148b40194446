"""How prepare.py fares at full scale: 2 million knowledge-base entries, a million vectors. Makes its own input.

    python -m tools.scale --folder scratch                    # all but embed: 8 GB of JSON and 2.6 GB of vectors
    python -m tools.scale --folder scratch --entries 100000 --vectors 50000      # a twentieth
    python -m tools.scale --folder scratch --parts embed --dtype bfloat16        # 33 GB to disk, 19 GB of memory

Measured, each in a process of its own, so that a peak is nobody else's:
* stream: prepare.stream_json over the whole knowledge base, every entry as a dict: MB/s, peak memory;
* scan: all that prepare.py reads before it embeds, so streaming, image look-up and texts, and its memory beyond that of
  50 entries;
* search: prepare.nearest_entities, the 20 nearest entities (of 3 images each) of Q queries, exactly, against the same
  matrix product without looking at its result; and from that the hours of InfoSeek's 71,335 queries;
* embed (only when asked for): load a scorer from disk and embed image files and texts as prepare.py does: seconds and
  peak memory of loading, and the hours of a million images. Without --scorer it makes a random EVA-CLIP-8B of the
  published size, in shards.

The text is random words; entries have the fields, order and spacing of encyclopedic_kb_wiki.json. Simplified: random
vectors, and images that exist by name only. Letters: M vectors, D numbers each, Q queries.
"""

import argparse
import dataclasses
import json
import os
import random
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import prepare
from scorer import EvaClip, EvaClipConfig, load_scorer, normalise, replacing, write_json
from tools.meter import memory, start_case, synchronise

PARTS = ("stream", "scan", "search", "embed")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="scratch", help="where the input is made, kept and used again")
    parser.add_argument("--parts", default=",".join(PARTS[:-1]),
                        help=f"comma list out of {', '.join(PARTS)} (default all but embed)")
    parser.add_argument("--entries", type=int, default=2_000_000, help="knowledge-base entries (default 2,000,000)")
    parser.add_argument("--entry-bytes", type=int, default=4000, help="bytes an entry, about (default 4000)")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="M, 60 or more (default 1,000,000)")
    parser.add_argument("--dim", type=int, default=1280, help="D (default 1280, EVA-CLIP-8B's)")
    parser.add_argument("--queries", type=int, default=2048, help="Q, queries of search (default 2048)")
    parser.add_argument("--scorer", help="for embed: a folder or file (default: a random EVA-CLIP-8B, made there)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for search and embed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="for embed (default: prepare.py's)")
    parser.add_argument("--batch", type=int, default=8, help="for embed: images of a forward pass (default 8)")
    parser.add_argument("--out", help="also write the numbers to this .json")
    parser.add_argument("--case", choices=PARTS, help="run this one here, print JSON (used by the program)")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if set(args.parts) - set(PARTS):
        parser.error(f"--parts: expected a comma list out of {', '.join(PARTS)}")
    for name, least in (("entries", 1), ("entry_bytes", 1), ("vectors", 60), ("dim", 1), ("queries", 2), ("batch", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return args


# ------------------------------------------------------------------------------------------------------ making input

def make_root(folder, entries, entry_bytes, seed=0):
    """A root that prepare.py reads: knowledge base, mapping, 10 questions with images. Returns its path."""
    root = os.path.join(folder, f"kb-{entries}-{entry_bytes}")
    if os.path.isfile(os.path.join(root, "test.csv")):  # written last
        return root
    os.makedirs(os.path.join(root, "landmarks"), exist_ok=True)
    draw = random.Random(seed)
    sections = texts(draw, max(20, min(1200, entry_bytes // 4)))
    with replacing(os.path.join(root, "encyclopedic_kb_wiki.json")) as kb_file, \
            replacing(os.path.join(root, "url_to_path_mapping.json")) as map_file, \
            open(kb_file, "w", encoding="utf-8") as kb, open(map_file, "w", encoding="utf-8") as mapping:
        kb.write("{")
        mapping.write("{")
        for j in range(entries):
            images = image_urls(draw, j)
            kb.write(f'{", " if j else ""}"{page(j)}": {entry(draw, j, images, sections, entry_bytes)}')
            for n, image in enumerate(images):
                mapping.write(f'{", " if (j or n) else ""}"{image}": "kb_images/{j % 1000:03d}/{j}_{n}.jpg"')
        kb.write("}")
        mapping.write("}")
    names = [f"{n:016x}" for n in range(10)]
    rng = np.random.default_rng(seed)
    for name in names:  # of the size that photographs on Wikipedia have
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        coarse.resize((640, 480)).save(os.path.join(root, "landmarks", f"{name}.jpg"), quality=90)
    with replacing(os.path.join(root, "test.csv")) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("question,question_type,dataset_name,dataset_image_ids,wikipedia_url\n")
        file.writelines(f"How old is this?,automatic,landmarks,{name},{page(n)}\n" for n, name in enumerate(names))
    return root


def texts(draw, size, count=3000):
    """JSON-encoded section texts of about `size` bytes. They are drawn from again and again: 8 GB of new words would
    take longer to make than to read."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 10))) for _ in range(5000)]
    # What a reader can trip over, at about the rate of real text: quotes, braces, line ends, other scripts.
    words += ['"so called"', "{{cite}},", "line\nend", "caf\u00e9", "\u6771\u4eac", "back\\slash"] * 15
    return [json.dumps(" ".join(draw.choices(words, k=max(1, int(size / 6.5 * draw.uniform(0.3, 1.7))))))
            for _ in range(count)]


def page(j):
    return f"https://en.wikipedia.org/wiki/Entity_of_the_synthetic_kind_{j}"


def image_urls(draw, j):
    """0 to 6 urls, as long as real ones."""
    return [f"https://upload.wikimedia.org/wikipedia/commons/{j % 16:x}/{j % 16:x}{n:x}/A_photograph_of_it_{j}_{n}.jpg"
            for n in range(draw.choice((0, 1, 2, 3, 3, 4, 6)))]


def entry(draw, j, images, sections, entry_bytes):
    """One entry as the text of a JSON object, with the seven fields of the real file."""
    chosen, size = [], 600 + 130 * len(images)
    while size < entry_bytes or not chosen:
        chosen.append(draw.choice(sections))
        size += len(chosen[-1])
    titles = ", ".join(f'"Section {n}"' for n in range(len(chosen)))
    captions = ", ".join(f'"A caption for image {n} of the entity"' for n in range(len(images)))
    return (f'{{"title": "Entity {j}", "section_titles": [{titles}], "section_texts": [{", ".join(chosen)}], '
            f'"image_urls": {json.dumps(images)}, "image_reference_descriptions": [{captions}], '
            f'"image_section_indices": {json.dumps([0] * len(images))}, "url": "{page(j)}"}}')


def make_vectors(folder, vectors, dim, block=1 << 14):
    """Random float16 [M, D] as .npy, written in blocks; returns its path."""
    path = os.path.join(folder, f"vectors-{vectors}-{dim}.npy")
    if not os.path.isfile(path):
        os.makedirs(folder, exist_ok=True)
        rng = np.random.default_rng(0)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False,
                                                        "shape": (vectors, dim)})
            for start in range(0, vectors, block):
                rows = min(block, vectors - start)
                file.write(rng.standard_normal((rows, dim), np.float32).astype("<f2").tobytes())
    return path


def make_scorer(folder, config=EvaClipConfig()):
    """Folder with random float32 weights of an EVA-CLIP (default: the 8B) in shards of some 2 GB, under the original
    names. Never all in memory."""
    folder = os.path.join(folder, f"eva-{config.width}-{config.layers}")
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.isfile(index):  # written last
        return folder
    os.makedirs(folder, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in EvaClip(config).state_dict().items()}
    torch.manual_seed(0)
    files, shard, size = {}, {}, 0
    for name, shape in shapes.items():
        shard[name] = torch.randn(shape) * 0.02 if len(shape) > 1 else torch.full(shape, float(name.endswith("weight")))
        size += shard[name].nbytes
        if size > 2e9 or name == list(shapes)[-1]:
            file = f"model-{len(set(files.values())) + 1:05d}.safetensors"
            with replacing(os.path.join(folder, file)) as temporary:
                save_file(shard, temporary)
            files |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    write_json(os.path.join(folder, "config.json"), {"config": dataclasses.asdict(config)})
    write_json(index, {"weight_map": files})
    return folder


# ------------------------------------------------------------- measuring, each part in a process of its own

def peak():
    """Most bytes of main memory that this process had."""
    return memory(torch.device("cpu"))[1]


def measure_stream(args):
    path = os.path.join(make_root(args.folder, args.entries, args.entry_bytes), "encyclopedic_kb_wiki.json")
    start, count = time.perf_counter(), sum(1 for _ in prepare.stream_json(path))
    return {"bytes": os.path.getsize(path), "seconds": time.perf_counter() - start, "peak_mb": peak() / 2**20,
            "count": count}


def measure_scan(args):
    """All that prepare.py reads before it embeds."""
    root = make_root(args.folder, args.entries, args.entry_bytes)
    flags, start = prepare.parse_args(["--root", root, "--splits", "test"]), time.perf_counter()
    splits = [prepare.read_questions(flags, "test")]
    prepare.find_images(flags, splits)
    prepare.read_kb(flags, splits, {}, os.path.join(root, "draft.jsonl"))
    return {"seconds": time.perf_counter() - start, "peak_mb": peak() / 2**20}


def measure_search(args):
    """Seconds of all queries, of half of them, and of the matrix product alone: in turns, for a busy machine; the best
    of each counts."""
    features = np.load(make_vectors(args.folder, args.vectors, args.dim), mmap_mode="r")                # [M, D]
    queries = np.random.default_rng(1).normal(size=(args.queries, args.dim)).astype(np.float16)         # [Q, D]
    device, entity = torch.device(args.device), (np.arange(args.vectors) // 3).astype(np.int32)         # [M]
    unit, block = (torch.from_numpy(normalise(x)).to(device) for x in (queries, features[:1 << 16]))

    def timed(work):
        start = time.perf_counter()
        work()
        synchronise(device)
        return time.perf_counter() - start

    def product():
        for first in range(0, args.vectors, len(block)):
            unit @ block[:args.vectors - first].T                                                       # [Q, n]

    def search(part):
        prepare.nearest_entities(features, entity, part, 20, device)

    turns = [(timed(product), timed(lambda: search(queries[::2])), timed(lambda: search(queries))) for _ in range(3)]
    best = dict(zip(("product", "half", "whole"), np.min(turns, 0).tolist()))
    return {"vectors": args.vectors, "queries": args.queries, **best,
            "gflop": 2e-9 * args.vectors * args.dim * args.queries}


def measure_embed(args):
    """Loading a scorer, and then images from files into pieces on disk, as prepare.py does, and texts."""
    texts = ["A made-up text of some words, as long as a title and the start of an article. " * 6] * 16
    folder = os.path.join(make_root(args.folder, 50, args.entry_bytes), "landmarks")
    pictures = (sorted(os.listdir(folder)) * args.batch)[:args.batch]
    flags = prepare.parse_args(["--root", folder, "--batch-size", str(args.batch)])
    path, before, start = args.scorer or make_scorer(args.folder), peak(), time.perf_counter()
    scorer = load_scorer(path, args.device, args.dtype)
    loaded, size, most = time.perf_counter() - start, sum(p.nbytes for p in scorer.model.parameters()), peak() - before
    scorer.batch_size = args.batch
    for _ in range(2):  # the first is slower
        with tempfile.TemporaryDirectory() as work:
            features, start = prepare.Features(work, "image", scorer), time.perf_counter()
            prepare.embed_images(flags, scorer, features, pictures, "images")
            per_image = (time.perf_counter() - start) / args.batch
        start = time.perf_counter()
        scorer.text_features(texts)
        per_text = (time.perf_counter() - start) / len(texts)
    return {"load_seconds": loaded, "load_peak": most, "bytes": size, "per_image": per_image, "per_text": per_text,
            "images": args.batch, "device": str(scorer.device), "dtype": str(scorer.dtype),
            "threads": torch.get_num_threads()}


MEASURES = {"stream": measure_stream, "scan": measure_scan, "search": measure_search, "embed": measure_embed}


def report(result):
    """The numbers as text."""
    lines = [f"{part}: {found['left_out']}" for part, found in result.items() if "left_out" in found]
    result = {part: found for part, found in result.items() if "left_out" not in found}
    if stream := result.get("stream"):
        lines.append(f"stream: {stream['bytes'] / 1e9:.2f} GB, {stream['count']} entries at "
                     f"{stream['bytes'] / 1e6 / stream['seconds']:.0f} MB/s, peak {stream['peak_mb']:.0f} MB")
    if scan := result.get("scan"):
        lines.append(f"scan: {scan['seconds']:.0f} s, peak {scan['peak_mb']:.0f} MB, {scan['beyond_mb']:.0f} MB beyond "
                     "a run on 50 entries")
    if search := result.get("search"):
        rate = 2 * (search["whole"] - search["half"])  # seconds for Q queries, without what any number of them costs
        lines.append(f"search: {search['queries']} pools out of {search['vectors']} images in {search['whole']:.1f} s, "
                     f"{search['gflop'] / search['whole']:.0f} GFLOP/s; the product alone "
                     f"{search['gflop'] / search['product']:.0f}; 71,335 pools in "
                     f"{rate / search['queries'] * 71335 / 3600:.2f} hours")
    if embed := result.get("embed"):
        lines += [f"embed: image tower of {embed['bytes'] / 1e9:.2f} GB ({embed['dtype']}) loaded in "
                  f"{embed['load_seconds']:.0f} s with a peak of {embed['load_peak'] / embed['bytes']:.2f} x that",
                  f"  {embed['device']}, {embed['threads']} threads, {embed['images']} at once: "
                  f"{embed['per_image']:.3f} s an image, {embed['per_text']:.3f} s a text; a million images take "
                  f"{embed['per_image'] * 1e6 / 3600:.0f} hours"]
    return "\n".join(lines)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    case = vars(args).pop("case")
    if case:
        print(json.dumps(MEASURES[case](args)))
        return
    if {"stream", "scan"} & set(args.parts):
        make_root(args.folder, args.entries, args.entry_bytes)
    if "embed" in args.parts and not args.scorer:
        make_scorer(args.folder)  # here, or what making it takes would be in the peak
    result = {part: start_case(part, argv, "tools.scale") for part in args.parts}
    if "seconds" in result.get("scan", {}):
        small = start_case("scan", [*argv, "--entries", "50"], "tools.scale")
        result["scan"]["beyond_mb"] = result["scan"]["peak_mb"] - small["peak_mb"]
    print(report(result))
    if args.out:
        write_json(args.out, {"args": vars(args), **result})


if __name__ == "__main__":
    main()
