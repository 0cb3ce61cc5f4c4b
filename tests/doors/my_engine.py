"""An engine of one's own: the transformers engine, each sample drawn at a temperature of its own.

rollout:
  engine: {name: "my_engine:KIND", warming: {least: 0.8, most: 1.2}}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_lopd.config import EngineConfig, NotNegative, Sampling, key
from megatron_lopd.engines import EngineKind, EngineOptions, Prompted


@dataclass(frozen=True)
class WarmingOptions(EngineOptions):
    least: NotNegative = key("temperature of the coldest sample", 0.7)
    most: NotNegative = key("temperature of the warmest sample", 1.3)


class Warming(EngineKind):
    """A sample's seed decides its temperature, so that its neighbours do not."""

    name = "warming"
    caption = "transformers, each sample at a temperature of its own"
    Options = WarmingOptions

    def open(self, config: EngineConfig, model_dir: str) -> Any:
        # Here, and not above: commands that only ask import this file, and need no torch.
        from megatron_lopd.engines.transformers_engine import TransformersEngine

        class WarmingEngine(TransformersEngine):
            def generate(
                self, requests: Sequence[Prompted], sampling: Sampling, end_tokens: frozenset[int]
            ) -> Iterator[Any]:
                for request in requests:
                    share = request.seed % 1000 / 999
                    warmth = config.options.least + share * (config.options.most - config.options.least)
                    yield from super().generate([request], replace(sampling, temperature=warmth), end_tokens)

        return WarmingEngine(config, model_dir)


KIND = Warming()
