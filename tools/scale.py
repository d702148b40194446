"""How prepare.py fares at full scale: 2 million knowledge-base entries, a million vectors. Makes its own input.

    python -m tools.scale --folder scratch                    # all of it: 8 GB of JSON and 2.6 GB of vectors to disk,
                                                              # 10 GB of memory, some 20 minutes on 2 cores
    python -m tools.scale --folder scratch --entries 100000 --vectors 50000      # a twentieth
    python -m tools.scale --folder scratch --parts embed --dtype bfloat16        # 33 GB to disk, 19 GB of memory

Measured, each in a process of its own, so that a peak is nobody else's:
* stream: prepare.stream_json over the whole file, every entry as a dict, against the general JSON libraries that are
  installed (pip install msgspec orjson pysimdjson), which read the file whole and only have to find its entries, where
  they can. They take turns, so that a busy machine is unfair to none; the best turn of each counts, by the clock and by
  the processor's time;
* scan: all that prepare.py reads before it embeds, so streaming, image look-up and texts, and its memory beyond that of
  50 entries;
* search: exact top 20 of a batch of queries over all vectors, against the same product without looking at its result;
* retrieval: pools of 20 out of `--entities` entities of 3 images, for Q queries, and from that InfoSeek's 71,335;
* embed (only when asked for): load a scorer from disk and embed image files and texts as prepare.py does: seconds and
  peak memory of loading, and the hours of a million images. Without `--scorer` it makes a random EVA-CLIP-8B of the
  published size and dtype, in shards.

The text is random words; entries have the fields, order and spacing of encyclopedic_kb_wiki.json. Simplified: random
vectors, and images that exist by name only. Letters: M vectors, D numbers each, Q queries.
"""
import argparse
import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from scorer import EvaClip, EvaClipConfig, replacing, write_json

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("stream", "scan", "search", "retrieval", "embed")
LIBRARIES = {  # package: how it finds the entries of a file, without building what is in them if it can; most bytes
    "msgspec": ("import msgspec; count = len(msgspec.json.decode(data, type=dict[str, msgspec.Raw]))", 20e9),
    "simdjson": ("import simdjson; count = sum(1 for _ in simdjson.Parser().parse(data).keys())", 4e9),
    "orjson": ("import orjson; count = len(orjson.loads(data))", 2e9),  # builds everything: several times the file
}
# The stages are run by a process and not imported: tools import leaves.
MEASURE = """
import json, os, resource, sys, time
path = sys.argv[1]
def peak():  # bytes
    if os.path.exists("/proc/self/status"):  # getrusage's begins with that of the process that started this one
        with open("/proc/self/status") as file:
            return 1024 * int(file.read().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
{setup}
start, cpu = time.perf_counter(), time.process_time()
{work}
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps(dict(seconds=seconds, cpu_seconds=cpu, peak_mb=peak() / 2**20, count=count)))
"""
OURS = "count = sum(1 for _ in prepare.stream_json(path))"
WHOLE = "with open(path, 'rb') as file:\n    data = file.read()\n"
SEARCH = """
import numpy as np, torch
import prepare
features = np.load(path, mmap_mode="r")
m, d = features.shape
queries = prepare.normalise(np.random.default_rng(1).normal(size=({queries}, d)))
block = prepare.normalise(features[:1 << 16])
product, found, turns = [], [], 3
"""
SEARCH_WORK = """
for _ in range(turns):  # in turns, for a busy machine; the best of each counts
    begin = time.perf_counter()
    for first in range(0, m, len(block)):
        queries @ block[:m - first].T  # [Q, n]
    product.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    prepare.nearest_images(features, queries, 20)
    found.append(time.perf_counter() - begin)
gflop = 2e-9 * m * d * len(queries)
count = dict(product_gflops=gflop / min(product), search_gflops=gflop / min(found), ratio=min(product) / min(found))
"""
RETRIEVAL = """
import numpy as np
import prepare
features = np.load(path, mmap_mode="r")[:3 * {entities}]
owner = np.arange(len(features)) // 3
queries = np.random.default_rng(1).normal(size=({queries}, features.shape[1])).astype(np.float16)
count = []
"""
RETRIEVAL_WORK = """
for part in (queries[:len(queries) // 2], queries):
    begin = time.perf_counter()
    prepare.nearest_entities(features, owner, part, 20)
    count.append(time.perf_counter() - begin)
"""
EMBED = """
import torch
from scorer import load_scorer, read_image
texts, before = ["A made-up text of some words, as long as a title and the start of an article. " * 6] * 16, peak()
"""
EMBED_WORK = """
scorer = load_scorer(path, "{device}", {dtype!r})
loaded, size = time.perf_counter() - start, sum(p.nbytes for p in scorer.model.parameters())
most = peak() - before
scorer.batch_size, times = {batch}, []
for work in (lambda: scorer.image_features([read_image(image) for image in {images}]),
             lambda: scorer.text_features(texts)):
    work()  # the first is slower
    begin = time.perf_counter()
    work()
    times.append(time.perf_counter() - begin)
per_image, per_text = times[0] / {batch}, times[1] / len(texts)
count = dict(load_seconds=loaded, load_peak=most, bytes=size, per_image=per_image, per_text=per_text,
             images={batch}, device=str(scorer.device), dtype=str(scorer.dtype), threads=torch.get_num_threads())
"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="scratch", help="where the input is made, kept and used again")
    parser.add_argument("--parts", default=",".join(PARTS[:-1]),
                        help=f"comma list out of {', '.join(PARTS)} (default all but embed)")
    parser.add_argument("--entries", type=int, default=2_000_000, help="knowledge-base entries (default 2,000,000)")
    parser.add_argument("--entry-bytes", type=int, default=4000, help="bytes an entry, about (default 4000)")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="M (default 1,000,000)")
    parser.add_argument("--dim", type=int, default=1280, help="D (default 1280, EVA-CLIP-8B's)")
    parser.add_argument("--queries", type=int, default=2048, help="Q, queries a batch (default 2048)")
    parser.add_argument("--entities", type=int, default=100_000,
                        help="for the retrieval of pools; at most a third of the vectors (default 100,000)")
    parser.add_argument("--repeat", type=int, default=3, help="turns of stream (default 3)")
    parser.add_argument("--scorer", help="for embed: a folder or file (default: a random EVA-CLIP-8B, made there)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for embed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="for embed (default: prepare.py's)")
    parser.add_argument("--batch", type=int, default=8, help="for embed: images of a forward pass (default 8)")
    parser.add_argument("--out", help="also write the numbers to this .json")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if set(args.parts) - set(PARTS):
        parser.error(f"--parts: expected a comma list out of {', '.join(PARTS)}")
    for name in ("entries", "entry_bytes", "vectors", "dim", "queries", "entities", "repeat", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    args.entities = min(args.entities, max(1, args.vectors // 3))
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
    for name in names:
        Image.new("RGB", (64, 64), (int(name, 16) * 20, 90, 40)).save(os.path.join(root, "landmarks", f"{name}.jpg"))
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
    write_json(os.path.join(folder, "config.json"), {"model_type": "eva_clip", "config": dataclasses.asdict(config)})
    write_json(index, {"weight_map": files})
    return folder


def make_images(folder, count, width=640, height=480):
    """Paths of JPEG files of the size that photographs on Wikipedia have."""
    paths, rng = [], np.random.default_rng(0)
    os.makedirs(folder, exist_ok=True)
    for n in range(count):
        paths.append(os.path.abspath(os.path.join(folder, f"{n}.jpg")))
        if not os.path.isfile(paths[-1]):
            coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
            coarse.resize((width, height)).save(paths[-1], quality=90)
    return paths


# --------------------------------------------------------------------------------------------------------- measuring

def run(command):
    """Output of a command run in the project's folder; RuntimeError with what it said when it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[:2]} failed with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def measure(path, setup, work):
    """{"seconds", "cpu_seconds", "peak_mb", "count"} of a piece of Python in a process of its own."""
    script = MEASURE.format(setup=setup, work=work)
    return json.loads(run([sys.executable, "-c", script, os.path.abspath(path)]).splitlines()[-1])


