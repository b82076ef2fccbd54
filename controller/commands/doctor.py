"""`rlhf-dist doctor`: what of this machine, or a cluster, would stop a run."""

from __future__ import annotations

import argparse

from controller.commands.registry import Commands, UserError


def register(commands: Commands) -> None:
    """`doctor`."""
    doctor = commands.add(
        "doctor", doctor_command, "what of this machine, or a cluster, would stop a run",
        "doctor", "doctor --address HEAD:6379 --format json", "doctor --only gloo,weight-transfer",
    )  # fmt: skip
    doctor.add_argument(
        "--address", metavar="HOST:PORT", help="a cluster (or auto); default: Ray on this machine alone"
    )
    doctor.add_argument("--format", choices=("text", "json"), default="text")
    doctor.add_argument("--folder", default="runs", help="where runs are to be written (output.root); default: runs")
    doctor.add_argument("--only", metavar="CHECK[,CHECK]", help="these checks, e.g. gloo,weight-transfer")
    doctor.add_argument("--limit", metavar="SECONDS", type=float, default=120.0, help="for all checks; default: 120")


def doctor_command(arguments: argparse.Namespace) -> int:
    """Run the checks; 1 where one failed. Raises UserError for an address that cannot be."""
    from controller.cluster.ray_address import AddressError, address_to_join
    from controller.doctor.command import doctor_command as examine

    try:
        address = address_to_join(arguments.address, key="--address")
    except AddressError as error:
        raise UserError(str(error)) from error
    return examine(arguments, address)
