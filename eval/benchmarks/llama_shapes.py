r"""A compressed language model of a real one's shapes with random weights, for timing without a download.

    python eval/benchmarks/llama_shapes.py llama_shapes/            # six layers of Llama-3.2-1B's shapes, 365 M
    oats-vision bench llama_shapes/ --dtype bfloat16

Only where the non-zeros lie decides the speed, so that two iterations are enough. The vocabulary is a
quarter of the real one.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oats_vision as ov


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder for the checkpoint")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="of queries; of keys and values")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--rank-ratio", type=float, default=0.2)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads[0],
        num_key_value_heads=args.heads[1],
        vocab_size=args.vocabulary,
    )
    model = LlamaForCausalLM(config).eval()
    texts = [{"input_ids": torch.randint(args.vocabulary, (4, 128))} for _ in range(2)]
    settings = {"rate": args.rate, "rank_ratio": args.rank_ratio, "iterations": 2, "refit": False}
    ov.compress(model, texts, **settings, storage_dtype="float16")
    ov.save(model, args.out)


if __name__ == "__main__":
    main()
