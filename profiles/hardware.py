"""Hardware targets: what a device can do at most by its data sheet, and which share of that software reaches.

Each target is a YAML file in `profiles/hardware/`, with the source of every figure in a comment beside it. The roofline
(tasks/measure/roofline.py) models costs from a target, and `puzzle plan` the time of a whole run.
"""

from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from profiles.errors import ProfileError, expanded
from profiles.schema import Fraction, Hardware, Precision, Section

FOLDER = Path(__file__).parent / "hardware"
ARCHITECTURES = Path(__file__).parent / "architectures"  # configs of parents on the hub that ask who reads them


class HardwareTarget(Section):
    """One kind of device: the rates of its data sheet, and the shares of them that software reaches."""

    name: str = Field(description="Name of the target; that of its file.")
    description: str = Field(default="", description="The device in words.")
    kind: Literal["gpu", "cpu"] = Field(default="gpu", description="What it is.")
    peak_tflops: dict[Literal["float64"] | Precision, PositiveFloat] = Field(
        min_length=1,
        description="10^12 floating-point operations per second for each precision: dense products, sums in float32. A "
        "precision that is left out cannot be used. float64 serves the closed-form fits of the search.",
    )
    memory_gb_per_second: PositiveFloat = Field(description="Bandwidth of its memory, in 10^9 bytes per second.")
    memory_gib: PositiveFloat = Field(description="Memory that a process may use, in GiB.")
    kernel_floor_microseconds: PositiveFloat = Field(description="Time of the shortest kernel, with its launch.")
    interconnect_gb_per_second: PositiveFloat | None = Field(
        default=None,
        description="Bandwidth to the other devices of a tensor-parallel group, in 10^9 bytes per second each way.",
    )
    max_tensor_parallel: PositiveInt = Field(default=1, description="Most devices that can share a layer.")
    achievable_compute: Fraction = Field(description="Share of the peak that products of a model's sizes reach.")
    achievable_bandwidth: Fraction = Field(description="Share of the memory's bandwidth that reading weights reaches.")
    achievable_interconnect: Fraction = Field(default=1.0, description="Share of the interconnect's bandwidth reached.")

    @model_validator(mode="after")
    def _groups_are_linked(self) -> "HardwareTarget":
        if self.max_tensor_parallel > 1 and self.interconnect_gb_per_second is None:
            raise ValueError("max_tensor_parallel above 1 needs interconnect_gb_per_second")
        return self

    def flops_per_second(self, precision: Precision) -> float:
        """Achievable FLOP/s; ProfileError when the device has no such precision."""
        peak = self.peak_tflops.get(precision)
        if peak is None:
            have = ", ".join(name for name in self.peak_tflops if name != "float64")
            raise ProfileError(f"hardware target {self.name} has no {precision}: set hardware.precision to {have}.")
        return peak * 1e12 * self.achievable_compute

    @property
    def bytes_per_second(self) -> float:
        """Achievable bytes per second from and to memory."""
        return self.memory_gb_per_second * 1e9 * self.achievable_bandwidth


def shipped_targets() -> list[str]:
    """Names of the targets that come with puzzle."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@lru_cache
def load_target(name: str) -> HardwareTarget:
    """A shipped target by its name, or one of your own by its file. Raises ProfileError."""
    own = expanded(name)
    file = own if own.suffix == ".yaml" else FOLDER / f"{name}.yaml"
    if not file.is_file():
        raise ProfileError(
            f"no hardware target {name}: name one of {', '.join(shipped_targets())}, or a YAML file like those in "
            "profiles/hardware/."
        )
    try:
        return HardwareTarget.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProfileError(f"{file} is not a valid hardware target: {_reason(error)}.") from None


def target_for(hardware: Hardware) -> HardwareTarget:
    """The target that a profile's hardware section names for the roofline. Raises ProfileError when it cannot do it."""
    target = load_target(hardware.name)
    check_use(target, hardware)
    return target


def check_use(target: HardwareTarget, hardware: Hardware) -> None:
    """ProfileError unless the target has the precisions and the group size that are asked for."""
    target.flops_per_second(hardware.precision)
    if hardware.tensor_parallel > target.max_tensor_parallel:
        raise ProfileError(
            f"hardware target {target.name} is linked in groups of at most {target.max_tensor_parallel}, not "
            f"{hardware.tensor_parallel}: lower hardware.tensor_parallel, or take another target."
        )


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False))
