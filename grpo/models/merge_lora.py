"""Merge a LoRA adapter into its base: one model, for programs that know no adapters.

    python -m grpo.models.merge_lora checkpoints/final merged --dtype bfloat16

ADAPTER is a folder with an adapter; its base, which adapter_config.json names, stays as it is. OUT is a new folder.
The sum is made in float32 and rounded once, to --dtype. OUT must not be the adapter's folder: where both lie side by
side, transformers adds the adapter to the merged weights once more, silently.
"""

import argparse
from pathlib import Path

from grpo.errors import InputError, errors_explained


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m grpo.models.merge_lora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder with adapter_model.safetensors")
    parser.add_argument("out", metavar="OUT", help="the folder to write, which must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    with errors_explained():
        folder, out = Path(arguments.adapter), Path(arguments.out)
        if out.exists():
            raise InputError(f"OUT: {out} exists already; expected a new folder")
        save_merged(folder, out, dtype=arguments.dtype)
        print(f"{out} holds the merged model")


def save_merged(adapter: Path, out: Path, *, dtype: str = "float32") -> None:
    """Write base + adapter as one ordinary model folder."""
    import torch

    from grpo.models.loading import load_policy
    from grpo.models.lora import is_adapter_folder
    from grpo.models.saving import save_model

    if not is_adapter_folder(adapter):
        raise InputError(f"ADAPTER: {adapter} holds no adapter (adapter_config.json), or a whole model beside it")
    model, tokenizer = load_policy(str(adapter), base_seed=0, device=torch.device("cpu"))
    save_model(model.to(getattr(torch, dtype)), tokenizer, out)


if __name__ == "__main__":
    main()
