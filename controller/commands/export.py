"""`rlhf-dist export`: a checkpoint as a model folder."""

from __future__ import annotations

import argparse

from controller.commands.registry import Commands


def register(commands: Commands) -> None:
    """`export`."""
    export = commands.add(
        "export", export_command, "a checkpoint as a Hugging Face model folder",
        "export runs/ppo models/mine",
        "export runs/ppo/checkpoints/step_40 models/critic --role critic --dtype bfloat16",
        "export runs/ppo s3://bucket/models/mine",
        "export runs/ppo hf://me/mine",
    )  # fmt: skip
    export.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="runs/NAME (its last one) or runs/NAME/checkpoints/step_N"
    )
    export.add_argument(
        "out", metavar="OUT", help="the folder to write, not there yet; or an address: s3://..., hf://ME/NAME"
    )
    export.add_argument("--role", help="whose model, where the checkpoint has several, e.g. actor")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: that of the model it was trained from"
    )
    export.add_argument("--adapter", action="store_true", help="the LoRA adapters alone, as peft and vLLM load them")


def export_command(arguments: argparse.Namespace) -> int:
    """Write the folder, and say so."""
    from controller.lifecycle.export import export

    print(f"wrote {export(arguments.checkpoint, arguments.out, arguments.role, arguments.dtype, arguments.adapter)}")
    return 0
