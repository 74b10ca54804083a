"""What a stack selects, without a model: the mask of one head in characters, and what was lost."""

import torch

from sah_transformers import sparse_attention

STACK = [
    {"type": "sink", "sink_size": 2},
    {"type": "local", "window_size": 4},
    {"type": "oracle_top_k", "heavy_size": 0.1},
]


def main() -> None:
    torch.manual_seed(0)
    queries = torch.randn(1, 4, 32, 16)  # [B, H, Q, D]
    keys, values = torch.randn(2, 1, 2, 32, 16)  # [B, G, K, D]: two query heads share a KV head
    out, mask = sparse_attention(queries, keys, values, STACK)
    dense = sparse_attention(queries, keys, values, [], return_mask=False)

    visible = torch.ones(32, 32, dtype=torch.bool).tril()
    active = mask.get_dense_mask()[0, 0] > 0
    for row, seen in zip(active, visible, strict=True):
        print("".join("#" if a else "." if s else " " for a, s in zip(row, seen, strict=True)).rstrip())
    print(f"density {mask.get_density(visible=visible[None, None]):.3f}")
    print(f"output error {(out - dense).norm() / dense.norm():.3f}")


if __name__ == "__main__":
    main()
