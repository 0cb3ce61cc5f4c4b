"""Log-probs and losses over a vocabulary that ranks share, and what they are made of."""

# Bytes of logits in memory at once by kind of device, unless the caller knows better. Here, since estimates
# read it too, and must not wait for torch.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 1_250_000_000}