def measure_stream(root, repeat):
    """Least time and most memory of each reader over the whole file in `repeat` turns."""
    path = os.path.join(root, "encyclopedic_kb_wiki.json")
    readers = {"prepare.stream_json": ("import prepare", OURS)}
    size, result = os.path.getsize(path), {}
    readers |= {name: ("", WHOLE + code) for name, (code, most) in LIBRARIES.items()
                if importlib.util.find_spec(name) and size <= most}
    for _ in range(repeat):
        for name, (setup, work) in list(readers.items()):
            try:
                turn = measure(path, setup, work)
            except RuntimeError as error:  # such as the want of memory
                print(f"{name}: {error}")
                del readers[name]
                continue
            result[name] = {key: (min if key != "peak_mb" else max)(value, result.get(name, turn)[key])
                            for key, value in turn.items()}
    return {"bytes": size, **result}


def measure_scan(root, small):
    """All that prepare.py reads of a root and of a small one: seconds, and peak memory beyond the small one's."""
    def read(folder):
        setup = "import prepare"
        flags = ["--root", os.path.abspath(folder), "--splits", "test"]
        work = (f"args = prepare.parse_args({flags!r})\nsplits = [prepare.read_questions(args, 'test')]\n"
                "prepare.find_images(args, splits)\n"
                f"prepare.read_kb(args, splits, {{}}, {os.path.join(folder, 'draft.jsonl')!r})\ncount = 0")
        return measure(folder, setup, work)
    big, base = read(root), read(small)
    return {"seconds": big["seconds"], "peak_mb": big["peak_mb"], "beyond_mb": big["peak_mb"] - base["peak_mb"]}


