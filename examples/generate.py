"""Generate with sparse attention; names a model of the hub, or without an argument a tiny random one (no network)."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import sah_transformers

STACK = [
    {"type": "sink", "sink_size": 16},
    {"type": "local", "window_size": 16},
    {"type": "oracle_top_k", "heavy_size": 0.05},
]


def main() -> None:
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], sparse_attention=STACK)
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        inputs = tokenizer("Once upon a time, in a land far away, " * 40, return_tensors="pt")
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        model = AutoModelForCausalLM.from_config(config, sparse_attention=STACK)
        inputs = {"input_ids": torch.randint(3, 256, (1, 400))}
    with sah_transformers.record(model) as log:
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print("new tokens:", tokens[0, inputs["input_ids"].shape[1] :].tolist())
    print(log)


if __name__ == "__main__":
    main()
