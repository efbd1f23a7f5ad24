r"""How much each method loses against the dense model, by the bits that a weight takes, everything counted.

    python eval/studies/bits_table.py closeness            # of the demo
    python eval/studies/bits_table.py features --model dinov2_small --decoder dinov2_small/decoder.onnx \
        --data imagenet --samples 96 --lines gptq bits --seeds 0
    python eval/studies/bits_table.py texts --model model.gguf --data calibration.txt \
        --eval-data held_out.txt other.txt --samples 64 --sequence-length 512

Writes bits_table.csv (a row for each compression, as soon as it is measured), and a table and a plot of each measure;
run it again to go on where it stopped. What is floating counts as 16 bits.
"""

from pathlib import Path
from typing import Any

from accuracy_table import BENCHES, GROWING, MEASURES, parse, with_loss
from study import SETTINGS, collect, described, run, settings_of, show_values, suffix_of

FORMATS = [("int8", 64), ("int4", 64), ("int3", 32), ("int3", 64), ("int2", 32), ("int2", 64)]
NORMAL = [("nf4", 64), ("nf3", 64), ("nf2", 64)]
RATES = [0.3, 0.5, 0.7]
ROUNDED: list[dict[str, Any]] = [{"values": values, "group_size": size} for values, size in FORMATS]
IN_NORMAL: list[dict[str, Any]] = [{"values": values, "group_size": size} for values, size in NORMAL]
# name -> settings of each of its points
LINES: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"method": "rtn"} | one for one in ROUNDED],
    "gptq": [{"method": "gptq"} | one for one in ROUNDED],
    "gptq+targets": [{"method": "gptq", "targets": True} | one for one in ROUNDED],
    "gptq+targets+nf": [{"method": "gptq", "targets": True} | one for one in IN_NORMAL],
    "sparsegpt+int4": [{"method": "sparsegpt", "pattern": "row", "values": "int4", "rate": rate} for rate in RATES],
    "oats": [{"rate": rate} for rate in RATES],
    "oats+int6": [{"rate": rate, "values": "int6"} for rate in RATES],
    "oats+nf4": [{"rate": rate, "values": "nf4"} for rate in RATES],
    "bits": [{"bits": bits} for bits in (2.3, 2.5, 3.0, 3.5, 4.25, 6.0, 8.0)],
}


def main() -> None:
    args = parse(__doc__, "results/bits_table", list(LINES), by_rate=False)
    bench = BENCHES[args.bench](args)
    cells = [settings for line in args.lines for settings in LINES[line]]
    names = {key(described(settings_of(bench, one))): line for line in args.lines for one in LINES[line]}
    rows = run(bench, args, "bits_table", cells)
    for target in bench.targets:
        chosen = [with_loss(row) for row in rows if row["eval_data"] == target]
        title = f"{Path(chosen[0]['model']).name}{f' on {Path(target).name}' * (len(bench.targets) > 1)}"
        suffix = suffix_of(target, bench.targets) * (len(bench.targets) > 1)
        for measure, words in MEASURES[args.bench].items():
            values = collect(
                [row for row in chosen if row[measure]], lambda row: names[key(row)], "bits_a_weight", measure
            )
            if values:
                out = args.out / f"{measure}{suffix}"
                show_values(values, title, "bits a weight", words, out, log_y=measure in GROWING)


def key(settings: dict[str, Any]) -> tuple[str, ...]:
    """What tells points apart."""
    return tuple(str(settings[field]) for field in SETTINGS)


if __name__ == "__main__":
    main()
