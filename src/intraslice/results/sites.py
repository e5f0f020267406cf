"""The sites of a layer at which a prune records its error: attention, the FFN, or one expert of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_TITLES = {"attention": "Attention", "ffn": "FFN"}
_SHORT_TITLES = {"attention": "attn", "ffn": "FFN"}

OLD_FIELDS = {"attention_error": "attention", "ffn_error": "ffn"}
"""Fields of the records of earlier versions, and the sites they are about."""


def site_errors(record: Any) -> dict[str, float]:
    """Return the errors of a layer by site, without those that are not known.

    Args:
        record: of a layer, as an object or as JSON types, with a mapping `errors` from sites to errors; records of
            earlier versions have the two fields `attention_error` and `ffn_error` instead.
    """

    def field(name: str) -> Any:
        return record.get(name) if isinstance(record, Mapping) else getattr(record, name, None)

    errors = field("errors")
    if errors is None:
        errors = {site: field(name) for name, site in OLD_FIELDS.items()}
    return {site: error for site, error in errors.items() if error is not None}


def list_sites(records: Iterable[Any]) -> list[str]:
    """Return the sites at which any of the records has an error, in the order in which they appear."""
    return list(dict.fromkeys(site for record in records for site in site_errors(record)))


def site_title(site: str) -> str:
    """Return how a site is called in a head or a caption."""
    return _TITLES.get(site, site)


def short_site_title(site: str) -> str:
    """Return how a site is called where a column is narrow."""
    return _SHORT_TITLES.get(site, site)