def measure_search(path, queries):
    return measure(path, SEARCH.format(queries=queries), SEARCH_WORK)["count"]


def measure_retrieval(path, entities, queries):
    """Seconds for `queries` pools, and from what the second half of them adds the hours for InfoSeek's 71,335."""
    half, whole = measure(path, RETRIEVAL.format(entities=entities, queries=queries), RETRIEVAL_WORK)["count"]
    rate = (whole - half) / (queries - queries // 2)
    return {"entities": entities, "queries": queries, "seconds": whole, "hours_for_71335": rate * 71335 / 3600}


def measure_embed(scorer, images, args):
    """Seconds and bytes of loading a scorer, seconds an image file and a text."""
    return measure(scorer, EMBED.format(batch=len(images)),
                   EMBED_WORK.format(batch=len(images), images=images, device=args.device, dtype=args.dtype))["count"]


def report(result):
    """The numbers as text."""
    lines = []
    if stream := result.get("stream"):
        lines.append(f"stream: {stream['bytes'] / 1e9:.2f} GB")
        ours, size = stream["prepare.stream_json"], stream["bytes"] / 1e6
        lines += [f"  {name:20}{size / turn['seconds']:6.0f} MB/s, {size / turn['cpu_seconds']:.0f} a CPU second, peak "
                  f"{turn['peak_mb']:.0f} MB; ours has {turn['seconds'] / ours['seconds']:.2f} and "
                  f"{turn['cpu_seconds'] / ours['cpu_seconds']:.2f} of its speed"
                  for name, turn in stream.items() if name != "bytes"]
    if scan := result.get("scan"):
        lines.append(f"scan: {scan['seconds']:.0f} s, peak {scan['peak_mb']:.0f} MB, {scan['beyond_mb']:.0f} MB beyond "
                     "a run on 50 entries")
    if search := result.get("search"):
        lines.append(f"search: {search['search_gflops']:.0f} GFLOP/s, the product alone "
                     f"{search['product_gflops']:.0f}: {search['ratio']:.0%}")
    if retrieval := result.get("retrieval"):
        lines.append(f"retrieval: {retrieval['queries']} pools out of {retrieval['entities']} entities in "
                     f"{retrieval['seconds']:.1f} s; 71,335 pools in {retrieval['hours_for_71335']:.2f} hours")
    if embed := result.get("embed"):
        lines += [f"embed: image tower of {embed['bytes'] / 1e9:.2f} GB ({embed['dtype']}) loaded in "
                  f"{embed['load_seconds']:.0f} s with a peak of {embed['load_peak'] / embed['bytes']:.2f} x that",
                  f"  {embed['device']}, {embed['threads']} threads, {embed['images']} at once: "
                  f"{embed['per_image']:.3f} s an image, {embed['per_text']:.3f} s a text; a million images take "
                  f"{embed['per_image'] * 1e6 / 3600:.0f} hours"]
    return "\n".join(lines)


def main(argv=None):
    args, result = parse_args(argv), {}
    if {"stream", "scan"} & set(args.parts):
        root = make_root(args.folder, args.entries, args.entry_bytes)
        if "stream" in args.parts:
            result["stream"] = measure_stream(root, args.repeat)
        if "scan" in args.parts:
            result["scan"] = measure_scan(root, make_root(args.folder, 50, args.entry_bytes))
    if {"search", "retrieval"} & set(args.parts):
        path = make_vectors(args.folder, args.vectors, args.dim)
        if "search" in args.parts:
            result["search"] = measure_search(path, args.queries)
        if "retrieval" in args.parts:
            result["retrieval"] = measure_retrieval(path, args.entities, args.queries)
    if "embed" in args.parts:
        images = make_images(os.path.join(args.folder, "images"), args.batch)
        result["embed"] = measure_embed(args.scorer or make_scorer(args.folder), images, args)
    print(report(result))
    if args.out:
        write_json(args.out, {"args": vars(args), **result})


if __name__ == "__main__":
    main()
