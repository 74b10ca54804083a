"""A new top-k method in one file: keys are scored from their signs alone, one byte per channel of side data."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sah_transformers import MaskerRegistry, TopKMasker, TopKMaskerConfig, record


@dataclass(frozen=True)
class SignConfig(TopKMaskerConfig):  # brings heavy_size and gqa
    type: ClassVar[str] = "sign"


@MaskerRegistry.register(SignConfig)
class SignMasker(TopKMasker):
    def append(self, keys, values, ctx):  # called once per key; kept on the cache, cropped and reordered with it
        return {"sign": keys.sign().to(torch.int8)}

    def score(self, queries, keys, values, ctx):  # [B, H, q, D], [B, G, K, D] -> [B, H, q, K]
        sign = ctx.side["sign"].to(queries.dtype)
        sign = sign.repeat_interleave(queries.shape[1] // sign.shape[1], dim=1)
        return (queries @ sign.transpose(-1, -2)).float()


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    config.sparse_attention = [{"type": "local", "window_size": 8}, {"type": "sign", "heavy_size": 0.1}]
    model = LlamaForCausalLM(config)
    with record(model) as log:
        model.generate(torch.randint(3, 256, (1, 200)), max_new_tokens=8, do_sample=False)
    print(log)
