"""How far two correct results may be apart, and why.

Equal bits are asked for only where the same operations run on the same shapes in one process, and where that is what
the package promises: a resumed run, and a recipe run twice.
"""

from __future__ import annotations

# Sums of the same float64 terms in another order.
FLOAT64 = {"atol": 1e-10, "rtol": 0.0}
# Logits of size 1 to 10 after three float32 layers.
FLOAT32 = {"atol": 1e-4, "rtol": 0.0}
# transformers takes the softmax of eager attention in float32, also in a float64 model: another length of the row
# then means other vector instructions, and another rounding.
EAGER = {"atol": 1e-5, "rtol": 0.0}
# The same float32 weights read from a file lie at other addresses than those made in memory, and matrix products
# round differently where rows begin elsewhere in a vector register.
READ_BACK = {"atol": 1e-5, "rtol": 0.0}
