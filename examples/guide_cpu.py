"""The guide's example scaled down to run in seconds on a CPU, in float32.

python examples/guide_cpu.py [avgpool|weightedpool|linear]
"""

import sys

import torch

from nsagen.model import InferenceConfig, ToyNSALlama, ToyNSALlamaConfig

config = ToyNSALlamaConfig(
    hidden_size=64,
    intermediate_size=224,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
    max_position_embeddings=4096,
    rope_theta=500000.0,
    rope_scaling={
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 512,
        "rope_type": "llama3",
    },
    compress_type=sys.argv[1] if len(sys.argv) > 1 else "weightedpool",
    kernel_size=8,
    kernel_stride=4,
    block_size=16,
    topk=4,
    init_blocks=1,
    local_blocks=2,
    window_size=32,
)
inference_config = InferenceConfig(
    max_batch_size=4,
    max_length=256,
    max_new_tokens=16,
)
model = ToyNSALlama(config, inference_config)
kv_cache_bytes = inference_config.cache_bytes(config, torch.float32)
print(f"\nEXAMPLE CACHE:\n{kv_cache_bytes / 2**20:.1f} MiB")

# Example input
batch_size = 4
seqlens = torch.randint(1, 128, (batch_size,), dtype=torch.int32)
cu_seqlens = torch.zeros(batch_size + 1, dtype=torch.int32)
cu_seqlens[1:] = torch.cumsum(seqlens, dim=0)
input_ids = torch.randint(0, config.vocab_size, (int(cu_seqlens[-1]),), dtype=torch.int64)
print(f"\nEXAMPLE INPUT:\ncu_seqlens: {cu_seqlens}\ninput_ids: {input_ids.shape}\n")

# Example forward
logits = model(input_ids, cu_seqlens)
print(f"\nEXAMPLE OUTPUT:\nlogits: {logits.shape}\n")

# Example generate
output_tokens = model.generate(input_ids, cu_seqlens)
print(f"\nEXAMPLE GENERATE:\noutput_tokens: {output_tokens}\n")
