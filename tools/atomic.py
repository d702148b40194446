"""AToMiC's parquet files -> image files below the root, and the url_to_path_mapping.json that prepare.py looks for.

    pip install pyarrow
    python -m tools.atomic --root ~/evqa --atomic ~/AToMiC-Images-v0.2
    python prepare.py --dataset evqa --root ~/evqa ...

AToMiC-Images-v0.2 (TREC-AToMiC on Hugging Face, CC BY-SA) holds most of the pictures that the knowledge bases of E-VQA
and InfoSeek name, as bytes in some hundred parquet files, by url. This unpacks those that your knowledge base lists, to
ROOT/atomic_images/<2 digits>/<hash of the url>.jpg. A part that is finished leaves ROOT/atomic_images/<part>.json, its
urls and paths, and is not read again: after a kill, run it again (with another knowledge base, remove those first).
Urls that AToMiC lacks (1.25 million of E-VQA's) stay out of the mapping, and prepare.py counts them.
"""

import argparse
import json
import os
from array import array

import numpy as np
from tqdm import tqdm

import prepare
from scorer import InputError, lock_folder, read_json, replacing, write_json

FOLDER = "atomic_images"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the benchmark's files, where the images go")
    parser.add_argument("--atomic", required=True, help="folder of AToMiC's *.parquet")
    parser.add_argument("--kb", default="encyclopedic_kb_wiki.json",
                        help="knowledge base, relative to the root (default encyclopedic_kb_wiki.json)")
    parser.add_argument("--out", default="url_to_path_mapping.json",
                        help="mapping to write, relative to the root (default url_to_path_mapping.json, where "
                             "prepare.py looks; another needs its --kb-images)")
    return parser.parse_args(argv)


def wanted_urls(kb):
    """Hashes of the image urls that a knowledge base lists, uint64 ascending: 8 bytes each, where a set takes 200."""
    hashes = array("Q")
    for key, entry in prepare.stream_json(kb, "knowledge base"):
        if not isinstance(entry, dict) or not isinstance(entry.get("image_urls"), list):
            raise InputError(f"{kb}: entry {key!r} has no list image_urls; is this the knowledge base? (--kb)")
        hashes.extend(prepare.hash8(url) for url in entry["image_urls"])
    return np.unique(np.frombuffer(hashes, np.uint64))


def batches(parquet, path):
    """Yield a parquet file's rows, few at once as pictures are megabytes. InputError where it is cut or damaged."""
    try:
        yield from parquet.ParquetFile(path).iter_batches(batch_size=256, columns=["image_url", "image"])
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise InputError(f"{path}: no whole parquet file ({' '.join(str(error).split())}); fetch it again") from error


def unpack(parquet, path, root, wanted):
    """Write the wanted images of one parquet file -> {url: path below the root}."""
    pairs = {}
    for batch in batches(parquet, path):
        urls = batch.column("image_url").to_pylist()
        hashes = np.array([prepare.hash8(url or "") for url in urls], np.uint64)
        for i in np.flatnonzero(np.isin(hashes, wanted)).tolist():
            value = batch.column("image")[i].as_py()
            content = value["bytes"] if isinstance(value, dict) else value
            if content:  # without it, the url counts as one that AToMiC lacks
                pairs[urls[i]] = f"{FOLDER}/{hashes[i] % 256:02x}/{hashes[i]:016x}.jpg"
                write_image(os.path.join(root, pairs[urls[i]]), content)
    return pairs


def write_image(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


def unpack_all(args):
    """Unpack the parts that are not there yet and write the mapping; returns how many urls it has."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError("AToMiC's parquet files need one more package: pip install pyarrow") from error
    kb, out, folder = (os.path.join(args.root, name) for name in (args.kb, args.out, FOLDER))
    if not os.path.isfile(kb):
        raise FileNotFoundError(f"{kb} is missing; name the knowledge base with --kb")
    if os.path.exists(out):  # perhaps another's, of more images
        raise InputError(f"{out} is there already: remove it, or write another file with --out")
    parts = sorted(name for name in os.listdir(args.atomic) if name.endswith(".parquet"))
    if not parts:
        raise InputError(f"{args.atomic} holds no .parquet; it must be the folder of AToMiC-Images-v0.2's files")
    os.makedirs(folder, exist_ok=True)
    lock = lock_folder(folder, "--root")  # noqa: F841 (let go of when this function ends)
    left = [part for part in parts if not os.path.isfile(os.path.join(folder, f"{part}.json"))]
    wanted = wanted_urls(kb) if left else None
    for part in tqdm(left, desc="AToMiC", unit="part", disable=None):
        pairs = unpack(parquet, os.path.join(args.atomic, part), args.root, wanted)
        write_json(os.path.join(folder, f"{part}.json"), pairs)
    return join_parts([os.path.join(folder, f"{part}.json") for part in parts], out)


def join_parts(paths, out):
    """Write the parts' pairs as one JSON object, a part in memory at a time; returns how many there are."""
    count = 0
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for path in paths:
            for url, image in read_json(path, "remove it, and run this again").items():
                file.write(f"{',' if count else '{'}\n {json.dumps(url, ensure_ascii=False)}: {json.dumps(image)}")
                count += 1
        file.write("\n}\n" if count else "{}\n")
    return count


def main(argv=None):
    args = parse_args(argv)
    try:
        count = unpack_all(args)
    except (InputError, OSError) as error:
        raise SystemExit(f"tools.atomic: {error}") from error
    print(f"{os.path.join(args.root, args.out)}: {count} images")


if __name__ == "__main__":
    main()
