"""A folder of pictures -> a data folder, so that re-ranking can be tried on pictures of your own.

    python -m tools.folder photos --scorer open_clip:ViT-B-32/openai --out data/photos
    python -m tools.demo --data data/photos                                  # and tools.rerank --data data/photos
    python -m tools.demo --kb photos --scorer open_clip:ViT-B-32/openai      # the same at once, nothing is kept

Every picture is an entity of the knowledge base, called by its file; beetle.txt, where there is one, is the text of
beetle.jpg. Every picture is a query, too: its pool holds the other pictures nearest to it. None is marked as right.
"""

import argparse
import json
import os

import numpy as np
import torch

from scorer import (InputError, Query, load_scorer, normalise, replacing, write_array, write_json,
                    write_split)
from tools.rerank import at_least_one, candidate_parts, digest, read_candidates

QUESTION = "What is this?"  # of every picture, until another is typed


def write_folder(folder, scorer, out, k=20):
    """Write pictures and texts of `folder` as the data folder `out`. scorer: of load_scorer; k: most candidates."""
    found = read_candidates(folder)
    if len(found) < 2:
        raise InputError(f"{folder} holds one picture, which leaves nothing to rank it against: put more there")
    os.makedirs(out, exist_ok=True)
    if os.path.exists(os.path.join(out, "manifest.json")):
        raise InputError(f"{out} holds prepared data already: name another --out, or remove it")
    images, texts = (part.astype(np.float16) for part in candidate_parts([one[1:] for one in found], scorer))
    pool, retrieval = nearest_others(normalise(images), min(k, len(found) - 1))
    names = [os.path.basename(candidate.image) for candidate in found]
    queries = [Query(candidate.name, name, QUESTION, []) for candidate, name in zip(found, names)]
    with replacing(os.path.join(out, "kb.jsonl")) as path, open(path, "w", encoding="utf-8") as file:
        for candidate, name in zip(found, names):
            file.write(json.dumps({"entity_id": candidate.name, "title": candidate.name, "text": candidate.text,
                                   "images": [name]}) + "\n")
    for name, array in (("kb_image", images), ("kb_text", texts), ("kb_entity", np.arange(len(found), dtype=np.int32))):
        write_array(os.path.join(out, f"{name}.npy"), array)
    write_split(out, "test", queries, pool=pool, pool_image=pool, labels=np.zeros(pool.shape), retrieval=retrieval,
                full=images)
    write_json(os.path.join(out, "manifest.json"), {
        "version": 2, "dataset": f"pictures of {os.path.basename(os.path.abspath(folder))}", "args": {"folder": folder},
        "root": os.path.relpath(os.path.realpath(folder), os.path.realpath(out)), "K": pool.shape[1], "dim": scorer.dim,
        "scorer": {"name": scorer.name, "dtype": str(scorer.dtype).removeprefix("torch."),
                   "fingerprint": scorer.fingerprint().tolist()},
        "files": {name: {"bytes": os.path.getsize(os.path.join(out, name)), "sha256": digest(out, name)}
                  for name in sorted(os.listdir(out)) if name.endswith((".npy", ".jsonl"))},
        "splits": {"test": {"rows_read": len(found), "kept": len(found), "dropped": {}, "with_positive": 0}}})


def nearest_others(directions, k):
    """Unit vectors [N, D] -> of each the k others nearest to it, best first: rows int [N, k], cosines [N, k]."""
    pool, cosines = np.zeros((len(directions), k), np.int32), np.zeros((len(directions), k), np.float32)
    for i, direction in enumerate(directions):
        likeness = directions @ direction  # [N]
        likeness[i] = -np.inf  # itself
        pool[i] = np.argsort(-likeness, kind="stable")[:k]
        cosines[i] = likeness[pool[i]]
    return pool, cosines


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.folder", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="pictures, and texts of the same names")
    parser.add_argument("--scorer", required=True, help="as for prepare.py: open_clip:NAME/TAG, a folder, a file ...")
    parser.add_argument("--scorer-dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--out", required=True, help="data folder to write")
    parser.add_argument("--k", type=at_least_one, default=20, help="candidates of a picture (default 20)")
    parser.add_argument("--device", default="auto", help="auto (cuda if there is one), cpu, cuda, cuda:1 ...")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        write_folder(args.folder, load_scorer(args.scorer, device, args.scorer_dtype), args.out, args.k)
    except (InputError, FileNotFoundError) as error:
        raise SystemExit(f"folder: {error}") from error


if __name__ == "__main__":
    main()
