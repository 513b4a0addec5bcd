"""Hardware targets: what a device can do at most by its data sheet, and which share of that software gets.

One YAML file each under `profiles/hardware/`; every figure's source stands beside it in a comment. The roofline
(tasks/measure/roofline.py) models costs from them, `puzzle plan` the time of a whole run. Figures are per device.
"""

from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from profiles.errors import ProfileError, expanded
from profiles.schema import Fraction, Hardware, Precision, Section

FOLDER = Path(__file__).parent / "hardware"


class HardwareTarget(Section):
    """One device.

    peak_tflops: 10^12 floating point operations per second, dense, products with float32 sums; a precision that is
    absent cannot be used. float64 serves the closed-form fits of the search itself.
    kernel_floor_microseconds: what the shortest kernel takes, its launch included.
    interconnect_gb_per_second: one direction, to the other devices of a tensor-parallel group.
    """

    name: str
    description: str = ""
    kind: Literal["gpu", "cpu"] = "gpu"
    peak_tflops: dict[Literal["float64"] | Precision, PositiveFloat] = Field(min_length=1)
    memory_gb_per_second: PositiveFloat
    memory_gib: PositiveFloat
    kernel_floor_microseconds: PositiveFloat
    interconnect_gb_per_second: PositiveFloat | None = None
    max_tensor_parallel: PositiveInt = 1
    achievable_compute: Fraction = Field(description="share of the peak that products of a model's sizes reach")
    achievable_bandwidth: Fraction = Field(description="share of the memory's peak that streaming weights reaches")
    achievable_interconnect: Fraction = 1.0

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
        raise ProfileError(f"{file} is no valid hardware target: {_told(error)}.") from None


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


def _told(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False))
