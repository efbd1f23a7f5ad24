r"""Make the calibration text of our tables on SmolLM2: five kinds of English, in pieces of 6,000 characters.

    apt-get download anarchism debian-policy fortunes fortunes-min
    for package in *.deb; do dpkg -x $package debian; done
    python eval/models/five_texts.py debian five_texts.jsonl

The kinds are *Alice* and the first 300 kB of Python's documentation whole, and of the packages an FAQ on politics,
Debian's policy, and collected quotations.
"""

import argparse
import gzip
import json
import pydoc_data.topics
import random
from pathlib import Path

import oats_vision
from oats_vision.files import replacing

LENGTH = 6000  # characters in a piece
DOCUMENTATION = 300_000  # characters
QUOTATIONS = ("science", "people", "songs-poems", "literature", "definitions")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("debian", type=Path, help="folder into which the packages were extracted")
    flags.add_argument("out", type=Path, help="JSON lines to write")
    args = flags.parse_args()
    share, chosen = args.debian / "usr/share", random.Random(0)
    alice = (Path(oats_vision.__file__).parent / "demo/alice.txt").read_text()
    topics = pydoc_data.topics.topics
    documentation = "\n\n".join(topics[name] for name in sorted(topics))[:DOCUMENTATION]
    faq = "\n\n".join(_unpacked(file) for file in sorted((share / "doc/anarchism/markdown").glob("sec*.md.gz")))
    policy = _unpacked(share / "doc/debian-policy/policy.txt.gz")
    quotations = "\n".join((share / "games/fortunes" / name).read_text() for name in QUOTATIONS)
    kept = [
        *_pieces(alice),
        *_pieces(documentation),
        *chosen.sample(_pieces(faq), 120),
        *_pieces(policy)[:60],
        *chosen.sample(_pieces(quotations), 60),
    ]
    with replacing(args.out) as temporary:
        temporary.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in kept))
    print(f"{len(kept)} pieces of text in {args.out}")


def _unpacked(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8", errors="replace") as stream:
        return stream.read()


def _pieces(text: str) -> list[str]:
    return [text[start : start + LENGTH] for start in range(0, len(text), LENGTH)]


if __name__ == "__main__":
    main()
