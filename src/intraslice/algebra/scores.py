"""What parts of a layer are worth, from sums over tokens.

Shapes: H query heads, K kv heads, d head_dim.
"""

from __future__ import annotations

from torch import Tensor


def rope_pair_scores(query_abs_Hd: Tensor, key_abs_Kd: Tensor, num_tokens: int, pairs_to_channels: Tensor) -> Tensor:
    """Return the mean |q k| of the two channels of each pair after RoPE, per query head, [H, d / 2].

    Over all pairs of tokens the mean of |q_t k_s| is the product of the means of |q| and |k|.

    Args:
        query_abs_Hd: sum of |q| over the tokens.
        key_abs_Kd: sum of |k|.
        num_tokens: N.
        pairs_to_channels: int64 [d / 2, 2].
    """
    group = query_abs_Hd.shape[0] // key_abs_Kd.shape[0]
    product_Hd = query_abs_Hd * key_abs_Kd.repeat_interleave(group, 0) / num_tokens**2
    return product_Hd[:, pairs_to_channels].sum(-1)


def pair_energy_scores(
    query_energy_Hd: Tensor, key_energy_Kd: Tensor, num_tokens: int, pairs_to_channels: Tensor
) -> Tensor:
    """Return sqrt(E|q|^2 E|k|^2) of the two channels of each pair, per query head, [H, d / 2].

    These are the products of column norms of the roots of the moments of q and k, by which a CR decomposition of the
    scores q k^T picks its columns. Paper: MoDeGPT, Type II.

    Args:
        query_energy_Hd: sum of q^2 over the tokens.
        key_energy_Kd: sum of k^2.
        num_tokens: N.
        pairs_to_channels: int64 [d / 2, 2].
    """
    group = query_energy_Hd.shape[0] // key_energy_Kd.shape[0]
    queries_Hp = query_energy_Hd[:, pairs_to_channels].sum(-1)
    keys_Kp = key_energy_Kd[:, pairs_to_channels].sum(-1)
    return (queries_Hp * keys_Kp.repeat_interleave(group, 0)).sqrt() / num_tokens
