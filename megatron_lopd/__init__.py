"""Offline on-policy distillation (Lightning OPD, arXiv 2604.13010) on Megatron-Core.

Megatron-Core warns at import about each optional package it lacks (Apex, Transformer Engine). `lopd
doctor` reports those; on every other command's console they are noise. They are filtered here, since
every module of the package is imported after this one, and so Megatron-Core is too.
"""

import warnings

__version__ = "0.1.0"

warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# What torch says of Megatron-Core's code. The filter above does not see these: without CUDA they come
# from mcore.compat, which stands between the two, or they are no UserWarning.
for _message in (
    r"The \.grad attribute of a Tensor that is not a leaf",  # the optimizer's fp32 shards are views
    r"`torch\.distributed\.\w+` is deprecated",
    r"`load_state_dict` is deprecated",
    r"Please use DTensor instead",
):
    warnings.filterwarnings("ignore", message=_message)
