"""The sites of a model of which only the sizes matter."""

from __future__ import annotations

from collections.abc import Sequence

from intraslice.layers.sites import ATTENTION, FFN, ModelSites, Site


def sites(
    attention: Sequence[int], ffn: Sequence[int], *, heads: int = 4, kv_heads: int | None = None, channels: int = 20
) -> ModelSites:
    """Return layers with one attention and one FFN site each.

    Args:
        attention: linear weights of the attention of each layer.
        ffn: linear weights of the FFN of each layer.
        heads: query heads of a layer.
        kv_heads: its kv heads; None gives each query head its own, which then goes with it.
        channels: of an FFN.
    """
    parts = heads if kv_heads in (None, heads) else heads + kv_heads
    for sizes, units in ((attention, parts), (ffn, channels)):
        assert not any(size % units for size in sizes), "units have whole numbers of weights"
    return ModelSites(
        tuple(
            (
                Site(
                    name=ATTENTION,
                    kind=ATTENTION,
                    num_weights=first,
                    units=heads,
                    unit_weights=first // parts,
                    num_groups=kv_heads or heads,
                ),
                Site(name=FFN, kind=FFN, num_weights=second, units=channels, unit_weights=second // channels),
            )
            for first, second in zip(attention, ffn, strict=True)
        )
    )


def kept_share(sites: ModelSites, keep: Sequence[dict[str, float]]) -> float:
    """Return the share of all weights that an allocation keeps."""
    kept = sum(keep[layer][site.name] * site.num_weights for layer, each in enumerate(sites.layers) for site in each)
    return kept / sites.num_weights
