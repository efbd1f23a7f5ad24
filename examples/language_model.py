"""Compress a language model, see what it cost, and let it write.

    python examples/language_model.py                               # SmolLM2-135M, calibrated on C4
    python examples/language_model.py --model model.gguf --data notes.txt
    python examples/language_model.py --tiny                        # random weights and tokens, seconds

Reading .gguf files needs the extra `llm`: pip install '.[llm]' in the checkout.
"""

import argparse

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import oats_vision as ov


def tiny() -> nn.Module:
    """A Llama with random weights."""
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, **size)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hf:HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--data", default="c4", help="c4, wikitext, hf:name, a text file, demo")
    parser.add_argument("--samples", type=int, default=128, help="sequences")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens in each")
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--out", default="language_model_compressed")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, and random tokens")
    args = parser.parse_args()

    tokenizer = None if args.tiny else ov.load_tokenizer(args.model)
    if tokenizer is None:
        model, texts = tiny(), list(torch.randint(300, (12, 64)).split(4))
        held_out = [texts.pop()]
    else:
        model, _ = ov.load_model(args.model)
        texts = ov.load_sequences(
            args.data, tokenizer, samples=args.samples, sequence_length=args.sequence_length, batch_size=4, held_out=64
        )
        held_out = texts.held_out

    result = ov.compress(model, texts, held_out=held_out, rate=args.rate, progress=True)
    print(result)  # the ratio of perplexities, and how often the next token is the same
    result.save(args.out, overwrite=True, tokenizer=tokenizer)

    model = ov.load(args.out)
    prompt = torch.tensor([[1, 2, 3]]) if tokenizer is None else tokenizer("The cat", return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=20, do_sample=False)[0]
    print(written.tolist() if tokenizer is None else tokenizer.decode(written))


if __name__ == "__main__":
    main()
