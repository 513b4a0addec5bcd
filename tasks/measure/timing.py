"""What the seconds of a cost table are: of which machine, engine and clock, with which spread."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from profiles.schema import Hardware
from tasks.engines.registry import installed_engine


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians over rounds and their standard errors over them."""

    prefill: float
    decode: float
    prefill_spread: float
    decode_spread: float


def hardware_description(hardware: Hardware) -> dict[str, str]:
    """What the figures hold for: machine, engine, versions, precision, threads."""
    return {
        "name": hardware.name,
        "machine": platform.machine(),
        "processor": processor(),
        **_engine_description(hardware),
        "device": hardware.device,
        **noted("accelerator", accelerator(hardware.device)),
        "precision": hardware.precision,
        "threads": str(hardware.threads or torch.get_num_threads()),
        "clock": clock_for(hardware),
    }


def accelerator(device: str) -> str | None:
    """A GPU's name, None for a CPU: machines with the same processor may hold different ones."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else None


def noted(name: str, told: str | None) -> dict[str, str]:
    """One entry of a description, none where there is nothing to say."""
    return {name: told} if told else {}


def clock_for(hardware: Hardware) -> str:
    """What the seconds of costs are. On one thread of a CPU: CPU time, which a busy machine does not stretch."""
    threads = hardware.threads or torch.get_num_threads()
    here = hardware.engine != "roofline" and hardware.device == "cpu"
    return "CPU" if here and threads == 1 else "wall"


def _engine_description(hardware: Hardware) -> dict[str, str]:
    if hardware.engine == "torch":
        return {"engine": f"torch {torch.__version__}", "transformers": transformers.__version__}
    return {"engine": installed_engine(hardware.engine).version()}


def processor() -> str:
    """The CPU's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
