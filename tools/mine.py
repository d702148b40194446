"""Hard negatives as the authors' release mines them -> a TREC run of candidates for `prepare.py --retrieved`.

    python -m tools.mine --data data/world --split train --all --k 5 --similarity-tolerance .05 --out train.trec
    python prepare.py --splits train --k 5 --retrieved train.trec --out data/mined

The release's pool is the positive and the k - 1 other entities whose best image is the nearest to the positive's in
cosine with the full query image, on either side; a query with fewer than k - 1 of them within the tolerance has no
pool. Exact: every image of the knowledge base is compared, in one pass over a data folder of prepare.py. Queries are
counted and left out where the positive is not in the knowledge base, and where it has too few neighbours.

prepare.py leaves out train queries whose pool lacks the positive, so a folder knows the others' features only. --all
mines for them, too: it reads the questions again, as prepare.py did, with the features that it left in DATA.work.
"""

import argparse
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

import prepare
from scorer import InputError, load_data, load_scorer, normalise, same_scorer, write_trec
from tools.echosight import embed_queries


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/world", help="folder that prepare.py wrote (default data/world)")
    parser.add_argument("--split", default="train", help="train (default), val or test")
    parser.add_argument("--all", action="store_true",
                        help="also the rows that prepare.py left out for want of the positive (default: its queries)")
    parser.add_argument("--k", type=int, default=5, help="entities a pool, the positive among them, >= 2 (default 5)")
    parser.add_argument("--similarity-tolerance", type=float, default=0.05,
                        help="most difference in cosine between a negative and the positive, above 0 (default 0.05)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda, cuda:1 (default cuda where there is one)")
    parser.add_argument("--out", required=True, help="TREC run to write")
    args = parser.parse_args(argv)
    if args.k < 2 or not args.similarity_tolerance > 0:
        parser.error("--k must be at least 2 and --similarity-tolerance above 0")
    return args


def read_queries(data, args):
    """The queries to mine for -> (ids [Q], features [Q, D], of each its positives, entity ids)."""
    if not args.all:
        queries = list(data.queries)
        return [query.query_id for query in queries], data.full, [query.positives for query in queries]
    flags = prepare.parse_args([])
    vars(flags).update(data.manifest["args"])  # the folder's own
    flags.root, flags.out, flags.splits = data.root, args.data, [args.split]
    scorer = load_scorer(flags.scorer, args.device, data.manifest["scorer"]["dtype"])
    same_scorer(args.data, data.manifest, scorer)
    rows, full, image = embed_queries(flags, scorer)
    return [row.query_id for row in rows], full[image], [[row.positive] for row in rows]


def first_images(data):
    """Row of each entity's first image, and the end: int64 [E + 1]. Rows of an entity are consecutive."""
    return np.append(np.flatnonzero(np.diff(data.kb_entity, prepend=-1)), len(data.kb_entity))


def best_cosine(data, starts, query, entity):
    """Cosine of a normalised query [D] with the best image of an entity (a line of kb.jsonl)."""
    return (normalise(data.kb_image[starts[entity]:starts[entity + 1]]) @ query).max()


