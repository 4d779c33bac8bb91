"""Merge a LoRA adapter into its base: one complete model, for programs that do not support adapters.

    python -m grpo.models.merge_lora checkpoints/final merged --dtype bfloat16

ADAPTER is a folder with an adapter. Its base, named in adapter_config.json, is not changed. OUT is a new folder. The
merged weights are computed in float32 and rounded once to --dtype. OUT must not be the folder of the adapter: if a
folder holds both, transformers silently adds the adapter to the merged weights a second time.
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
    """Write the base with the merged adapter as a complete model folder."""
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
