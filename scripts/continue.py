"""Let saved models continue a prompt: continue.py PROMPT MODEL [MODEL ...]."""

from __future__ import annotations

import sys
from typing import Any

from intraslice.loading import load_model


def main() -> None:
    """Print the greedy continuation of each model."""
    prompt, *names = sys.argv[1:]
    for name in names:
        # The stubs of transformers know no `generate` of a class that is found at run time.
        model: Any
        model, tokenizer = load_model(name)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        print(f"{name}\n    {tokenizer.decode(tokens[0], skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