def mine(data, full, positives, k, device="cpu", block=1 << 15, at_once=1 << 10):
    """The k - 1 entities nearest to the positive, for queries full [Q, D] with positives [Q] (lines of kb.jsonl).

    -> (entities [Q, k - 1], -1 where the knowledge base has too few; gaps [Q, k - 1] of the cosines, ascending). Of
    equal gaps the first entities: with an image that many entities share, their names would else be left to chance.
    """
    queries, starts = normalise(full), first_images(data)  # [Q, D], [E + 1]
    target = np.array([best_cosine(data, starts, *pair) for pair in zip(queries, positives)], np.float32)  # [Q]
    queries, target = torch.from_numpy(queries).to(device), torch.from_numpy(target).to(device)[:, None]
    gold = torch.from_numpy(positives).to(device)[:, None]  # [Q, 1]
    gaps = torch.full((len(full), k - 1), float("inf"), device=device)
    found = torch.full((len(full), k - 1), -1, device=device)
    # Blocks of about so many images, of whole entities.
    edges = np.unique(np.append(starts[np.searchsorted(starts, np.arange(0, starts[-1], block))], starts[-1]))
    for first, end in zip(edges, tqdm(edges[1:], desc="mine", unit="block", disable=None)):
        features = torch.from_numpy(normalise(data.kb_image[first:end])).to(device)  # [n, D]
        owner = torch.from_numpy(data.kb_entity[first:end].astype(np.int64)).to(device)  # [n]
        for start in range(0, len(full), at_once):  # 1,024 queries times 32,768 images: 134 MB of cosines
            part = slice(start, start + at_once)
            entities, gap = entity_gaps(queries[part] @ features.T, owner, target[part], gold[part])
            gaps[part], found[part] = nearest(torch.cat([gaps[part], gap], 1),  # [q, k - 1 + e], entities ascending
                                              torch.cat([found[part], entities.expand(len(gap), -1)], 1), k - 1)
    gaps, order = gaps.sort(dim=1, stable=True)
    return found.gather(1, order).cpu().numpy(), gaps.cpu().numpy()


def entity_gaps(cosines, owner, target, gold):
    """Cosines [q, n] with images of the entities owner [n] -> (entities [e], gaps [q, e] between an entity's best
    cosine and the positive's, target [q, 1]); the positive itself, gold [q, 1], is infinitely far."""
    entities, column = owner.unique_consecutive(return_inverse=True)  # [e], [n]
    best = cosines.new_full((len(cosines), len(entities)), -2)
    best.scatter_reduce_(1, column.expand(len(cosines), -1), cosines, "amax")  # [q, e]
    gap = (best - target).abs()
    gap[entities[None] == gold] = float("inf")
    return entities, gap


def nearest(gap, names, count):
    """The `count` smallest of each row of gap [q, n], the first of equal ones -> (gaps, names) [q, count]."""
    last = gap.topk(count, dim=1, largest=False).values[:, -1:]  # [q, 1] topk leaves the order of equal values open
    below, equal = gap < last, gap == last
    keep = below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))  # `count` in each row
    return gap[keep].view(-1, count), names[keep].view(-1, count)


def pools(data, args, counts):
    """Yield (query id, entity ids, cosines) of each pool; what becomes of every query is added to counts."""
    ids, full, names = read_queries(data, args)
    wanted, starts = {name for own in names for name in own}, first_images(data)  # [E + 1]
    line_of = {entity["entity_id"]: j for j, entity in enumerate(data.entities) if entity["entity_id"] in wanted}
    # [Q] lines of kb.jsonl, -1 = not there
    positives = np.array([next((line_of[name] for name in own if name in line_of), -1) for own in names], np.int64)
    rows = np.flatnonzero(positives >= 0)
    counts["positive not in the knowledge base"] = len(ids) - len(rows)
    found, gaps = mine(data, full[rows], positives[rows], args.k, args.device)
    for i, negatives, gap in zip(rows.tolist(), found.tolist(), gaps):
        if gap[-1] > args.similarity_tolerance:
            counts["too few negatives as similar as the positive"] += 1
            continue
        pool, query = [int(positives[i]), *negatives], normalise(full[i])
        counts["pools"] += 1
        yield (ids[i], [data.entity(j)["entity_id"] for j in pool],
               [best_cosine(data, starts, query, j) for j in pool])
    if not counts["pools"]:
        raise InputError(f"no query of {args.split} has a pool: {dict(counts)}; try a larger --similarity-tolerance")


def main(argv=None):
    args, counts = parse_args(argv), Counter(pools=0)
    try:
        write_trec(args.out, pools(load_data(args.data, args.split), args, counts), "mined")
    except (InputError, OSError) as error:
        raise SystemExit(f"tools.mine: {error}") from error
    print(f"{args.out}: {', '.join(f'{count} {reason}' for reason, count in counts.items() if count)}")


if __name__ == "__main__":
    main()
