"""EchoSight's and OMGM's result files -> a TREC run: candidates for prepare.py, or a row of the tables.

    python -m tools.runs result.json --out theirs.trec --split test
    python prepare.py --dataset evqa --root DIR --retrieved theirs.trec ...          # their candidates as our pools
    python -m tools.trec --data data/evqa --run runs/evqa --run-file EchoSight=theirs.trec     # their ranking as a row

Both projects write one JSON object, a query each, with the entities by url, best first:

    EchoSight   {query: {"retrieved_entries": [url ...], "reranked_entries": [url ...]}}    the second is taken if there
    OMGM        {query: {"retrieved_entities": [{"url": url, "title": ...} ...]}}

They count E-VQA's questions as E-VQA_0, E-VQA_1 ...; ours are E-VQA_test_0 and so on, as every split has a first one.
--split says which split the file is of. InfoSeek's ids are its own, and stay.
"""

import argparse
import json
import re

from scorer import InputError, write_trec


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", help="the .json that EchoSight or OMGM wrote")
    parser.add_argument("--out", required=True, help="TREC run to write")
    parser.add_argument("--split", choices=("train", "val", "test"),
                        help="the file's E-VQA_<i> is our E-VQA_<split>_<i> (default: ids stay as they are)")
    parser.add_argument("--stage", choices=("reranked", "retrieved"), default="reranked",
                        help="of EchoSight's two lists: its re-ranking if there is one (default), or what it retrieved")
    return parser.parse_args(argv)


def read_result(path):
    """The JSON object in a file, a query each. InputError where it is none, or cut short."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise InputError(f"{path}: not whole JSON in UTF-8 ({error}); copy the file again") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: expected an object of query: result, found a {type(content).__name__} of "
                         f"{len(content) if isinstance(content, (dict, list)) else 1}; this is another file of theirs")
    return content


def entities_of(entry, where, stage="reranked"):
    """Entity urls of one query's result, best first and distinct: EchoSight's sections may repeat an entity."""
    known = {"retrieved_entities", "reranked_entries", "retrieved_entries"}
    if not isinstance(entry, dict) or not known & entry.keys():
        raise InputError(f"{where} has none of reranked_entries, retrieved_entries (EchoSight) and retrieved_entities "
                         "(OMGM): this is another file of theirs")
    if "retrieved_entities" in entry:
        listed = entry["retrieved_entities"]
        if isinstance(listed, list):
            listed = [entity.get("url") if isinstance(entity, dict) else None for entity in listed]
    else:
        reranked = entry.get("reranked_entries") if stage == "reranked" else None
        listed = reranked or entry.get("retrieved_entries")
    if not isinstance(listed, list) or not all(isinstance(url, str) for url in listed):
        raise InputError(f"{where}: its entities must be a list of urls (of objects with a \"url\" in OMGM's form)")
    return list(dict.fromkeys(listed))


def our_id(query_id, split):
    """E-VQA_12 -> E-VQA_test_12; every other id as it is. split None: nothing is changed."""
    return re.sub(r"^E-VQA_(?=\d+$)", f"E-VQA_{split}_", query_id) if split else query_id


def convert(args):
    """Write the run; returns (queries, entities, queries left out as their list is empty)."""
    rows, empty = [], 0
    for query_id, entry in read_result(args.result).items():
        entities = entities_of(entry, f"{args.result}: query {query_id!r}", args.stage)
        if entities:
            # Their similarities are of different stages and not always sorted: the place is what they rank by.
            rows.append((our_id(query_id, args.split), entities, [1 / rank for rank in range(1, len(entities) + 1)]))
        empty += not entities
    if not rows:
        raise InputError(f"{args.result}: none of its {empty} queries lists an entity")
    write_trec(args.out, rows, "theirs")
    return len(rows), sum(len(entities) for _, entities, _ in rows), empty


def main(argv=None):
    args = parse_args(argv)
    try:
        queries, entities, empty = convert(args)
    except (InputError, OSError) as error:
        raise SystemExit(f"tools.runs: {error}") from error
    print(f"{args.out}: {queries} queries, {entities} entities" + (f"; {empty} queries list none" if empty else ""))


if __name__ == "__main__":
    main()
