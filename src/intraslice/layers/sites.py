"""A decoder layer as a list of sites: the parts that read the residual stream and add to it. No torch.

Today a layer has one attention and one FFN. What comes after the sites (allocation, budget, records, reports) goes
through the list and takes what it finds, so that a layer may as well have several FFNs, or a site that stays whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from intraslice.runtime.families_intraslice import FamilySpec, LayerShape

ATTENTION, FFN = "attention", "ffn"
"""Kinds of sites: units of one kind are comparable with each other."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One part of a decoder layer.

    Attributes:
        name: within its layer.
        kind: "attention" (its units are query heads) or "ffn" (its units are channels).
        num_weights: linear weights of the dense site.
        units: how many units it has.
        unit_weights: linear weights that go with one unit. A kv head that serves several query heads is no part of
            them; it goes with the last one.
        num_groups: kv heads of attention; 0 elsewhere.
        reads: paths of the Linears that read the site's input, within the layer.
        writes: path of the Linear that writes its output.
    """

    name: str
    kind: str
    num_weights: int
    units: int
    unit_weights: int
    num_groups: int = 0
    reads: tuple[str, ...] = ()
    writes: str = ""

    @property
    def unit_share(self) -> float:
        """The part of the weights that the units are."""
        return self.units * self.unit_weights / self.num_weights


@dataclass(frozen=True)
class ModelSites:
    """The sites of all layers.

    Attributes:
        layers: the sites of each layer, in the order in which they run.
    """

    layers: tuple[tuple[Site, ...], ...]

    def of(self, kind: str) -> list[tuple[int, Site]]:
        """Return (layer, site) of all sites of a kind."""
        return [(layer, site) for layer, sites in enumerate(self.layers) for site in sites if site.kind == kind]

    def every(self) -> list[tuple[int, Site]]:
        """Return (layer, site) of all sites, in the order in which they run."""
        return [(layer, site) for layer, sites in enumerate(self.layers) for site in sites]

    def sizes(self, kind: str) -> tuple[int, ...]:
        """Return the linear weights of all sites of a kind."""
        return tuple(site.num_weights for _, site in self.of(kind))

    @property
    def num_weights(self) -> int:
        """Linear weights of all sites."""
        return sum(site.num_weights for sites in self.layers for site in sites)

    def without(self, gone: Collection[tuple[int, str]]) -> ModelSites:
        """Return the sites of the same layers without some, which are given as (layer, name)."""
        layers = enumerate(self.layers)
        return ModelSites(tuple(tuple(s for s in sites if (layer, s.name) not in gone) for layer, sites in layers))

    def by_site(self, values: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], ...]:
        """Return one value per site, layer by layer: the inverse of going through `of`.

        Args:
            values: for each kind the values of its sites, in the order of `of`.
        """
        layers: tuple[dict[str, float], ...] = tuple({} for _ in self.layers)
        for kind, numbers in values.items():
            for (layer, site), number in zip(self.of(kind), numbers, strict=True):
                layers[layer][site.name] = number
        return layers


def layer_sites(spec: FamilySpec, shape: LayerShape, hidden_size: int) -> tuple[Site, ...]:
    """Return the sites of a layer of this shape.

    Args:
        spec: the family.
        shape: of the layer.
        hidden_size: width of the residual stream.
    """
    total = spec.num_parameters(shape, hidden_size)
    attention = spec.num_parameters(replace(shape, intermediate_size=0), hidden_size)
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    (attention_reads, attention_writes), (ffn_reads, ffn_writes) = spec.attention_paths, spec.ffn_paths
    grouped = heads > kv_heads
    return (
        Site(
            name=ATTENTION,
            kind=ATTENTION,
            num_weights=attention,
            units=heads,
            # Without groups the kv head goes as well.
            unit_weights=hidden_size * (shape.qk_head_dim + shape.v_head_dim) if grouped else attention // heads,
            num_groups=kv_heads,
            reads=attention_reads,
            writes=attention_writes,
        ),
        Site(
            name=FFN,
            kind=FFN,
            num_weights=total - attention,
            units=shape.intermediate_size,
            unit_weights=hidden_size * spec.num_ffn_matrices,
            reads=ffn_reads,
            writes=ffn_writes,
        ),
    )
