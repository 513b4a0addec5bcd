"""Of which machine, engine, precision and clock the seconds of a cost table are."""

import platform
from pathlib import Path

import torch
import transformers

from profiles.schema import Hardware
from tasks.engines.registry import installed_engine


def hardware_description(hardware: Hardware) -> dict[str, str]:
    """What measured figures hold for: machine, engine, versions, precision, threads."""
    return {
        "name": hardware.name,
        "machine": platform.machine(),
        "processor": processor(),
        **_engine_description(hardware),
        "device": hardware.device,
        **entry("accelerator", accelerator(hardware.device)),
        "precision": hardware.precision,
        **entry("kv_precision", hardware.kv_precision),
        "threads": str(threads_of(hardware)),
        "clock": clock_for(hardware),
    }


def accelerator(device: str) -> str | None:
    """A GPU's name, None for a CPU. Two machines with the same processor may hold different GPUs."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else None


def entry(name: str, text: str | None) -> dict[str, str]:
    """One entry of a description; no entry where there is no text."""
    return {name: text} if text else {}


def clock_for(hardware: Hardware) -> str:
    """`CPU` or `wall`: what the seconds of costs are. On one thread of a CPU they are CPU seconds, which do not grow
    when others use the machine.
    """
    here = hardware.engine != "roofline" and hardware.device == "cpu"
    return "CPU" if here and threads_of(hardware) == 1 else "wall"


def threads_of(hardware: Hardware) -> int:
    """Threads of one operation: as many as the profile says, else as many as torch uses here."""
    return hardware.threads or torch.get_num_threads()


def _engine_description(hardware: Hardware) -> dict[str, str]:
    if hardware.engine == "torch":
        return {"engine": f"torch {torch.__version__}", "transformers": transformers.__version__}
    return {"engine": installed_engine(hardware.engine).version()}


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
