"""What a compiler is told of programs that decode, by platform."""

# In decoding one slot of a cache is written and all are read once. Left to itself the TPU's compiler does both in its fast
# memory, so that the whole cache is written back at each step; this is how little of what it copies there it may use.
DECODING = {"tpu": {"xla_tpu_msa_inefficient_use_to_copy_ratio": "1.0"}}
